"""Broken images in a training: another one takes the place of each, it is named once, and too many of them stop the run.

    worker    SkippingBroken[index]        ── row, with `skipped` if it is another image
    worker    compact_batches.pack_batch   ── batch, with `skipped`
    training  BrokenImages.add(skipped)    ── a sentence for each image that is new, and an error when there are too many

Workers know nothing of each other, so only the training process counts; what they found travels with the rows.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from training.data import SegmentationDataset, SegmentationRow
from training.official_files import FileError

Skipped = tuple[int, str]  # position in the data set, and why the image cannot be read


class BrokenImagesError(FileError):
    """More images cannot be read than a run may pass over; the message names all of them."""


class SkippingBroken:
    """A data set in which another image takes the place of one that cannot be read.

    Which one depends on the position alone, so it is the same in every epoch, process and run. Its row has the key `skipped`: the
    position of each broken image that was tried, and the reason.
    """

    id2label: dict[int, str]
    thing_ids: tuple[int, ...]
    stuff_ids: tuple[int, ...]

    def __init__(self, dataset: SegmentationDataset, limit: int) -> None:
        """Wrap a data set.

        Args:
            dataset: raises `FileError` where an image is missing or broken, or its labels make no sense.
            limit: so many images may be passed over, >= 0.

        Raises:
            BrokenImagesError: it is known already that there are more.
        """
        self.dataset = dataset
        self.limit = limit
        self.id2label = dataset.id2label
        self.thing_ids = dataset.thing_ids
        self.stuff_ids = dataset.stuff_ids
        known: Mapping[int, str] = getattr(dataset, "problems", {})
        require_at_most(limit, known)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data set has, such as `category_ids`
        if name.startswith("__") or name == "dataset":  # while it is unpickled, there is none yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> SegmentationRow:
        """Read a row, of this image or of the one that takes its place.

        Raises:
            BrokenImagesError: so many images were tried that the limit is passed, or all of them.
        """
        try:
            return self.dataset[index]
        except FileError as error:
            broken = {int(index) % len(self): str(error)}
        for candidate in replacements(int(index) % len(self), len(self)):
            require_at_most(self.limit, broken)
            try:
                row = self.dataset[candidate]
            except FileError as error:
                broken[candidate] = str(error)
            else:
                return {**row, "skipped": tuple(broken.items())}
        raise BrokenImagesError(f"No image can be read. {list_reasons(broken)}")


class BrokenImages:
    """The images that a training process has passed over; `found` is position -> reason."""

    def __init__(self, limit: int) -> None:
        """Begin without any.

        Args:
            limit: so many may be passed over, >= 0.
        """
        self.limit = limit
        self.found: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.found)

    def add(self, skipped: Iterable[Sequence[Any]]) -> None:
        """Take what a batch says; each image is named on stderr when it comes for the first time.

        Raises:
            BrokenImagesError: there are more than `limit` now.
        """
        for index, reason in skipped:
            if index not in self.found:
                self.found[int(index)] = reason
                tqdm.write(f"Passed over, and another image taken instead: {reason}", file=sys.stderr)
        require_at_most(self.limit, self.found)

    def merge(self, others: Iterable[Mapping[int, str]]) -> None:
        """Take what other processes have found (`found` of each, gathered), without naming it again.

        Raises:
            BrokenImagesError: together there are more than `limit`; on all processes, if all of them call it.
        """
        for other in others:
            self.found = {**other, **self.found}
        self.found = dict(sorted(self.found.items()))
        require_at_most(self.limit, self.found)

    def state_dict(self) -> dict[str, str]:
        """Return what a checkpoint keeps; JSON."""
        return {str(index): reason for index, reason in self.found.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on with what earlier sessions have found."""
        self.found = {int(index): reason for index, reason in state.items()}


def replacements(index: int, length: int) -> Iterable[int]:
    """List all other positions in an order that depends on `index` alone; neighbours are often broken together."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(index, spawn_key=(length,))))
    order = np.argsort(
        rng.random(length), kind="stable"
    )  # of uniform numbers, which are the same with every version of numpy
    return order[order != index].tolist()


def require_at_most(limit: int, broken: Mapping[int, str]) -> None:
    """Refuse more broken images than may be passed over.

    Raises:
        BrokenImagesError: there are more; names all of them.
    """
    if len(broken) > limit:
        raise BrokenImagesError(
            f"{len(broken)} images cannot be read, and at most {limit} may be passed over (`max_broken_images`). Mend them, or leave "
            f"them out; `python -m training.check_data` finds all. {list_reasons(broken)}"
        )


def list_reasons(broken: Mapping[int, str]) -> str:
    """Write the reasons one after the other."""
    return " ".join(f"({number}) {reason}" for number, reason in enumerate(broken.values(), start=1))


def skipped_of(rows: Iterable[SegmentationRow]) -> tuple[Skipped, ...]:
    """Collect what the rows of a batch say of broken images; for a `collate_fn`."""
    return tuple(skipped for row in rows for skipped in row.get("skipped", ()))


def sentence_of(error: Exception) -> str:
    """Write the message of an error; of one that comes from a worker of a loader, without the traceback that torch writes around it."""
    text = str(error)
    if not text.startswith("Caught ") or "DataLoader worker" not in text:
        return text
    *_, last = re.finditer(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)
    return text[last.end() :].strip()
