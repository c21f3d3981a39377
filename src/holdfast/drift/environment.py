"""Where a number was measured: versions, processor and commit, and nothing that names a host or a person.

Ratios of times mean little without the machine, and scores little without the versions; names of machines, people and
folders do not belong in a file that is meant to be shared. Standard library only.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

DECISIVE = ("holdfast", "torch", "transformers", "peft", "processor")
PACKAGES = ("holdfast", "torch", "transformers", "peft", "trl", "accelerate", "numpy")


def environment() -> dict[str, str | int]:
    """Versions, python, platform, processor, cores, threads and git commit, as far as they can be known.

    >>> {"python", "platform", "cores"} <= environment().keys()
    True
    """
    return dict(_environment())


def decisive() -> dict[str, str | int]:
    """The part of it that could change a number: what was measured is used again only under the same.

    >>> "torch" in decisive(), "commit" in decisive()
    (True, False)
    """
    return {name: value for name, value in _environment().items() if name in DECISIVE}


@cache
def _environment() -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
    }
    found |= {name: value for name, value in (("processor", _processor()), ("commit", _commit())) if value}
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        found["threads"] = int(os.environ["OMP_NUM_THREADS"])
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name: Linux keeps it in a file, other systems answer for themselves."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    """The commit of holdfast's own sources, `-dirty` if edited; empty for an installed copy."""
    here = Path(__file__).resolve()
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
            git = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return ""
    return git.stdout.strip()
