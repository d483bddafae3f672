"""Training on data that is streamed, in an order and with an augmentation that do not depend on the number of workers or processes.

    training process: StreamOrder, a sampler ── positions: epoch, number, and the row's columns as bytes ──▶
    worker: StreamedRows[position] ── decodes, augments ── row

A sampler usually yields numbers, and workers read what these stand for. A stream cannot be read by number, so here the sampler reads
it, and what it yields holds the row as it is stored: a compressed image and its labels. Workers do all that takes time. So a stream
has one order, whoever reads it: several processes read all of it, and each keeps its own batches (as accelerate's loader does with
any sampler).

    DataLoader(StreamedRows(stream, augmentation, seed), sampler=StreamOrder(stream, num_samples, seed, start=...), ...)

`KeptRows` holds a validation split in memory, as it is stored, so that it can be read by number.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from training.augmentation import Augmentation, AugmentedRow, generator_of
from training.data import SegmentationDataset, SegmentationRow
from training.official_files import FileError
from training.readers.hub import HubStream

MOST_TRIED = 100  # rows, until one can be read


class StoredRow(NamedTuple):
    """A row of a stream as it is stored: its file, its place in it, and what `datasets` gives, pictures as bytes."""

    file: int
    place: int
    columns: Mapping[str, Any]

    @property
    def number(self) -> int:
        """One number for file and place."""
        return self.file << 32 | self.place

    def convert(self, stream: HubStream) -> SegmentationRow:
        """Decode it.

        Raises:
            FileError: it makes no sense.
        """
        return stream.convert(self.columns, f"file {self.file}, row {self.place}")


class StreamPosition(NamedTuple):
    """A row, and where it comes: pass through the data and position in this pass, both from 0."""

    epoch: int
    position: int
    row: StoredRow


class StreamOrder(Sampler[StreamPosition]):
    """Rows of a stream, epoch after epoch, each in an order that depends on seed and epoch alone.

    The files are read one after the other, in another order in each epoch, through a buffer from which the next row is drawn.

    `num_images` is the length of an epoch: `None` until the first one has ended. A checkpoint keeps it, and the number of samples that
    were taken; going on reads over those of the epoch that was interrupted.
    """

    def __init__(
        self,
        stream: HubStream,
        num_samples: int,
        seed: int,
        *,
        start: int = 0,
        num_images: int | None = None,
        buffer_size: int = 500,
    ) -> None:
        """Describe the order.

        Args:
            stream: the data.
            num_samples: length of the whole training.
            seed: of the order.
            start: how many of the samples have been taken already.
            num_images: length of an epoch, if it is known.
            buffer_size: of so many rows the next one is drawn. They are in memory, as they are stored.
        """
        self.stream = stream
        self.num_samples = num_samples
        self.seed = seed
        self.start = start
        self.num_images = num_images
        self.buffer_size = buffer_size

    def __len__(self) -> int:
        return self.num_samples - self.start

    def __iter__(self) -> Iterator[StreamPosition]:
        epoch, first = divmod(self.start, self.num_images) if self.num_images else (0, self.start)
        left = len(self)
        while left > 0:
            position = -1
            for position, row in enumerate(self._read(epoch)):
                if position < first:
                    continue
                yield StreamPosition(epoch, position, row)
                left -= 1
                if left == 0:
                    return
            if position < 0:
                raise FileError("The stream has no images.")
            self.num_images = position + 1
            epoch, first = epoch + 1, max(0, first - self.num_images)

    def _read(self, epoch: int) -> Iterator[StoredRow]:
        rng = generator_of(self.seed, epoch, 0)
        files = np.argsort(rng.random(self.stream.num_files), kind="stable").tolist()
        return shuffled(read_rows(self.stream, files), self.buffer_size, rng)


class StreamedRows:
    """Rows of `StreamPosition`s, augmented; the data set of a loader whose sampler is a `StreamOrder`.

    In the place of a row that cannot be read comes the first row of the stream that can be: with `skipped`, as from
    `training.broken_images.SkippingBroken`.
    """

    def __init__(self, stream: HubStream, augmentation: Augmentation | None, seed: int) -> None:
        """Read until a row can be used.

        Args:
            stream: the data.
            augmentation: `None` leaves the rows as they are.
            seed: of the training.

        Raises:
            FileError: none of the first rows can be read.
        """
        self.stream = stream
        self.augmentation = augmentation
        self.seed = seed
        self.id2label = stream.id2label
        self.thing_ids = stream.thing_ids
        self.stuff_ids = stream.stuff_ids
        self._spare = first_readable(stream)

    def __getitem__(self, position: StreamPosition) -> SegmentationRow | AugmentedRow:
        try:
            row = position.row.convert(self.stream)
        except FileError as error:
            row = {**self._spare.convert(self.stream), "skipped": ((position.row.number, str(error)),)}
        if self.augmentation is None:
            return row
        return self.augmentation(row, seed=self.seed, epoch=position.epoch, index=position.row.number)


class KeptRows:
    """The first rows of a stream, kept in memory as they are stored; they are read by number."""

    def __init__(self, stream: HubStream, num_images: int | None = None) -> None:
        """Read the rows; `None` reads all."""
        self.stream = stream
        self.id2label = stream.id2label
        self.thing_ids = stream.thing_ids
        self.stuff_ids = stream.stuff_ids
        self.category_ids = stream.category_ids
        self._rows = list(islice(read_rows(stream), num_images))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SegmentationRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image {index} of {len(self)}: the index must lie below the number of images.")
        return self._rows[index].convert(self.stream)


def is_stream(dataset: SegmentationDataset | HubStream) -> bool:
    """Say whether a data set is one that only `StreamOrder` and `KeptRows` can read."""
    return isinstance(dataset, HubStream)


def read_rows(stream: HubStream, files: Iterable[int] | None = None) -> Iterator[StoredRow]:
    """Read the rows of some files one after the other; `None` are all, in order."""
    for file in range(stream.num_files) if files is None else files:
        for place, columns in enumerate(stream.read_file(file)):
            yield StoredRow(file, place, columns)


def shuffled(rows: Iterable[StoredRow], buffer_size: int, rng: np.random.Generator) -> Iterator[StoredRow]:
    """Draw the next row from those in a buffer, as long as there are any.

    `datasets` has the same; it reads with threads, which must not be there when a loader starts its workers.
    """
    buffer: list[StoredRow] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = int(rng.random() * buffer_size)
        yield buffer[place]
        buffer[place] = row
    for place in np.argsort(rng.random(len(buffer)), kind="stable").tolist():
        yield buffer[place]


def first_readable(stream: HubStream) -> StoredRow:
    """Find the first row that can be read.

    Raises:
        FileError: none can.
    """
    reason = "it has none."
    for row in islice(read_rows(stream), MOST_TRIED):
        try:
            row.convert(stream)
        except FileError as error:
            reason = str(error)
        else:
            return row
    raise FileError(f"None of the first {MOST_TRIED} images of the stream can be read: {reason}")
