"""Names of methods, and the guess for a misspelt one."""

from dataclasses import dataclass

import pytest
from holdfast.core.errors import ConfigError, HoldfastError
from holdfast.core.method import WeightMethod
from holdfast.core.registry import get, methods, register
from holdfast.methods import L2SP, TargetMaskedKL


def test_names():
    assert methods()["target_masked_kl"] is TargetMaskedKL
    assert get("l2_sp") is L2SP
    assert list(methods()) == sorted(methods())


def test_did_you_mean():
    with pytest.raises(ConfigError, match=r"Unknown method 'masked_kl'. Did you mean 'target_masked_kl'"):
        get("masked_kl")
    with pytest.raises(
        HoldfastError,
        match="Known: agem, ewc, fisher_alignment, full_kl, geodesic_separation, l2_sp, orthogonal_lora, "
        "orthogonal_projection, pcgrad, random_subspace, riemannian_overlap, self_replay, target_masked_kl, "
        "task_stability, update_decay",
    ):
        get("zzzz")


def test_two_methods_cannot_share_a_name():
    with pytest.raises(ValueError, match="Two methods want the name 'l2_sp'"):

        @register("l2_sp")
        @dataclass(frozen=True, kw_only=True)
        class Another(WeightMethod):
            def penalty(self, state, weights):
                raise AssertionError

    assert get("l2_sp") is L2SP
