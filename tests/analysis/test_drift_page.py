"""The drift report in a real browser: nothing loaded, no errors, readable on a phone, in the dark, and by contrast.

The page itself is not touched: a second page shows it in frames of two widths and notes what it finds in its own DOM.
"""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from holdfast.analysis.budgets import Budget, Gate
from holdfast.analysis.drift_report import write_drift_report
from holdfast.analysis.gate import judge
from holdfast.drift.entry import Entry
from holdfast.drift.probe import Answer
from holdfast.drift.score import Score

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SCREENSHOT = Path(__file__).parents[2] / "scripts" / "drift_screenshot.py"
LONG = "a_very_long_name_without_any_place_to_break_" * 4
EVIL = "<script>document.title = 'hacked'</script><img src=http://evil.example/x onerror=\"document.title='hacked'\">"
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(BROWSERS)})")

WATCH = """<!doctype html><title>watch</title><body>
<iframe id="phone" src="PAGE" style="width: 375px; height: 2000px"></iframe>
<iframe id="desk" src="PAGE" style="width: 1100px; height: 2000px"></iframe>
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
  const view = frame.contentWindow, page = view.document, style = view.getComputedStyle(page.body);
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  let least = [99, ""];
  const texts = page.createTreeWalker(page.body, 4);
  for (let node; node = texts.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim()) continue;
    const its = view.getComputedStyle(element), drawn = element.namespaceURI.endsWith("svg") ? its.fill : its.color;
    const found = ratio(parts(drawn), paper(element, view));
    if (found < least[0]) least = [found, element.className + ": " + node.data.trim().slice(0, 40)];
  }
  const inside = [...page.querySelectorAll("body *")].filter(one => !one.closest(".wide"));
  return {
    inner: view.innerWidth, scroll: page.documentElement.scrollWidth, background: style.backgroundColor,
    title: page.title, contrast: least, text: page.body.textContent.length,
    wider: inside.filter(one => one.getBoundingClientRect().right > view.innerWidth + 1)
      .map(one => one.outerHTML.slice(0, 80)),
    active: page.querySelectorAll("script, img, iframe, object, embed, form").length,
    loaded: view.performance.getEntriesByType("resource").map(one => one.name),
    charts: [...page.querySelectorAll(".chart td.plot svg")].map(one => one.getBoundingClientRect().width),
    below: ["values", "plot"].map(name => page.querySelector(".chart tbody ." + name).getBoundingClientRect().top),
    headings: [...page.querySelectorAll("h1, h2, h3, h4")].map(one => Number(one.tagName[1])),
    captions: [...page.querySelectorAll("table")].every(one => one.caption && one.caption.textContent.trim()),
    labels: [...page.querySelectorAll("svg")].every(one => one.ariaHidden === "true" || one.ariaLabel),
  };
}
addEventListener("load", () => {
  const found = { errors };
  for (const id of ["phone", "desk"])
    try { found[id] = read(document.getElementById(id)); } catch (error) { errors.push(String(error)); }
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


def entries():
    random = np.random.default_rng(0)
    losses, labels = random.normal(2.0, 0.5, 90), ("fraud",) * 40 + ("illegal_activity",) * 40 + ("hate",) * 10
    for arm, hits, more, away in (("base", 88, 0.0, 0.0), ("plain LoRA", 50, 0.3, 0.2), ("TMKL", 86, 0.02, 0.01)):
        logs = losses + more * random.random(90)
        scores = {
            "refusal": Score(hits / 90, items=(1,) * hits + (0,) * (90 - hits), categories=labels, instrument=LONG),
            "over_refusal": Score(0.1, items=(1,) * 9 + (0,) * 81, categories=labels),
            "perplexity.wiki": Score(math.exp(math.fsum(logs) / 90), items=tuple(logs)),
            "exact_answer.sums": Score((100 - hits) / 90, items=(1,) * (100 - hits) + (0,) * (hits - 10)),
            "first_tokens_kl": Score(away, items=(away,) * 90),
            LONG: Score(1.0 + more, n=50, standard_error=0.01),
        }
        yield Entry(
            "demo", arm, {}, 0, "test", scores, models={"base": {"name": LONG, "digest": "1f" * 32}}, command=LONG * 3,
            not_measured={"lm_eval": LONG},
        )  # fmt: skip


def answers(verdicts, text):
    return [
        Answer(
            f"{k}-{LONG}", EVIL + LONG, text + LONG * 3, verdict, "refuse" if k < 2 else "comply", "fraud", LONG, "why"
        )
        for k, verdict in enumerate(verdicts)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base, *tuned = entries()
    verdicts = ("refusal", "refusal", "compliance", "right", "wrong", "refusal")
    after = ("compliance", "broken", "refusal", "wrong", "right", "refusal")
    budgets = Budget("refusal", "fall", 0.02), Budget("perplexity.wiki", "rise", 0.05, relative=True)
    return write_drift_report(
        tmp_path_factory.mktemp("page") / "drift.html", base, tuned, notes={"refusal": LONG}, title=f"Release {EVIL}",
        answers={"base": answers(verdicts, "Yes. "), "plain LoRA": answers(after, EVIL), "TMKL": []},
        judgement=judge(Gate(budgets), base.scores, tuned[0].scores), reduction_against="plain LoRA",
    )  # fmt: skip


def look(page, dark):
    """What the browser found, and what it complained of."""
    watch = page.with_name(f"watch-{dark}.html")
    watch.write_text(WATCH.replace("PAGE", page.as_uri()), encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1600,2200",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={page.parent}/profile-{dark}", "--dump-dom", watch.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def light(page):
    return look(page, dark=False)


@pytest.fixture(scope="module")
def dark(page):
    return look(page, dark=True)


def test_no_errors_and_nothing_loaded_or_run(page, light, dark):
    for found, console in (light, dark):
        assert found["errors"] == []
        assert console == []
        for frame in (found["phone"], found["desk"]):
            assert frame["text"] > 5000
            assert (frame["active"], frame["loaded"]) == (0, [])
            assert frame["title"] == f"Release {EVIL}"
    linked = re.findall(
        r"""<[a-z][^<>]*\s(?:src|href|srcset|action)=["']?([^"'\s>]*)""", page.read_text(encoding="utf-8")
    )
    assert set(linked) == {"#limits"}


