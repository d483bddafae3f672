"""COCO mask AP and AR as a module of `evaluate`: `evaluate.load("training/metrics/instance.py", class_ids=...)`."""

from collections.abc import Mapping
from typing import Any

import datasets  # noqa: F401 - `evaluate` looks here for what must be installed
import evaluate  # noqa: F401

from training.metrics.average_precision import AveragePrecision, segments_from_masks
from training.metrics.image_scores import ImageScores
from training.metrics.streaming import StreamingMetric, image_id_of, require_entries
from training.targets import instance_targets, size_of


class InstanceMetric(StreamingMetric):
    """COCO's twelve numbers, of all classes and of each; boundary AP as an option; equal to pycocotools."""

    DESCRIPTION = "COCO mask AP and AR, equal to pycocotools; boundary AP (Cheng et al., CVPR 2021)."
    INPUTS = """
Args of `evaluate.load`:
    class_ids: the classes; `boundary`, `dilation_ratio`: see `AveragePrecision`.

Args:
    predictions: for each image a result of `post_process_instance_segmentation(..., preset="evaluation")` at the size of the ground
        truth (`masks`, `labels`, `scores`), or a list of COCO results (`category_id`, `score`, `segmentation` as run lengths).
    references: for each image `image_id`, and a row: `mask_labels` (n, H, W) with `class_labels` (n,), or `annotations` (COCO's,
        with polygons or run lengths, perhaps `iscrowd` and `area`) with `height` and `width`.

Returns:
    `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100`, `ARs`, `ARm`, `ARl`, and `per_class`. Fractions; -1.0 is undefined.
"""
    NEEDED = ("class_ids",)
    OPTIONAL = ("boundary", "dilation_ratio")

    def _make_scores(self) -> AveragePrecision:
        return AveragePrecision(**self.options)

    def _score(self, scores: ImageScores, prediction: Any, reference: Mapping[str, Any]) -> None:  # noqa: ANN401
        image_id = image_id_of(reference)
        if isinstance(prediction, Mapping):
            require_entries(prediction, ("masks", "labels", "scores"), f"prediction of image {image_id!r}")
            prediction = segments_from_masks(prediction["masks"], prediction["labels"], prediction["scores"])
        if "mask_labels" in reference:
            truths, size = instance_targets(reference), size_of(reference)
        else:
            names = ("annotations", "height", "width")
            require_entries(reference, names, f"reference of image {image_id!r}, if it is no row,")
            truths, size = reference["annotations"], (reference["height"], reference["width"])
        scores.add(image_id, prediction, truths, size)
