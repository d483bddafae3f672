"""The losses against plain definitions: full-size masks, loops over rows and slots, autograd.

Axes: V levels, B images, P pilot slots, Q matched queries, N = P + Q, K classes, D channels of the per-pixel embedding, R rows.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpformer_hf import mask_losses
from mpformer_hf.global_batch import GlobalBatch
from mpformer_hf.mask_losses import (
    LevelPredictions,
    PointSettings,
    Rows,
    RowTargets,
    UniversalSegmentationCriterion,
    list_rows,
    name_terms,
)
from mpformer_hf.mask_matching import Assignment, CostWeights, assign, compute_matching_costs
from mpformer_hf.mask_piloting import SlotLayout, lay_out_slots
from mpformer_hf.target_checks import Targets, check_targets

NUM_LEVELS, NUM_LABELS, EMBEDDING = 3, 4, 5
MAP_SIZE, PADDED_SIZE = (6, 8), (24, 32)
POINTS = PointSettings(num_points=20, oversample_ratio=3.0, importance_sample_ratio=0.75)
WEIGHTS = CostWeights(label=2.0, mask=5.0, dice=3.0)


def make_criterion(**changes) -> UniversalSegmentationCriterion:
    settings = {"no_object_weight": 0.1, "weights": WEIGHTS, "points": POINTS, "max_nonfinite_steps": 3} | changes
    return UniversalSegmentationCriterion(NUM_LABELS, **settings)


def draw_targets(
    num_segments: tuple[int, ...] = (2, 0, 3), dtype: torch.dtype = torch.bool, size: tuple[int, int] = PADDED_SIZE
) -> Targets:
    masks = [torch.empty(count, *size).uniform_() < 0.4 for count in num_segments]
    return check_targets(
        torch.zeros(len(num_segments), 3, *PADDED_SIZE),
        torch.tensor(size).expand(len(num_segments), 2),
        [mask.to(dtype) for mask in masks],
        [torch.randint(NUM_LABELS, (count,)) for count in num_segments],
        NUM_LABELS,
    )


def draw_predictions(num_images: int, num_predictions: int, dtype: torch.dtype = torch.float32) -> LevelPredictions:
    """Leaves that require a gradient."""
    return LevelPredictions(
        class_logits=[
            torch.randn(num_images, num_predictions, NUM_LABELS + 1, dtype=dtype, requires_grad=True)
            for _ in range(NUM_LEVELS)
        ],
        mask_embeddings=[
            torch.randn(num_images, num_predictions, EMBEDDING, dtype=dtype, requires_grad=True)
            for _ in range(NUM_LEVELS)
        ],
        pixel_embedding=torch.randn(num_images, EMBEDDING, *MAP_SIZE, dtype=dtype, requires_grad=True),
    )


def leaves_of(predictions: LevelPredictions) -> list[Tensor]:
    return [*predictions.class_logits, *predictions.mask_embeddings, predictions.pixel_embedding]


def lay_out(targets: Targets, num_groups: int, max_targets: int | None = None) -> SlotLayout:
    return lay_out_slots(targets.num_segments, num_groups, max_targets or max(targets.num_segments), "cpu")


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results of all calls of `torch.rand` in the test, in order; the points are among them."""
    recorded: list[Tensor] = []
    draw: Callable[..., Tensor] = torch.rand

    def recording(*size: int, **keywords) -> Tensor:
        recorded.append(draw(*size, **keywords))
        return recorded[-1]

    monkeypatch.setattr(torch, "rand", recording)
    return recorded


