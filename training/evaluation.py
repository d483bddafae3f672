"""Scoring a model on a data set: run it, post-process, compare at the original resolution.

    instance    AP  (COCO)          semantic    mIoU          panoptic    PQ

Works on several processes: each scores its share of the images, and all end with the scores of the whole data set.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from training.data import SegmentationDataset, SegmentationRow, Task
from training.metrics.image_scores import ImageScores
from training.metrics.panoptic_quality import PanopticQuality
from training.metrics.semantic_quality import NOTHING, SemanticQuality
from training.progress import bar_interval
from training.stopping import stop_signals
from training.targets import instance_targets, panoptic_target, semantic_target, size_of

# Scores of the whole data set, the one that decides what is better first: name, and keys in the result of `compute`.
HEADLINES: Mapping[Task, Mapping[str, tuple[str, ...]]] = {
    "instance": {
        "AP": ("AP",),
        "AP50": ("AP50",),
        "AP75": ("AP75",),
        "AP small": ("APs",),
        "AP medium": ("APm",),
        "AP large": ("APl",),
    },
    "panoptic": {
        "PQ": ("All", "pq"),
        "PQ things": ("Things", "pq"),
        "PQ stuff": ("Stuff", "pq"),
        "SQ": ("All", "sq"),
        "RQ": ("All", "rq"),
    },
    "semantic": {"mIoU": ("mIoU",), "fwIoU": ("fwIoU",), "pixel accuracy": ("pixel_accuracy",)},
}


class EvaluationBatch(TypedDict):
    """Inputs of the model, and the rows they were made of."""

    inputs: dict[str, torch.Tensor]
    rows: list[SegmentationRow]


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    processor: BaseImageProcessor,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    task: Task,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    look: Callable[[SegmentationRow, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Score a model on a task, with the thresholds that are stored in the processor (panoptic) or those of the original (instance).

    The mode of the model, training or evaluation, is the same afterwards.

    Args:
        model: made or prepared by `accelerator`; every process has it.
        processor: makes its results.
        dataset: of the same task; for panoptic quality its segments must not overlap.
        accelerator: of this run.
        task: what is scored.
        batch_size: images in a forward pass of each process. Images of similar shape come together.
        num_workers: processes that prepare batches, for each process.
        look: called with each row that this process scores, and its result.

    Returns:
        The same on every process, see `compute` of `PanopticQuality`, `AveragePrecision` and `SemanticQuality`.
    """
    loader = accelerator.prepare_data_loader(
        DataLoader(
            dataset,  # type: ignore[arg-type] # it needs no more than a length and rows
            batch_size=batch_size,
            sampler=order_by_shape(dataset),
            num_workers=num_workers,
            collate_fn=partial(collate_for_evaluation, processor=processor),
            worker_init_fn=leave_stopping_to_parent,
        )
    )
    # Without DDP's wrapper, which would wait for other processes in every forward pass.
    network = accelerator.unwrap_model(model)
    was_training = network.training
    network.eval()
    scores = make_scores(task, dataset)
    try:
        for batch in tqdm(
            loader,
            desc="evaluation",
            unit="batch",
            disable=not accelerator.is_main_process,
            leave=False,
            mininterval=bar_interval(),
        ):
            with accelerator.autocast():
                outputs = network(**batch["inputs"])
            results = segment_rows(task, processor, outputs, batch["rows"], dataset)
            # Samplers repeat images so that every process has as many batches; each counts once.
            for row, result in zip(batch["rows"], results, strict=True):
                if row["image_id"] not in scores:
                    add_image(task, scores, row, result)
                    if look is not None:
                        look(row, result)
            stop_signals.check()
    finally:
        network.train(was_training)
    return merge_over_processes(scores).compute()


def order_by_shape(dataset: SegmentationDataset) -> Sequence[int]:
    """Put images of similar shape beside each other, so that batches have little padding; only if sizes are known without reading."""
    size_at: Callable[[int], tuple[int, int]] | None = getattr(dataset, "size", None)
    indices = range(len(dataset))
    if size_at is None:
        return indices

    def shape(index: int) -> tuple[float, int]:
        height, width = size_at(index)
        return round(height / width, 2), height * width

    return sorted(indices, key=shape)


