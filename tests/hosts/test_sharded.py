"""Two processes, DDP and FSDP2, against one: the same five steps, saved and resumed on the way."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file

import runs

NAMES = ("default", "metric", "gradient", "layer", "one", "rolling", "auto", "agem")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Run everything once in one process and once in two."""
    folder = tmp_path_factory.mktemp("sharded")
    for processes in (1, 2):
        script = Path(__file__).parent / "sharded_run.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(script), str(folder)], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("parallel", ["ddp-2", "fsdp2-1", "fsdp2-2"])
@pytest.mark.parametrize(
    ("kind", "name"), [*product(["lora", "dense"], NAMES), ("thin", "default"), ("thin", "tensor")]
)
def test_processes_and_shards_make_no_difference(weights, kind, name, parallel):
    """The project's bar is 1e-5; measured: 4e-7, and 1.2e-6 in Adam's metric on LoRA."""
    how, processes = parallel.split("-")
    found = load_file(weights / f"{how}-{kind}-{name}-{processes}.safetensors")
    assert runs.difference(found, load_file(weights / f"ddp-{kind}-{name}-1.safetensors")) <= 1e-5


def test_shards_are_saved_by_every_process_and_only_as_a_whole(weights):
    folder = weights / "fsdp2-lora-default-2"
    assert sorted(p.name for p in folder.iterdir()) == [
        "holdfast-00001-of-00002.safetensors",
        "holdfast-00002-of-00002.safetensors",
        "holdfast.json",
    ]
