"""Without mask piloting the training loss is that of transformers' Mask2Former, term by term and gradient by gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Mask2FormerForUniversalSegmentation

from tests.factories import random_batch
from tests.parity.oracle import make_oracle, make_twin, same_points

NUM_POINTS = 96
# float32; candidates of nearly equal uncertainty may be chosen differently, which moves a loss of ten terms by less than this.
LOSS_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT_TOLERANCE = 1e-3  # relative to the norm of each gradient

both_backbones = pytest.mark.parametrize("backbone", ["resnet", "swin"])
BATCHES = {
    "segments in every image": [2, 4],
    "an image without segments": [3, 0],
    "more segments than queries": [8, 1],
}
each_batch = pytest.mark.parametrize("num_segments", BATCHES.values(), ids=BATCHES.keys())


def draw_batch(num_segments: list[int]) -> dict[str, Any]:
    """A batch for both models: transformers wants float masks."""
    batch = random_batch(num_segments)
    return batch | {"mask_labels": [masks.float() for masks in batch["mask_labels"]]}


def oracle_in_training(backbone: str) -> Mask2FormerForUniversalSegmentation:
    """The oracle in training mode, apart from its batch norms."""
    oracle = copy.deepcopy(make_oracle(backbone, train_num_points=NUM_POINTS)).train()
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return oracle


def oracle_terms(
    oracle: Mask2FormerForUniversalSegmentation, batch: dict[str, Any], *, auxiliary: bool
) -> dict[str, Tensor]:
    """Weighted terms of the oracle's loss."""
    output = oracle(batch["pixel_values"], output_auxiliary_logits=True)
    return oracle.get_loss_dict(
        masks_queries_logits=output.masks_queries_logits,
        class_queries_logits=output.class_queries_logits,
        mask_labels=batch["mask_labels"],
        class_labels=batch["class_labels"],
        auxiliary_predictions=output.auxiliary_logits if auxiliary else None,
    )


@both_backbones
@each_batch
def test_training_loss_without_piloting_is_that_of_transformers(backbone, num_segments):
    oracle, batch = oracle_in_training(backbone), draw_batch(num_segments)
    twin = make_twin(oracle, mask_piloting=False)[0].train()
    with torch.no_grad(), same_points(3 * NUM_POINTS):
        theirs, ours = oracle(**batch), twin(**batch)
    assert_close(ours.loss, theirs.loss.reshape(()), **LOSS_TOLERANCE)


@both_backbones
@pytest.mark.parametrize("auxiliary", [True, False], ids=["all levels", "last level alone"])
def test_every_term_of_the_loss_is_that_of_transformers(backbone, auxiliary):
    oracle, batch = oracle_in_training(backbone), draw_batch([2, 4])
    twin = make_twin(oracle, mask_piloting=False, use_auxiliary_loss=auxiliary)[0].train()
    with torch.no_grad(), same_points(3 * NUM_POINTS):
        theirs = oracle_terms(oracle, batch, auxiliary=auxiliary)
        ours = twin(**batch)
    assert len(theirs) == 3 * (10 if auxiliary else 1)
    assert_close(ours.loss_dict, theirs, **LOSS_TOLERANCE)
    assert_close(ours.loss, sum(theirs.values()), **LOSS_TOLERANCE)


def test_matched_terms_stay_those_of_transformers_with_piloting():
    oracle, batch = oracle_in_training("resnet"), draw_batch([2, 4])
    twin = make_twin(oracle, pilot_groups=2)[0].train()
    with torch.no_grad(), same_points(3 * NUM_POINTS):
        theirs = oracle_terms(oracle, batch, auxiliary=True)
        ours = twin(**batch).loss_dict
    assert_close({name: ours[name] for name in theirs}, theirs, **LOSS_TOLERANCE)


@both_backbones
def test_evaluation_loss_is_that_of_transformers(backbone):
    oracle, batch = make_oracle(backbone, train_num_points=NUM_POINTS), draw_batch([2, 4])
    twin = make_twin(oracle)[0].eval()
    with torch.no_grad(), same_points(3 * NUM_POINTS):
        theirs, ours = oracle_terms(oracle, batch, auxiliary=True), twin(**batch)
    assert_close(ours.loss_dict, theirs, **LOSS_TOLERANCE)


@both_backbones
def test_gradients_are_those_of_transformers(backbone):
    oracle, batch = oracle_in_training(backbone), draw_batch([2, 4])
    twin = make_twin(oracle, mask_piloting=False, freeze_backbone_norm=False)[0].train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with same_points(3 * NUM_POINTS):
        sum(oracle_terms(oracle, batch, auxiliary=True).values()).backward()
        twin(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    assert expected.keys() == {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
    for name, parameter in twin.named_parameters():
        if parameter.grad is None:
            continue
        difference, scale = (parameter.grad - expected[name]).norm(), expected[name].norm()
        assert difference <= GRADIENT_TOLERANCE * scale + 1e-5, f"{name}: {difference:.2e} of {scale:.2e}"
