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
    from .output.full_kl import FullKL as FullKL
    from .output.target_masked_kl import TargetMaskedKL as TargetMaskedKL
    from .presets import ogpsa as ogpsa
    from .presets import target_masked_kl as target_masked_kl
    from .weight.l2_sp import L2SP as L2SP

_WHERE = {
    "TargetMaskedKL": "output.target_masked_kl",
    "FullKL": "output.full_kl",
    "L2SP": "weight.l2_sp",
    "OrthogonalProjection": "gradient.orthogonal_projection",
    "RandomSubspace": "gradient.random_subspace",
    "AGEM": "gradient.agem",
    "PCGrad": "gradient.pcgrad",
    "target_masked_kl": "presets",
    "ogpsa": "presets",
}
__all__ = [
    "AGEM",
    "L2SP",
    "FullKL",
    "OrthogonalProjection",
    "PCGrad",
    "RandomSubspace",
    "TargetMaskedKL",
    "ogpsa",
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
