"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), counted as panopticapi counts it.

A predicted and a true segment of one class match if their IoU is above 1/2; at most one pair can. Per class

    PQ = sum of the matches' IoU / (TP + FP / 2 + FN / 2) = SQ * RQ,   SQ = mean IoU of the matches.

Void and crowd (panopticapi, evaluation.py): predicted pixels over void do not count in a union; a crowd segment is never
matched and never missed; a predicted segment without match of which more than half lies on void or on the crowd of its own
class is no false positive.

Maps hold segment ids, 0 is void. IoUs are summed exactly (`math.fsum`), so that neither the order of the images nor their
distribution over processes changes a digit.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

VOID = 0


class PanopticQuality:
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
        self.thing_ids = tuple(thing_ids)
        self.stuff_ids = tuple(stuff_ids)
        self.class_ids = frozenset(self.thing_ids) | frozenset(self.stuff_ids)
        if len(self.class_ids) < len(self.thing_ids) + len(self.stuff_ids):
            raise ValueError("A class id is named twice. List each class once, as a thing or as stuff.")
        self._images: dict[Hashable, _ImageScore] = {}

    def __len__(self) -> int:
        """Count the images collected so far."""
        return len(self._images)

    def add(
        self,
        image_id: Hashable,
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
        if image_id in self._images:
            raise ValueError(f"Image {image_id!r} was added before. Add each image once, or call reset() first.")
        predicted = _SegmentMap.read(predicted_map, predicted_segments, f"prediction of image {image_id!r}")
        target = _SegmentMap.read(target_map, target_segments, f"ground truth of image {image_id!r}")
        if predicted.ids.shape != target.ids.shape:
            raise ValueError(
                f"Image {image_id!r} is {target.ids.shape} in the ground truth and {predicted.ids.shape} in the "
                "prediction (height, width). Post-process with target_sizes set to the ground truth's size."
            )
        for segments in (predicted, target):
            segments.require_classes(self.class_ids)
        self._images[image_id] = _score_image(predicted, target)

    def merge(self, other: "PanopticQuality") -> None:
        """Take over the images of another collection over the same classes; an image known to both counts once."""
        if (other.thing_ids, other.stuff_ids) != (self.thing_ids, self.stuff_ids):
            raise ValueError("Only collections with the same thing_ids and stuff_ids can be merged.")
        self._images = {**other._images, **self._images}  # noqa: SLF001  (the same class)

    def reset(self) -> None:
        """Forget all images."""
        self._images = {}

    def compute(self) -> dict[str, Any]:
        """Compute the scores of everything added so far, as fractions.

        Returns:
            `All`, `Things`, `Stuff`: each `pq`, `sq`, `rq`, the plain means over its `n` classes that occur in the
            prediction or in the ground truth (0.0 if n is 0), and `per_class`: class id to `pq`, `sq`, `rq` (0.0 for
            a class that occurs in neither).
        """
        ious: dict[int, list[float]] = defaultdict(list)
        errors: Counter[int] = Counter()
        for image in self._images.values():
            for class_id, iou in image.matches:
                ious[class_id].append(iou)
            errors.update(image.errors)
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
    masks, class_ids = _to_numpy(mask_labels).astype(bool), _to_numpy(class_labels)
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
class _ImageScore:
    """What is kept of an image: (class, IoU) of its matches, and the class of each false positive and negative."""

    matches: tuple[tuple[int, float], ...]
    errors: tuple[int, ...]


@dataclass(frozen=True)
class _SegmentMap:
    """A map of ids (H, W) with the segments it shows, and words for error messages."""

    ids: NDArray[np.integer]
    segments: dict[int, Mapping[str, Any]]
    name: str

    @classmethod
    def read(cls, ids: ArrayLike | torch.Tensor, segments: Sequence[Mapping[str, Any]], name: str) -> "_SegmentMap":
        array = _to_numpy(ids)
        if array.ndim != 2 or array.dtype.kind not in "iu":  # noqa: PLR2004
            raise ValueError(f"The {name} must be an integer map (H, W), got {array.dtype} {array.shape}.")
        by_id = {int(info["id"]): info for info in segments}
        if len(by_id) < len(segments):
            raise ValueError(f"The {name} lists a segment id twice. Give each segment its own id.")
        if min(by_id, default=1) <= VOID or array.min(initial=VOID) < VOID:
            raise ValueError(
                f"The {name} uses ids below 1. 0 is void; add 1 to maps that start at 0 and have -1 where nothing is."
            )
        return cls(array, by_id, name)

    def class_of(self, segment_id: int) -> int:
        info = self.segments[segment_id]
        return int(info["label_id"] if "label_id" in info else info["category_id"])

    def is_crowd(self, segment_id: int) -> bool:
        return bool(self.segments[segment_id].get("iscrowd", 0))

    def require_classes(self, class_ids: frozenset[int]) -> None:
        for segment_id in self.segments:
            if self.class_of(segment_id) not in class_ids:
                raise ValueError(
                    f"Segment {segment_id} in the {self.name} has class {self.class_of(segment_id)}, which is neither "
                    "in thing_ids nor in stuff_ids."
                )


def count_overlaps(predicted_map: NDArray[np.integer], target_map: NDArray[np.integer]) -> dict[tuple[int, int], int]:
    """Count the pixels of every (predicted id, true id) pair that occurs, both maps (H, W).

    Segments are long runs of equal pixels, so the runs are sorted and not the pixels: some thousand instead of some
    hundred thousand. Ids are replaced by their ranks before they are combined, so that no id is too large.
    """
    predicted, target = predicted_map.ravel(), target_map.ravel()
    if predicted.size == 0:
        return {}
    changes = (predicted[1:] != predicted[:-1]) | (target[1:] != target[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=predicted.size)
    predicted_ids, predicted_rank = np.unique(predicted[starts], return_inverse=True)
    target_ids, target_rank = np.unique(target[starts], return_inverse=True)
    pairs, pair_of_run = np.unique(predicted_rank * len(target_ids) + target_rank, return_inverse=True)
    counts = np.bincount(pair_of_run, weights=lengths).astype(np.int64)  # exact: float64 holds integers up to 2**53
    predicted_rank, target_rank = np.divmod(pairs, len(target_ids))
    keys = zip(predicted_ids[predicted_rank].tolist(), target_ids[target_rank].tolist(), strict=True)
    return dict(zip(keys, counts.tolist(), strict=True))


def _score_image(predicted: _SegmentMap, target: _SegmentMap) -> _ImageScore:
    overlaps = count_overlaps(predicted.ids, target.ids)
    predicted_areas: Counter[int] = Counter()
    target_areas: Counter[int] = Counter()
    for (predicted_id, target_id), pixels in overlaps.items():
        predicted_areas[predicted_id] += pixels
        target_areas[target_id] += pixels
    _require_same_segments(predicted, predicted_areas)
    # The official tool takes the area of the ground truth's JSON file.
    target_areas.update(
        {key: info["area"] - target_areas[key] for key, info in target.segments.items() if "area" in info}
    )

    matches = {}
    for (predicted_id, target_id), pixels in overlaps.items():
        if _can_match(predicted, predicted_id, target, target_id):
            if target_areas[target_id] < pixels:
                raise ValueError(
                    f"Segment {target_id} in the {target.name} has area {target_areas[target_id]}, but more pixels in "
                    "the map. Leave out `area` if the map was resized."
                )
            over_void = overlaps.get((predicted_id, VOID), 0)
            union = predicted_areas[predicted_id] + target_areas[target_id] - pixels - over_void
            if 2 * pixels > union:
                matches[predicted_id, target_id] = (target.class_of(target_id), pixels / union)

    matched_predictions = {predicted_id for predicted_id, _ in matches}
    matched_targets = {target_id for _, target_id in matches}
    missed = [key for key in target.segments if key not in matched_targets and not target.is_crowd(key)]
    false_positives = [
        key
        for key in predicted.segments
        if key not in matched_predictions
        and 2 * _ignored_pixels(predicted, key, target, overlaps) <= predicted_areas[key]
    ]
    errors = [*map(target.class_of, missed), *map(predicted.class_of, false_positives)]
    return _ImageScore(matches=tuple(matches.values()), errors=tuple(errors))


def _can_match(predicted: _SegmentMap, predicted_id: int, target: _SegmentMap, target_id: int) -> bool:
    return (
        predicted_id in predicted.segments
        and target_id in target.segments
        and not target.is_crowd(target_id)
        and predicted.class_of(predicted_id) == target.class_of(target_id)
    )


def _ignored_pixels(
    predicted: _SegmentMap, predicted_id: int, target: _SegmentMap, overlaps: Mapping[tuple[int, int], int]
) -> int:
    """Count a predicted segment's pixels on void and on the crowd segment of its class."""
    class_id = predicted.class_of(predicted_id)
    crowds = [key for key in target.segments if target.is_crowd(key) and target.class_of(key) == class_id]
    # A class has one crowd segment in COCO. Of several the official tool sees the last one only.
    return sum(overlaps.get((predicted_id, key), 0) for key in (VOID, *crowds[-1:]))


def _require_same_segments(predicted: _SegmentMap, areas: Mapping[int, int]) -> None:
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


def _to_numpy(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
