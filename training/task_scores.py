"""What each task measures of an image, and writes of it in the official form.

    task        scores              official form of a prediction
    instance    AveragePrecision    COCO results: one entry a segment
    panoptic    PanopticQuality     COCO panoptic: a PNG file and one entry an image
    semantic    SemanticQuality     a class-index PNG file

A `TaskScores` takes results in the classes of the data set (`LabelMap` makes them). Official files have `category_ids` of the data set.

Axes: n true segments, p predicted ones, H W image.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_masks

from training.data import SegmentationDataset, SegmentationRow, Task
from training.error_analysis import ErrorAnalysis
from training.metrics.average_precision import AveragePrecision, segments_from_masks
from training.metrics.image_scores import ImageId, ImageScores, to_numpy
from training.metrics.panoptic_quality import VOID, PanopticQuality, count_overlaps
from training.metrics.semantic_quality import NOTHING, SemanticQuality
from training.official_files import encode_segment_ids
from training.predictor import NO_CLASS
from training.targets import instance_targets, panoptic_target, semantic_target, size_of

Segments = Sequence[Mapping[str, Any]]


class TaskScores(ABC):
    """Scores and error analysis of one task over the images that were added; `entries` are for the official JSON file."""

    scores: ImageScores[Any]
    # Scores of the whole data set, the most important one first: (keys in the result of `compute`, name, meaning).
    headline_keys: Sequence[tuple[tuple[str, ...], str, str]]
    # Names of the scores of a class.
    columns: tuple[str, ...]

    def __init__(self, dataset: SegmentationDataset, *, boundary: bool = False) -> None:
        """Take the classes of a data set."""
        self.dataset = dataset
        self.boundary = boundary
        self.category_ids = category_ids_of(dataset)
        self.analysis = ErrorAnalysis(dataset.id2label)

    @abstractmethod
    def add(self, row: SegmentationRow, result: Mapping[str, Any]) -> None:
        """Score one image."""

    @abstractmethod
    def write(self, image_id: ImageId, result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Write a prediction: its PNG file, if the task has one, into `folder`; returns its entries in the JSON file."""

    @abstractmethod
    def write_truth(self, row: SegmentationRow, folder: Path) -> list[dict[str, Any]]:
        """Write the ground truth in the same form."""

    @abstractmethod
    def class_values(self, scores: Mapping[str, Any], class_id: int) -> tuple[float | None, ...]:
        """Look up the scores of a class, in the order of `columns`."""

    @abstractmethod
    def prediction_file(self, entries: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - JSON
        """Make the official JSON file of predictions, of the entries of all images; `None` if the form has none."""

    @abstractmethod
    def truth_file(self, entries: list[dict[str, Any]], images: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make the official JSON file of ground truth; `images` have `id`, `file_name`, `height`, `width`."""

    def categories(self) -> list[dict[str, Any]]:
        """List the classes in the official form."""
        things = set(self.dataset.thing_ids)
        return [
            {"id": self.category_ids[class_id], "name": name, "isthing": int(class_id in things)}
            for class_id, name in self.dataset.id2label.items()
        ]

    def headlines(self, scores: Mapping[str, Any]) -> list[tuple[str, float, str]]:
        """Look up the scores of the whole data set: name, fraction, meaning."""
        found = []
        for keys, name, meaning in self.headline_keys:
            value: Any = scores
            for key in keys:
                value = value[key]
            found.append((name, value, meaning))
        return found

    def table(self, scores: Mapping[str, Any]) -> str:
        """Write the scores of the whole data set in percent, one a line; undefined ones as a dash."""
        return "\n".join(
            f"{name:16}{'-' if value < 0 else f'{100 * value:.1f}':>6}   {meaning}"
            for name, value, meaning in self.headlines(scores)
        )

    @abstractmethod
    def displayed(self, result: Mapping[str, Any], threshold: float) -> Mapping[str, Any]:
        """Reduce a result to what a picture shows: without segments of lower scores."""


class InstanceScores(TaskScores):
    """COCO mask AP and AR."""

    headline_keys = (
        (("AP",), "AP", "mean over IoU 0.50 to 0.95"),
        (("AP50",), "AP50", "at IoU 0.50"),
        (("AP75",), "AP75", "at IoU 0.75"),
        (("APs",), "AP small", "up to 32 x 32 pixels"),
        (("APm",), "AP medium", "up to 96 x 96 pixels"),
        (("APl",), "AP large", "above 96 x 96 pixels"),
        (("AR100",), "AR100", "recall of 100 predictions an image"),
    )
    columns = ("AP", "AP50", "AP75", "AR100")

    def __init__(self, dataset: SegmentationDataset, *, boundary: bool = False) -> None:
        """Take the classes of a data set; `boundary` computes boundary AP."""
        super().__init__(dataset, boundary=boundary)
        self.scores = AveragePrecision(dataset.thing_ids, boundary=boundary)

    def add(self, row: SegmentationRow, result: Mapping[str, Any]) -> None:
        """Score one image."""
        predictions, truths = predicted_instances(result), instance_targets(row)
        self.scores.add(row["image_id"], predictions, truths, size_of(row))
        crowd = [segment["iscrowd"] for segment in truths]
        ious = coco_masks.iou(
            [segment["segmentation"] for segment in predictions], [segment["segmentation"] for segment in truths], crowd
        )
        self.analysis.add(
            row["image_id"],
            predicted_classes=[segment["label_id"] for segment in predictions],
            scores=[segment["score"] for segment in predictions],
            true_classes=[segment["label_id"] for segment in truths],
            ious=np.asarray(ious, dtype=np.float64).reshape(len(predictions), len(truths)),
            is_crowd=np.asarray(crowd, dtype=bool),
        )

    def write(self, image_id: ImageId, result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Write COCO results."""
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[segment["label_id"]],
                "segmentation": segment["segmentation"],
                "score": segment["score"],
            }
            for segment in predicted_instances(result)
        ]

    def write_truth(self, row: SegmentationRow, folder: Path) -> list[dict[str, Any]]:
        """Write COCO annotations, without `id`, which counts through the file."""
        return [
            {
                "image_id": row["image_id"],
                "category_id": self.category_ids[segment["label_id"]],
                "segmentation": segment["segmentation"],
                "iscrowd": segment["iscrowd"],
                "area": int(coco_masks.area(segment["segmentation"])),
                "bbox": coco_masks.toBbox(segment["segmentation"]).tolist(),
            }
            for segment in instance_targets(row)
        ]

    def prediction_file(self, entries: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make a list of COCO results."""
        return entries

    def truth_file(self, entries: list[dict[str, Any]], images: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make a COCO instances file."""
        annotations = [{"id": number, **entry} for number, entry in enumerate(entries, start=1)]
        return {"images": images, "annotations": annotations, "categories": self.categories()}

    def class_values(self, scores: Mapping[str, Any], class_id: int) -> tuple[float | None, ...]:
        """Look up the scores of a class; stuff has none."""
        if class_id not in scores["per_class"]:
            return (None,) * len(self.columns)
        return tuple(scores["per_class"][class_id][column] for column in self.columns)

    def displayed(self, result: Mapping[str, Any], threshold: float) -> Mapping[str, Any]:
        """Leave out instances of lower scores."""
        kept = result["scores"] >= threshold
        return {name: result[name][kept] for name in ("masks", "scores", "labels")}


class PanopticScores(TaskScores):
    """Panoptic quality."""

    headline_keys = (
        (("All", "pq"), "PQ", "panoptic quality"),
        (("Things", "pq"), "PQ things", "objects"),
        (("Stuff", "pq"), "PQ stuff", "regions"),
        (("All", "sq"), "SQ", "segmentation quality"),
        (("All", "rq"), "RQ", "recognition quality"),
    )
    columns = ("PQ", "SQ", "RQ")

    def __init__(self, dataset: SegmentationDataset, *, boundary: bool = False) -> None:
        """Take the classes of a data set."""
        super().__init__(dataset, boundary=boundary)
        self.scores = PanopticQuality(dataset.thing_ids, dataset.stuff_ids)

    def add(self, row: SegmentationRow, result: Mapping[str, Any]) -> None:
        """Score one image."""
        target_map, truths = panoptic_target(row)
        predicted_map, predictions = to_numpy(result["segmentation"]), result["segments_info"]
        self.scores.add(row["image_id"], predicted_map, predictions, target_map, truths)
        add_maps(
            self.analysis,
            row["image_id"],
            count_overlaps(predicted_map, target_map),
            {segment["id"]: segment["label_id"] for segment in predictions},
            {segment["id"]: segment["label_id"] for segment in truths},
            scores=[segment["score"] for segment in predictions],
            crowd={segment["id"] for segment in truths if segment["iscrowd"]},
        )

    def write(self, image_id: ImageId, result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Write the PNG file of segment ids."""
        return [self._write_map(image_id, to_numpy(result["segmentation"]), result["segments_info"], folder)]

    def write_truth(self, row: SegmentationRow, folder: Path) -> list[dict[str, Any]]:
        """Write the ground truth in the same form, with areas and crowds."""
        target_map, segments = panoptic_target(row)
        entry = self._write_map(row["image_id"], target_map, segments, folder)
        areas = dict(zip(*(values.tolist() for values in np.unique(target_map, return_counts=True)), strict=True))
        for info, segment in zip(entry["segments_info"], segments, strict=True):
            info |= {"iscrowd": segment["iscrowd"], "area": areas[segment["id"]]}
        return [entry]

    def prediction_file(self, entries: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make a COCO panoptic file."""
        return {"annotations": entries, "categories": self.categories()}

    def truth_file(self, entries: list[dict[str, Any]], images: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make a COCO panoptic file."""
        return {"images": images, "annotations": entries, "categories": self.categories()}

    def class_values(self, scores: Mapping[str, Any], class_id: int) -> tuple[float | None, ...]:
        """Look up the scores of a class."""
        quality = scores["per_class"][class_id]
        return tuple(quality[key] for key in ("pq", "sq", "rq"))

    def displayed(self, result: Mapping[str, Any], threshold: float) -> Mapping[str, Any]:
        """Show all: every segment has passed the model's threshold."""
        return result

    def _write_map(
        self, image_id: ImageId, ids: NDArray[np.integer], segments: Segments, folder: Path
    ) -> dict[str, Any]:
        file_name = f"{image_id}.png"
        path = folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)  # an id may hold slashes
        encode_segment_ids(ids).save(path)
        return {
            "image_id": image_id,
            "file_name": file_name,
            "segments_info": [
                {"id": int(segment["id"]), "category_id": self.category_ids[segment["label_id"]]}
                for segment in segments
            ],
        }


class SemanticScores(TaskScores):
    """mIoU and its relatives."""

    headline_keys = (
        (("mIoU",), "mIoU", "mean over the classes that occur"),
        (("fwIoU",), "fwIoU", "weighted by the pixels of the classes"),
        (("pixel_accuracy",), "pixel accuracy", "share of the pixels that are right"),
        (("mean_accuracy",), "mean accuracy", "mean over the classes that occur"),
        (("PQ_St", "pq"), "PQ^St", "panoptic quality of stuff (MaskFormer)"),
    )

    def __init__(self, dataset: SegmentationDataset, *, boundary: bool = False) -> None:
        """Take the classes of a data set; `boundary` computes boundary IoU too."""
        super().__init__(dataset, boundary=boundary)
        self.scores = SemanticQuality(dataset.id2label, boundary=boundary, ignore_index=NOTHING)
        self.columns = ("IoU", "accuracy", *(["boundary IoU"] if boundary else []))
        if boundary:
            boundary_key = (("boundary_mIoU",), "boundary mIoU", "near the contours alone")
            self.headline_keys = (*self.headline_keys, boundary_key)

    def add(self, row: SegmentationRow, result: Mapping[str, Any]) -> None:
        """Score one image."""
        predicted, target = to_numpy(result["segmentation"]), semantic_target(row, NOTHING)
        self.scores.add(row["image_id"], predicted, target)
        # Segments of the analysis: all pixels of a class, with the id class + 1.
        overlaps = {(one + 1, other + 1): pixels for (one, other), pixels in count_overlaps(predicted, target).items()}
        present = [
            {key: key - 1 for key in sorted(ids) if key != VOID} for ids in map(set, zip(*overlaps, strict=True))
        ]
        add_maps(self.analysis, row["image_id"], overlaps, *present)

    def write(self, image_id: ImageId, result: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Write the class-index PNG file; it has category ids, see `no_category`."""
        self._write_map(image_id, to_numpy(result["segmentation"]), folder)
        return []

    def write_truth(self, row: SegmentationRow, folder: Path) -> list[dict[str, Any]]:
        """Write the ground truth in the same form."""
        self._write_map(row["image_id"], semantic_target(row, NOTHING), folder)
        return []

    @property
    def no_category(self) -> int:
        """Value of pixels without class in the PNG files: 255 if no category has it, else 65535."""
        return 255 if max(self.category_ids.values()) < 255 else 65535  # noqa: PLR2004

    def prediction_file(self, entries: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make no JSON file: the PNG files say all."""
        return None

    def truth_file(self, entries: list[dict[str, Any]], images: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        """Make no JSON file: the PNG files say all."""
        return None

    def class_values(self, scores: Mapping[str, Any], class_id: int) -> tuple[float | None, ...]:
        """Look up the scores of a class."""
        keys = ["per_class_IoU", "per_class_accuracy", *(["per_class_boundary_IoU"] if self.boundary else [])]
        return tuple(scores[key][class_id] for key in keys)

    def displayed(self, result: Mapping[str, Any], threshold: float) -> Mapping[str, Any]:
        """Show the classes as masks."""
        classes = to_numpy(result["segmentation"])
        present = [class_id for class_id in np.unique(classes).tolist() if class_id != NO_CLASS]
        masks = (
            np.stack([classes == class_id for class_id in present]) if present else np.zeros((0, *classes.shape), bool)
        )
        return {"mask_labels": masks, "class_labels": np.asarray(present, dtype=np.int64)}

    def _write_map(self, image_id: ImageId, classes: NDArray[np.integer], folder: Path) -> None:
        categories = np.full(max(self.category_ids) + 2, self.no_category)
        for class_id, category_id in self.category_ids.items():
            categories[class_id] = category_id
        categories[-1] = self.no_category  # at which NO_CLASS, -1, looks
        kind = np.uint8 if self.no_category == 255 else np.uint16  # noqa: PLR2004
        path = folder / f"{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # an id may hold slashes
        Image.fromarray(categories[classes].astype(kind)).save(path)


TASK_SCORES: Mapping[Task, type[TaskScores]] = {
    "instance": InstanceScores,
    "panoptic": PanopticScores,
    "semantic": SemanticScores,
}


def predicted_instances(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List instances with `label_id`, `score` and run lengths."""
    return segments_from_masks(result["masks"], result["labels"], result["scores"])


def category_ids_of(dataset: SegmentationDataset) -> dict[int, int]:
    """Official id of each class; class + 1 where the data set knows none, because 0 is void in most forms."""
    known: Mapping[int, int] | None = getattr(dataset, "category_ids", None)
    return dict(known) if known is not None else {class_id: class_id + 1 for class_id in dataset.id2label}


def add_maps(
    analysis: ErrorAnalysis,
    image_id: ImageId,
    overlaps: Mapping[tuple[int, int], int],
    predicted_classes: Mapping[int, int],
    true_classes: Mapping[int, int],
    *,
    scores: Sequence[float] | None = None,
    crowd: Iterable[int] = (),
) -> None:
    """Analyse the errors of an image whose segments share no pixel, from pixels of (predicted id, true id) pairs.

    As in panoptic quality, predicted pixels over void do not count in a union, and a prediction that lies mostly on void, and on crowds
    of its class, is ignored.
    """
    crowds = set(crowd)
    rows = {key: number for number, key in enumerate(predicted_classes)}
    columns = {key: number for number, key in enumerate(true_classes)}
    pixels = np.zeros((len(rows), len(columns)))
    predicted_areas, void_areas, true_areas = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(columns))
    for (predicted_id, true_id), count in overlaps.items():
        if predicted_id in rows:
            predicted_areas[rows[predicted_id]] += count
            void_areas[rows[predicted_id]] += count if true_id == VOID else 0
        if true_id in columns:
            true_areas[columns[true_id]] += count
        if predicted_id in rows and true_id in columns:
            pixels[rows[predicted_id], columns[true_id]] = count
    is_crowd = np.array([key in crowds for key in columns], dtype=bool)
    unions = (predicted_areas - void_areas)[:, None] + true_areas - pixels
    ious = np.where(is_crowd, pixels / predicted_areas[:, None], pixels / np.maximum(unions, 1))
    predicted, true = (
        np.array(list(classes.values()), dtype=np.int64) for classes in (predicted_classes, true_classes)
    )
    same_crowd = is_crowd & (predicted[:, None] == true)
    excused = void_areas + (pixels * same_crowd).sum(axis=1)
    analysis.add(
        image_id,
        predicted_classes=predicted,
        scores=scores,
        true_classes=true,
        ious=ious,
        is_crowd=is_crowd,
        ignored=2 * excused > predicted_areas,
    )
