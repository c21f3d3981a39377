"""`import holdfast` costs torch alone, and the rooms import only what they may (pyproject's contracts)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def loaded_by(code: str) -> set[str]:
    new = "{m.split('.')[0] for m in set(sys.modules) - before}"
    program = f"import sys; before = set(sys.modules)\n{code}\nprint(*{new})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_holdfast_loads_no_host():
    torch_alone = loaded_by("import torch, safetensors")
    ours = loaded_by("import holdfast, holdfast.core.session, holdfast.methods; holdfast.methods.load_all()")
    assert not ours & {"transformers", "peft", "trl", "accelerate", "datasets", "scipy", "matplotlib", "typer", "yaml"}
    assert ours - torch_alone <= {"holdfast", *sys.stdlib_module_names}


def test_analysis_never_loads_torch():
    rooms = "holdfast.analysis.frontier, holdfast.analysis.report, holdfast.drift.ledger"
    assert "torch" not in loaded_by(f"import {rooms}")


def test_rooms_import_only_what_they_may():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
