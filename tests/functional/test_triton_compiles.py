"""The kernels compile for real GPUs, from Python to machine code, though none is here: no slow path, no spills."""

import os
import re
import subprocess
from pathlib import Path

import pytest

WHY = "Triton is not installed (Linux: pip install 'holdfast[triton]')"
triton = pytest.importorskip("triton", reason=WHY)
rows = pytest.importorskip("holdfast.functional.triton.row_kernel", reason=WHY)
tiles = pytest.importorskip("holdfast.functional.triton.tile_kernels", reason=WHY)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HOPPER, AMPERE = 90, 80
LOGITS = ("base", "moved", "weight", "bias", "out")
WHOLE = ("rows", "vocab", "hidden", "parts", "stride", "field", "ignore_index")
ALIGNED = ("rows", "hidden", "stride", "field")  # not the vocabulary: GPT-2 has 50,257 tokens
REAL = ("scale", "soft_cap", "gamma", "log_exclusion", "strength", "cross_entropy")
KINDS = (
    dict.fromkeys(LOGITS, "*bf16")
    | dict.fromkeys(("centres", "states", "numbers", "divergence", "nll", "entropy"), "*fp32")
    | dict.fromkeys(("kept", "top1"), "*i32")
    | {"targets": "*i64"}
    | dict.fromkeys(WHOLE, "i32")
    | dict.fromkeys(REAL, "fp32")
)
BARE = {"BIAS": False, "CAP": False, "COMPARE": True}
FULL = {"BIAS": True, "CAP": True, "COMPARE": True}
ROW = {"MASKED": False, "STATISTICS": True, "GRADIENT": True, "COLUMNS": 4096}
CUT = {"EVEN": True, "PRECISION": "tf32x3", "WIDEN": False, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No machine code of an earlier run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def built(kernel, constants, target, warps=8, stages=3):
    """Compile as the host's side launches it; return its shared memory, stack bytes and instructions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: KINDS.get(name, "constexpr") for name in kernel.arg_names}
    assert {name for name, kind in kinds.items() if kind == "constexpr"} == set(constants)
    sixteen = [["tt.divisibility", 16]]
    aligned = {(i,): sixteen for i, name in enumerate(kinds) if name in ALIGNED or kinds[name].startswith("*")}
    source = ASTSource(kernel, kinds, constants, aligned)
    code = triton.compile(source, GPUTarget("cuda", target, 32), {"num_warps": warps, "num_stages": stages})
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(code.asm["cubin"])

    def ask(option):
        return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout

    stack = int(re.search(r"STACK:(\d+)", ask("--dump-resource-usage"))[1])
    return code.metadata.shared, stack, ask("-sass")


@pytest.mark.parametrize(("target", "head"), [(HOPPER, BARE), (HOPPER, FULL), (AMPERE, BARE)])
def test_the_row_kernel_reads_whole_vectors_and_spills_nothing(target, head):
    shared, stack, code = built(rows.row_kernel, head | ROW, target)
    assert stack == 0
    assert shared < 1024
    sides = 2 * 2 * 2  # two visits, two sides, 16 logits a thread in vectors of eight
    assert len(re.findall(r"LDG\.E\.128", code)) >= sides
    assert re.search(r"STG\.E\.128", code)
    if not head["BIAS"]:  # that one goes number by number where the vocabulary is odd
        assert len(re.findall(r"LDG\.E\.U16", code)) <= 2  # b_y and d_y


@pytest.mark.parametrize(("target", "room", "unit"), [(HOPPER, 227, "HGMMA"), (AMPERE, 163, "HMMA")])
def test_the_tile_kernels_use_the_matrix_units_and_fit(target, room, unit):
    cut = CUT if target == HOPPER else CUT | {"COLUMNS": 64, "DEPTH": 32}  # as `shape_for` cuts
    for kernel, more in ((tiles.tile_statistics, {"STATISTICS": True}), (tiles.tile_gradient, {})):
        shared, stack, code = built(kernel, BARE | cut | more, target)
        assert shared <= room * 1024
        assert stack <= 512  # a few numbers per tile of the vocabulary,
        products = [found.start() for found in re.finditer(rf"\b{unit}\b", code)]
        assert len(products) >= 8
        assert not re.search(r"\b(LDL|STL)\b", code[products[0] : products[-1]])  # and none among the products
    _, stack, _ = built(tiles.tile_combine, {"COMPARE": True, "MASKED": True, "STATISTICS": True, "ROWS": 128}, target)
    assert stack == 0


def test_a_float32_head_with_every_extra_fits_too(monkeypatch):
    for name in LOGITS:
        monkeypatch.setitem(KINDS, name, "*fp32")
    cut = CUT | {"EVEN": False, "ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
    shared, _, _ = built(tiles.tile_statistics, FULL | cut | {"STATISTICS": True}, HOPPER, warps=4, stages=2)
    assert shared <= 99 * 1024
