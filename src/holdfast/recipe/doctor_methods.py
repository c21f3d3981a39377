"""Do the methods of a stage work with its trainer and its data? By the session's own checks, without weights.

A session is made on the skeleton of the model, as attach makes it on the model: what its constructor refuses, and what
the weight methods refuse before the first step, is refused here in the same words. What would show in training alone
is asked in `_of_sets` and `_of_trainer`. Read next: `doctor_host`, sharding and processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.budget_settings import parted
from ..core.gradients import is_preference
from ..core.held_out import Measure
from ..core.method import GradientMethod, Method, OutputMethod, needs_reference, needs_retain, samples_pool
from ..core.reference import Reference
from ..core.session import Session
from ..core.tap import Call, Tap
from ..core.types import Batch
from ..functional.head import Head
from ..integrations.pools import POOL
from ..methods.gradient.orthogonal_projection import KINDS, OrthogonalProjection
from ..methods.output.target_masked_kl import TargetMaskedKL
from ..methods.weight.fisher_method import FisherMethod, UpdateMethod
from ..methods.weight.l2_sp import L2SP
from .config import Stage
from .doctor_findings import Findings
from .memory_facts import Facts
from .memory_state import fisher_sets, rank_of
from .skeleton import ShapeTap

Sets = Mapping[str, Sequence[Batch]]
IN_BACKWARD = ("lomo", "adalomo")  # and every optimizer whose name ends with `_layerwise`
WITH_METRIC = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "sgd")
STAND_IN = 64  # sequences of a pool that is not sampled yet


class Unseen(Reference):
    """A reference that is never run: its place in a session is all that is looked at."""

    description: ClassVar[str] = "not looked at"

    def hidden(self, tap: Tap, call: Call) -> Tensor:
        raise NotImplementedError

    def head(self, tap: Tap) -> Head:
        return tap.head(original=True)


def look(stage: Stage, number: int, facts: Facts, columns: set[str], found: Findings) -> Sets:
    """Note what of a stage's methods would not work, and return the retain sets as the session would part them.

    Args:
        stage: of the recipe.
        number: of the stage, from 0.
        facts: of the stage, with its retain batches.
        columns: of its training rows; empty: not known.
        found: where findings go.
    """
    about = f"stage {number + 1}: methods"
    acting = [method for method in stage.methods if method.strength]
    if off := [method.name for method in stage.methods if not method.strength]:
        found.warn(about, f"strength 0 switches {', '.join(off)} off")
    if not acting:
        found.ok(about, "none: nothing is protected")
        return facts.retain
    sets, before = facts.retain, len(found)
    if any(map(samples_pool, acting)) and not sets:
        sets = {POOL: [_stand_in()]}
    with found.noting(about):
        sets = _session_of(acting, facts, sets)
    for fault in (*_of_sets(acting, facts, sets), *_of_trainer(acting, stage, facts, columns)):
        found.fault(about, fault)
    sixteen = any(p.dtype in (torch.bfloat16, torch.float16) for p in facts.trained.values())
    if sixteen and any(isinstance(m, GradientMethod) and m.apply_to == "update" for m in acting):
        found.warn(about, "what is trained is in 16 bits: rounding puts more back than a corrected update takes out")
    if len(found) == before:
        found.ok(about, f"{', '.join(method.name for method in acting)}: nothing stands in their way")
    return sets if facts.retain else facts.retain


def _stand_in() -> Batch:
    ids = torch.ones(STAND_IN, 2, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


def _session_of(methods: Sequence[Method], facts: Facts, sets: Sets) -> Sets:
    """Make the session on the skeleton, and let weight methods look at what they would find; return its retain sets."""
    model = facts.skeleton.model
    tap = ShapeTap(model) if any(needs_reference(m) or needs_retain(m) for m in methods) else None
    measures: dict[str, Measure] = {str(parted(m.budget)[0]): lambda model: 0.0 for m in methods if m.is_auto}
    reference = Unseen() if any(map(needs_reference, methods)) else None
    session = Session(model, methods, reference=reference, retain=sets, tap=tap, measures=measures)
    try:
        for i, method in enumerate(session.methods):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if isinstance(method, L2SP) or (isinstance(method, FisherMethod) and not method._reads_data()):
                    method.init(session._setup(i))
                elif isinstance(method, UpdateMethod):
                    UpdateMethod.init(method, session._setup(i))
        return dict(session.retain.sets)
    finally:
        session.close()


def _of_sets(methods: Sequence[Method], facts: Facts, sets: Sets) -> Iterator[str]:
    """Yield what is wrong between methods and retain sets that would show at the first step."""
    for method in methods:
        if isinstance(method, FisherMethod) and method._reads_data():
            asked = {name for names in (*fisher_sets(method), method.data, method.compare) for name in names}
            if lost := sorted(asked - set(sets)):
                yield f"{method.name}: there is no retain set {lost[0]!r}: the sets are {', '.join(map(repr, sets))}."
        if not isinstance(method, OrthogonalProjection) or not sets:
            continue
        losses = KINDS[method.references]
        pairs = any(all(is_preference(batch) for batch in batches) for batches in sets.values())
        if any(loss != "likelihood" for loss in losses) and not pairs:
            yield (
                f"orthogonal_projection: references={method.references!r} reads preferences, and the retain data has "
                "none. Give rows with 'chosen' and 'rejected', or use references='likelihood'."
            )
        streams = rank_of(method, replace(facts, retain=sets))[1]
        if method.rank is not None and method.rank < streams:
            yield (
                f"orthogonal_projection: rank={method.rank} is less than one gradient for each of {len(sets)} retain "
                f"sets and {len(losses)} losses. Give rank >= {streams}, or fewer sets."
            )


def _of_trainer(methods: Sequence[Method], stage: Stage, facts: Facts, columns: set[str]) -> Iterator[str]:
    """Yield what is wrong between methods and trainer that would show in training, or never."""
    for method in methods:
        if isinstance(method, TargetMaskedKL) and method.normalise == "kept" and facts.accumulation > 1:
            yield (
                f"{method.name}(normalise='kept') with {facts.accumulation} micro-batches a step: it divides by tokens "
                "that only the reference knows, so it would depend on the split. Use normalise='supervised', or "
                "gradient_accumulation_steps: 1."
            )
        if isinstance(method, OutputMethod) and method.on == "task":
            positions = getattr(method, "positions", "completion")
            if positions == "prompt" and columns and not _has_prompts(stage, columns):
                yield (
                    f"{method.name}(positions='prompt') would do nothing: every token of these rows "
                    f"({', '.join(sorted(columns))}) is trained on, so none is a prompt's. Use positions='completion', "
                    "or rows with 'prompt' and 'completion'."
                )
        if not isinstance(method, GradientMethod):
            continue
        if facts.optimizer.endswith("_layerwise") or facts.optimizer in IN_BACKWARD:
            yield (
                f"{method.name} with optim: {facts.optimizer}, which takes its steps inside the backward pass: a "
                "gradient method would silently do nothing. Use an optimizer that steps after it (adamw_torch)."
            )
        elif getattr(method, "metric", "") == "optimizer" and facts.optimizer not in WITH_METRIC:
            yield (
                f"{method.name}(metric='optimizer') knows Adam, AdamW and SGD, and this is {facts.optimizer}. Use "
                "metric='euclidean', which holds under any optimizer."
            )


def _has_prompts(stage: Stage, columns: set[str]) -> bool:
    if stage.trainer == "dpo":
        return True
    options: Mapping[str, Any] = stage.options
    asked = options.get("completion_only_loss")
    pairs = {"prompt", "completion"} <= columns
    return (pairs and asked is not False) or bool(options.get("assistant_only_loss")) or "labels" in columns
