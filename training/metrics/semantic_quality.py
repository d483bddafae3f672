"""Scores of semantic maps: IoU and accuracy by class, boundary IoU, and panoptic quality of stuff (PQ^St).

    IoU of a class = TP / (TP + FP + FN)       mIoU = its mean over the classes that the ground truth shows
    fwIoU          = sum of IoU * share of the class in the ground truth

over the pixels of all images that are not void in the ground truth. A pixel without prediction is a wrong one.

PQ^St (MaskFormer, section 4.2) takes all pixels of a class in an image for one segment and computes panoptic quality of these.

Boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021) looks at those pixels of a region alone that are near its contour. The
paper defines it for masks; here the two boundaries of a class are intersected and united over all images.

torchmetrics' `JaccardIndex` is not used: it knows no pixel without prediction, and its mean over classes takes in those
that are predicted but never true. `MeanIoU` there is a mean over images.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from training.metrics.boundaries import boundary_distance, boundary_region
from training.metrics.image_scores import ImageId, ImageScores, to_numpy
from training.metrics.panoptic_quality import VOID, PanopticQuality, Segments, count_overlaps

IGNORED = 255
MOST_EXAMPLES = 5  # in a message
# Stands for every predicted value that is no class, in the scores of an image.
NOTHING = -1


class SemanticScore(TypedDict):
    """What is kept of an image.

    `pixels`: [true class, predicted class, count] for every pair that occurs; `NOTHING` is a pixel without prediction, or a void one in the ground
    truth. `boundaries`: [class, pixels in both boundaries, pixels in either].
    """

    pixels: list[tuple[int, int, int]]
    boundaries: list[tuple[int, int, int]]


class SemanticQuality(ImageScores[SemanticScore]):
    """Collects images one by one and computes mIoU, fwIoU, accuracies, PQ^St and, if wanted, boundary IoU.

    >>> quality = SemanticQuality(class_ids=[0, 1])
    >>> quality.add("a", predicted_map=[[0, 0, 1, 1]], target_map=[[0, 0, 0, 1]])
    >>> quality.compute()["per_class_IoU"]
    {0: 0.6666666666666666, 1: 0.5}
    """

    def __init__(
        self,
        class_ids: Iterable[int] | None,
        *,
        boundary: bool = False,
        dilation_ratio: float = 0.02,
        ignore_index: int = IGNORED,
    ) -> None:
        """Name the classes.

        Args:
            class_ids: all classes that ground truth and predictions may hold; `None` takes every value >= 0 for a class.
            boundary: compute boundary IoU too.
            dilation_ratio: width of a boundary, relative to the diagonal of the image; 0.02 is the paper's for COCO.
            ignore_index: void in the ground truth; in a prediction, a pixel without class.
        """
        super().__init__()
        self.class_ids = None if class_ids is None else tuple(class_ids)
        self.boundary = boundary
        self.dilation_ratio = dilation_ratio
        self.ignore_index = ignore_index
        known = self.class_ids or ()
        if len(set(known)) < len(known):
            raise ValueError("A class id is named twice. List each class once.")
        if min(known, default=0) < 0:
            raise ValueError(f"Class ids must not be negative, got {min(known)}.")
        boundary_distance((1, 1), dilation_ratio)  # raises if the ratio is none
        if ignore_index in known:
            raise ValueError(
                f"{ignore_index} is a class and ignore_index too. Choose another ignore_index, such as -1."
            )

    def settings(self) -> dict[str, Any]:
        """Name the classes and what is computed of them."""
        return {
            "class_ids": self.class_ids,
            "boundary": self.boundary,
            "dilation_ratio": self.dilation_ratio,
            "ignore_index": self.ignore_index,
        }

    def add(
        self, image_id: ImageId, predicted_map: ArrayLike | torch.Tensor, target_map: ArrayLike | torch.Tensor
    ) -> None:
        """Score one image.

        Args:
            image_id: names the image; each image is added once.
            predicted_map: integer, (H, W), class ids: a result of `post_process_semantic_segmentation`. `ignore_index` and -1 are pixels
                without prediction.
            target_map: integer, (H, W), class ids; `ignore_index` is void.

        Raises:
            ValueError: an image that was added before, maps of different sizes, a value that is no class.
        """
        self.refuse_known(image_id)
        predicted_name, target_name = f"prediction of image {image_id!r}", f"ground truth of image {image_id!r}"
        predicted, target = _read_map(predicted_map, predicted_name), _read_map(target_map, target_name)
        if predicted.shape != target.shape:
            raise ValueError(
                f"Image {image_id!r} is {target.shape} in the ground truth and {predicted.shape} in the prediction (height, "
                "width). Post-process with target_sizes set to the ground truth's size."
            )
        overlaps = count_overlaps(predicted, target)
        self._require_classes({value for value, _ in overlaps} - {self.ignore_index, NOTHING}, predicted_name)
        self._require_classes({value for _, value in overlaps} - {self.ignore_index}, target_name)
        pixels: Counter[tuple[int, int]] = Counter()
        for (predicted_class, target_class), count in overlaps.items():
            pixels[self._class_or_nothing(target_class), self._class_or_nothing(predicted_class)] += count
        boundaries = self._boundaries(predicted, target) if self.boundary else []
        self.keep(image_id, {"pixels": [(*pair, count) for pair, count in pixels.items()], "boundaries": boundaries})

    def compute(self) -> dict[str, Any]:
        """Compute the scores of everything added so far, as fractions.

        Returns:
            `mIoU`, `per_class_IoU`, `pixel_accuracy`, `mean_accuracy`, `per_class_accuracy`, `fwIoU` and `PQ_St` (`pq`, `sq`, `rq`, `n` as
            `PanopticQuality` has them), with `boundary` also `boundary_mIoU` and `per_class_boundary_IoU`. A class that the ground
            truth does not show has `None` and is in no mean; means over no class at all are 0.0.
        """
        counts: Counter[tuple[int, int]] = Counter()
        for _, image in self.in_order():
            for target_class, predicted_class, count in image["pixels"]:
                counts[target_class, predicted_class] += count
        true_pixels, predicted_pixels = _margins(counts)
        class_ids = self._classes()
        right = {key: counts[key, key] for key in class_ids}
        shown = {key: true_pixels[key] > 0 for key in class_ids}
        total = sum(true_pixels.values())
        ious = {
            key: right[key] / (true_pixels[key] + predicted_pixels[key] - right[key]) if shown[key] else None
            for key in class_ids
        }
        accuracies = {key: right[key] / true_pixels[key] if shown[key] else None for key in class_ids}
        scores = {
            "mIoU": mean_of_known(ious.values()),
            "per_class_IoU": ious,
            "pixel_accuracy": sum(right.values()) / total if total else 0.0,
            "mean_accuracy": mean_of_known(accuracies.values()),
            "per_class_accuracy": accuracies,
            "fwIoU": math.fsum(iou * true_pixels[key] for key, iou in ious.items() if iou is not None) / max(total, 1),
            "PQ_St": self.panoptic_quality().compute()["All"],
        }
        return {**scores, **self._boundary_scores(shown)} if self.boundary else scores

    def _classes(self) -> tuple[int, ...]:
        """Classes that were named, or, when none were, those that occur."""
        if self.class_ids is not None:
            return self.class_ids
        found = {
            key
            for _, image in self.in_order()
            for target, predicted, _ in image["pixels"]
            for key in (target, predicted)
        }
        return tuple(sorted(found - {NOTHING}))

    def panoptic_quality(self) -> PanopticQuality:
        """Collect the same images with all pixels of a class in an image as one segment of stuff (PQ^St)."""
        quality = PanopticQuality(thing_ids=(), stuff_ids=self._classes())
        for image_id, image in self.in_order():
            # Segments have the id class + 1; 0 is void, and so is what has no prediction.
            overlaps = {(predicted + 1, target + 1): count for target, predicted, count in image["pixels"]}
            quality.add_overlaps(
                image_id,
                overlaps,
                _one_segment_a_class((predicted for predicted, _ in overlaps), f"prediction of image {image_id!r}"),
                _one_segment_a_class((target for _, target in overlaps), f"ground truth of image {image_id!r}"),
            )
        return quality

    def _require_classes(self, values: set[int], name: str) -> None:
        """Refuse what is no class."""
        unknown = sorted(value for value in values if not self._is_class(value))
        if unknown:
            known = "at least 0" if self.class_ids is None else _few(sorted(self.class_ids))
            raise ValueError(
                f"The {name} holds {_few(unknown)}. Class ids are {known}. Map all values to classes, or to ignore_index "
                f"{self.ignore_index}."
            )

    def _is_class(self, value: int) -> bool:
        return value >= 0 if self.class_ids is None else value in self.class_ids

    def _class_or_nothing(self, value: int) -> int:
        return NOTHING if value == self.ignore_index else value

    def _boundaries(self, predicted: NDArray[np.integer], target: NDArray[np.integer]) -> list[tuple[int, int, int]]:
        distance = boundary_distance(target.shape, self.dilation_ratio)
        valid = target != self.ignore_index
        counts = []
        for class_id in np.union1d(predicted, target).tolist():
            if class_id not in (self.ignore_index, NOTHING):
                # Both regions end where void begins, so that what is predicted there changes nothing.
                true_boundary = boundary_region(target == class_id, distance)
                predicted_boundary = boundary_region((predicted == class_id) & valid, distance)
                both = int(np.count_nonzero(true_boundary & predicted_boundary))
                either = int(np.count_nonzero(true_boundary | predicted_boundary))
                counts.append((class_id, both, either))
        return counts

    def _boundary_scores(self, shown: dict[int, bool]) -> dict[str, Any]:
        both: Counter[int] = Counter()
        either: Counter[int] = Counter()
        for _, image in self.in_order():
            for class_id, in_both, in_either in image["boundaries"]:
                both[class_id] += in_both
                either[class_id] += in_either
        ious = {key: both[key] / either[key] if is_shown else None for key, is_shown in shown.items()}
        return {"boundary_mIoU": mean_of_known(ious.values()), "per_class_boundary_IoU": ious}


def mean_of_known(values: Iterable[float | None]) -> float:
    """Mean of the values that are not `None`; 0.0 of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / max(len(known), 1)


