"""What `holdfast drift` measures: which probes a suite has, and those that a user's own files and tasks add.

What is left out is said, with the reason: a page that shows no toxicity because nobody measured it must say so.
Read next: docs/drift.md, what each score is and where its limits are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, WrongSetup
from ..drift.ledger import JSON
from .data import Data
from .model import LAB_MODELS

if TYPE_CHECKING:
    from ..drift.probe import Probe
    from ..drift.suite import Suite

LAB, CORE, NONE = "lab", "core", "none"
ANSWER_TOKENS = 64  # a refusal shows in the first sentence
SPLITS = ("test", "validation", "train", "all")


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        suite: `core`, `lab`, `none`, or a file of prompts; empty: `lab` for the lab's models, else `core`.
        split: of the suite; empty: `test` of the lab, all of any other.
        max_new_tokens: where answers to the suite are cut off; the lab knows how long its own are.
        text: by name, text to keep: its perplexity, and the KL from the base on it.
        inputs: by name, prompts: the KL from the base on them (the new task's, say).
        choices: by name, multiple-choice questions.
        exact: by name, questions with exact answers.
        ifeval: instructions in IFEval's format.
        lm_eval: tasks of lm-eval.
        include_path: a folder of lm-eval tasks of one's own.
        limit: so many rows of each file at most, and documents of each lm-eval task.
        judges: a file that names judges.
    """

    suite: str = ""
    split: str = ""
    max_new_tokens: int | None = None
    text: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, str] = field(default_factory=dict)
    ifeval: str = ""
    lm_eval: tuple[str, ...] = ()
    include_path: str = ""
    limit: int | None = None
    judges: str = ""

    def settings(self) -> dict[str, JSON]:
        """What was set, as a ledger records it: without what is empty, and the split, which has a field of its own."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {name: value for name, value in plain.items() if value and name != "split"}


def resolved(wanted: Wanted, model: str) -> Wanted:
    """Fill in the suite and the split that belong to a model.

    Raises:
        WrongSetup: if there is no such split.
    """
    suite = wanted.suite or (LAB if model in LAB_MODELS else CORE)
    split = wanted.split or ("test" if suite == LAB else "all")
    if split not in SPLITS:
        raise WrongSetup(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    faults = []
    if suite == LAB and wanted.max_new_tokens is not None:
        faults.append("max_new_tokens has no effect on the lab, which knows how long its answers are: leave it out")
    if suite == NONE and wanted.judges:
        faults.append("judges read answers to the prompts of a suite, and there is none: give one, or leave them out")
    if wanted.include_path and not wanted.lm_eval:
        faults.append("include_path is a folder of lm-eval's tasks, and none is asked for: name some (--lm-eval)")
    if faults:
        raise ConfigError("what is to be measured", faults)
    if suite == LAB and split not in ("test", "validation"):
        raise WrongSetup("The lab is measured on items that no model was trained on: split test or validation.")
    length = None if suite == LAB else wanted.max_new_tokens or ANSWER_TOKENS
    return replace(wanted, suite=suite, split=split, max_new_tokens=length)


def probes(wanted: Wanted, model: str) -> tuple[list[Probe], dict[str, str]]:
    """Return the probes, and by name what is not measured and why.

    Raises:
        WrongSetup, SuiteError, ProbeError, JudgeError: if something that was asked for cannot be measured.
    """
    wanted = resolved(wanted, model)
    found: list[Probe] = []
    left_out: dict[str, str] = {}
    refusals, harms = _judges(wanted)
    if not harms:
        left_out["harmful answers"] = "no safety judge was given (--judges; docs/judges.md)"
    if wanted.suite == LAB:
        found += _lab(wanted, refusals, harms)
    elif wanted.suite == NONE:
        left_out |= dict.fromkeys(("refusal", "over-refusal"), "no suite was asked for (--suite)")
    else:
        found += of_prompts(_split(wanted), wanted, refusals, harms)
    found += _own(wanted)
    if wanted.suite != LAB:
        for what, given, option in (
            ("perplexity and KL on text", wanted.text, "--text"),
            ("KL on the new task's inputs", wanted.inputs, "--inputs"),
            ("exact answers", wanted.exact, "--exact"),
            ("multiple choice", wanted.choices, "--choices"),
            ("instruction following", wanted.ifeval, "--ifeval"),
        ):
            left_out |= {} if given else {what: f"no file was given ({option})"}
    if not found:
        raise WrongSetup("Nothing is to be measured: give a suite, or a file to measure on (holdfast drift --help).")
    return found, left_out


def _judges(wanted: Wanted) -> tuple[list[Any] | None, list[Any]]:
    if not wanted.judges:
        return None, []
    from ..drift.judges_file import read_judges

    refusals, harms = read_judges(wanted.judges)
    return list(refusals) or None, list(harms)


def _lab(wanted: Wanted, judges: Sequence[Any] | None, harms: Sequence[Any]) -> list[Probe]:
    from ..lab import probes as lab

    return lab.probes("validation" if wanted.split == "validation" else "test", judges=judges, harms=harms)


def _split(wanted: Wanted) -> Suite:
    from ..drift.suite import suite

    found = suite(wanted.suite)
    return found if wanted.split == "all" else found.select(split=wanted.split)  # type: ignore[arg-type]


def of_prompts(suite: Suite, wanted: Wanted, refusals: Sequence[Any] | None, harms: Sequence[Any]) -> list[Probe]:
    """The probes of a suite of prompts."""
    from ..drift.probes.first_tokens_kl import FirstTokensKL
    from ..drift.probes.harm import Harm
    from ..drift.probes.output_kl import OutputKL
    from ..drift.probes.refusal import Refusal
    from ..drift.probes.refusal_margin import RefusalMargin

    length = wanted.max_new_tokens or ANSWER_TOKENS
    found: list[Probe] = [Refusal(suite, refusals, length), RefusalMargin(suite.prompts)]
    if any(prompt.expected == "refuse" for prompt in suite.prompts):
        found.append(FirstTokensKL(suite.prompts))
    if safe := [prompt.text for prompt in suite.prompts if prompt.expected == "comply"]:
        found.append(OutputKL("safe_prompts", safe, prompts=True))
    return found + ([Harm(suite.prompts, harms, length)] if harms else [])


def _own(wanted: Wanted) -> list[Probe]:
    """Probes on the user's own files, and lm-eval's tasks."""
    from ..drift.probes.exact_answer import ExactAnswer
    from ..drift.probes.multiple_choice import MultipleChoice
    from ..drift.probes.output_kl import OutputKL
    from ..drift.probes.perplexity import Perplexity

    found: list[Probe] = []
    for name, path in wanted.text.items():
        texts = _column(path, wanted.limit, "text")
        found += [Perplexity(name, texts), OutputKL(name, texts)]
    for name, path in wanted.inputs.items():
        found.append(OutputKL(name, _column(path, wanted.limit, "prompt", "question", "messages"), prompts=True))
    found += [MultipleChoice.read(path, name, wanted.limit) for name, path in wanted.choices.items()]
    found += [ExactAnswer.read(path, name, limit=wanted.limit) for name, path in wanted.exact.items()]
    if wanted.ifeval:
        from ..drift.probes.instruction_following import InstructionFollowing

        found.append(InstructionFollowing.read(wanted.ifeval, limit=wanted.limit))
    if wanted.lm_eval:
        from ..drift.probes.lm_eval import LmEval

        found.append(LmEval(wanted.lm_eval, include_path=wanted.include_path or None, limit=wanted.limit))
    return found


def _column(path: str, limit: int | None, *columns: str) -> list[str]:
    """The texts of a file: of the first of the columns that its rows have; of a conversation, the first user turn."""
    rows = Data(path, samples=limit).rows()
    column = next((name for name in columns if name in rows.column_names), None)
    if column is None:
        raise WrongSetup(f"{path} has none of the columns {', '.join(columns)}, only {', '.join(rows.column_names)}.")
    found = dict.fromkeys(_text(value) for value in rows[column])
    return [text for text in found if text.strip()]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return next((str(turn["content"]) for turn in value if turn.get("role") == "user"), "")
    return str(value)
