"""Run by torchrun in 1 or 2 processes: Fishers of one model, each a dense matrix or a sum, and again from the disk."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from holdfast.core import packing  # noqa: E402
from holdfast.core.fisher import Fishers, unseen  # noqa: E402
from holdfast.core.retain import Retain  # noqa: E402
from holdfast.core.selection import layer_updates, trainable  # noqa: E402
from holdfast.core.tap import Tap  # noqa: E402
from holdfast.core.types import FisherSpec  # noqa: E402
from holdfast.functional.fisher import Kronecker  # noqa: E402
from holdfast.functional.packed_fishers import LayerFisher  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import processes_done  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
ONE_PASS = 2048  # of tokens: all rows in one, so that the second process has none


def numbers(fisher: LayerFisher) -> torch.Tensor:
    """What does not depend on the signs of eigenvectors."""
    if not isinstance(fisher, Kronecker):
        return fisher.gram()
    sides = [factor.times(torch.eye(factor.size, dtype=torch.float64)) for factor in (fisher.out, fisher.into)]
    return torch.cat([side.flatten() for side in sides])


def main(folder: str) -> None:
    """Collect every kind, in one pass and in many, and read it again."""
    torch.distributed.init_process_group("gloo")
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    model = tiny.lora(tiny.llama()).double()
    tap, updates, found = Tap(model), layer_updates(model, trainable(model)), {}
    forwards: list[int] = []
    tap.backbone.register_forward_pre_hook(lambda *_: forwards.append(1))
    for packing.TOKENS in (ONE_PASS, 12):
        os.environ["HOLDFAST_CACHE"] = f"{folder}/cache-{processes}-{packing.TOKENS}"
        for kind in ("kronecker", "diagonal", "samples"):
            for labels in ("data", "model"):
                data = Retain(tiny.batches(5, size=1))
                for place in ("collected", "read"):
                    fishers = Fishers(model, tap, data, 0, unseen)
                    for layer, fisher in fishers(updates, (), FisherSpec(kind, labels), 0)["retain"].items():
                        found[f"{place}/{packing.TOKENS}/{kind}/{labels}/{layer}"] = numbers(fisher)
                    if place == "collected":
                        passes = len(forwards)
                assert len(forwards) == passes, "a Fisher that is on the disk was collected"
    own = {key: value for key, value in found.items() if key.startswith("collected")}
    total = torch.stack([value.sum() for value in own.values()])
    other = total.clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(total, other), "processes do not hold the same"
    if rank == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, f"{folder}/{processes}.safetensors")
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
