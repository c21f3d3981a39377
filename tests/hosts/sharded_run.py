"""Run by torchrun in 1 or 2 processes: orthogonal projection under DDP and FSDP2, the changed weights saved."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from holdfast.core.errors import NotYetSupported, WrongSetup  # noqa: E402
from holdfast.methods import AGEM, L2SP, OrthogonalProjection, SelfReplay, TargetMaskedKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

import processes_done  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
SETTINGS = {
    "default": {},
    "metric": {"metric": "optimizer"},
    "gradient": {"apply_to": "gradient"},
    "layer": {"scope": "layer"},
    "one": {"sides": "one"},
    "rolling": {"rolling": 0.5, "early_refreshes": ()},
    "auto": {"refresh_every": "auto"},
    "agem": None,
}
# LoRA of rank 1: every A is one row, so one of two processes holds nothing of it
KINDS = {"lora": list(SETTINGS), "dense": list(SETTINGS), "thin": ["default", "tensor"]}
SETTINGS["tensor"] = {"scope": "tensor"}


def student(kind: str, parallel: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the bare model and what the loop calls."""
    model = tiny.llama() if kind == "dense" else tiny.lora(tiny.llama(), r=1 if kind == "thin" else 4)
    tiny.shake(model)
    if parallel == "ddp":
        return model, torch.nn.parallel.DistributedDataParallel(model)
    if parallel == "fsdp2":
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        inner = model if kind == "dense" else model.base_model.model
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def train(kind: str, parallel: str, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Take five steps, saved and resumed after the third, and return the weights, whole."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    settings = SETTINGS[name]
    options = {"rank": 4, "refresh_every": 2, "samples": 6} | (settings or {})
    methods = [AGEM(apply_to="update", retain_batches=3)] if settings is None else [OrthogonalProjection(**options)]
    bare, model = student(kind, parallel)
    params = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.1, eps=1e-4)
    rows = tiny.batches(5, size=4, seed=9)
    for part, batches in enumerate((rows[:3], rows[3:])):
        with holdfast.preserve(model, optimizer, methods, retain=tiny.batches(4, size=3)) as session:
            if part:
                session.load(folder / f"{parallel}-{kind}-{name}-{processes}")
            for batch in batches:
                mine = {k: v.chunk(processes)[rank] for k, v in batch.items()}
                counts = session.count([mine])
                loss = model(**mine, num_items_in_batch=torch.tensor(counts.completion)).loss
                (loss * processes).backward()  # both average over processes
                session.gradients_ready()
                optimizer.step()
                optimizer.zero_grad()
            session.save(folder / f"{parallel}-{kind}-{name}-{processes}")
            metrics = session.pop_metrics()
    label = methods[0].name
    assert metrics[f"holdfast/{label}/leakage"] <= 1e-6 or name in ("gradient", "one"), (name, metrics)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in params.items()}
    for value in whole.values():  # replicas must not drift apart
        first = value.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, value)
    return whole


def refusals(folder: Path) -> None:
    """What cannot work on shards says so, and other shards' state is not taken for one's own."""
    bare, _ = student("lora", "fsdp2")
    optimizer = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=0.1)
    for method in (TargetMaskedKL(), SelfReplay(), L2SP()):
        refused = pytest.raises(NotYetSupported, match=f"{method.name} under FSDP2")
        with refused, holdfast.preserve(bare, optimizer, [method], reference="base"):
            pass
    with holdfast.preserve(bare, optimizer, [OrthogonalProjection(rank=4)], retain=tiny.batches(4)) as session:
        with pytest.raises(WrongSetup, match="as many processes"):
            session.load(folder / "ddp-lora-default-1")


def main(folder: Path) -> None:
    """Train in every way and save the weights."""
    torch.distributed.init_process_group("gloo")
    for kind, names in KINDS.items():
        for parallel in ("ddp", "fsdp2"):
            for name in names:
                weights = train(kind, parallel, name, folder)
                if int(os.environ["RANK"]) == 0:
                    path = folder / f"{parallel}-{kind}-{name}-{os.environ['WORLD_SIZE']}.safetensors"
                    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    refusals(folder)
    processes_done.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
