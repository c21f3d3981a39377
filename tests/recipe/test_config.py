from __future__ import annotations

import pytest
from holdfast.core.errors import ConfigError
from holdfast.recipe.config import load

from .conftest import jsonl

WHOLE = """\
model: {name: TINY, lora: {r: 4}}
stages:
  - {trainer: sft, data: "lab:shift", learning_rate: 2e-3, max_steps: 5}
output: out
"""


def faults_of(path):
    with pytest.raises(ConfigError) as caught:
        load(path)
    return caught.value.faults


def test_a_whole_recipe_has_plain_defaults(recipe):
    asked = recipe(WHOLE)
    assert asked.model.peft_type == "LORA"
    assert asked.model.adapter["target_modules"] == "all-linear"
    assert asked.stages[0].options == {"learning_rate": 2e-3, "max_steps": 5}
    assert (asked.seed, asked.arm, asked.experiment, str(asked.ledger)) == (0, "plain LoRA", "out", "out/ledger.jsonl")


def test_all_faults_are_told_at_once_with_their_lines(write):
    path = write(
        """\
        model: {name: ./nothing, lora: {rr: 16, lora_dropout: "much"}}
        stages:
          - trainer: sft
            data: rows.jsonl
            learning_rte: 2e-4
            max_steps: ten
            seed: 3
          - {trainer: dpoo, data: "lab:shft"}
        methods: [{target_masked_kd: {}}, {l2_sp: {strength: -1, selekt: a}}, agem]
        seed: -1
        seed: 2
        outptu: runs/x
        evaluate: {scales: [1, big], target: {data: gone.jsonl}}
        """
    )
    told = "\n".join(faults_of(path))
    for part in (
        "line 1: there is no model in './nothing'",
        "line 1: unknown option 'rr' of LoraConfig. Did you mean 'r'?",
        "line 1: lora_dropout must be a number, got 'much'",
        "line 4: there is no file 'rows.jsonl'",
        "line 5: unknown option 'learning_rte' of SFTConfig in stage 1. Did you mean 'learning_rate'?",
        "line 6: max_steps must be a whole number, got 'ten'",
        "line 7: seed does not belong here",
        "line 8: trainer must be sft or dpo, got 'dpoo'. Did you mean 'dpo'?",
        "line 8: the lab has no data 'shft'. Did you mean 'shift'?",
        "line 9: Unknown method 'target_masked_kd'. Did you mean 'target_masked_kl'?",
        "line 9: l2_sp: strength must be",
        "line 9: unknown setting 'selekt' of l2_sp. Did you mean 'select'?",
        "line 9: agem needs retain data",
        "line 10: seed must be a whole number >= 0, got -1",
        "line 11: 'seed' is given twice (first on line 10)",
        "line 12: unknown key 'outptu' in the recipe. Did you mean 'output'?",
        "line 13: a scale is a number from 0 to 4, got 'big'",
        "line 13: there is no file 'gone.jsonl'",
        "the recipe needs 'output'",
    ):
        assert part in told
    assert len(told.splitlines()) == 19


def test_an_option_that_TRL_refuses_is_a_fault_of_its_stage(write):
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", "lr_scheduler_type: wavy")))
    assert told.startswith("line 3: ")
    assert "wavy" in told


def test_options_that_do_not_go_together_are_a_fault(write):
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", "load_best_model_at_end: true")))
    assert told.startswith("line 3: SFTConfig in stage 1: ")


@pytest.mark.parametrize("key", ["output_dir", "resume_from_checkpoint", "model_init_kwargs", "seed"])
def test_what_the_recipe_sets_itself_is_refused_in_a_stage(write, key):
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", f"{key}: 1")))
    assert f"{key} does not belong here" in told


