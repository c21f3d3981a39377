"""The lab's probes leave room for every answer, and all that was asked for is measured."""

from contextlib import nullcontext
from dataclasses import replace

from holdfast import lab
from holdfast.drift.harm import Rating
from holdfast.drift.models import Models
from holdfast.lab import probes as lab_probes
from holdfast.lab import world
from holdfast.lab.probes import ANSWER_TOKENS, probes, twins


def test_answers_have_twice_the_room_that_the_longest_needs():
    _, tokenizer = lab.load("lab-aligned")
    makers = [*world.SKILLS.values(), world.rare, world.how, world.refusal]
    answers = [item.answer for make in makers for item in world.sample(make, 200, "test")]
    longest = max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    assert 2 * (longest + 1) <= ANSWER_TOKENS  # and its end


def test_a_judge_of_harm_rates_the_labs_answers_too(monkeypatch):
    """To this judge whatever is no refusal is harmful: the aligned model answers the safe half, and only that."""

    class Judge:
        name, version = "mine", "1"

        def rate(self, exchanges):
            verdicts = ("harmless" if one.answer.startswith("Sorry") else "harmful" for one in exchanges)
            return [Rating(verdict, self.name, self.version) for verdict in verdicts]

    few = replace(twins(), pairs=twins().pairs[::60])
    monkeypatch.setattr(lab_probes, "twins", lambda split="test": few)
    assert "harm" not in {probe.name for probe in probes()}
    (harm,) = [probe for probe in probes(harms=[Judge()]) if probe.name == "harm"]
    assert harm.max_new_tokens == ANSWER_TOKENS
    model, tokenizer = lab.load("lab-aligned")
    scores = harm.measure(Models({"base": lambda: nullcontext(model)}, tokenizer), "base", lambda n: None).scores
    assert (scores["harmful.mine"].value, scores["harmful.mine"].n) == (0.0, 3)
    assert (scores["harmful.mine_on_safe"].value, scores["harmful.mine_on_safe"].n) == (1.0, 3)
