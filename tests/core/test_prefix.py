"""Frozen lower layers run once for student and base, exactly as if they ran twice; or the base runs whole."""

import re
import warnings

import pytest
import torch
import transformers as tf
from holdfast.core.prefix import SharedPrefix
from holdfast.core.prefix_proof import apart, decoder_layers
from holdfast.core.reference import FrozenCopy, probe_batch
from holdfast.core.tap import Tap
from holdfast.integrations.peft import choose_reference
from torch import nn

import families
import tiny

SMALL = {k: v for k, v in families.SMALL.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 4}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": (tf.LlamaConfig, {}),
    "qwen2, sliding": (
        tf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": MIXED},
    ),
    "gemma2": (tf.Gemma2Config, {"head_dim": 8, "sliding_window": 4, "layer_types": MIXED}),
    "gemma3": (tf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4, "layer_types": MIXED}),
    "gpt-neox": (tf.GPTNeoXConfig, {}),
    "gpt2": (tf.GPT2Config, GPT2 | NO_DROPOUT),
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}


def build(family="llama", upper=(2, 3), dtype=torch.float32, **changes):
    """A model of four layers with LoRA on the upper ones, moved away from the base."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if kind is not tf.GPT2Config or k.endswith("_id") or k == "vocab_size"}
    model = tf.AutoModelForCausalLM.from_config(kind(**(small | settings | changes)), dtype=dtype)
    return on_layers(model, upper)


def on_layers(model, upper, **settings):
    """LoRA on every linear map of these layers."""
    linear = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    chosen = [name for name in linear if (number := re.search(r"\.(\d+)\.", name)) and int(number[1]) in upper]
    return tiny.lora(model, target_modules=chosen, **settings)


def shared(model, choice=None):
    """A tap with its shared prefix, and the reference."""
    tap = Tap(model)
    reference = choose_reference(model, choice, tap)
    SharedPrefix(tap, reference, probe_batch(model, padding=3))
    return tap, reference


def whole(tap, reference, call):
    """The reference's hidden states without anything shared."""
    prefix, tap.prefix = tap.prefix, None
    hidden = reference.hidden(tap, call)
    tap.prefix = prefix
    return hidden


def ran(layers):
    """Count the runs of each layer's own code, which a pass that starts above it leaves out."""
    counts = [0] * len(layers)
    for number, layer in enumerate(layers):
        part = next(module for name, module in layer.named_modules() if name and not list(module.children()))

        def count(*_, number=number):
            counts[number] += 1

        part.register_forward_pre_hook(count)
    return counts


def batches():
    """Plain rows, padded rows on either side, and packed rows."""
    ids = (torch.arange(36).view(3, 12) * 31 + 7) % 90 + 5
    ones, left, right = torch.ones_like(ids), torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4] = left[2, :1] = 0
    right[1, 7:] = 0
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]).expand(3, 12)
    return {
        "no mask": {"input_ids": ids},
        "ones": {"input_ids": ids, "attention_mask": ones},
        "left": {"input_ids": ids, "attention_mask": left},
        "right": {"input_ids": ids, "attention_mask": right},
        "packed": {"input_ids": ids, "position_ids": positions, "use_cache": False},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_pass_is_the_whole_one_bit_for_bit(family):
    model = build(family)
    tap, reference = shared(model)
    assert tap.prefix.first == 2, tap.prefix.why_not
    tiny.shake(model, 0.4)
    model.train()
    counts = ran(decoder_layers(tap.backbone))
    for number, batch in enumerate(batches().values()):
        model(**batch)
        call = tap.take()
        before = list(counts)
        hidden = reference.hidden(tap, call)
        own = [now - then for now, then in zip(counts, before, strict=True)]
        assert own == ([1, 1, 1, 1] if number == 0 else [0, 0, 1, 1])  # the first pass is a whole one, and compares
        assert torch.equal(hidden, whole(tap, reference, call))
        assert apart(call.hidden.detach(), hidden) > 1e-3  # the student has moved: it is no trivial equality
    tap.remove()
    assert not any(module._forward_pre_hooks for module in tap.backbone.children())


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("precision", ["float64", "autocast", "bfloat16"])
def test_precision_and_gradient_checkpointing(precision, checkpointing):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    model = build(dtype=dtype)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    tap, reference = shared(model)
    assert tap.prefix.first == 2, tap.prefix.why_not
    tiny.shake(model, 0.4)
    model.train()
    for batch in list(batches().values())[2:]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(**batch).logits.float().logsumexp(-1).sum()
        call = tap.take()
        assert call.entered is not None
        hidden = reference.hidden(tap, call)
        assert torch.equal(hidden, whole(tap, reference, call))
        loss.backward()  # the layers that are computed again must leave no note behind
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert tap.prefix.taken() is None


def test_a_frozen_copy_shares_too():
    model = build()  # LoRA is trained, and so are norms of the upper half, in place
    for layer in decoder_layers(Tap(model).backbone)[2:]:
        layer.input_layernorm.weight.requires_grad_(True)
    tap, reference = shared(model)
    assert isinstance(reference, FrozenCopy)
    assert tap.prefix.why_not == ""
    untouched = build().eval()
    tiny.shake(model, 0.4)
    for batch in batches().values():
        model.train()(**batch)
        call = tap.take()
        hidden = reference.hidden(tap, call)
        assert torch.equal(hidden, whole(tap, reference, call))
        with torch.no_grad(), untouched.disable_adapter():
            theirs = untouched.get_base_model().model(**batch).last_hidden_state
        assert torch.equal(hidden, theirs)


def reasons(model, choice=None):
    return shared(model, choice)[0].prefix.why_not


def test_what_cannot_be_shared_is_not_and_says_why():
    assert reasons(build(upper=(0, 3))) == "the first layer is trained"
    for family in ("llama", "gpt2"):
        everywhere = build(family, upper=(3,))
        everywhere.get_input_embeddings().weight.requires_grad_(True)
        assert "is trained, and it acts below layer 3" in reasons(everywhere)
    assert "attn_pdrop" not in reasons(build("gpt2"))
    assert "drop.p is 0.1, so below the first trained layer the student draws" in reasons(build("gpt2", embd_pdrop=0.1))
    assert "attention_dropout is 0.2" in reasons(build(attention_dropout=0.2))
    head = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL)).requires_grad_(False)
    head.lm_head.weight.requires_grad_(True)
    assert reasons(head) == "no layer is trained"
    one = tiny.lora(tiny.llama(num_hidden_layers=1))
    assert "no list of layers" in reasons(one)


