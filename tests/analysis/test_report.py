"""Figure, tables and page: drawn, complete, self-contained, and safe to show whatever the entries say."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from holdfast.analysis.figure import frontier_html_div, frontier_png
from holdfast.analysis.frontier import at_matched_learning, compare, matched_levels
from holdfast.analysis.joint_front import joint_front, joint_front_rows
from holdfast.analysis.panels import COLOURS, panels
from holdfast.analysis.report import costs, summaries, write_report
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.tables import comparison_rows, latex_table, markdown_table
from holdfast.drift.ledger import Entry

RETENTION = ["skills", "refusal", "story_perplexity"]


class Page(HTMLParser):
    """Collects the text, what would be loaded, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, html):
        super().__init__()
        self.text, self.loaded, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.loaded += re.findall(r"url\(([^)]*)\)", dict(attributes).get("style") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "@import" not in data
            assert "url(" not in data
        if not self.open or self.open[-1] != "script":
            self.text.append(data)


@pytest.fixture(scope="module")
def comparisons(demo):
    readings = at_matched_learning(demo, retention=RETENTION, levels=matched_levels(demo, "plain LoRA"))
    return compare(readings, "plain LoRA")


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory):
    failed = Entry("demo", "TMKL", {"strength": 30.0}, 0, "test", {}, {"train_seconds": 3.0}, "failed",
                   "<script>alert(1)</script>", environment={"python": "3.12 <b>"})  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    return write_report([*demo, failed], path, title="Kept & lost <i>", note="A note.").read_text(encoding="utf-8")


