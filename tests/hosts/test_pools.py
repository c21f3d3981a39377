"""Self-replay with nothing else given: the base writes its pool, what it says of it is kept, runs find both again."""

from __future__ import annotations

import logging

import holdfast
import pytest
import torch
from holdfast import lab
from holdfast.core.errors import WrongSetup
from holdfast.core.retain import STREAM
from holdfast.integrations import pools
from holdfast.methods import AGEM, FullKL, SelfReplay, TargetMaskedKL
from holdfast.retain import cached_reference
from holdfast.retain.kept import PoolError
from holdfast.retain.making import make
from holdfast.retain.pool import Pool
from holdfast.retain.settings import Settings
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import runs
import tiny

SGD = {"optim": "sgd", "learning_rate": 0.5, "steps": 4}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def moved(trainer):
    start = tiny.trained(tiny.lora(tiny.llama()))
    return {k: v - start[k] for k, v in tiny.trained(trainer.model).items()}


def small():
    """A small pool of the tiny model."""
    return make(tiny.llama(), tiny.tokenizer(), Settings(n=24, max_tokens=8))


def attached(methods, **options):
    trainer = runs.trainer("sft")
    return holdfast.attach(trainer, methods, **options)


def test_an_unmodified_sft_trainer_and_nothing_else(own, tmp_path, capsys):
    """The lab's model, TRL's trainer: 256 sequences of all kinds that the base can write, read 4 beside every 12."""
    model, tokenizer = lab.load("lab-aligned")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=4, learning_rate=5e-3, per_device_train_batch_size=12,
            report_to="none",
            bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
        ),
        train_dataset=pytest.importorskip("datasets").Dataset.from_list(lab.task("shift", n=24)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    session = holdfast.attach(trainer, [SelfReplay()])
    trainer.train()
    (folder,) = (own / "pools").iterdir()
    assert f"holdfast retain show {folder}" in capsys.readouterr().out
    pool = Pool.load(folder, tokenizer=tokenizer, base=lab.load("lab-aligned")[0])  # of the base, without the adapter
    assert len(pool) == 256
    assert {"text", "chat", "noise"} <= set(pool.counts)
    assert list(session.retain.sets) == ["pool"]
    assert session.retain.positions[STREAM] == 4 * 4
    assert "read from exact statistics of the KL" in session.explain()
    assert trainer.state.log_history[-2]["holdfast/self_replay/divergence"] > 1e-4


def test_the_next_run_finds_pool_and_cache(own, monkeypatch):
    first = runs.train("sft", [SelfReplay(strength=3.0)], retain=(), **SGD)
    files = {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file()}
    assert len(files) == 3  # the manifest and the sequences, and what is kept of the base
    monkeypatch.setattr(pools, "make", None)
    second = runs.train("sft", [SelfReplay(strength=3.0)], retain=(), **SGD)
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file()} == files
    assert runs.identical(first.model, second.model)
    with pytest.raises(TypeError):  # another seed has a pool of its own
        runs.train("sft", [SelfReplay()], retain=(), seed=1, **SGD)


def test_a_pool_its_folder_and_its_rows_are_the_same(own, tmp_path):
    pool = small()
    folder = pool.save(tmp_path / "mine")
    found = [
        runs.train("sft", [SelfReplay(strength=3.0)], retain=given, **SGD)
        for given in (pool, folder, str(folder), {"pool": pool}, pool.batches(0))
    ]
    assert all(runs.identical(each.model, found[0].model) for each in found[1:])
    assert [list(each.holdfast.retain.sets) for each in found] == [["pool"]] * 4 + [["retain"]]
    assert not (own / "pools").exists()  # none was sampled


def test_rows_of_another_method_and_a_pool_beside_them(own):
    methods = [SelfReplay(data="pool"), AGEM()]
    session = attached(methods, retain=tiny.texts(8))
    assert set(session.retain.sets) == {"pool", "retain"}
    assert f"pool of {len(session.retain.sequences(['pool'])):,}," in session.explain()
    assert len(session.retain.sequences(["retain"])) == 8
    # what is given is read where no set is named, and nothing is sampled
    assert "pool of 8," in attached([SelfReplay(), AGEM()], retain=tiny.texts(8)).explain()


def test_off_is_off(own):
    assert attached([SelfReplay(strength=0)]).stream is None
    assert not own.exists()


