"""Layer consistency of a model on the rows of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mpformer_hf.layer_consistency import LayerConsistency, LevelLogits, image_layer_consistency, level_logits
from training.data import SegmentationRow
from training.layer_plot import draw_query
from training.metrics.consistency import LayerConsistencyScores, matching_weights
from training.predictor import NO_CLASS, LabelMap, Predictor, PredictorError


@dataclass(frozen=True)
class LayerScoring:
    """Compares the levels of a model, image by image."""

    predictor: Predictor
    labels: LabelMap

    @property
    def inputs(self) -> dict[str, bool]:
        """Arguments with which the model returns all levels."""
        return {"output_auxiliary_logits": True, **({"output_hidden_states": True} if self._is_maskformer else {})}

    def __post_init__(self) -> None:
        """Make MaskFormer predict at all levels, which it does for training alone unless it is told to."""
        if self._is_maskformer:
            self.predictor.model.config.use_auxiliary_loss = True

    @property
    def _is_maskformer(self) -> bool:
        return self.predictor.model.config.model_type == "maskformer"

    def score(self, outputs: Any, rows: Sequence[SegmentationRow]) -> list[str]:  # noqa: ANN401 - of any model
        """Score some images; a line of `LayerConsistencyScores.dump` for each."""
        levels = self._read_levels(outputs)
        lines = []
        for number, row in enumerate(rows):
            scores = LayerConsistencyScores()
            scores.add(row["image_id"], self._compare(levels, number, row, outputs.image_sizes[number])[0])
            lines += scores.dump()
        return lines

    def draw(self, row: SegmentationRow, title: str) -> Image.Image:
        """Draw the query of an image whose masks change most from level to level, of those that are matched."""
        outputs = self.predictor.run([row["image"]], **self.inputs)
        levels, valid_size = self._read_levels(outputs), outputs.image_sizes[0]
        consistency, masks = self._compare(levels, 0, row, valid_size)
        return draw_query(row["image"], levels.of_image(0)[1], consistency, masks, valid_size, title=title)

    def _read_levels(self, outputs: Any) -> LevelLogits:  # noqa: ANN401 - of any model
        """Collect the predictions of all levels.

        Raises:
            PredictorError: the model has one level only.
        """
        try:
            return level_logits(outputs)
        except ValueError as error:
            kind = self.predictor.model.config.model_type
            raise PredictorError(f"--layer-consistency cannot be measured for this {kind} model: {error}") from error

    def _compare(
        self,
        levels: LevelLogits,
        number: int,
        row: SegmentationRow,
        valid_size: Any,  # noqa: ANN401
    ) -> tuple[LayerConsistency, np.ndarray]:
        """Compare the levels of one image; also returns the masks of the segments whose class the model has."""
        model_class = {
            class_id: key for key, class_id in enumerate(self.labels.classes.tolist()) if class_id != NO_CLASS
        }
        known = np.array([class_id in model_class for class_id in row["class_labels"].tolist()], dtype=bool)
        masks = row["mask_labels"][known]
        classes = np.array([model_class[class_id] for class_id in row["class_labels"][known].tolist()], dtype=np.int64)
        weights = matching_weights(self.predictor.model.config)
        return image_layer_consistency(*levels.of_image(number), masks, classes, valid_size, weights=weights), masks
