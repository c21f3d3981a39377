"""`holdfast doctor`: is everything here that a recipe needs, and in the versions that were tested?"""

from __future__ import annotations

import platform
from importlib import metadata

import typer

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "matplotlib": "3.11.2",
}
"""The versions of constraints.txt, which is not part of an installed package; a test compares the two."""
EXTRAS = {
    "transformers": "trl", "trl": "trl", "peft": "trl", "accelerate": "trl", "datasets": "trl",
    "numpy": "report", "scipy": "report", "matplotlib": "report",
}  # fmt: skip


def doctor() -> None:
    """Report python, device, installed versions against tested ones, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}", highlight=False)
    console.print(f"device: {_device()}", highlight=False)
    shown = Table(box=None, pad_edge=False)
    for column in ("package", "here", "tested", ""):
        shown.add_column(column)
    missing = set()
    for package, tested in TESTED.items():
        try:
            here = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.add(EXTRAS.get(package, ""))
            shown.add_row(package, "–", tested, "missing")
            continue
        shown.add_row(package, here, tested, "" if here.split("+")[0] == tested else "another version: run the tests")
    console.print(shown)
    if missing:
        wanted = ",".join(sorted(missing - {""}))
        console.print(f"\npip install 'holdfast[{wanted}]'  brings what is missing", highlight=False, markup=False)
        raise typer.Exit(1)
    console.print("\neverything is here", highlight=False)


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "unknown (torch is missing)"
    if torch.cuda.is_available():
        return (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, bfloat16 {torch.cuda.is_bf16_supported()}"
        )
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return f"CPU, {torch.get_num_threads()} threads (bf16 and gradient checkpointing are off unless a recipe asks)"
