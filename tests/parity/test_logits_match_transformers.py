"""In evaluation the model is transformers' Mask2Former: same weights, same files, same numbers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerModel
from tests.factories import random_images
from tests.logs import recorded_log
from tests.parity.oracle import LABEL_EMBEDDING, make_oracle, make_twin, resize_masks

# float32 through some 40 layers, logits of size 1 to 10; observed 1e-5.
TOLERANCE = 1e-4
# A logit nearer to 0 may be blocked in one model and not in the other: rounding, not a defect.
MARGIN = 1e-4

both_backbones = pytest.mark.parametrize("backbone", ["resnet", "swin"])


@dataclass(frozen=True)
class Levels:
    """Predictions of all supervised levels."""

    class_logits: list[Tensor]
    mask_logits: list[Tensor]


def list_levels(output: Any) -> Levels:
    names = ("class_queries_logits", "masks_queries_logits")
    return Levels(*([*(level[name] for level in output.auxiliary_logits), getattr(output, name)] for name in names))


@torch.no_grad()
def run(model: torch.nn.Module, images: Tensor) -> Any:
    return model(images, output_hidden_states=True, output_auxiliary_logits=True, output_attentions=True)


@cache
def run_oracle(backbone: str, size: tuple[int, int], **fields: Any) -> tuple[Tensor, Any]:
    """Images whose thresholded logits keep away from 0, and the oracle's output for them."""
    oracle = make_oracle(backbone, **fields)
    for seed in range(30):
        images = random_images(2, size, seed)
        output = run(oracle, images)
        thresholded = resize_masks(list_levels(output).mask_logits, size)
        if min(float(level.abs().min()) for level in thresholded) > MARGIN:
            return images, output
    pytest.fail("No seed gives logits that keep away from 0; choose other weights in tests/parity/oracle.py.")


def smallest_distance(queries: Tensor) -> float:
    """Root mean square difference of the two most similar queries of an image, relative to all: (B, Q, ...) to a number."""
    flat = queries.flatten(2)
    distances = torch.cdist(flat, flat) / flat.shape[2] ** 0.5 / flat.std()
    return float(distances[:, ~torch.eye(flat.shape[1], dtype=torch.bool)].min())


@both_backbones
@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_the_oracle_is_worth_comparing_with(backbone, size):
    _, output = run_oracle(backbone, size)
    levels = list_levels(output)
    for thresholded in resize_masks(levels.mask_logits, size):
        blocked = float((thresholded < 0).float().mean())
        assert 0.2 < blocked < 0.8
        assert float(thresholded.abs().min()) > MARGIN
    for level in (*levels.mask_logits, *levels.class_logits):
        assert smallest_distance(level) > 0.05


@both_backbones
@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=["multiple of the strides", "any size"])
def test_logits_of_every_level_equal_those_of_transformers(backbone, size):
    images, expected = run_oracle(backbone, size)
    twin, _, _ = make_twin(make_oracle(backbone))
    ours, theirs = list_levels(run(twin, images)), list_levels(expected)
    assert len(ours.class_logits) == len(ours.mask_logits) == 10
    assert_close(ours.class_logits, theirs.class_logits, rtol=0, atol=TOLERANCE)
    assert_close(ours.mask_logits, theirs.mask_logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "fields",
    [{"pre_norm": True}, {"enforce_input_projection": True}, {"feature_size": 64}, {"activation_function": "gelu"}],
    ids=lambda fields: next(iter(fields)),
)
def test_logits_of_a_variant_equal_those_of_transformers(fields):
    images, expected = run_oracle("resnet", (64, 96), **fields)
    twin, _, _ = make_twin(make_oracle("resnet", **fields))
    ours, theirs = list_levels(run(twin, images)), list_levels(expected)
    assert_close(ours.class_logits, theirs.class_logits, rtol=0, atol=TOLERANCE)
    assert_close(ours.mask_logits, theirs.mask_logits, rtol=0, atol=TOLERANCE)


