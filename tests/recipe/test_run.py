from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from holdfast.core.errors import WrongSetup
from holdfast.drift.ledger import Ledger
from holdfast.recipe.config import load
from holdfast.recipe.run import run
from holdfast.recipe.training import last_complete_checkpoint
from safetensors.torch import load_file

from .conftest import jsonl

SHORT = "max_steps: 3, per_device_train_batch_size: 4, learning_rate: 5e-3, report_to: none, disable_tqdm: true"
LORA = """\
model: {name: TINY, lora: {r: 4, lora_dropout: 0.1}}
stages:
  - {trainer: sft, data: {data: "lab:shift", samples: 32}, SHORT}
output: out
"""


def quiet(text):
    """Say nothing."""


def weights(folder):
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def short(recipe):
    return lambda text: recipe(text.replace("SHORT", SHORT))


def test_a_run_leaves_adapter_recipe_and_ledger(short, here):
    measured = 'evaluate: {scales: [0, 0.5, 1], target: {data: "lab:shift", split: test, samples: 12}}\n'
    result = run(short(LORA + "methods: [target_masked_kl, l2_sp]\n" + measured), quiet)
    assert (here / "out/adapter/adapter_config.json").is_file()
    assert (here / "out/recipe.yaml").read_text() == (here / "recipe.yaml").read_text()
    base, nothing, half, whole = result.entries
    assert (base.arm, whole.arm) == ("base", "target_masked_kl + l2_sp")
    assert nothing.scores["target_loss"].value == pytest.approx(base.scores["target_loss"].value, abs=1e-5)
    assert half.scores["target_loss"].value != whole.scores["target_loss"].value
    assert whole.cost["train_seconds"] > 0
    assert whole.run == half.run
    assert whole.settings["learning_rate"] == 5e-3
    assert [e.to_json() for e in Ledger(here / "out/ledger.jsonl").entries()] == [e.to_json() for e in result.entries]


def test_starting_a_finished_run_again_changes_nothing(short, here):
    asked = short(LORA + 'evaluate: {target: {data: "lab:shift", split: test, samples: 8}}\n')
    first = run(asked, quiet)
    files = {p: p.stat().st_mtime_ns for p in (here / "out/adapter").iterdir()}
    told = []
    again = run(asked, told.append)
    assert again.entries == first.entries
    assert {p: p.stat().st_mtime_ns for p in (here / "out/adapter").iterdir()} == files
    assert told == ["stage 1 of 1 (sft): finished before."]
    assert len((here / "out/ledger.jsonl").read_text().splitlines()) == 2


def test_more_may_be_measured_later(short):
    run(short(LORA), quiet)
    more = run(short(LORA + 'evaluate: {target: {data: "lab:shift", split: test, samples: 8}}\n'), quiet)
    assert [entry.arm for entry in more.entries] == ["base", "plain LoRA"]


@pytest.mark.parametrize(
    ("trainer", "rows"),
    [
        ("sft", [{"text": "Copy: b c d"}]),
        ("sft", [{"messages": [{"role": "user", "content": "Copy: b"}, {"role": "assistant", "content": "b"}]}]),
        ("sft", [{"prompt": "Copy: b c", "completion": " b c"}]),
        ("sft", [{"prompt": [{"role": "user", "content": "Copy: b"}],
                  "completion": [{"role": "assistant", "content": "b"}]}]),
        ("dpo", [{"prompt": "Copy: b c", "chosen": " b c", "rejected": " c b"}]),
        ("dpo", [{"chosen": [{"role": "user", "content": "Copy: b"}, {"role": "assistant", "content": "b"}],
                  "rejected": [{"role": "user", "content": "Copy: b"}, {"role": "assistant", "content": "c"}]}]),
    ],
)  # fmt: skip
def test_local_rows_in_every_format_train(short, here, trainer, rows):
    jsonl(here / "rows.jsonl", rows * 8)
    text = LORA.replace("trainer: sft", f"trainer: {trainer}").replace('{data: "lab:shift", samples: 32}', "rows.jsonl")
    result = run(short(text + "methods: [target_masked_kl]\n"), quiet)
    assert result.entries[0].scores["train_loss"].value > 0
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(here / "out/adapter").items() if "lora_B" in name)


