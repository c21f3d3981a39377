"""Two sides are what they say: the base is the base, every tensor has found its place, and nothing is merged."""

import json

import pytest
import torch
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.drift.models import digest
from holdfast.drift.probe import BASE
from holdfast.recipe.model import ModelSpec
from holdfast.recipe.sides import load
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tiny import llama, lora, tokenizer


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def adapter(folder, name="adapter", moved=0.05, model=None, **config):
    """An adapter on disk that moves the model, and what the model says with it."""
    peft = lora(model or llama(), **config)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                parameter.copy_(moved * torch.randn_like(parameter))
    peft.save_pretrained(folder / name)
    config = json.loads((folder / name / "adapter_config.json").read_text())
    (folder / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    return peft.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 17, 40]])).logits


def sides(folder, **tuned):
    spec = ModelSpec(str(folder / "base"))
    return load(spec, {name: str(folder / where) for name, where in tuned.items()})


def test_base_and_tuned_are_those_of_the_files_bit_for_bit_and_stay_so(folder):
    tuned = adapter(folder)
    found = sides(folder, tuned="adapter")
    for _ in range(2):  # switching back and forth leaves no trace
        with found.models.on(BASE) as model:
            assert torch.equal(logits(model), logits(llama().eval()))
        with found.models.on("tuned") as model:
            assert torch.equal(logits(model), logits(tuned))
    assert found.described["tuned"]["sha256"] == found.models.digest("tuned") != found.models.digest(BASE)
    assert found.models.digest(BASE) == digest(llama().state_dict())


def test_two_adapters_and_a_whole_model_stand_side_by_side(folder):
    one, two = adapter(folder, "one"), adapter(folder, "two", moved=0.2)
    whole = llama(seed=5)
    whole.save_pretrained(folder / "whole")
    tokenizer().save_pretrained(folder / "whole")
    found = sides(folder, one="one", two="two", whole="whole")
    for name, expected in (("two", two), ("one", one), ("whole", whole.eval()), (BASE, llama().eval())):
        with found.models.on(name) as model:
            assert torch.equal(logits(model), logits(expected))
    assert len({found.models.digest(side) for side in found.models.sides}) == 4


def test_the_digest_of_an_adapter_is_that_of_weights_settings_and_base(folder):
    adapter(folder, "one")
    adapter(folder, "same")
    adapter(folder, "stronger")
    config = json.loads((folder / "stronger" / "adapter_config.json").read_text())
    (folder / "stronger" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    digests = {name: sides(folder, tuned=name).models.digest("tuned") for name in ("one", "same", "stronger")}
    assert digests["one"] == digests["same"] != digests["stronger"]


def test_an_adapter_whose_start_is_not_the_base_gets_a_second_base(folder):
    """PiSSA moves a part of the base into the adapter: adapter off is then not the base."""
    adapter(folder, "pissa", init_lora_weights="pissa")
    told = []
    found = load(ModelSpec(str(folder / "base")), {"tuned": str(folder / "pissa")}, say=told.append)
    assert "second time" in told[0]
    with found.models.on(BASE) as model:
        assert torch.equal(logits(model), logits(llama().eval()))


def test_what_cannot_be_compared_is_refused_all_of_it_at_once(folder):
    adapter(folder, "elsewhere")
    config = json.loads((folder / "elsewhere" / "adapter_config.json").read_text())
    (folder / "elsewhere" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/other"})
    )
    adapter(folder, "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(folder / "pickled" / "adapter_model.bin")
    (folder / "empty").mkdir()
    with pytest.raises(WrongSetup) as told:
        sides(folder, a="elsewhere", b="pickled", c="empty", d="absent", base="empty")
    for part in (
        "'other'",
        "--any-base",
        "pickled weights",
        "neither adapter_config.json",
        "no folder",
        "called 'base'",
    ):
        assert part in str(told.value)
    spec = ModelSpec(str(folder / "base"))
    assert load(spec, {"a": str(folder / "elsewhere")}, any_base=True).models.sides.keys() == {BASE, "a"}


@pytest.mark.parametrize("change", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_model_is_refused_whatever_peft_lets_pass(folder, change):
    adapter(folder, "wrong", model=llama(**change), target_modules=["q_proj", "down_proj"])
    with pytest.raises(WrongSetup, match="not an adapter of"):
        sides(folder, tuned="wrong")


def test_a_tensor_that_has_no_place_is_not_dropped_in_silence(folder):
    adapter(folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key.replace("layers.0", "layers.7"): tensors[key].clone()}, file)
    with pytest.raises(WrongSetup, match="1 of its tensors have no place"):
        sides(folder, tuned="adapter")


def test_another_vocabulary_and_prompt_learning_are_refused(folder):
    whole = llama(seed=5)
    whole.save_pretrained(folder / "whole")
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(folder / "whole")
    with pytest.raises(WrongSetup, match="another vocabulary"):
        sides(folder, whole="whole")
    prompt = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(folder / "prompt")
    with pytest.raises(NotYetSupported, match="prompt learning"):
        load(ModelSpec(str(folder / "base")), {"tuned": str(folder / "prompt")}, any_base=True)


def test_a_base_without_a_tokenizer_is_told(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(WrongSetup, match="tokenizer"):
        load(ModelSpec(str(tmp_path / "base")), {"tuned": str(tmp_path / "adapter")}, any_base=True)


def test_a_model_that_diverged_is_told_and_not_measured(folder):
    adapter(folder, moved=float("inf"))
    with pytest.raises(WrongSetup, match="not finite"):
        sides(folder, tuned="adapter")
