"""Every benchmark at its smallest: it runs, writes nothing, and measures what the goals ask for."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.goals import ROWS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script as if it were run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(autouse=True)
def results():
    """What is measured here is written nowhere."""
    before = {path: path.read_bytes() for path in (FOLDER / "results").glob("*")}
    yield
    assert {path: path.read_bytes() for path in (FOLDER / "results").glob("*")} == before


def asked_of(name, *rows):
    """The numbers that the table asks of a script, at any size."""
    every = [m for row in ROWS if row.script == name and (not rows or row.name in rows) for m in row.measures]
    return [replace(m, tokens="", shape="") for m in every]


def fitting(measure, table):
    full = [{"dtype": "", "shape": "", "tokens": "", "peer": ""} | {k: str(v) for k, v in row.items()} for row in table]
    return measure.found(full)


def test_the_losses_are_timed_against_all_peers(script):
    divergence = script("divergence")
    divergence.correctness_gate(divergence.TINY)
    table = divergence.timings(divergence.TINY, 16, "float32", divergence.EVERY, 2)
    table += divergence.timings(divergence.TINY, 16, "bfloat16", divergence.CORE, 2)
    for measure in asked_of("divergence", "B1", "B2", "B4", "B5", "B6", "B7", "B8", "B9"):
        if "peak" not in measure.metric:
            assert fitting(measure, table), measure
    by_name = {(row["dtype"], row["variant"], row.get("peer"), row["metric"]): row for row in table}
    one = by_name["float32", divergence.BEST, divergence.PLAIN, "cpu seconds, ratio"]
    seconds = [by_name["float32", v, None, "cpu seconds"]["value"] for v in (divergence.BEST, divergence.PLAIN)]
    assert one["value"] == seconds[0] / seconds[1]
    assert one["low"] <= one["value"] <= one["high"]
    assert one["rounds"] == 2
    for peer in divergence.MISSING:
        assert by_name["float32", divergence.FULL, peer, "cpu seconds, ratio"]["value"] == "not installed"


def test_a_variant_that_is_wrong_stops_the_run(script, monkeypatch):
    divergence, peers = script("divergence"), script("peers")
    right = peers.VARIANTS[peers.CACHED]
    wrong = right._replace(run=lambda case: 1.001 * right.run(case))
    monkeypatch.setitem(peers.VARIANTS, peers.CACHED, wrong)
    with pytest.raises(SystemExit, match="holdfast: masked KL, base cached disagrees with autograd: masked KL"):
        divergence.correctness_gate(divergence.TINY)


def test_the_errors_are_those_of_float64(script):
    accuracy = script("accuracy")
    table = accuracy.small_kl("64/1000", 16) + accuracy.confident_target(256, 16)
    for measure in asked_of("divergence", "B15", "B16"):
        row = fitting(measure, table)
        assert float(row["value"]) <= measure.at_most
        assert float(fitting(replace(measure, variant=measure.rival), table)["value"]) > 10 * measure.at_most


def test_the_growth_of_memory_is_a_share_of_what_must_grow(script, monkeypatch):
    peaks, peers = script("peaks"), script("peers")
    known = {(peers.PLAIN, 2048): 400.0, (peers.BEST, 1024): 10.0, (peers.BEST, 2048): 10.5}
    monkeypatch.setattr(peaks, "peak", lambda name, shape, tokens, dtype: known[name, tokens])
    table = peaks.memory("64/1000", "float32", list(known), [(peers.BEST, peers.PLAIN)])
    for measure in asked_of("divergence", "B3"):
        assert fitting(measure, table), measure
    values = {row["metric"]: row["value"] for row in table if row["variant"] == peers.BEST}
    assert values[peaks.GROWTH] == 2.0  # half a MiB, where 1024 x 64 float32 numbers take a quarter
    assert values["peak MiB, ratio"] == 10.5 / 400


def test_peaks_are_measured_in_a_process_of_its_own(script):
    peers, peaks = script("peers"), script("peaks")
    found = peaks.peak("autograd: CE", "64/1000", 2048, "float32")  # holds logits three times: 8 MiB each
    assert 15 <= found <= 40
    assert [name for name in peers.MISSING if name in peers.VARIANTS] == peers.MISSING


def test_heights_of_chunks_are_swept(script, monkeypatch, capsys):
    divergence = script("divergence")
    monkeypatch.setattr(sys, "argv", ["divergence.py", "--quick", "--chunk-rows", "8", "16"])
    divergence.main()
    told = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        for rows in (8, 16):
            assert f"{dtype} · 64/1000 · 16 · {divergence.BEST}, chunks of {rows} · {divergence.BOUND} · cpu" in told
    monkeypatch.setattr(sys, "argv", ["divergence.py", "--chunk-rows", "0"])
    with pytest.raises(SystemExit):
        divergence.main()
    assert "a chunk has at least one row, got 0" in capsys.readouterr().err


def test_a_flat_projection_is_timed_against_loops_and_adamw(script):
    table = script("projection_parts").flat(44_800, 8, 1)
    for measure in asked_of("projection"):
        assert fitting(measure, table), measure


def test_loops_over_tensors_remove_what_the_projection_removes(script):
    parts = script("projection_parts")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 3, generator=generator, dtype=torch.float64))[0].T.contiguous()
    direction = torch.randn(60, generator=generator, dtype=torch.float64)
    sizes = [10, 20, 30]
    pieces, rows = direction.split(sizes), [vector.split(sizes) for vector in basis]
    wanted = direction - basis.T @ (basis @ direction)
    for loop in (parts.dot_and_axpy, parts.products_and_sums, parts.foreach):
        assert torch.allclose(torch.cat(loop(rows, pieces)), wanted, atol=1e-12)
    assert torch.equal(torch.cat(pieces), direction)  # untouched


def test_a_fisher_is_timed_against_its_bound(script, monkeypatch, tmp_path):
    fisher = script("fisher")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(fisher, "HEIGHT", 16)
    table = fisher.measure(32, 1, 1)
    for measure in asked_of("fisher"):
        assert fitting(measure, table), measure
        assert fitting(replace(measure, variant=measure.bound, metric="cpu seconds", peer=""), table)


def test_a_cache_is_timed_against_the_base(script, tmp_path):
    cached_kl = script("cached_kl")
    table = cached_kl.timings("lab", tmp_path, 1)
    names = {(row["variant"], row.get("peer")) for row in table}
    for measure in asked_of("cached_kl"):
        assert tuple(name.replace("0.5B", "lab") for name in (measure.variant, measure.peer)) in names
    assert {row["metric"] for row in cached_kl.making(tmp_path, 4)} == {"cpu seconds", "wall seconds", "file MB"}


def test_the_goals_speak_the_language_of_steps_which_are_too_long_to_be_run_here():
    source = (FOLDER / "step.py").read_text()
    for measure in asked_of("step"):
        for words in (*measure.variant.split(": ", 1), *measure.peer.split(": ", 1)):
            assert words in source or f"{words}: " in source, f"{words!r} is not in benchmarks/step.py"


def test_the_goals_of_a_gpu_are_among_what_it_compares(script):
    gpu = script("gpu")
    for measure in ROWS[-1].measures:
        assert (measure.variant, measure.peer) in gpu.PAIRS
        assert (measure.metric, measure.shape, measure.dtype) == (f"{gpu.SECONDS}, ratio", gpu.LARGE, "bfloat16")
