"""From rows to batches: broken images passed over, augmentation, order, workers.

    rows ── PositionedRows (no augmentation), AugmentedDataset ── collate ── loader ── model inputs

Without augmentation the image processor makes the inputs in the workers, as it does for users of the model. With it the workers
send small batches, and the device makes the inputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mpformer_hf import MPFormerImageProcessor
from training.arguments import TrainingArguments
from training.augmentation import Augmentation, AugmentedDataset
from training.broken_images import SkippingBroken, skipped_of
from training.compact_batches import CompactBatch, pack_batch, unpack_batch, unpack_ignore_masks
from training.data import SegmentationDataset, SegmentationRow
from training.evaluation import leave_stopping_to_parent
from training.sampling import Position, ShuffledEpochs
from training.streaming_rows import StreamedRows, StreamOrder, is_stream

Entry = TypeVar("Entry")
TrainingBatch = dict[str, Any] | CompactBatch


class PositionedRows:
    """A data set whose rows are asked for by (epoch, index, repeat), and are always the same."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        """Wrap a data set."""
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> SegmentationRow:
        return self.dataset[position[1]]


def make_order(
    dataset: SegmentationDataset,
    arguments: TrainingArguments,
    num_samples: int,
    *,
    start: int,
    num_images: int | None,
    repeats: Sequence[float] | None,
) -> ShuffledEpochs | StreamOrder:
    """Make the order of the images, see `ShuffledEpochs` and `StreamOrder`."""
    if is_stream(dataset):
        return StreamOrder(dataset, num_samples, arguments.seed, start=start, num_images=num_images)  # type: ignore[arg-type]
    return ShuffledEpochs(len(dataset), num_samples, arguments.seed, start=start, repeats=repeats)


def make_loader(
    dataset: SegmentationDataset,
    processor: MPFormerImageProcessor,
    sampler: ShuffledEpochs | StreamOrder,
    arguments: TrainingArguments,
    *,
    pin_memory: bool,
) -> DataLoader:
    """Make the loader of training batches."""
    augmentation = Augmentation.from_recipe(arguments.augmentation) if arguments.augmentation else None
    rows: PositionedRows | AugmentedDataset | StreamedRows
    if is_stream(dataset):
        rows = StreamedRows(dataset, augmentation, arguments.seed)
    elif augmentation is not None:
        rows = AugmentedDataset(SkippingBroken(dataset, arguments.max_broken_images), augmentation, arguments.seed)
    else:
        rows = PositionedRows(SkippingBroken(dataset, arguments.max_broken_images))
    collate: Any = partial(collate_for_training, processor=processor)
    if augmentation is not None:
        collate = partial(pack_batch, size_divisor=processor.size_divisor)
    return DataLoader(
        rows,  # type: ignore[arg-type] # it needs no more than a length and rows
        batch_size=arguments.batch_size,
        sampler=sampler,
        num_workers=arguments.num_workers,
        collate_fn=collate,
        worker_init_fn=leave_stopping_to_parent,
        pin_memory=pin_memory,
        # Or it would draw from the generator that noise and points come from, once for each session.
        generator=torch.Generator().manual_seed(arguments.seed),
    )


def collate_for_training(rows: Sequence[SegmentationRow], processor: MPFormerImageProcessor) -> dict[str, Any]:
    """Prepare some rows as inputs of the model, labels included."""
    inputs = processor(
        [row["image"] for row in rows],
        mask_labels=[row["mask_labels"] for row in rows],
        class_labels=[row["class_labels"] for row in rows],
        return_tensors="pt",
    )
    skipped = skipped_of(rows)
    return {**inputs, "skipped": skipped} if skipped else dict(inputs)


def class_labels_of(batch: TrainingBatch) -> list[Tensor]:
    """Class labels of each image, int64 (n,)."""
    return batch.class_labels if isinstance(batch, CompactBatch) else batch["class_labels"]


def skipped_in(batch: TrainingBatch) -> Sequence[Sequence[Any]]:
    """Broken images that this batch would have had, see `training.broken_images`."""
    return batch.skipped if isinstance(batch, CompactBatch) else batch.get("skipped", ())


def model_inputs(batch: TrainingBatch, processor: MPFormerImageProcessor, *, exclude_ignored: bool) -> dict[str, Any]:
    """Make what the model takes; `exclude_ignored` adds the masks of pixels whose label is unknown."""
    if not isinstance(batch, CompactBatch):
        return {name: value for name, value in batch.items() if name != "skipped"}
    inputs = unpack_batch(batch, processor)
    if exclude_ignored:
        inputs["ignore_masks"] = unpack_ignore_masks(batch)
    return inputs


def in_groups(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """Give entries in lists of a size; the last may be shorter."""
    group: list[Entry] = []
    for entry in entries:
        group.append(entry)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