@both_backbones
def test_hidden_states_and_attentions_equal_those_of_transformers(backbone):
    images, theirs = run_oracle(backbone, (64, 96))
    ours = run(make_twin(make_oracle(backbone))[0], images)
    for name in theirs.keys() - {"auxiliary_logits"}:
        expected = theirs[name]
        as_type = tuple if isinstance(expected, list | tuple) else Tensor
        assert isinstance(ours[name], as_type), name
        assert_close(
            ours[name],
            tuple(expected) if as_type is tuple else expected,
            rtol=0,
            atol=TOLERANCE,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@both_backbones
def test_base_model_equals_that_of_transformers(backbone):
    images, _ = run_oracle(backbone, (64, 96))
    oracle = make_oracle(backbone)
    with torch.no_grad():
        theirs = oracle.model(images, output_hidden_states=True, output_attentions=True)
        ours = make_twin(oracle)[0].model(images, output_hidden_states=True, output_attentions=True)
    for name, expected in theirs.items():
        expected = tuple(expected) if isinstance(expected, list | tuple) else expected  # noqa: PLW2901
        assert_close(ours[name], expected, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@both_backbones
def test_state_dicts_differ_in_the_label_embedding_alone(backbone):
    _, missing, unexpected = make_twin(make_oracle(backbone))
    assert (missing, unexpected) == ({LABEL_EMBEDDING}, set())


@both_backbones
def test_without_piloting_state_dicts_have_the_same_names(backbone):
    _, missing, unexpected = make_twin(make_oracle(backbone), mask_piloting=False)
    assert (missing, unexpected) == (set(), set())


def test_without_query_positions_only_their_embedding_is_left_out():
    _, missing, unexpected = make_twin(make_oracle("resnet"), query_position_embedding=False)
    assert (missing, unexpected) == ({LABEL_EMBEDDING}, {"model.transformer_module.queries_embedder.weight"})


@both_backbones
def test_a_folder_of_transformers_loads_silently_and_gives_the_same_logits(backbone, tmp_path):
    oracle = make_oracle(backbone)
    oracle.save_pretrained(tmp_path)
    with recorded_log() as log:
        ours = MPFormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert log == []
    images, expected = run_oracle(backbone, (64, 96))
    assert_close(list_levels(run(ours, images)).mask_logits, list_levels(expected).mask_logits, rtol=0, atol=TOLERANCE)
    for name, weight in oracle.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_the_base_model_finds_all_its_weights_in_a_folder_of_transformers(tmp_path):
    oracle = make_oracle("swin")
    oracle.save_pretrained(tmp_path)
    with recorded_log() as log:
        ours = MPFormerModel.from_pretrained(tmp_path)
    # The class head and the loss weights are named as unused, as they are by transformers' own base model.
    assert not [line for line in log if "MISSING" in line]
    for name, weight in oracle.model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_label_embedding_is_initialised_when_a_folder_of_transformers_has_none(tmp_path):
    make_oracle("resnet").save_pretrained(tmp_path)
    embedding = MPFormerForUniversalSegmentation.from_pretrained(tmp_path).state_dict()[LABEL_EMBEDDING]
    numbers = embedding.numel()
    assert abs(embedding.mean()) < 5 / numbers**0.5
    assert abs(embedding.std() - 1) < 5 / numbers**0.5


def test_a_weight_that_is_really_missing_is_reported(tmp_path):
    make_oracle("resnet").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["class_predictor.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with recorded_log() as log:
        MPFormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert any("class_predictor.weight" in line for line in log)


@both_backbones
def test_config_of_a_folder_of_transformers_is_read_whole(backbone, tmp_path):
    theirs = make_oracle(backbone, num_queries=7, no_object_weight=0.3).config
    theirs.save_pretrained(tmp_path)
    with recorded_log() as log:
        ours = MPFormerConfig.from_pretrained(tmp_path)
    assert log == []
    assert ours.model_type == "mpformer"
    shared = Mask2FormerConfig.__annotations__.keys() & MPFormerConfig.__annotations__.keys() - {"backbone_config"}
    for name in (*shared, "id2label", "label2id", "num_labels"):
        expected = getattr(theirs, name)
        assert getattr(ours, name) == (list(expected) if isinstance(expected, tuple) else expected), name
    assert ours.backbone_config.to_dict() == theirs.backbone_config.to_dict()


@both_backbones
def test_a_folder_saved_here_loads_silently_into_transformers(backbone, tmp_path):
    oracle = make_oracle(backbone)
    make_twin(oracle, mask_piloting=False)[0].save_pretrained(tmp_path)
    with recorded_log() as log:
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, config=oracle.config)
    assert log == []
    for name, weight in oracle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
