"""How a script of several gloo processes ends."""

import os
import sys

import torch


def leave() -> None:
    """Wait for the others, then leave without tearing the process group down.

    DistributedDataParallel's reducer keeps the group alive, and gloo's destructor joins its thread while it holds the
    interpreter's lock; that thread may want the lock to free the tensors of its last collective. Then neither ends:
    seen about once in 15 runs (torch 2.13).
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
