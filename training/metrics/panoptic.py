"""Panoptic quality as a module of `evaluate`: `evaluate.load("training/metrics/panoptic.py", thing_ids=..., stuff_ids=...)`."""

from collections.abc import Mapping
from typing import Any

import datasets  # noqa: F401 - `evaluate` looks here for what must be installed
import evaluate  # noqa: F401

from training.metrics.image_scores import ImageScores
from training.metrics.panoptic_quality import PanopticQuality
from training.metrics.streaming import StreamingMetric, image_id_of, require_entries
from training.targets import panoptic_target


class PanopticMetric(StreamingMetric):
    """PQ, SQ and RQ of all classes, things, stuff, and each class; equal to panopticapi."""

    DESCRIPTION = "Panoptic quality (Kirillov et al., CVPR 2019), equal to panopticapi; crowd and void as there."
    INPUTS = """
Args of `evaluate.load`:
    thing_ids, stuff_ids: the classes.

Args:
    predictions: for each image a result of `post_process_panoptic_segmentation`: `segmentation`, (H, W) at the size of the ground
        truth, 0 is void, and `segments_info`.
    references: for each image `image_id`, and `segmentation` with `segments_info` (`id`, `category_id` or `label_id`, perhaps
        `iscrowd` and `area`), or a row: `mask_labels` (n, H, W) with `class_labels` (n,).

Returns:
    `All`, `Things`, `Stuff`, each with `pq`, `sq`, `rq`, `n`; `per_class`. Fractions.
"""
    NEEDED = ("thing_ids", "stuff_ids")

    def _make_scores(self) -> PanopticQuality:
        return PanopticQuality(**self.options)

    def _score(self, scores: ImageScores, prediction: Any, reference: Mapping[str, Any]) -> None:  # noqa: ANN401
        image_id = image_id_of(reference)
        require_entries(prediction, MAP, f"prediction of image {image_id!r}")
        if "mask_labels" in reference:
            target_map, segments = panoptic_target(reference)
        else:
            require_entries(reference, MAP, f"reference of image {image_id!r}, if it is no row,")
            target_map, segments = reference["segmentation"], reference["segments_info"]
        scores.add(image_id, prediction["segmentation"], prediction["segments_info"], target_map, segments)


MAP = ("segmentation", "segments_info")
