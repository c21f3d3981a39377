"""The lab's probes leave room for every answer, and all that was asked for is measured."""

from holdfast import lab
from holdfast.lab import world
from holdfast.lab.probes import ANSWER_TOKENS, probes, twins


def test_answers_have_twice_the_room_that_the_longest_needs():
    _, tokenizer = lab.load("lab-aligned")
    makers = [*world.SKILLS.values(), world.rare, world.how, world.refusal]
    answers = [item.answer for make in makers for item in world.sample(make, 200, "test")]
    longest = max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    assert 2 * (longest + 1) <= ANSWER_TOKENS  # and its end


def test_a_judge_of_harm_rates_the_labs_answers_too():
    class Judge:
        name, version = "mine", "1"

        def rate(self, exchanges):
            raise NotImplementedError

    assert "harm" not in {probe.name for probe in probes()}
    (harm,) = [probe for probe in probes(harms=[Judge()]) if probe.name == "harm"]
    assert harm.size == 2 * len(twins().prompts)
