"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), counted as panopticapi counts it.

A predicted and a true segment of one class match if their IoU is above 1/2; at most one pair can. Per class

    PQ = sum of the matches' IoU / (TP + FP / 2 + FN / 2) = SQ * RQ,   SQ = mean IoU of the matches.

Void and crowd (panopticapi, evaluation.py): predicted pixels over void do not count in a union; a crowd segment is never
matched and never missed; a predicted segment without match of which more than half lies on void or on the crowd of its own
class is no false positive.

torchmetrics' `PanopticQuality` is not used: it knows no crowd, and takes two channels of classes and instances instead of ids.

Maps hold segment ids, 0 is void. IoUs are summed exactly (`math.fsum`), so that neither the order of the images nor their
distribution over processes changes a digit.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from training.metrics.image_scores import ImageId, ImageScores, to_numpy

VOID = 0


class PanopticScore(TypedDict):
    """What is kept of an image: [class, IoU] of its matches, and the class of each false positive and negative."""

    matches: list[tuple[int, float]]
    errors: list[int]


class PanopticQuality(ImageScores[PanopticScore]):
    """Collects images one by one and computes PQ, SQ and RQ of all classes, things, stuff, and each class.

    Only a few numbers of each image are kept. On several processes each collects its own images; one of them adds the
    others with `merge`, in which an image that came twice (samplers repeat images to fill a batch) counts once.

    >>> quality = PanopticQuality(thing_ids=[0], stuff_ids=[1])
    >>> segments = [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]
    >>> quality.add("a", [[1, 2], [1, 2]], segments, [[1, 2], [1, 2]], segments)
    >>> quality.compute()["All"]
    {'pq': 1.0, 'sq': 1.0, 'rq': 1.0, 'n': 2}
    """

    def __init__(self, thing_ids: Iterable[int], stuff_ids: Iterable[int]) -> None:
        """Name the classes; predictions and ground truth may hold no other."""
        super().__init__()
        self.thing_ids = tuple(thing_ids)
        self.stuff_ids = tuple(stuff_ids)
        self.class_ids = frozenset(self.thing_ids) | frozenset(self.stuff_ids)
        if len(self.class_ids) < len(self.thing_ids) + len(self.stuff_ids):
            raise ValueError("A class id is named twice. List each class once, as a thing or as stuff.")

    def settings(self) -> dict[str, Any]:
        """Name the classes."""
        return {"thing_ids": self.thing_ids, "stuff_ids": self.stuff_ids}

    def add(
        self,
        image_id: ImageId,
        predicted_map: ArrayLike | torch.Tensor,
        predicted_segments: Sequence[Mapping[str, Any]],
        target_map: ArrayLike | torch.Tensor,
        target_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Score one image.

        Args:
            image_id: names the image; each image is added once.
            predicted_map: integer, (H, W), 0 where nothing was predicted: `"segmentation"` of
                `post_process_panoptic_segmentation`, or the decoded PNG of an official file.
            predicted_segments: `"segments_info"` of the same: for each id of the map one dictionary with `id` and
                `label_id` (ours) or `category_id` (official).
            target_map: integer, (H, W), 0 is void. Ids that no segment has are neither void nor an object, as there.
            target_segments: as `predicted_segments`; optionally `iscrowd`, and `area` in pixels, which is then taken
                instead of a count of the map's pixels, as there.
        """
        self.refuse_known(image_id)
        predicted = _SegmentMap.read(predicted_map, predicted_segments, f"prediction of image {image_id!r}")
        target = _SegmentMap.read(target_map, target_segments, f"ground truth of image {image_id!r}")
        if predicted.ids.shape != target.ids.shape:
            raise ValueError(
                f"Image {image_id!r} is {target.ids.shape} in the ground truth and {predicted.ids.shape} in the "
                "prediction (height, width). Post-process with target_sizes set to the ground truth's size."
            )
        self.add_overlaps(image_id, count_overlaps(predicted.ids, target.ids), predicted, target)

    def add_overlaps(
        self, image_id: ImageId, overlaps: Mapping[tuple[int, int], int], predicted: "Segments", target: "Segments"
    ) -> None:
        """Score one image of which the pixels of every (predicted id, true id) pair are counted already."""
        for segments in (predicted, target):
            segments.require_classes(self.class_ids)
        self.keep(image_id, score_image(overlaps, predicted, target))

    def compute(self) -> dict[str, Any]:
        """Compute the scores of everything added so far, as fractions.

        Returns:
            `All`, `Things`, `Stuff`: each `pq`, `sq`, `rq`, the plain means over its `n` classes that occur in the
            prediction or in the ground truth (0.0 if n is 0), and `per_class`: class id to `pq`, `sq`, `rq` (0.0 for
            a class that occurs in neither).
        """
        ious: dict[int, list[float]] = defaultdict(list)
        errors: Counter[int] = Counter()
        for _, image in self.in_order():
            for class_id, iou in image["matches"]:
                ious[class_id].append(iou)
            errors.update(image["errors"])
        # The official tool lists the classes in the order of its JSON file, most often that of the ids.
        per_class = {class_id: _class_quality(ious[class_id], errors[class_id]) for class_id in sorted(self.class_ids)}
        occurring = {class_id for class_id in per_class if ious[class_id] or errors[class_id]}
        groups = {"All": self.class_ids, "Things": self.thing_ids, "Stuff": self.stuff_ids}
        means = {
            name: _mean_quality([per_class[key] for key in group if key in occurring]) for name, group in groups.items()
        }
        return {**means, "per_class": per_class}


def panoptic_map_from_masks(
    mask_labels: ArrayLike | torch.Tensor, class_labels: ArrayLike | torch.Tensor
) -> tuple[NDArray[np.int64], list[dict[str, int]]]:
    """Write binary masks into one map, the form in which panoptic ground truth is compared.

    Args:
        mask_labels: bool, (n, H, W), True inside the segment. No pixel may be in two masks.
        class_labels: integer, (n,).

    Returns:
        The map, int64 (H, W), 0 where no mask is, and for each mask a dictionary with `id` (1 + its position) and
        `label_id`: the last two arguments of `PanopticQuality.add`.
    """
    masks, class_ids = to_numpy(mask_labels).astype(bool), to_numpy(class_labels)
    if masks.ndim != 3 or class_ids.shape != masks.shape[:1]:  # noqa: PLR2004
        raise ValueError(
            f"Expected masks (n, H, W) and one class label each, got masks {masks.shape} and labels {class_ids.shape}."
        )
    if masks.sum(axis=0).max(initial=0) > 1:
        raise ValueError("The masks overlap. Panoptic quality is defined for segments that share no pixel.")
    ids = np.arange(1, len(masks) + 1)
    segments = [{"id": int(key), "label_id": int(label)} for key, label in zip(ids, class_ids, strict=True)]
    return np.tensordot(ids, masks, axes=1).astype(np.int64), segments


# ---------------------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """The segments of an image by their ids, with words for error messages."""

    segments: dict[int, Mapping[str, Any]]
    name: str

    def class_of(self, segment_id: int) -> int:
        """Class of a segment, in our form (`label_id`) or the official one (`category_id`)."""
        info = self.segments[segment_id]
        return int(info["label_id"] if "label_id" in info else info["category_id"])

    def is_crowd(self, segment_id: int) -> bool:
        """Whether the segment is a crowd."""
        return bool(self.segments[segment_id].get("iscrowd", 0))

    def require_classes(self, class_ids: frozenset[int]) -> None:
        """Refuse a segment of an unknown class."""
        for segment_id in self.segments:
            if self.class_of(segment_id) not in class_ids:
                raise ValueError(
                    f"Segment {segment_id} in the {self.name} has class {self.class_of(segment_id)}, which is neither "
                    "in thing_ids nor in stuff_ids."
                )


@dataclass(frozen=True)
class _SegmentMap(Segments):
    """A map of ids (H, W) with the segments it shows."""

    ids: NDArray[np.integer]

    @classmethod
    def read(cls, ids: ArrayLike | torch.Tensor, segments: Sequence[Mapping[str, Any]], name: str) -> "_SegmentMap":
        array = to_numpy(ids)
        if array.ndim != 2 or array.dtype.kind not in "iu":  # noqa: PLR2004
            raise ValueError(f"The {name} must be an integer map (H, W), got {array.dtype} {array.shape}.")
        by_id = {int(info["id"]): info for info in segments}
        if len(by_id) < len(segments):
            raise ValueError(f"The {name} lists a segment id twice. Give each segment its own id.")
        return cls(by_id, name, array)


def count_overlaps(predicted_map: NDArray[np.integer], target_map: NDArray[np.integer]) -> dict[tuple[int, int], int]:
    """Count the pixels of every (predicted id, true id) pair that occurs, both maps (H, W).

    Segments are long runs of equal pixels, so the runs are sorted and not the pixels: some thousand instead of some
    hundred thousand. Ids above 32 bits are replaced by their ranks before two are combined into one number.
    """
    predicted, target = predicted_map.ravel(), target_map.ravel()
    if predicted.size == 0:
        return {}
    changes = predicted[1:] != predicted[:-1]
    changes |= target[1:] != target[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    predicted_ids, target_ids = _Codes.of(predicted[starts]), _Codes.of(target[starts])
    pairs = predicted_ids.codes << np.uint64(32) | target_ids.codes
    distinct = _distinct(pairs)
    # Exact: float64 holds integers up to 2**53.
    pixels = np.bincount(np.searchsorted(distinct, pairs), weights=np.diff(starts, append=predicted.size))
    keys = zip(
        predicted_ids.decode(distinct >> np.uint64(32)), target_ids.decode(distinct & np.uint64(2**32 - 1)), strict=True
    )
    return dict(zip(keys, pixels.astype(np.int64).tolist(), strict=True))


def _distinct(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return the distinct values in order. For some thousand this takes a third of the time of `np.unique`, which hashes them."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


@dataclass(frozen=True)
class _Codes:
    """Numbers below 2**32, uint64, that stand for ids: the ids themselves, or their places in `table`."""

    codes: NDArray[np.uint64]
    table: NDArray[np.integer] | None

    @classmethod
    def of(cls, ids: NDArray[np.integer]) -> "_Codes":
        if ids.min() >= 0 and ids.max() < 2**32:
            return cls(ids.astype(np.uint64), None)
        table = _distinct(ids)
        return cls(np.searchsorted(table, ids).astype(np.uint64), table)

    def decode(self, codes: NDArray[np.uint64]) -> list[int]:
        ids: list[int] = (codes if self.table is None else self.table[codes]).tolist()
        return ids


def score_image(overlaps: Mapping[tuple[int, int], int], predicted: Segments, target: Segments) -> PanopticScore:
    """Match the segments of an image, of which `overlaps` counts the pixels of every (predicted id, true id) pair."""
    predicted_areas, target_areas = _areas(overlaps)
    _require_positive_ids(predicted, predicted_areas)
    _require_positive_ids(target, target_areas)
    _require_same_segments(predicted, predicted_areas)
    # The official tool takes the area of the ground truth's JSON file.
    target_areas.update({key: info["area"] for key, info in target.segments.items() if "area" in info})

    predicted_classes = {key: predicted.class_of(key) for key in predicted.segments}
    target_classes = {key: target.class_of(key) for key in target.segments if not target.is_crowd(key)}
    matches = {}
    for (predicted_id, target_id), pixels in overlaps.items():
        class_id = target_classes.get(target_id)
        if class_id is not None and predicted_classes.get(predicted_id) == class_id:
            if target_areas[target_id] < pixels:
                raise ValueError(
                    f"Segment {target_id} in the {target.name} has area {target_areas[target_id]}, but more pixels in "
                    "the map. Leave out `area` if the map was resized."
                )
            over_void = overlaps.get((predicted_id, VOID), 0)
            union = predicted_areas[predicted_id] + target_areas[target_id] - pixels - over_void
            if 2 * pixels > union:
                matches[predicted_id, target_id] = (class_id, pixels / union)

    matched_predictions = {predicted_id for predicted_id, _ in matches}
    matched_targets = {target_id for _, target_id in matches}
    # A class has one crowd segment in COCO. Of several the official tool sees the last one only.
    crowd_of = {target.class_of(key): key for key in target.segments if target.is_crowd(key)}
    missed = [class_id for key, class_id in target_classes.items() if key not in matched_targets]
    false_positives = [
        class_id
        for key, class_id in predicted_classes.items()
        if key not in matched_predictions
        and 2 * sum(overlaps.get((key, place), 0) for place in (VOID, crowd_of.get(class_id))) <= predicted_areas[key]
    ]
    return {"matches": list(matches.values()), "errors": [*missed, *false_positives]}


def _areas(overlaps: Mapping[tuple[int, int], int]) -> tuple[dict[int, int], dict[int, int]]:
    """Count the pixels of every predicted id and of every true id."""
    predicted_areas: dict[int, int] = defaultdict(int)
    target_areas: dict[int, int] = defaultdict(int)
    for (predicted_id, target_id), pixels in overlaps.items():
        predicted_areas[predicted_id] += pixels
        target_areas[target_id] += pixels
    return predicted_areas, target_areas


def _require_positive_ids(segments: Segments, areas: Mapping[int, int]) -> None:
    if min(areas, default=VOID) < VOID or min(segments.segments, default=VOID + 1) <= VOID:
        raise ValueError(
            f"The {segments.name} uses ids below 1. 0 is void; add 1 to maps that start at 0 and have -1 where nothing is."
        )


def _require_same_segments(predicted: Segments, areas: Mapping[int, int]) -> None:
    """Refuse what the official tool refuses: segments without pixels, and pixels without a segment."""
    unlisted = sorted(areas.keys() - predicted.segments.keys() - {VOID})
    empty = sorted(predicted.segments.keys() - areas.keys())
    if unlisted or empty:
        raise ValueError(
            f"Map and list of segments disagree in the {predicted.name}: ids {unlisted[:5]} are only in the map, "
            f"ids {empty[:5]} only in the list. Pass the map and the list of one and the same result."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------------------------------


def _class_quality(ious: Sequence[float], num_errors: int) -> dict[str, float]:
    """Compute PQ, SQ and RQ of one class from the IoUs of its matches and its false positives plus negatives."""
    if not ious:
        return {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    weight = len(ious) + num_errors / 2
    total = math.fsum(ious)
    return {"pq": total / weight, "sq": total / len(ious), "rq": len(ious) / weight}


def _mean_quality(qualities: Sequence[Mapping[str, float]]) -> dict[str, float | int]:
    count = len(qualities)
    means = {key: math.fsum(quality[key] for quality in qualities) / max(count, 1) for key in ("pq", "sq", "rq")}
    return {**means, "n": count}
