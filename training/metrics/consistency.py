"""Layer consistency of a model over a data set: how far its decoder layers agree (MP-Former, section 3).

The quantities and their definitions, which are ours, are those of `mpformer_hf/layer_consistency.py`; here they are
averaged over images, each image counting the same.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from mpformer_hf.layer_consistency import LayerConsistency
from mpformer_hf.mask_matching import CostWeights
from training.metrics.image_scores import ImageId, ImageScores

MASKFORMER_CLASS_COST = 1.0  # transformers' MaskFormer has no field for it and matches with this


class ConsistencyScore(TypedDict):
    """What is kept of an image: a number for each level but the last; `None` where no query is matched at the last."""

    mean_iou: list[float]
    matched_mean_iou: list[float] | None
    utilisation: list[float] | None


class LayerConsistencyScores(ImageScores[ConsistencyScore]):
    """Collects images one by one and computes mIoU-L and Util of every level.

    >>> import numpy as np
    >>> scores = LayerConsistencyScores()
    >>> scores.add(7, LayerConsistency(query_iou=np.array([[0.5, 1.0]]), matches=np.array([[-1, 0], [0, -1]])))
    >>> scores.compute()
    {'levels': 2, 'mIoU_L': [0.75], 'mIoU_L_matched': [0.5], 'Util': [0.0], 'num_images': 1, 'num_images_matched': 1}
    """

    def add(self, image_id: ImageId, consistency: LayerConsistency) -> None:
        """Score one image.

        Args:
            image_id: names the image; each image is added once.
            consistency: result of `image_layer_consistency`.
        """
        self.refuse_known(image_id)
        known = next(iter(self._scores.items()), None)
        if known is not None and len(known[1]["mean_iou"]) != len(consistency.query_iou):
            raise ValueError(
                f"Image {image_id!r} has {len(consistency.query_iou) + 1} levels, image {known[0]!r} has "
                f"{len(known[1]['mean_iou']) + 1}. Collect the images of one model."
            )
        score = ConsistencyScore(
            mean_iou=consistency.mean_iou,
            matched_mean_iou=consistency.matched_mean_iou,
            utilisation=consistency.utilisation,
        )
        self.keep(image_id, score)

    def compute(self) -> dict[str, Any]:
        """Average over everything added so far.

        Returns:
            `levels`, V, and three lists of V - 1 numbers in [0, 1], for the levels 0 to V - 2: `mIoU_L` (IoU with the
            masks of the next level, all queries), `mIoU_L_matched` (queries matched at the last level alone) and `Util`
            (at the last level it is 1 by definition). `num_images` is how many images `mIoU_L` averages,
            `num_images_matched` how many the other two do: those with a query matched at the last level, that is, with
            a segment. A list without any image to average is `None`; without any image at all so is `levels`.
        """
        scores = [score for _, score in self.in_order()]
        lengths = {len(score["mean_iou"]) for score in scores}
        if len(lengths) > 1:
            raise ValueError(
                f"The images have {', '.join(str(length + 1) for length in sorted(lengths))} levels. Collect the "
                "images of one model."
            )
        matched = [score["matched_mean_iou"] for score in scores if score["matched_mean_iou"] is not None]
        utilisation = [score["utilisation"] for score in scores if score["utilisation"] is not None]
        return {
            "levels": lengths.pop() + 1 if lengths else None,
            "mIoU_L": _mean_of_levels([score["mean_iou"] for score in scores]),
            "mIoU_L_matched": _mean_of_levels(matched),
            "Util": _mean_of_levels(utilisation),
            "num_images": len(scores),
            "num_images_matched": len(matched),
        }


def matching_weights(config: Any) -> CostWeights:  # noqa: ANN401 - config of any model
    """Read the weights of the matching costs from a model's config, ours or one of transformers."""
    return CostWeights(
        label=getattr(config, "class_weight", MASKFORMER_CLASS_COST), mask=config.mask_weight, dice=config.dice_weight
    )


def format_consistency(scores: dict[str, Any]) -> str:
    """Write the result of `compute` as a table, in percent; a row for each level but the last."""
    columns = {"mIoU-L": "mIoU_L", "mIoU-L matched": "mIoU_L_matched", "Util": "Util"}
    lines = ["level" + "".join(f"{title:>16}" for title in columns)]
    for level in range((scores["levels"] or 1) - 1):
        numbers = (scores[key] for key in columns.values())
        lines.append(
            f"{level:5d}" + "".join(f"{'-' if row is None else f'{100 * row[level]:.1f}':>16}" for row in numbers)
        )
    return "\n".join(lines)


def _mean_of_levels(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """Mean over images (rows) of each level (column), summed exactly; `None` without images."""
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