@pytest.mark.parametrize(
    "adapter",
    [
        "ia3, target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]",
        "LOHA, r: 4, target_modules: [q_proj]",
        "vera, r: 8, target_modules: [q_proj]",
        "lora, r: 4, use_dora: true, init_lora_weights: pissa_niter_4",
    ],
)
def test_any_peft_configuration_is_taken(recipe, adapter):
    asked = recipe(WHOLE.replace("lora: {r: 4}", f"peft: {{type: {adapter}}}"))
    assert type(asked.model.peft_config()).__name__.upper().startswith(asked.model.peft_type)


def test_an_unknown_peft_type_is_a_fault(write):
    (told,) = faults_of(write(WHOLE.replace("lora: {r: 4}", "peft: {type: lorra}")))
    assert "Did you mean 'LORA'?" in told


def test_lora_and_peft_together_are_a_fault(write):
    told = faults_of(write(WHOLE.replace("lora: {r: 4}", "lora: {r: 4}, peft: {type: ia3}")))
    assert any("both 'lora' and 'peft'" in fault for fault in told)


def test_without_an_adapter_all_weights_are_trained(recipe):
    asked = recipe(WHOLE.replace(", lora: {r: 4}", ""))
    assert asked.model.peft_config() is None
    assert asked.arm == "plain all weights"


def test_methods_of_a_stage_stand_for_the_shared_ones(recipe):
    asked = recipe(
        """\
        model: {name: TINY, lora: {r: 4}}
        stages:
          - {trainer: sft, data: "lab:shift", methods: [l2_sp]}
          - {trainer: dpo, data: "lab:preference_pairs"}
          - {trainer: sft, data: "lab:second", methods: []}
        methods: [{target_masked_kl: {strength: 2}}]
        reference: base
        output: out
        """
    )
    assert [[m.name for m in stage.methods] for stage in asked.stages] == [["l2_sp"], ["target_masked_kl"], []]
    assert asked.arm == "l2_sp + target_masked_kl"


def test_a_second_stage_must_say_what_its_reference_is(write):
    two = WHOLE.replace("output", '  - {trainer: sft, data: "lab:second"}\nmethods: [target_masked_kl]\noutput')
    (told,) = faults_of(write(two))
    assert told.startswith("line 4: stage 2 starts from the adapter of stage 1")
    load(write(two + "reference: start\n"))


def test_a_reference_that_is_nothing_is_a_fault(write):
    (told,) = faults_of(write(WHOLE + "reference: bsae\n"))
    assert "base, start, or a folder" in told


@pytest.mark.parametrize(
    ("trainer", "row", "fine"),
    [
        ("sft", {"text": "a"}, True),
        ("sft", {"messages": [{"role": "user", "content": "a"}]}, True),
        ("sft", {"prompt": "a", "completion": "b"}, True),
        ("sft", {"question": "a", "answer": "b"}, False),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}, True),
        ("dpo", {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}, True),
        ("dpo", {"prompt": "a", "completion": "b"}, False),
    ],
)
def test_the_format_of_local_rows_is_checked(write, here, trainer, row, fine):
    jsonl(here / "rows.jsonl", [row] * 3)
    path = write(f"model: TINY\nstages:\n  - {{trainer: {trainer}, data: rows.jsonl}}\noutput: out\n")
    if fine:
        load(path)
    else:
        (told,) = faults_of(path)
        assert told.startswith("line 3: rows of 'rows.jsonl' have")


def test_a_hub_name_is_left_for_later(recipe):
    assert recipe(WHOLE.replace("lab:shift", "trl-lib/Capybara")).stages[0].data.path == "trl-lib/Capybara"


def test_a_file_that_is_not_there(here):
    (told,) = faults_of(here / "none.yaml")
    assert "no such file" in told


RETAIN = {
    '{data: "lab:retain", samples: 8}': {"retain": ("lab:retain", 8)},
    "lab:retain_chat": {"retain": ("lab:retain_chat", None)},
    '{text: {data: "lab:retain", samples: 8}, chat: "lab:retain_chat"}': {
        "text": ("lab:retain", 8), "chat": ("lab:retain_chat", None),
    },
    '{data: {data: "lab:retain"}, name: {path: "lab:retain_chat"}}': {
        "data": ("lab:retain", None), "name": ("lab:retain_chat", None),
    },
    '{data: "lab:retain", chat: "lab:retain_chat"}': {"data": ("lab:retain", None), "chat": ("lab:retain_chat", None)},
}  # fmt: skip