def test_a_phone_shows_all_of_it_without_scrolling_sideways(light):
    frame = light[0]["phone"]
    assert frame["inner"] == 375
    assert frame["scroll"] <= 375
    assert frame["wider"] == []
    assert min(frame["charts"]) > 300  # a chart is as wide as the screen, below its score


def test_a_desk_shows_rows(light):
    frame = light[0]["desk"]
    assert frame["scroll"] <= frame["inner"] == 1100
    assert frame["wider"] == []
    phone = light[0]["phone"]["below"]
    assert abs(frame["below"][0] - frame["below"][1]) < abs(phone[0] - phone[1])


def test_dark_is_dark(light, dark):
    assert light[0]["desk"]["background"] == "rgb(255, 255, 255)"
    assert dark[0]["desk"]["background"] == "rgb(20, 23, 26)"


def test_all_text_has_contrast(light, dark):
    for found, _ in (light, dark):
        for frame in (found["phone"], found["desk"]):
            ratio, where = frame["contrast"]
            assert 4.5 <= ratio < 21.1, where


def test_headings_captions_and_labels(light):
    frame = light[0]["desk"]
    levels = frame["headings"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert frame["captions"]
    assert frame["labels"]


@pytest.mark.parametrize(("width", "dark"), [(900, True), (375, False)])
def test_a_picture_of_it(page, tmp_path, width, dark):
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    command = [sys.executable, str(SCREENSHOT), str(page), str(picture), "--width", str(width), "--height", "700"]
    subprocess.run([*command, *["--dark"] * dark], check=True, capture_output=True, timeout=90)
    pixels = imread(picture)
    assert pixels.shape[0] == 1400
    corner = [round(255 * part) for part in pixels[4, 4, :3]]
    assert corner == ([20, 23, 26] if dark else [255, 255, 255])
    assert pixels[:, : 2 * width].std() > 0.05


def test_a_picture_of_nothing_is_refused(tmp_path):
    command = [sys.executable, str(SCREENSHOT), str(tmp_path / "none.html"), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "There is no page" in done.stderr
