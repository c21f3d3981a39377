"""The model of a recipe without its weights: names, shapes and dtypes of everything that training will allocate.

Parameters lie on torch's meta device, so a model of 70 B takes a few megabytes, and shapes are those of the real thing.
A forward of two tokens shows which layers share an input, as the Fishers do. Read next: `memory`, which counts it all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.memory import Decoder
from ..core.errors import WrongSetup
from ..core.layers import DenseUpdate, LowRankUpdate
from ..core.selection import CHANGES_BASE, MOVES_BASE_INTO_ADAPTER, layer_updates, linear_map, trainable
from ..core.tap import Tap, language_model
from .model import ModelSpec

COMPUTED = (*MOVES_BASE_INTO_ADAPTER, *CHANGES_BASE, "eva")  # initialisations that read the weights
LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


class ShapeTap(Tap):
    """A tap on a model without weights: what it reads of the structure is checked, its numbers cannot be."""

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Prove nothing: there are no logits."""


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, with its adapter.

    Attributes:
        model: as the host would hold it.
        base_bytes: of the weights before the adapter.
        inputs: of every linear map that is trained or adapted, the first layer that reads the very same tensor.
        ran: whether that is known, because the model ran without weights; else none is taken to share.
    """

    model: Any
    base_bytes: int
    inputs: Mapping[str, str] = field(repr=False)
    ran: bool = True

    @cached_property
    def trained(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return dict(trainable(self.model))

    @cached_property
    def updates(self) -> list[LowRankUpdate | DenseUpdate]:
        """The weight updates that it forms."""
        return layer_updates(self.model, self.trained)

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config()

    def decoder(self) -> Decoder:
        """Return the sizes that the arithmetic reads, of the layers from the first that is trained on."""
        config = self.config
        hidden, heads = config.hidden_size, config.num_attention_heads
        layers = [int(found[1]) for name in self.trained if (found := LAYER.search(name))]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        return Decoder(
            hidden=hidden,
            intermediate=inner,
            layers=config.num_hidden_layers - min(layers, default=0),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocabulary=self.model.get_input_embeddings().weight.shape[0],
        )


def skeleton(spec: ModelSpec) -> Skeleton:
    """Return the model that a recipe names, without reading a weight.

    Raises:
        WrongSetup: if its configuration cannot be had, or the adapter cannot be put on it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            spec.place, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise WrongSetup(
            f"Cannot read the configuration of {spec.name!r}: {' '.join(str(error).split())[:300]} Check the name and "
            "the network, or give a folder with config.json and weights."
        ) from error
    return of_config(config, spec)


def of_config(config: Any, spec: ModelSpec) -> Skeleton:
    """Return the model of a configuration of transformers, with the adapter of a recipe.

    Args:
        config: of a causal language model.
        spec: says the dtype and the adapter.

    Raises:
        WrongSetup: if it is no causal language model, or the adapter cannot be put on it.
    """
    from transformers import AutoModelForCausalLM

    stored = getattr(config, "dtype", None)
    dtype = (stored or torch.float32) if spec.dtype == "auto" else getattr(torch, spec.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
            )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        raise WrongSetup(f"{spec.name!r} cannot be built: {' '.join(str(error).split())[:300]}") from error
    model.config._name_or_path = ""  # nothing here is to be compared with files
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if (adapter := spec.peft_config()) is not None:
        model = _adapted(model, adapter, spec)
    inputs = _shared_inputs(model)
    return Skeleton(model, size, inputs or {}, inputs is not None)


def _adapted(model: nn.Module, adapter: Any, spec: ModelSpec) -> Any:
    """Put an adapter on, its tensors on the meta device too; nothing is computed of weights that are not there."""
    from peft import get_peft_model

    start = getattr(adapter, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(COMPUTED):
        adapter.init_lora_weights = False
    try:
        with torch.device("meta"):
            made = get_peft_model(model, adapter)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise WrongSetup(
            f"The adapter {spec.peft_type} cannot be put on {spec.name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    if start is not None:
        adapter.init_lora_weights = start  # what the checks of the reference read
    return made


def _shared_inputs(model: Any) -> dict[str, str] | None:
    """Return, for every trained layer, which layer first read what it reads, by a forward of shapes; or None."""
    names = {update.layer for update in layer_updates(model, dict(trainable(model)))}
    found: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before = last[-1][0] if last and args and last[-1][1] is args[0] else None
        found[name] = found[before] if before is not None else name
        last[:] = [(name, args[0])] if args else []

    modules: dict[str, nn.Module] = dict(model.named_modules())
    with _hooked({name: linear_map(modules[name]) for name in names}, note):
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        seen = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")  # with a mask of 4 dimensions none is made
        try:
            with torch.no_grad():
                language_model(model)(input_ids=ids, attention_mask=seen, use_cache=False)
        except Exception:  # of a model that does not run without weights: then nothing is known to be shared
            return None
    return {name: found.get(name, name) for name in names}


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], note: Any) -> Iterator[None]:
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
