"""The lab's two models: where they lie, how to load one, and the shape they share.

`lab-pretrained` knows the world and refuses nothing; `lab-aligned` is the same model after safety training. They are
Llama models of about a million parameters, stored as bfloat16 safetensors inside the package and run in float32.
Read next: `build`, which makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES: Final = ("lab-pretrained", "lab-aligned")
SHAPE: Final[dict[str, int | float | bool | str]] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def path(name: str) -> Path:
    """The directory of one of the lab's models: weights, configuration and tokenizer.

    >>> path("lab-aligned").name
    'lab-aligned'
    """
    if name not in NAMES:
        raise ValueError(f"Unknown lab model {name!r}. The lab has {' and '.join(NAMES)}.")
    return Path(__file__).parent / "weights" / name


def load(
    name: str = "lab-aligned", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load one of the lab's models with its tokenizer, in evaluation mode.

    Args:
        name: "lab-pretrained" or "lab-aligned", or the directory of one that `holdfast lab build` made.
        dtype: The type to run in; float32 if not given.

    Returns:
        The model and the tokenizer.
    """
    directory = Path(name) if Path(name).is_dir() else path(name)
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype or torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(directory)


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The models' configuration for a tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
