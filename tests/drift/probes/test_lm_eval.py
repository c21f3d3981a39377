"""lm-eval without merging: items whose mean is lm-eval's aggregate, in one order for both sides, and no trace."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from contextlib import contextmanager, nullcontext
from statistics import fmean

import numpy
import pytest
import torch
from holdfast.drift.entry import Entry
from holdfast.drift.models import Models
from holdfast.drift.probe import ProbeError
from holdfast.drift.probes.lm_eval import LmEval

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from tiny import WORDS, llama, lora, sentence, shake, tokenizer

CHOOSE = """
task: tiny_choose
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choose.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: f1, aggregation: f1, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
metadata: {{version: 2.0}}
"""
WRITE = """
task: tiny_write
output_type: generate_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [w17], max_gen_toks: 6, do_sample: false}}
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: "^ ?(w[0-9]+)"}}, {{function: take_first}}]}}
  - {{name: none, filter: [{{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLL = """
task: tiny_roll
output_type: loglikelihood_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/roll.jsonl}}}}
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
LAST = """
task: tiny_last
output_type: loglikelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
PARTS = """
task: tiny_parts
output_type: generate_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 4, do_sample: false}}
process_results: !function judge.parts
metric_list:
  - {{metric: part, aggregation: !function judge.flat, higher_is_better: true}}
  - {{metric: middle, aggregation: median, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
JUDGE = """
def parts(doc, results):
    words = results[0].split()
    parts = [int(word[1:]) % 2 == 0 for word in words if word[1:].isdigit()]
    return {"part": parts, "middle": len(words)}
def flat(items):
    parts = [part for item in items for part in item]
    return sum(parts) / len(parts)
"""
GROUP = """
group: tiny_group
task: [tiny_choose, tiny_last]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""
N = 13
TASKS = ("tiny_choose", "tiny_write", "tiny_roll", "tiny_last", "tiny_parts")


def made():
    model = lora(llama())
    shake(model)
    return model


def next_word(model, text, tuned):
    with torch.no_grad(), nullcontext() if tuned else model.disable_adapter():
        return tokenizer().decode(model(tokenizer()(text, return_tensors="pt").input_ids).logits[0, -1].argmax())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of every kind, and their data."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    rng = random.Random(0)

    def rows(name, made):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))

    def question():
        choices = [sentence(rng, 1, 3) for _ in range(2)]
        return {"question": sentence(rng), "choices": choices, "answer": rng.randrange(2)}

    write = [{"question": sentence(rng), "answer": rng.choice(WORDS[:30])} for _ in range(N)]
    for number, row in enumerate(write):  # two thirds can be answered: by the base, or by the tuned model
        if number % 3 < 2 and (word := next_word(made(), row["question"], tuned=number % 3 == 0)) in WORDS:
            row["answer"] = word
    rows("choose", [question() for _ in range(N)])
    rows("shots", [question() for _ in range(5)])
    rows("write", write)
    rows("roll", [{"text": sentence(rng, 2, 20)} for _ in range(N)])
    for name, text in {"choose": CHOOSE, "write": WRITE, "roll": ROLL, "last": LAST, "parts": PARTS}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "judge.py").write_text(JUDGE)
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def digest(model):
    """Of every weight, adapters included, and where it lies."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.data_ptr()}".encode() + tensor.numpy().tobytes())
    return weights.hexdigest()


def models_of(model, batch_size=4, tok=None):
    @contextmanager
    def base():
        with model.disable_adapter():
            yield model

    @contextmanager
    def tuned():
        yield model

    return Models({"base": base, "tuned": tuned}, tok or tokenizer(), batch_size=batch_size)


@pytest.fixture(scope="module")
def tuned_model():
    return made()


def measured(probe, models, side):
    ticks = []
    found = probe.measure(models, side, ticks.append)
    assert sum(ticks) == probe.size
    return found


def lm_evals_own(folder, model):
    """lm-eval as its users call it, on the model as it is."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    host = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=4)
    with torch.no_grad():
        return simple_evaluate(host, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def own(folder, tuned_model):
    with tuned_model.disable_adapter():
        base = lm_evals_own(folder, tuned_model)
    return {"base": base, "tuned": lm_evals_own(folder, tuned_model)}


@pytest.fixture(scope="module")
def found(folder, tuned_model):
    probe = LmEval(TASKS, folder)
    models = models_of(tuned_model)
    before = digest(tuned_model)
    both = {side: measured(probe, models, side) for side in ("base", "tuned")}
    assert digest(tuned_model) == before  # nothing was merged
    assert probe.size == 5 * N
    return both


@pytest.mark.parametrize("task", TASKS)
def test_values_are_those_of_lm_eval_itself(found, own, task):
    for side in own:
        values = {k: v for k, v in own[side]["results"][task].items() if "," in k and "_stderr" not in k}
        ours = {name: s.value for name, s in found[side].scores.items() if name.split(".")[1] == task}
        assert len(ours) == len(values)
        for key, value in values.items():
            metric, kind = key.split(",")
            name = f"{task}.{metric}" + ("" if kind == "none" else f"_{kind}")
            assert {ours.get(f"lm_eval.{name}"), ours.get(f"lm_eval_loss.{name}")} - {None} == {value}, key
    names = [name for name in found["base"].scores if task in name]
    assert any(found["base"].scores[name] != found["tuned"].scores[name] for name in names)


def test_items_give_the_value_and_are_those_of_the_documents_in_order(found, folder, own):
    scores = found["tuned"].scores
    means = [n for n in scores if n.startswith("lm_eval.") and not n.endswith((".f1", ".middle"))]
    assert len(means) == 6
    for name in [*means, "lm_eval_loss.tiny_roll.bits_per_byte"]:
        assert fmean(scores[name].items) == pytest.approx(scores[name].value, rel=1e-12)
    for name in ("tiny_roll.word_perplexity", "tiny_roll.byte_perplexity", "tiny_last.perplexity"):
        score = scores[f"lm_eval_loss.{name}"]
        assert math.exp(fmean(score.items)) == pytest.approx(score.value, rel=1e-12)
        assert score.n == N
    for name in ("lm_eval.tiny_choose.f1", "lm_eval_loss.tiny_choose.brier_score", "lm_eval.tiny_parts.middle"):
        assert (scores[name].items, scores[name].n) == (None, N)
    samples = {row["doc_id"]: row["acc"] for row in own["tuned"]["samples"]["tiny_choose"]}
    assert scores["lm_eval.tiny_choose.acc"].items == tuple(samples[place] for place in range(N))
    questions = [json.loads(line)["question"] for line in (folder / "write.jsonl").read_text().splitlines()]
    for side in found:
        answers = [a for a in found[side].answers if a.id.startswith("tiny_write/")]
        assert [a.prompt for a in answers] == questions


def test_log_likelihoods_are_those_of_a_forward_of_each_row_alone(found, folder, tuned_model):
    tok = tokenizer()
    rows = [json.loads(line) for line in (folder / "write.jsonl").read_text().splitlines()]
    expected = []
    for row in rows:
        ids = tok(row["question"] + " " + row["answer"], return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(-tuned_model(ids).logits.double().log_softmax(-1)[0, -2, ids[0, -1]].item())
    assert found["tuned"].scores["lm_eval_loss.tiny_last.perplexity"].items == pytest.approx(expected, rel=1e-4)


def test_both_sides_have_the_same_instrument_and_can_be_recorded(found):
    base, tuned = found["base"].scores, found["tuned"].scores
    assert base.keys() == tuned.keys()
    assert {n: s.instrument for n, s in base.items()} == {n: s.instrument for n, s in tuned.items()}
    assert base["lm_eval.tiny_choose.acc"].instrument.startswith("lm-eval 0.4.")
    assert ", tiny_choose v2.0, 0 shots " in base["lm_eval.tiny_choose.acc"].instrument
    Entry("e", "tuned", {}, 0, "test", tuned)


def test_answers_say_what_was_written_and_whether_it_was_right(found):
    answers = [a for a in found["tuned"].answers if a.id.startswith("tiny_write/")]
    assert [a.id for a in answers] == [f"tiny_write/{i}" for i in range(N)]
    strict = found["tuned"].scores["lm_eval.tiny_write.exact_match_strict"].items
    assert [a.verdict for a in answers] == ["right" if item else "wrong" for item in strict]
    assert {a.verdict for a in answers} == {"right", "wrong"}
    assert all(a.expected in WORDS and a.text and "w17" not in a.text.split() for a in answers)
    assert {a.why for a in answers} == {"exact_match, strict"}


def test_an_adapter_of_zeros_changes_no_item(folder):
    models = models_of(lora(llama()))  # B = 0
    probe = LmEval(["tiny_choose", "tiny_write", "tiny_roll"], folder, limit=6)
    base, tuned = (measured(probe, models, side) for side in ("base", "tuned"))
    assert base == tuned
    assert probe.size == 18


def test_tied_weights_and_the_tokenizer_stay_as_they_are(folder):
    model, tok = lora(llama(tie_word_embeddings=True)), tokenizer()
    shake(model)
    tok.pad_token = None
    before = digest(model)
    measured(LmEval(["tiny_last"], folder, limit=3), models_of(model, tok=tok), "tuned")
    assert digest(model) == before
    assert tok.pad_token is None


def test_the_callers_random_numbers_bars_and_log_are_left_alone(folder, tuned_model, capfd):
    import lm_eval.api.task
    import tqdm

    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    measured(LmEval(["tiny_choose", "tiny_roll"], folder, num_fewshot=2, limit=4), models_of(tuned_model), "tuned")
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert lm_eval.api.task.tqdm is tqdm.tqdm
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_batch_size_writes_the_same_answers(folder, dtype):
    model = made().to(dtype)
    probe = LmEval(["tiny_write", "tiny_parts"], folder)
    one, seven = (measured(probe, models_of(model, size), "tuned") for size in (1, 7))
    assert one == seven


def test_another_batch_size_changes_log_likelihoods_by_rounding_alone(folder, tuned_model):
    probe = LmEval(["tiny_choose", "tiny_roll"], folder)
    one, seven = (measured(probe, models_of(tuned_model, size), "tuned").scores for size in (1, 7))
    for name, score in one.items():
        assert score.value == pytest.approx(seven[name].value, rel=1e-5)
        assert (score.items or ()) == pytest.approx(seven[name].items or (), rel=1e-5)


def test_ties_are_decided_by_the_row_alone(folder, monkeypatch):
    """With a margin so wide that every token is a tie, each is written by itself: as batch size 1 would."""
    import holdfast.drift.probes.lm_eval_host as host

    model = made()
    probe = LmEval(["tiny_write"], folder)
    plain = measured(probe, models_of(model, 1), "tuned")
    monkeypatch.setattr(host, "MARGIN", {torch.float32: 10.0})
    assert measured(probe, models_of(model, 7), "tuned") == plain


def test_other_shots_documents_or_template_are_another_instrument(folder, tuned_model):
    def instrument(**settings):
        probe = LmEval(["tiny_choose"], folder, **settings)
        score = measured(probe, models_of(tuned_model), "base").scores["lm_eval.tiny_choose.acc"]
        return score.instrument, json.dumps(probe.identity)

    variants = [instrument(), instrument(limit=5), instrument(num_fewshot=2), instrument(apply_chat_template=True)]
    assert instrument() == variants[0]
    assert len({a for a, _ in variants}) == len({b for _, b in variants}) == 4
    assert "2 shots" in variants[2][0]


@pytest.mark.slow  # lm-eval's own list is read, as a group may name any task of it
def test_a_group_has_the_items_of_its_tasks(folder, tuned_model, tmp_path):
    for path in folder.glob("*.*"):
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "group.yaml").write_text(GROUP)
    scores = measured(LmEval(["tiny_group"], tmp_path), models_of(tuned_model), "tuned").scores
    whole, parts = scores["lm_eval.tiny_group.acc"], ["tiny_choose", "tiny_last"]
    assert whole.items == sum((scores[f"lm_eval.{task}.acc"].items for task in parts), ())
    assert whole.categories == ("tiny_choose",) * N + ("tiny_last",) * N
    assert fmean(whole.items) == pytest.approx(whole.value)


@pytest.mark.slow  # lm-eval's own list is read
def test_an_unknown_task_is_named_with_what_was_meant(folder):
    with pytest.raises(ProbeError) as caught:
        _ = LmEval(["tiny_chose", "gsm8kk", "tiny_roll"], folder).size
    first, second = caught.value.faults
    assert "no task 'tiny_chose'" in first
    assert "Did you mean 'tiny_choose'" in first
    assert "'gsm8k'" in second


def test_impossible_settings_are_all_named():
    with pytest.raises(ProbeError) as caught:
        LmEval("gsm8k", "/no/such/folder", num_fewshot=-1, limit=0)
    assert len(caught.value.faults) == 4
    with pytest.raises(ProbeError, match="twice: a"):
        LmEval(["a", "b", "a"])


def variant(tmp_path, folder, text, *changes):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "task.yaml").write_text(text.format(folder=folder))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def test_a_metric_without_a_direction_is_refused(folder, tmp_path):
    own = variant(tmp_path, folder, PARTS, (", higher_is_better: true}}\n  - {{metric: m", "}}\n  - {{metric: m"))
    with pytest.raises(ProbeError, match="higher_is_better is known for 'part'"):
        _ = LmEval(["tiny_parts"], own).size


def test_a_metric_that_the_task_does_not_declare_is_refused(folder, tmp_path, tuned_model):
    middle = "  - {{metric: middle, aggregation: median, higher_is_better: true}}\n"
    own = variant(tmp_path, folder, PARTS, (middle, ""))
    with pytest.raises(ProbeError, match="'middle'"):
        LmEval(["tiny_parts"], own, limit=3).measure(models_of(tuned_model), "base", lambda n: None)


def test_code_from_the_hub_is_refused(folder, tmp_path):
    own = variant(tmp_path, folder, WRITE, ("metric: exact_match,", "metric: someones_metric, hf_evaluate: true,"))
    with pytest.raises(ProbeError, match="'someones_metric' is code from the hub"):
        _ = LmEval(["tiny_write"], own).size


def test_tasks_that_cannot_be_measured_say_why(folder, tmp_path):
    own = variant(tmp_path, folder, ROLL, ("metadata:", "unsafe_code: true\nnum_fewshot: 0\nmetadata:"))
    with pytest.raises(ProbeError) as caught:
        _ = LmEval(["tiny_roll"], own, num_fewshot=2).size
    assert [("fixed to 0 shots" in f, "runs code" in f) for f in caught.value.faults] == [(True, False), (False, True)]


def test_data_that_is_not_there_and_a_broken_file_are_named(folder, tmp_path):
    own = variant(tmp_path, folder, ROLL, ("roll.jsonl", "nowhere.jsonl"))
    with pytest.raises(ProbeError, match="tiny_roll cannot be loaded: FileNotFoundError"):
        _ = LmEval(["tiny_roll"], own).size
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ProbeError, match="cannot be read(.|\n)*broken.yaml"):
        _ = LmEval(["tiny_roll"], own).size


def test_answers_longer_than_the_model_are_an_error_and_cut_prompts_a_warning(folder, tmp_path, tuned_model):
    own = variant(tmp_path, folder, WRITE, ("max_gen_toks: 6", "max_gen_toks: 500"))
    with pytest.raises(ProbeError, match="max tokens to generate"):
        LmEval(["tiny_write"], own).measure(models_of(tuned_model), "base", lambda n: None)
    own = variant(tmp_path, folder, WRITE, ("max_gen_toks: 6", "max_gen_toks: 125"), ("until: [w17]", "until: []"))
    with pytest.warns(UserWarning, match="lm-eval cut .* on the left"):
        LmEval(["tiny_write"], own, limit=2).measure(models_of(tuned_model), "base", lambda n: None)


def test_a_failure_inside_lm_eval_says_where(folder, tmp_path, tuned_model):
    own = variant(tmp_path, folder, LAST, ('" {{{{answer}}}}"', '"{{{{answer}}}}"'))  # grows together with the question
    with pytest.raises(ProbeError, match=r"tiny_last: assert len\(continuation_enc\) > 0"):
        LmEval(["tiny_last"], own).measure(models_of(tuned_model), "base", lambda n: None)


def test_no_template_is_an_error(folder, tuned_model):
    tok = tokenizer()
    tok.chat_template = None
    probe = LmEval(["tiny_write"], folder, apply_chat_template=True)
    with pytest.raises(ProbeError, match="no chat template"):
        probe.measure(models_of(tuned_model, tok=tok), "base", lambda n: None)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, folder):
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ProbeError, match=r"pip install 'holdfast\[lm-eval\]'"):
        _ = LmEval(["tiny_roll"], folder).size


@pytest.mark.slow
def test_lm_evals_own_list_is_read_where_a_task_is_not_in_the_folder(folder):
    with pytest.raises(ProbeError, match="hellaswag cannot be loaded"):  # its data is on the hub, and we are offline
        _ = LmEval(["hellaswag"], folder).size