def test_what_cannot_be_a_pool(own, tmp_path):
    with pytest.raises(WrongSetup, match=r"'no-such' is not the folder of a pool.*holdfast retain sample"):
        attached([SelfReplay()], retain="no-such")
    words, model = lab.load("lab-aligned")[1], tiny.llama()
    other = make(lab.load("lab-aligned")[0], words, Settings(n=4, max_tokens=4, mix={"text": 1.0}))
    with pytest.raises(PoolError, match="tokens are those of the tokenizer"):
        attached([SelfReplay()], retain=other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(WrongSetup, match=r"self_replay samples its sequences .* tokenizer=\.\.\., or .* retain="),
        holdfast.preserve(model, optimizer, [SelfReplay()]),
    ):
        pass
    with holdfast.preserve(model, optimizer, [SelfReplay()], tokenizer=tiny.tokenizer()) as session:
        assert list(session.retain.sets) == ["pool"]


def test_a_pool_comes_from_a_reference_that_is_another_model(own):
    """Where the student begins from other weights than the base's, it is the base that writes."""
    base = tiny.llama(seed=5)
    session = attached([SelfReplay()], reference=base)
    (folder,) = (own / "pools").iterdir()
    Pool.load(folder, base=base)
    with pytest.raises(PoolError, match="other weights"):
        Pool.load(folder, base=tiny.llama())
    assert session.reference.description == "another frozen model"


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize(
    ("methods", "kept"),
    [
        ([SelfReplay(strength=3.0)], "statistics"),
        ([TargetMaskedKL(on="retain", strength=3.0)], "statistics"),
        ([SelfReplay(strength=3.0, direction="js")], "hidden"),
        ([TargetMaskedKL(on="retain", strength=3.0, exclusion=0.01, normalise="kept")], "hidden"),
        ([SelfReplay(strength=3.0), TargetMaskedKL(on="retain")], "hidden"),
    ],
)
def test_what_is_kept_trains_as_the_base_would(own, host, methods, kept):
    from dataclasses import replace

    options = SGD | {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    pool, live = small(), [replace(method, cache=False) for method in methods]
    cached, running = (runs.train(host, each, retain=pool, **options) for each in (methods, live))
    assert (f"{'hidden states' if kept == 'hidden' else 'exact statistics'}" in cached.holdfast.explain()) is True
    assert "reference forward on the retain sequences" in running.holdfast.explain()
    assert runs.difference(moved(cached), moved(running)) <= 1e-4
    ours, theirs = (
        [entry for entry in each.state.log_history if "holdfast/self_replay/loss" in entry]
        for each in (cached, running)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one["holdfast/self_replay/loss"] == pytest.approx(other["holdfast/self_replay/loss"], rel=1e-4, abs=1e-6)


def test_a_head_that_is_trained_keeps_hidden_states(own):
    """Full fine-tuning: the statistics of one frozen head would not do."""
    cached, running = (
        runs.train("sft", [SelfReplay(strength=3.0, cache=cache)], tiny.llama(), retain=small(), **SGD)
        for cache in (True, False)
    )
    assert "hidden states at" in cached.holdfast.explain()
    start = tiny.trained(tiny.llama())
    ours, theirs = ({k: v - start[k] for k, v in tiny.trained(each.model).items()} for each in (cached, running))
    assert runs.difference(ours, theirs) <= 1e-4


def test_a_pool_too_large_to_keep_is_run(own, monkeypatch, caplog):
    monkeypatch.setattr(cached_reference, "LARGEST", 1000)
    with caplog.at_level(logging.WARNING):
        large = runs.train("sft", [SelfReplay(strength=3.0)], retain=small(), **SGD)
    assert "runs on the retain sequences in every step" in caplog.text
    assert "reference forward on the retain sequences" in large.holdfast.explain()
    live = runs.train("sft", [SelfReplay(strength=3.0, cache=False)], retain=small(), **SGD)
    assert runs.identical(large.model, live.model)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "file" / "cache"))
    trainer = runs.trainer("sft")
    with caplog.at_level(logging.WARNING):
        holdfast.attach(trainer, [SelfReplay()])
    assert "cannot be kept for the next run" in caplog.text  # a pool can do without
    with pytest.raises(WrongSetup, match=r"HOLDFAST_CACHE .* cache=False"):
        trainer.train()
    assert runs.train("sft", [SelfReplay(cache=False)], retain=(), **SGD).state.global_step == 4


def test_a_run_is_not_resumed_with_another_pool(own, tmp_path):
    def run(retain, resume=None):
        trainer = runs.trainer("sft", output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=2, steps=4)
        holdfast.attach(trainer, [SelfReplay()], retain=retain)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    pool, checkpoint = small(), str(tmp_path / "run/checkpoint-2")
    whole = run(pool)
    with pytest.raises(WrongSetup, match="other retain sequences than it has now"):
        run(pool.remove([pool.sequences[3].id]), checkpoint)
    assert runs.identical(run(pool, checkpoint).model, whole.model)


def test_full_kl_on_the_retain_stream_still_needs_rows(own):
    with pytest.raises(WrongSetup, match="full_kl needs retain data"):
        attached([FullKL(on="retain")])
    assert not own.exists()
