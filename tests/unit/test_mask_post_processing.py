"""Results against a plain implementation of the definition, and against what a perfect predictor must give.

A perfect predictor's mask logits are signed distances to the border of each object, sampled at 1/4: positive inside. Bilinear
resizing of a distance is exact along straight borders.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpformer_hf import mask_post_processing, mask_resizing
from mpformer_hf.mask_post_processing import (
    InstancePrediction,
    instance_map,
    instance_segmentation,
    mask_boxes,
    panoptic_segmentation,
    semantic_segmentation,
)
from mpformer_hf.mask_resizing import ResizedMasks
from tests import plain_post_processing as plain

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the padded image; edges, not centres

PADDED = (64, 96)
VALID = (50, 90)
TARGET = (75, 101)
NUM_CLASSES = 5
SHARPNESS = 8.0  # logits per pixel of distance, so that probabilities are near 0 and 1 off the border


def distance_to_border(box: Box, height: int, width: int, step: float) -> Tensor:
    """Signed distance of every cell's centre to the border of a box, positive inside; cells are `step` pixels wide."""
    x1, y1, x2, y2 = box
    x = (torch.arange(width) + 0.5) * step
    y = ((torch.arange(height) + 0.5) * step)[:, None]
    return torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))


def perfect_masks(boxes: list[Box], padded: tuple[int, int]) -> Tensor:
    """Mask logits (1, Q, h, w) of a perfect predictor."""
    logits = [distance_to_border(box, padded[0] // 4, padded[1] // 4, 4.0) for box in boxes]
    return SHARPNESS * torch.stack(logits)[None].clamp(-16, 16)


def true_masks(boxes: list[Box], size: tuple[int, int], scale: float = 1.0) -> Tensor:
    """The boxes, drawn at `size` where one pixel is `scale` pixels of the padded image."""
    return torch.stack([distance_to_border(box, *size, scale) > 0 for box in boxes])


def confident_classes(labels: list[int], probabilities: list[float] | None = None) -> Tensor:
    """Class logits (1, Q, K + 1) that give each label its probability; the rest is shared."""
    probabilities = probabilities or [0.999] * len(labels)
    logits = torch.zeros(1, len(labels), NUM_CLASSES + 1)
    for query, (label, probability) in enumerate(zip(labels, probabilities, strict=True)):
        logits[0, query, label] = math.log(probability / (1 - probability) * NUM_CLASSES)
    return logits


def iou(first: Tensor, second: Tensor) -> float:
    return float((first & second).sum() / (first | second).sum())


def random_logits(num_images: int = 2, num_queries: int = 7) -> tuple[Tensor, Tensor]:
    classes = 2 * torch.randn(num_images, num_queries, NUM_CLASSES + 1)
    smooth = nn.functional.interpolate(torch.randn(num_images, num_queries, 5, 7), (16, 24), mode="bicubic")
    return classes, 4 * smooth


def shares_agreeing(first: Tensor, second: Tensor) -> float:
    return float((first == second).double().mean())


@pytest.fixture(params=[1, 64 * 2**20], ids=["in small blocks", "in one piece"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mask_resizing.BLOCK_BYTES, "cpu", request.param)
    monkeypatch.setattr(mask_resizing, "SHORTEST_BLOCK", 7)


SIZES = pytest.mark.parametrize(
    ("valid", "target"),
    [(PADDED, PADDED), (VALID, VALID), (VALID, TARGET), (VALID, (1, 1)), ((1, 1), (9, 5)), (VALID, (20, 200))],
    ids=str,
)


# The definition


@SIZES
@pytest.mark.usefixtures("block_bytes")
def test_semantic_scores_are_those_of_the_definition(valid: tuple[int, int], target: tuple[int, int]) -> None:
    classes, masks = random_logits()
    predictions = semantic_segmentation(classes, masks, [valid] * 2, [target] * 2, return_scores=True)
    for image, prediction in enumerate(predictions):
        scores = plain.semantic_scores(classes[image], masks[image], valid, target)
        torch.testing.assert_close(prediction.scores, scores, atol=1e-5, rtol=0)
        assert torch.equal(prediction.segmentation, prediction.scores.argmax(0))


@SIZES
@pytest.mark.usefixtures("block_bytes")
def test_combining_first_resizes_the_class_scores(valid: tuple[int, int], target: tuple[int, int]) -> None:
    classes, masks = random_logits()
    predictions = semantic_segmentation(
        classes, masks, [valid] * 2, [target] * 2, combine_before_resize=True, return_scores=True
    )
    for image, prediction in enumerate(predictions):
        scores = plain.semantic_scores(classes[image], masks[image], valid, target, combine_before_resize=True)
        torch.testing.assert_close(prediction.scores, scores, atol=1e-5, rtol=0)


def test_semantic_scores_are_only_kept_when_asked_for() -> None:
    assert semantic_segmentation(*random_logits())[0].scores is None


@SIZES
@pytest.mark.usefixtures("block_bytes")
def test_instances_are_those_of_the_definition(valid: tuple[int, int], target: tuple[int, int]) -> None:
    classes, masks = random_logits()
    predictions = instance_segmentation(classes, masks, [valid] * 2, [target] * 2, top_k=12, mask_threshold=0.4)
    for image, prediction in enumerate(predictions):
        expected = plain.instances(classes[image], masks[image], valid, target, top_k=12, mask_threshold=0.4)
        torch.testing.assert_close(prediction.scores, expected.scores, atol=1e-5, rtol=0)
        assert prediction.labels.tolist() == expected.labels.tolist()
        assert shares_agreeing(prediction.masks, expected.masks) > 0.999
        assert torch.equal(prediction.boxes, mask_boxes(prediction.masks))


@SIZES
@pytest.mark.usefixtures("block_bytes")
def test_panoptic_maps_are_those_of_the_definition(valid: tuple[int, int], target: tuple[int, int]) -> None:
    classes, masks = random_logits()
    stuff, limits = {1, 3}, (0.25, 0.55, 0.3)
    predictions = panoptic_segmentation(
        classes,
        masks,
        [valid] * 2,
        [target] * 2,
        score_threshold=limits[0],
        mask_threshold=limits[1],
        overlap_mask_area_threshold=limits[2],
        label_ids_to_fuse=stuff,
    )
    for image, prediction in enumerate(predictions):
        segmentation, segments = plain.panoptic(
            classes[image], masks[image], valid, target, *limits, label_ids_to_fuse=stuff
        )
        assert shares_agreeing(prediction.segmentation, segmentation) > 0.999
        assert [(one.id, one.label_id) for one in prediction.segments] == segments


def test_without_target_sizes_results_have_the_valid_size() -> None:
    classes, masks = random_logits()
    sizes = torch.tensor([VALID, (30, 40)])
    assert [tuple(one.segmentation.shape) for one in semantic_segmentation(classes, masks, sizes)] == [VALID, (30, 40)]
    assert instance_segmentation(classes, masks, sizes)[1].masks.shape[1:] == (30, 40)
    assert panoptic_segmentation(classes, masks, sizes)[1].segmentation.shape == (30, 40)


def test_without_image_sizes_all_of_the_padded_image_is_valid() -> None:
    classes, masks = random_logits()
    with_sizes = semantic_segmentation(classes, masks, [PADDED] * 2, [TARGET] * 2)
    without = semantic_segmentation(classes, masks, None, [TARGET] * 2)
    assert all(
        torch.equal(one.segmentation, other.segmentation) for one, other in zip(with_sizes, without, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_computed_in_float32(dtype: torch.dtype) -> None:
    classes, masks = (logits.to(dtype) for logits in random_logits())
    targets = [TARGET] * 2
    (low, *_), (full, *_) = (
        instance_segmentation(*logits, None, targets) for logits in ((classes, masks), (classes.float(), masks.float()))
    )
    assert low.scores.dtype == torch.float32
    assert torch.equal(low.masks, full.masks)


@pytest.mark.gpu
def test_results_on_a_gpu_are_those_of_the_cpu() -> None:
    classes, masks = random_logits()
    sizes = {"image_sizes": [VALID] * 2, "target_sizes": [TARGET] * 2}
    for function, field in (
        (semantic_segmentation, "segmentation"),
        (instance_segmentation, "masks"),
        (panoptic_segmentation, "segmentation"),
    ):
        for cpu, gpu in zip(
            function(classes, masks, **sizes), function(classes.cuda(), masks.cuda(), **sizes), strict=True
        ):
            assert getattr(gpu, field).is_cuda
            assert shares_agreeing(getattr(cpu, field), getattr(gpu, field).cpu()) > 0.999


# A perfect predictor: the promises of this package where transformers' Mask2Former breaks them


WIDE_AND_TALL = [
    ((256, 512), [(40.0, 60.0, 200.0, 180.0), (300.0, 20.0, 480.0, 240.0)]),
    ((512, 256), [(20.0, 300.0, 240.0, 480.0), (60.0, 40.0, 180.0, 200.0)]),
]


def test_padding_is_removed_before_masks_go_to_the_target_size() -> None:
    classes = torch.cat([confident_classes([0, 1]), confident_classes([2, 3])])
    masks = torch.cat([perfect_masks(boxes, (512, 512)) for _, boxes in WIDE_AND_TALL])
    sizes = [size for size, _ in WIDE_AND_TALL]
    targets = [(2 * height, 2 * width) for height, width in sizes]
    batch = instance_segmentation(classes, masks, sizes, targets, score_threshold=0.5)
    panoptic = panoptic_segmentation(classes, masks, sizes, targets)
    semantic = semantic_segmentation(classes, masks, sizes, targets, return_scores=True)
    for image, (size, boxes) in enumerate(WIDE_AND_TALL):
        truth = true_masks(boxes, targets[image], scale=0.5)
        alone = (confident_classes([2 * image, 2 * image + 1]), perfect_masks(boxes, size), [size], [targets[image]])
        (single,) = instance_segmentation(*alone, score_threshold=0.5)
        (single_panoptic,) = panoptic_segmentation(*alone)
        (single_semantic,) = semantic_segmentation(*alone, return_scores=True)
        by_label = batch[image].labels.argsort()
        for ours, one, true in zip(
            batch[image].masks[by_label], single.masks[single.labels.argsort()], truth, strict=True
        ):
            assert iou(ours, true) > 0.99
            assert iou(ours, one) > 0.99
        for segment in panoptic[image].segments:
            ours = panoptic[image].segmentation == segment.id
            assert iou(ours, truth[segment.label_id - 2 * image]) > 0.99
            assert iou(ours, single_panoptic.segmentation == segment.id) > 0.99
        assert (
            shares_agreeing(semantic[image].segmentation[truth.any(0)], single_semantic.segmentation[truth.any(0)]) == 1
        )


@pytest.mark.parametrize("top", [5.0, 6.0, 8.0])
def test_six_pixel_lines_in_a_large_image_keep_their_shape(top: float) -> None:
    size = (1024, 2048)
    lines = [(64.0, top + 200 * line, 1984.0, top + 200 * line + 6) for line in range(5)]
    (prediction,) = instance_segmentation(
        confident_classes([0, 1, 2, 3, 4]), perfect_masks(lines, size), [size], [size], score_threshold=0.5
    )
    for ours, true in zip(prediction.masks[prediction.labels.argsort()], true_masks(lines, size), strict=True):
        assert iou(ours, true) > 0.99


def test_panoptic_void_stays_void() -> None:
    objects = [(8.0, 8.0, 40.0, 40.0), (64.0, 32.0, 88.0, 60.0)]
    (prediction,) = panoptic_segmentation(confident_classes([0, 1]), perfect_masks(objects, PADDED))
    truth = true_masks(objects, PADDED)
    assert iou(prediction.segmentation == 1, truth[0]) > 0.99
    assert iou(prediction.segmentation == 2, truth[1]) > 0.99
    assert iou(prediction.segmentation == 0, ~truth.any(0)) > 0.99


def test_an_image_without_objects_is_all_void() -> None:
    classes, masks = confident_classes([NUM_CLASSES, NUM_CLASSES]), perfect_masks([(0.0, 0.0, 9.0, 9.0)] * 2, PADDED)
    (panoptic,) = panoptic_segmentation(classes, masks, None, [TARGET])
    (instances,) = instance_segmentation(classes, masks, None, [TARGET], score_threshold=0.5)
    assert panoptic.segments == []
    assert panoptic.segmentation.shape == TARGET
    assert not panoptic.segmentation.any()
    assert instances.masks.shape == (0, *TARGET)
    assert (instance_map(instances.masks) == -1).all()
    assert mask_boxes(instances.masks).shape == (0, 4)


STUFF, THING_A, THING_B = 4, 0, 1
QUARTERS = [(24.0 * quarter, 0.0, 24.0 * (quarter + 1), 64.0) for quarter in range(4)]


def test_panoptic_ids_are_unique_and_fused_stuff_is_listed_once() -> None:
    (prediction,) = panoptic_segmentation(
        confident_classes([STUFF, THING_A, STUFF, THING_B], [0.9, 0.9, 0.95, 0.9]),
        perfect_masks(QUARTERS, PADDED),
        label_ids_to_fuse={STUFF},
    )
    assert [(one.id, one.label_id, one.was_fused) for one in prediction.segments] == [
        (1, STUFF, True),
        (2, THING_A, False),
        (3, THING_B, False),
    ]
    assert prediction.segments[0].score == pytest.approx(0.95, abs=1e-4)
    truth = true_masks(QUARTERS, PADDED)
    assert iou(prediction.segmentation == 1, truth[0] | truth[2]) > 0.99
    assert iou(prediction.segmentation == 2, truth[1]) > 0.99
    assert iou(prediction.segmentation == 3, truth[3]) > 0.99


def test_stuff_that_is_not_to_be_fused_stays_apart() -> None:
    (prediction,) = panoptic_segmentation(
        confident_classes([STUFF, THING_A, STUFF, THING_B]), perfect_masks(QUARTERS, PADDED)
    )
    assert [one.id for one in prediction.segments] == [1, 2, 3, 4]


OUTER, INNER = (8.0, 8.0, 168.0, 120.0), (32.0, 24.0, 104.0, 88.0)
ROOMY = (128, 192)


@pytest.mark.parametrize("inner_first", [True, False])
def test_the_highest_score_wins_a_pixel_and_every_instance_keeps_its_mask(inner_first: bool) -> None:
    boxes, probabilities = ([INNER, OUTER], [0.9998, 0.73]) if inner_first else ([OUTER, INNER], [0.73, 0.9998])
    (prediction,) = instance_segmentation(
        confident_classes([1, 1], probabilities), perfect_masks(boxes, ROOMY), score_threshold=0.5
    )
    inner, outer = true_masks([INNER, OUTER], ROOMY)
    assert prediction.scores[0] > prediction.scores[1]
    assert iou(prediction.masks[0], inner) > 0.99
    assert iou(prediction.masks[1], outer) > 0.99
    segmentation = instance_map(prediction.masks)
    assert iou(segmentation == 0, inner) > 0.99
    assert iou(segmentation == 1, outer & ~inner) > 0.99
    assert iou(segmentation == -1, ~outer) > 0.99


# Arguments


LEFT, SHIFTED = (8.0, 8.0, 48.0, 56.0), (28.0, 8.0, 68.0, 56.0)  # half of each is covered by the other


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 2), (0.4, 2), (0.6, 1)])
def test_instances_that_are_covered_too_much_are_dropped(threshold: float, count: int) -> None:
    (prediction,) = instance_segmentation(
        confident_classes([0, 1], [0.8, 0.9]),
        perfect_masks([LEFT, SHIFTED], PADDED),
        score_threshold=0.5,
        overlap_mask_area_threshold=threshold,
    )
    assert prediction.labels.tolist() == [1, 0][:count]


def test_a_dropped_instance_covers_nothing_itself() -> None:
    # Each covers the next by 2/3. The second goes, so the third keeps all but the third that the first covers.
    chain = [(8.0 + 16 * step, 8.0, 56.0 + 16 * step, 56.0) for step in range(3)]
    (prediction,) = instance_segmentation(
        confident_classes([0, 1, 2], [0.9, 0.8, 0.7]),
        perfect_masks(chain, PADDED),
        score_threshold=0.5,
        overlap_mask_area_threshold=0.5,
    )
    assert prediction.labels.tolist() == [0, 2]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_masks_shrink_as_the_mask_threshold_grows(threshold: float) -> None:
    logits = perfect_masks([(16.0, 16.0, 80.0, 48.0)], PADDED) / SHARPNESS / 4
    (prediction,) = instance_segmentation(confident_classes([0]), logits, mask_threshold=threshold, top_k=1)
    expected = plain.logits_at_valid(logits[0], PADDED).sigmoid() > threshold
    assert torch.equal(prediction.masks, expected)


def test_the_extreme_mask_thresholds_take_everything_and_nothing() -> None:
    classes, masks = random_logits()
    everything, nothing = (instance_segmentation(classes, masks, mask_threshold=limit)[0].masks for limit in (0, 1))
    assert everything.all()
    assert not nothing.any()


def test_panoptic_masks_shrink_as_the_mask_threshold_grows() -> None:
    logits = perfect_masks([(16.0, 16.0, 80.0, 48.0)], PADDED) / SHARPNESS / 4
    areas = [
        int(panoptic_segmentation(confident_classes([0]), logits, mask_threshold=limit)[0].segmentation.sum())
        for limit in (0.2, 0.5, 0.8)
    ]
    assert all(larger > smaller for larger, smaller in pairwise(areas))


@pytest.mark.parametrize(("threshold", "labels"), [(0.4, [0, 1]), (0.7, [1])])
def test_a_panoptic_segment_that_wins_too_little_of_its_mask_is_dropped(threshold: float, labels: list[int]) -> None:
    # Together they fill the image: the original counts pixels that a query wins outside its mask too.
    halves = [(0.0, 0.0, 64.0, 64.0), (32.0, 0.0, 96.0, 64.0)]
    (prediction,) = panoptic_segmentation(
        confident_classes([0, 1], [0.8, 0.9]),
        perfect_masks(halves, PADDED),
        overlap_mask_area_threshold=threshold,
    )
    assert [one.label_id for one in prediction.segments] == labels


def test_top_k_counts_pairs_of_query_and_class() -> None:
    classes, masks = random_logits()
    assert [len(instance_segmentation(classes, masks, top_k=count)[0].scores) for count in (1, 20, 1000)] == [1, 20, 35]


def test_dropping_labels_comes_after_the_top_k() -> None:
    classes = confident_classes([STUFF, THING_A], [0.99, 0.6])
    masks = perfect_masks(QUARTERS[:2], PADDED)
    (prediction,) = instance_segmentation(classes, masks, top_k=1, label_ids_to_drop={STUFF})
    assert prediction.labels.tolist() == []
    (prediction,) = instance_segmentation(classes, masks, top_k=2, label_ids_to_drop={STUFF})
    assert prediction.labels.tolist() == [THING_A]


def test_queries_below_the_threshold_are_dropped_before_their_masks_are_resized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Watched(ResizedMasks):
        def __init__(self, masks: Tensor, *rest) -> None:
            seen.append(len(masks))
            super().__init__(masks, *rest)

    monkeypatch.setattr(mask_post_processing, "ResizedMasks", Watched)
    classes, masks = confident_classes([0, 1, 2, 3], [0.9, 0.3, 0.8, 0.2]), perfect_masks(QUARTERS, PADDED)
    instance_segmentation(classes, masks, score_threshold=0.5)
    panoptic_segmentation(classes, masks, score_threshold=0.5)
    assert seen == [2, 2]


def test_a_threshold_gives_the_same_instances_as_filtering_afterwards() -> None:
    classes, masks = random_logits()
    for filtered, full in zip(
        instance_segmentation(classes, masks, score_threshold=0.3), instance_segmentation(classes, masks), strict=True
    ):
        keep = (full.scores >= 0.3) & full.masks.flatten(1).any(1)
        assert 0 < keep.sum() < len(keep)
        assert torch.equal(filtered.scores, full.scores[keep])
        assert torch.equal(filtered.masks, full.masks[keep])


def test_boxes_are_tight_and_zero_for_empty_masks() -> None:
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 9, 11] = True
    assert mask_boxes(masks).tolist() == [[3, 2, 9, 5], [11, 9, 12, 10], [0, 0, 0, 0]]


def test_a_mask_that_resizing_empties_has_no_box_and_is_dropped_with_a_threshold_of_zero() -> None:
    masks = perfect_masks([(16.0, 16.0, 80.0, 48.0)] * 2, PADDED)
    masks[0, 1] = -100.0
    masks[0, 1, 8, 12] = 0.01  # one cell; its pixels are means with its neighbours
    (everything,), (dropped,) = (
        instance_segmentation(confident_classes([0, 1]), masks, top_k=2, score_threshold=threshold)
        for threshold in (None, 0.0)
    )
    assert everything.labels.tolist() == [0, 1]
    assert not everything.masks[1].any()
    assert everything.boxes.tolist() == [[16, 16, 80, 48], [0, 0, 0, 0]]
    assert dropped.labels.tolist() == [0]


def test_inputs_are_left_untouched() -> None:
    classes, masks = random_logits()
    copies = classes.clone(), masks.clone()
    semantic_segmentation(classes, masks)
    instance_segmentation(classes, masks, overlap_mask_area_threshold=0.5)
    panoptic_segmentation(classes, masks)
    assert torch.equal(classes, copies[0])
    assert torch.equal(masks, copies[1])


class LargestResult(TorchDispatchMode):
    """Watches the largest float tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("valid", [(256, 384), (128, 192)], ids=["much smaller result", "much larger result"])
def test_no_float_tensor_of_all_classes_or_queries_at_the_target_size_is_made(valid: tuple[int, int]) -> None:
    classes, masks = torch.randn(1, 20, 151), torch.randn(1, 20, 64, 96)
    target = (32, 48) if valid == (256, 384) else (1280, 1920)
    with LargestResult() as largest:
        for combine_before_resize in (False, True):
            semantic_segmentation(classes, masks, [valid], [target], combine_before_resize=combine_before_resize)
        instance_segmentation(classes, masks, [valid], [target])
        panoptic_segmentation(classes, masks, [valid], [target], score_threshold=0.0)
    allowed = max(masks.numel(), mask_resizing.BLOCK_BYTES["cpu"] // 4)
    assert masks.numel() <= largest.elements <= allowed < min(20 * 1280 * 1920, 20 * 256 * 384)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_logits": torch.zeros(3, 6)}, r"got \(3, 6\) and \(2, 3, 16, 24\)"),
        ({"class_logits": torch.zeros(2, 4, 6)}, "equal images and queries"),
        ({"class_logits": torch.zeros(2, 3, 1)}, "at least one class"),
        ({"target_sizes": [(64, 96)]}, "`target_sizes` must hold one .* for each of the 2 images, got 1"),
        ({"target_sizes": [(64, 96), (64, 0)]}, "`target_sizes` of image 1 must be .* two positive integers"),
        ({"target_sizes": [(64.5, 96), (64, 96)]}, "`target_sizes` of image 0"),
        ({"target_sizes": [(3, 64, 96)] * 2}, "`target_sizes` of image 0"),
        ({"image_sizes": torch.tensor([[64, 96]])}, "`image_sizes` must hold one"),
        ({"image_sizes": [(64, 96), (65, 96)]}, "Image 1 has a valid size of 65 x 96, .* padded image of 64 x 96"),
    ],
)
@pytest.mark.parametrize("function", [semantic_segmentation, instance_segmentation, panoptic_segmentation])
def test_inputs_that_do_not_fit_are_refused(function, change, message: str) -> None:
    inputs = {"class_logits": torch.zeros(2, 3, 6), "mask_logits": torch.zeros(2, 3, 16, 24)}
    with pytest.raises(ValueError, match=message):
        function(**{**inputs, **change})


@pytest.mark.parametrize("name", ["score_threshold", "mask_threshold", "overlap_mask_area_threshold"])
@pytest.mark.parametrize("function", [instance_segmentation, panoptic_segmentation])
def test_thresholds_outside_their_range_are_refused(function, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\], got 1.5"):
        function(*random_logits(), **{name: 1.5})


def test_a_top_k_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="`top_k` must be at least 1"):
        instance_segmentation(*random_logits(), top_k=0)


@pytest.mark.parametrize("function", [semantic_segmentation, instance_segmentation, panoptic_segmentation])
@pytest.mark.parametrize("which", ["class logits", "mask logits"])
def test_logits_that_are_not_numbers_are_refused_and_the_image_is_named(function, which: str) -> None:
    logits = dict(zip(("class logits", "mask logits"), random_logits(3), strict=True))
    logits[which][2].view(-1)[5] = math.nan
    with pytest.raises(ValueError, match=f"Image 2 has 1 NaN among its .* {which}"):
        function(*logits.values())


def test_infinite_mask_logits_are_certain_pixels() -> None:
    masks = torch.full((1, 2, 16, 24), -math.inf)
    masks[0, 0, :, :12] = math.inf
    masks[0, 1, :, 12:] = math.inf
    classes = confident_classes([THING_A, THING_B])
    (panoptic,), (instances,) = (
        function(classes, masks) for function in (panoptic_segmentation, instance_segmentation)
    )
    left = torch.zeros(PADDED, dtype=torch.bool)
    left[:, :48] = True
    assert torch.equal(panoptic.segmentation == 1, left)
    assert torch.equal(panoptic.segmentation == 2, ~left)
    assert torch.equal(instances.masks[instances.labels == THING_A][0], left)
    assert semantic_segmentation(classes, masks)[0].segmentation.unique().tolist() == [THING_A, THING_B]


@pytest.mark.parametrize("function", [semantic_segmentation, instance_segmentation, panoptic_segmentation])
def test_autocast_and_reduced_precision_of_products_move_no_edge(function) -> None:
    classes, masks = random_logits()
    expected = function(classes, masks, None, [TARGET] * 2)
    try:
        torch.set_float32_matmul_precision("medium")
        assert mask_resizing.product_type(masks.device) == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            results = function(classes.requires_grad_(), masks.requires_grad_(), None, [TARGET] * 2)
    finally:
        torch.set_float32_matmul_precision("highest")
    field = "masks" if function is instance_segmentation else "segmentation"
    for result, one in zip(results, expected, strict=True):
        assert torch.equal(getattr(result, field), getattr(one, field))


def test_one_pixel_results_work() -> None:
    classes, masks = confident_classes([0]), perfect_masks([(0.0, 0.0, 96.0, 64.0)], PADDED)
    (prediction,) = instance_segmentation(classes, masks, [(1, 1)], [(1, 1)], top_k=1)
    assert isinstance(prediction, InstancePrediction)
    assert prediction.masks.tolist() == [[[True]]]
