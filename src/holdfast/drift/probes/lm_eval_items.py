"""What lm-eval's numbers become: a score for each metric, with one item for each document, and answers to read.

    mean                 items are the metric itself            value = mean(items)
    perplexity           items are −log p                       value = exp(mean(items))
    per word or byte     items are −log p_i · n / Σ weights     value = exp(mean(items)), or the mean for bits

Whether the items give the value is checked against lm-eval's own aggregate; where they do not, the value stands alone.
Read next: `holdfast.drift.score`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from ..probe import Answer, Found, ProbeError, digest_of
from ..score import Score
from .lm_eval_host import lm_eval_part
from .lm_eval_tasks import digest_of_task

__all__ = ["found_by"]


def found_by(results: Mapping[str, Any], loaded: Mapping[str, Mapping[str, Any]], version: str) -> Found:
    """Scores of every task and group, and the answers of tasks that write.

    Args:
        results: of lm-eval's `evaluate`, with samples.
        loaded: the tasks and groups, by name.
        version: of lm-eval.

    Raises:
        ProbeError: names every metric that is no number, or of which no direction is known.
    """
    scores: dict[str, Score] = {}
    answers: list[Answer] = []
    values, faults = _values(results)
    for name, task in loaded["tasks"].items():
        shots = task.get_config("num_fewshot")
        instrument = f"lm-eval {version}, {name} v{task.VERSION}, {shots} shots {digest_of_task(task)}"
        rows = sorted(results["samples"][name], key=lambda row: row["doc_id"])
        if task.OUTPUT_TYPE == "generate_until":
            answers += _answers(name, task, rows, instrument)
        for score, metric, kind, value in values[name]:
            measured = [row.get(metric) for row in rows if row["filter"] == kind]
            items = _items(measured, task.aggregation().get(metric), value)
            n = sum(one is not None for one in measured) if items is None else len(items)
            scores[score] = Score(value, n=n, items=items, instrument=instrument)
    for name, group in loaded["groups"].items():
        tasks = [part.task_name for part in group.get_all_tasks()]
        digest = digest_of([digest_of_task(loaded["tasks"][task]) for task in tasks])
        instrument = f"lm-eval {version}, {name} v{group.version}, {len(tasks)} tasks {digest}"
        for score, _, _, value in values[name]:
            parts = {task: scores.get(score.replace(f".{name}.", f".{task}.", 1)) for task in tasks}
            scores[score] = _whole(parts, value, instrument)
    if faults:
        raise ProbeError("What lm-eval measured cannot be recorded:", faults)
    return Found(scores, tuple(answers))


def _values(results: Mapping[str, Any]) -> tuple[dict[str, list[tuple[str, str, str, float]]], list[str]]:
    """By task or group, what each score is called, metric, filter and value; and what is wrong with them."""
    values: dict[str, list[tuple[str, str, str, float]]] = {}
    faults = []
    for name, aggregated in results["results"].items():
        values[name] = []
        for key, value in aggregated.items():
            metric, _, kind = key.rpartition(",")
            if not metric or metric.endswith("_stderr"):
                continue
            higher = results["higher_is_better"].get(name, {}).get(metric)
            if not isinstance(higher, bool):
                faults.append(f"{name}: whether a higher {metric!r} is better is not known: give it in the metric_list")
            elif not isinstance(value, Real):
                faults.append(f"{name}: {metric!r} is {value!r:.40}, not a number")
            else:
                ending = metric if kind == "none" else f"{metric}_{kind}"
                family = "lm_eval" if higher else "lm_eval_loss"
                values[name].append((f"{family}.{name}.{ending}", metric, kind, float(value)))
    return values, faults


def _items(measured: Sequence[Any], aggregation: object, value: float) -> tuple[float, ...] | None:
    """One number per document, or per part of one, whose mean is the value, or the value's logarithm for a perplexity.

    None for what is no mean over documents: F1, BLEU, Matthews' correlation, Brier's score, a median.
    """
    registry = lm_eval_part(".api.registry").AGGREGATION_REGISTRY
    known = (name for name in registry if registry[name] is aggregation)
    name = next(known, "its own") if aggregation else "mean"  # as lm-eval does where a task names none
    if None in measured:
        return None  # a document without this metric: items of two sides would not be of the same documents
    if name == "its own" and all(isinstance(one, list) for one in measured):
        measured = [part for one in measured for part in one]  # IFEval: every instruction of every prompt
    items: list[float] = []
    if name in ("mean", "perplexity", "its own") and all(isinstance(one, Real) for one in measured):
        items = [-float(one) if name == "perplexity" else float(one) for one in measured]
    elif name in ("weighted_perplexity", "bits_per_byte"):  # the weights are words or bytes: the same for both sides
        unit = sum(weight for _, weight in measured) / len(measured) * (math.log(2) if name == "bits_per_byte" else 1)
        items = [-logprob / unit for logprob, _ in measured]
    return tuple(items) if _gives(items, value, of_logarithms="perplexity" in name) else None


def _gives(items: Sequence[float], value: float, of_logarithms: bool = False) -> bool:
    """Whether the mean of the items is the value that lm-eval aggregated.

    >>> _gives((1, 0, 0, 1), 0.5), _gives((1, 0, 0, 1), 1.0), _gives((), 0.0)
    (True, False, False)
    """
    mean = math.fsum(items) / len(items) if items else math.nan
    return math.isclose(math.exp(mean) if of_logarithms else mean, value, rel_tol=1e-6, abs_tol=1e-9)


def _whole(parts: Mapping[str, Score | None], value: float, instrument: str) -> Score:
    """A group's score: all items of its tasks, with the task of each, if their mean is the group's value."""
    items = [(item, task) for task, score in parts.items() for item in (score and score.items) or ()]
    if _gives([item for item, _ in items], value):
        numbers, tasks = zip(*items, strict=True)
        return Score(value, items=numbers, categories=tasks, instrument=instrument)
    return Score(value, n=sum(score.n or 0 for score in parts.values() if score) or None, instrument=instrument)


def _answers(name: str, task: Any, rows: Sequence[Mapping[str, Any]], instrument: str) -> Iterator[Answer]:
    """What was written, one answer per document, judged by the first metric that is 0 or 1 under the first filter."""
    better = task.higher_is_better()
    for row in (row for row in rows if row["filter"] == rows[0]["filter"]):
        judged = [metric for metric in row["metrics"] if better.get(metric) and _right_or_wrong(row[metric])]
        metric = judged[0] if judged else ""
        yield Answer(
            id=f"{name}/{row['doc_id']}",
            prompt=str(task.doc_to_text(row["doc"])),
            text=str(row["resps"][0][0]),
            verdict=("right" if row[metric] else "wrong") if metric else "",
            expected=str(row["target"]),
            category=name,
            instrument=instrument,
            why="" if row["filter"] == "none" or not metric else f"{metric}, {row['filter']}",
        )


def _right_or_wrong(value: object) -> bool:
    return isinstance(value, Real) and float(value) in (0.0, 1.0)
