"""Turn stories260K, real pretrained weights of a megabyte, from llama2.c's files into a transformers model.

    python examples/stories260k.py $HOLDFAST_DATA/tinylm my-folder

llama2.c keeps the two numbers that RoPE turns next to each other, transformers keeps them half a head apart, so the
rows of the query and key matrices change places: i of a head goes to (i % 2) * d/2 + i // 2. The tokenizer is
SentencePiece's BPE, of which only pieces and scores are stored: the merges are all ways to make a piece of two others,
the best scores first. Documents begin with <s> and end where the next begins, so <s> is also the end of text.
Weights and format: Andrej Karpathy, llama2.c and tinyllamas (MIT).
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")


def half_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key matrix from llama2.c's RoPE to transformers'."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_model(file: Path) -> LlamaForCausalLM:
    """Read a llama2.c checkpoint (its first format: seven integers, then float32 weights)."""
    data = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    values, place = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy()), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return values[place - size : place].view(*shape)

    kv = dim // heads * kv_heads
    embedding = take(abs(vocab), dim)
    names = {
        "input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }  # fmt: skip
    state = {"model.embed_tokens.weight": embedding}
    for name, shape in names.items():  # llama2.c stores one kind of matrix for all layers, then the next
        for layer, weight in enumerate(take(layers, *shape)):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = half_apart(weight, turned) if turned else weight
    state["model.norm.weight"] = take(dim)
    place += length * (dim // heads)  # tables of sines and cosines
    state["lm_head.weight"] = embedding if vocab > 0 else take(abs(vocab), dim)
    if place != len(values):
        raise ValueError(f"{file} has {len(values)} numbers where its header promises {place}: not a version 0 file?")
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=abs(vocab), max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def read_pieces(file: Path) -> list[tuple[str, float]]:
    """Read the pieces of a llama2.c tokenizer with their scores; a space is SentencePiece's ▁."""
    data, place, pieces = file.read_bytes(), 4, []
    while place < len(data):
        score, size = struct.unpack_from("<fi", data, place)
        pieces.append((data[place + 8 : place + 8 + size].decode().replace(" ", "▁"), score))
        place += 8 + size
    return [*((name, 0.0) for name in SPECIAL), *pieces[len(SPECIAL) :]]


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer that merges as llama2.c does."""
    pieces = read_pieces(file)
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, [(a, b) for _, a, b in sorted(merges, key=lambda m: m[0])], byte_fallback=True, fuse_unk=True,
                   unk_token="<unk>")
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>", pad_token="<unk>"
    )


def convert(source: Path, target: Path) -> Path:
    """Read `stories260K.bin` and `tok512.bin` of a folder and write a transformers model into another."""
    read_model(source / "stories260K.bin").save_pretrained(target)
    read_tokenizer(source / "tok512.bin").save_pretrained(target)
    return target


if __name__ == "__main__":
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
