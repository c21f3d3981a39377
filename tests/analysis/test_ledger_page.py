"""The page over ledgers: its numbers are the analysis's own, and a real browser shows it whole, quietly and narrow.

The page itself is not touched: a second page shows it in frames of two widths, types into its filter, and notes what it
finds in its own DOM.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from holdfast.analysis.frontier import at_matched_learning, compare, matched_levels
from holdfast.analysis.ledger_page import MARK, PageError, write_ledger_page
from holdfast.analysis.ledger_page_compare import differences, side_by_side
from holdfast.analysis.ledger_page_drift import drift_of, is_drift
from holdfast.analysis.ledger_page_fits import fits_of
from holdfast.analysis.ledger_page_frontiers import baseline_of, why_none
from holdfast.analysis.ledger_page_read import experiments_of, read_ledgers
from holdfast.analysis.ledger_page_runs import runs_of, table_of
from holdfast.analysis.ledger_page_scores import Asked, asked_for, choose
from holdfast.analysis.ledger_page_sides import sides_of
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.entry import Entry
from holdfast.drift.score import Score
from scipy import stats

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LONG = "a_very_long_name_without_any_place_to_break_" * 4
EVIL = "<script>document.title = 'hacked'</script><img src=http://evil.example/x onerror=\"document.title='hacked'\">"
BASE = {"base": {"name": "lab", "sha256": "1f" * 32}}


def save(folder, entries, name="ledger.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(entry.to_json() + "\n" for entry in entries))
    return folder / name


def only(entries, name="runs"):
    """The only experiment of a ledger with these entries."""
    (found,) = experiments_of({name: (Path(name), list(entries))})
    return found


def entry(arm, value, seed=0, split="test", settings=None, score="skills", **rest):
    made = value if isinstance(value, Score) else Score(value)
    return Entry("e", arm, settings or {}, seed, split, {score: made}, environment={}, **rest)


def drift_entries():
    for arm, hits in (("base", 88), ("plain LoRA", 40)):
        scores = {"refusal": Score(hits / 90, items=(1,) * hits + (0,) * (90 - hits)), "alone_" + arm[:2]: Score(1.0)}
        yield Entry("drift of lab", arm, {"suite": "lab"}, 0, "test", scores, models=BASE, command=f"holdfast {LONG}",
                    not_measured={"lm_eval": LONG}, environment={"python": "3.11"})  # fmt: skip


def law_entries(amounts=(30, 300, 3000), seeds=(0, 1, 2)):
    yield Entry("law", "base", {}, 0, "test", {"text_nll": Score(2.0)}, environment={})
    for steps in amounts:
        for seed in seeds:
            loss = (2 + 0.01 * steps**0.5) * (1 + 0.001 * seed)
            settings = {"steps": steps, "learning_rate": 1e-3}
            yield Entry("law", "plain LoRA", settings, seed, "test", {"text_nll": Score(loss)}, environment={})


@pytest.fixture(scope="module")
def sweep(simulate):
    """Three arms, three seeds, and a failed run."""
    arms = {"plain LoRA": 0.55, "TMKL": 0.40, "TMKL + prompt": 0.12}
    entries = simulate(np.random.default_rng(0), arms, scales=(0.5, 1.0), items=24)
    failed = Entry("demo", "TMKL", {"strength": 30.0}, 7, "test", {}, {"train_seconds": 3.0}, "failed", EVIL)
    return [*entries, failed]


@pytest.fixture(scope="module")
def runs(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save(folder / "sweep", sweep)
    save(folder / "drift" / "deep", drift_entries())
    save(folder / "law", law_entries())
    save(folder / "wide", [Entry(LONG, LONG, {LONG: LONG}, 0, "all", {LONG: Score(0.5)}, environment={})])
    return folder


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    said = []
    page = write_ledger_page(
        [runs], tmp_path_factory.mktemp("page") / "report.html", compare=("plain LoRA", "TMKL"),
        title=f"Release {EVIL}", tick=lambda what, total: said.append((what, total)),
    )  # fmt: skip
    assert len(said) == said[0][1] == 8
    return page


@pytest.fixture(scope="module")
def text(written):
    return written.path.read_text(encoding="utf-8")


# --- what the page says ----------------------------------------------------------------------------------------------


def test_every_part_is_there_with_the_numbers_of_the_analysis(text, written, sweep):
    own = [one for one in sweep if one.status == "done"]
    retention = ["skills", "refusal", "story_perplexity"]
    readings = at_matched_learning(own, retention=retention, levels=matched_levels(own, "plain LoRA"))
    for one in compare(readings, "plain LoRA"):
        assert one.numbers in text
    for part in ("Against plain LoRA at equal learning", "1 of 1 score drifted beyond noise", "Settings to reproduce",
                 "−53.3 points", "not measured: lm_eval", "At ten times the data", f"holdfast {LONG}"):  # fmt: skip
        assert part in text, part
    assert written.sentences[0] == "30 runs of 4 arms in 4 experiments, from 4 ledgers, with 4 seeds; 1 failed."
    assert text.count("plotly.js v") == 1


def test_user_text_is_shown_as_text(text):
    assert "<script>document" not in text
    assert "&lt;script&gt;document.title" in text
    assert MARK in text[:400]


def test_the_runs_table_counts_and_averages(sweep):
    table = table_of(only(sweep), {})
    rows = {row.arm: row for row in table.rows}
    assert list(rows) == ["base", "plain LoRA", "TMKL", "TMKL + prompt"]
    assert (rows["TMKL"].settings, rows["TMKL"].points, rows["TMKL"].runs, rows["TMKL"].failed) == (3, 5, 7, 1)
    means = {}
    for one in sweep:
        if (one.arm, one.split) == ("plain LoRA", "test") and one.settings["scale"] == 1.0:
            means.setdefault(one.settings["strength"], []).append(one.scores["skills"].value)
    low, high = sorted(sum(values) / len(values) for values in means.values())
    text, middle = rows["plain LoRA"].scores["skills"]
    assert text == f"{low:.2f} to {high:.2f}"
    assert middle == pytest.approx((low + high) / 2, abs=1e-12)
    (failure,) = table.failures
    assert (failure.arm, failure.error, failure.of) == ("TMKL", EVIL, ("strength 30.0, seed 7",))


def test_a_run_that_failed_and_was_repeated_has_not_failed():
    failed = replace(entry("a", 0.5, split="test"), scores={}, status="failed", error="out of memory")
    table = table_of(only([failed, entry("a", 0.5)]), {})
    assert table.rows[0].failed == 0
    assert table.failures == ()


def test_every_run_is_listed_once_with_its_scales(sweep):
    experiment = only(sweep)
    machines = {json.dumps(one.environment, sort_keys=True): "M1" for one in sweep}
    listed = runs_of(experiment, machines)
    assert len(listed) == 1 + 18 + 1
    assert {one.posthoc for one in listed if one.arm == "TMKL + prompt"} == {"scale 0.5, 1.0"}
    assert {one.splits for one in listed if not one.failed} == {"validation, test"}
    assert "scale" not in listed[1].settings


# --- what is learned and what is kept --------------------------------------------------------------------------------


def test_known_scores_are_found_and_unknown_ones_asked_for(sweep):
    chosen = choose(only(sweep), Asked())
    assert (chosen.learned, chosen.kept) == ("adaptation", ("skills", "refusal", "story_perplexity"))
    why = choose(only([entry("a", 0.5, score="task")]), Asked())
    assert "--learn" in why
    assert "task" in why


def test_the_direction_of_a_score_is_never_guessed():
    experiments = [only([Entry("e", "a", {}, 0, "test", {"task": Score(1), "text_loss": Score(1)}, environment={})])]
    faults = []
    asked_for(["task"], ["nope", "text_loss=up"], experiments, faults)
    assert len(faults) == 3
    assert "task=higher or task=lower" in faults[0]
    assert "there are task, text_loss" in faults[1]
    faults = []
    asked = asked_for(["task=higher"], ["text_loss"], experiments, faults)
    assert faults == []
    assert (asked.kinds["task"].higher_is_better, asked.kinds["text_loss"].higher_is_better) == (True, False)


def test_a_loss_can_be_learned(sweep, tmp_path):
    """Adaptation as a loss gives the same verdicts as adaptation: the page reads it the other way round."""

    def turned(one):
        scores = dict(one.scores)
        learned = scores.pop("adaptation")
        loss = replace(learned, value=1 - learned.value, items=tuple(1 - item for item in learned.items))
        return replace(one, scores={**scores, "task_loss": loss})

    save(tmp_path / "as_it_is", sweep)
    save(tmp_path / "turned", [turned(one) if one.status == "done" else one for one in sweep])
    pages = [
        write_ledger_page([tmp_path / name], tmp_path / f"{name}.html", learn=learn, interactive=False)
        for name, learn in (("as_it_is", ()), ("turned", ("task_loss",)))
    ]
    assert pages[0].verdicts[0].sentence == pages[1].verdicts[0].sentence
    assert "better in some score" in pages[0].verdicts[0].sentence


def test_why_there_is_no_frontier(sweep):
    assert why_none(sweep) == ""
    assert why_none([entry("base", 1.0)]) == "no arm but the base"
    assert "measured on test only" in why_none([entry("a", 1.0)])
    assert baseline_of(only(sweep), None) == ("plain LoRA", "")
    assert baseline_of(only(sweep), "TMKL") == ("TMKL", "")
    first, told = baseline_of(only([entry("a", 0.1), entry("b", 0.1)]), None)
    assert first == "a"
    assert "--baseline" in told


# --- drift and fits --------------------------------------------------------------------------------------------------


def test_drift_is_held_against_its_own_base():
    base = [
        entry("base", 0.9, models={"base": {"sha256": one}}, settings={"suite": one}) for one in ("old", "new", "other")
    ]
    tuned = [entry("a", 0.5, settings={"suite": "old", "step": step}, models={"base": {"sha256": "old"}})
             for step in (100, 20)]  # fmt: skip
    lost = entry("b", 0.5, models={"base": {"sha256": "unknown"}})
    experiment = only([*base, *tuned, lost])
    assert is_drift(experiment)
    found, without = drift_of(experiment, {})
    assert [one.name for one in found] == ["a"]
    assert found[0].look == "step 100, the last of 2 looks"
    assert found[0].rows["skills"].change.value == pytest.approx(-0.4)
    assert without == ["b: its base was not measured on split test"]


def test_a_sweep_whose_entries_name_their_base_is_a_sweep(sweep):
    assert not is_drift(only([replace(one, models=BASE) for one in sweep]))
    assert is_drift(only(drift_entries()))


def test_a_law_is_fitted_where_there_are_points():
    found = fits_of(only(law_entries()), Asked(), draws=20)
    assert (found.data, found.size, found.score) == ("steps", "", "text_nll")
    assert "β 0.5" in found.fitted[0].parameters
    assert found.refused == ()
    assert "α cannot be known" in " ".join(found.doubts)
    assert found.fitted[0].doubts == ()
    few = fits_of(only(law_entries(amounts=(30, 300))), Asked())
    ((why, arms),) = few.refused
    assert (few.fitted, arms) == ((), "plain LoRA")
    assert why.endswith("there are: 30, 300")


def test_runs_that_differ_otherwise_are_not_fitted_together():
    mixed = [
        replace(
            one, settings={**one.settings, "learning_rate": 1e-3 if one.settings.get("steps") == 30 else 2e-3}, run=""
        )
        for one in law_entries()
    ]
    ((why, _),) = fits_of(only(mixed), Asked()).refused
    assert "all else equal, and there are: 300, 3000" in why


def test_less_than_a_decade_is_not_fitted_unasked():
    ((why, _),) = fits_of(only(law_entries(amounts=(30, 60, 120))), Asked()).refused
    assert "(30, 60, 120) span 0.6 decades" in why
    assert "holdfast fit" in why


def test_one_amount_of_data_is_no_law():
    assert "one amount of data" in fits_of(only(law_entries(amounts=(30,))), Asked())


# --- two side by side ------------------------------------------------------------------------------------------------


def test_paired_differences_against_a_slow_computation():
    random = np.random.default_rng(1)
    a, b = random.normal(0.5, 0.1, (2, 4, 3))  # seeds, settings
    pairs = [
        tuple(entry("x", float(side[seed, k]), seed, settings={"k": k}) for side in (a, b))
        for seed in range(4) for k in range(3)
    ]  # fmt: skip
    (found,), apart = differences(pairs, {"skills": ScoreKind("Skills", True, ".9f")})
    by_seed = (b - a).mean(axis=1)
    half = stats.t.ppf(0.975, 3) * by_seed.std(ddof=1) / 2
    assert apart == []
    assert float(found.difference.replace("−", "-")) == pytest.approx(by_seed.mean(), abs=1e-8)
    low, high = (float(end) for end in found.interval.replace("−", "-").strip("[]").split(","))
    assert (low, high) == pytest.approx((by_seed.mean() - half, by_seed.mean() + half), abs=1e-8)
    assert found.verdict == ("within noise" if low < 0 < high else "better" if low > 0 else "worse")
    assert found.pairs == 12


def test_one_pair_has_the_interval_of_its_items():
    a, b = (Score(hits / 100, items=(1,) * hits + (0,) * (100 - hits)) for hits in (90, 60))
    ((found,), _) = differences([(entry("x", a), entry("x", b))], {})
    assert found.verdict == "worse"
    assert found.interval.startswith("[−0.")
    ((found,), _) = differences([(entry("x", 0.9), entry("x", 0.6))], {})
    assert (found.interval, found.verdict) == ("no interval", "not known")
    ((found,), _) = differences([(entry("x", a), entry("x", a))], {})
    assert found.verdict == "identical"


def test_scores_of_two_instruments_are_not_compared():
    pair = entry("x", Score(0.5, instrument="one")), entry("x", Score(0.6, instrument="two"))
    found, (why,) = differences([pair], {})
    assert found == []
    assert "two instruments" in why


def test_two_arms_of_a_sweep_are_compared_at_equal_learning(sweep):
    experiment = only(sweep)
    chosen = {experiment.title: ("adaptation", ["skills"])}
    (side,), why = side_by_side("plain LoRA", "TMKL + prompt", [experiment], chosen, {})
    own = [one for one in sweep if one.arm in ("base", "plain LoRA", "TMKL + prompt")]
    readings = at_matched_learning(own, retention=["skills"], levels=matched_levels(own, "plain LoRA"))
    assert [row["difference"] for row in side.matched] == [one.numbers for one in compare(readings, "plain LoRA")]
    assert why == []


def test_what_cannot_be_paired_says_why():
    a = [entry("a", 0.5, seed, settings={"rate": 1, "k": k}) for seed in (0, 1) for k in (0, 1)]
    b = [entry("b", 0.5, seed, settings={"rate": 2, "k": k}) for seed in (0, 1) for k in (0, 1)]
    (side,), _ = side_by_side("a", "b", [only([*a, *b])], {}, {})
    assert "no setting and seed was run for both (2 settings, seeds [0, 1]; 2 settings, seeds [0, 1])" in side.why[0]
    one = [entry("a", 0.5, seed, settings={"rate": 1}) for seed in (0, 1)]
    other = [entry("b", 0.6, seed, settings={"rate": 2}) for seed in (1, 2)]
    (side,), _ = side_by_side("a", "b", [only([*one, *other])], {}, {})
    assert side.how == "by seed; the settings differ: rate 1 against rate 2"
    assert side.differences[0].pairs == 1
    apart = experiments_of(
        {"x": (Path("x"), [entry("a", 0.5)]), "y": (Path("y"), [replace(entry("b", 0.5), experiment="f")])}
    )
    sides, (why,) = side_by_side("a", "b", apart, {}, {})
    assert sides == []
    assert why == "No experiment has both arms: a is in e; b is in f."


def test_two_ledgers_of_one_run_each_are_compared(tmp_path):
    paths = [
        save(tmp_path / name, [entry("base", 0.9), entry(name, value)]) for name, value in (("a", 0.5), ("b", 0.6))
    ]
    read = read_ledgers(paths)
    sides, why = side_by_side(*map(str, paths), read.experiments, {}, {})
    assert [(one.title, one.differences[0].difference) for one in sides] == [
        ("e: base", "+0.00"),
        ("e: a and b", "+0.10"),
    ]
    assert [one.differences[0].verdict for one in sides] == ["identical", "not known"]
    assert why == []


def test_names_that_mean_nothing_here():
    experiment, faults = only([entry("a", 0.5), entry("b", 0.5)]), []
    sides_of("a", "bb", [experiment], faults)
    assert len(faults) == 1
    assert "Did you mean 'b'? The arms: a, b; the experiments: e; the ledgers: runs" in faults[0]
    sides_of("a", "runs", [experiment], faults := [])
    assert faults == ["--compare: a is an arm and runs is a ledger: name two of one kind"]
    sides_of("a", "a", [experiment], faults := [])
    assert faults == ["--compare a a: these are the same"]


# --- what is read and written ----------------------------------------------------------------------------------------


def test_all_faults_at_once(tmp_path):
    save(tmp_path / "empty", [])
    (tmp_path / "folder").mkdir()
    save(tmp_path / "other", [entry("a", 0.5)], "runs.jsonl")
    broken = save(tmp_path / "broken", [entry("a", 0.5)])
    broken.write_text("{}\nnot json\n" + broken.read_text())
    asked = ["nowhere", "empty/ledger.jsonl", "folder", "other", "broken"]
    with pytest.raises(PageError) as told:
        write_ledger_page([tmp_path / name for name in asked], tmp_path)
    assert len(told.value.faults) == 7  # the broken one has two, the output is a folder
    for part in ("is a folder: name a file", "there is no file or folder", "is empty", "holds no ledger.jsonl",
                 "it holds runs.jsonl", "line 1", "line 2"):  # fmt: skip
        assert part in str(told.value), part


def test_an_empty_ledger_beside_others_is_named(tmp_path):
    save(tmp_path / "a", [entry("a", 0.5)])
    save(tmp_path / "b", [])
    path = save(tmp_path / "c", [entry("c", 0.5)])
    path.write_text(path.read_text() + '{"torn')
    read = read_ledgers([tmp_path, tmp_path / "a" / "ledger.jsonl"])
    assert read.ledgers == ("a", "c")
    assert [one.title for one in read.experiments] == ["e · a", "e · c"]
    assert len(read.notes) == 2
    assert any("unfinished line" in note for note in read.notes)


def test_only_a_page_of_ours_is_written_over(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("my notes")
    with pytest.raises(PageError, match="no page of holdfast report"):
        write_ledger_page([runs / "wide"], page)
    assert page.read_text() == "my notes"
    for force in (True, False):
        write_ledger_page([runs / "wide"], page, interactive=False, force=force, title=f"forced {force}")
        assert f"forced {force}" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    ledger = shutil.copy(runs / "wide" / "ledger.jsonl", tmp_path)
    with pytest.raises(PageError, match="no page of holdfast report"):
        write_ledger_page([ledger], ledger, force=True)


# --- in a browser ----------------------------------------------------------------------------------------------------

WATCH = """<!doctype html><title>watch</title><body>
<iframe id="phone" src="PAGE" style="width: 390px; height: 2000px"></iframe>
<iframe id="desk" src="PAGE" style="width: 1280px; height: 2000px"></iframe>
<script>
const errors = []; addEventListener("error", event => errors.push(event.message));
const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
function luminance([r, g, b]) {
  const f = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
}
function ratio(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function paper(element, view) {
  for (; element; element = element.parentElement) {
    const colour = parts(view.getComputedStyle(element).backgroundColor);
    if (colour.length && colour[3] !== 0) return colour;
  }
  return [255, 255, 255];
}
function read(frame) {
  const view = frame.contentWindow, page = view.document;
  view.addEventListener("error", event => errors.push(event.message));
  const shown = () => [...page.querySelectorAll("#runs tbody tr")].filter(row => !row.hidden);
  const rows = () => shown().map(row => row.dataset.arm);
  const all = rows(), box = page.querySelector("#runs input");
  const type = text => { box.value = text; box.dispatchEvent(new view.Event("input")); };
  type("tmkl PROMPT"); const few = rows(), said = page.querySelector("#runs output").textContent;
  const folds = [...page.querySelectorAll("#runs details")].filter(one => !one.hidden).length;
  type("nothing like it"); const none = rows();
  type(""); const again = rows();
  const place = head => head.textContent === "skills";
  const table = [...page.querySelectorAll("#runs table")].find(one => [...one.tHead.rows[0].cells].some(place));
  const heads = [...table.tHead.rows[0].cells], column = heads.findIndex(place);
  const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].dataset.sort);
  heads[column].querySelector("button").click(); const up = values();
  heads[column].querySelector("button").click(); const down = values();
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  let least = [99, ""];
  const texts = page.createTreeWalker(page.body, 4);
  for (let node; node = texts.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, noscript, .live")) continue;
    const found = ratio(parts(view.getComputedStyle(element).color), paper(element, view));
    if (found < least[0]) least = [found, element.className + ": " + node.data.trim().slice(0, 40)];
  }
  const inside = [...page.querySelectorAll("body *")].filter(one => !one.closest(".wide"));
  return {
    inner: view.innerWidth, scroll: page.documentElement.scrollWidth, title: page.title, contrast: least,
    background: view.getComputedStyle(page.body).backgroundColor,
    wider: inside.filter(one => one.getBoundingClientRect().right > view.innerWidth + 1)
      .map(one => one.outerHTML.slice(0, 80)),
    loaded: view.performance.getEntriesByType("resource").map(one => one.name).filter(one => !one.startsWith("data:")),
    drawn: page.querySelectorAll(".js-plotly-plot .main-svg .scatterlayer path").length,
    pictures: [...page.images].map(one => [one.naturalWidth, one.getBoundingClientRect().width]),
    headings: [...page.querySelectorAll("h1, h2, h3, h4")].map(one => Number(one.tagName[1])),
    links: [...page.querySelectorAll("a[href^='#']")].every(one => page.getElementById(one.hash.slice(1))),
    all, few, said, folds, none, again, up, down,
  };
}
addEventListener("load", () => {
  const found = { errors };
  for (const id of ["phone", "desk"])
    try { found[id] = read(document.getElementById(id)); } catch (error) { errors.push(String(error)); }
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


@pytest.fixture(scope="module", params=["light", "dark"])
def looked(request, written):
    """What the browser found, and what it complained of."""
    if BROWSER is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(BROWSERS)})")
    page = written.path
    watch = page.with_name(f"watch-{request.param}.html")
    watch.write_text(WATCH.replace("PAGE", page.as_uri()), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1800,2200",
            f"--blink-settings=preferredColorScheme={0 if request.param == 'dark' else 1}",
            f"--user-data-dir={page.parent}/profile-{request.param}", "--dump-dom", watch.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return request.param, json.loads(html.unescape(found[1])), console


def test_no_errors_and_nothing_loaded(looked, text):
    theme, found, console = looked
    assert found["errors"] == []
    assert console == []
    for frame in (found["phone"], found["desk"]):
        assert frame["loaded"] == []
        assert frame["title"] == f"Release {EVIL}"
        assert frame["drawn"] > 50
        assert frame["links"]
        assert frame["background"] == ("rgb(20, 23, 26)" if theme == "dark" else "rgb(255, 255, 255)")
    outside = re.sub(r"<script>.*?</script>|<script type=.*?</script>", "", text, flags=re.DOTALL)
    linked = re.findall(r"""<[a-z][^<>]*\s(?:src|href|srcset|action)=["']?([^"'\s>]*)""", outside)
    assert {link[:1] for link in linked if not link.startswith("data:image/png;base64,")} == {"#"}


def test_no_width_makes_the_page_scroll_sideways(looked):
    for name, width in (("phone", 390), ("desk", 1280)):
        frame = looked[1][name]
        assert frame["inner"] == width
        assert frame["scroll"] <= width
        assert frame["wider"] == []
        assert all(natural > 100 and shown <= width for natural, shown in frame["pictures"])


def test_typing_filters_and_a_click_sorts(looked):
    frame = looked[1]["desk"]
    assert len(frame["all"]) == 9
    assert frame["few"] == ["TMKL + prompt"]
    assert (frame["said"], frame["folds"]) == ("1 of 9 rows", 1)
    assert frame["none"] == []
    assert frame["again"] == frame["all"]
    values = [float(value) for value in frame["up"]]
    assert len(set(values)) > 2
    assert values == sorted(values)
    assert frame["down"] == frame["up"][::-1]


def test_all_text_has_contrast_and_headings_are_in_order(looked):
    for frame in (looked[1]["phone"], looked[1]["desk"]):
        ratio, where = frame["contrast"]
        assert 4.5 <= ratio < 21.1, where
        assert frame["headings"][0] == 1
        assert all(after - before <= 1 for before, after in pairwise(frame["headings"]))
