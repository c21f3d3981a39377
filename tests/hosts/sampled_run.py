"""Run by torchrun in 2 processes: the mean gradient of sampled steps is that of whole ones, in float64 under DDP."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.methods import TargetMaskedKL  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import processes_done  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
UPPER = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3]}


def gradients(share: float, starts: list[float]) -> torch.Tensor:
    """Return the gradient of one step of 2 x 2 micro-batches for each start, as DDP averages it, [starts, P]."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model = tiny.lora(tiny.llama(num_hidden_layers=4), **UPPER).double().train()
    ddp = DistributedDataParallel(model)
    params = [p for p in model.parameters() if p.requires_grad]
    method, found = TargetMaskedKL(strength=2.0, reference_share=share), []
    with holdfast.preserve(ddp, torch.optim.SGD(params, lr=0.1), [method]) as session:
        tiny.shake(model)
        assert session.tap.prefix.why_not == ""
        own = {k: v.chunk(processes)[rank] for k, v in tiny.batches(1, size=8, seed=9)[0].items()}
        parts = [{k: v.chunk(2)[i] for k, v in own.items()} for i in range(2)]
        drawn = [session.sampling.start(step) for step in range(20)] if session.sampling else []
        for start in starts:
            if session.sampling:
                session.sampling.start = lambda step, u=start: u
            counts = session.count(parts)
            for part in parts:
                logits = ddp(**{k: v for k, v in part.items() if k != "labels"}).logits
                (0.0 * logits.sum() + session.loss(part, counts, host_factor=processes)).backward()
            session.gradients_ready()
            found.append(torch.cat([p.grad.flatten() for p in params]))
            model.zero_grad()
    everywhere: list[list[float]] = [[]] * processes
    torch.distributed.all_gather_object(everywhere, drawn)
    assert not drawn or set(everywhere[0]).isdisjoint(everywhere[1])
    return torch.stack(found)


def main() -> None:
    """Compare, on every process."""
    torch.distributed.init_process_group("gloo")
    whole = gradients(1.0, [0.0])[0]
    sampled = gradients(0.25, [0.125, 0.375, 0.625, 0.875])
    assert whole.norm() > 1e-3
    assert (sampled.mean(0) - whole).norm() <= 1e-6 * whole.norm()
    assert (sampled[0] - whole).norm() > 1e-2 * whole.norm()
    processes_done.leave()


if __name__ == "__main__":
    main()
