"""Where prompts come from: public data sets, described column by column, read through `datasets`.

A local folder and a data set on the hub are read by the same call, as a stream, so nothing is copied or cached for a
local file. `LOCAL` describes the folder that HOLDFAST_DATA names, `PAPER` the data sets of the hub that are reported
for DriftCheck (AlignGuard-LoRA, Das et al., 2025). Licences are what their makers state: check them before you share.

Read next: `holdfast.drift.build`, which makes a suite of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from holdfast.drift.driftcheck.topics import TOPICS
from holdfast.drift.suite import Expected, SuiteError

__all__ = ["LOCAL", "PAPER", "Draft", "Source"]


@dataclass(frozen=True)
class Draft:
    """A prompt as a source has it: `label` is the source's own topic and `pair` its pair, or empty."""

    id: str
    text: str
    expected: Expected
    label: str
    source: str
    licence: str
    pair: str = ""


@dataclass(frozen=True)
class Source:
    """A data set and the meaning of its columns.

    Args:
        name: what its prompts are labelled with.
        path: a folder (inside the root, if one is given) or the id of a data set on the hub.
        licence: as its makers state it; `columns` may name a column that knows better.
        file, config, split, revision: which part of it; a file is read from the folder or from the hub's repository.
        columns: our field -> its column, for "text", and if it has them "expected", "pair", "licence", "source". The
            first turn is taken of a text that is a list, or a dialogue "Human: ... Assistant: ...".
        labels: columns that say what a prompt is about; the first whose value we know decides.
        expected: `"refuse"` or `"comply"` for all rows; or a mapping from the values of the column "expected", and rows
            of other values are left out.
        keep: column -> values; rows with other values are left out.
        flags: column -> our category, for sources that mark each topic by 0 or 1. Rows without a mark are left out.
        by_rule: keep only rows that a keyword rule recognises: for dialogues that nobody labelled.
        limit: read no more rows than this.
    """

    name: str
    path: str
    licence: str
    expected: Expected | Mapping[str, Expected]
    file: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: {"text": "prompt"})
    labels: tuple[str, ...] = ()
    keep: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    by_rule: bool = False
    limit: int | None = None

    def read(self, root: str | Path | None = None) -> Iterator[Draft]:
        """The prompts of this source, in its order.

        Raises:
            SuiteError: if `datasets` is not there, the data set cannot be read, or a column is missing.
        """
        for number, row in enumerate(islice(self._rows(root), self.limit)):
            if missing := sorted({*self.columns.values(), *self.labels, *self.keep, *self.flags} - row.keys()):
                raise SuiteError(f"{self.name}: no column {', '.join(missing)}; it has {', '.join(sorted(row))}")
            if any(row[column] not in values for column, values in self.keep.items()):
                continue
            marks = [topic for column, topic in self.flags.items() if row[column] == 1]
            draft = self._draft(number, row, marks)
            if draft is not None and (marks or not self.flags):
                yield draft

    def _rows(self, root: str | Path | None) -> Iterator[dict[str, object]]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise SuiteError(f"{self.name}: reading data sets needs `datasets`: pip install 'holdfast[trl]'") from None
        path = Path(root, self.path) if root is not None else Path(self.path)
        where = str(path) if path.is_dir() else self.path
        if not path.is_dir() and self.path.count("/") != 1:
            raise SuiteError(f"{self.name}: there is no folder {self.path!r}, and a data set of the hub has one slash")
        try:
            yield from load_dataset(
                where, self.config, split=self.split, data_files=self.file, revision=self.revision, streaming=True
            )
        except Exception as error:  # of many kinds: no network, no such data set, a gate, a broken file
            told = str(error).replace(str(root), "ROOT") if root is not None else str(error)
            raise SuiteError(
                f"{self.name}: {self.path!r} cannot be read: {type(error).__name__}: {told:.200}"
            ) from error

    def _draft(self, number: int, row: Mapping[str, object], marks: list[str]) -> Draft | None:
        given = {name: str(row[column] or "") for name, column in self.columns.items() if name != "text"}
        expected = self.expected if isinstance(self.expected, str) else self.expected.get(given.get("expected", ""))
        text = _first_turn(row[self.columns["text"]])
        if expected is None or not text:
            return None
        known = [*marks, *(str(row[column]) for column in self.labels if str(row[column]) in TOPICS)]
        source, licence = given.get("source") or self.name, given.get("licence") or self.licence
        pair = f"{self.name}/{given['pair']}" if given.get("pair") else ""
        return Draft(f"{self.name}:{number}", text, expected, known[0] if known else "", source, licence, pair)


