"""What a scoring run leaves behind: `results.json`, predictions in the official form, `report.html` and pictures."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mpformer_hf.visualization import draw_comparison
from training.data import SegmentationDataset, SegmentationRow
from training.error_analysis import ErrorSummary
from training.folders import write_text
from training.layer_plot import plot_layer_consistency
from training.metrics.consistency import LayerConsistencyScores
from training.metrics.image_scores import ImageId
from training.report import ClassScores, Headline, ImageExample, LayerScores, ReportContents, write_report
from training.score_records import ImageRecord
from training.task_scores import TaskScores

RESULTS_FILE = "results.json"
PREDICTIONS = "predictions"
GROUND_TRUTH = "ground_truth"
REPORT_FILE = "report.html"
LAYER_PLOT = "layer_consistency.png"
LAYER_PICTURE = "layers.png"
# All that may be in the folder of the results.
OUTPUT_NAMES = frozenset(
    [RESULTS_FILE, REPORT_FILE, LAYER_PLOT, LAYER_PICTURE, PREDICTIONS, GROUND_TRUTH]
    + [f"{name}.json" for name in (PREDICTIONS, GROUND_TRUTH)]
)
LAYER_ROWS = {"mIoU_L": "mIoU-L, all queries", "mIoU_L_matched": "mIoU-L, matched queries", "Util": "Util"}


class ScoreError(ValueError):
    """Something that cannot be scored; the message is for the user as it is."""


@dataclass
class ScoredImages:
    """The records of all images, joined."""

    scores: TaskScores
    layers: LayerConsistencyScores = field(default_factory=LayerConsistencyScores)
    index_of: dict[ImageId, int] = field(default_factory=dict)
    sizes: dict[ImageId, tuple[int, int]] = field(default_factory=dict)
    predictions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    truths: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def collect(cls, scores: TaskScores, records: Iterable[ImageRecord]) -> "ScoredImages":
        """Join records; `scores` is empty."""
        scored = cls(scores)
        for record in records:
            scored.add(record)
        return scored

    def add(self, record: ImageRecord) -> None:
        """Take over the record of one image.

        Raises:
            ScoreError: another image has the same id.
        """
        if record.image_id in self.index_of:
            raise ScoreError(
                f"Images {self.index_of[record.image_id]} and {record.index} of the data set have the same id "
                f"{record.image_id!r}. Ids must be unique."
            )
        self.index_of[record.image_id] = record.index
        self.sizes[record.image_id] = (record.height, record.width)
        self.scores.scores.load([record.scores])
        self.scores.analysis.load([record.analysis])
        if record.layers is not None:
            self.layers.load([record.layers])
        self.predictions[record.index] = record.predictions
        self.truths[record.index] = record.truths

    def write_official_files(self, folder: Path, with_truth: bool) -> None:
        """Write the JSON files of the predictions and, if wanted, of the ground truth; the PNG files are there."""
        scores = self.scores
        predictions = scores.prediction_file(in_order(self.predictions))
        if predictions is not None:
            write_text(folder / f"{PREDICTIONS}.json", json.dumps(predictions))
        if with_truth:
            images = [
                {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
                for image_id, (height, width) in sorted(self.sizes.items(), key=lambda entry: self.index_of[entry[0]])
            ]
            truth = scores.truth_file(in_order(self.truths), images)
            if truth is not None:
                write_text(folder / f"{GROUND_TRUTH}.json", json.dumps(truth))


def in_order(entries: Mapping[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the entries of all images in the order of the data set."""
    return [entry for _, entries_of_image in sorted(entries.items()) for entry in entries_of_image]


@dataclass(frozen=True)
class ReportMaker:
    """Makes `report.html` of the results.

    Attributes:
        folder: of the results.
        dataset: whose images are shown.
        predict: predicts one image again, for the pictures.
        threshold: score from which on predictions are shown.
        num_examples: best, and worst, images.
    """

    folder: Path
    dataset: SegmentationDataset
    predict: Callable[[SegmentationRow], Mapping[str, Any]]
    threshold: float
    num_examples: int

    def write(
        self,
        results: Mapping[str, Any],
        scored: ScoredImages,
        scores: Mapping[str, Any],
        errors: ErrorSummary,
        layers: LayerScores | None,
        notes: Sequence[str],
    ) -> None:
        """Write the page."""
        task = scored.scores
        names = self.dataset.id2label
        worst, best = (
            tuple(self._example(image_id, scored) for image_id in choose(self.num_examples, threshold=self.threshold))
            for choose in (task.analysis.worst, task.analysis.best)
        )
        write_report(
            self.folder / REPORT_FILE,
            ReportContents(
                **{
                    name: results[name]
                    for name in ("model", "dataset", "split", "task", "num_images", "date", "command")
                },
                versions=results["settings"]["versions"],
                headlines=tuple(Headline(name, value, meaning) for name, value, meaning in task.headlines(scores)),
                columns=task.columns,
                classes=tuple(
                    ClassScores(
                        key,
                        names[key],
                        "thing" if key in self.dataset.thing_ids else "stuff",
                        task.class_values(scores, key),
                    )
                    for key in sorted(names)
                ),
                errors=errors,
                worst=worst,
                best=best,
                layers=layers,
                notes=tuple(notes),
            ),
        )

    def _example(self, image_id: ImageId, scored: ScoredImages) -> ImageExample:
        row = self.dataset[scored.index_of[image_id]]
        shown = scored.scores.displayed(self.predict(row), self.threshold)
        picture = draw_comparison([row["image"]], {"ground truth": [row], "prediction": [shown]}, self.dataset.id2label)
        summary = scored.scores.analysis.summarise(image_id, threshold=self.threshold)
        return ImageExample(image_id, picture, quality=summary.quality, counts=summary.counts)


def draw_layer_scores(
    folder: Path, model: str, consistency: Mapping[str, Any], draw_query: Callable[[], Image.Image]
) -> LayerScores | None:
    """Plot layer consistency and draw one query, into the folder and for the report; `None` if no image was scored."""
    if not consistency["levels"]:
        return None
    plot_layer_consistency({model: consistency}, folder / LAYER_PLOT)
    picture = draw_query()
    picture.save(folder / LAYER_PICTURE)
    return LayerScores(
        plot=Image.open(folder / LAYER_PLOT).convert("RGB"),
        columns=tuple(f"level {level}" for level in range(consistency["levels"] - 1)),
        rows=tuple(
            (words, tuple(consistency[key] or [None] * (consistency["levels"] - 1)))
            for key, words in LAYER_ROWS.items()
        ),
        query_picture=picture,
        explanation="mIoU-L: IoU of a query's masks at a level and at the next one. Util: share of the queries matched at the last level "
        "that are matched to the same segment at this level.",
    )
