"""Papers as lists of methods: what a paper calls one method is often several terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..core.method import Method
from ..core.preset import Preset
from ..core.retain import RetainRows, Rows
from .gradient.orthogonal_projection import OrthogonalProjection
from .output.self_replay import SelfReplay
from .output.target_masked_kl import TargetMaskedKL
from .weight.fisher_alignment import FisherAlignment
from .weight.geodesic_separation import GeodesicSeparation
from .weight.riemannian_overlap import RiemannianOverlap
from .weight.task_stability import TaskStability


def recommended() -> list[Method]:
    """Return what kept most at equal learning in our own studies, at about the price of plain LoRA: self-replay.

    Nothing else is needed: a host that has no retain data samples some from the base. Take a quarter of the sequences
    out of your batch (12 in place of 16). The evidence, where it loses, and what else was tried: docs/self-replay.md,
    docs/results/default.md, docs/choose.md, docs/pool-limits.md.

    >>> [method.name for method in recommended()]
    ['self_replay']
    """
    return [SelfReplay()]


def target_masked_kl(*, strength: float = 1.0, as_published: bool = False) -> list[Method]:
    """Return the list of "Mask the Target" (arXiv 2605.29498).

    Args:
        strength: the paper's lambda.
        as_published: with the paper's exclusion threshold and its normalisation by kept tokens, for reproduction;
            this form is refused with gradient accumulation, under which its value is not defined.

    >>> target_masked_kl(as_published=True)[0].exclusion
    0.0001
    """
    if as_published:
        return [TargetMaskedKL(strength=strength, exclusion=1e-4, normalise="kept")]
    return [TargetMaskedKL(strength=strength)]


def ogpsa(
    *, stage: Literal["sft", "dpo"] = "sft", exact: bool = False, official: bool = False, leak: float = 0.0
) -> list[Method]:
    """Return the list of OGPSA (arXiv 2602.07892): updates without a component along retain gradients.

    Args:
        stage: of safety post-training: the paper refreshes every 30 steps in SFT and every 5 in DPO.
        exact: what kept most in our lab instead of the paper's form: the update is projected, 16 gradients on
            minibatches, refreshed every 5 steps and early. Put benign look-alikes of the forbidden prompts into the
            retain data: it protects what they contain.
        official: as the public code does it: a projection for each tensor, and in DPO the likelihood of chosen and
            rejected answers.
        leak: with `official`, its leak of reference gradients into the step after a refresh: 1 / accumulation steps
            reproduces the code under ZeRO-2, 0 repairs it.

    Raises:
        ValueError: if `exact` and `official` are both asked for, or a leak without `official`.

    >>> ogpsa(stage="dpo")[0].refresh_every
    5
    >>> ogpsa(exact=True)[0].apply_to
    'update'
    """
    if (exact and official) or (leak and not official):
        raise ValueError("exact=True and official=True are two forms: choose one; leak is the official form's alone.")
    if exact:
        return [OrthogonalProjection()]
    return [
        OrthogonalProjection(
            apply_to="gradient",
            rank=None,
            samples=200,
            refresh_every=30 if stage == "sft" else 5,
            early_refreshes=(),
            scope="tensor" if official else "global",
            references="chosen_and_rejected" if official and stage == "dpo" else "likelihood",
            leak=leak,
        )
    ]


def alignguard_lora(
    alignment: Rows | None = None,
    *,
    task: Rows | None = None,
    general: RetainRows | None = None,
    form: Literal["paper", "full"] = "paper",
    strength: float = 1.0,
) -> Preset:
    """Return the list of AlignGuard-LoRA (arXiv 2508.02079), whose full text and code could not be had.

    `paper`: four penalties after what secondary sources agree on, with strengths that we chose, since our Fisher is
    normalised and the paper's values are not known. `full`: one, the full Kronecker quadratic, which is what worked in
    our lab (docs/alignguard.md has the ablation). Neither is a reproduction of the paper.

    Args:
        alignment: rows that show the behaviour to keep (refusals with their prompts, say), in a TRL format. None: the
            host is given them, `retain={"alignment": rows, ...}`.
        task: rows of the task data, likewise. With them the geodesic term of the paper's form compares the Fishers of
            alignment and task; without, it is the literal one, which is identically 0.
        general: for the full form, what else must stay: rows, or several sets of them by name. Each set's Fisher is
            normalised before they are averaged.
        form: `paper` or `full`.
        strength: multiplies the strengths of all terms.

    Raises:
        ValueError: for another form, or `general` with the paper's form, which would ignore it.

    >>> [method.name for method in alignguard_lora(form="full")]
    ['fisher_alignment']
    """
    if form not in ("paper", "full"):
        raise ValueError(f"form must be 'paper' or 'full', got {form!r}")
    if form == "paper" and general is not None:
        raise ValueError("general=... is the full form's: the paper's Fisher is of alignment data alone.")
    more = {} if general is None else dict(general) if isinstance(general, Mapping) else {"general": general}
    given = {"alignment": alignment, "task": task if form == "paper" else None, **more}
    retain = {name: rows for name, rows in given.items() if rows is not None}
    if form == "full":
        data = ("alignment", *more) if retain else ()  # (): all the sets that the host is given
        mixed = len(data) != 1
        return Preset([FisherAlignment(strength=strength * (1e-3 if mixed else 1e-2), data=data)], retain)
    return Preset(
        [
            FisherAlignment(strength=0.1 * strength, data=("alignment",), top=0.9),
            TaskStability(strength=1e-3 * strength, data=("alignment",)),
            RiemannianOverlap(strength=0.1 * strength, data=("alignment",)),
            GeodesicSeparation(
                strength=1.0 * strength, data=("alignment",), form="complement" if task is None else "fishers"
            ),
        ],
        retain,
    )
