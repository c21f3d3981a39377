from __future__ import annotations

import pytest
from holdfast.core.errors import ConfigError
from holdfast.recipe.lines import Faults, Section, read


def tree(tmp_path, text, faults=None):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read(path, faults if faults is not None else Faults())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("2E+3", 2000.0), ("-1.5e-3", -1.5e-3), (".5", 0.5), ("1.", 1.0), ("3", 3), ("-7", -7),
        ("on", "on"), ("no", "no"), ("true", True), ("2024-01-02", "2024-01-02"), ("e5", "e5"), ("1e", "1e"),
        ("'2e-4'", "2e-4"), ("~", None), ("1_000", 1000), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_what_people_mean(tmp_path, text, value):
    found = tree(tmp_path, f"a: {text}").plain()["a"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_knows_its_line(tmp_path):
    root = tree(tmp_path, "a: 1\nb:\n  c: [x, y]\n\n  d: {e: 2}\n")
    assert root.value["a"].line == 1
    inner = root.value["b"].value
    assert (inner["c"].line, inner["d"].line, inner["d"].value["e"].line) == (3, 5, 5)


def test_a_key_given_twice_is_a_fault(tmp_path):
    faults = Faults()
    tree(tmp_path, "a: 1\nb: 2\na: 3\n", faults)
    assert faults.found == [(3, "'a' is given twice (first on line 1): keep one")]


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx", "a: 'open"])
def test_what_is_not_yaml_is_a_fault_with_its_line(tmp_path, text):
    faults = Faults()
    assert tree(tmp_path, "x: 1\n" + text, faults) is None
    assert "not YAML" in faults.found[0][1]


def test_an_empty_file_is_a_fault(tmp_path):
    faults = Faults()
    assert tree(tmp_path, "# nothing\n", faults) is None
    assert "empty" in faults.found[0][1]


def test_faults_come_in_the_order_of_lines_and_once():
    faults = Faults()
    for line, text in ((3, "c"), (1, "a"), (3, "c")):
        faults.add(line, text)
    with pytest.raises(ConfigError) as caught:
        faults.raise_if_any("r.yaml")
    assert caught.value.faults == ("line 1: a", "line 3: c")


def test_what_nobody_asked_for_is_a_fault_with_a_guess(tmp_path):
    faults = Faults()
    section = Section(tree(tmp_path, "output: a\nsede: 1\nzzz: 2\n"), "the recipe", faults)
    section.text("output")
    section.whole("seed")
    section.close()
    assert faults.found[0] == (2, "unknown key 'sede' in the recipe. Did you mean 'seed'?")
    assert "It" not in faults.found[1][1]
    assert "has: output, seed" in faults.found[1][1]
