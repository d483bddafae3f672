"""Layer consistency as a module of `evaluate`: `evaluate.load("training/metrics/layer_consistency.py", weights=...)`."""

from collections.abc import Mapping
from typing import Any

import datasets  # noqa: F401 - `evaluate` looks here for what must be installed
import evaluate  # noqa: F401

from mpformer_hf.layer_consistency import image_layer_consistency
from mpformer_hf.mask_matching import CostWeights
from training.metrics.consistency import LayerConsistencyScores
from training.metrics.image_scores import ImageScores
from training.metrics.streaming import StreamingMetric, image_id_of, require_entries


class LayerConsistencyMetric(StreamingMetric):
    """mIoU-L and Util of MP-Former, in definitions of ours: see `mpformer_hf/layer_consistency.py`."""

    DESCRIPTION = (
        "How predictions change from decoder layer to decoder layer (MP-Former, section 3), in definitions of ours."
    )
    INPUTS = """
Args of `evaluate.load`:
    weights: of the costs of classes, masks and dice in matching, such as (2.0, 5.0, 5.0).

Args:
    predictions: for each image `class_logits` and `mask_logits`: for each level (Q, K + 1) and (Q, h, w), as
        `level_logits(outputs).of_image(number)` gives them; perhaps `valid_size`, height and width without padding.
    references: for each image `image_id`, `mask_labels` (n, H, W), and `class_labels` (n,) in the classes of the model.

Returns:
    `levels`; `mIoU_L`, `mIoU_L_matched` and `Util`, one number for each level but the last; `num_images`, `num_images_matched`.
"""
    NEEDED = ("weights",)

    def _make_scores(self) -> LayerConsistencyScores:
        return LayerConsistencyScores()

    def _score(self, scores: ImageScores, prediction: Any, reference: Mapping[str, Any]) -> None:  # noqa: ANN401
        image_id = image_id_of(reference)
        require_entries(prediction, ("class_logits", "mask_logits"), f"prediction of image {image_id!r}")
        require_entries(reference, ("mask_labels", "class_labels"), f"reference of image {image_id!r}")
        try:
            consistency = image_layer_consistency(
                prediction["class_logits"],
                prediction["mask_logits"],
                reference["mask_labels"],
                reference["class_labels"],
                prediction.get("valid_size"),
                weights=CostWeights(*self.options["weights"]),
            )
        except ValueError as error:
            raise ValueError(f"Image {image_id!r} cannot be scored: {error}") from error
        scores.add(image_id, consistency)
