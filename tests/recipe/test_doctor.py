"""Every check of the doctor has a recipe that fails it, and recipes that can run pass them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from holdfast.core.errors import WrongSetup
from holdfast.recipe import doctor_host, doctor_reference
from holdfast.recipe.config import load
from holdfast.recipe.doctor import Question, examine
from holdfast.recipe.doctor_findings import Findings

from .conftest import jsonl

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"text": f"the cat {n} sat on the mat"} for n in range(12)]
PAIRS = [{"prompt": "who ?", "completion": f" the cat {n}"} for n in range(12)]
BOTH = [{"prompt": "who ?", "chosen": " the cat", "rejected": f" the dog {n}"} for n in range(12)]


@pytest.fixture
def looked(write, here):
    """Write a recipe, its rows beside it, and examine it."""
    jsonl(here / "rows.jsonl", ROWS)
    jsonl(here / "pairs.jsonl", PAIRS)
    jsonl(here / "both.jsonl", BOTH)

    def looked(text: str, **asked):
        return examine(Question(write(text), **asked))

    return looked


def recipe(model="{name: TINY, lora: {r: 4}}", stage="trainer: sft, data: pairs.jsonl, max_length: 32", more=""):
    return f"model: {model}\nstages: [{{{stage}}}]\noutput: out\n{more}\n"


def of(report, status: str, about: str = "") -> list[str]:
    return [found.text for found in report.findings if found.status == status and about in found.about]


def the_fault(report, about: str) -> str:
    (text,) = of(report, "fault")
    assert of(report, "fault", about) == [text]
    assert report.faulty
    return text


# --- what can run --------------------------------------------------------------------------------------------------


def test_a_sound_recipe_has_no_faults_and_its_reference_is_proven(looked, here):
    report = looked(recipe(more="methods: [target_masked_kl]"))
    assert not report.faulty
    assert of(report, "warning") == []
    (text,) = of(report, "ok", "reference")
    assert "adapter switched off" in text
    assert "proven: logits differ by 0 of" in text
    assert {path.name for path in here.iterdir()} >= {"recipe.yaml", "rows.jsonl"}
    assert not (here / "out").exists()  # nothing is written


@pytest.mark.parametrize(
    "name", ["lab_self_replay", "ogpsa_sft_dpo", "alignguard_lora", "lab_two_stages", "lab_watched"]
)
def test_recipes_that_come_along_can_run(name, here):
    report = examine(Question(ROOT / "recipes" / f"{name}.yaml"))
    assert of(report, "fault") == []
    assert all(stage.peak > 0 for stage in report.memory)
    assert len(report.memory) == len(load(ROOT / "recipes" / f"{name}.yaml").stages)


def test_a_comparison_is_looked_at_arm_by_arm(here):
    report = examine(Question(ROOT / "recipes" / "lab_compare.yaml"))
    assert of(report, "fault") == []
    arms = [stage.name.split(":")[0] for stage in report.memory]
    assert arms == ["arm plain LoRA", "arm update decay", "arm target-masked KL", "arm self-replay"]
    told = [one.about for one in report.findings]
    assert told.count("every arm: model") == 2  # what is alike stands once
    assert "arm plain LoRA: model" not in told
    assert {"arm plain LoRA: stage 1: methods", "arm self-replay: stage 1: retain"} <= {*told}


def test_the_reference_of_a_moved_base_is_a_copy_and_is_proven(looked):
    model = "{name: TINY, lora: {r: 4, init_lora_weights: pissa}}"
    report = looked(recipe(model, more="methods: [full_kl]"))
    assert not report.faulty
    (text,) = of(report, "ok", "reference")
    assert text.startswith("a frozen copy")
    assert "proven" in text
    parts = {part.name: part for part in report.memory[0].parts}
    assert parts["reference: a frozen copy"].size == parts["adapter"].size


def test_what_is_not_loaded_is_said_to_be_unproven(looked, monkeypatch):
    from holdfast.recipe import doctor

    monkeypatch.setattr(doctor, "SMALL", 0)
    for init, kind in (("true", "the base model: adapter"), ("pissa", "a frozen copy")):
        model = f"{{name: TINY, lora: {{r: 4, init_lora_weights: {init}}}}}"
        report = looked(recipe(model, more="methods: [full_kl]"))
        (text,) = of(report, "ok", "reference")
        assert text.startswith(kind)
        assert "not proven (--load" in text
    report = looked(recipe(more="methods: [full_kl]"), load=True)
    assert "proven: logits" in of(report, "ok", "reference")[0]


def test_trained_biases_make_the_reference_a_copy(looked, monkeypatch):
    from holdfast.recipe import doctor

    monkeypatch.setattr(doctor, "SMALL", 0)
    report = looked(
        recipe("{name: TINY, lora: {r: 4, bias: all, target_modules: [q_proj]}}", more="methods: [full_kl]")
    )
    assert "adapter switched off" in of(report, "ok", "reference")[0]  # a Llama has no biases to train
    report = looked(recipe("TINY", more="methods: [full_kl]"))
    assert "a frozen copy" in of(report, "ok", "reference")[0]  # all weights are trained


@pytest.mark.parametrize(
    ("init", "reference", "kind"),
    [("true", "base", "off"), ("pissa", "base", "other"), ("true", "start", "copy")],
)
def test_a_later_stage_says_what_its_reference_will_be(looked, init, reference, kind):
    stages = "stages:\n" + "  - {trainer: sft, data: pairs.jsonl, max_length: 32}\n" * 2
    model = f"{{name: TINY, lora: {{r: 4, init_lora_weights: {init}}}}}"
    text = f"model: {model}\n{stages}output: out\nreference: {reference}\nmethods: [full_kl]\n"
    report = looked(text)
    assert not report.faulty
    (text,) = of(report, "ok", "stage 2: reference")
    assert text.startswith(doctor_reference.WORDS[kind])
    assert "when the stage begins" in text


# --- recipe, model, data -------------------------------------------------------------------------------------------


def test_faults_of_a_recipe_are_told_with_their_lines(looked):
    report = looked("modle: x\nstages: [{trainer: sft, data: gone.jsonl}]\n")
    assert any("Did you mean 'model'?" in text for text in of(report, "fault", "recipe"))
    assert any("no file 'gone.jsonl'" in text for text in of(report, "fault", "recipe"))
    assert report.memory == ()


@pytest.fixture
def broken(tiny, here):
    """A copy of the tiny model to be broken."""
    return Path(shutil.copytree(tiny, here / "broken"))


def test_a_model_that_the_hub_has_not_given_is_a_fault_offline(looked):
    report = looked(recipe("{name: nobody/nothing, lora: {r: 4}}"))
    texts = of(report, "fault", "model")
    assert any("Cannot read the configuration of 'nobody/nothing'" in text for text in texts)
    assert any("in the hub's cache on this machine, and HF_HUB_OFFLINE is set" in text for text in texts)
    assert any("cannot load the tokenizer" in text for text in texts)
    assert of(report, "ok", "data")  # the rest is looked at all the same


def test_a_model_without_weights(looked, broken):
    (broken / "model.safetensors").unlink()
    assert "has no weights (safetensors or bin)" in the_fault(looked(recipe("{name: broken, lora: {r: 4}}")), "model")


def test_a_model_that_lacks_a_shard(looked, broken):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no model-2.safetensors" in the_fault(looked(recipe("{name: broken, lora: {r: 4}}")), "model")


def test_a_file_of_weights_that_was_cut_off(looked, broken, monkeypatch):
    from holdfast.recipe import doctor

    monkeypatch.setattr(doctor, "SMALL", 0)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is not whole" in the_fault(
        looked(recipe("{name: broken, lora: {r: 4}}", more="methods: [full_kl]")), "model"
    )


def test_an_adapter_in_place_of_a_model(looked, broken):
    (broken / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in the_fault(looked(recipe("{name: broken, lora: {r: 4}}")), "model")


def test_modules_that_the_model_does_not_have(looked):
    report = looked(recipe("{name: TINY, lora: {r: 4, target_modules: [wrong_proj]}}"))
    assert "wrong_proj" in the_fault(report, "model")


def test_a_tokenizer_that_is_larger_than_the_embeddings(looked, broken):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(broken)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(broken)
    assert "would be looked up outside" in the_fault(looked(recipe("{name: broken, lora: {r: 4}}")), "model")


def test_a_tokenizer_without_padding(looked, broken):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := broken / name).is_file():
            settings = json.loads(file.read_text())
            kept = {k: v for k, v in settings.items() if k not in ("pad_token", "eos_token", "added_tokens_decoder")}
            file.write_text(json.dumps(kept))
    assert any(
        "no pad and no end-of-sequence token" in text for text in of(looked(recipe("{name: broken}")), "fault", "model")
    )


def test_messages_without_a_chat_template(looked, broken, here):
    jsonl(
        here / "chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    )
    for file in broken.glob("chat_template*"):
        file.unlink()
    config = broken / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    report = looked(recipe("{name: broken, lora: {r: 4}}", "trainer: sft, data: chat.jsonl"))
    assert "no chat template" in the_fault(report, "data")


def test_data_that_the_hub_has_not_given(looked):
    report = looked(recipe(stage="trainer: sft, data: nobody/nothing"))
    assert "Cannot load the data set on the hub 'nobody/nothing'" in the_fault(report, "data")


# --- reference -----------------------------------------------------------------------------------------------------


def test_an_initialisation_that_changes_the_base(looked, monkeypatch):
    from holdfast.recipe import doctor

    monkeypatch.setattr(doctor, "SMALL", 0)  # the refusal needs no weights
    model = "{name: TINY, lora: {r: 4, init_lora_weights: loftq, loftq_config: {loftq_bits: 4}}}"
    assert "changes the base weights" in the_fault(looked(recipe(model, more="methods: [full_kl]")), "reference")
    assert not looked(recipe(model, more="methods: [full_kl]\nreference: start")).faulty


def test_prompt_learning(looked):
    model = "{name: TINY, peft: {type: prompt_tuning, num_virtual_tokens: 4}}"
    report = looked(recipe(model, more="methods: [full_kl]"))
    assert any("virtual tokens" in text for text in of(report, "fault", "reference"))


def test_an_adapter_on_the_head(looked):
    model = "{name: TINY, lora: {r: 4, target_modules: [q_proj, lm_head]}}"
    report = looked(recipe(model, more="methods: [full_kl]"))
    assert any("not a plain linear map" in text for text in of(report, "fault", "reference"))


def test_logits_that_are_not_those_of_the_base(looked, monkeypatch):
    """The proof compares with the model before the adapter came: a PEFT that moved the base unsaid would be seen."""
    from peft import get_peft_model

    def moving(model, config):
        made = get_peft_model(model, config)
        with torch.no_grad():
            next(made.parameters()).mul_(1.5)
        made.config._name_or_path = ""
        return made

    monkeypatch.setattr("peft.get_peft_model", moving)
    assert "before the adapter came" in the_fault(looked(recipe(more="methods: [full_kl]")), "reference")


# --- host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("distributed_type: DEEPSPEED", "under DeepSpeed"),
        ("{distributed_type: FSDP, fsdp_config: {fsdp_version: 1}}", "under FSDP1"),
        ("{distributed_type: FSDP, fsdp_config: {}}", "under FSDP1"),
        ("{distributed_type: FSDP, fsdp_config: {fsdp_version: 2}}", "under FSDP2"),
        ("{distributed_type: MULTI_GPU, parallelism_config: {parallelism_config_tp_size: 2}}", "Tensor, context"),
        ("[1, 2]", "no config of accelerate's"),
    ],
)
def test_a_launch_that_shards_what_methods_read(looked, here, config, said):
    (here / "launch.yaml").write_text(config)
    report = looked(recipe(more="methods: [agem]\nretain: rows.jsonl"), launch=here / "launch.yaml")
    assert said in the_fault(report, "host")


def test_a_launch_of_replicas_is_fine_and_so_is_sharding_without_methods(looked, here):
    (here / "launch.yaml").write_text("distributed_type: MULTI_GPU")
    assert not looked(recipe(more="methods: [full_kl]"), launch=here / "launch.yaml").faulty
    (here / "launch.yaml").write_text("distributed_type: DEEPSPEED")
    assert not looked(recipe(), launch=here / "launch.yaml").faulty


def test_the_users_own_config_of_accelerate_is_a_warning(looked, here, monkeypatch):
    (here / "default.yaml").write_text("distributed_type: DEEPSPEED")
    monkeypatch.setattr(doctor_host, "_default_file", lambda: here / "default.yaml")
    report = looked(recipe(more="methods: [full_kl]"))
    assert not report.faulty
    assert "`accelerate launch` would take" in of(report, "warning", "host")[0]


def test_what_accelerate_launch_has_set(looked, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    report = looked(recipe(more="methods: [full_kl]"))
    assert "under FSDP1" in the_fault(report, "host")


def test_several_gpus_in_one_process():
    recipe = SimpleNamespace(methods=[SimpleNamespace(name="full_kl", strength=1.0)])
    with pytest.raises(Exception, match="DataParallel"):
        doctor_host._refuse(recipe, doctor_host._host(deepspeed=False, fsdp=0, parallel=None, gpus=2))


# --- methods, retain data ------------------------------------------------------------------------------------------

METHODS = {
    "kept": ("target_masked_kl: {normalise: kept, exclusion: 1e-4}", "gradient_accumulation_steps: 2", "it divides by"),
    "prompt": ("full_kl: {positions: prompt}", "data: rows.jsonl", "would do nothing"),
    "layerwise": ("random_subspace: {}", "optim: galore_adamw_layerwise, optim_target_modules: [q_proj]", "backward"),
    "metric": ("random_subspace: {metric: optimizer}", "optim: adafactor", "knows Adam, AdamW and SGD"),
    "select": ("l2_sp: {select: nothing*}", "", "No trainable parameter matches"),
    "sets": ("ewc: {data: [gone]}", "", "no retain set 'gone'"),
    "stream": ("full_kl: {on: retain, data: [gone]}", "", "no retain set 'gone'"),
    "rank": ("orthogonal_projection: {references: both, rank: 1}", "", "reads preferences"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_would_not_work(looked, name):
    method, option, said = METHODS[name]
    stage = "trainer: sft, max_length: 32" + (f", {option}" if option else "")
    stage += "" if "data:" in option else ", data: pairs.jsonl"
    report = looked(recipe(stage=stage, more=f"methods: [{{{method}}}]\nretain: {{text: rows.jsonl}}"))
    assert any(said in text for text in of(report, "fault", "methods"))


def test_two_methods_that_want_other_shares(looked):
    both = "methods: [{self_replay: {share: 0.2}}, {full_kl: {on: retain, share: 0.5}}]\nretain: rows.jsonl"
    assert "differ in share" in the_fault(looked(recipe(more=both)), "methods")


def test_a_rank_below_one_for_each_set(looked):
    more = "methods: [{orthogonal_projection: {rank: 1}}]\nretain: {a: rows.jsonl, b: pairs.jsonl}"
    assert "rank=1 is less than one gradient" in the_fault(looked(recipe(more=more)), "methods")


def test_a_penalty_on_an_update_that_is_none(looked):
    model = "{name: TINY, lora: {r: 4, init_lora_weights: pissa}}"
    assert "not s · B A" in the_fault(looked(recipe(model, more="methods: [update_decay]")), "methods")


def test_methods_that_are_off_are_a_warning(looked):
    report = looked(recipe(more="methods: [{l2_sp: {strength: 0}}]"))
    assert not report.faulty
    assert "switches l2_sp off" in of(report, "warning", "methods")[0]


def test_retain_data_that_leave_nothing_to_take_a_gradient_of(looked, here):
    jsonl(here / "empty.jsonl", [{"prompt": "who ?" * 40, "completion": "me"}])
    report = looked(recipe(more="methods: [agem]\nretain: empty.jsonl"))
    assert any("Nothing is left of 1 retain rows" in text for text in of(report, "fault", "retain"))


def test_too_few_rows_to_hold_any_out(looked, here):
    jsonl(here / "few.jsonl", ROWS[:3])
    more = "methods: [{full_kl: {on: retain, strength: auto, budget: 0.1}}]\nretain: few.jsonl"
    assert any("Give at least 8 rows" in text for text in of(looked(recipe(more=more)), "fault", "methods"))


def test_fewer_rows_than_a_method_asks_for_are_a_warning(looked):
    more = "methods: [orthogonal_projection, {ewc: {rows: 100}}]\nretain: rows.jsonl"
    report = looked(recipe(more=more))
    assert not report.faulty
    assert [text.split(":")[0] for text in of(report, "warning", "retain")] == [
        "orthogonal_projection asks for 64 rows of a set, and 'retain' has 12",
        "ewc asks for 100 rows of a set, and 'retain' has 12",
    ]


def test_a_small_pool_for_a_long_run_is_a_warning(looked):
    stage = "trainer: sft, data: pairs.jsonl, max_length: 32, max_steps: 1000"
    report = looked(recipe(stage=stage, more="methods: [self_replay]\nretain: rows.jsonl"))
    assert "each of 12 sequences is seen about 250 times" in of(report, "warning", "retain")[0]


def test_a_pool_of_another_tokenizer(looked, here, tiny):
    from holdfast.retain.kept import Kept, id_of
    from holdfast.retain.pool import Pool

    kept = Kept(id_of([5, 6]), "text", "", "a b", (5, 6), 0)
    Pool((kept,), {"tokenizer": {"name": "other", "sha256": "0"}, "base": {"name": "other"}}).save(here / "pool")
    report = looked(recipe(more="methods: [self_replay]\nretain: ./pool"))
    assert any("tokens are those of the tokenizer 'other'" in text for text in of(report, "fault", "retain"))


def test_a_measurement_that_would_fail_when_all_is_trained(looked):
    model = "{name: TINY, peft: {type: prompt_tuning, num_virtual_tokens: 4}}"
    report = looked(recipe(model, more="evaluate: {target: rows.jsonl}"))
    assert "prompt learning is not measured here" in the_fault(report, "evaluate")


# --- memory and disk -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_a_fault_and_what_nearly_does_a_warning(looked):
    text = recipe(more="methods: [target_masked_kl]")
    peak = looked(text).memory[0].peak
    for limit, status in ((peak - 1, "fault"), (int(peak * 1.05), "warning"), (2 * peak, "ok")):
        report = looked(text, memory=limit, length=32)
        own = report.memory[0].peak
        assert report.limit == limit
        expected = "fault" if own > limit else "warning" if own > 0.9 * limit else "ok"
        assert of(report, expected, "memory")
        if status == "fault":
            small = looked(text, memory=1)
            assert "it does not fit" in the_fault(small, "memory")


def test_length_and_batch_are_what_is_asked(looked):
    text = recipe()
    report = looked(text, length=64, batch=3)
    assert report.memory[0].tokens == 192
    assert looked(text).memory[0].tokens == 32 * 8
    both = recipe(stage="trainer: dpo, data: both.jsonl, max_length: 32")
    assert looked(both).memory[0].tokens == 2 * 32 * 8


def test_sequences_longer_than_the_model_reads_are_a_warning(looked):
    report = looked(recipe(), length=4096)
    assert "longer than the model's 128 positions" in of(report, "warning", "memory")[0]
    assert looked(recipe(stage="trainer: sft, data: pairs.jsonl")).memory[0].tokens == 128 * 8


def test_the_cache_of_the_task_is_counted_on_disk(looked):
    text = recipe(more="methods: [target_masked_kl]\ncache: {dtype: float16}")
    (part,) = [part for part in looked(text).memory[0].parts if part.when == "disk"]
    assert part.size == 12 * 32 * (32 * 2 + 8)
    assert not part.exact
    hidden = text.replace("[target_masked_kl]", "[{target_masked_kl: {direction: reverse}}]")
    (part,) = [part for part in looked(hidden).memory[0].parts if part.when == "disk"]
    assert part.size == 12 * 32 * 32 * 4  # a dtype is of statistics alone


def test_a_folder_of_something_else(looked, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    assert "holds no run of holdfast's" in the_fault(looked(recipe()), "disk")


def test_a_folder_of_another_recipe(looked, write, here):
    from holdfast.recipe.progress import Progress

    write(recipe(), "other.yaml")
    looked(recipe())
    Progress(load(here / "other.yaml"))
    assert any("goes on where it was" in text for text in of(looked(recipe()), "ok", "disk"))
    changed = recipe(stage="trainer: sft, data: pairs.jsonl, max_length: 16")
    assert "holds a run of another recipe: recipe.stages[0].max_length" in the_fault(looked(changed), "disk")


def test_a_disk_without_room(looked, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    report = looked(recipe(more="methods: [l2_sp]"))
    assert "Make room" in the_fault(report, "disk")


def test_errors_raised_on_purpose_become_faults():
    found = Findings()
    with found.noting("x"):
        raise WrongSetup("this is\n  wrong")
    assert [(each.about, each.status, each.text) for each in found] == [("x", "fault", "this is wrong")]
