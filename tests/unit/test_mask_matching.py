"""Matching costs against their definition on full masks, and assignments against all permutations.

Axes: V levels, B images, Q queries, T segments of one image, K classes, D channels of the per-pixel embedding, P points.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpformer_hf.mask_matching import Assignment, CostWeights, assign, compute_matching_costs, measure_stability

NUM_POINTS = 40
PADDED_SIZE = (24, 32)
WEIGHTS = CostWeights(label=2.0, mask=5.0, dice=3.0)


@dataclass(frozen=True)
class Scene:
    """Random predictions and ground truth of three images with 3, 0 and 1 segments, in double precision."""

    class_logits: Tensor
    mask_embeddings: Tensor
    pixel_embedding: Tensor
    mask_labels: list[Tensor]
    class_labels: list[Tensor]
    points: Tensor

    def compute_costs(
        self, weights: CostWeights = WEIGHTS, ignore_masks: list[Tensor | None] | None = None
    ) -> list[Tensor]:
        return compute_matching_costs(
            self.class_logits,
            self.mask_embeddings,
            self.pixel_embedding,
            self.mask_labels,
            self.class_labels,
            PADDED_SIZE,
            weights=weights,
            num_points=NUM_POINTS,
            ignore_masks=ignore_masks,
        )


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The points that the costs will draw are in the scene."""
    drawn = Scene(
        class_logits=torch.randn(2, 3, 5, 4, dtype=torch.float64),
        mask_embeddings=torch.randn(2, 3, 5, 7, dtype=torch.float64),
        pixel_embedding=torch.randn(3, 7, 6, 8, dtype=torch.float64),
        mask_labels=[
            torch.rand(3, *PADDED_SIZE) < 0.5,
            torch.zeros(0, 10, 32, dtype=torch.bool),
            (torch.rand(1, 20, 18) < 0.5).to(torch.uint8),  # of the image's own size
        ],
        class_labels=[torch.tensor([2, 0, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])],
        points=torch.rand(3, NUM_POINTS, 2, dtype=torch.float64),
    )

    def injected(*size: int, **_) -> Tensor:
        assert size == (3, NUM_POINTS, 2)  # one draw for all images, levels and queries
        return drawn.points

    monkeypatch.setattr(torch, "rand", injected)
    return drawn


def read(mask: Tensor, points: Tensor) -> Tensor:
    """Values of one (h, w) mask at (P, 2) points."""
    return nn.functional.grid_sample(mask[None, None], 2 * points[None, None] - 1, align_corners=False)[0, 0, 0]