@pytest.fixture
def same_points_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.rand` gives every row the same points, whatever the number of rows and the order of the calls."""
    draw: Callable[..., Tensor] = torch.rand

    def repeated(num_rows: int, num_points: int, two: int, **keywords) -> Tensor:
        generator = torch.Generator().manual_seed(num_points)
        points = draw(1, num_points, two, generator=generator, dtype=torch.float64)
        return points.to(keywords["dtype"]).expand(num_rows, -1, -1).clone()

    monkeypatch.setattr(torch, "rand", repeated)


# ---------------------------------------------------------------------------------------------------- plain definitions


def read(image: Tensor, points: Tensor) -> Tensor:
    """Values of one (h, w) map at (P, 2) points."""
    return nn.functional.grid_sample(image[None, None], 2 * points[None, None] - 1, align_corners=False)[0, 0, 0]


def mask_and_dice(mask: Tensor, target: Tensor, candidates: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses of one row by definition: mask logits (h, w), target mask (., .), drawn points."""
    height, width = target.shape
    padded = nn.functional.pad(target.to(mask.dtype), (0, PADDED_SIZE[1] - width, 0, PADDED_SIZE[0] - height))
    certainty = read(mask.detach(), candidates).abs()
    kept = certainty.argsort()[: int(POINTS.importance_sample_ratio * POINTS.num_points)]
    points = torch.cat([candidates[kept], rest])
    label, probability = read(padded, points), read(mask, points).sigmoid()
    cross_entropy = -(label * probability.log() + (1 - label) * (1 - probability).log()).mean()
    dice = 1 - (2 * (probability * label).sum() + 1) / (probability.sum() + label.sum() + 1)
    return cross_entropy, dice


def weighted_mean_cross_entropy(logits: Tensor, labels: list[list[int]], class_weights: list[float]) -> Tensor:
    """Of one level: logits (B, M, K + 1) and B lists of M labels."""
    total, total_weight = torch.zeros((), dtype=logits.dtype), 0.0
    for image, image_labels in enumerate(labels):
        for place, label in enumerate(image_labels):
            total = total - class_weights[label] * logits[image, place].log_softmax(-1)[label]
            total_weight += class_weights[label]
    return total / total_weight


@dataclass
class PlainTerms:
    """Weighted terms by definition, one a level, with a graph."""

    cross_entropy: list[Tensor]
    mask: list[Tensor]
    dice: list[Tensor]
    pilot_cross_entropy: list[Tensor]
    pilot_mask: list[Tensor]
    pilot_dice: list[Tensor]

    def total(self) -> Tensor:
        return torch.stack([term for terms in vars(self).values() for term in terms]).sum()

    def named(self, *, with_pilot: bool) -> dict[str, Tensor]:
        return {
            f"loss_{kind}" + ("" if level == NUM_LEVELS - 1 else f"_{level}"): value
            for kind, levels in vars(self).items()
            for level, value in enumerate(levels)
            if with_pilot or not kind.startswith("pilot")
        }


def losses_by_definition(
    predictions: LevelPredictions,
    targets: Targets,
    layout: SlotLayout | None,
    draws: list[Tensor],
    class_weights: list[float],
) -> PlainTerms:
    """The criterion without algebra: full-size masks, one row after the other.

    Matched pairs come from the matching costs, which have a test of their own. `draws`: first the points of the matching, then
    candidates and rest of the rows of each image, matched rows first, level by level, then the pilot slots likewise.
    """
    num_slots = 0 if layout is None else layout.num_slots
    num_groups = 0 if layout is None else layout.num_groups
    pending = list(draws)
    matching_points = pending.pop(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: matching_points)
        costs = compute_matching_costs(
            torch.stack([logits.float()[:, num_slots:] for logits in predictions.class_logits]),
            torch.stack([embeddings.float()[:, num_slots:] for embeddings in predictions.mask_embeddings]),
            predictions.pixel_embedding.float(),
            targets.mask_labels,
            targets.class_labels,
            PADDED_SIZE,
            weights=WEIGHTS,
            num_points=POINTS.num_points,
        )
    num_predictions = predictions.class_logits[0].shape[1]
    labels = [
        [[NUM_LABELS] * num_predictions for _ in targets.class_labels] for _ in range(NUM_LEVELS)
    ]  # "no object" first
    zeros = [torch.zeros((), dtype=torch.float64) for _ in range(NUM_LEVELS)]
    sums = {"mask": list(zeros), "dice": list(zeros), "pilot_mask": list(zeros), "pilot_dice": list(zeros)}
    num_masks = max(1.0, float(sum(targets.num_segments)))
    for image, cost in enumerate(costs):
        found = assign(cost.numpy())
        rows = [
            ("", int(level), num_slots + int(query), int(target), num_masks)
            for level, query, target in zip(found.level, found.query, found.target, strict=True)
        ]
        rows += [
            ("pilot_", level, group * layout.max_targets + target, target, num_masks * num_groups)
            for level in range(NUM_LEVELS)
            for group in range(num_groups)
            for target in range(targets.num_segments[image])
        ]
        if not rows:
            continue
        candidates, rest = pending.pop(0), pending.pop(0)
        for row, (kind, level, position, target, divisor) in enumerate(rows):
            labels[level][image][position] = int(targets.class_labels[image][target])
            mask = torch.einsum(
                "d,dhw->hw", predictions.mask_embeddings[level][image, position], predictions.pixel_embedding[image]
            )
            cross_entropy, dice = mask_and_dice(
                mask.double(), targets.mask_labels[image][target], candidates[row].double(), rest[row].double()
            )
            sums[f"{kind}mask"][level] = sums[f"{kind}mask"][level] + WEIGHTS.mask * cross_entropy / divisor
            sums[f"{kind}dice"][level] = sums[f"{kind}dice"][level] + WEIGHTS.dice * dice / divisor
    assert not pending

    def label_terms(part: slice) -> list[Tensor]:
        return [
            WEIGHTS.label
            * weighted_mean_cross_entropy(
                logits[:, part].double(), [image[part] for image in labels[level]], class_weights
            )
            for level, logits in enumerate(predictions.class_logits)
        ]

    return PlainTerms(
        cross_entropy=label_terms(slice(num_slots, None)),
        pilot_cross_entropy=label_terms(slice(0, num_slots)) if num_slots else list(zeros),
        **sums,
    )


# --------------------------------------------------------------------------------------------------- the fused mask loss


@dataclass(frozen=True)
class FusedInputs:
    """Rows of three images, two of them with rows, in double precision."""

    embeddings: Tensor
    pixel_embedding: Tensor
    row_targets: RowTargets
    mask_scale: Tensor
    dice_scale: Tensor

    def run(self, *, needs_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return mask_losses._PointMaskLoss.apply(
            self.embeddings, self.pixel_embedding, self.row_targets, self.mask_scale, self.dice_scale, needs_gradient
        )

    def run_plainly(self, draws: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same with a graph; `draws` holds candidates and rest of each image that has rows."""
        rows, targets = self.row_targets.rows, self.row_targets.targets
        candidates, rest = torch.cat(draws[0::2]), torch.cat(draws[1::2])
        masks = torch.einsum("rd,rdhw->rhw", self.embeddings, self.pixel_embedding[torch.from_numpy(rows.image)])
        losses = [
            mask_and_dice(mask, targets.mask_labels[image][target], candidates[row], rest[row])
            for row, (mask, image, target) in enumerate(zip(masks, rows.image, rows.target, strict=True))
        ]
        cross_entropy, dice = (torch.stack(kind) for kind in zip(*losses, strict=True))
        return (cross_entropy * self.mask_scale + dice * self.dice_scale).sum(), cross_entropy, dice

    def gradients_of(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, (self.embeddings, self.pixel_embedding))


def draw_fused_inputs(dtype: torch.dtype = torch.bool, size: tuple[int, int] = PADDED_SIZE) -> FusedInputs:
    image = np.array([0, 0, 0, 0, 2, 2, 2], dtype=np.int64)
    target = np.array([1, 0, 1, 1, 2, 0, 1], dtype=np.int64)
    unused = np.zeros(7, dtype=np.int64)
    rows = Rows(level=unused, image=image, position=unused, target=target, piloted=unused)
    return FusedInputs(
        embeddings=torch.randn(7, EMBEDDING, dtype=torch.float64, requires_grad=True),
        pixel_embedding=torch.randn(3, EMBEDDING, *MAP_SIZE, dtype=torch.float64, requires_grad=True),
        row_targets=RowTargets(rows, draw_targets(dtype=dtype, size=size), POINTS),
        mask_scale=torch.empty(7, dtype=torch.float64).uniform_(0.2, 1.0),
        dice_scale=torch.empty(7, dtype=torch.float64).uniform_(0.2, 1.0),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [PADDED_SIZE, (19, 26)], ids=["padded_size", "own_size"])
def test_fused_loss_equals_autograd_on_full_masks(dtype: torch.dtype, size: tuple[int, int], draws: list[Tensor]):
    inputs = draw_fused_inputs(dtype, size)
    total, cross_entropy, dice = inputs.run()
    assert [tuple(points.shape) for points in draws] == [(4, 60, 2), (4, 5, 2), (3, 60, 2), (3, 5, 2)]
    expected_total, expected_cross_entropy, expected_dice = inputs.run_plainly(draws)

    torch.testing.assert_close(total, expected_total, rtol=1e-10, atol=0)
    torch.testing.assert_close(cross_entropy, expected_cross_entropy, rtol=1e-10, atol=0)
    torch.testing.assert_close(dice, expected_dice, rtol=1e-10, atol=0)
    for gradient, expected in zip(inputs.gradients_of(total), inputs.gradients_of(expected_total), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("numbers_at_once", [1, 130, 300])
def test_chunks_of_rows_do_not_change_the_result(
    numbers_at_once: int, same_points_everywhere: None, monkeypatch: pytest.MonkeyPatch
):
    """120 numbers a row (candidates): chunks of 1, 1 and 2 rows."""
    inputs = draw_fused_inputs()
    total, cross_entropy, dice = inputs.run()
    gradients = inputs.gradients_of(total)
    monkeypatch.setattr(mask_losses, "NUMBERS_AT_ONCE", numbers_at_once)
    chunked_total, chunked_cross_entropy, chunked_dice = inputs.run()

    torch.testing.assert_close(chunked_total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(chunked_cross_entropy, cross_entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(chunked_dice, dice, rtol=1e-12, atol=0)
    for chunked, expected in zip(inputs.gradients_of(chunked_total), gradients, strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-10, atol=1e-13)


def test_chunks_keep_to_one_image(draws: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    """Four rows of the first image and three of the last, two at a time; every chunk draws candidates and rest."""
    monkeypatch.setattr(mask_losses, "NUMBERS_AT_ONCE", 300)
    draw_fused_inputs().run()
    assert [len(points) for points in draws] == [2, 2, 2, 2, 2, 2, 1, 1]


def test_gradients_scale_with_what_comes_from_above(same_points_everywhere: None):
    """As with a gradient scaler of mixed precision."""
    inputs = draw_fused_inputs()
    plain = inputs.gradients_of(inputs.run()[0])
    scaled = inputs.gradients_of(inputs.run()[0] * 1024.0)
    for small, large in zip(plain, scaled, strict=True):
        torch.testing.assert_close(large, 1024.0 * small, rtol=1e-12, atol=0)


def test_losses_of_rows_are_for_reporting_only():
    _, cross_entropy, dice = draw_fused_inputs().run()
    assert not cross_entropy.requires_grad
    assert not dice.requires_grad


def test_no_gradient_is_computed_where_none_is_wanted(same_points_everywhere: None, monkeypatch: pytest.MonkeyPatch):
    inputs = draw_fused_inputs()
    expected, _, _ = inputs.run()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("computed a gradient"))
    with torch.no_grad():
        total, _, _ = inputs.run(needs_gradient=False)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 3, 2), (3, 2, 1, 0)], ids=str)
def test_the_per_pixel_embedding_may_have_any_memory_layout(order: tuple[int, ...], same_points_everywhere: None):
    inputs = draw_fused_inputs()
    expected = inputs.gradients_of(inputs.run()[0])
    inverse = tuple(order.index(axis) for axis in range(4))
    permuted = inputs.pixel_embedding.detach().permute(order).contiguous().permute(inverse).requires_grad_()
    assert not permuted.is_contiguous()
    other = replace(inputs, pixel_embedding=permuted)
    for gradient, wanted in zip(other.gradients_of(other.run()[0]), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_no_rows_give_zero_and_still_reach_embeddings_and_pixels():
    empty = np.zeros(0, dtype=np.int64)
    rows = RowTargets(Rows(empty, empty, empty, empty, empty), draw_targets((0, 0)), POINTS)
    embeddings = torch.randn(0, EMBEDDING, requires_grad=True)
    pixels = torch.randn(2, EMBEDDING, *MAP_SIZE, requires_grad=True)
    total, cross_entropy, dice = mask_losses._PointMaskLoss.apply(
        embeddings, pixels, rows, torch.zeros(0), torch.zeros(0), True
    )
    assert total.item() == 0
    assert len(cross_entropy) == len(dice) == 0
    gradients = torch.autograd.grad(total, (embeddings, pixels))
    assert gradients[0].shape == (0, EMBEDDING)
    assert (gradients[1] == 0).all()


# ---------------------------------------------------------------------------------------------------- the whole criterion


@pytest.mark.parametrize(
    ("num_groups", "max_targets"),
    [(0, None), (1, None), (2, None), (2, 5)],
    ids=["no_pilot", "one_group", "two_groups", "slots_of_another_process"],
)
@pytest.mark.parametrize("num_segments", [(2, 0, 3), (5, 1)], ids=["with_an_empty_image", "more_segments_than_queries"])
def test_all_terms_and_gradients_follow_their_definitions(
    num_groups: int, max_targets: int | None, num_segments: tuple[int, ...], draws: list[Tensor]
):
    targets = draw_targets(num_segments)
    layout = lay_out(targets, num_groups, max_targets) if num_groups else None
    predictions = draw_predictions(len(num_segments), 4 + (layout.num_slots if layout else 0))

    loss, terms = make_criterion()(predictions, targets, layout)

    plain = losses_by_definition(predictions, targets, layout, draws, [1.0] * NUM_LABELS + [0.1])
    expected = plain.named(with_pilot=layout is not None)
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(loss.double(), plain.total(), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), loss.detach(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, leaves_of(predictions))
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain.total(), leaves_of(predictions)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


def test_terms_are_named_by_level_with_the_last_one_bare():
    terms = name_terms({"loss_mask": torch.tensor([1.0, 2.0, 3.0])})
    assert {name: value.item() for name, value in terms.items()} == {
        "loss_mask_0": 1.0,
        "loss_mask_1": 2.0,
        "loss_mask": 3.0,
    }


def test_rows_list_matched_pairs_and_the_slots_of_every_group_at_every_level():
    targets = draw_targets((1, 2))
    found = [
        Assignment(np.array([0, 1]), np.array([3, 0]), np.array([0, 0]), ()),
        Assignment(np.array([0, 0, 1, 1]), np.array([1, 2, 0, 3]), np.array([0, 1, 1, 0]), ()),
    ]
    rows = list_rows(found, targets.num_segments, lay_out(targets, num_groups=2), num_levels=2)
    listed = {
        tuple(int(number) for number in row)
        for row in zip(rows.level, rows.image, rows.position, rows.target, rows.piloted, strict=True)
    }
    matched = {(0, 0, 7, 0, 0), (1, 0, 4, 0, 0), (0, 1, 5, 0, 0), (0, 1, 6, 1, 0), (1, 1, 4, 1, 0), (1, 1, 7, 0, 0)}
    # Slots 0 and 1 are the first group, 2 and 3 the second; the first image leaves slots 1 and 3 empty.
    first_image = {(level, 0, slot, 0, 1) for level in range(2) for slot in (0, 2)}
    second_image = {
        (level, 1, 2 * group + place, place, 1) for level in range(2) for group in (0, 1) for place in (0, 1)
    }
    assert listed == matched | first_image | second_image
    assert len(rows.level) == len(listed)
    assert (np.diff(rows.image) >= 0).all()


def test_empty_pilot_slots_are_trained_as_no_object():
    """One image, one segment of label 1, three slots: weights 1, 0.1 and 0.1."""
    targets = draw_targets((1,))
    targets.class_labels[0][0] = 1
    layout = lay_out(targets, num_groups=1, max_targets=3)
    predictions = draw_predictions(1, 3 + 2)
    _, terms = make_criterion()(predictions, targets, layout)
    logs = predictions.class_logits[-1][0].log_softmax(-1)
    mean = -(logs[0, 1] + 0.1 * logs[1, NUM_LABELS] + 0.1 * logs[2, NUM_LABELS]) / 1.2
    torch.testing.assert_close(terms["loss_pilot_cross_entropy"], WEIGHTS.label * mean.detach())


def test_copies_of_a_group_change_neither_loss_nor_gradient(same_points_everywhere: None):
    """Mask and dice losses are divided by the groups, the cross entropy is a mean already."""
    targets = draw_targets()
    one_group = draw_predictions(3, 3 + 4)

    def copy_slots(level: Tensor) -> Tensor:
        return torch.cat([level[:, :3]] * 3 + [level[:, 3:]], dim=1)

    three_groups = LevelPredictions(
        [copy_slots(level) for level in one_group.class_logits],
        [copy_slots(level) for level in one_group.mask_embeddings],
        one_group.pixel_embedding,
    )
    loss, terms = make_criterion()(one_group, targets, lay_out(targets, 1))
    other_loss, other_terms = make_criterion()(three_groups, targets, lay_out(targets, 3))
    for name, value in terms.items():
        torch.testing.assert_close(other_terms[name], value, rtol=1e-5, atol=1e-6, msg=name)
    gradients = torch.autograd.grad(loss, leaves_of(one_group))
    for gradient, other in zip(gradients, torch.autograd.grad(other_loss, leaves_of(one_group)), strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_pilot_labels_can_be_left_out():
    targets = draw_targets()
    layout = lay_out(targets, 1)
    predictions = draw_predictions(3, 3 + 4)
    loss, terms = make_criterion()(predictions, targets, layout, pilot_label_loss=False)
    assert not any("pilot_cross_entropy" in name for name in terms)
    assert len(terms) == 5 * NUM_LEVELS
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), loss.detach())
    gradients = torch.autograd.grad(loss, list(predictions.class_logits))
    assert all((gradient[:, :3] == 0).all() for gradient in gradients)
    assert all((gradient[:, 3:] != 0).any() for gradient in gradients)


def test_a_batch_without_segments_has_only_a_cross_entropy_and_reaches_everything():
    targets = draw_targets((0, 0))
    predictions = draw_predictions(2, 4)
    loss, terms = make_criterion()(predictions, targets, None)
    for name, value in terms.items():
        assert (value == 0) == ("cross_entropy" not in name), name
    gradients = torch.autograd.grad(loss, leaves_of(predictions))  # raises for a leaf that is not in the graph
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_single_segment_among_many_images_is_not_blown_up(same_points_everywhere: None):
    """The number of masks is that of the whole batch."""
    targets = draw_targets((1, 0, 0, 0))
    predictions = draw_predictions(4, 4)
    _, terms = make_criterion()(predictions, targets, None)
    alone = Targets(targets.mask_labels[:1], targets.class_labels[:1], PADDED_SIZE, targets.values[:1])
    first = LevelPredictions(
        [level[:1] for level in predictions.class_logits],
        [level[:1] for level in predictions.mask_embeddings],
        predictions.pixel_embedding[:1],
    )
    _, terms_alone = make_criterion()(first, alone, None)
    torch.testing.assert_close(terms["loss_mask"], terms_alone["loss_mask"])


def test_without_a_weight_for_no_object_an_empty_batch_costs_nothing():
    predictions = draw_predictions(2, 4)
    loss, _ = make_criterion(no_object_weight=0.0)(predictions, draw_targets((0, 0)), None)
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves_of(predictions)))


def test_loaded_class_weights_are_used_but_that_of_no_object_is_the_configured_one(draws: list[Tensor]):
    criterion = make_criterion(no_object_weight=0.25)
    class_weights = [0.5, 2.0, 1.0, 3.0, 0.25]
    criterion.load_state_dict({"empty_weight": torch.tensor([*class_weights[:-1], 0.7])})
    targets, predictions = draw_targets(), draw_predictions(3, 4)
    _, terms = criterion(predictions, targets, None)
    expected = losses_by_definition(predictions, targets, None, draws, class_weights).named(with_pilot=False)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


def test_terms_are_detached():
    targets = draw_targets()
    _, terms = make_criterion()(draw_predictions(3, 7), targets, lay_out(targets, 1))
    assert not any(value.requires_grad for value in terms.values())
    assert all(value.shape == () for value in terms.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16], ids=str)
def test_masks_may_be_bool_uint8_or_float(dtype: torch.dtype, same_points_everywhere: None):
    targets, predictions = draw_targets(), draw_predictions(3, 4)
    loss, _ = make_criterion()(predictions, targets, None)
    converted = replace(targets, mask_labels=[masks.to(dtype) for masks in targets.mask_labels])
    assert make_criterion()(predictions, converted, None)[0].item() == loss.item()


def test_masks_of_the_images_own_size_equal_padded_ones(same_points_everywhere: None):
    targets, predictions = draw_targets(size=(17, 30)), draw_predictions(3, 4)
    padded = replace(targets, mask_labels=[nn.functional.pad(masks, (0, 2, 0, 7)) for masks in targets.mask_labels])
    loss, padded_loss = (make_criterion()(predictions, given, None)[0].item() for given in (targets, padded))
    assert loss == pytest.approx(padded_loss, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_have_a_float32_loss_and_gradients_of_their_own_type(
    dtype: torch.dtype, same_points_everywhere: None
):
    targets, predictions = draw_targets(), draw_predictions(3, 4, dtype)
    single = LevelPredictions(
        [level.float() for level in predictions.class_logits],
        [level.float() for level in predictions.mask_embeddings],
        predictions.pixel_embedding.float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = make_criterion()(predictions, targets, None)
    assert loss.dtype == torch.float32
    assert loss.item() == make_criterion()(single, targets, None)[0].item()
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, leaves_of(predictions))} == {dtype}


def test_values_out_of_range_raise_before_the_loss_and_name_the_image():
    predictions = draw_predictions(2, 4)
    images = torch.zeros(2, 3, *PADDED_SIZE)
    masks, labels = [torch.zeros(1, *PADDED_SIZE) for _ in range(2)], [torch.zeros(1, dtype=torch.int64)] * 2
    bad_images = images.clone()
    bad_images[1, 0, 3, 4] = torch.nan
    cases = {
        r"Image 1 has pixels that are not finite": (bad_images, masks, labels),
        r"Expected class labels from 0 to 3, got 4 to 4 in image 1": (images, masks, [labels[0], labels[1] + 4]),
        r"Expected mask values in \[0, 1\], got 255 to 255 in image 0": (images, [masks[0] + 255, masks[1]], labels),
    }
    for message, (given_images, given_masks, given_labels) in cases.items():
        targets = check_targets(given_images, None, given_masks, given_labels, NUM_LABELS)
        with pytest.raises(ValueError, match=message):
            make_criterion()(predictions, targets, None)


# ------------------------------------------------------------------------------------------------------ unknown labels


def touches(ignore_mask: Tensor, point: Tensor) -> bool:
    """Whether a bilinear value at one point depends on a pixel that is ignored: plainly, pixel by pixel."""
    x, y = (point.double() * torch.tensor([PADDED_SIZE[1], PADDED_SIZE[0]]) - 0.5).tolist()
    return any(
        bool(ignore_mask[row, column]) and abs(y - row) < 1 and abs(x - column) < 1
        for row in range(ignore_mask.shape[0])
        for column in range(ignore_mask.shape[1])
    )


def losses_where_known(
    mask: Tensor, target: Tensor, ignore_mask: Tensor, candidates: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Both losses of one row by definition; points that are ignored are thrown away, and candidates are chosen among others."""
    height, width = target.shape
    padded = nn.functional.pad(target.double(), (0, PADDED_SIZE[1] - width, 0, PADDED_SIZE[0] - height))
    known = [point for point in candidates if not touches(ignore_mask, point)]
    known.sort(key=lambda point: read(mask.detach(), point[None]).abs().item())
    points = known[: int(POINTS.importance_sample_ratio * POINTS.num_points)]
    points += [point for point in rest if not touches(ignore_mask, point)]
    if not points:
        return mask.sum() * 0.0, mask.sum() * 0.0
    label, probability = read(padded, torch.stack(points)), read(mask, torch.stack(points)).sigmoid()
    cross_entropy = -(label * probability.log() + (1 - label) * (1 - probability).log()).mean()
    return cross_entropy, 1 - (2 * (probability * label).sum() + 1) / (probability.sum() + label.sum() + 1)


@pytest.mark.parametrize("size", [PADDED_SIZE, (19, 26)], ids=["padded_size", "own_size"])
def test_points_on_unknown_pixels_count_in_no_mask_loss(size: tuple[int, int], draws: list[Tensor]):
    """The first image is known in part, the last not at all."""
    inputs = draw_fused_inputs(size=size)
    unknown_in_part, unknown = torch.zeros(size, dtype=torch.bool), torch.ones(PADDED_SIZE, dtype=torch.bool)
    unknown_in_part[4:15, 3:12] = True
    unknown_in_part[0, 20] = True
    targets = replace(inputs.row_targets.targets, ignore_masks=[unknown_in_part, None, unknown])
    inputs = replace(inputs, row_targets=replace(inputs.row_targets, targets=targets))
    draws.clear()
    total, cross_entropy, dice = inputs.run()

    candidates, rest = torch.cat(draws[0::2]), torch.cat(draws[1::2])
    rows = inputs.row_targets.rows
    expected = []
    for row, (image, target) in enumerate(zip(rows.image, rows.target, strict=True)):
        mask = torch.einsum("d,dhw->hw", inputs.embeddings[row], inputs.pixel_embedding[image])
        ignore_mask = targets.ignore_masks[image]
        expected.append(
            losses_where_known(mask, targets.mask_labels[image][target], ignore_mask, candidates[row], rest[row])
        )
    expected_cross_entropy, expected_dice = (torch.stack(kind) for kind in zip(*expected, strict=True))
    expected_total = (expected_cross_entropy * inputs.mask_scale + expected_dice * inputs.dice_scale).sum()
    torch.testing.assert_close(cross_entropy, expected_cross_entropy.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(dice, expected_dice.detach(), rtol=1e-10, atol=1e-14)
    assert (cross_entropy[:4] > 0).all()
    assert (cross_entropy[4:] == 0).all()
    assert (dice[4:] == 0).all()
    gradients, wanted = inputs.gradients_of(total), inputs.gradients_of(expected_total)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)
    assert (gradients[0][4:] == 0).all()


@pytest.mark.parametrize("num_groups", [0, 2])
def test_what_masks_say_about_unknown_pixels_changes_no_digit(num_groups: int):
    predictions, targets = draw_predictions(3, 4 + 3 * num_groups), draw_targets()
    layout = lay_out(targets, num_groups) if num_groups else None
    ignore_masks = [torch.rand(PADDED_SIZE) < 0.2 for _ in range(3)]
    other_masks = [masks ^ ignored for masks, ignored in zip(targets.mask_labels, ignore_masks, strict=True)]
    results = []
    for masks in (targets.mask_labels, other_masks):
        torch.manual_seed(0)
        given = replace(targets, mask_labels=masks, ignore_masks=ignore_masks)
        loss, terms = make_criterion()(predictions, given, layout)
        results.append([loss, *terms.values(), *torch.autograd.grad(loss, leaves_of(predictions))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(0)
    everything_known, _ = make_criterion()(predictions, targets, layout)
    assert everything_known != results[0][0]


@pytest.mark.parametrize("num_groups", [0, 2])
def test_an_image_of_which_nothing_is_known_has_label_losses_alone(num_groups: int):
    predictions, targets = draw_predictions(3, 4 + 3 * num_groups), draw_targets()
    layout = lay_out(targets, num_groups) if num_groups else None
    unknown = replace(targets, ignore_masks=[torch.ones(PADDED_SIZE, dtype=torch.bool)] * 3)
    loss, terms = make_criterion()(predictions, unknown, layout)
    for name, term in terms.items():
        assert (term > 0) == ("cross_entropy" in name), name
    gradients = torch.autograd.grad(loss, [*predictions.mask_embeddings, predictions.pixel_embedding])
    assert not any(gradient.any() for gradient in gradients)


def test_nothing_unknown_is_the_same_as_no_ignore_masks():
    predictions, targets = draw_predictions(3, 4), draw_targets()
    losses = []
    for ignore_masks in (None, [None] * 3, [torch.zeros(PADDED_SIZE, dtype=torch.bool)] * 3):
        torch.manual_seed(0)
        losses.append(make_criterion()(predictions, replace(targets, ignore_masks=ignore_masks), None)[0])
    assert losses[1] == losses[0]
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------- memory and host


class LargestResult(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("num_groups", [0, 2])
def test_masks_of_all_queries_are_neither_made_nor_kept(num_groups: int, monkeypatch: pytest.MonkeyPatch):
    """Few points and channels, many queries: full-size masks of all queries would be by far the largest tensor."""
    num_images, num_queries, size = 2, 50, (40, 40)
    monkeypatch.setattr(mask_losses, "NUMBERS_AT_ONCE", 2 * size[0] * size[1])
    targets = draw_targets((3, 2))
    layout = lay_out(targets, num_groups) if num_groups else None
    predictions = draw_predictions(num_images, num_queries + (layout.num_slots if layout else 0))
    predictions = replace(predictions, pixel_embedding=torch.randn(num_images, EMBEDDING, *size, requires_grad=True))
    full_masks = num_images * num_queries * size[0] * size[1]  # of one level

    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestResult() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = make_criterion()(predictions, targets, layout)
        loss.backward()

    # The largest tensor is the per-pixel embedding itself; only its gradient, made on the way forward, is as large.
    assert largest.numel == num_images * EMBEDDING * size[0] * size[1] == full_masks / 10
    assert max(saved) == largest.numel
    assert sum(saved) < full_masks


class HostReads(TorchFunctionMode):
    """Calls that make the host wait for the device, by name."""

    NAMES = frozenset(
        {"cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "new_tensor"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        # Copying numbers from the host to an accelerator waits too, unless it is told not to.
        makes_tensor_there = name in {"tensor", "as_tensor"} and (kwargs or {}).get("device") is not None
        if name in self.NAMES or makes_tensor_there:
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


class ImplicitReads(TorchDispatchMode):
    """Operators that need a value on the host, also where no method of a tensor is called by name."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(self.NAMES):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("num_segments", [(2, 0, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("with_options", [False, True])
def test_a_step_waits_for_the_device_once(num_groups: int, num_segments: tuple[int, ...], with_options: bool):
    """All costs and all checks of values travel in one copy to the host.

    On the CPU `cpu()` does nothing and no operator runs, so explicit reads are counted where Python calls them; implicit ones
    (a tensor in an `if`, a boolean index) by the operators that they run.
    """
    targets = draw_targets(num_segments)
    layout = lay_out(targets, num_groups, 3) if num_groups else None
    predictions = draw_predictions(3, 4 + (layout.num_slots if layout else 0))
    criterion = make_criterion()
    if with_options:
        counts = GlobalBatch.count([targets.class_labels] * 2, num_labels=NUM_LABELS, num_queries=4)
        ignore_masks = [torch.rand(PADDED_SIZE) < 0.2, None, torch.rand(PADDED_SIZE) < 0.2]
        targets = replace(targets, global_batch=replace(counts, max_segments=3), ignore_masks=ignore_masks)
    with HostReads() as reads, ImplicitReads() as implicit:
        loss, _ = criterion(predictions, targets, layout)
        loss.backward()
    assert reads.calls == ["cpu"]
    assert implicit.calls == []


# ------------------------------------------------------------------------------------- divergence and surplus segments


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Messages that were logged so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def spoil(predictions: LevelPredictions, level: int, image: int) -> LevelPredictions:
    embeddings = [tensor.detach().clone() for tensor in predictions.mask_embeddings]
    embeddings[level][image, 0, 0] = torch.nan
    return replace(predictions, mask_embeddings=[tensor.requires_grad_() for tensor in embeddings])


def test_single_bad_steps_are_counted_and_reported_once(warnings_logged: Callable[[], list[str]]):
    criterion, targets, good = make_criterion(), draw_targets(), draw_predictions(3, 4)
    bad = spoil(good, level=1, image=2)
    for predictions, counted in ((good, 0), (bad, 1), (bad, 2), (good, 0), (bad, 1), (bad, 2), (good, 0)):
        criterion(predictions, targets, None)
        assert criterion.nonfinite_steps == counted
    messages = warnings_logged()
    assert len(messages) == 1
    assert "not finite in step 2, level 1, image 2" in messages[0]


def test_training_that_has_diverged_stops_with_step_level_and_image():
    criterion, targets, good = make_criterion(), draw_targets(), draw_predictions(3, 4)
    bad = spoil(good, level=2, image=0)
    criterion(good, targets, None)
    criterion(bad, targets, None)
    criterion(bad, targets, None)
    with pytest.raises(FloatingPointError, match=r"3 consecutive training steps, last in step 4, level 2, image 0"):
        criterion(bad, targets, None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_class_logits_that_are_not_finite_count_too(value: float):
    criterion, targets, predictions = make_criterion(max_nonfinite_steps=1), draw_targets(), draw_predictions(3, 4)
    predictions.class_logits[0].data[0, 1, 2] = value
    with pytest.raises(FloatingPointError, match=r"step 1, level 0, image 0"):
        criterion(predictions, targets, None)


def test_evaluation_does_not_count_bad_steps(warnings_logged: Callable[[], list[str]]):
    criterion, targets = make_criterion(max_nonfinite_steps=1).eval(), draw_targets()
    bad = spoil(draw_predictions(3, 4), level=0, image=0)
    criterion(bad, targets, None)
    assert criterion.nonfinite_steps == criterion.training_steps == 0
    assert warnings_logged() == []


def test_a_pilot_slot_that_is_not_finite_makes_no_matching_cost():
    """Only the matching can be arbitrary; the loss itself shows the rest."""
    criterion, targets = make_criterion(max_nonfinite_steps=1), draw_targets()
    layout = lay_out(targets, 1)
    bad = spoil(draw_predictions(3, layout.num_slots + 4), level=0, image=0)  # position 0 is a slot
    loss, _ = criterion(bad, targets, layout)
    assert loss.isnan()
    assert criterion.nonfinite_steps == 0


def test_only_the_class_weights_are_saved():
    criterion, targets = make_criterion(), draw_targets()
    criterion(spoil(draw_predictions(3, 4), level=0, image=0), targets, None)
    assert criterion.nonfinite_steps == 1
    assert list(criterion.state_dict()) == ["empty_weight"]
    torch.testing.assert_close(criterion.empty_weight, torch.tensor([1.0] * NUM_LABELS + [0.1]))


def test_surplus_segments_are_counted_and_reported_once(warnings_logged: Callable[[], list[str]]):
    criterion = make_criterion()
    criterion(draw_predictions(3, 4), draw_targets((1, 6, 5)), None)
    assert criterion.surplus_segments == 3
    criterion(draw_predictions(2, 4), draw_targets((7, 4)), None)
    assert criterion.surplus_segments == 6
    messages = warnings_logged()
    assert len(messages) == 1
    assert "Image 1 of a batch has 6 segments but the model only 4 queries; 2 segments stay unmatched" in messages[0]


def test_enough_queries_make_no_warning(warnings_logged: Callable[[], list[str]]):
    criterion = make_criterion()
    criterion(draw_predictions(2, 4), draw_targets((4, 0)), None)
    assert criterion.surplus_segments == 0
    assert warnings_logged() == []


def test_slots_are_no_queries_for_surplus_segments():
    """Six segments, four queries, six slots: two segments stay unmatched all the same, and all six are piloted."""
    criterion, targets = make_criterion(), draw_targets((6,))
    layout = lay_out(targets, 1)
    loss, terms = criterion(draw_predictions(1, 6 + 4), targets, layout)
    assert criterion.surplus_segments == 2
    assert loss.isfinite()
    assert terms["loss_pilot_mask"] > 0


# ------------------------------------------------------------------------------------------------------ match stability


def test_training_steps_leave_the_match_stability_and_evaluation_does_not():
    criterion, predictions, targets = make_criterion(), draw_predictions(3, 4), draw_targets()
    assert criterion.last_match_stability is None
    criterion.eval()(predictions, targets, None)
    assert criterion.last_match_stability is None
    criterion.train()(predictions, targets, None)
    stability = criterion.last_match_stability
    assert len(stability) == NUM_LEVELS - 1
    assert all(0 <= share <= 1 for share in stability)

    same = replace(
        predictions,
        class_logits=[predictions.class_logits[0]] * NUM_LEVELS,
        mask_embeddings=[predictions.mask_embeddings[0]] * NUM_LEVELS,
    )
    criterion(same, targets, None)
    assert criterion.last_match_stability == [1.0] * (NUM_LEVELS - 1)
    criterion(draw_predictions(2, 4), draw_targets((0, 0)), None)
    assert criterion.last_match_stability is None
