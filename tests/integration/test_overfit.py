"""A tiny model learns four images by heart: everything between pixels and segments works together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from tests.factories import tiny_model

SIZE = 64
NUM_STEPS = 80
LEARNING_RATE = 3e-3

# Per image: class, which is also the colour channel, and top, left, bottom, right of each rectangle.
RECTANGLES = [
    [(0, (4, 4, 28, 40)), (1, (36, 20, 60, 60))],
    [(1, (8, 30, 40, 62)), (2, (44, 4, 60, 24))],
    [(2, (2, 2, 20, 20)), (0, (30, 30, 62, 62)), (1, (40, 4, 60, 20))],
    [(2, (16, 8, 52, 52))],
]


def draw_rectangles() -> dict[str, Any]:
    """Four noisy images, 64x64, with rectangles brighter in the colour of their class; masks and labels."""
    images = 0.3 * torch.randn(len(RECTANGLES), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mask_labels = [torch.zeros(len(rectangles), SIZE, SIZE, dtype=torch.bool) for rectangles in RECTANGLES]
    for image, masks, rectangles in zip(images, mask_labels, RECTANGLES, strict=True):
        for mask, (label, (top, left, bottom, right)) in zip(masks, rectangles, strict=True):
            mask[top:bottom, left:right] = True
            image[label, mask] += 2.0
    class_labels = [torch.tensor([label for label, _ in rectangles]) for rectangles in RECTANGLES]
    return {"pixel_values": images, "mask_labels": mask_labels, "class_labels": class_labels}


def evaluate(model: MPFormerForUniversalSegmentation) -> Any:
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**draw_rectangles())


@pytest.fixture(scope="module")
def before_and_after() -> tuple[Any, Any]:
    """Outputs before and after training."""
    model, batch = tiny_model(), draw_rectangles()
    assert model.config.mask_piloting
    before = evaluate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.1
    )
    torch.manual_seed(0)
    model.train()
    for _ in range(NUM_STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return before, evaluate(model)


def intersection_over_union(first: Tensor, second: Tensor) -> float:
    return ((first & second).sum() / (first | second).sum()).item()


def test_the_loss_of_the_last_level_falls_by_a_large_factor(before_and_after: tuple[Any, Any]):
    # The first level cannot: its queries have not looked at the image yet.
    before, after = (
        sum(outputs.loss_dict[name].item() for name in ("loss_cross_entropy", "loss_mask", "loss_dice"))
        for outputs in before_and_after
    )
    assert after < before / 5, (before, after)


def test_every_instance_is_found_with_its_label_and_no_other(before_and_after: tuple[Any, Any]):
    _, outputs = before_and_after
    results = MPFormerImageProcessor().post_process_instance_segmentation(outputs, preset="display")
    truth = draw_rectangles()
    for result, masks, labels in zip(results, truth["mask_labels"], truth["class_labels"], strict=True):
        assert sorted(result["labels"].tolist()) == sorted(labels.tolist())
        for mask, label in zip(masks, labels, strict=True):
            (found,) = result["masks"][result["labels"] == label]  # a class comes once an image
            assert intersection_over_union(found, mask) > 0.8


def test_panoptic_segments_cover_the_rectangles_and_leave_the_background_void(before_and_after: tuple[Any, Any]):
    _, outputs = before_and_after
    results = MPFormerImageProcessor().post_process_panoptic_segmentation(outputs)
    truth = draw_rectangles()
    for result, masks, labels in zip(results, truth["mask_labels"], truth["class_labels"], strict=True):
        segments = {segment["label_id"]: segment["id"] for segment in result["segments_info"]}
        assert segments.keys() == set(labels.tolist())
        assert len(result["segments_info"]) == len(labels)
        for mask, label in zip(masks, labels.tolist(), strict=True):
            assert intersection_over_union(result["segmentation"] == segments[label], mask) > 0.8
        assert intersection_over_union(result["segmentation"] == 0, ~masks.any(dim=0)) > 0.8
