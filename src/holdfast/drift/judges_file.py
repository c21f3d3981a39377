"""A file that names the judges of a measurement: YAML or JSON, read whole, with every fault at once.

    judges:
      - {name: mine, measures: refusal, kind: classifier, model: ./mine, reads: {NO: refusal, YES: compliance}}
      - {name: second, measures: harm, kind: chat, model: hub/model, revision: 1a2b3c4}

Models are loaded only when the whole file is right. Read next: docs/judges.md, what each key means.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from holdfast.drift.harm import HARM_VERDICTS, HarmChat, HarmClassifier, HarmJudge, faults_of_words
from holdfast.drift.refusal import VERDICTS, Judge, JudgeError
from holdfast.drift.refusal_judges import ChatJudge, ClassifierJudge

__all__ = ["read_judges"]

COMMON = ("name", "measures", "kind", "model", "revision", "device", "batch_size")
REQUIRED = ("name", "measures", "kind", "model")
KINDS: Mapping[tuple[str, str], tuple[Callable[..., Any], tuple[str, ...]]] = {
    ("refusal", "classifier"): (ClassifierJudge, ("reads", "template", "certain")),
    ("refusal", "chat"): (ChatJudge, ()),
    ("harm", "classifier"): (HarmClassifier, ("reads", "template", "certain")),
    ("harm", "chat"): (HarmChat, ("reads", "as_turns")),
}
"""By what it measures and its kind: what makes the judge, and the keys that it has besides the common ones."""
CHOICES: Mapping[str, tuple[str, ...]] = {"measures": ("refusal", "harm"), "kind": ("classifier", "chat")}
MEANINGS: Mapping[str, tuple[str, ...]] = {"refusal": VERDICTS, "harm": HARM_VERDICTS}
MOST_JUDGES = 2  # of one measure

Row = Mapping[object, object]


def read_judges(path: str | Path) -> tuple[list[Judge], list[HarmJudge]]:
    """The judges of refusals and the judges of harm that a file names, loaded, in its order.

    Args:
        path: of a UTF-8 file; JSON if it ends in .json, else YAML. A `model` that is a folder beside the file is that
            folder; anything else is a path or a hub id.

    Raises:
        JudgeError: names every fault of every entry before a model is loaded; then every judge that does not load.
    """
    path = Path(path)
    rows = list(_rows(path))
    if faults := [f"{_called(n, row)}: {fault}" for n, row in rows for fault in _faults(row)] + list(_shared(rows)):
        raise JudgeError(f"{path} names judges that cannot be used:", faults)
    made: dict[str, list[Any]] = {"refusal": [], "harm": []}
    for number, row in rows:
        settings = {str(key): value for key, value in cast(Row, row).items()}
        measures, kind = str(settings.pop("measures")), str(settings.pop("kind"))
        beside = path.parent / str(settings["model"])
        settings["model"] = beside if beside.is_dir() else settings["model"]
        try:
            made[measures].append(KINDS[measures, kind][0](**settings))
        except JudgeError as error:
            faults.append(f"{_called(number, row)}: {error}")
    if faults:
        raise JudgeError(f"{path} names judges that cannot be used:", faults)
    return made["refusal"], made["harm"]


# ---- the file ------------------------------------------------------------------------------------------------------
def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """Number and content of each entry; whatever is wrong around them is an error."""
    faults: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = _json(text, faults) if path.suffix == ".json" else _yaml(text, faults)
    except OSError as error:
        raise JudgeError(f"The file of judges {path} cannot be read ({error.strerror}).") from None
    except JudgeError:
        raise
    except (ValueError, RecursionError) as error:  # of text, of JSON, and of YAML's own values, such as its dates
        raise JudgeError(f"The file of judges {path} is neither YAML nor JSON in UTF-8 ({error}).") from None
    if isinstance(tree, Mapping):
        faults += [_unknown(key, ["judges"]) for key in tree if key != "judges"]
    judges = tree.get("judges") if isinstance(tree, Mapping) else None
    if not isinstance(judges, list) or not judges:
        faults.append(f"it must have a list `judges:` with at least one entry, got {judges!r:.40} (docs/judges.md)")
    if faults:
        raise JudgeError(f"{path} is no file of judges:", faults)
    yield from enumerate(cast("list[object]", judges), 1)


def _json(text: str, faults: list[str]) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        faults.extend(_twice([key for key, _ in pairs]))
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _yaml(text: str, faults: list[str]) -> object:
    try:
        import yaml
    except ImportError:
        raise JudgeError(
            "A YAML file of judges needs pyyaml: pip install 'holdfast[cli]', or write the file as JSON (.json)."
        ) from None

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            where = f" (line {node.start_mark.line + 1})"
            faults.extend(fault + where for fault in _twice([str(key.value) for key, _ in node.value]))
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader=Once)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _twice(keys: list[str]) -> list[str]:
    return [f"{key!r} is given twice: keep one" for key in dict.fromkeys(keys) if keys.count(key) > 1]


# ---- one entry -----------------------------------------------------------------------------------------------------
def _called(number: int, row: object) -> str:
    name = row.get("name") if isinstance(row, Mapping) else None
    return f"judge {number}" + (f" ({name!r:.60})" if isinstance(name, str) else "")


def _faults(row: object) -> Iterator[str]:
    """What is wrong with one entry by itself."""
    if not isinstance(row, Mapping):
        yield f"it must be a mapping of settings, got {row!r:.40}"
        return
    measures, kind = (row.get(key) if isinstance(row.get(key), str) else "" for key in ("measures", "kind"))
    everywhere = dict.fromkeys(key for _, own in KINDS.values() for key in own)
    maker = KINDS.get((str(measures), str(kind)))
    own = maker[1] if maker else tuple(everywhere)
    for key in row:
        if key in everywhere and key not in own:
            yield f"{key} is no setting of a {kind} judge of {measures}"
        elif key not in (*COMMON, *own):
            yield _unknown(key, [*COMMON, *own])
    for key in REQUIRED + (("reads",) if kind == "classifier" else ()):
        if key not in row:
            yield f"{key} is missing"
    for key in ("name", "model", "revision", "device", "template"):
        if key in row and not (isinstance(value := row[key], str) and value.strip()):
            yield f"{key} must be a text that is not empty, got {value!r:.40}" + " (put it in quotes)" * bool(value)
    for key, choices in CHOICES.items():
        if key in row and row[key] not in choices:
            yield f"{key} must be one of {', '.join(choices)}, got {row[key]!r:.40}{_near(row[key], choices)}"
    yield from _faults_of_numbers(row)
    if "reads" in own and "reads" in row:
        yield from _faults_of_reads(row["reads"], MEANINGS.get(str(measures), ()))
    if own == ("reads", "as_turns") and isinstance(reads := row.get("reads"), Mapping | None):
        yield from faults_of_words(reads, row.get("as_turns") is True)


def _faults_of_numbers(row: Row) -> Iterator[str]:
    size, certain, turns = row.get("batch_size", 1), row.get("certain", 0.5), row.get("as_turns", False)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        yield f"batch_size must be a whole number of at least 1, got {size!r:.40}"
    if not isinstance(certain, int | float) or isinstance(certain, bool) or not 0 < certain <= 1:
        yield f"certain must be a number above 0 and at most 1, got {certain!r:.40}"
    if not isinstance(turns, bool):
        yield f"as_turns must be true or false, got {turns!r:.40}"
    if isinstance(template := row.get("template"), str) and "{answer}" not in template:
        yield "template does not show {answer}"


def _faults_of_reads(reads: object, meanings: Collection[str]) -> Iterator[str]:
    if not isinstance(reads, Mapping) or not reads:
        yield f"reads must say what each label or word means, such as {{unsafe: harmful}}, got {reads!r:.40}"
        return
    for label, meaning in reads.items():
        if not isinstance(label, str):
            yield f"reads has {label!r:.40}, which is no text: put it in quotes (YAML reads yes, no and 1 as values)"
        if meanings and meaning not in meanings:
            known = ", ".join(meanings)
            yield f"reads: {label!r:.40} is read as {meaning!r:.40}, not one of {known}{_near(meaning, meanings)}"


def _shared(rows: list[tuple[int, object]]) -> Iterator[str]:
    """What is wrong between entries; names are one list, for two probes of one run may name a score by them alike."""
    named = [(row.get("measures"), row.get("name")) for _, row in rows if isinstance(row, Mapping)]
    for measures in CHOICES["measures"]:
        names = [name for measured, name in named if measured == measures]
        if len(names) > MOST_JUDGES:
            yield (
                f"{len(names)} judges measure {measures} ({', '.join(map(str, names))}), at most two are taken: where "
                "two disagree can be looked at, a vote of many hides it"
            )
    for name, times in Counter(name for _, name in named if isinstance(name, str)).items():
        if times > 1:
            yield f"{times} judges are named {name!r}: give each its own name, for scores are called by it"


def _unknown(key: object, known: Collection[str]) -> str:
    return f"unknown key {key!r:.40}" + (_near(key, known) or f" (known: {', '.join(known)})")


def _near(name: object, known: Collection[str]) -> str:
    close = get_close_matches(str(name), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
