"""The methods, one file each; names load when they are first asked for.

>>> from holdfast import methods
>>> methods.L2SP(strength=0.1).strength
0.1
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gradient.agem import AGEM as AGEM
    from .gradient.orthogonal_projection import OrthogonalProjection as OrthogonalProjection
    from .gradient.pcgrad import PCGrad as PCGrad
    from .gradient.random_subspace import RandomSubspace as RandomSubspace
    from .intruder_dimensions import repair_intruders as repair_intruders
    from .output.full_kl import FullKL as FullKL
    from .output.self_replay import SelfReplay as SelfReplay
    from .output.target_masked_kl import TargetMaskedKL as TargetMaskedKL
    from .posthoc import safe_lora as safe_lora
    from .posthoc import scale_adapter as scale_adapter
    from .presets import alignguard_lora as alignguard_lora
    from .presets import ogpsa as ogpsa
    from .presets import recommended as recommended
    from .presets import target_masked_kl as target_masked_kl
    from .weight.ewc import EWC as EWC
    from .weight.fisher_alignment import FisherAlignment as FisherAlignment
    from .weight.geodesic_separation import GeodesicSeparation as GeodesicSeparation
    from .weight.l2_sp import L2SP as L2SP
    from .weight.orthogonal_lora import OrthogonalLoRA as OrthogonalLoRA
    from .weight.riemannian_overlap import RiemannianOverlap as RiemannianOverlap
    from .weight.task_stability import TaskStability as TaskStability
    from .weight.update_decay import UpdateDecay as UpdateDecay

_WHERE = {
    "TargetMaskedKL": "output.target_masked_kl",
    "FullKL": "output.full_kl",
    "SelfReplay": "output.self_replay",
    "L2SP": "weight.l2_sp",
    "UpdateDecay": "weight.update_decay",
    "EWC": "weight.ewc",
    "FisherAlignment": "weight.fisher_alignment",
    "TaskStability": "weight.task_stability",
    "RiemannianOverlap": "weight.riemannian_overlap",
    "GeodesicSeparation": "weight.geodesic_separation",
    "OrthogonalLoRA": "weight.orthogonal_lora",
    "OrthogonalProjection": "gradient.orthogonal_projection",
    "RandomSubspace": "gradient.random_subspace",
    "AGEM": "gradient.agem",
    "PCGrad": "gradient.pcgrad",
    "target_masked_kl": "presets",
    "ogpsa": "presets",
    "recommended": "presets",
    "alignguard_lora": "presets",
    "scale_adapter": "posthoc",
    "safe_lora": "posthoc",
    "repair_intruders": "intruder_dimensions",
}
__all__ = [
    "AGEM",
    "EWC",
    "L2SP",
    "FisherAlignment",
    "FullKL",
    "GeodesicSeparation",
    "OrthogonalLoRA",
    "OrthogonalProjection",
    "PCGrad",
    "RandomSubspace",
    "RiemannianOverlap",
    "SelfReplay",
    "TargetMaskedKL",
    "TaskStability",
    "UpdateDecay",
    "alignguard_lora",
    "ogpsa",
    "recommended",
    "repair_intruders",
    "safe_lora",
    "scale_adapter",
    "target_masked_kl",
]


def load_all() -> None:
    """Import every method, so that the registry knows them."""
    for place in set(_WHERE.values()):
        import_module(f"{__name__}.{place}")


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"holdfast.methods has no {name!r}; it has {', '.join(_WHERE)}.")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
