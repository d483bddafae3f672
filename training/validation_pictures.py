"""Pictures of the same validation images at each evaluation: image, ground truth and prediction side by side.

    pictures = ValidationPictures(dataset, task, folder, num_images, accelerator)
    evaluate_model(..., look=pictures.look)          every process shows what it scores
    path = pictures.save(step)                       folder/step-00001000.png

Which images they are depends on their ids alone, and neither on the order in which they are scored nor on the number of
processes. Crowd regions are drawn as ground truth, under their own name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from mpformer_hf.visualization import DrawnSegment, draw_comparison, read_segments
from training.data import SegmentationDataset, SegmentationRow, Task
from training.metrics.image_scores import to_numpy
from training.metrics.semantic_quality import NOTHING
from training.optional_work import optional_work
from training.targets import semantic_target

PANEL_SIZE = 320
# Instances of all scores are scored; people want to see those that the model is sure of.
SCORE_THRESHOLD = 0.5
IMAGES_IN_A_ROW = 2
LONG_GRID = 4  # above so many images they come in two columns


@dataclass(frozen=True)
class Shown:
    """An image that is drawn, no larger than its panel."""

    image: Image.Image
    truth: list[DrawnSegment]
    prediction: list[DrawnSegment]


class ValidationPictures:
    """Collects the images with the lowest ids while they are scored, and draws them. All processes have one."""

    def __init__(
        self, dataset: SegmentationDataset, task: Task, folder: Path, num_images: int, accelerator: Accelerator
    ) -> None:
        """Describe the pictures.

        Args:
            dataset: the validation split.
            task: of its results.
            folder: of the pictures; is made if it is not there.
            num_images: 0 draws nothing.
            accelerator: of this run.
        """
        self.dataset = dataset
        self.task = task
        self.folder = folder
        self.num_images = num_images
        self.accelerator = accelerator
        self._shown: dict[int | str, Shown] = {}

    def look(self, row: SegmentationRow, result: Mapping[str, Any]) -> None:
        """Take an image, if it is one of those that are drawn, as far as is known by now."""
        image_id = row["image_id"]
        kept = sorted({*self._shown, image_id}, key=order_of)[: self.num_images]
        if image_id in kept:
            self._shown[image_id] = show(row, result, self.task, self.dataset.id2label)
            self._shown = {key: self._shown[key] for key in kept}

    def save(self, step: int) -> Path | None:
        """Draw what was collected, and begin anew; all processes call it.

        Returns:
            The picture, on the first process; `None` on others, without images, and where it cannot be drawn, which is said.
        """
        parts = gather_object([self._shown])
        self._shown = {}
        if not self.accelerator.is_main_process:
            return None
        found = {image_id: shown for part in parts for image_id, shown in part.items()}
        if not found or not self.num_images:
            return None
        kept = sorted(found, key=order_of)[: self.num_images]
        path = self.folder / f"step-{step:08d}.png"
        with optional_work(f"{path} cannot be drawn"):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.unfinished")
            draw_grid([found[image_id] for image_id in kept]).save(unfinished, format="PNG")
            unfinished.replace(path)
            return path
        return None


def draw_rows(
    rows: Sequence[SegmentationRow], results: Sequence[Any], task: Task, id2label: Mapping[int, str]
) -> Image.Image:
    """Draw images with their ground truth and a prediction, one row an image.

    Args:
        rows: of a data set.
        results: for each row, in any form that `segments_of_result` takes.
        task: of the results.
        id2label: names of the classes.
    """
    shown = [show(row, result, task, id2label) for row, result in zip(rows, results, strict=True)]
    return draw_column(shown)


def draw_grid(shown: Sequence[Shown]) -> Image.Image:
    """Draw images one below the other; many of them in two columns."""
    if len(shown) <= LONG_GRID:
        return draw_column(shown)
    height = math.ceil(len(shown) / IMAGES_IN_A_ROW)
    columns = [draw_column(shown[start : start + height]) for start in range(0, len(shown), height)]
    size = (sum(column.width for column in columns), max(column.height for column in columns))
    grid = Image.new("RGB", size, "white")
    left = 0
    for column in columns:
        grid.paste(column, (left, 0))
        left += column.width
    return grid


def draw_column(shown: Sequence[Shown]) -> Image.Image:
    """Draw images one below the other: image, ground truth, prediction."""
    columns = {"ground truth": [one.truth for one in shown], "prediction": [one.prediction for one in shown]}
    return draw_comparison([one.image for one in shown], columns, panel_size=PANEL_SIZE)


def show(row: SegmentationRow, result: Any, task: Task, id2label: Mapping[int, str]) -> Shown:  # noqa: ANN401
    """Reduce an image, its ground truth and its prediction to what a picture needs."""
    image = row["image"].convert("RGB")
    truth, prediction = segments_of_row(row, task, id2label), segments_of_result(result, id2label)
    factor = PANEL_SIZE / max(image.size)
    if factor >= 1:
        return Shown(image, truth, prediction)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    small = image.resize(size, Image.Resampling.BILINEAR)
    return Shown(small, shrink(truth, small), shrink(prediction, small))


def shrink(segments: Sequence[DrawnSegment], image: Image.Image) -> list[DrawnSegment]:
    """Bring masks to the size of a smaller image: the nearest pixel counts."""

    def reduce(mask: Tensor) -> Tensor:
        rows = torch.arange(image.height) * mask.shape[0] // image.height
        columns = torch.arange(image.width) * mask.shape[1] // image.width
        return mask[rows[:, None], columns]

    return [DrawnSegment(reduce(one.mask), one.class_id, one.label, one.score) for one in segments]


def segments_of_row(row: SegmentationRow, task: Task, id2label: Mapping[int, str]) -> list[DrawnSegment]:
    """List what is true of an image, in the form of the task: for semantic segmentation one mask a class."""
    if task == "semantic":
        return read_segments(semantic_target(row, NOTHING), id2label)
    segments = read_segments({"mask_labels": row["mask_labels"], "class_labels": row["class_labels"]}, id2label)
    if "crowd_masks" in row:
        crowd = {"mask_labels": row["crowd_masks"], "class_labels": row["crowd_labels"]}
        segments += [
            DrawnSegment(one.mask, one.class_id, f"{one.label} (crowd)") for one in read_segments(crowd, id2label)
        ]
    return segments


def segments_of_result(result: Any, id2label: Mapping[int, str]) -> list[DrawnSegment]:  # noqa: ANN401
    """List what a model predicts of an image.

    Args:
        result: instances as `masks`, `scores`, `labels`, of which the sure ones are listed; panoptic segments as `segmentation` and
            `segments_info`; a semantic map as `segmentation`, or as a map; a result of the image-segmentation pipeline.
        id2label: names of the classes; a map's pixels of other classes are left out.
    """
    if isinstance(result, Mapping) and "masks" in result:
        sure = to_numpy(result["scores"]) >= SCORE_THRESHOLD
        result = {name: to_numpy(result[name])[sure] for name in ("masks", "scores", "labels")}
    elif isinstance(result, Mapping) and "segments_info" not in result:
        result = result["segmentation"]
    return read_segments(result, id2label)


def order_of(image_id: int | str) -> tuple[bool, int | str]:
    """Sort key of ids, of which some may be numbers and others names."""
    return isinstance(image_id, str), image_id
