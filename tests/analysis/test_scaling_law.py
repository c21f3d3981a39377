"""The forms of the law against their equations written out, and their limits."""

import math
import random

import pytest
from holdfast.analysis.scaling_law import LAWS

WRITTEN = {
    "base": lambda v, D, N, p: v["A"] * D ** v["β"] / N ** v["α"],
    "drift": lambda v, D, N, p: v["A"] * D ** v["β"] / N ** v["α"] + v["E"],
    "injected": lambda v, D, N, p: v["A"] * D ** v["β"] / ((1 + v["B"] * p) * N) ** v["α"],
    "shifted": lambda v, D, N, p: v["S"] - v["A"] / N ** v["α"] - v["C"] / D ** v["β"],
}
SOME = {"A": 0.3, "B": 829.0, "C": 0.7, "S": 2.0, "E": 0.05, "α": 0.4, "β": 0.6}


def test_every_form_is_written_out_here():
    assert LAWS.keys() == WRITTEN.keys()


@pytest.mark.parametrize("name", LAWS)
def test_a_form_is_its_equation(name):
    law, numbers = LAWS[name], random.Random(0)
    values = {parameter: SOME[parameter] for parameter in law.names}
    for _ in range(20):
        place = 10 ** numbers.uniform(1, 6), 10 ** numbers.uniform(0, 9), numbers.uniform(0, 0.05)
        assert math.isclose(law.forgetting(values, *place), WRITTEN[name](values, *place), rel_tol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_parameters_are_those_of_the_equation_and_explained(name):
    law = LAWS[name]
    assert set(law.names) == {sign for sign in "ABCESαβ" if sign in law.equation.removeprefix("L = L0")}
    for parameter in law.parameters:
        assert parameter.meaning
        assert parameter.low < parameter.high
        assert all(parameter.low <= start <= parameter.high for start in parameter.starts)


@pytest.mark.parametrize("name", LAWS)
def test_a_form_is_linear_in_its_amplitudes(name):
    """Fits find their starts by that."""
    law = LAWS[name]
    values = {parameter: SOME[parameter] for parameter in law.names}
    curved = {p.name for p in law.parameters if p.starts}
    alone = [law.forgetting({n: v if n in {*curved, one} else 0.0 for n, v in values.items()}, 300.0, 5.0, 0.01)
             for one in law.names if one not in curved]  # fmt: skip
    assert math.isclose(sum(alone), law.forgetting(values, 300.0, 5.0, 0.01), rel_tol=1e-12)


def test_the_base_form_is_the_drift_form_without_E_and_the_injected_one_without_old_data():
    values, place = {**SOME, "E": 0.0}, (300.0, 5.0)
    assert LAWS["drift"].forgetting(values, *place) == LAWS["base"].forgetting(values, *place)
    assert LAWS["injected"].forgetting(values, *place, 0.0) == LAWS["base"].forgetting(values, *place)


def test_without_a_base_the_loss_itself_is_fitted():
    law = LAWS["base"].without_base()
    values = {"A": 0.3, "α": 0.4, "β": 0.6}
    difference = law.forgetting({**values, "L0": 2.5}, 300.0, 5.0) - LAWS["base"].forgetting(values, 300.0, 5.0)
    assert math.isclose(difference, 2.5)