def test_a_second_stage_starts_from_the_adapter_of_the_first(short, here):
    text = LORA.replace(
        "output",
        '  - {trainer: dpo, data: {data: "lab:preference_pairs", samples: 16}, SHORT, learning_rate: 0}\noutput',
    ).replace("SHORT, learning_rate: 0", SHORT.replace("5e-3", "0.0"))
    run(short(text + "methods: [target_masked_kl]\nreference: base\n"), quiet)
    assert same(weights(here / "out/stage-1/result"), weights(here / "out/adapter"))  # learning rate 0: nothing moved


@pytest.mark.parametrize(
    "adapter", ["", ", peft: {type: lora, r: 4, init_lora_weights: pissa, target_modules: all-linear}"]
)
def test_the_base_of_a_second_stage_is_the_base(short, here, adapter, monkeypatch):
    """Where the student cannot be turned back into the base, the base is loaded anew."""
    from holdfast.integrations import hf_trainer

    references = []
    attach = hf_trainer.attach
    monkeypatch.setattr(hf_trainer, "attach", lambda *a, **k: references.append(k["reference"]) or attach(*a, **k))
    text = LORA.replace(", lora: {r: 4, lora_dropout: 0.1}", adapter)
    text = text.replace("output", '  - {trainer: sft, data: {data: "lab:second", samples: 16}, SHORT}\noutput')
    asked = short(text + "methods: [target_masked_kl]\nreference: base\n")
    run(asked, quiet)
    assert references[0] == "base"
    base = dict(asked.model.load()[0].named_parameters())
    assert all(torch.equal(p, base[name]) for name, p in references[1].named_parameters())


def test_all_weights_train_without_an_adapter(short, here, tiny):
    run(short(LORA.replace(", lora: {r: 4, lora_dropout: 0.1}", "") + "methods: [target_masked_kl, l2_sp]\n"), quiet)
    assert (here / "out/model/config.json").is_file()
    assert not same(weights(here / "out/model"), weights(tiny))


@pytest.mark.parametrize(
    ("retain", "rows"),
    [
        ('{data: "lab:retain", samples: 8}', 8),
        (
            '{text: {data: "lab:retain", samples: 8}, chat: {data: "lab:retain_chat", samples: 4}}',
            {"text": 8, "chat": 4},
        ),
        ('{pairs: {data: "lab:preference_pairs", samples: 6}}', {"pairs": 6}),
    ],
)
def test_retain_sets_reach_the_methods_by_name(short, monkeypatch, retain, rows):
    from holdfast.integrations import hf_trainer

    given, attach = [], hf_trainer.attach
    monkeypatch.setattr(hf_trainer, "attach", lambda *a, **k: given.append(k["retain"]) or attach(*a, **k))
    run(short(LORA + f"methods: [agem]\nretain: {retain}\n"), quiet)
    (given,) = given
    assert ({name: len(each) for name, each in given.items()} if isinstance(rows, dict) else len(given)) == rows


REPLAY = LORA.replace("lab:shift", "lab:safety_sft").replace("SHORT", "SHORT, replay: 0.5")


def test_replay_mixes_all_retain_sets_into_the_stage(short, here, monkeypatch):
    from holdfast.recipe import training

    seen, told, make = [], [], training.make_trainer
    monkeypatch.setattr(
        "holdfast.recipe.run.make_trainer", lambda stage, rows, *a: seen.append(rows) or make(stage, rows, *a)
    )
    jsonl(
        here / "own.jsonl",
        [{"messages": [{"role": "user", "content": "Copy: b"}, {"role": "assistant", "content": "b"}]}],
    )
    result = run(short(REPLAY + 'retain: {chat: {data: "lab:retain_chat", samples: 5}, own: own.jsonl}\n'), told.append)
    (rows,) = seen
    assert set(rows.column_names) == {"prompt", "completion"}
    asked = [row["prompt"][0]["content"] for row in rows]
    old = [text for text in asked if asked.count(text) > 1]
    assert "Copy: b" in old
    (line,) = [line for line in told if line.startswith("replay: ")]
    assert f"{len(rows) - 32} of {len(rows)} training rows" in line
    assert line.endswith("the 6 rows of retain (chat, own).")
    assert (result.entries[0].arm, result.entries[0].settings["replay"]) == ("replay", 0.5)


