"""Large images in tiles: what a perfect predictor must give, and what a real model gives on each tile alone.

The perfect predictor sees nothing but the pixels of its tile: an image holds the masks of up to 23 objects as bits of its
colours, object k in bit k % 8 of channel k // 8. Mask logits are signed distances to the border, sampled at 1/4.
"""

import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor, tiled_prediction
from mpformer_hf.image_reading import pil_to_rgb
from mpformer_hf.tiled_prediction import (
    Link,
    Part,
    Seams,
    Strip,
    common_pixels_of_maps,
    common_pixels_of_masks,
    cover_axis,
    find_links,
    group_parts,
    make_tiles,
    strip_of_map,
    strip_of_masks,
    tiled_instance_segmentation,
    tiled_panoptic_segmentation,
)
from tests.factories import tiny_config, tiny_model

# pycocotools still answers numpy's question for a copy in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NUM_CLASSES = 5
FRAME_BIT = 23  # set along the border of the whole image
TILE = (64, 64)
OVERLAP = 24
SHARPNESS = 8.0  # logits per pixel of distance, so that probabilities are near 0 and 1 off the border
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}
PROCESSOR = MPFormerImageProcessor()


class PerfectModel:
    """Finds each object of a tile, in an order that depends on the tile."""

    def __init__(self, labels, *, confidences=None, blind_margin=0, returns_sizes=False):
        """Take the class of each object.

        Args:
            labels: class of each object.
            confidences: class probability of each object, or a function of its visible mask.
            blind_margin: width of the margin along edges that cut the image in which objects are not seen, and a false
                object of class 0 is.
            returns_sizes: return `image_sizes`, as MP-Former; else not, as transformers' Mask2Former.
        """
        self.labels = labels
        self.confidences = confidences or [0.999] * len(labels)
        self.blind_margin = blind_margin
        self.returns_sizes = returns_sizes
        self.batch_sizes = []
        self.ran_in_inference_mode = []

    def __call__(self, pixel_values, pixel_mask):
        self.batch_sizes.append(len(pixel_values))
        self.ran_in_inference_mode.append(torch.is_inference_mode_enabled())
        sizes = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in pixel_mask]
        padded = tuple(pixel_values.shape[-2:])
        found = [
            self.find_objects(image[:, : size[0], : size[1]], padded)
            for image, size in zip(pixel_values, sizes, strict=True)
        ]
        return SimpleNamespace(
            class_queries_logits=torch.stack([classes for classes, _ in found]),
            masks_queries_logits=torch.stack([masks for _, masks in found]),
            **({"image_sizes": torch.tensor(sizes)} if self.returns_sizes else {}),
        )

    def find_objects(self, image, padded):
        masks = read_bits(image.to(torch.int64).numpy())
        is_frame = masks[FRAME_BIT]
        masks = list(masks[: len(self.labels)])
        labels = [*self.labels]
        confidences = [
            float(self.confidences(mask) if callable(self.confidences) else self.confidences[index])
            for index, mask in enumerate(masks)
        ]
        if self.blind_margin:
            unseen = margin_of_cuts(is_frame, self.blind_margin)
            masks = [*(mask & ~unseen for mask in masks), unseen]
            labels, confidences = [*labels, 0], [*confidences, 0.9]
        order = sorted(range(len(masks)), key=lambda index: -masks[index].sum())
        classes = [class_logits(labels[index], confidences[index] if masks[index].any() else 0) for index in order]
        return torch.stack(classes), torch.stack([mask_logits(masks[index], padded) for index in order])


def class_logits(label, confidence):
    probabilities = torch.full((NUM_CLASSES + 1,), (1 - confidence) / NUM_CLASSES)
    probabilities[label if confidence else NUM_CLASSES] = confidence or 1.0
    return probabilities.clamp(1e-9).log()


def mask_logits(mask, padded):
    """Signed distances; behind the border of a tile the mask goes on as it ended there."""
    mask = np.pad(mask, [(0, padded[0] - mask.shape[0]), (0, padded[1] - mask.shape[1])], mode="edge")
    if mask.all() or not mask.any():
        distance = np.full(mask.shape, 16.0 if mask.any() else -16.0)
    else:
        edt = scipy.ndimage.distance_transform_edt
        distance = np.where(mask, edt(mask) - 0.5, 0.5 - edt(~mask))
    at_quarter = nn.functional.avg_pool2d(torch.from_numpy(distance)[None].float(), 4)[0]
    return SHARPNESS * at_quarter.clamp(-16, 16)


def margin_of_cuts(is_frame, width):
    """The margin along those edges of a tile that are not borders of the image."""
    margin = np.zeros(is_frame.shape, dtype=bool)
    for turn in range(4):
        if not np.rot90(is_frame, turn)[0].all():
            np.rot90(margin, turn)[:width] = True
    return margin


