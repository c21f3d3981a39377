"""The model of a recipe: where it comes from, how it is loaded, and the adapter that is put on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import WrongSetup
from ..core.selection import why_no_scale
from .lines import Faults, Node, Section, guess
from .settings import checked

DTYPES = ("auto", "float32", "bfloat16", "float16")
LAB_MODELS = ("lab-pretrained", "lab-aligned")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and which adapter.

    Attributes:
        name: a hub name, a folder, `lab-pretrained` or `lab-aligned`.
        peft_type: PEFT's name of the adapter's kind (`LORA`, ...) or `SINE_LORA`; empty: all weights are trained.
        adapter: the adapter's settings.
        dtype: of the base weights; `auto` is what the files hold.
    """

    name: str
    peft_type: str = ""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def place(self) -> str:
        """What `from_pretrained` is called with."""
        if self.name in LAB_MODELS:
            from .. import lab

            return str(lab.path(self.name))
        return self.name

    def load(self) -> tuple[Any, Any]:
        """Return the base model and its tokenizer.

        Raises:
            WrongSetup: if they cannot be had.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..integrations import sine_lora  # noqa: F401  from here on PEFT can load such an adapter

        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        common = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.place, **common)
            model = AutoModelForCausalLM.from_pretrained(
                self.place, dtype=dtype, attn_implementation=self.attn_implementation, **common
            )
        except (OSError, ValueError) as error:
            raise WrongSetup(
                f"Cannot load the model {self.name!r}: {' '.join(str(error).split())[:300]} Check the name and the "
                "network, or give a folder with config.json and weights."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def peft_config(self) -> Any:
        """Return a new PEFT configuration, or None where all weights are trained."""
        if not self.peft_type:
            return None
        import copy

        given = copy.deepcopy(dict(self.adapter))  # PEFT changes what it is given
        if self.peft_type == "ADALORA":
            from ..integrations.adalora import AS_THE_TRAINER_SAYS

            given.setdefault("total_step", AS_THE_TRAINER_SAYS)
        return peft_class(self.peft_type)(**given)

    def why_no_scale(self) -> str:
        """Say why the result cannot be measured at other scales than 1; empty where it can."""
        if not self.peft_type:
            return "scales multiply an adapter, and this model has none"
        try:
            why = why_no_scale(self.peft_config())
        except (TypeError, ValueError, ImportError):
            return ""  # told where the adapter was read
        return f"scale 0 of this adapter would not be the base: {why}" if why else ""

    def why_one_stage(self) -> str:
        """Say why a second stage could not go on with the adapter; empty where it can."""
        if self.peft_type == "ADALORA":
            return "AdaLoRA gives its ranks away in one stage and cannot go on in a second: use another adapter"
        return ""


def peft_class(peft_type: str) -> Any:
    """Return the configuration class for a kind of adapter (`LORA`, `IA3`, ...), PEFT's or ours."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    from ..integrations import sine_lora  # noqa: F401  enters itself there

    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]  # PeftType is a str


def model_of(node: Node, faults: Faults) -> ModelSpec | None:
    """Read `model:`: a name, or a mapping with `name` and at most one of `lora` and `peft`."""
    if isinstance(node.value, str):
        node = Node({"name": node}, node.line)
    section = Section(node, "model", faults)
    name = section.text("name", required="a hub name or a folder")
    dtype = section.text("dtype", "float32")
    if dtype not in DTYPES:
        faults.add(node.line, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{guess(dtype, DTYPES)}")
    revision, attention = section.text("revision") or None, section.text("attn_implementation") or None
    trust = section.node("trust_remote_code")
    if trust is not None and not isinstance(trust.value, bool):
        faults.add(trust.line, f"trust_remote_code must be true or false, got {trust.plain()!r}")
    lora, peft = section.node("lora"), section.node("peft")
    section.close()
    if lora is not None and peft is not None:
        faults.add(node.line, "model has both 'lora' and 'peft': keep one")
    peft_type, adapter = _adapter(lora, peft, faults)
    if name.startswith((".", "/", "~")) and not (Path(name) / "config.json").is_file():
        faults.add(node.line, f"there is no model in {name!r}: a folder with config.json is needed")
    if name.startswith("lab-") and name not in LAB_MODELS:
        faults.add(node.line, f"unknown lab model {name!r}.{guess(name, LAB_MODELS)} The lab has {LAB_MODELS}.")
    trusted = trust is not None and trust.value is True
    return ModelSpec(name, peft_type, adapter, dtype, revision, attention, trusted) if name else None


def _adapter(lora: Node | None, peft: Node | None, faults: Faults) -> tuple[str, dict[str, Any]]:
    node = lora or peft
    if node is None:
        return "", {}
    if not isinstance(node.value, dict):
        faults.add(node.line, f"an adapter's settings must be a mapping ({{r: 16}}), got {node.plain()!r}")
        return "", {}
    given, peft_type = dict(node.value), "LORA"
    if lora is None:
        from peft import PeftType

        known = [*(kind.value for kind in PeftType), "SINE_LORA"]
        kind = given.pop("type", Node("", node.line))
        peft_type = str(kind.value).upper()
        if peft_type not in known:
            said = (
                f"unknown adapter type {kind.value!r}.{guess(peft_type, known)}" if kind.value else "peft needs 'type'"
            )
            faults.add(kind.line, f"{said} There are: {', '.join(known)}")
            return "", {}
    config_class = peft_class(peft_type)
    count = len(faults.found)
    adapter = {"task_type": "CAUSAL_LM", **checked(given, config_class, config_class.__name__, faults)}
    if peft_type == "ADALORA" and adapter.get("init_r", 12) <= adapter.get("target_r", 8):  # PEFT's own defaults
        faults.add(node.line, "AdaLoraConfig: init_r must be above target_r, for the ranks between them are given away")
    if lora is not None:
        adapter.setdefault("target_modules", "all-linear")
    if len(faults.found) == count:
        try:
            ModelSpec("", peft_type, adapter).peft_config()
        except (TypeError, ValueError, ImportError) as error:
            faults.add(node.line, f"{config_class.__name__}: {error}")
    return peft_type, adapter
