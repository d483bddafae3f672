"""The evaluation forward equals the recorded original, stage by stage: backbone, pixel decoder, then every prediction level."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from tests.parity.golden_cases import (
    CASES,
    LABEL_EMBEDDING,
    POSITION_EMBEDDING,
    SeenByDecoder,
    build_model,
    config_fields,
    load_case,
    preprocess,
    to_our_names,
    watch_decoder,
)

# d2 has the weights and the image of a.
each_case = pytest.mark.parametrize("name", [name for name in CASES if load_case(name).meta["forward_as"] is None])


@dataclass(frozen=True)
class Evaluation:
    """Our evaluation forward on the recorded image."""

    output: Any
    seen: SeenByDecoder

    @property
    def class_logits(self) -> list[Tensor]:
        levels = [level["class_queries_logits"] for level in self.output.auxiliary_logits]
        return [*levels, self.output.class_queries_logits]

    @property
    def mask_logits(self) -> list[Tensor]:
        levels = [level["masks_queries_logits"] for level in self.output.auxiliary_logits]
        return [*levels, self.output.masks_queries_logits]


@cache
def evaluate(name: str) -> Evaluation:
    case = load_case(name)
    model = build_model(case, num_dn=1).eval()
    with torch.no_grad(), watch_decoder(model) as seen:
        inputs = preprocess(case, [case.infer["image"]])
        output = model(**inputs, output_auxiliary_logits=True, output_hidden_states=True)
    return Evaluation(output, seen)


@each_case
def test_backbone_features_are_those_of_the_original(name):
    case, output = load_case(name), evaluate(name).output
    expected = [case.infer[f"backbone.res{stage}"] for stage in (2, 3, 4, 5)]
    assert_close(list(output.encoder_hidden_states), expected, rtol=0, atol=case.tolerance.features)


@each_case
def test_pixel_decoder_features_are_those_of_the_original(name):
    case, output = load_case(name), evaluate(name).output
    multi_scale = case.infer_levels("multi_scale_features")
    assert_close(list(output.pixel_decoder_hidden_states), multi_scale, rtol=0, atol=case.tolerance.features)
    per_pixel = output.pixel_decoder_last_hidden_state
    assert_close(per_pixel, case.infer["mask_features"], rtol=0, atol=case.tolerance.features)


@each_case
def test_class_logits_of_every_level_are_those_of_the_original(name):
    case = load_case(name)
    expected = case.infer_levels("pred_logits")
    assert len(expected) == case.num_levels
    assert_close(evaluate(name).class_logits, expected, rtol=0, atol=case.tolerance.class_logits)


@each_case
def test_mask_logits_of_every_level_are_those_of_the_original(name):
    case = load_case(name)
    expected = case.infer_levels("pred_masks")
    assert len(expected) == case.num_levels
    assert_close(evaluate(name).mask_logits, expected, rtol=0, atol=case.tolerance.mask_logits)


@each_case
def test_cross_attention_masks_are_bit_equal_to_those_of_the_original(name):
    expected = load_case(name).infer_levels("cross_attn_mask")
    seen = evaluate(name).seen.cross_attention_masks
    assert len(seen) == len(expected) == load_case(name).num_levels - 1
    for layer, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
        assert torch.equal(ours.squeeze(1), theirs), f"layer {layer}"


@each_case
def test_recorded_attention_masks_neither_block_nor_open_everything(name):
    """Otherwise the test above would hold for a model that does not attend at all."""
    for mask in load_case(name).infer_levels("cross_attn_mask"):
        assert 0.2 < mask.float().mean() < 0.8


@each_case
def test_transformers_mask2former_agrees_with_the_recording(name):
    """The map of names and keys is right even where our model is not: another implementation reads the same weights."""
    case = load_case(name)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**config_fields(case))).eval()
    weights = to_our_names(case.weights)
    weights.pop(LABEL_EMBEDDING, None)
    # A Mask2Former whose queries have a position embedding of zero is one without.
    weights.setdefault(POSITION_EMBEDDING, torch.zeros_like(model.get_parameter(POSITION_EMBEDDING)))
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        output = model(**preprocess(case, [case.infer["image"]]))
    final = case.num_levels - 1
    for ours, kind, atol in (
        (output.class_queries_logits, "pred_logits", case.tolerance.class_logits),
        (output.masks_queries_logits, "pred_masks", case.tolerance.mask_logits),
    ):
        assert_close(ours, case.infer[f"{kind}.{final}"], rtol=0, atol=atol)
