"""Where a host would make a method silently wrong, attach refuses and names the way out."""

from types import SimpleNamespace

import holdfast
import pytest
import torch
from holdfast.core.errors import NeverSupported, NotYetSupported, WrongSetup
from holdfast.methods import AGEM, L2SP, FullKL, TargetMaskedKL

import runs
import tiny


@pytest.mark.parametrize("method", [L2SP(), AGEM()])
def test_deepspeed_and_gradients(method):
    """DeepSpeed's own switch on a real trainer: it steps inside backward, so an edited gradient would be ignored."""
    trainer = runs.trainer("sft")
    trainer.is_deepspeed_enabled = True
    with pytest.raises(NeverSupported, match="optimizer step.*Use DDP"):
        holdfast.attach(trainer, [method], retain=tiny.texts())


def test_deepspeed_and_outputs():
    trainer = runs.trainer("sft")
    trainer.is_deepspeed_enabled = True
    with pytest.raises(NotYetSupported, match="under DeepSpeed is untested.*Use DDP"):
        holdfast.attach(trainer, [TargetMaskedKL()])
    holdfast.attach(trainer, [TargetMaskedKL(strength=0)])  # nothing acts, nothing to refuse


@pytest.mark.parametrize(("version", "error"), [(1, NeverSupported), (2, NotYetSupported)])
@pytest.mark.parametrize("method", [TargetMaskedKL(), L2SP(), AGEM()])
def test_fsdp(version, error, method):
    trainer = runs.trainer("sft")
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version)
    try:
        with pytest.raises(error, match=f"FSDP{version}.*Use DDP"):
            holdfast.attach(trainer, [method], retain=tiny.texts())
    finally:
        trainer.accelerator.state.fsdp_plugin = None  # shared by every trainer of this process


def test_data_parallel():
    trainer = runs.trainer("sft")
    trainer.args._n_gpu = 2
    with pytest.raises(NeverSupported, match="one process|a process per GPU"):
        holdfast.attach(trainer, [TargetMaskedKL()])


def test_two_attachments():
    trainer = runs.trainer("sft")
    holdfast.attach(trainer, [L2SP()])
    with pytest.raises(WrongSetup, match="has a session already"):
        holdfast.attach(trainer, [L2SP()])


def test_missing_retain_data():
    with pytest.raises(WrongSetup, match="agem needs retain data"):
        holdfast.attach(runs.trainer("sft"), [AGEM()])


def test_a_retain_row_of_no_known_format():
    with pytest.raises(WrongSetup, match=r"keys \['answer'\]"):
        holdfast.attach(runs.trainer("sft"), [AGEM()], retain=[{"answer": "w1"}])


def test_an_optimizer_of_another_model():
    model = tiny.lora(tiny.llama())
    other = torch.optim.SGD(tiny.llama().parameters(), lr=0.1)
    with pytest.raises(WrongSetup, match="not in the optimizer"), holdfast.preserve(model, other, [L2SP()]):
        pass


def test_select_that_matches_nothing():
    model = tiny.lora(tiny.llama())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with (
        pytest.raises(WrongSetup, match=r"No trainable parameter matches \['\*lora_C\*'\]"),
        holdfast.preserve(model, optimizer, [L2SP(select=("*lora_C*",))]),
    ):
        pass


def test_unselected_parameters_are_left_alone():
    model = tiny.lora(tiny.llama())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with holdfast.preserve(model, optimizer, [L2SP(strength=1.0, select=("*lora_B*",))]) as session:
        session.gradients_ready()
        tiny.shake(model)
        optimizer.zero_grad()
        session.gradients_ready()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert all("lora_B" in name for name in touched)


@pytest.mark.parametrize("methods", [[TargetMaskedKL()], [AGEM(), TargetMaskedKL(), L2SP(strength=0.1)]])
def test_reentrant_checkpointing_gives_the_same_run(methods):
    """Reentrant checkpointing works: the tap is outside the checkpointed layers, reference gradients run without."""
    options = {"optim": "sgd", "learning_rate": 0.5, "steps": 4}
    plain = runs.train("sft", methods, **options)
    reentrant = runs.train(
        "sft", methods, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, **options
    )
    start = tiny.trained(tiny.lora(tiny.llama()))
    changes = [{k: v - start[k] for k, v in tiny.trained(t.model).items()} for t in (reentrant, plain)]
    assert runs.difference(*changes) <= 1e-5


def test_reentrant_checkpointing_that_would_train_nothing_is_refused():
    """Frozen embeddings under reentrant checkpointing: hidden states carry no gradient, so the loss would be dead."""

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(96, 16).requires_grad_(False)
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, input_ids):
            return torch.utils.checkpoint.checkpoint(self.layer, self.embed(input_ids), use_reentrant=True)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = Body(), torch.nn.Linear(16, 96).requires_grad_(False)

        def forward(self, input_ids, attention_mask=None):
            return self.out(self.body(input_ids))

        def get_input_embeddings(self):
            return self.body.embed

    model, batch = Model(), tiny.batches(1)[0]
    optimizer = torch.optim.SGD(model.body.layer.parameters(), lr=0.1)
    with holdfast.preserve(model, optimizer, [FullKL()], backbone="body", head="out") as session:
        model(batch["input_ids"])
        with pytest.raises(WrongSetup, match="enable_input_require_grads"):
            session.loss(batch)


def test_training_the_head_alone_is_no_dead_loss():
    model, batch = tiny.llama().requires_grad_(False), tiny.batches(1)[0]
    head = model.lm_head.requires_grad_(True)
    with holdfast.preserve(model, torch.optim.SGD(head.parameters(), lr=0.1), [FullKL()]) as session:
        tiny.shake(model)
        model(**batch)
        session.loss(batch).backward()
    assert head.weight.grad.abs().sum() > 0


def test_kept_normalisation_is_refused_where_it_depends_on_the_split():
    paper = holdfast.methods.target_masked_kl(as_published=True)
    whole = runs.train("sft", paper, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    assert whole.state.log_history[-2]["holdfast/target_masked_kl/divergence"] > 0
    with pytest.raises(NeverSupported, match="depend on the split"):
        runs.train("sft", paper, gradient_accumulation_steps=2, per_device_train_batch_size=2)