def read_bits(image):
    """Masks (24, height, width) of an image (3, height, width)."""
    return np.stack([(image[bit // 8] >> (bit % 8)) & 1 for bit in range(24)]).astype(bool)


def draw(masks):
    """The image of some masks (n, H, W)."""
    height, width = masks.shape[1:]
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for index, mask in enumerate(masks):
        image[mask, index // 8] |= np.uint8(1 << (index % 8))
    frame = np.ones((height, width), dtype=bool)
    frame[1:-1, 1:-1] = False
    image[frame, FRAME_BIT // 8] |= np.uint8(1 << (FRAME_BIT % 8))
    return Image.fromarray(image)


def boxes_as_masks(size, boxes):
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def disc(size, centre, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows + 0.5 - centre[0]) ** 2 + (columns + 0.5 - centre[1]) ** 2 < radius**2


def instances_of(image, model, **options):
    options = {"tile_size": TILE, "overlap": OVERLAP, "progress": False} | options
    return tiled_instance_segmentation(model, PROCESSOR, image, **RAW, **options)


def panoptic_of(image, model, **options):
    options = {"tile_size": TILE, "overlap": OVERLAP, "progress": False} | options
    return tiled_panoptic_segmentation(model, PROCESSOR, image, **RAW, **options)


def decoded(result):
    """Masks of an instance result, read by pycocotools."""
    return [pycocotools.mask.decode(rle).astype(bool) for rle in result["rles"]]


def segment_masks(result):
    """Masks of a panoptic result; checks that ids are those of the map, each listed once."""
    ids = [segment["id"] for segment in result["segments_info"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    assert set(result["segmentation"].unique().tolist()) - {0} == set(ids)
    return [(result["segmentation"] == number).numpy() for number in ids]


def assert_found(found, labels, truth, true_labels, least_iou=0.99):
    """Each object was found once, with its class, and nothing else was."""
    assert len(found) == len(truth)
    for mask, label in zip(truth, true_labels, strict=True):
        ious = [
            (mask & other).sum() / (mask | other).sum() if label == other_label else 0.0
            for other, other_label in zip(found, labels, strict=True)
        ]
        assert sorted(iou > least_iou for iou in ious) == [False] * (len(truth) - 1) + [True], ious


def assert_perfect(truth, labels, model=None, least_iou=0.99, **options):
    """Both tasks find exactly the true masks (n, H, W).

    Mask logits at 1/4 round corners off by about two pixels each, which small objects feel: 0.95 is for those.
    """
    model = model or PerfectModel(labels)
    instances = instances_of(draw(truth), model, **options)
    assert_found(decoded(instances), instances["labels"].tolist(), truth, labels, least_iou)
    panoptic = panoptic_of(draw(truth), model, **options)
    found_labels = [one["label_id"] for one in panoptic["segments_info"]]
    assert_found(segment_masks(panoptic), found_labels, truth, labels, least_iou)


# ------------------------------------------------------------------------------------------------- objects across seams


@pytest.mark.parametrize(
    ("size", "num_tiles"),
    [
        ((64, 104), 2),
        ((104, 64), 2),
        ((104, 104), 4),
        ((144, 144), 9),
        ((131, 117), 9),
        ((150, 61), 4),
        ((97, 230), 12),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["disc", "rectangle", "ring"])
def test_an_object_across_tiles_is_one(size, num_tiles, shape):
    assert len(make_tiles(size, TILE, OVERLAP)) == num_tiles
    height, width = size
    truth = {
        "disc": disc(size, (height / 2, width / 2), 0.45 * max(size)),
        "rectangle": boxes_as_masks(size, [(5, 7, height - 6, width - 3)])[0],
        "ring": boxes_as_masks(size, [(4, 4, height - 4, width - 4)])[0]
        & ~boxes_as_masks(size, [(24, 24, height - 24, width - 24)])[0],
    }[shape]
    assert_perfect(truth[None], [3])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_many_objects_keep_their_masks_whatever_the_batch_size(batch_size):
    size = (170, 190)
    truth = np.stack([disc(size, (30 + 55 * row, 35 + 60 * column), 24) for row in range(3) for column in range(3)])
    model = PerfectModel([1] * 9)
    assert_perfect(truth, [1] * 9, model, batch_size=batch_size)
    num_tiles = len(make_tiles(size, TILE, OVERLAP))
    assert max(model.batch_sizes) == min(batch_size, num_tiles)
    assert sum(model.batch_sizes) == 2 * num_tiles


def test_results_of_different_batch_sizes_are_equal():
    size = (150, 120)
    truth = np.stack([disc(size, (40, 40), 30), disc(size, (90, 70), 38), disc(size, (130, 20), 15)])
    image, model = draw(truth), PerfectModel([0, 1, 0], confidences=[0.7, 0.8, 0.9])
    alone, together = (instances_of(image, model, batch_size=batch_size) for batch_size in (1, 4))
    assert alone["rles"] == together["rles"]
    assert alone["segments_info"] == together["segments_info"]
    assert all(torch.equal(alone[name], together[name]) for name in ("segmentation", "scores", "labels", "boxes"))
    alone, together = (panoptic_of(image, model, batch_size=batch_size) for batch_size in (1, 4))
    assert torch.equal(alone["segmentation"], together["segmentation"])
    assert alone["segments_info"] == together["segments_info"]


@pytest.mark.parametrize("centre", [(52, 52), (52, 25), (20, 52)], ids=["of four tiles", "of two", "of two others"])
def test_an_object_wholly_in_an_overlap_is_listed_once(centre):
    # Tiles begin at 0 and 40, so 40 to 64 are shared.
    assert_perfect(disc((104, 104), centre, 11)[None], [2], least_iou=0.95)


def test_an_object_that_only_touches_an_overlap_is_listed_once():
    boxes = [(10, 10, 40, 42), (60, 63, 90, 95)]  # two columns and one column in the overlap
    assert_perfect(boxes_as_masks((104, 104), boxes), [2, 2], least_iou=0.95)


def test_neighbours_of_equal_class_along_the_seam_stay_apart():
    # The cores meet at 52.
    boxes = [(8, 30, 52, 52), (8, 52, 52, 80), (52, 30, 96, 52), (52, 52, 96, 80)]
    assert_perfect(boxes_as_masks((104, 104), boxes), [1, 1, 1, 1], least_iou=0.95)


def test_neighbours_of_equal_class_across_the_seam_stay_apart():
    boxes = [(0, 20, 30, 90), (30, 20, 47, 90), (47, 20, 57, 90), (57, 20, 104, 90)]
    assert_perfect(boxes_as_masks((104, 104), boxes), [1, 1, 1, 1], least_iou=0.95)


def test_neighbours_of_different_class_stay_apart():
    boxes = [(10, 10, 90, 52), (10, 52, 90, 100)]
    assert_perfect(boxes_as_masks((104, 104), boxes), [1, 2])


def test_an_object_whose_class_changes_from_tile_to_tile_is_one_of_each():
    truth = boxes_as_masks((64, 104), [(10, 10, 50, 94)])
    image = draw(truth)

    class Undecided(PerfectModel):
        def find_objects(self, tile, padded):
            has_left_border = bool(read_bits(tile.to(torch.int64).numpy())[FRAME_BIT][:, 0].all())
            self.labels = [1 if has_left_border else 2]
            return super().find_objects(tile, padded)

    halves = boxes_as_masks((64, 104), [(10, 10, 50, 52), (10, 52, 50, 94)])
    instances = instances_of(image, Undecided([1]))
    assert_found(decoded(instances), instances["labels"].tolist(), halves, [1, 2])
    panoptic = panoptic_of(image, Undecided([1]))
    assert_found(segment_masks(panoptic), [one["label_id"] for one in panoptic["segments_info"]], halves, [1, 2])


class MergingModel(PerfectModel):
    """Takes the first two objects for one in the last tile."""

    def find_objects(self, image, padded):
        values = image.to(torch.int64)
        is_frame = read_bits(values.numpy())[FRAME_BIT]
        if is_frame[-1].all() and is_frame[:, -1].all():
            values[0] = (values[0] & 3 > 0).long()
        return super().find_objects(values, padded)


def test_two_objects_that_a_tile_shows_whole_stay_two_when_another_takes_them_for_one():
    # A bar downwards that the tile below shows whole, and a bar to the right that the tile beside shows whole. The last
    # tile has both in its overlaps with those two, and joins them: IoU 0.76 with either.
    boxes = [(49, 42, 92, 50), (42, 52, 51, 95)]
    assert_perfect(boxes_as_masks((104, 104), boxes), [1, 1], MergingModel([1, 1]), least_iou=0.95)


class PiecesModel(PerfectModel):
    """Takes each connected piece of the first object for an object."""

    def find_objects(self, image, padded):
        pieces, _ = scipy.ndimage.label(read_bits(image.to(torch.int64).numpy())[0])
        values = torch.from_numpy(np.stack([pieces == 1, pieces == 2])).long()
        return super().find_objects(torch.stack([values[0] + 2 * values[1], *image[1:].long()]), padded)


def test_pieces_of_an_object_that_a_tile_cuts_apart_are_joined_by_its_neighbours():
    ring = boxes_as_masks((104, 104), [(10, 10, 94, 94)])[0] & ~boxes_as_masks((104, 104), [(28, 28, 76, 76)])[0]
    ring[70:, 70:] = False  # so the last tile sees the ends of the ring and nothing between them
    instances = instances_of(draw(ring[None]), PiecesModel([1, 1]))
    assert_found(decoded(instances), instances["labels"].tolist(), ring[None], [1], 0.97)
    panoptic = panoptic_of(draw(ring[None]), PiecesModel([1, 1]))
    assert_found(segment_masks(panoptic), [one["label_id"] for one in panoptic["segments_info"]], ring[None], [1], 0.97)


def test_what_a_tile_says_near_its_cut_does_not_count():
    size = (144, 144)
    truth = np.stack(
        [disc(size, (70, 60), 55), boxes_as_masks(size, [(20, 120, 130, 141)])[0], disc(size, (20, 20), 9)]
    )
    assert_perfect(truth, [1, 1, 1], PerfectModel([1, 1, 1], blind_margin=5), least_iou=0.95)


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (23, 65), (16, 12), (1, 200)], ids=str)
def test_an_image_thinner_than_the_overlap_has_one_row_of_tiles(size):
    truth = np.ones((2, *size), dtype=bool)
    middle = max(size) // 2
    long_axis = int(np.argmax(size))
    np.moveaxis(truth[0], long_axis, 0)[middle:] = False
    np.moveaxis(truth[1], long_axis, 0)[:middle] = False
    assert_perfect(truth, [0, 0])


@pytest.mark.parametrize("returns_sizes", [False, True])
def test_padding_of_tiles_is_cut_away_whether_the_model_returns_sizes_or_not(returns_sizes):
    truth = boxes_as_masks((77, 99), [(0, 0, 77, 99)])
    model = PerfectModel([1], returns_sizes=returns_sizes)
    result = panoptic_of(draw(truth), model, tile_size=(45, 50), overlap=10)
    assert result["segmentation"].eq(1).all()


def test_tiles_that_overlap_more_than_half_give_the_same_objects():
    size = (120, 140)
    truth = np.stack([disc(size, (60, 70), 50), disc(size, (15, 15), 12)])
    assert_perfect(truth, [1, 1], overlap=50, least_iou=0.95)


# ---------------------------------------------------------------------------------------------------- forms of the results


def test_masks_of_the_map_and_run_lengths_agree():
    size = (100, 150)
    truth = np.stack([disc(size, (50, 40), 35), disc(size, (40, 110), 30), disc(size, (90, 80), 9)])
    result = instances_of(draw(truth), PerfectModel([0, 1, 2], confidences=[0.8, 0.9, 0.7]))
    assert result["segmentation"].dtype == torch.int32
    assert result["segmentation"].shape == size
    masks = decoded(result)
    for number, (mask, rle) in enumerate(zip(masks, result["rles"], strict=True)):
        assert rle["size"] == [*size]
        assert np.array_equal(mask, result["segmentation"].numpy() == number)
    assert np.array_equal(result["segmentation"].numpy() == -1, ~np.any(masks, axis=0))


def test_instances_are_sorted_and_described_alike():
    size = (100, 150)
    truth = np.stack([disc(size, (50, 40), 35), disc(size, (40, 110), 30), disc(size, (90, 80), 9)])
    result = instances_of(draw(truth), PerfectModel([0, 1, 2], confidences=[0.8, 0.9, 0.7]))
    assert result["labels"].tolist() == [1, 0, 2]
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.8, 0.7]), rtol=0, atol=0.05)
    assert result["segments_info"] == [
        {"id": number, "label_id": label, "was_fused": False, "score": score}
        for number, (label, score) in enumerate(zip([1, 0, 2], result["scores"].tolist(), strict=True))
    ]
    assert result["boxes"].dtype == torch.float32
    for mask, box in zip(decoded(result), result["boxes"].tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_instances_that_overlap_keep_their_whole_masks():
    size = (110, 140)
    truth = np.stack([disc(size, (55, 50), 40), disc(size, (55, 85), 40)])
    result = instances_of(draw(truth), PerfectModel([1, 1], confidences=[0.7, 0.9]))
    assert_found(decoded(result), result["labels"].tolist(), truth, [1, 1])
    in_both = torch.from_numpy(np.logical_and.reduce([*decoded(result)]))
    assert in_both.sum() > 1000
    assert result["segmentation"][in_both].eq(0).all()  # the higher score


def test_a_joined_object_has_the_highest_score_of_its_parts():
    truth = boxes_as_masks((64, 144), [(10, 30, 50, 130)])
    image = draw(truth)
    model = PerfectModel([1], confidences=lambda mask: 0.6 + 0.35 * mask.mean())  # the second tile sees most of it
    instances, segments = [], []
    for left in (0, 40, 80):
        outputs = model(**PROCESSOR(image.crop((left, 0, left + 64, 64)), return_tensors="pt", **RAW))
        instances += PROCESSOR.post_process_instance_segmentation(outputs)[0]["segments_info"]
        segments += PROCESSOR.post_process_panoptic_segmentation(outputs)[0]["segments_info"]
    for parts, result in ((instances, instances_of(image, model)), (segments, panoptic_of(image, model))):
        scores = [part["score"] for part in parts]
        assert len(set(scores)) == 3
        [joined] = result["segments_info"]
        assert joined["score"] == max(scores)


def test_a_part_without_core_pixels_gives_no_score():
    truth = boxes_as_masks(
        (64, 104), [(10, 20, 50, 47)]
    )  # seven columns of it are in the second tile, none in its core
    model = PerfectModel([1], confidences=lambda mask: 0.99 if mask[:, 20:].sum() == 0 else 0.6)
    [score] = instances_of(draw(truth), model)["scores"].tolist()
    assert score < 0.61


def test_stuff_is_one_segment_in_the_whole_image_and_no_instance():
    size = (144, 144)
    boxes = [(0, 0, 30, 30), (100, 100, 144, 144), (0, 100, 40, 144), (60, 60, 90, 90)]
    truth, labels = boxes_as_masks(size, boxes), [4, 4, 4, 2]
    result = panoptic_of(draw(truth), PerfectModel(labels), label_ids_to_fuse=[4])
    masks = dict(zip([one["label_id"] for one in result["segments_info"]], segment_masks(result), strict=True))
    assert {one["label_id"]: one["was_fused"] for one in result["segments_info"]} == {4: True, 2: False}
    assert_found([masks[4], masks[2]], [4, 2], np.stack([truth[:3].any(0), truth[3]]), [4, 2], least_iou=0.98)
    instances = instances_of(draw(truth), PerfectModel(labels), label_ids_to_fuse=[4])
    assert instances["labels"].tolist() == [2]


def test_stuff_is_fused_by_the_field_of_the_processor():
    truth = boxes_as_masks((144, 144), [(0, 0, 30, 30), (100, 100, 144, 144)])
    options = {"tile_size": TILE, "overlap": OVERLAP, "progress": False, **RAW}
    processor = MPFormerImageProcessor(label_ids_to_fuse=[1])
    result = tiled_panoptic_segmentation(PerfectModel([1, 1]), processor, draw(truth), **options)
    assert len(result["segments_info"]) == 1
    assert tiled_instance_segmentation(PerfectModel([1, 1]), processor, draw(truth), **options)["rles"] == []


def test_void_stays_void():
    truth = boxes_as_masks((100, 130), [(20, 0, 80, 130)])
    result = panoptic_of(draw(truth), PerfectModel([0]))
    assert torch.equal(result["segmentation"] == 0, torch.from_numpy(~truth[0]))


def test_an_image_without_objects_gives_empty_results():
    image = Image.new("RGB", (130, 100))
    instances = instances_of(image, PerfectModel([0]))
    assert instances["segmentation"].eq(-1).all()
    assert (instances["segments_info"], instances["rles"]) == ([], [])
    assert [instances[name].shape for name in ("scores", "labels", "boxes")] == [(0,), (0,), (0, 4)]
    panoptic = panoptic_of(image, PerfectModel([0]))
    assert panoptic["segmentation"].eq(0).all()
    assert panoptic["segments_info"] == []


def test_the_model_runs_in_inference_mode_and_results_are_ordinary_tensors():
    model = PerfectModel([1])
    result = instances_of(draw(boxes_as_masks((64, 104), [(10, 10, 50, 94)])), model)
    result |= {"map": panoptic_of(Image.new("RGB", (100, 80)), model)["segmentation"]}
    assert all(model.ran_in_inference_mode)
    for name in ("segmentation", "scores", "labels", "boxes", "map"):
        assert not result[name].is_inference()


def test_top_k_counts_in_each_tile():
    truth = boxes_as_masks((64, 104), [(5, 5, 20, 20), (30, 5, 50, 30), (5, 80, 20, 95), (30, 75, 50, 100)])
    model = PerfectModel([1, 1, 1, 1], confidences=[0.7, 0.9, 0.9, 0.7])
    result = instances_of(draw(truth), model, top_k=1)
    assert_found(decoded(result), result["labels"].tolist(), truth[1:3], [1, 1], least_iou=0.9)


# ------------------------------------------------------------------------------------------------------------- real models

SMALL = {"size": {"shortest_edge": 64, "longest_edge": 96}}
INSTANCES = {"threshold": 0.05, "mask_threshold": 0.5}
PANOPTIC = {"threshold": 0.2, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.1}


def lively_model():
    """A small random model whose queries differ more than those of a fresh one, so that several segments win pixels."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mask_embedder" in name or "queries_" in name:
                parameter.mul_(3)
    return model


def photograph(height, width):
    """Something with edges and gradients."""
    rows, columns = np.ogrid[:height, :width]
    image = np.stack(np.broadcast_arrays(rows % 97 * 2, columns % 71 * 3, (rows + columns) % 120 * 2), axis=-1)
    image[disc((height, width), (height / 2, width / 3), min(height, width) / 4)] = (250, 20, 90)
    return image.astype(np.uint8)


def without_tiles(model, image):
    inputs = PROCESSOR(image, return_tensors="pt", **SMALL)
    with torch.inference_mode():
        outputs = model(**inputs)
    target = [(image.height, image.width)]
    [instances] = PROCESSOR.post_process_instance_segmentation(outputs, target_sizes=target, **INSTANCES)
    [panoptic] = PROCESSOR.post_process_panoptic_segmentation(outputs, target_sizes=target, **PANOPTIC)
    return instances, panoptic


def assert_same_instances(result, expected):
    for name in ("segmentation", "scores", "labels", "boxes"):
        assert result[name].dtype == expected[name].dtype
        assert torch.equal(result[name], expected[name]), name
    assert result["segments_info"] == expected["segments_info"]
    assert np.array_equal(np.stack(decoded(result)), expected["masks"].numpy())


@pytest.mark.parametrize("size", [(64, 96), (47, 90), (96, 50)], ids=str)
def test_one_tile_is_exactly_the_result_without_tiles(size):
    model, image = lively_model(), Image.fromarray(photograph(*size))
    instances, panoptic = without_tiles(model, image)
    assert len(instances["scores"]) > 1
    assert len(panoptic["segments_info"]) > 1
    options = {"tile_size": (96, 96), "overlap": 32, "progress": False, **SMALL}
    assert_same_instances(tiled_instance_segmentation(model, PROCESSOR, image, **INSTANCES, **options), instances)
    result = tiled_panoptic_segmentation(model, PROCESSOR, image, **PANOPTIC, **options)
    assert torch.equal(result["segmentation"], panoptic["segmentation"])
    assert result["segments_info"] == panoptic["segments_info"]


def test_each_pixel_says_what_its_tile_says():
    # Tiles of 64 begin at 0 and 36 of 100 rows, and at 0, 33 and 66 of 130 columns; cores meet in the middle of overlaps.
    model, image = lively_model(), Image.fromarray(photograph(100, 130))
    of_class = torch.zeros(3, 100, 130, dtype=torch.bool)
    classes = torch.full((100, 130), -1)
    for top, rows in ((0, slice(0, 50)), (36, slice(50, 100))):
        for left, columns in ((0, slice(0, 48)), (33, slice(48, 81)), (66, slice(81, 130))):
            instances, panoptic = without_tiles(model, image.crop((left, top, left + 64, top + 64)))
            core = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
            for mask, label in zip(instances["masks"], instances["labels"].tolist(), strict=True):
                of_class[label, rows, columns] |= mask[core]
            for segment in panoptic["segments_info"]:
                classes[rows, columns][panoptic["segmentation"][core] == segment["id"]] = segment["label_id"]
    options = {"tile_size": (64, 64), "overlap": 28, "progress": False, **SMALL}
    result = tiled_instance_segmentation(model, PROCESSOR, image, **INSTANCES, **options)
    masks = torch.from_numpy(np.stack(decoded(result)))
    for label in range(3):
        assert torch.equal(masks[result["labels"] == label].any(0), of_class[label])
    result = tiled_panoptic_segmentation(model, PROCESSOR, image, **PANOPTIC, **options)
    labels = torch.tensor([-1, *(segment["label_id"] for segment in result["segments_info"])])
    assert len(labels) > 2
    assert torch.equal(labels[result["segmentation"]], classes)


def image_forms():
    picture = photograph(70, 110)
    transparent = np.dstack([picture, (np.arange(110) * 2).astype(np.uint8)[None].repeat(70, 0)])
    gray = picture[..., 0]
    deep = gray.astype(np.uint16) * 250
    return {
        "L": (Image.fromarray(gray), gray[..., None].repeat(3, -1)),
        "RGBA": (Image.fromarray(transparent), pil_to_rgb(Image.fromarray(transparent))),
        "P": (Image.fromarray(picture).quantize(16), pil_to_rgb(Image.fromarray(picture).quantize(16))),
        "CMYK": (Image.fromarray(picture).convert("CMYK"), pil_to_rgb(Image.fromarray(picture).convert("CMYK"))),
        "I;16": (Image.fromarray(deep), pil_to_rgb(Image.fromarray(deep))),
        "numpy": (picture, picture),
        "numpy gray": (gray, gray[..., None].repeat(3, -1)),
        "numpy channels first": (picture.transpose(2, 0, 1), picture),
        "torch": (torch.from_numpy(picture).permute(2, 0, 1), picture),
        "torch channels last": (torch.from_numpy(picture), picture),
    }


@pytest.mark.parametrize("form", image_forms().keys())
def test_any_form_of_image_gives_the_result_of_its_rgb_image(form):
    image, rgb = image_forms()[form]
    model = lively_model()
    options = {"tile_size": (64, 64), "overlap": 20, "progress": False, **SMALL}
    result, expected = (
        tiled_instance_segmentation(model, PROCESSOR, one, **INSTANCES, **options) for one in (image, rgb)
    )
    assert len(expected["rles"]) > 1
    assert result["rles"] == expected["rles"]
    torch.testing.assert_close(result["scores"], expected["scores"])


def test_transformers_own_model_and_processor_give_the_result_of_ours():
    config = tiny_config()
    fields = {name: getattr(config, name) for name in Mask2FormerConfig().to_dict() if hasattr(config, name)}
    ignored = ("model_type", "transformers_version", "architectures")
    theirs = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(**{name: value for name, value in fields.items() if name not in ignored})
    ).eval()
    ours = MPFormerForUniversalSegmentation(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    image = Image.fromarray(photograph(90, 120))
    options = {"tile_size": (64, 64), "overlap": 28, "progress": False}
    sizes = {"size": {"height": 64, "width": 64}}
    expected = tiled_instance_segmentation(ours, PROCESSOR, image, **INSTANCES, **options, **sizes)
    result = tiled_instance_segmentation(theirs, Mask2FormerImageProcessor(), image, **INSTANCES, **options, **sizes)
    assert len(expected["rles"]) > 1
    assert result["labels"].tolist() == expected["labels"].tolist()
    torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=1e-3)
    for mask, other in zip(decoded(result), decoded(expected), strict=True):
        assert (mask & other).sum() / (mask | other).sum() > 0.99


def test_inputs_go_to_the_device_and_float_type_of_the_model(device):
    model = tiny_model().to(device, torch.bfloat16)
    image = Image.fromarray(photograph(70, 100))
    options = {"tile_size": (64, 64), "overlap": 20, "progress": False, **SMALL}
    instances = tiled_instance_segmentation(model, PROCESSOR, image, **INSTANCES, **options)
    panoptic = tiled_panoptic_segmentation(model, PROCESSOR, image, **PANOPTIC, **options)
    assert len(instances["rles"]) > 0
    assert {instances["segmentation"].device.type, panoptic["segmentation"].device.type} == {"cpu"}


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_counts_tiles_and_can_be_hidden(progress, capsys):
    panoptic_of(Image.new("RGB", (104, 104)), PerfectModel([0]), progress=progress)
    assert ("4/4" in capsys.readouterr().err) == progress


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 64}, r"`overlap` must be at least 1.*below both sides of `tile_size` \(64, 64\), got 64"),
        ({"tile_size": (200, 20)}, "`overlap` must be at least 1.*got 24"),
        ({"overlap": 0}, "`overlap` must be at least 1"),
        ({"tile_size": 64}, r"`tile_size` must be \(height, width\)"),
        ({"tile_size": (64, 0)}, r"`tile_size` must be \(height, width\)"),
        ({"merge_iou": 0}, "`merge_iou` must be above 0 and at most 1, got 0"),
        ({"merge_iou": 1.1}, "`merge_iou` must be above 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"threshold": 2.0}, "score_threshold"),
    ],
)
@pytest.mark.parametrize("task", [instances_of, panoptic_of])
def test_impossible_options_are_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(Image.new("RGB", (100, 100)), PerfectModel([0]), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([Image.new("RGB", (9, 9))], "Expected one image.*got list"),
        (np.zeros((2, 9, 9, 3)), r"Expected one image.*got ndarray of shape \(2, 9, 9, 3\)"),
        (np.zeros((0, 9, 3), dtype=np.uint8), "The image is empty"),
        ("picture.png", "Expected one image.*got str"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        instances_of(image, PerfectModel([0]))


def test_a_damaged_file_is_named_before_anything_is_computed():
    file = io.BytesIO()
    Image.fromarray(photograph(100, 100)).save(file, "PNG")
    damaged = Image.open(io.BytesIO(file.getvalue()[:-500]))
    model = PerfectModel([0])
    with pytest.raises(ValueError, match=r"cannot be decoded.*OSError"):
        panoptic_of(damaged, model)
    assert model.batch_sizes == []


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode.*`model.eval\(\)`"):
        instances_of(Image.new("RGB", (100, 100)), tiny_model().train())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (SimpleNamespace(logits=torch.zeros(1, 5)), "`class_queries_logits`.*got SimpleNamespace with NoneType"),
        ((torch.zeros(1, 5, 6),), "got tuple"),
        (
            SimpleNamespace(class_queries_logits=torch.zeros(1, 5, 6), masks_queries_logits=torch.zeros(3, 5, 16, 16)),
            r"`masks_queries_logits` of 1 images.*a tensor \(3, 5, 16, 16\)",
        ),
    ],
)
def test_outputs_without_logits_are_refused(outputs, message):
    with pytest.raises(ValueError, match=message):
        panoptic_of(Image.new("RGB", (100, 100)), lambda **_: outputs)


# ------------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("length", "side", "overlap"),
    [
        *itertools.product([1, 2, 63, 64, 65, 103, 104, 105, 1000, 4096], [64], [1, 24, 32, 63]),
        (4096, 1024, 256),
        (5, 3, 1),
    ],
)
def test_tiles_cover_an_axis_evenly_with_the_overlap_asked_for(length, side, overlap):
    spans = cover_axis(length, side, overlap)
    assert all(span.stop - span.start == min(side, length) for span in spans)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    shared = [one.stop - other.start for one, other in itertools.pairwise(spans)]
    assert all(pixels >= overlap for pixels in shared)
    assert max(shared, default=0) - min(shared, default=0) <= 1
    if len(spans) > 1:  # one tile less would not do
        assert (len(spans) - 1) * side - (len(spans) - 2) * overlap < length
    core = [pixel for span in spans for pixel in range(span.core_start, span.core_stop)]
    assert core == list(range(length))
    for one, other in itertools.pairwise(spans):
        to_edges = one.core_stop - other.start, one.stop - one.core_stop
        assert abs(to_edges[0] - to_edges[1]) <= 1


def test_every_pixel_is_in_one_core_and_neighbours_name_what_they_share():
    size = (150, 210)
    tiles = make_tiles(size, TILE, OVERLAP)
    count = np.zeros(size, dtype=int)
    for tile in tiles:
        count[tile.core.top : tile.core.bottom, tile.core.left : tile.core.right] += 1
        for other, region in tile.later.items():
            assert other > tile.index
            assert tiles[other].earlier[tile.index] == region
            shared = np.zeros((2, *size), dtype=bool)
            for mask, box in zip(shared, (tile.box, tiles[other].box), strict=True):
                mask[box.top : box.bottom, box.left : box.right] = True
            rows, columns = np.nonzero(shared.all(0))
            assert (region.top, region.left) == (rows.min(), columns.min())
            assert (region.bottom, region.right) == (rows.max() + 1, columns.max() + 1)
    assert (count == 1).all()
    pairs = sum(len(tile.later) for tile in tiles)
    rows, columns = 4, 5
    assert len(tiles) == rows * columns
    assert pairs == rows * (columns - 1) + (rows - 1) * columns + 2 * (rows - 1) * (columns - 1)


def test_only_edges_inside_the_image_cut():
    regions = [tile.uncut for tile in make_tiles((104, 64), TILE, OVERLAP)]
    edges = [(region.top, region.left, region.bottom, region.right) for region in regions]
    assert edges == [(0, 0, 56, 64), (48, 0, 104, 64)]


def plain_common(first: Tensor, second: Tensor) -> list[list[int]]:
    return [[int((one & other).sum()) for other in second] for one in first]


@pytest.mark.parametrize("compared_bytes", [1, 2**25])
def test_common_pixels_of_masks_are_counted(compared_bytes, monkeypatch):
    monkeypatch.setattr(tiled_prediction, "COMPARED_BYTES", compared_bytes)
    masks = torch.rand(2, 4, 13, 9) > 0.5
    masks[0, 2] = False
    first, second = (
        strip_of_masks(one.numpy(), np.array([5, 6, 7, 8]), first_part)
        for one, first_part in zip(masks, (10, 20), strict=True)
    )
    kept = [0, 1, 3]
    assert first.parts.tolist() == [10, 11, 13]
    assert first.labels.tolist() == [5, 6, 8]
    assert first.areas.tolist() == masks[0, kept].sum((1, 2)).tolist()
    assert common_pixels_of_masks(first, second).tolist() == plain_common(masks[0, kept], masks[1])


def test_common_pixels_of_maps_are_counted():
    maps = torch.randint(0, 4, (2, 13, 9), dtype=torch.int32)
    labels = np.array([5, 6, 7])
    first, second = (strip_of_map(one.numpy(), labels, 10) for one in maps)
    masks = [torch.stack([one == number for number in (1, 2, 3)]) for one in maps]
    assert first.parts.tolist() == [10, 11, 12]
    assert first.areas.tolist() == masks[0].sum((1, 2)).tolist()
    assert common_pixels_of_maps(first, second).tolist() == plain_common(*masks)


def strip(parts, labels, areas):
    return Strip(np.array(parts), np.array(labels), np.array(areas), np.zeros(0))


def test_the_best_partner_is_taken_and_only_once():
    first, second = strip([0, 1], [3, 3], [100, 100]), strip([2, 3], [3, 3], [100, 100])
    common = np.array([[80, 75], [70, 0]])  # IoU 2/3, 3/5; 7/13, 0
    links = find_links(first, second, common, 0.5)
    assert [(link.first, link.second) for link in links] == [(0, 2)]
    assert math.isclose(links[0].iou, 80 / 120)


def test_equal_masks_of_different_classes_are_not_linked():
    assert find_links(strip([0], [1], [50]), strip([1], [2], [50]), np.array([[50]]), 0.1) == []


def test_an_iou_of_exactly_the_threshold_links():
    assert len(find_links(strip([0], [1], [50]), strip([1], [1], [50]), np.array([[50]]), 1.0)) == 1
    assert len(find_links(strip([0], [1], [30]), strip([1], [1], [30]), np.array([[20]]), 0.5)) == 1


def part(tile, *, is_cut=True, has_core=True, label=1, is_fused=False):
    return Part(tile, label, 0.9, is_cut, has_core, is_fused)


def test_chains_of_links_make_one_object():
    parts = [part(tile) for tile in range(5)]
    links = [Link(0.9, 3, 4), Link(0.8, 0, 1), Link(0.6, 1, 3)]
    assert group_parts(parts, links) == [[0, 1, 3, 4], [2]]


def test_objects_that_a_tile_shows_whole_are_not_joined_by_a_blur_in_another():
    # Tiles 0 and 1 show the same two objects; tile 2 sees them as one.
    whole = [part(0, is_cut=False), part(0, is_cut=False), part(1), part(1), part(2)]
    links = [Link(0.6, 2, 4), Link(0.95, 0, 2), Link(0.9, 1, 3), Link(0.55, 1, 4)]
    assert group_parts(whole, links) == [[0, 2, 4], [1, 3]]
    cut = [part(0), part(0), part(1), part(1), part(2)]
    assert group_parts(cut, links) == [[0, 1, 2, 3, 4]]


def test_parts_without_core_pixels_join_others_and_vanish():
    parts = [part(0), part(1, has_core=False), part(2), part(3, has_core=False)]
    assert group_parts(parts, [Link(0.9, 0, 1), Link(0.9, 1, 2)]) == [[0, 2]]


def test_fused_parts_are_one_by_class_without_links():
    parts = [
        part(0, label=7, is_fused=True, is_cut=False),
        part(0, label=8, is_fused=True),
        part(5, label=7, is_fused=True),
    ]
    assert group_parts(parts, []) == [[0, 2], [1]]


def test_strips_are_kept_for_one_row_of_tiles_at_most():
    tiles = make_tiles((300, 200), TILE, OVERLAP)
    num_columns = 5
    assert len(tiles) == 7 * num_columns
    seams = Seams(0.5, common_pixels_of_maps)
    ids = np.ones(TILE, dtype=np.int32)
    for tile in tiles:
        seams.add(tile, lambda region, tile=tile: strip_of_map(ids[region.within(tile.box)], np.array([1]), tile.index))
        assert all(first <= tile.index < second for first, second in seams.waiting)
        assert len(seams.waiting) <= 3 * (num_columns + 1)
    assert not seams.waiting
