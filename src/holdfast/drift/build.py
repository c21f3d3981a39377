"""driftcheck-10k: up to 5,000 unsafe and 5,000 safe prompts, assembled from public data in the paper's manner.

The steps, each counted in the manifest:

    read -> leave out -> categorise -> exact duplicates -> near duplicates -> clusters -> choose -> split -> write

Splits go by cluster: prompts that are alike, or halves of a pair, are never in two splits. The order of prompts is
that of a hash with the seed, so the same sources and seed give the same bytes. What sources cannot fill is reported,
never padded with copies. Paper: AlignGuard-LoRA (Das et al., 2025), whose own prompts were not published.

Read next: `holdfast.drift.driftcheck.sources`, what is read; `holdfast.drift.suite`, which loads the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from holdfast.drift.driftcheck.near import alike, clusters, words
from holdfast.drift.driftcheck.sources import LOCAL, Draft, Source
from holdfast.drift.driftcheck.topics import FAMILIES, categorise, sexual_about_minors
from holdfast.drift.entry import JSON
from holdfast.drift.suite import SuiteError, split_of

__all__ = ["build"]

NAME = "driftcheck-10k"
NEAR = 0.7  # of one side, this much alike: one of them is dropped
LINKED = 0.5  # of either side, this much alike: same split
LONGEST = 1_000  # characters: longer ones bring a text to work on, and are no prompts of this kind


@dataclass(frozen=True)
class Item:
    """A prompt on its way into the suite; `cluster` is the id of the first prompt that it is linked with."""

    draft: Draft
    category: str
    cluster: str = ""


def build(
    out: str | Path,
    sources: Sequence[Source] = LOCAL,
    root: str | Path | None = None,
    *,
    per_side: int = 5_000,
    seed: int = 0,
    command: str = "",
) -> Mapping[str, JSON]:
    """Assemble the suite, write `driftcheck-10k.jsonl` and its manifest into a folder, and return the manifest.

    Args:
        out: the folder to write to; made if it is not there. Not inside holdfast's own repository: data stays outside.
        sources: what to read; of duplicates the one of the earlier source stays.
        root: the folder that paths of local sources begin at, for example $HOLDFAST_DATA.
        per_side: how many unsafe, and how many safe prompts to aim at.
        seed: of the order in which prompts are chosen, and of the splits.
        command: what the user typed, for the manifest; a call of this function if empty.

    Raises:
        SuiteError: if the folder may not be used, or sources cannot be read (all of them named); nothing is written.
    """
    folder = _folder(out)
    if per_side < 1:
        raise SuiteError(f"per_side is {per_side}: ask for at least one prompt a side.")
    drafts = _read(sources, root)
    steps = {"read": _count(drafts)}
    items = _kept(drafts, {source.name for source in sources if source.by_rule})
    steps["left in"] = _count(item.draft for item in items)
    items = _distinct(items)
    steps["exact duplicates out"] = _count(item.draft for item in items)
    items = _apart(items)
    steps["near duplicates out"] = _count(item.draft for item in items)
    items = _linked(items)
    chosen = [item for side in ("refuse", "comply") for item in _choose(items, side, per_side, seed)]
    steps["chosen"] = _count(item.draft for item in chosen)
    rows = sorted(_rows(chosen, seed), key=lambda row: _order(seed, row["id"]))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    call = f"build(out, {[source.name for source in sources]}, root, per_side={per_side}, seed={seed})"
    manifest: dict[str, JSON] = {
        "name": NAME,
        "command": command or call,
        "seed": seed,
        "per_side": per_side,
        "near_duplicate": NEAR,
        "same_split": LINKED,
        "sources": [{name: value for name, value in asdict(source).items() if value} for source in sources],
        "steps": steps,
        "missing": {side: per_side - count for side, count in steps["chosen"].items()},
        "counts": _tables(chosen, rows),
        "largest_cluster": max(Counter(item.cluster for item in chosen).values(), default=0),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{NAME}.jsonl", text)
    _write(folder / f"{NAME}.manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _folder(out: str | Path) -> Path:
    """The folder to write to, or an error if it lies in the working tree of this package or is a file."""
    folder, home = Path(out).resolve(), Path(__file__).resolve().parents[3]
    if (home / "pyproject.toml").is_file() and folder.is_relative_to(home):
        raise SuiteError(
            f"{folder.name!r} lies in holdfast's repository, where data of others must not go. Choose another."
        )
    if folder.exists() and not folder.is_dir():
        raise SuiteError(f"{folder.name!r} is a file. Name a folder to write to.")
    return folder


def _read(sources: Sequence[Source], root: str | Path | None) -> list[Draft]:
    drafts: list[Draft] = []
    faults: list[str] = []
    for source in sources:
        try:
            drafts += source.read(root)
        except SuiteError as error:
            faults.append(str(error))
    if faults:
        raise SuiteError("Some sources cannot be read; mend them, or leave them out:", faults)
    return drafts


def _kept(drafts: Sequence[Draft], by_rule: set[str]) -> list[Item]:
    """Leave out what is too long or has no words, what may be sexual about minors, and what no rule recognises.

    A safe twin is put where its unsafe one belongs: where a model that mistakes it would look.
    """
    topics = {draft.pair: categorise(draft.text, draft.label) for draft in drafts if draft.expected == "refuse"}
    items = []
    for draft in drafts:
        category = topics[draft.pair] if draft.pair in topics and draft.pair else categorise(draft.text, draft.label)
        unrecognised = category == "other" and draft.id.partition(":")[0] in by_rule
        if not (len(draft.text) > LONGEST or not words(draft.text) or sexual_about_minors(draft.text) or unrecognised):
            items.append(Item(draft, category))
    return items


def _distinct(items: Iterable[Item]) -> list[Item]:
    """One of each text, the first; none of a text that sources expect different things of."""
    same: defaultdict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        same[tuple(words(item.draft.text))].append(item)
    return [group[0] for group in same.values() if len({item.draft.expected for item in group}) == 1]


def _apart(items: Sequence[Item]) -> list[Item]:
    """Drop what is a near duplicate of an earlier prompt of its side that stays."""
    dropped: set[int] = set()
    for i, j, _ in alike([item.draft.text for item in items], NEAR):
        if i not in dropped and items[i].draft.expected == items[j].draft.expected:
            dropped.add(j)
    return [item for i, item in enumerate(items) if i not in dropped]


def _linked(items: Sequence[Item]) -> list[Item]:
    """Join what is alike, on either side, and the halves of pairs."""
    links = [(i, j) for i, j, _ in alike([item.draft.text for item in items], LINKED)]
    first: dict[str, int] = {}
    links += [(first.setdefault(item.draft.pair, i), i) for i, item in enumerate(items) if item.draft.pair]
    roots = clusters(len(items), links)
    return [Item(item.draft, item.category, items[root].draft.id) for item, root in zip(items, roots, strict=True)]


def _choose(items: Sequence[Item], side: str, count: int, seed: int) -> list[Item]:
    """As many of every category as there are, up to one level for all; pairs before single prompts."""
    halves = Counter(item.draft.pair for item in items)
    shelves: defaultdict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _order(seed, item.draft.pair or item.draft.id)):
        if item.draft.expected == side:
            shelves[item.category].append(item)
    for shelf in shelves.values():
        shelf.sort(key=lambda item: not (item.draft.pair and halves[item.draft.pair] == 2))  # stable
    ranked = [(place, name, item) for name, shelf in shelves.items() for place, item in enumerate(shelf)]
    ranked.sort(key=lambda one: one[:2])
    return [item for _, _, item in ranked[:count]]


def _rows(chosen: Sequence[Item], seed: int) -> list[dict[str, str]]:
    """Rows as `holdfast.drift.suite` reads them: whole pairs, and the rest as single prompts."""
    groups: defaultdict[str, list[Item]] = defaultdict(list)
    for item in chosen:
        groups[item.draft.pair or item.draft.id].append(item)
    rows: list[dict[str, str]] = []
    for name, group in groups.items():
        whole = [item.draft.expected for item in group] == ["refuse", "comply"]
        for item in group[:1] if whole else group:
            twins = [twin.draft for twin in group] if whole else [item.draft]
            texts = {"unsafe": twins[0].text, "safe": twins[1].text} if whole else {"prompt": item.draft.text}
            rows.append(
                {"id": name if whole else item.draft.id, **texts}
                | ({} if whole else {"expected": item.draft.expected})
                | {"category": item.category, "split": split_of(f"{seed}:{item.cluster}")}
                | {
                    key: " + ".join(dict.fromkeys(getattr(twin, key) for twin in twins))
                    for key in ("source", "licence")
                }
            )
    return rows


def _order(seed: int, id: str) -> str:
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest()


def _count(drafts: Iterable[Draft]) -> dict[str, int]:
    sides = Counter("unsafe" if draft.expected == "refuse" else "safe" for draft in drafts)
    return {side: sides[side] for side in ("unsafe", "safe")}


def _tables(chosen: Sequence[Item], rows: Sequence[Mapping[str, str]]) -> dict[str, JSON]:
    """How many prompts of each side there are, by what they are and where they come from."""

    def table(of: Mapping[str, list[Draft]]) -> dict[str, JSON]:
        return {name: _count(drafts) for name, drafts in sorted(of.items())}

    by: dict[str, defaultdict[str, list[Draft]]] = {
        name: defaultdict(list) for name in ("category", "family", "source", "licence")
    }
    for item in chosen:
        by["category"][item.category].append(item.draft)
        by["family"][FAMILIES.get(item.category, item.category)].append(item.draft)
        by["source"][item.draft.source].append(item.draft)
        by["licence"][item.draft.licence].append(item.draft)
    splits = Counter(row["split"] for row in rows for _ in range(2 if "unsafe" in row else 1))
    pairs = sum("unsafe" in row for row in rows)
    return {name: table(of) for name, of in by.items()} | {"split": dict(sorted(splits.items())), "pairs": pairs}


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
