"""SineLoRA, an adapter that PEFT does not have: a sine over LoRA's product, so that dW is of low rank no more.

    dW = s · sin(ω · B A) / √n        entry by entry; s = alpha / r, n columns of the weight; B = 0, so dW = 0 at first

Ji et al., "Efficient learning with sine-activated low-rank matrices" (ICLR 2025, arXiv 2403.19243). The gain √n with
n = in_features is that of the authors' public code; ω = 200 is a choice of ours. Importing this module teaches PEFT the
type: `get_peft_model(model, SineLoraConfig(r=8))`, and `PeftModel.from_pretrained` takes what was saved.

Price: every adapted layer forms its dW, a dense float32 matrix of the weight's shape, in every forward and once more in
the backward (it is not kept between the two). At the start dW moves ω/√n times as fast as LoRA's, so learning rates
are lower. The layers are PEFT's LoRA layers with a variant, PEFT's word for what DoRA is; `s` lies outside the sine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, NeverSupported, NotYetSupported
from ..core.selection import linear_map
from ..functional.named import wide

SINE_LORA = "SINE_LORA"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sine_change(a: Tensor, b: Tensor, omega: float, scale: float) -> Tensor:
    """Return dW = scale · sin(ω · B A) / √in, [out, in], in B's type but computed in float32 at least.

    Args:
        a: [r, in].
        b: [out, r].
        omega: ω. A phase of many radians needs more digits than bfloat16 has.
        scale: s.

    >>> sine_change(torch.ones(1, 4), torch.tensor([[torch.pi]]), 0.5, 2.0)
    tensor([[1., 1., 1., 1.]])
    """
    with torch.autocast(a.device.type, enabled=False):
        return (torch.sin(omega * (wide(b) @ wide(a))) * (scale / math.sqrt(a.shape[1]))).to(b.dtype)


@dataclass
class SineLoraConfig(LoraConfig):
    """LoRA's settings and the frequency ω, `omega`.

    Raises:
        ConfigError: for settings that form dW in another way (DoRA, PiSSA, a bias of B's), with all of them.

    >>> SineLoraConfig(r=4).omega
    200.0
    """

    omega: float = field(default=200.0, metadata={"help": "The frequency of the sine."})

    def __post_init__(self) -> None:
        others = [each.name for each in fields(self) if each.metadata.get("is_lora_variant")]
        others = [name for name in (*others, "lora_bias", "target_parameters") if getattr(self, name, None)]
        faults = [f"{name} forms dW in another way and does not go with the sine: leave it out" for name in others]
        if not 0 < self.omega < math.inf:
            faults.append(f"omega must be a positive number, got {self.omega!r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            faults.append(
                f"init_lora_weights must be true, false or gaussian, got {self.init_lora_weights!r}: other starts take "
                "s · B A out of the base's weights, which is not what the sine puts back"
            )
        if faults:
            raise ConfigError("SineLoraConfig", faults)
        super().__post_init__()
        self.peft_type = SINE_LORA  # a type of its own: without this module PEFT refuses the folder, and rightly so


class SineVariant(LoraVariant):
    """What a layer does with one adapter's factors, with its ω: PEFT's seam for its own variants, such as DoRA."""

    def __init__(self, omega: float) -> None:
        self.omega = omega

    def init(self, module: Any, **_: Any) -> None:
        """Nothing: the factors start as LoRA's."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return nn.functional.linear(x, sine_change(a, b, self.omega, module.scaling[active_adapter]))

        factors = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x = module.lora_dropout[active_adapter](x)
        return result + checkpoint(added, x, *factors, use_reentrant=False, preserve_rng_state=False)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class SineLinear(Linear):
    """A linear map with SineLoRA adapters, each with an ω of its own."""

    def resolve_lora_variant(self, *, config: SineLoraConfig, **_: Any) -> SineVariant:
        return SineVariant(config.omega)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return dW in the shape of the base's weight."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        change = sine_change(a, b, self.lora_variant[adapter].omega, self.scaling[adapter])
        return change.T if self.fan_in_fan_out else change


class SineLoraModel(LoraModel):
    """PEFT's LoRA model, with sines in its layers."""

    @staticmethod
    def _create_new_module(lora_config: SineLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        layer = linear_map(target)
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.dtype not in FLOATS:
            raise NotYetSupported(
                f"SineLoRA on {type(layer).__name__} ({kwargs.get('target_name', '?')}): it is built for plain linear "
                "layers, and dW could not be merged into a quantised weight. Change target_modules, or use LoRA."
            )
        lora_config.fan_in_fan_out = conv1d = isinstance(layer, Conv1D)  # GPT-2 keeps its weights as [in, out]
        kwargs = {name: value for name, value in kwargs.items() if name != "parameter_name"}
        return SineLinear(target, adapter_name, config=lora_config, is_target_conv_1d_layer=conv1d, **kwargs)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse: PEFT adds factors, and the sine of a sum is not the sum of the sines.

        Raises:
            NeverSupported: always.
        """
        raise NeverSupported(
            "SineLoRA adapters cannot be added up as factors. Merge one into the weights after another."
        )


PEFT_TYPE_TO_CONFIG_MAPPING[SINE_LORA] = SineLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[SINE_LORA] = SineLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[SINE_LORA] = LoraModel.prefix
