"""The GPU kernels, run in Triton's interpreter: asked for before triton is imported, so in another process."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from holdfast.functional.chunked import Objective
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_target_masked_kl
from holdfast.functional.triton import dispatch
from holdfast.functional.triton.dispatch import Choice, choose

INSIDE = Path(__file__).parent / "in_triton"
CASE = (torch.ones(2, 3), Head(torch.eye(5, 3)), Objective(Divergence()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["values", "extremes", "dispatching"])
def test_in_the_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install 'holdfast[triton]')")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", INSIDE / f"{name}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=INSIDE.parents[2], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout and version("triton") < "3.9":
        pytest.skip("the interpreter of this Triton does not run with this numpy: use triton 3.9, or numpy 2.3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_on_a_cpu_the_plain_path_computes_and_says_why(monkeypatch, recwarn):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("HOLDFAST_KERNEL", raising=False)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)  # as if it were there
    assert choose(*CASE) == Choice("plain", "the tensors are on cpu, and kernels need a CUDA device")
    monkeypatch.setenv("HOLDFAST_KERNEL", "plain")
    assert choose(*CASE) == Choice("plain", "HOLDFAST_KERNEL=plain")
    assert not recwarn.list


@pytest.mark.parametrize("asked", ["rows", "tiles"])
def test_a_kernel_that_was_asked_for_and_cannot_be_had_is_missed_aloud(asked, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("HOLDFAST_KERNEL", asked)
    hidden, head, _ = CASE
    with pytest.warns(RuntimeWarning, match=f"HOLDFAST_KERNEL={asked}, but the plain path computes: .* on cpu") as told:
        value = linear_target_masked_kl(hidden, hidden, head, torch.tensor([0, 1]))
    assert value == 0
    assert told[0].filename.endswith("linear_divergence.py")


def test_a_kernel_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("HOLDFAST_KERNEL", "cuda")
    with pytest.raises(ValueError, match="HOLDFAST_KERNEL must be one of auto, plain, rows, tiles, got 'cuda'"):
        choose(*CASE)


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert choose(*CASE).reason.startswith("triton is not installed (Linux: pip install 'holdfast[triton]'); the tens")


def test_a_gpu_too_old_and_another_maker_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda")
    assert "below 8.0" in " ".join(dispatch.device_obstacles(device, interpreter=False))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in " ".join(dispatch.device_obstacles(device, interpreter=False))
