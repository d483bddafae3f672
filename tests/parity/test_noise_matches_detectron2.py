"""Point noise and label noise against what the original code drew.

Shares of flipped cells and labels agree within three standard errors. Spread, overlap and visibility are almost 400
more comparisons, of which one is expected beyond three standard errors by chance; their bound is four (one in forty
that any of them is beyond it by chance).
"""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpformer_hf.mask_piloting import PilotMasks, PilotNoise, flip_labels, lay_out_slots, pool_masks

GOLDENS = Path(__file__).parent / "goldens"
RECORDED = json.loads((GOLDENS / "noise.json").read_text())
TENSORS = load_file(GOLDENS / "noise.safetensors")

LEVEL_SIZES = [tuple(size) for size in RECORDED["level_sizes"]]
PADDED_SIZE = tuple(RECORDED["padded_size"])
MASKS = [TENSORS["masks.0"], TENSORS["masks.1"]]
MODES = list(RECORDED["modes"])
LEVELS = range(len(LEVEL_SIZES))
NUM_HEADS = 8
# The recording has 256 draws and so most of the uncertainty.
NUM_DRAWS = 1000


def clean_cells(level: int) -> Tensor:
    """Recorded cells that each mask touches: bool, (S, cells)."""
    return TENSORS[f"clean.{level}"].flatten(1)


@functools.cache
def draw_visible(mode: str, level: int) -> Tensor:
    """Our draws, one a group: bool, (S, draws, heads, cells). True is visible.

    The recording is of the noise alone, so rows that the noise emptied, which come out open, are closed again.
    """
    noise = PilotNoise("point", float(mode.partition(".ns")[2]), per_head=mode.startswith("points_head_dn"))
    counts = [len(masks) for masks in MASKS]
    layout = lay_out_slots(counts, NUM_DRAWS, max(counts), "cpu")
    pilot_masks = PilotMasks.prepare(MASKS, PADDED_SIZE, LEVEL_SIZES, layout, noise, num_heads=NUM_HEADS)
    blocked = pilot_masks.draw_attention_mask(level, torch.Generator().manual_seed(level))
    visible = ~blocked[layout.image_index, :, layout.slot_index].transpose(0, 1)
    return visible & ~visible.all(dim=-1, keepdim=True)


def standard_error_of_mean(draws: Tensor) -> Tensor:
    """How far the mean of the recording and our mean, together, are from the truth: draws (S, draws) -> (S,)."""
    return draws.std(1) * math.sqrt(1 / RECORDED["num_draws"] + 1 / NUM_DRAWS)


def standard_error_of_deviation(draws: Tensor) -> Tensor:
    """The same for the standard deviation, whose spread depends on the fourth moment."""
    deviation = draws.std(1)
    kurtosis = ((draws - draws.mean(1, keepdim=True)) ** 4).mean(1) / deviation**4
    return deviation * ((kurtosis - 1) / 4 * (1 / RECORDED["num_draws"] + 1 / NUM_DRAWS)).sqrt()


@pytest.mark.parametrize("level", LEVELS)
def test_clean_cells_are_bit_equal(level):
    pooled = torch.cat([pool_masks(masks, PADDED_SIZE, LEVEL_SIZES[level]) for masks in MASKS])
    assert torch.equal(pooled, clean_cells(level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_share_of_flipped_cells_has_the_recorded_mean_and_spread(mode, level):
    recorded = RECORDED["modes"][mode]
    flips = draw_visible(mode, level) ^ clean_cells(level)[:, None, None]
    share = flips.sum((2, 3)).double() / flips[0, 0].numel()  # (S, draws), over heads and cells
    mean, deviation = (torch.tensor(recorded[f"{key}_flip_fraction"][level]).double() for key in ("mean", "std"))
    assert ((share.mean(1) - mean).abs() < 3 * standard_error_of_mean(share)).all()
    assert ((share.std(1) - deviation).abs() < 4 * standard_error_of_deviation(share)).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_overlap_with_the_clean_mask_has_the_recorded_mean(mode, level):
    visible, clean = draw_visible(mode, level), clean_cells(level)[:, None, None]
    overlap = ((visible & clean).sum(-1) / (visible | clean).sum(-1)).double().mean(-1)  # (S, draws)
    mean = torch.tensor(RECORDED["modes"][mode]["mean_iou_with_clean"][level]).double()
    assert ((overlap.mean(1) - mean).abs() < 4 * standard_error_of_mean(overlap)).all()


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_cells_inside_and_outside_are_visible_as_often_as_recorded(mode, is_inside):
    for level in LEVELS:
        part = clean_cells(level) == is_inside
        visible = draw_visible(mode, level) & part[:, None, None]
        share = visible.sum(-1).double().mean(-1) / part.sum(-1, keepdim=True)  # (S, draws)
        recorded = TENSORS[f"visible_probability.{mode}.{level}"].flatten(1).double() * part
        distance = share.mean(1) - recorded.sum(-1) / part.sum(-1)
        assert (distance.abs() < 4 * standard_error_of_mean(share)).all()


@pytest.mark.parametrize("mode", MODES)
def test_labels_flip_as_often_as_recorded(mode):
    recorded = RECORDED["modes"][mode]
    mean, error = recorded["label_flip_rate"]
    labels = TENSORS["labels"].expand(NUM_DRAWS, -1)
    generator = torch.Generator().manual_seed(0)
    flipped = flip_labels(labels, recorded["label_noise_ratio"], RECORDED["num_labels"], generator) != labels
    rate = flipped.double().mean().item()
    own_error = math.sqrt(rate * (1 - rate) / labels.numel())
    assert abs(rate - mean) < 3 * math.hypot(error, own_error)
    assert abs(rate - recorded["label_flip_rate_expected"]) < 3 * own_error