def make_scores(task: Task, dataset: SegmentationDataset) -> Any:  # noqa: ANN401 - the metric of the task
    """Make an empty collection of the scores of a task."""
    if task == "panoptic":
        return PanopticQuality(dataset.thing_ids, dataset.stuff_ids)
    if task == "semantic":
        return SemanticQuality(dataset.id2label, ignore_index=NOTHING)
    from training.metrics.average_precision import AveragePrecision  # noqa: PLC0415 - pycocotools, for this task alone

    return AveragePrecision(dataset.thing_ids)


def add_image(
    task: Task,
    scores: Any,  # noqa: ANN401 - of `make_scores`
    row: SegmentationRow,
    result: Mapping[str, Any],
) -> None:
    """Score one image."""
    if task == "panoptic":
        scores.add(row["image_id"], result["segmentation"], result["segments_info"], *panoptic_target(row))
    elif task == "semantic":
        scores.add(row["image_id"], result["segmentation"], semantic_target(row, NOTHING))
    else:
        from training.metrics.average_precision import segments_from_masks  # noqa: PLC0415

        predictions = segments_from_masks(result["masks"], result["labels"], result["scores"])
        scores.add(row["image_id"], predictions, instance_targets(row), size_of(row))


def collate_for_evaluation(rows: Sequence[SegmentationRow], processor: BaseImageProcessor) -> EvaluationBatch:
    """Prepare the images of some rows; the rows stay as they are, at their own sizes."""
    inputs = processor([row["image"] for row in rows], return_tensors="pt")
    return {"inputs": dict(inputs), "rows": list(rows)}


def leave_stopping_to_parent(_worker_id: int) -> None:
    """Let a process that prepares batches ignore Ctrl-C and `kill` of the whole group: its parent stops it in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def segment_rows(
    task: Task,
    processor: BaseImageProcessor,
    outputs: Any,  # noqa: ANN401 - whatever the processor takes
    rows: Sequence[SegmentationRow],
    dataset: SegmentationDataset,
) -> list[dict[str, Any]]:
    """Post-process the outputs for some rows to the sizes of their ground truth.

    Returns:
        For each row: instances as `masks`, `scores`, `labels`; panoptic segments as `segmentation` (0 is void) and `segments_info`; a
        semantic map as `segmentation`.
    """
    sizes = [size_of(row) for row in rows]
    if task == "panoptic":
        return processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    if task == "semantic":
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [{"segmentation": classes} for classes in maps]
    without_instances = tuple(class_id for class_id in dataset.id2label if class_id not in dataset.thing_ids)
    return processor.post_process_instance_segmentation(
        outputs, target_sizes=sizes, preset="evaluation", label_ids_to_fuse=without_instances
    )


def merge_over_processes(scores: ImageScores[Any]) -> Any:  # noqa: ANN401 - the same metric
    """Join the collections of all processes; every process gets the whole."""
    first, *others = gather_object([scores])
    for other in others:
        first.merge(other)
    return first


def headlines(task: Task, scores: Mapping[str, Any]) -> dict[str, float]:
    """Look up the scores of the whole data set, as fractions, without those of what the ground truth does not have."""
    found = {}
    for name, keys in HEADLINES[task].items():
        value: Any = scores
        for key in keys:
            is_empty = isinstance(value, Mapping) and value.get("n") == 0  # a group without any class
            value = -1.0 if is_empty else value[key]
        found[name] = float(value)
    main = next(iter(found))
    return {name: value for name, value in found.items() if value >= 0 or name == main}


def format_scores(scores: Mapping[str, float]) -> str:
    """Write scores in one line, in percent."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def name_classes(values: Any, names: Mapping[int, str]) -> Any:  # noqa: ANN401 - nested dictionaries
    """Replace class ids that are keys by names; two classes of one name keep their ids."""
    if isinstance(values, list | tuple):
        return [name_classes(value, names) for value in values]
    if not isinstance(values, Mapping):
        return values
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {
        (names[key] if names[key] not in twice else f"{names[key]} ({key})")
        if isinstance(key, int)
        else key: name_classes(value, names)
        for key, value in values.items()
    }
