"""By what the arms of a comparison are matched and compared: `learn`, `keep` and `suite`, read and checked.

A name is that of a data set in both `evaluate.validation` and `evaluate.test`, whose loss is meant, or that of a score
of the suite. Read next: `compare_settings`.
"""

from __future__ import annotations

from typing import Literal

from ..core.errors import ConfigError, HoldfastError
from ..drift.probe import ProbeError
from ..drift.suite import SuiteError
from .compare_grid import inside
from .drift_probes import ANSWER_TOKENS, LAB, NONE
from .lines import Faults, Node, Section, guess
from .watch_settings import Watching

SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")


def loss_on(data: str) -> str:
    """Return what the score of a data set of `evaluate` is called."""
    return f"{data}_loss"


def suite_of(section: Section, model: str, faults: Faults) -> Watching | None:
    """Take `suite` and `limit`; the probes of both splits are made once, to hear what they have to say.

    Args:
        section: `compare`.
        model: its name.
        faults: where faults go.
    """
    node, limit = section.node("suite"), section.whole("limit", least=1)
    name = NONE if node is None else str(node.value)
    if node is None or name == NONE:
        if limit is not None:
            faults.add(section.line, "limit has no effect without a suite: add suite: lab, say, or leave it out")
        return None
    length = Watching.max_new_tokens if name == LAB else ANSWER_TOKENS
    suite = Watching(name, limit=limit, max_new_tokens=length)
    for split in SPLITS:
        try:
            suite.probes(model, split)
        except (SuiteError, ProbeError, HoldfastError) as error:
            told = error.faults if isinstance(error, SuiteError | ConfigError) and error.faults else (str(error),)
            for fault in told:
                faults.add(node.line, f"suite {name!r}, split {split}: {fault}")
    return suite


def scores_of(
    section: Section, evaluate: Node | None, suite: Watching | None, faults: Faults
) -> tuple[str, tuple[str, ...]]:
    """Take `learn` and `keep`: names of data sets that both splits have, or of scores of the suite.

    Args:
        section: `compare`.
        evaluate: what the recipe says there.
        suite: what else is measured.
        faults: where faults go.
    """
    by_split = [inside(evaluate, (split,)) if evaluate is not None else None for split in SPLITS]
    names = [[*node.value] if node is not None and isinstance(node.value, dict) else [] for node in by_split]
    if evaluate is not None and isinstance(evaluate.value, dict):
        names[1] += [name for name in evaluate.value if name not in (*SPLITS, "scales")]  # are the test split's too
    both = [name for name in names[0] if name in names[1]]
    if not both:
        faults.add(
            evaluate.line if evaluate is not None else section.line,
            "a comparison needs `evaluate: {validation: {...}, test: {...}}` with data sets of the same names: "
            "settings are chosen on one and reported on the other: the best of many on the same data is partly luck",
        )
    learn, keep = section.node("learn"), section.node("keep")
    if learn is None:
        faults.add(section.line, f"compare needs 'learn': what is learned, one of {', '.join(both) or 'the data sets'}")
    score = _score(learn, "learn", both, suite, faults) if learn is not None else ""
    items = keep.value if keep is not None and isinstance(keep.value, list) else [keep] if keep is not None else []
    kept = [_score(item, "keep", both, suite, faults) for item in items]
    if keep is None:
        kept = [loss_on(name) for name in both if loss_on(name) != score]
    if not kept and both:
        faults.add(section.line, "compare needs 'keep': the scores that must not get worse")
    for line, name in ((item.line, name) for item, name in zip(items, kept, strict=False)):
        if name and name == score:
            faults.add(line, f"{name} is what is learned: it cannot be what is kept")
        elif kept.count(name) > 1:
            faults.add(line, f"keep: {name} is given twice")
    return score, tuple(kept)


def _score(node: Node, key: str, both: list[str], suite: Watching | None, faults: Faults) -> str:
    from ..analysis.scores import KNOWN, find

    name = str(node.value)
    losses = [loss_on(each) for each in both]
    if name in both or name in losses:
        return name if name in losses else loss_on(name)
    if suite is not None and find(name) is not None:
        return name
    known = [*both, *(KNOWN if suite is not None else ())]
    why = "" if suite is not None else " Scores of a suite need `suite: lab`, say."
    faults.add(
        node.line,
        f"{key}: {node.plain()!r} is no data set of both evaluate.validation and evaluate.test"
        f"{'' if suite is None else ', and no score of a suite'}.{guess(name, known)}{why}",
    )
    return ""