def _first_turn(value: object) -> str:
    r"""What the user says first, with its white space made plain.

    >>> _first_turn("\n\nHuman: who are you?\n\nAssistant: A model."), _first_turn(["Hi", "And then?"])
    ('who are you?', 'Hi')
    """
    text = str((value[0] if value else "") if isinstance(value, list | tuple) else value or "")
    if text.lstrip().startswith("Human:"):
        text = text.lstrip().removeprefix("Human:").split("\n\nAssistant:")[0]
    return " ".join(text.split())


SIDES: Mapping[str, Expected] = {"unsafe": "refuse", "safe": "comply"}
DRAFT = {
    "text": "prompt", "expected": "side", "pair": "pair_id", "source": "source",
    "licence": "licence",
}  # fmt: skip
TOPIC = ("category", "family")
ALONE = {"input": ("", None)}  # instructions that stand by themselves, without a text to work on

LOCAL: tuple[Source, ...] = (
    Source("driftcheck_dev", "driftcheck", "see rows", SIDES, "driftcheck_dev.jsonl", columns=DRAFT, labels=TOPIC),
    Source("driftcheck_test", "driftcheck", "see rows", SIDES, "driftcheck_test.jsonl", columns=DRAFT, labels=TOPIC),
    Source(
        "xstest", "overrefusal", "CC-BY-4.0", SIDES, "xstest_shared.jsonl",
        columns={"text": "prompt", "expected": "label"}, labels=("type",),
    ),
    Source("jailbreakbench", "safety", "MIT", "refuse", "jbb_harmful.jsonl", labels=("category",)),
    Source("strongreject", "safety", "MIT", "refuse", "strongreject_shared.jsonl", labels=("category",)),
    Source("harmbench", "safety", "MIT", "refuse", "harmbench_standard.jsonl", labels=("category",)),
    Source("advbench", "safety", "MIT", "refuse", "advbench_prompts.jsonl"),
    Source("mt_bench", "benign", "Apache-2.0", "comply", "mt_bench_question.jsonl", columns={"text": "turns"}),
    Source(
        "self_instruct", "benign", "Apache-2.0", "comply", "self_instruct_seed_tasks.jsonl",
        columns={"text": "instruction"},
    ),
    Source(
        "dolly", "benign", "CC-BY-SA-3.0", "comply", "dolly_a.jsonl", columns={"text": "instruction"}, keep=ALONE
    ),
)  # fmt: skip
"""What lies in the folder of HOLDFAST_DATA."""

PAPER: tuple[Source, ...] = (
    Source("mmlu", "cais/mmlu", "MIT", "comply", config="all", split="test", columns={"text": "question"}),
    Source(
        "moderation", "mmathys/openai-moderation-api-evaluation", "MIT", "refuse", keep={"S3": (0, None)},
        flags={"V": "violence", "H": "hate", "S": "explicit_content", "SH": "self_harm", "HR": "hate"},
    ),
    Source(
        "hatecheck", "Paul/hatecheck", "CC-BY-4.0", "refuse", split="test", keep={"label_gold": ("hateful",)},
        columns={"text": "test_case"}, labels=("label_gold",),
    ),
    Source(
        "hh_rlhf", "Anthropic/hh-rlhf", "MIT", "refuse", columns={"text": "chosen"}, by_rule=True, limit=40_000
    ),
)  # fmt: skip
"""The hub's data sets that are reported for the paper's 10,000 prompts; not run by us: see docs/driftcheck.md."""