def test_dropout_of_the_adapters_alone_does_not_matter():
    model = on_layers(tiny.llama(num_hidden_layers=4), [3], lora_dropout=0.5)
    tap, reference = shared(model)
    model.train()
    for _ in range(2):
        model(**probe_batch(model))
        call = tap.take()
        assert torch.equal(reference.hidden(tap, call), whole(tap, reference, call))
    assert tap.prefix.why_not == ""


def test_frozen_adapters_below_are_no_part_of_the_base():
    """Their factors are not trained, but the student has them and the base does not."""
    model = tiny.lora(tiny.llama(num_hidden_layers=4))
    tiny.shake(model, 0.4)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name and "layers.3" in name)
    assert reasons(model, "base") == "the first layer is trained"


class Odd(tf.LlamaForCausalLM):
    """A Llama whose backbone may do what a chain of layers does not."""

    def __init__(self, config, does):
        super().__init__(config)
        self.model.does = does
        self.model.forward = self.odd

    def odd(self, input_ids, attention_mask=None, **kwargs):
        body = self.model
        hidden = body.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = body.rotary_emb(hidden, position_ids=positions)
        kept = {}
        for number, layer in enumerate(body.layers):
            if body.does == "adds":
                hidden = hidden + 0.1
            if body.does == "borrows" and number == 3:
                hidden = hidden + kept["early"]
            if body.does == "noise" and number == 1 and body.training:
                hidden.add_(0.01 * torch.randn_like(hidden))
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
            if number == 0:
                kept["early"] = hidden
            if body.does == "twice" and number == 1:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
        return tf.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=body.norm(hidden))


def odd(does):
    torch.manual_seed(0)
    return on_layers(Odd(tf.LlamaConfig(**SMALL), does), [2, 3])


def test_layers_that_are_no_chain_are_not_shared():
    assert reasons(odd("nothing")) == ""
    assert reasons(odd("adds")) == "its layers do not get the very tensor that the one before returned"
    assert reasons(odd("twice")) == "its layers do not run once each and in order (but [0, 1, 1, 2])"
    assert reasons(odd("borrows")) == "a pass that starts at layer 2 does not end where the whole one ends"


def test_noise_that_has_no_name_is_found_in_the_first_micro_batch():
    """As NEFTune's, which a Trainer switches on after the session was made."""
    model = odd("noise")
    tap, reference = shared(model)
    assert tap.prefix.why_not == ""  # it draws in training alone
    model.train()(**probe_batch(model))
    call = tap.take()
    with pytest.warns(UserWarning, match="runs whole from here on.*draws random numbers"):
        hidden = reference.hidden(tap, call)
    assert torch.equal(hidden, whole(tap, reference, call))
    assert "draws random numbers" in tap.prefix.describe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**probe_batch(model))
        call = tap.take()
        assert call.entered is None
        assert torch.equal(reference.hidden(tap, call), hidden)


