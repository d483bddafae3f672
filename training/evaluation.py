"""Scoring a model on a data set: run it, post-process, compare at the original resolution.

Works on several processes: each scores its share of the images, and all end with the scores of the whole data set.
"""

import signal
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from training.data import SegmentationDataset, SegmentationRow
from training.metrics.panoptic_quality import PanopticQuality, panoptic_map_from_masks
from training.stopping import stop_signals

GROUPS = ("All", "Things", "Stuff")


class EvaluationBatch(TypedDict):
    """Inputs of the model, and the rows they were made of."""

    inputs: dict[str, torch.Tensor]
    rows: list[SegmentationRow]


@torch.no_grad()
def evaluate_panoptic(
    model: nn.Module,
    processor: BaseImageProcessor,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Compute panoptic quality, with the thresholds that are stored in the processor.

    The mode of the model, training or evaluation, is the same afterwards.

    Args:
        model: made or prepared by `accelerator`; every process has it.
        processor: its `post_process_panoptic_segmentation` makes the results.
        dataset: its segments must not overlap.
        accelerator: of this run.
        batch_size: images in a forward pass of each process.
        num_workers: processes that prepare batches, for each process.

    Returns:
        The same on every process, see `PanopticQuality.compute`.
    """
    loader = accelerator.prepare_data_loader(
        DataLoader(
            dataset,  # type: ignore[arg-type] # it needs no more than a length and rows
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=partial(collate_for_evaluation, processor=processor),
            worker_init_fn=leave_stopping_to_parent,
        )
    )
    # Without DDP's wrapper, which would wait for other processes in every forward pass.
    network = accelerator.unwrap_model(model)
    was_training = network.training
    network.eval()
    quality = PanopticQuality(dataset.thing_ids, dataset.stuff_ids)
    scored: set[int] = set()
    try:
        for batch in tqdm(
            loader, desc="evaluation", unit="batch", disable=not accelerator.is_main_process, leave=False
        ):
            with accelerator.autocast():
                outputs = network(**batch["inputs"])
            # Samplers repeat images so that every process has as many batches; each counts once.
            for row, result in zip(batch["rows"], segment_rows(processor, outputs, batch["rows"]), strict=True):
                if row["image_id"] not in scored:
                    target = panoptic_map_from_masks(row["mask_labels"], row["class_labels"])
                    quality.add(row["image_id"], result["segmentation"], result["segments_info"], *target)
                    scored.add(row["image_id"])
            stop_signals.check()
    finally:
        network.train(was_training)
    return merge_over_processes(quality).compute()


def collate_for_evaluation(rows: Sequence[SegmentationRow], processor: BaseImageProcessor) -> EvaluationBatch:
    """Prepare the images of some rows; the rows stay as they are, at their own sizes."""
    inputs = processor([row["image"] for row in rows], return_tensors="pt")
    return {"inputs": dict(inputs), "rows": list(rows)}


def leave_stopping_to_parent(_worker_id: int) -> None:
    """Let a process that prepares batches ignore Ctrl-C and `kill` of the whole group: its parent stops it in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def segment_rows(
    processor: BaseImageProcessor,
    outputs: Any,  # noqa: ANN401 - whatever the processor takes
    rows: Sequence[SegmentationRow],
) -> list[dict[str, Any]]:
    """Post-process the outputs for some rows to the sizes of their ground truth."""
    target_sizes = [row["mask_labels"].shape[1:] for row in rows]
    return processor.post_process_panoptic_segmentation(outputs, target_sizes=target_sizes)


def merge_over_processes(quality: PanopticQuality) -> PanopticQuality:
    """Join the collections of all processes; every process gets the whole."""
    first, *others = gather_object([quality])
    for other in others:
        first.merge(other)
    return first


def format_scores(scores: Mapping[str, Any]) -> str:
    """Write the scores of all classes, things and stuff as a table, in percent."""
    lines = [f"{'':8}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>9}"]
    for name in GROUPS:
        score = scores[name]
        percent = "".join(f"{100 * score[key]:7.1f}" for key in ("pq", "sq", "rq"))
        lines.append(f"{name:8}{percent}{score['n']:9d}")
    return "\n".join(lines)
