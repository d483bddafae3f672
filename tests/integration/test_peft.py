"""PEFT's LoRA on the named projections: adapters alone are trained, merged, saved and loaded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import random_batch, random_images, tiny_model

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "out_proj"),  # attention of the transformer decoder
    *("fc1", "fc2"),  # feed-forward networks of both decoders
    *("sampling_offsets", "attention_weights", "value_proj", "output_proj"),  # deformable attention
)
FULLY_TRAINED = ("class_predictor", "pilot_label_embedder")


def add_adapters(model: MPFormerForUniversalSegmentation) -> PeftModel:
    torch.manual_seed(0)  # adapters start at random
    return get_peft_model(
        model,
        LoraConfig(r=2, lora_alpha=4, target_modules=list(PROJECTIONS), modules_to_save=list(FULLY_TRAINED)),
    )


def train_one_step(model: PeftModel) -> Tensor:
    """Returns the loss; gradients stay, so that tests can look at them."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    loss = model.train()(**random_batch()).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def predict(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        outputs = model.eval()(random_images())
    return outputs.class_queries_logits, outputs.masks_queries_logits


def assert_predictions_close(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    # Merging adds B A to W once instead of B A x to W x: float32 rounding, some ten layers deep.
    torch.testing.assert_close(predict(actual), predict(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture
def adapted() -> PeftModel:
    return add_adapters(tiny_model())


def test_new_adapters_change_nothing(adapted: PeftModel):
    assert all(torch.equal(*pair) for pair in zip(predict(adapted), predict(tiny_model()), strict=True))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_named_projection_gets_an_adapter(adapted: PeftModel, name: str):
    expected = sum(path.endswith(f".{name}") for path, _ in tiny_model().named_modules())
    adapters = sum(path.endswith(f".{name}.lora_A.default") for path, _ in adapted.named_modules())
    assert adapters == expected > 0


def test_a_step_trains_adapters_and_saved_modules_and_nothing_else(adapted: PeftModel):
    before = copy.deepcopy(adapted.state_dict())
    train_one_step(adapted)
    for name, parameter in adapted.named_parameters():
        is_trained = "lora_" in name or "modules_to_save" in name
        assert (parameter.grad is not None) == is_trained, name
        # The first factor of a new adapter has no gradient yet: the second factor is zero.
        assert torch.equal(parameter, before[name]) == (not is_trained or "lora_A" in name), name


def test_merging_keeps_the_predictions(adapted: PeftModel):
    train_one_step(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert isinstance(merged, MPFormerForUniversalSegmentation)
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()
    assert not torch.allclose(predict(merged)[1], predict(tiny_model())[1], rtol=1e-2, atol=1e-2)
    assert_predictions_close(merged, adapted)


def test_saved_adapters_load_onto_the_base_model(adapted: PeftModel, tmp_path):
    train_one_step(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(predict(loaded), predict(adapted), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
# Swin's layers are checkpointed inside checkpointed stages, whose first run has no gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_adapters_learn_the_same_under_gradient_checkpointing(backbone: str, use_reentrant: bool):
    plain = add_adapters(tiny_model(backbone))
    model = tiny_model(backbone)
    # transformers 5.23 deprecates the second name; older versions have no other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    economical = add_adapters(model)
    assert train_one_step(economical) == train_one_step(plain)
    for (name, parameter), expected in zip(economical.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-6)