def cost_by_definition(
    class_logits: Tensor, mask_logits: Tensor, label: int, mask: Tensor, points: Tensor, weights: CostWeights
) -> float:
    """Cost of one query, logits (K + 1,) and (h, w), and one segment."""
    height, width = mask.shape
    padded = nn.functional.pad(mask.double(), (0, PADDED_SIZE[1] - width, 0, PADDED_SIZE[0] - height))
    target = read(padded, points)
    probability = torch.sigmoid(read(mask_logits, points))
    cross_entropy = -(target * probability.log() + (1 - target) * (1 - probability).log()).sum() / len(points)
    dice = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
    class_probability = class_logits.exp()[label] / class_logits.exp().sum()
    return (-weights.label * class_probability + weights.mask * cross_entropy + weights.dice * dice).item()


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, CostWeights(1.0, 0.0, 0.0), CostWeights(0.0, 1.0, 0.0), CostWeights(0.0, 0.0, 1.0)],
    ids=["all", "label", "mask", "dice"],
)
def test_costs_equal_their_definition_on_full_masks(scene: Scene, weights: CostWeights):
    costs = scene.compute_costs(weights)
    masks = torch.einsum("vbqd,bdhw->vbqhw", scene.mask_embeddings, scene.pixel_embedding)
    for image, cost in enumerate(costs):
        expected = [
            [
                [
                    cost_by_definition(
                        scene.class_logits[level, image, query],
                        masks[level, image, query],
                        int(label),
                        mask,
                        scene.points[image],
                        weights,
                    )
                    for label, mask in zip(scene.class_labels[image], scene.mask_labels[image], strict=True)
                ]
                for query in range(5)
            ]
            for level in range(2)
        ]
        torch.testing.assert_close(cost, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_an_image_without_segments_has_costs_of_no_column(scene: Scene):
    assert scene.compute_costs()[1].shape == (2, 5, 0)


def test_costs_carry_no_graph(scene: Scene):
    scene.pixel_embedding.requires_grad_()
    scene.mask_embeddings.requires_grad_()
    assert not any(cost.requires_grad for cost in scene.compute_costs())


def test_float32_costs_agree_with_double_precision(scene: Scene):
    expected = scene.compute_costs()
    single = Scene(
        *(tensor.float() for tensor in (scene.class_logits, scene.mask_embeddings, scene.pixel_embedding)),
        mask_labels=scene.mask_labels,
        class_labels=scene.class_labels,
        points=scene.points,
    )
    object.__setattr__(scene, "points", scene.points.float())
    for cost, double in zip(single.compute_costs(), expected, strict=True):
        assert cost.dtype == torch.float32
        torch.testing.assert_close(cost.double(), double, rtol=1e-4, atol=1e-4)


def test_confident_logits_have_finite_costs(scene: Scene):
    """log(1 - sigmoid(x)) of the definition is -inf from x = 40 on; the costs are not."""
    scene.mask_embeddings.mul_(1e4)
    assert all(cost.isfinite().all() for cost in scene.compute_costs())


# --------------------------------------------------------------------------------------------------------------- assign


def cheapest_total(cost: np.ndarray) -> float:
    """Least total over all ways of pairing min(Q, T) queries with as many segments."""
    num_queries, num_targets = cost.shape
    if num_queries < num_targets:
        cost, num_queries, num_targets = cost.T, num_targets, num_queries
    return min(
        sum(cost[query, target] for target, query in enumerate(queries))
        for queries in itertools.permutations(range(num_queries), num_targets)
    )


@pytest.mark.parametrize(("num_queries", "num_targets"), [(5, 3), (4, 4), (3, 5), (1, 1), (6, 1), (1, 4)])
def test_assignment_is_the_cheapest_of_all(num_queries: int, num_targets: int):
    costs = np.random.default_rng(0).normal(size=(4, num_queries, num_targets)).astype(np.float32)
    found = assign(costs)
    for level in range(4):
        here = found.level == level
        num_pairs = min(num_queries, num_targets)
        assert len(set(found.query[here])) == len(set(found.target[here])) == here.sum() == num_pairs
        total = costs[level, found.query[here], found.target[here]].sum()
        assert total == pytest.approx(cheapest_total(costs[level]), rel=1e-5)


def test_levels_are_assigned_independently():
    one, other = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    found = assign(np.stack([one, other]))
    pairs = sorted(zip(found.level, found.query, found.target, strict=True))
    assert pairs == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def test_no_segments_give_no_pairs():
    found = assign(np.zeros((3, 5, 0), dtype=np.float32))
    assert len(found.level) == len(found.query) == len(found.target) == 0
    assert found.nonfinite_levels == ()


def test_pairs_are_int64_of_one_length():
    found = assign(np.zeros((2, 4, 3), dtype=np.float32))
    assert {array.dtype for array in (found.level, found.query, found.target)} == {np.dtype(np.int64)}
    assert len(found.level) == len(found.query) == len(found.target) == 2 * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_pair_without_a_finite_cost_is_avoided_and_its_level_named(bad: float):
    costs = np.array([[[0.0, 5.0], [1.0, 5.0]], [[bad, 5.0], [1.0, 5.0]]], dtype=np.float32)
    found = assign(costs)
    assert found.nonfinite_levels == (1,)
    pairs = sorted(zip(found.level, found.query, found.target, strict=True))
    assert pairs == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def test_costs_that_are_all_nan_still_give_every_segment_a_query_of_its_own():
    found = assign(np.full((2, 4, 3), np.nan, dtype=np.float32))
    assert found.nonfinite_levels == (0, 1)
    for level in range(2):
        assert sorted(found.target[found.level == level]) == [0, 1, 2]
        assert len(set(found.query[found.level == level])) == 3


def test_minus_infinity_does_not_break_the_assignment():
    found = assign(np.array([[[-np.inf, 0.0], [0.0, 0.0]]], dtype=np.float32))
    assert found.nonfinite_levels == (0,)
    assert len(found.query) == 2


def test_the_input_is_not_changed():
    costs = np.array([[[np.nan, 1.0]]], dtype=np.float32)
    assign(costs)
    assert np.isnan(costs[0, 0, 0])


# ------------------------------------------------------------------------------------------------------ unknown labels


def test_points_on_unknown_pixels_count_in_no_cost(scene: Scene):
    """The left half is unknown; the points that count, taken alone, give the costs. Their mean is not that of all points."""
    ignore_mask = torch.zeros(PADDED_SIZE, dtype=torch.bool)
    ignore_mask[:, :16] = True
    costs = scene.compute_costs(ignore_masks=[ignore_mask, None, ignore_mask])
    for image in (0, 2):
        counted = (
            scene.points[image, :, 0] * PADDED_SIZE[1] - 0.5 >= 16
        )  # from there on no pixel of the left half takes part
        assert 0 < counted.sum() < NUM_POINTS
        points = scene.points[image, counted]
        masks = torch.einsum("vqd,dhw->vqhw", scene.mask_embeddings[:, image], scene.pixel_embedding[image])
        logits = nn.functional.grid_sample(
            masks.flatten(0, 1)[None], 2 * points[None, None] - 1, align_corners=False
        ).view(2, 5, -1)
        given = scene.mask_labels[image].double()
        padded = nn.functional.pad(given, (0, PADDED_SIZE[1] - given.shape[2], 0, PADDED_SIZE[0] - given.shape[1]))
        labels = nn.functional.grid_sample(padded[None], 2 * points[None, None] - 1, align_corners=False)[0, :, 0]
        classes = scene.class_logits[:, image].softmax(-1)
        for level, query, target in itertools.product(range(2), range(5), range(len(given))):
            probability, label = logits[level, query].sigmoid(), labels[target]
            cross_entropy = -(label * probability.log() + (1 - label) * (1 - probability).log()).mean()
            dice = 1 - (2 * (probability * label).sum() + 1) / (probability.sum() + label.sum() + 1)
            label_cost = -classes[level, query, scene.class_labels[image][target]]
            expected = WEIGHTS.label * label_cost + WEIGHTS.mask * cross_entropy + WEIGHTS.dice * dice
            torch.testing.assert_close(costs[image][level, query, target], expected, rtol=1e-9, atol=1e-12)


def test_segments_of_an_image_of_which_nothing_is_known_are_matched_by_class_alone(scene: Scene):
    unknown = [torch.ones(PADDED_SIZE, dtype=torch.bool)] * 3
    expected = scene.compute_costs(CostWeights(label=WEIGHTS.label, mask=0.0, dice=0.0))
    for cost, label_cost in zip(scene.compute_costs(ignore_masks=unknown), expected, strict=True):
        torch.testing.assert_close(cost, label_cost, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------- stability


def assignment(*queries_of_levels: tuple[int, ...]) -> Assignment:
    """Queries of the segments 0, 1 ... at each level; -1 is none."""
    pairs = [
        (level, query, target)
        for level, queries in enumerate(queries_of_levels)
        for target, query in enumerate(queries)
        if query >= 0
    ]
    level, query, target = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    return Assignment(level, query, target, ())


def test_stability_is_the_share_of_segments_that_keep_their_query_mean_over_images():
    """The first image keeps one of two, then both; the second none of one, then none; the image without segments has no say."""
    found = [assignment((3, 1), (3, 0), (3, 0)), assign(np.zeros((3, 5, 0))), assignment((2,), (4,), (2,))]
    assert measure_stability(found, [2, 0, 1], 3) == [0.25, 0.5]


def test_segments_without_a_query_are_not_stable():
    """Two queries for three segments: at both later levels one of the two that are matched was so before."""
    found = assignment((0, 1, -1), (0, -1, 1), (-1, 0, 1))
    assert measure_stability([found], [3], 3) == [0.5, 0.5]


def test_no_segments_have_no_stability():
    assert measure_stability([assign(np.zeros((3, 5, 0)))], [0], 3) is None
