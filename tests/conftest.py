"""What every test shares: one thread, no network, no progress bars, and the tiny parts on the path."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)  # two OpenMP threads are slower than one on a small busy machine


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where Fishers are kept between runs: an empty one, not the user's."""
    os.environ["HOLDFAST_CACHE"] = str(folder := tmp_path_factory.mktemp("cache"))
    return folder


@pytest.fixture
def data() -> Path:
    """The folder of real data sets, or a skip that says why."""
    folder = os.environ.get("HOLDFAST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HOLDFAST_DATA is not set to a folder: the real data sets and weights are not on this machine")
    return Path(folder)
