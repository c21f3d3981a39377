"""Fishers in two gloo processes against one: the same to the last digits, and all processes hold them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Everything that was collected, by number of processes."""
    folder = tmp_path_factory.mktemp("fisher")
    for processes in (1, 2):
        script = Path(__file__).parent / "fisher_run.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*command, str(script), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {processes: load_file(folder / f"{processes}.safetensors") for processes in (1, 2)}


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("kind", ["kronecker", "diagonal", "samples"])
@pytest.mark.parametrize("tokens", [2048, 12], ids=["one pass", "five passes"])
def test_two_processes_collect_what_one_does(found, tokens, kind, labels):
    start = f"collected/{tokens}/{kind}/{labels}/"
    layers = [key for key in found[1] if key.startswith(start)]
    assert len(layers) == 14
    for key in layers:
        one, two = found[1][key], found[2][key]
        assert ((one - two).abs().max() / one.abs().max()).item() < 1e-10
        again = found[2][key.replace("collected", "read")]
        assert (two == again).all()