def semantic_map_from_masks(
    mask_labels: ArrayLike | torch.Tensor, class_labels: ArrayLike | torch.Tensor, ignore_index: int = IGNORED
) -> NDArray[np.int64]:
    """Write binary masks into one map of classes, the form in which semantic ground truth is compared.

    Args:
        mask_labels: bool, (n, H, W), True inside the segment. Masks of different classes must not share a pixel.
        class_labels: integer, (n,).
        ignore_index: value of the pixels that no mask covers.

    Returns:
        int64, (H, W).

    Raises:
        ValueError: masks of two classes overlap, or there is not one label for each mask.
    """
    masks, class_ids = to_numpy(mask_labels).astype(bool), to_numpy(class_labels)
    if masks.ndim != 3 or class_ids.shape != masks.shape[:1]:  # noqa: PLR2004
        raise ValueError(
            f"Expected masks (n, H, W) and one class label each, got masks {masks.shape} and labels {class_ids.shape}."
        )
    classes = np.full(masks.shape[1:], ignore_index, dtype=np.int64)
    for mask, class_id in zip(masks, class_ids.tolist(), strict=True):
        if np.any(mask & (classes != ignore_index) & (classes != class_id)):
            raise ValueError(
                f"A mask of class {class_id} overlaps a mask of another class. A semantic map has one class a pixel."
            )
        classes[mask] = class_id
    return classes


def _read_map(values: ArrayLike | torch.Tensor, name: str) -> NDArray[np.integer]:
    array = to_numpy(values)
    if array.ndim != 2 or array.dtype.kind not in "iu":  # noqa: PLR2004 - (H, W)
        raise ValueError(f"The {name} must be an integer map (H, W), got {array.dtype} {array.shape}.")
    return array


def _margins(counts: Counter[tuple[int, int]]) -> tuple[dict[int, int], dict[int, int]]:
    """Count the pixels of every true and of every predicted class, without those that are void in the ground truth."""
    true_pixels: dict[int, int] = defaultdict(int)
    predicted_pixels: dict[int, int] = defaultdict(int)
    for (target_class, predicted_class), count in counts.items():
        if target_class != NOTHING:
            true_pixels[target_class] += count
            predicted_pixels[predicted_class] += count
    return true_pixels, predicted_pixels


def _one_segment_a_class(ids: Iterable[int], name: str) -> Segments:
    return Segments({key: {"id": key, "label_id": key - 1} for key in set(ids) if key != VOID}, name)


def _few(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:MOST_EXAMPLES])) + (", ..." if len(values) > MOST_EXAMPLES else "")
