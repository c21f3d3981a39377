"""attach, detach, the mixin and explain, on a real trainer."""

import holdfast
import pytest
from holdfast.core.errors import WrongSetup
from holdfast.methods import AGEM, L2SP, FullKL, TargetMaskedKL
from trl import SFTConfig, SFTTrainer

import runs
import tiny


def test_detach_gives_the_host_back():
    alone = runs.train("sft", None)
    trainer = runs.trainer("sft")
    holdfast.attach(trainer, [TargetMaskedKL(), L2SP(), AGEM()], retain=tiny.texts())
    assert type(trainer).__name__ == "PreservingSFTTrainer"
    holdfast.detach(trainer)
    assert type(trainer) is SFTTrainer
    assert not hasattr(trainer, "holdfast")
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.train()
    assert runs.identical(trainer.model, alone.model)
    with pytest.raises(WrongSetup, match="not given its session"):
        holdfast.detach(trainer)


def test_the_mixin_is_what_attach_does(tmp_path):
    class Mine(holdfast.PreservingMixin, SFTTrainer):
        pass

    methods = [TargetMaskedKL(), L2SP(strength=0.1)]
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        bf16=False,
        use_cpu=True,
        learning_rate=1e-2,
        logging_steps=1,
        seed=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    mine = Mine(
        model=tiny.lora(tiny.llama()),
        args=args,
        train_dataset=tiny.prompt_completion(),
        processing_class=tiny.tokenizer(),
        methods=methods,
    )
    mine.train()
    assert runs.identical(mine.model, runs.train("sft", methods).model)


def test_explain_tells_the_order_of_events():
    trainer = runs.trainer("sft", tiny.lora(tiny.llama(), init_lora_weights="pissa"))
    methods = [AGEM(refresh_every=5), L2SP(), TargetMaskedKL(), FullKL(strength=0)]
    session = holdfast.attach(trainer, methods, retain=tiny.texts())
    text = session.explain()
    places = [
        text.index(word)
        for word in (
            "forward: the host",
            "reference forward",
            "loss: target_masked_kl",
            "backward",
            "penalty gradient added: l2_sp",
            "gradients transformed: agem",
            "clip, by the host",
            "optimizer step",
        )
    ]
    assert places == sorted(places)
    assert "a frozen copy of the trainable weights at the start" in text
    assert "refreshed every 5 steps" in text
    assert "Off (strength 0): full_kl." in text
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trainable:,} trainable parameters" in text
    trainer.train()
    assert f"l2_sp(strength=0.01, refresh_every=None), state {trainable * 4 / 1024:.1f} KiB" in session.explain()


def test_evaluation_during_training_is_not_touched():
    """Eval loss is the host's own, and evaluating in the middle does not disturb the session."""

    def run(methods):
        trainer = runs.trainer("sft", eval_strategy="steps", eval_steps=1)
        if methods is not None:
            holdfast.attach(trainer, methods, retain=tiny.texts())
        return trainer

    alone, ours = run(None), run([TargetMaskedKL(strength=0.0), L2SP(strength=0.0)])
    acting = run([TargetMaskedKL(), AGEM()])
    for trainer in (alone, ours, acting):
        trainer.train()
    evaluations = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (alone, ours, acting)]
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[2]) == 3
    assert not any("holdfast" in key for e in acting.state.log_history if "eval_loss" in e for key in e)


def test_trl_padding_free_batches_weigh_what_padded_ones_do():
    """TRL lays the rows of a batch end to end (`padding_free`); the added loss and its gradient do not change."""
    methods = [TargetMaskedKL(strength=2.0, positions="all")]
    options = {"optim": "sgd", "learning_rate": 0.5, "steps": 4}
    padded = runs.train("sft", methods, **options)
    free = runs.train("sft", methods, padding_free=True, max_length=None, **options)
    start = tiny.trained(tiny.lora(tiny.llama()))
    changes = [{k: v - start[k] for k, v in tiny.trained(t.model).items()} for t in (free, padded)]
    logged = [t.state.log_history[-2]["holdfast/target_masked_kl/divergence"] for t in (free, padded)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert runs.difference(*changes) <= 1e-5


def test_two_methods_of_one_name_are_told_apart():
    """Two positions of one method are two losses: each has its own name in the log."""
    methods = [TargetMaskedKL(), TargetMaskedKL(positions="prompt", strength=2.0)]
    entry = runs.train("sft", methods).state.log_history[-2]
    first, second = (entry[f"holdfast/target_masked_kl{twin}/divergence"] for twin in ("", ".2"))
    assert first > 0
    assert second > 0
    assert first != second
    assert entry["holdfast/target_masked_kl.2/loss"] == pytest.approx(2 * second)
