"""Scores of semantic maps as a module of `evaluate`: `evaluate.load("training/metrics/semantic.py", class_ids=...)`."""

from collections.abc import Mapping
from typing import Any

import datasets  # noqa: F401 - `evaluate` looks here for what must be installed
import evaluate  # noqa: F401

from training.metrics.image_scores import ImageScores
from training.metrics.semantic_quality import IGNORED, SemanticQuality
from training.metrics.streaming import StreamingMetric, image_id_of, require_entries
from training.targets import semantic_target


class SemanticMetric(StreamingMetric):
    """mIoU, fwIoU, accuracies, PQ^St and boundary IoU of semantic maps."""

    DESCRIPTION = "IoU and accuracy of semantic maps, by class and on average; PQ^St of MaskFormer; boundary IoU."
    INPUTS = """
Args of `evaluate.load`:
    class_ids: the classes; `boundary`, `dilation_ratio`, `ignore_index`: see `SemanticQuality`.

Args:
    predictions: for each image a result of `post_process_semantic_segmentation`, (H, W) at the size of the ground truth.
    references: for each image `image_id`, and `segmentation`, (H, W), or a row: `mask_labels` (n, H, W) with `class_labels` (n,).

Returns:
    `mIoU`, `per_class_IoU`, `pixel_accuracy`, `mean_accuracy`, `per_class_accuracy`, `fwIoU`, `PQ_St`; with `boundary` also
    `boundary_mIoU` and `per_class_boundary_IoU`. Fractions.
"""
    NEEDED = ("class_ids",)
    OPTIONAL = ("boundary", "dilation_ratio", "ignore_index")

    def _make_scores(self) -> SemanticQuality:
        return SemanticQuality(**self.options)

    def _score(self, scores: ImageScores, prediction: Any, reference: Mapping[str, Any]) -> None:  # noqa: ANN401
        image_id = image_id_of(reference)
        if "mask_labels" in reference:
            target = semantic_target(reference, self.options.get("ignore_index", IGNORED))
        else:
            require_entries(reference, ("segmentation",), f"reference of image {image_id!r}, if it is no row,")
            target = reference["segmentation"]
        scores.add(image_id, prediction, target)