@pytest.mark.parametrize("large", [1, 100])
def test_noise_is_found_beside_a_token_that_is_large(large):
    """In 16 bits. The hidden state of a first token is often a hundred times as large as others."""
    model = build(dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= large
    tap, reference = shared(model)
    assert tap.prefix.why_not == ""

    def noise(module, args, output):
        size = output[:, 1:].norm(dim=-1).median() / output.shape[-1] ** 0.5
        return output + 0.1 * size * torch.randn_like(output) if module.training else None

    model.get_input_embeddings().register_forward_hook(noise)
    ids = (torch.arange(128).view(2, 64) * 31 + 7) % 90 + 5
    ids[:, 0] = 1
    model.train()(input_ids=ids)
    with pytest.warns(UserWarning, match="runs whole from here on"):
        reference.hidden(tap, tap.take())


def steering(model, kind, where):
    """Add a vector to what these layers return, or to what enters them."""
    vector = 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    for layer in (decoder_layers(Tap(model).backbone)[number] for number in where):
        if kind == "after":
            layer.register_forward_hook(lambda module, args, output: output + vector)
        else:
            layer.register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("where", [[0], [1], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("late", [True, False])
def test_what_else_is_hooked_on_acts_once(kind, where, late):
    """On the layer below the first touched one and on that one, too, and whether it was there first or comes late."""
    model = build()
    if not late:
        steering(model, kind, where)
    tap, reference = shared(model)
    tiny.shake(model, 0.4)
    if late:
        steering(model, kind, where)
    counts = ran(decoder_layers(tap.backbone))
    for _ in range(3):
        call = student(tap, reference, model.train())
    before = list(counts)
    reference.hidden(tap, call)
    own = [now - then for now, then in zip(counts, before, strict=True)]
    in_between = not late and kind == "before" and where != [0]  # then the layers are no chain, and the base runs whole
    assert own == ([1, 1, 1, 1] if in_between else [0, 0, 1, 1])


def test_an_adapter_outside_the_layers_keeps_them_from_being_shared():
    """Frozen and new it says what the base says, until it is thawed."""
    model = tiny.lora(
        tiny.llama(num_hidden_layers=4), target_modules=r".*(embed_tokens|layers\.[23]\..*(q_proj|v_proj))"
    )
    inside = [p for name, p in model.named_parameters() if "embed" in name and "lora" in name]
    for p in inside:
        p.requires_grad_(False)
    tap, reference = shared(model)
    assert tap.prefix.why_not == "embed_tokens has an adapter, and it is outside the layers"
    for p in inside:
        p.requires_grad_(True)
    tiny.shake(model, 0.4)
    for _ in range(2):
        student(tap, reference, model.train())


def student(tap, reference, model):
    model(**probe_batch(model))
    call = tap.take()
    assert torch.equal(reference.hidden(tap, call), whole(tap, reference, call))
    return call


def test_an_adapter_that_is_added_later_is_noticed():
    from peft import LoraConfig

    model = on_layers(tiny.llama(num_hidden_layers=4), [2, 3])
    tap, reference = shared(model)
    model.train()
    before = student(tap, reference, model), student(tap, reference, model)
    hidden = reference.hidden(tap, before[1])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    tiny.shake(model, 0.4)
    call = student(tap, reference, model)
    assert tap.prefix.why_not == "the first layer is trained"
    assert torch.equal(reference.hidden(tap, call), hidden)  # the new one is off too
    assert apart(call.hidden.detach(), hidden) > 1e-2


def test_a_layer_whose_forward_was_replaced_gets_it_back():
    """accelerate's hooks put a forward of their own into a layer."""
    model = build()
    layer = decoder_layers(Tap(model).backbone)[0]
    theirs = layer.forward
    layer.forward = own = lambda *args, **kwargs: theirs(*args, **kwargs)
    tap, reference = shared(model)
    for _ in range(2):
        student(tap, reference, model.train())
    assert layer.forward is own
    assert "forward" not in vars(decoder_layers(tap.backbone)[1])


def test_layers_are_found_among_lists_of_experts_and_others():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)] * 2), nn.Linear(9, 9)])})
    assert len(decoder_layers(model)) == 2
    assert decoder_layers(model)[0] is model["blocks"][0]
    assert list(decoder_layers(nn.Linear(1, 1))) == []
