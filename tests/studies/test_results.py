"""The result pages: recipes load, verdicts follow from the numbers, and the pages are those that the ledgers give."""

from __future__ import annotations

import json
import math
import os
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from holdfast.drift.ledger import Entry, Ledger, Score
from holdfast.recipe import compare as comparing
from holdfast.recipe.config import load

from studies.results import rows, runs
from studies.results.choose import END, START, evidence, headlines, quote
from studies.results.columns import Column, column, whole_seeds
from studies.results.comparisons import FRACTIONS, KINDS, LAB, MASKED, PLAIN, REPLAY, RESULTS, STUDIES, recipe
from studies.results.page import PAGES, write_pages
from studies.results.tmkl import ends, unmatched
from studies.results.words import marks, needed, tally, verdict

DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "tinylm/stories260K.bin").is_file()
needs_data = pytest.mark.skipif(not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/stories260K.bin")
TINY_ONES = [name for name in STUDIES if name in ("default_word_problems", "default_plays")]
LAB_ONES = [name for name in STUDIES if name not in TINY_ONES]
PARTS = ("**Claim.**", "## Verdict", "## Set-up", "## Result at matched learning", "## Controls", "## Limits")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with all rows that can be had."""
    folder = tmp_path_factory.mktemp("work")
    with chdir(folder):
        rows.prepare(DATA.resolve() if HAVE else None)
    return folder


# ---- rows and recipes ------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_row_of_the_lab_is_in_both_splits(prepared):
    folder = prepared / rows.FOLDER / "lab"
    for name in ("shift", "second", "refusals", "look_alikes", "skills", "rare_skill", "stories"):
        validation, test = ([*map(str, read(folder / f"{name}-{split}.jsonl"))] for split in rows.SPLITS)
        assert len(test) == 2 * len(validation)
        assert not {*validation} & {*test}
    refused = read(folder / "refusals-test.jsonl")
    answered = read(folder / "look_alikes-test.jsonl")
    assert {str(row["completion"]) for row in refused}.isdisjoint(str(row["completion"]) for row in answered)


@needs_data
def test_rows_of_stories260k_fit_and_no_split_has_those_of_another(prepared):
    from transformers import AutoTokenizer

    folder = prepared / rows.FOLDER
    tokenizer = AutoTokenizer.from_pretrained(folder / "stories260K")
    for task in ("word_problems", "plays"):
        splits = {split: read(folder / f"tiny/{task}-{split}.jsonl") for split in rows.TASK_ROWS}
        assert len(splits["test"]) == rows.TASK_ROWS["test"]
        prompts = [{row["prompt"] for row in splits[split]} for split in splits]
        for mine in range(3):
            for theirs in range(mine):
                assert not prompts[mine] & prompts[theirs]
    assert all(rows.length(tokenizer, row) <= rows.LONGEST for row in read(folder / "tiny/word_problems-test.jsonl"))
    for name in ("stories", "oz", "wikitext"):  # cut, so that no end of a text is measured where there is none
        assert all(rows.length(tokenizer, row) > rows.LONGEST for row in read(folder / f"tiny/{name}-test.jsonl"))
    assert yaml.safe_load(recipe("default_plays").read_text())["stages"][0]["max_length"] == rows.LONGEST
    kept = {row["prompt"] + row["completion"] for row in read(folder / "tiny/kept_starts.jsonl")}
    assert len(kept) == rows.KEPT
    assert kept.isdisjoint(row["text"] for row in read(folder / "tiny/stories-test.jsonl"))


def test_rows_are_dealt_out_over_the_whole():
    whole = [{"text": str(i)} for i in range(20)]
    found = rows.parted(whole, {"train": 99, "validation": 3, "test": 5})
    numbers = {split: [int(row["text"]) for row in each] for split, each in found.items()}
    assert {split: len(each) for split, each in numbers.items()} == {"train": 12, "validation": 3, "test": 5}
    assert sorted(sum(numbers.values(), [])) == [*range(20)]  # noqa: RUF017
    assert max(numbers["test"]) - min(numbers["test"]) > 12


@pytest.mark.slow
@pytest.mark.parametrize("name", LAB_ONES)
def test_every_recipe_of_the_lab_is_fine(prepared, name):
    check(prepared, name)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_ONES)
def test_every_recipe_of_stories260k_is_fine(prepared, name):
    check(prepared, name)


def check(folder: Path, name: str) -> None:
    """What `holdfast compare RECIPE --check` looks at, and what the pages expect of it."""
    with chdir(folder):
        asked = load(recipe(name))
        plan = comparing.plan(asked)
    assert asked.compare is not None
    assert asked.output == runs.WORK / name
    assert asked.experiment == name
    assert (asked.compare.learn, asked.compare.keep) == (STUDIES[name].learn, STUDIES[name].keep)
    assert len(asked.compare.seeds) == 3
    assert len(plan.jobs) == 3 * len(asked.compare.variants)


def test_recipes_that_are_read_together_share_model_steps_and_rows():
    for name, study in STUDIES.items():
        mine = yaml.safe_load(recipe(name).read_text())
        for other in study.others:
            theirs = yaml.safe_load(recipe(other).read_text())
            assert all(mine[key] == theirs[key] for key in ("model", "stages", "evaluate"))
            assert all(mine["compare"][key] == theirs["compare"][key] for key in ("seeds", "scales", "checkpoints"))
            assert {*study.others[other]} <= {*theirs["compare"]["arms"]}


# ---- verdicts against ledgers made by hand ---------------------------------------------------------------------------


def made(name: str, arms: dict[str, float], seeds=(0, 1, 2), better=()) -> list[Entry]:
    """Entries in which an arm forgets its number times what it learns; of `better` on validation rows alone half."""
    study, found = STUDIES[name], []

    def entry(arm: str, settings: dict, seed: int, split: str, learnt: float, lost: float) -> Entry:
        scores = {study.learn: Score(3.0 - learnt, n=50, standard_error=1e-4)}
        scores |= {score: Score(0.5 + lost * learnt + 1e-3 * seed, n=50, standard_error=1e-4) for score in study.keep}
        return Entry(name, arm, settings, seed, split, scores)

    for split in ("validation", "test"):
        found.append(entry("base", {}, 0, split, 0.0, 0.0))
        for seed in seeds:
            for arm, rate in arms.items():
                rate = rate / 2 if arm in better and split == "validation" else rate
                for scale in (0.5, 0.8, 1.0):
                    found.append(entry(arm, {"learning_rate": 1e-3, "scale": scale}, seed, split, 2.9 * scale, rate))
    return found


def ledger(folder: Path, name: str, entries: list[Entry]) -> Path:
    runs.write(entries, folder / STUDIES[name].page / "ledger.jsonl")
    return folder


def test_a_verdict_follows_from_the_numbers(tmp_path):
    each = column(ledger(tmp_path, "tmkl", made("tmkl", {PLAIN: 0.3, MASKED: 0.1, "full KL": 0.3})), "tmkl")
    assert isinstance(each, Column)
    assert each.levels == pytest.approx([3 - share * 2.9 for share in FRACTIONS], abs=0.01)
    found = each.pairs(MASKED, PLAIN)
    assert len(found) == len(LAB) * len(FRACTIONS)
    assert verdict(found) == "better"
    assert tally(found[:3]) == "better in 3 (refusal loss), worse in 0, within noise in 0 of 3 comparisons"
    assert verdict(each.pairs(PLAIN, MASKED)) == "worse"
    assert marks(each.pairs("full KL", PLAIN)) == "0 ✓ 0 ✗ 15 ="
    assert verdict(each.pairs("full KL", PLAIN)) == "within noise"
    assert each.pairs("DoRA", PLAIN) == []
    story = next(one for one in found if one.arm.retention == "stories_loss" and one.arm.level == each.levels[0])
    assert story.difference == pytest.approx(-0.2 * (3.0 - each.levels[0]), abs=1e-3)  # by the slopes above
    ratio = next(one for one in found if one.arm.retention == "skills_loss" and one.arm.level == each.levels[0])
    learnt = 3.0 - each.levels[0]
    assert math.exp(ratio.difference) == pytest.approx((0.5 + 0.1 * learnt) / (0.5 + 0.3 * learnt), rel=0.01)


def test_the_best_rival_is_named_by_validation_rows(tmp_path):
    arms = {PLAIN: 0.3, MASKED: 0.2, "full KL": 0.25, REPLAY: 0.22}
    each = column(ledger(tmp_path, "tmkl", made("tmkl", arms, better=("full KL",))), "tmkl")
    assert each is not None
    found = each.against_best(REPLAY, (PLAIN, MASKED, "full KL", "DoRA"))
    assert {one.baseline.arm for one in found} == {"full KL"}  # on test rows it would be TMKL, and the verdict worse
    assert verdict(found) == "better"
    assert each.against_best("DoRA", (PLAIN,)) == []


@pytest.mark.parametrize(
    ("better", "worse", "n", "word"),
    [(2, 0, 9, "better"), (0, 2, 9, "worse"), (1, 0, 9, "within noise"), (3, 2, 9, "mixed"), (6, 3, 21, "mixed"),
     (6, 2, 21, "better"), (3, 1, 21, "mixed"), (2, 1, 21, "within noise"), (1, 7, 15, "worse")],
)  # fmt: skip
def test_a_verdict_is_one_sided_only_where_the_other_side_has_no_more_than_chance(better, worse, n, word):
    """Of 9 true ties 2 on a side are rare, of 15 and 21 it takes 3."""
    ended = ["better"] * better + ["worse"] * worse + ["within noise"] * (n - better - worse)
    assert verdict([SimpleNamespace(verdict=each) for each in ended]) == word


def test_few_clear_differences_of_many_are_no_verdict():
    assert [needed(n) for n in (1, 2, 3, 9, 15, 18, 60)] == [1, 1, 2, 2, 3, 3, 5]
    for n in (3, 15, 60):  # the definition, summed the other way round
        less = sum(math.comb(n, k) * 0.025**k * 0.975 ** (n - k) for k in range(needed(n)))
        assert 1 - less < 0.05
        assert (
            1 - (less - math.comb(n, needed(n) - 1) * 0.025 ** (needed(n) - 1) * 0.975 ** (n - needed(n) + 1)) >= 0.05
        )


def test_a_seed_that_is_not_finished_is_left_out(tmp_path):
    entries = made("tmkl", {PLAIN: 0.3, MASKED: 0.1})
    part = [entry for entry in entries if (entry.seed, entry.arm) != (2, MASKED)]
    kept, left_out = whole_seeds(part)
    assert left_out == (2,)
    assert {entry.seed for entry in kept if entry.arm != "base"} == {0, 1}
    each = column(ledger(tmp_path, "tmkl", part), "tmkl")
    assert each is not None
    assert (each.seeds, each.left_out) == ([0, 1], (2,))
    written = write_pages(tmp_path, figures=False)
    assert tmp_path / "tmkl.md" in written
    text = (tmp_path / "tmkl.md").read_text()
    assert "Of seed 2 only a part was run: left out." in text
    assert "Fewer than 3 seeds" in text
    assert all(part in text for part in PARTS)


def test_pairs_are_compared_with_the_better_of_their_parts(tmp_path):
    """Two parts are of another recipe's ledger, which shares model, data and steps."""
    ledger(tmp_path, "tmkl", made("tmkl", {PLAIN: 0.3, MASKED: 0.2, "update decay": 0.25, "TMKL, JS": 0.01}))
    pairs = {"self-replay + update decay": 0.1, "TMKL + fisher": 0.2, "TMKL + projection": 0.24}
    arms = {REPLAY: 0.15, "fisher": 0.2, "projection": 0.25, **pairs}
    ledger(tmp_path, "combinations_shift", made("combinations_shift", arms))
    sheet = PAGES["combinations"](tmp_path, False)
    assert sheet is not None
    assert "Leads the best single method beyond chance: *self-replay + update decay*." in sheet.verdict
    assert "- **TMKL + fisher** against the better of its parts: **within noise**" in sheet.verdict
    assert "- **TMKL + projection** against the better of its parts: **worse**" in sheet.verdict
    assert "*second* is not run yet" in sheet.verdict
    assert "TMKL, JS" not in sheet.text()


def test_a_failed_run_counts_as_tried(tmp_path):
    entries = made("tmkl", {PLAIN: 0.3, MASKED: 0.1})
    broken = {"learning_rate": 9.0, "scale": 1.0}
    entries += [
        Entry("tmkl", PLAIN, broken, seed, split, {}, status="failed", error="diverged")
        for seed in (0, 1, 2)
        for split in ("validation", "test")
    ]
    each = column(ledger(tmp_path, "tmkl", entries), "tmkl")
    assert each is not None
    assert (each.failed, each.seeds) == (3, [0, 1, 2])


def test_what_one_setting_would_have_shown_is_read_at_the_end(tmp_path):
    found = []
    for entry in made("tmkl", {PLAIN: 0.3, MASKED: 0.1}):
        settings = dict(entry.settings)
        if entry.arm == PLAIN:
            settings["learning_rate"] = 4e-3
        if entry.arm == MASKED:
            settings = {"strength": 1.0, "scale": settings["scale"]}
        found.append(Entry(entry.experiment, entry.arm, settings, entry.seed, entry.split, entry.scores))
    each = column(ledger(tmp_path, "tmkl", found), "tmkl")
    assert each is not None
    assert len(ends(each, MASKED, 1.0)) == len(ends(each, PLAIN, None)) == 3
    assert "skills loss 67%" in unmatched(each)  # 1 - 0.1 / 0.3
    assert "task loss 0.100 against 0.100" in unmatched(each)


# ---- what is run and published ---------------------------------------------------------------------------------------


def test_items_are_published_where_an_interval_needs_them(tmp_path):
    entries = made("tmkl", {PLAIN: 0.3})
    itemised = [
        Entry(e.experiment, e.arm, e.settings, e.seed, e.split,
              {name: Score(s.value, items=(s.value - 0.1, s.value + 0.1)) for name, s in e.scores.items()},
              models={"base": {"name": "lab-aligned"}})
        for e in entries
    ]  # fmt: skip
    found = runs.lean([*itemised, itemised[0]], "tmkl")
    assert len(found) == len(entries)
    assert all(not entry.models for entry in found)
    for entry in found:
        detailed = {bool(score.items) for score in entry.scores.values()}
        assert detailed == ({True} if entry.split == "test" else {False})


@pytest.mark.slow
def test_a_comparison_is_run_and_goes_on_with_more_seeds(tmp_path, monkeypatch, prepared):
    """The recipe of tmkl with two arms and four steps."""
    plain = yaml.safe_load(recipe("tmkl").read_text())
    plain["stages"][0] |= {"max_steps": 4, "per_device_train_batch_size": 2}
    plain["compare"] |= {"seeds": [0, 1], "scales": [1.0], "checkpoints": [2]}
    plain["compare"]["arms"] = {PLAIN: {"learning_rate": 4e-3}, MASKED: {"methods": ["target_masked_kl"]}}
    (tmp_path / "tmkl.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.setattr(runs, "recipe", lambda name: tmp_path / f"{name}.yaml")
    for seeds in (1, 2, 1):
        runs.run(["tmkl"], prepared, 1, seeds)
        found = Ledger(prepared / "runs/results/tmkl/ledger.jsonl").entries("tmkl", status=None)
        assert {entry.seed for entry in found} == ({0} if seeds == 1 and len(found) < 12 else {0, 1})
    assert len(found) == 2 + 2 * 2 * 2 * 2  # the base; arms, seeds, checkpoint and end, splits
    runs.publish(prepared, tmp_path)
    each = column(tmp_path, "tmkl")
    assert each is not None
    assert each.arms == [PLAIN, MASKED]


# ---- the pages -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_the_one_that_its_ledgers_give(name):
    page = RESULTS / f"{name}.md"
    sheet = PAGES[name](RESULTS, False)
    if sheet is None:
        pytest.skip("not run yet: python -m studies.results run")
    text = page.read_text(encoding="utf-8")
    assert text == sheet.text()
    places = [text.index(part) for part in PARTS]
    assert places == sorted(places)
    assert text.index("## Verdict") < 1500  # in sight


def test_published_ledgers_are_small():
    for page in ("tmkl", "combinations", "default"):
        path = RESULTS / page / "ledger.jsonl"
        assert not path.is_file() or path.stat().st_size < 5e6


def test_every_score_has_its_direction():
    for study in STUDIES.values():
        assert {study.learn, *study.keep} <= {*KINDS}
        assert not any(KINDS[score].higher_is_better for score in (study.learn, *study.keep))


# ---- what other pages quote ------------------------------------------------------------------------------------------


def test_a_quotation_replaces_what_stood_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    quote(page, "new")
    quote(page, "newer")
    assert page.read_text() == f"before\n{START}\nnewer\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", START, f"{END}\n{START}", f"{START}\n{END}\n{START}\n{END}"])
