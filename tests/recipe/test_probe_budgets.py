"""Budgets on scores: what share of the base's score is lost, against models of their own; and a recipe that is held."""

import math

import pytest
import torch
from holdfast import lab
from holdfast.core.errors import ConfigError
from holdfast.drift.measuring import measure
from holdfast.drift.models import Models
from holdfast.drift.probes.output_kl import OutputKL
from holdfast.drift.probes.perplexity import Perplexity
from holdfast.drift.probes.refusal_margin import RefusalMargin
from holdfast.lab import world
from holdfast.lab.probes import COMPLYING, REFUSING, twins
from holdfast.methods import FullKL, UpdateDecay
from holdfast.recipe.config import load
from holdfast.recipe.probe_budgets import probe_measures
from holdfast.recipe.run import run
from holdfast.recipe.training import make_trainer
from holdfast.recipe.watch_settings import Watching
from holdfast.recipe.watch_sides import always

import tiny

RECIPE = """\
model: {{name: lab-aligned{adapter}}}
stages:
  - {{trainer: sft, data: {{data: "lab:shift", samples: 960}}, max_steps: {steps}, per_device_train_batch_size: 16,
     learning_rate: 4.0e-3, logging_steps: 5, report_to: none, disable_tqdm: true, save_strategy: "no"}}
methods: [{{update_decay: {{strength: auto, budget: {budget}}}}}]
drift: {{every: 1000, limit: 4}}
output: {folder}/out
"""


def asked(folder, budget, steps=4, adapter=", lora: {r: 4}"):
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(folder=folder, budget=budget, steps=steps, adapter=adapter))
    return load(file)


def suite():
    stories = [item.answer for item in world.sample(world.story, 4, "validation")]
    prompts = twins("validation").prompts[:8]
    margin = RefusalMargin(prompts, refusing=REFUSING, complying=COMPLYING)
    return (Perplexity("stories", stories), margin, OutputKL("stories", stories))


def trainer_of(recipe):
    model, tokenizer = recipe.model.load()
    stage = recipe.stages[0]
    rows = stage.data.rows()
    return make_trainer(stage, rows, model, tokenizer, recipe.model.peft_config(), recipe.output, 0)


def on(*names):
    return [UpdateDecay(strength="auto", budget={name: 0.1}) for name in names]


@pytest.mark.parametrize("kind", ["lora", "pissa", "dense"])
def test_what_is_lost_is_a_share_of_the_bases_score(kind, tmp_path):
    """Against the scores of two models of their own, of which one has the adapter merged into it."""
    adapters = {"lora": ", lora: {r: 4}", "pissa": ", lora: {r: 4, init_lora_weights: pissa}", "dense": ""}
    trainer = trainer_of(asked(tmp_path, 0.1, adapter=adapters[kind]))
    base, tokenizer = lab.load("lab-aligned")
    other = None if kind == "lora" else lab.load("lab-aligned")[0]
    names = ["perplexity.stories", "refusal_margin"]
    lost = probe_measures(trainer, [*on(*names), FullKL()], Watching(suite()), lambda: other)
    assert list(lost) == names
    assert [lost[name](trainer.model) for name in names] == pytest.approx([0, 0], abs=1e-4)
    tiny.shake(trainer.model, 0.05 if kind == "dense" else 0.15)
    state, flags = torch.get_rng_state(), [p.requires_grad for p in trainer.model.parameters()]
    found = [lost[name](trainer.model) for name in names]
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in trainer.model.parameters()] == flags
    tuned = trainer.model if kind == "dense" else trainer.model.merge_and_unload()
    sides = {name: always(model, trainer.accelerator.autocast) for name, model in (("base", base), ("tuned", tuned))}
    scores = measure(Models(sides, tokenizer), suite())
    (p0, m0), (p1, m1) = ([scores[side].scores[name].value for name in names] for side in sides)
    assert found == pytest.approx([(p1 - p0) / p0, (m0 - m1) / abs(m0)], rel=1e-3, abs=1e-4)
    assert abs(found[0]) > 0.01
    assert abs(found[1]) > 0.01
    if kind == "dense":
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)
        assert math.isnan(lost["refusal_margin"](trainer.model))


def test_without_a_budget_on_a_score_nothing_is_measured():
    methods = [FullKL(), FullKL(strength="auto", budget=0.1)]
    assert probe_measures(None, methods, Watching(), lambda: pytest.fail("no base is needed")) == {}


def test_scores_that_cannot_be_lost_are_told_at_once(tmp_path):
    trainer = trainer_of(asked(tmp_path, 0.1))
    with pytest.raises(ConfigError) as caught:
        probe_measures(trainer, on("exact_answer.rare", "output_kl.stories"), Watching(suite()), lambda: None)
    assert len(caught.value.faults) == 2
    assert "no probe of this suite gives 'exact_answer.rare'; there are: perplexity.stories, refus" in str(caught.value)
    assert "output_kl.stories is 0 for the base, so no share of it can be lost" in str(caught.value)


def test_a_score_that_nothing_gives_is_refused_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"line 5: update_decay: budget is on 'perplexty.stories', a score that noth"):
        asked(tmp_path, "{perplexty.stories: 0.1}")


def logged(recipe):
    trainers = []
    run(recipe, lambda text: None, lambda trainer, number: trainers.append(trainer))
    return trainers[0].state.log_history, trainers[0].holdfast


@pytest.mark.slow
def test_a_recipe_keeps_to_a_budget_on_a_score(tmp_path):
    rows, session = logged(asked(tmp_path, "{perplexity.stories: 0.1}", steps=60, adapter=", lora: {r: 8}"))
    drifts = [row["holdfast/update_decay/drift"] for row in rows if "holdfast/update_decay/drift" in row]
    assert drifts[0] == 0
    assert max(drifts) > 0.3
    assert 0 < session.budgets._measures["perplexity.stories"](session.model) < 0.115
    (last,) = (row for row in rows if "drift/perplexity.stories" in row)
    share = last["drift/perplexity.stories_change"] / (
        last["drift/perplexity.stories"] - last["drift/perplexity.stories_change"]
    )
    assert share < 0.115  # as `holdfast.watch` says


@pytest.mark.slow
def test_a_refusal_margin_may_grow_while_every_refusal_is_lost(tmp_path):
    """Why docs/budget.md warns of it: it compares given openings, and this task teaches another."""
    rows, _ = logged(asked(tmp_path, "{refusal_margin: 0.05}", steps=60, adapter=", lora: {r: 8}"))
    (last,) = (row for row in rows if "drift/refusal" in row)
    assert last["drift/refusal_margin_change"] > 0
    assert last["drift/refusal"] < 0.1
    strengths = [row["holdfast/update_decay/strength"] for row in rows if "holdfast/update_decay/strength" in row]
    assert strengths[-1] == 0
