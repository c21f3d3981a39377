"""Measuring: finished parts are used again under the very same conditions alone, and both sides are measured alike."""

import pytest
from holdfast.drift.measuring import measure
from holdfast.drift.models import Models, digest
from holdfast.drift.probe import BASE, Found, Probe, ProbeError
from holdfast.drift.score import Score

from drift.sides import models_of
from tiny import llama, lora, tokenizer


class Counted(Probe):
    """Says how often it ran."""

    def __init__(self, name="counted", setting=1, fails_on=""):
        self.name, self.setting, self.fails_on, self.runs = name, setting, fails_on, []

    size = 2

    @property
    def identity(self):
        return {"setting": self.setting}

    def measure(self, models, side, tick):
        if side == self.fails_on:
            raise KeyboardInterrupt
        self.runs.append(side)
        tick(2)
        return Found({self.name: Score(0.5, items=(0.0, 1.0))})


def models(**digests):
    plain = models_of(lora(llama()), tokenizer())
    return Models(plain.sides, plain.tokenizer, digests={"base": "b", "tuned": "t"} | digests)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(models(), [Counted("first"), Counted("second", fails_on="tuned")], folder=tmp_path)
    again = [Counted("first"), Counted("second")]
    found = measure(models(), again, folder=tmp_path)
    # the base had both, the tuned side the first alone
    assert [probe.runs for probe in again] == [[], ["tuned"]]
    assert found["tuned"].scores.keys() == {"first", "second"} == found[BASE].scores.keys()
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize(
    ("changed", "runs"), [("probe", ["base", "tuned"]), ("base", ["base", "tuned"]), ("tuned", ["tuned"])]
)
def test_whatever_could_change_a_score_has_it_measured_again(tmp_path, changed, runs):
    measure(models(), [Counted()], folder=tmp_path)
    probe = Counted(setting=2) if changed == "probe" else Counted()
    measure(models(**({} if changed == "probe" else {changed: "new"})), [probe], folder=tmp_path)
    assert probe.runs == runs  # a tuned side depends on its base (a KL does), a base not on what was made of it


def test_a_part_that_was_damaged_is_told(tmp_path):
    measure(models(), [Counted()], folder=tmp_path)
    path = next(tmp_path.glob("counted-base-*.json"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ProbeError, match="Delete it"):
        measure(models(), [Counted()], folder=tmp_path)


def test_sides_with_other_items_or_other_scores_are_refused():
    class Uneven(Counted):
        def measure(self, models, side, tick):
            more = {} if side == BASE else {"more": Score(1.0)}
            return Found({"uneven": Score(0.5, items=(0, 1) if side == BASE else (0, 1, 0, 1)), **more})

    with pytest.raises(ProbeError) as told:
        measure(models(), [Uneven("uneven")])
    assert sorted(told.value.faults) == [
        "more: only one of base and tuned has it",
        "uneven: base has 2 items and tuned 4, or other categories",
    ]


def test_namesakes_are_refused():
    with pytest.raises(ProbeError, match="same is there twice"):
        measure(models(), [Counted("same"), Counted("same")])


def test_models_need_a_base_a_tokenizer_and_digests_for_a_cache(tmp_path):
    with pytest.raises(ProbeError) as told:
        Models({"tuned": lambda: None}, None, cache=tmp_path, batch_size=0)
    assert len(told.value.faults) == 4


def test_a_digest_tells_one_bit_of_one_weight():
    one = llama()
    before = digest(one.state_dict())
    assert before == digest(llama().state_dict())
    weight = one.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = weight[0, 0].nextafter(weight[0, 0] + 1)
    assert digest(one.state_dict()) != before
    assert digest({}, of="a") != digest({}, of="b")