@pytest.mark.parametrize("text", RETAIN)
def test_retain_is_one_data_setting_or_several_by_name(recipe, text):
    asked = recipe(WHOLE + f"retain: {text}\n")
    assert {name: (data.path, data.samples) for name, data in asked.retain.items()} == RETAIN[text]


def test_without_retain_there_are_no_sets(recipe):
    assert recipe(WHOLE).retain == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{data: "lab:retain", sampels: 8}', "unknown key 'sampels' in retain. Did you mean 'samples'?"),
        ('{data: "lab:retain", nmae: x}', "unknown key 'nmae' in retain. Did you mean 'name'?"),
        ('{data: "lab:retain", count: 8}', "unknown key 'count' in retain"),
        ("{name: x, samples: 8}", "retain needs 'data'"),
        ("{}", "retain needs 'data'"),
        ("[a, b]", "retain must be a mapping"),
        ('{text: {data: "lab:retain", sampels: 8}}', "unknown key 'sampels' in retain.text"),
        ('{text: "lab:retain", chat: "lab:retian"}', "the lab has no data 'retian'"),
        ('{text: "lab:retain", chat: 7}', "retain.chat must be a mapping of settings, got 7"),
    ],
)
def test_a_faulty_retain_is_told(write, text, fault):
    (told,) = faults_of(write(WHOLE + f"retain: {text}\n"))
    assert told.startswith("line 5: ")
    assert fault in told


@pytest.mark.parametrize(
    ("row", "fine"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, True),
        ({"chosen": "a b", "rejected": "a c"}, True),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, True),
        ({"input_ids": [1, 2]}, True),
        ({"prompt": "a"}, False),
        ({"question": "a"}, False),
    ],
)
def test_the_format_of_retain_rows_is_checked(write, here, row, fine):
    jsonl(here / "old.jsonl", [row] * 3)
    path = write(WHOLE + 'retain:\n  text: "lab:retain"\n  own: old.jsonl\n')
    if fine:
        load(path)
    else:
        (told,) = faults_of(path)
        assert told.startswith("line 7: rows of 'old.jsonl' have")


def test_replay_is_read_and_names_the_arm(recipe):
    asked = recipe(
        """\
        model: {name: TINY, lora: {r: 4}}
        stages:
          - {trainer: sft, data: "lab:safety_sft", replay: 0.3}
          - {trainer: sft, data: "lab:shift"}
        retain: {data: "lab:retain_chat"}
        output: out
        """
    )
    assert [stage.replay for stage in asked.stages] == [0.3, 0.0]
    assert "replay" not in asked.stages[0].options
    assert asked.arm == "replay"


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "yes", "true", "[0.3]"])
def test_a_share_that_is_none_is_a_fault(write, share):
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", f"replay: {share}") + 'retain: {data: "lab:retain"}\n'))
    assert told.startswith("line 3: replay is the share")


def test_replay_without_retain_is_a_fault(write):
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", "replay: 0.3")))
    assert told == "line 3: replay needs retain data: add `retain: {data: my_general_text.jsonl}`"


def test_replay_in_a_format_that_does_not_convert_is_a_fault(write):
    """lab:shift is prompt and completion of messages, which text is not."""
    (told,) = faults_of(write(WHOLE.replace("max_steps: 5", "replay: 0.3") + 'retain: {data: "lab:retain"}\n'))
    assert told.startswith("line 3: replay: Retain rows of text cannot be replayed among task rows of prompt")
    dpo = (
        WHOLE.replace("sft", "dpo").replace("lab:shift", "lab:preference_pairs").replace("max_steps: 5", "replay: 0.3")
    )
    (told,) = faults_of(write(dpo + 'retain: {data: "lab:retain_chat"}\n'))
    assert "DPO trains on nothing else" in told
