"""On every host a run whose lower layers run once for student and base equals the one in which they run twice."""

import holdfast
import pytest
import torch
from holdfast.core.reference import OtherModel
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL

import runs
import tiny

METHODS = [TargetMaskedKL(strength=2.0), FullKL(strength=0.5, positions="prompt")]
UPPER = {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [2, 3]}


def student(**settings):
    return tiny.lora(tiny.llama(num_hidden_layers=4, **settings), **UPPER)


def run(host, share_prefix, model=None, methods=METHODS, **options):
    """A short run, and how often the base's passes came into the lowest layer."""
    trainer = runs.trainer(host, student() if model is None else model, **options)
    session = holdfast.attach(trainer, methods, retain=tiny.texts(24), share_prefix=share_prefix)
    lowest, passes = session.tap.backbone.layers[0].self_attn, []
    lowest.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    return trainer, len(passes) - sum(passes)


HOSTS = {
    "sft, packed": ("sft", {"packing": True, "max_length": 24, "packing_strategy": "bfd"}),
    "sft, checkpointed": ("sft", {"gradient_checkpointing": True}),
    "sft, reentrant": (
        "sft",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "dpo": ("dpo", {}),
    "trainer, bf16": ("trainer", {"bf16": True}),
}


@pytest.mark.parametrize("case", HOSTS)
def test_the_run_is_the_same_bit_for_bit(case):
    host, options = HOSTS[case]
    (ours, few), (theirs, many) = (run(host, share, **options) for share in (True, False))
    assert runs.identical(ours.model, theirs.model)
    assert not runs.identical(ours.model, student())
    assert "layers 0 to 1 of 4 are frozen and run once" in ours.holdfast.explain()
    assert "layers 0" not in theirs.holdfast.explain()
    # 3 steps of 2 micro-batches: the first compares; DPO has a pass of its own, and checkpointing runs without gradient
    assert many - few == 5
    log = [{k: v for k, v in entry.items() if "holdfast" in k} for entry in ours.state.log_history[:3]]
    assert log == [{k: v for k, v in entry.items() if "holdfast" in k} for entry in theirs.state.log_history[:3]]
    assert log[2]["holdfast/target_masked_kl/divergence"] > 0


def test_noise_that_the_trainer_adds_is_found():
    with pytest.warns(UserWarning, match="The base runs whole from here on.*what enters layer 2"):
        ours, _ = run("sft", True, neftune_noise_alpha=5.0)
    theirs, _ = run("sft", False, neftune_noise_alpha=5.0)
    assert runs.identical(ours.model, theirs.model)
    assert "it runs whole: what enters layer 2" in ours.holdfast.explain()


def test_a_resumed_run_shares_and_is_bit_identical(tmp_path):
    options = {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, _ = run("sft", True, output_dir=str(tmp_path / "a"), **options)
    run("sft", True, output_dir=str(tmp_path / "b"), **options)
    resumed = runs.trainer("sft", student(), output_dir=str(tmp_path / "b"), **options)
    session = holdfast.attach(resumed, METHODS, retain=tiny.texts(24))
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert runs.identical(resumed.model, straight.model)
    assert session.tap.prefix.why_not == ""


def test_accumulation_and_the_retain_stream_in_a_loop():
    methods = [TargetMaskedKL(), SelfReplay(cache=False)]

    def trained(**options):
        torch.manual_seed(0)
        return runs.loop(methods, student(), split=2, **options)

    (ours, session), (theirs, _) = trained(), trained(share_prefix=False)
    assert runs.identical(ours, theirs)
    assert session.explain().count("layers 0 to 1 of 4 are frozen and run once") == 2  # of both streams


def test_what_explain_says_where_nothing_is_shared():
    told = {
        "it runs whole: the first layer is trained": (tiny.lora(tiny.llama()), {}),
        "attention_dropout is 0.1": (student(attention_dropout=0.1), {}),
    }
    for words, (model, options) in told.items():
        params = [p for p in model.parameters() if p.requires_grad]
        with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), METHODS, **options) as session:
            assert words in session.explain()


def test_another_model_shares_nothing():
    model = student()
    params = [p for p in model.parameters() if p.requires_grad]
    other = tiny.llama(num_hidden_layers=4)
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), METHODS, reference=other) as session:
        assert isinstance(session.reference, OtherModel)
        assert session.tap.prefix is None
