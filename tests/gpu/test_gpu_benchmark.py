"""The GPU benchmark without a GPU: it refuses aloud; its turns, ratios and names are those the table asks for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.goals import ROWS

FOLDER = Path(__file__).parents[2] / "benchmarks"
HERE = ["plain torch", "holdfast: CE + masked KL, no kernel", "plain torch: CE", "three products, whole"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to refuse")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "This benchmark needs a GPU, and torch sees none" in done.stderr


def test_every_number_of_the_table_is_measured_or_named_as_not_installed(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "HERE", HERE)
    monkeypatch.setattr(gpu, "MISSING", [name for name in gpu.PEERS if name not in HERE])
    monkeypatch.setattr(gpu, "PAIRS", [*gpu.PAIRS, (HERE[1], HERE[0])])
    clock = iter(float(number) for number in range(1, 9))

    def count(run):
        run()
        return next(clock)

    case = gpu.on("cpu", gpu.TINY, 16)
    table = gpu.turns("4096/128256", 4096, 2, case, count, lambda run: 8.0)
    full = [{"dtype": "", "shape": "", "tokens": "", "peer": ""} | {k: str(v) for k, v in row.items()} for row in table]
    (asked,) = (row for row in ROWS if row.name == "G1")
    assert {measure.found(full)["value"] for measure in asked.measures} == {"not installed"}
    ratio = {row["metric"]: row for row in table if (row["variant"], row.get("peer")) == (HERE[1], HERE[0])}
    assert ratio["gpu seconds, ratio"]["value"] == 4.0 / 3.0  # rounds at (1, 2) and (5, 6): medians of 3 and 4
    assert ratio["peak MiB, ratio"]["value"] == 1.0
    assert {row["variant"] for row in table if row["metric"] == "version"} >= {"triton", "liger-kernel"}


def test_peers_that_disagree_stop_it(gpu, monkeypatch):
    gpu.correctness_gate("cpu", HERE)
    wrong = gpu.PEERS[HERE[1]]._replace(run=lambda case: 1.1 * gpu.PEERS[HERE[0]].run(case))
    monkeypatch.setitem(gpu.PEERS, HERE[1], wrong)
    with pytest.raises(SystemExit, match="no kernel disagrees"):
        gpu.correctness_gate("cpu", HERE)


def test_a_kernel_that_cannot_be_had_is_never_timed_as_the_plain_path(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeWarning, match="HOLDFAST_KERNEL=rows, but the plain path computes"):
        gpu.gradient("holdfast: CE + masked KL", gpu.on("cpu", gpu.TINY, 4))