def test_the_figure_is_drawn_with_every_arm(demo, tmp_path):
    image = matplotlib.image.imread(frontier_png(demo, tmp_path / "frontier.png", levels=[0.5], title="Kept"))
    assert image.shape[1] > 1500
    for colour in COLOURS[:4]:
        wanted = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (np.abs(image[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 500


def test_the_figure_can_have_one_panel_or_many(demo, tmp_path):
    for retention in (RETENTION[:1], [*RETENTION, "skills"]):
        assert frontier_png(demo, tmp_path / "frontier.svg", retention, scaled=False).stat().st_size > 10_000


def test_the_mean_front_stays_where_every_seed_is(demo):
    for trace in panels(demo, ["skills"])[0].traces:
        assert len(trace.fronts) == 3
        assert max(trace.mean[0]) <= min(max(xs) for xs, _ in trace.fronts)
        assert all(0 <= y <= 1 for y in trace.mean[1])


def test_the_live_figure_carries_its_library_once(demo):
    assert len(frontier_html_div(demo)) > 3_000_000
    small = frontier_html_div(demo, include_plotlyjs=False)
    assert len(small) < 500_000
    assert "TMKL + prompt" in small


def test_no_button_of_the_live_figure_sends_data_away(demo):
    """By default plotly.js offers `sendChartToCloud`; its list of buttons must be ours."""
    div = frontier_html_div(demo, include_plotlyjs=False)
    assert '"modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]' in div
    assert '"showSendToCloud": false' in div


def test_tables_have_every_comparison(comparisons):
    rows = comparison_rows(comparisons)
    assert len(rows) == 27
    table = markdown_table(rows).splitlines()
    assert len(table) == 29
    assert len({line.count("|") for line in table}) == 1
    assert comparisons[0].verdict in table[2]
    assert latex_table(rows).count(r"\\") == 28
    assert markdown_table([]) == latex_table([]) == ""
    assert r"a \| b" in markdown_table([{"arm": "a | b"}])
    assert r"x\textasciicircum{}2 \textasciitilde{} $\times$0.33" in latex_table([{"arm": "x^2 ~ ×0.33"}])


def test_the_headline_says_what_the_comparisons_say(comparisons):
    told = {one.arm: one.sentence for one in summaries(comparisons)}
    assert list(told) == ["full KL", "TMKL", "TMKL + prompt"]
    assert told["TMKL + prompt"].startswith("is better on Old skills kept")
    quiet = [replace(one, low=-1.0, high=1.0) for one in comparisons]
    assert all(one.sentence.startswith("is within noise on") for one in summaries(quiet))
    missed = [replace(one, seeds=()) for one in comparisons]
    assert all("did not learn enough" in one.sentence for one in summaries(missed))
    turned = [replace(one, low=-one.high, high=-one.low, difference=-one.difference) for one in comparisons]
    assert {one.arm: one.sentence for one in summaries(turned)}["TMKL + prompt"].startswith("is worse on Old skills")


def test_what_is_learned_is_named_and_of_a_loss_the_lowest_level_is_the_farthest(demo):
    """Read as a loss, the numbers told are those where most is learned, and the level is called what it is."""

    def turned(entry):
        learned = entry.scores["adaptation"]
        loss = replace(learned, value=1 - learned.value, items=tuple(1 - item for item in learned.items))
        return replace(entry, scores={**entry.scores, "task_loss": loss})

    kinds = {"task_loss": ScoreKind("Task loss", False)}
    told = {}
    for score, title, levels in (
        ("adaptation", "New task learned", (0.5, 0.7)),
        ("task_loss", "Task loss", (0.5, 0.3)),
    ):
        entries = [turned(entry) for entry in demo]
        readings = at_matched_learning(entries, score, ["skills"], levels, kinds=kinds)
        comparisons = [replace(one, difference=0.2, low=0.1, high=0.3)
                       for one in compare(readings, "plain LoRA", kinds=kinds)]  # fmt: skip
        told[score] = {one.arm: one.sentence for one in summaries(comparisons)}["TMKL + prompt"]
        assert f" at {title} {levels[-1]:.2f}; at all 2 levels)" in told[score]
        assert [*comparison_rows(comparisons)[0]][1] == f"at {title}"
    assert told["adaptation"].split(" at ")[0] == told["task_loss"].split(" at ")[0]


def test_a_run_is_paid_once(demo):
    paid = {one.arm: one for one in costs(demo, "plain LoRA")}
    assert paid["plain LoRA"].runs == 6
    assert paid["TMKL"].seconds[0] == pytest.approx(28, abs=1)
    assert paid["TMKL"].ratio == pytest.approx(1.4, abs=0.1)


def test_the_page_is_whole_and_loads_nothing(page):
    read = Page(page)
    assert read.open == []
    assert [what for what in read.loaded if not what.startswith("data:")] == []


def test_the_page_has_the_numbers_and_the_evidence(page, comparisons):
    text = " ".join(" ".join(Page(page).text).split())
    for found in comparisons:
        assert found.numbers in text
        assert found.kind.show(found.arm.mean) in text
    for part in ("A note.", "settings tried", "1.40", "How to read this", "abc123", "All 195 entries", "(1 failed)"):
        assert part in text


def test_arms_have_the_colours_of_the_figure_whatever_the_baseline(demo, tmp_path):
    page = write_report(demo, tmp_path / "report.html", baseline="TMKL", interactive=False).read_text(encoding="utf-8")
    for arm, colour in zip(["plain LoRA", "full KL", "TMKL", "TMKL + prompt"], COLOURS, strict=False):
        assert (f'background: {colour}"></span><strong>{arm}<' in page) == (arm != "TMKL")


def test_the_page_shows_user_text_as_text(page):
    assert "<script>alert" not in page
    assert "failed: &lt;script&gt;alert(1)" in page
    assert "<h1>Kept &amp; lost &lt;i&gt;</h1>" in page


def test_an_arm_can_be_called_anything_and_one_without_a_finished_run_is_named(demo, tmp_path):
    """A name goes into markup, into the figure's script and into its labels."""
    evil = "</script><script>alert(2)</script>"
    named = [replace(entry, arm=evil) if entry.arm == "TMKL" else entry for entry in demo]
    named.append(replace(named[-1], arm="too fast", scores={}, status="failed", error="diverged", run=""))
    page = write_report(named, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(2)" in page
    assert "too fast</strong> has no finished run" in page
    assert page.count("<small>no finished run</small>") == 9
    assert "default-src 'none'" in page
    read = Page(page)
    assert read.open == []
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_has_the_settings_that_no_other_beats(page, demo):
    rows = joint_front_rows(joint_front(demo))
    assert len(rows) > 3
    text = " ".join(" ".join(Page(page).text).split())
    for row in rows:
        assert " ".join(" ".join(row.values()).split()) in text


def test_the_page_can_be_a_small_picture_and_can_have_one_arm(demo, tmp_path):
    alone = [entry for entry in demo if entry.arm in ("base", "plain LoRA")]
    page = write_report(alone, tmp_path / "report.html", interactive=False, along="skills").read_text(encoding="utf-8")
    assert len(page) < 600_000
    assert "There is one arm only" in page
    assert Page(page).open == []
