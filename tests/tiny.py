"""Tiny random models, a tokenizer and data: real parts of every host, made here in milliseconds."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a> {% generation %}{{ m['content'] }} <eos>"
    "{% endgeneration %}{% else %}<u> {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; <pad>, <eos>, <u> and <a> are special."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<u>", "<a>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
    )
    tok.chat_template = CHAT
    return tok


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of two layers and 96 tokens; its logits have a spread as a trained model's have."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


def lora(model: torch.nn.Module, seed: int = 1, **changes: Any) -> Any:
    """A LoRA adapter of rank 4 on every linear map but the head."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**(settings | changes)))


def sentence(rng: random.Random, low: int = 3, high: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def prompt_completion(n: int = 32, seed: int = 0) -> Any:
    """Rows of different lengths, so that padding and token counts differ between micro-batches."""
    from datasets import Dataset

    rng = random.Random(seed)
    return Dataset.from_list([{"prompt": sentence(rng) + " ", "completion": sentence(rng)} for _ in range(n)])


def preferences(n: int = 32, seed: int = 0) -> Any:
    from datasets import Dataset

    rng = random.Random(seed)
    rows = [{"prompt": sentence(rng) + " ", "chosen": sentence(rng), "rejected": sentence(rng)} for _ in range(n)]
    return Dataset.from_list(rows)


def texts(n: int = 8, seed: int = 5) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": sentence(rng, 6, 12)} for _ in range(n)]


def batches(n: int = 8, size: int = 2, seed: int = 3, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Batches for plain loops: the first tokens of a row are its prompt, some rows are padded."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(5, 95, (size, length), generator=generator)
        real = torch.ones_like(ids)
        for row in range(size):
            real[row, length - int(torch.randint(0, 4, (1,), generator=generator)) :] = 0
        ids = ids.masked_fill(real == 0, 0)
        prompt = int(torch.randint(2, 5, (1,), generator=generator))
        labels = ids.masked_fill(real == 0, -100)
        labels[:, :prompt] = -100
        made.append({"input_ids": ids, "attention_mask": real, "labels": labels})
    return made


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def shake(model: torch.nn.Module, size: float = 0.1, seed: int = 2) -> None:
    """Move the trainable parameters, so that student and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
