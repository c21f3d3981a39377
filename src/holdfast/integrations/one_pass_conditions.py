"""What must hold for a host's loss to be computed together with a method's: each thing that must, and how it is known.

The host's loss must be the plain cross-entropy of the next token, linear in each token's, and the method's the sum of a
divergence over the same tokens. What cannot be told from the host's settings is tried: a small batch goes through the
model as the host calls it, and then without logits, and all that a host reads of it must agree. That is in evaluation
mode: what a model does in training alone is looked for in every micro-batch. Read next: `one_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import OutputMethod
from ..core.reference import probe_batch
from ..core.session import Session
from ..core.tap import Tap, evaluation, language_model
from ..core.types import IGNORED, Batch
from .one_pass_labels import LabelFacts


def faults_of_host(trainer: Any) -> Iterator[str]:
    """Yield a clause for everything about a trainer that makes its loss another one, or its forward."""
    owner, args = owner_of_loss(trainer), trainer.args
    if owner not in (("transformers.trainer", "Trainer"), SFT):
        yield f"{type(trainer).__name__} computes a loss of its own ({'.'.join(owner)})"
    if trainer.label_smoother is not None:
        yield f"labels are smoothed (label_smoothing_factor={args.label_smoothing_factor})"
    if trainer.compute_loss_func is not None:
        yield "the trainer has a compute_loss_func"
    if owner == SFT and args.loss_type != "nll":
        yield f"loss_type is {args.loss_type!r}, not 'nll'"
    if args.use_liger_kernel:
        yield "use_liger_kernel puts another forward in the model's place"
    yield from _faults_of_model(trainer.model, args)


def _faults_of_model(wrapped: nn.Module, args: Any) -> Iterator[str]:
    model = language_model(wrapped)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "output_router_logits", False):
        yield "the model adds an auxiliary loss of its routers (output_router_logits)"
    of_model = getattr(model, "loss_function", None)
    if getattr(of_model, "__name__", None) != "ForCausalLMLoss":
        yield f"the model's own loss is {getattr(of_model, '__name__', None)}, not ForCausalLMLoss"
    compiled = [m for m in (wrapped, model) if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    if args.torch_compile or compiled:
        yield "the model is compiled, and would be so again for every forward"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        yield "the model is split across devices (device_map)"


SFT = ("trl.trainer.sft_trainer", "SFTTrainer")


def owner_of_loss(trainer: Any) -> tuple[str, str]:
    """Return module and name of the class whose `compute_loss` runs, holdfast's own apart, which add to a loss."""
    if "compute_loss" in vars(trainer):
        return "set on the trainer itself", "compute_loss"
    classes = [kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)]
    foreign = [kind for kind in classes if not kind.__module__.startswith("holdfast.")]
    return foreign[0].__module__, foreign[0].__name__


def is_sft(trainer: Any) -> bool:
    """Say whether the loss is that of TRL's `SFTTrainer`."""
    return owner_of_loss(trainer) == SFT


def choose(methods: Mapping[int, OutputMethod]) -> tuple[int | None, list[str]]:
    """Return the place of the first method whose divergence can join the host's loss, or why none can."""
    faults = []
    for place, method in methods.items():
        if method.statistic() is None:
            faults.append(f"{method.name} asks for more than the sum of one divergence")
        elif getattr(method, "positions", None) != "completion":
            faults.append(f"{method.name} is not on the completion alone, where the host's loss is")
        elif method.reference_share < 1:
            faults.append(f"{method.name} reads a share of the task's sequences, and the host's loss all of them")
        else:
            return place, []
    return None, faults


def fault_of_batch(batch: Batch, read: Callable[[Batch], LabelFacts]) -> str:
    """Say what keeps a micro-batch from one pass; nothing where nothing does.

    Args:
        batch: the micro-batch.
        read: returns what its labels are.
    """
    if "labels" not in batch or "shift_labels" in batch or "logits_to_keep" in batch:
        return "its labels are not those of the next tokens, one for every position"
    if read(batch).others:
        return "its labels are other tokens than the next of its input_ids, which methods read"
    return ""


def fault_of_hooks(tap: Tap) -> str:
    """Say which hook may read the logits, or their gradient; nothing where none can. A user may set one at any time.

    TRL's own forward has no logits and runs no head, so under it none can.
    """
    head = tap.head_module()
    wrapped = [tap.model, getattr(tap.model, "base_model", None), tap.language_model, head]
    for module in wrapped:
        if module is not None and module is not tap.backbone and module._forward_hooks:
            return f"a forward hook on {type(module).__name__} may read the logits"
    if head._backward_hooks or head._backward_pre_hooks:
        return "a backward hook on the head may read the gradient of the logits"
    return ""


def is_unchanged(entered: Tensor, hidden: Tensor) -> bool:
    """Say whether what entered the head is what the backbone returned: the same numbers, in memory and to autograd."""
    node = entered.grad_fn
    while node is not hidden.grad_fn:
        if node is None or node.name() not in ("AliasBackward0", "SliceBackward0"):  # views, which models cut out
            return False
        node = node.next_functions[0][0]
    return entered.shape == hidden.shape and (entered.data_ptr(), entered.stride()) == (
        hidden.data_ptr(),
        hidden.stride(),
    )


def unproved(session: Session, tap: Tap, without: Callable[[], AbstractContextManager[None]], *, fused: bool) -> str:
    """Say how a small batch without logits differs from the host's own way; nothing where it does not.

    Args:
        session: of the host.
        tap: the model's.
        without: makes the context of a forward without logits.
        fused: whether the host is TRL's.
    """
    batch = probe_batch(session.model)
    labels = batch["input_ids"].clone()
    labels[:, :3] = labels[0, 6] = IGNORED
    inputs = {**batch, "labels": labels, "use_cache": False} | ({"fused_lm_head": True} if fused else {})
    try:
        with torch.no_grad(), evaluation(tap.tree):
            theirs = tap.language_model(**inputs)
            with without():
                ours = tap.language_model(**inputs)
        names = ("loss", "log_probs", "entropy", "is_top1") if fused else ("loss",)
        gaps = {name: _gap(getattr(ours, name), getattr(theirs, name)) for name in names}
    except Exception as error:  # any model's own code: what it needs of its logits is for it to say
        return f"a forward without logits fails ({type(error).__name__}: {error})"
    exact = tap.head().weight.dtype in (torch.float32, torch.float64) and (
        torch.get_float32_matmul_precision() == "highest"
    )
    if not exact:
        gaps.pop("is_top1", None)  # rounding decides between tokens that are nearly as likely
    bad = [f"{name} by {gap:.2g}" for name, gap in gaps.items() if not gap <= (1e-5 if exact else 2e-2)]
    return f"without logits a forward gives something else ({', '.join(bad)} of its size)" if bad else ""


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1)).item()
