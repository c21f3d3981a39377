"""A tiny model, recipes written in a line, and runs in their own folder."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from holdfast.recipe.config import Recipe, load


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with an untrained two-layer model and the lab's tokenizer."""
    from holdfast.lab.tokenizer import build_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in; paths of recipes are relative to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def write(here, tiny):
    """Write a recipe; `TINY` in it stands for the tiny model's folder."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = here / name
        path.write_text(textwrap.dedent(text).replace("TINY", str(tiny)))
        return path

    return write


@pytest.fixture
def recipe(write):
    """Write a recipe and load it."""

    def recipe(text: str) -> Recipe:
        return load(write(text))

    return recipe


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
