"""Tiny random models of many families, with the oddities their logits have."""

from __future__ import annotations

import torch
import transformers as tf

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": (tf.LlamaConfig, {}),
    "llama, tied": (tf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}),
    "gemma": (tf.GemmaConfig, {"head_dim": 8}),
    "gemma2, soft-cap": (tf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": (tf.Gemma3TextConfig, {"head_dim": 8}),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "phi3": (tf.Phi3Config, {}),
    "phi, head with bias": (tf.PhiConfig, {}),
    "cohere, logit scale": (tf.CohereConfig, {"logit_scale": 0.25}),
    "granite, logits scaling": (tf.GraniteConfig, {"logits_scaling": 4.0}),
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral, mixture of experts": (tf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 mixture of experts": (
        tf.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 16},
    ),
}


def build(family: str) -> torch.nn.Module:
    """A model of the family with logits wide enough for scale and cap to show."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if kind is not tf.GPT2Config or k.endswith("_id") or k == "vocab_size"}
    model = tf.AutoModelForCausalLM.from_config(kind(**(small | changes)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model