def test_a_page_without_a_place_is_refused_and_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md has not one"):
        quote(page, "new")
    assert page.read_text() == text


def test_the_table_of_worries_counts_what_the_comparisons_say(tmp_path):
    """self-replay keeps more than plain LoRA in every score; fisher does exactly as well."""
    ledger(tmp_path, "combinations_shift", made("combinations_shift", {PLAIN: 0.3, REPLAY: 0.1, "fisher": 0.3}))
    text = evidence(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith(("| self-replay |", "| fisher |", "| plain LoRA |"))]
    assert [row.split(" | ")[0] for row in rows] == ["| fisher", "| self-replay", "| plain LoRA", "| fisher"]
    assert set(rows[0].strip("| ").split(" | ")[1:7]) == {"0 ✓ 0 ✗ 3 =", "–"}
    assert set(rows[1].strip("| ").split(" | ")[1:7]) == {"**3 ✓ 0 ✗ 0 =**", "–"}
    assert set(rows[2].strip("| ").split(" | ")[1:7]) == {"**0 ✓ 3 ✗ 0 =**", "–"}
    assert "not run yet: *lab, new knowledge*" in text


def test_what_plain_lora_improves_over_the_base_is_counted_by_itself(tmp_path):
    """Every score of `made` begins at 0: plain LoRA at -0.1 has gained, and who stays at 0 has kept nothing."""
    arms = {PLAIN: -0.1, REPLAY: 0.0}
    each = column(ledger(tmp_path, "combinations_shift", made("combinations_shift", arms)), "combinations_shift")
    assert each is not None
    found = each.pairs(REPLAY, PLAIN)
    assert found
    assert all(each.gained(one) for one in found)
    row = next(line for line in evidence(tmp_path).splitlines() if line.startswith("| self-replay |"))
    assert row.strip("| ").split(" | ")[1:-1] == ["–"] * 7
    assert row.strip("| ").split(" | ")[-1] == f"**0 ✓ {len(found)} ✗ 0 =**"


def test_readme_quotes_the_pages_and_choose_the_ledgers():
    """The pages themselves are checked above."""
    texts = {name: (RESULTS / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}
    sheets = {
        name: SimpleNamespace(
            title=text.splitlines()[0].removeprefix("# "),
            verdict=text.partition("## Verdict\n\n")[2].partition("\n\n## ")[0],
        )
        for name, text in texts.items()
    }
    for page, text in (("README.md", headlines(sheets, "docs/results")), ("docs/choose.md", evidence(RESULTS))):
        quoted = (RESULTS.parents[1] / page).read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
        assert quoted.strip() == text