def test_replay_changes_what_is_learned_and_is_part_of_the_recipe(short, here):
    retain = 'retain: {data: "lab:retain_chat", samples: 8}\n'
    run(short(REPLAY + retain), quiet)
    mixed = weights(here / "out/adapter")
    with pytest.raises(WrongSetup, match=r"stages\[0\]\.replay: there 0.5, here None"):
        run(short(REPLAY.replace(", replay: 0.5", "") + retain), quiet)
    run(short((REPLAY + retain).replace(", replay: 0.5", "").replace("output: out", "output: plain")), quiet)
    assert not same(mixed, weights(here / "plain/adapter"))


def test_changed_files_of_any_retain_set_are_refused(short, here):
    rows = [{"text": "a b c"}] * 4
    for name in ("one.jsonl", "two.jsonl"):
        jsonl(here / name, rows)
    asked = short(LORA + "methods: [agem]\nretain: {one: one.jsonl, two: two.jsonl}\n")
    run(asked, quiet)
    assert run(asked, quiet).entries
    jsonl(here / "two.jsonl", [{"text": "c b a"}] * 4)
    with pytest.raises(WrongSetup, match=r"data\.one\.jsonl, two\.jsonl"):
        run(asked, quiet)


def test_preference_rows_are_not_measured(short, here):
    """Of a hub name nothing is known before it is loaded; here a folder stands for it."""
    (here / "pairs").mkdir()
    jsonl(here / "pairs/rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    asked = short(LORA + "evaluate: {old: pairs}\n")
    with pytest.raises(WrongSetup, match="rows of 'pairs' have chosen, prompt, rejected; here they need 'text'"):
        run(asked, quiet)


def test_another_recipe_in_the_same_folder_is_refused(short):
    run(short(LORA), quiet)
    with pytest.raises(WrongSetup, match=r"stages\[0\]\.data\.samples: there 32, here 16") as caught:
        run(short(LORA.replace("samples: 32", "samples: 16")), quiet)
    assert "Choose another `output`" in str(caught.value)


def test_the_same_recipe_on_changed_data_is_refused(short, here):
    jsonl(here / "rows.jsonl", [{"text": "a"}] * 8)
    asked = short(LORA.replace('{data: "lab:shift", samples: 32}', "rows.jsonl"))
    run(asked, quiet)
    jsonl(here / "rows.jsonl", [{"text": "b"}] * 8)
    with pytest.raises(WrongSetup, match=r"data\.rows\.jsonl"):
        run(asked, quiet)


def test_a_folder_with_something_else_in_it_is_refused(short, here):
    (here / "out").mkdir()
    (here / "out/thesis.tex").write_text("years of work")
    with pytest.raises(WrongSetup, match="not empty and holds no run"):
        run(short(LORA), quiet)


def test_a_hub_name_offline_says_what_to_do(short):
    with pytest.raises(WrongSetup, match=r"Cannot load the data set on the hub 'trl-lib/none'.*Check the name"):
        run(short(LORA.replace('{data: "lab:shift", samples: 32}', "trl-lib/none")), quiet)


def checkpoint(folder, step, **files):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    whole = {"trainer_state.json": '{"global_step": 1}', "holdfast.json": "{}", "optimizer.pt": "", "scheduler.pt": ""}
    for name, text in {**whole, **files}.items():
        if text is not None:
            (place / name).write_text(text)
    return place


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"trainer_state.json": None}, "unfinished"),
        ({"trainer_state.json": '{"global_st'}, "cut off"),
        ({"trainer_state.json": "[]"}, "not whole"),
        ({"holdfast.json": None}, "no state of the methods"),
        ({"optimizer.pt": None}, "no state of the optimizer"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_and_named(here, files, why):
    whole, told = checkpoint(here, 9), []
    checkpoint(here, 10, **files)
    assert last_complete_checkpoint(here, methods=True, say=told.append) == whole
    assert "checkpoint-10" in told[0]
    assert why in told[0]


def start(path, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", "train", str(path)], env=environment, cwd=path.parent, **options
    )


SEVERAL = "[target_masked_kl, l2_sp, {agem: {refresh_every: 2}}]"
OGPSA = [(stage, False, "[{ogpsa: {exact: true}}]") for stage in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "replay", "methods"), [(1, False, SEVERAL), (2, False, SEVERAL), (2, True, SEVERAL), *OGPSA]
)
def test_a_killed_run_goes_on_bit_for_bit(write, here, stage, replay, methods):
    """SIGKILL in mid-training, the newest checkpoint torn on top of it: the result is that of a run never stopped."""
    mixed, retain = (", replay: 0.4", '"lab:preference_pairs", split: validation') if replay else ("", '"lab:retain"')
    retain = f"{{data: {retain}, samples: 12}}"
    if methods is not SEVERAL:
        mixed = ", methods: [{orthogonal_projection: {references: both, refresh_every: auto, samples: 8}}]"
        retain = '{text: {data: "lab:retain", samples: 12}, pairs: {data: "lab:retain_preferences", samples: 12}}'
    steps = "max_steps: 16, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 5e-3"
    text = f"""\
    model: {{name: TINY, lora: {{r: 4, lora_dropout: 0.1}}}}
    stages:
      - {{trainer: sft, data: {{data: "lab:shift", samples: 48}}, {steps}}}
      - {{trainer: dpo, data: {{data: "lab:preference_pairs", samples: 32}}, {steps}{mixed}}}
    methods: {methods}
    retain: {retain}
    reference: start
    output: OUT
    """
    whole = write(text.replace("OUT", "whole"), "whole.yaml")
    run(load(whole), quiet)
    broken = write(text.replace("OUT", "broken"), "broken.yaml")
    if stage == 2:  # the first stage is there already, as after a kill in the second
        shutil.copytree(here / "whole/stage-1", here / "broken/stage-1")
        record = json.loads((here / "whole/progress.json").read_text())
        (here / "broken/progress.json").write_text(json.dumps({**record, "stages": record["stages"][:1]}))
    folder = here / f"broken/stage-{stage}"
    process = start(broken, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (folder / "checkpoint-6/trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (here / "broken/adapter").exists()
    newest = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:50] if state.exists() else "{")  # as a kill while it was written leaves it
    again = start(broken, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told, _ = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert f"{newest.name} is passed over" in told
    assert "goes on from" in told
    assert ("replay: " in told) == replay
    assert same(weights(here / "whole/adapter"), weights(here / "broken/adapter"))


def test_a_run_that_diverged_is_recorded_as_failed(short, here, monkeypatch):
    from holdfast.drift.ledger import Score
    from holdfast.recipe import run as room

    monkeypatch.setattr(room, "mean_loss", lambda *a, **k: Score(float("nan"), n=8))
    result = run(short(LORA + 'evaluate: {target: {data: "lab:shift", split: test, samples: 8}}\n'), quiet)
    assert {entry.status for entry in result.entries} == {"failed"}
    assert "target_loss not finite" in result.entries[-1].error


@pytest.mark.slow
def test_two_processes_share_one_run(write, here):
    path = write(
        LORA.replace("SHORT", SHORT + ", use_cpu: true, save_steps: 2")
        + 'methods: [target_masked_kl, l2_sp]\nevaluate: {target: {data: "lab:shift", split: test, samples: 8}}\n'
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "holdfast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(path)], env=environment, cwd=here, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 1 of 1 (sft)") == 1
    assert len(Ledger(here / "out/ledger.jsonl").entries()) == 2
    assert (here / "out/adapter/adapter_model.safetensors").is_file()
