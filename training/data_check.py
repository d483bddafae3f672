"""Counting what a data set holds, before it is trained on: every image is read once, by several processes.

    read_facts(data set) ── SplitFacts: one ImageFacts an image ── summarise ── numbers; training.data_findings ── what to think of them

Axes: n segments, H W image.
"""

import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.data import SegmentationDataset, SegmentationRow, Split, Task
from training.metrics.image_scores import to_numpy
from training.official_files import FileError

IMAGES_A_MESSAGE = 8  # that a worker sends at once
SMALL_AREA = 32**2  # pixels, as COCO has it
PARTS = ("segments", "crowd", "void", "ignored")


@dataclass(frozen=True)
class ImageFacts:
    """What is counted of one image.

    Attributes:
        position: in the data set.
        image_id: of the row.
        size: height and width.
        classes: of each segment.
        areas: pixels of each segment.
        overlapping: segments that share a pixel with another one.
        overlap_pixels: pixels of several segments.
        crowds: regions of many objects.
        crowd_pixels: of these, where no segment is.
        ignored_pixels: of the mask of what is unknown, where neither is.
        void_pixels: of nothing at all.
        checksum: of the pixels.
        error: why it cannot be read; then all else is 0.
    """

    position: int
    image_id: int | str | None = None
    size: tuple[int, int] = (0, 0)
    classes: tuple[int, ...] = ()
    areas: tuple[int, ...] = ()
    overlapping: int = 0
    overlap_pixels: int = 0
    crowds: int = 0
    crowd_pixels: int = 0
    ignored_pixels: int = 0
    void_pixels: int = 0
    checksum: int = 0
    error: str = ""

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class SplitFacts:
    """What is counted of a split.

    Attributes:
        split: its name.
        task: which segments are reported.
        id2label: name of each class.
        thing_ids: classes of objects.
        category_ids: official id of each class, if there are any.
        num_images: length of the data set.
        images: those that were read.
        known_classes: classes of the segments of every image, if the index of the data set knows them.
        notes: of the reader, about what it left out.
    """

    split: Split
    task: Task
    id2label: dict[int, str]
    thing_ids: tuple[int, ...]
    category_ids: dict[int, int]
    num_images: int
    images: list[ImageFacts]
    known_classes: list[list[int]] | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def readable(self) -> list[ImageFacts]:
        """Images that could be read."""
        return [image for image in self.images if not image.error]

    @cached_property
    def broken(self) -> list[ImageFacts]:
        """Images that could not be read."""
        return [image for image in self.images if image.error]

    @cached_property
    def classes_of_images(self) -> Sequence[Sequence[int]]:
        """Classes of the segments of each image: of all of them if the index knows, else of those that were read."""
        return [image.classes for image in self.readable] if self.known_classes is None else self.known_classes

    @cached_property
    def segments_of_class(self) -> Counter[int]:
        """Segments of each class that has any."""
        return Counter(class_id for classes in self.classes_of_images for class_id in classes)

    @cached_property
    def images_of_class(self) -> Counter[int]:
        """Images that show each class that any shows."""
        return Counter(class_id for classes in self.classes_of_images for class_id in set(classes))


class FactsOfImages:
    """A data set of `ImageFacts`, for a loader."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        """Wrap a data set."""
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> ImageFacts:
        try:
            return facts_of_row(self.dataset[position], position)
        except FileError as error:
            return ImageFacts(position, error=str(error))
        except Exception as error:  # whatever it is, the other images are to be read too
            return ImageFacts(position, error=f"Image at position {position}: {type(error).__name__}: {error}")


def read_facts(
    dataset: SegmentationDataset, split: Split, task: Task, *, limit: int | None = None, num_workers: int = 0
) -> SplitFacts:
    """Read all images, or some that are spread over the data set, and count.

    Args:
        dataset: read by position.
        split: its name.
        task: which segments it reports.
        limit: most images that are read; `None` is all.
        num_workers: processes that read; 0 is this one.
    """
    positions = spread(len(dataset), limit)
    loader = DataLoader(
        FactsOfImages(dataset),  # type: ignore[arg-type] - it needs no more than a length and entries
        batch_size=IMAGES_A_MESSAGE,
        sampler=positions,
        num_workers=num_workers,
        collate_fn=list,
    )
    images: list[ImageFacts] = []
    with tqdm(total=len(positions), desc=f"reading {split}", unit="image") as bar:
        for some in loader:
            images += some
            bar.update(len(some))
    known = getattr(dataset, "classes_of_all", None)
    return SplitFacts(
        split,
        task,
        dict(dataset.id2label),
        tuple(dataset.thing_ids),
        dict(getattr(dataset, "category_ids", {})),
        len(dataset),
        images,
        None if known is None else known(),
        list(getattr(dataset, "notes", [])),
    )


def spread(length: int, limit: int | None) -> list[int]:
    """List positions at equal distances; all of them without a limit.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    count = length if limit is None else min(limit, length)
    return [number * length // count for number in range(count)]


def facts_of_row(row: SegmentationRow, position: int) -> ImageFacts:
    """Count what a row holds."""
    masks, image = to_numpy(row["mask_labels"]), row["image"]
    covered = masks.any(axis=0)
    areas = np.count_nonzero(masks, axis=(1, 2)).tolist()
    overlapping, overlap_pixels = count_overlaps(masks, sum(areas) - int(covered.sum()))
    crowds = to_numpy(row["crowd_masks"]) if "crowd_masks" in row else masks[:0]
    crowd = crowds.any(axis=0) & ~covered
    ignored = to_numpy(row["ignore_mask"]) & ~covered & ~crowd if "ignore_mask" in row else np.zeros_like(covered)
    return ImageFacts(
        position,
        row["image_id"],
        (image.height, image.width),
        tuple(to_numpy(row["class_labels"]).tolist()),
        tuple(areas),
        overlapping,
        overlap_pixels,
        len(crowds),
        int(crowd.sum()),
        int(ignored.sum()),
        int(covered.size - covered.sum() - crowd.sum() - ignored.sum()),
        zlib.crc32(np.asarray(image)),
    )


def count_overlaps(masks: np.ndarray, surplus: int) -> tuple[int, int]:
    """Count segments that share pixels, and the pixels.

    Args:
        masks: bool (n, H, W).
        surplus: by how much the sum of the areas is above the area of all together; 0 if nothing overlaps.
    """
    if surplus == 0:
        return 0, 0
    several = masks.sum(axis=0, dtype=np.int32) > 1
    return int((masks & several).any(axis=(1, 2)).sum()), int(several.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def summarise(facts: SplitFacts, num_queries: int) -> dict[str, Any]:
    """Collect the numbers of a split, in the types of JSON; shares are fractions.

    Args:
        facts: of the split.
        num_queries: of the model.
    """
    counts = [len(classes) for classes in facts.classes_of_images]
    areas = [area for image in facts.readable for area in image.areas]
    segments = len(areas)
    return {
        "split": facts.split,
        "task": facts.task,
        "images": facts.num_images,
        "images_read": len(facts.images),
        "broken_images": [image.error for image in facts.broken],
        "counted_from_index": facts.known_classes is not None,
        "segments": sum(counts),
        "segments_an_image": spread_of(counts),
        "images_without_segments": counts.count(0),
        "images_with_more_segments_than_queries": sum(count > num_queries for count in counts),
        "num_queries": num_queries,
        "crowd_regions": sum(image.crowds for image in facts.readable),
        "pixels": shares_of_pixels(facts.readable),
        "overlapping_segments": share(sum(image.overlapping for image in facts.readable), segments),
        "small_segments": share(sum(area < SMALL_AREA for area in areas), segments),
        "heights": spread_of([image.size[0] for image in facts.readable]),
        "widths": spread_of([image.size[1] for image in facts.readable]),
        "segment_areas": spread_of(areas),
        "classes": [
            {
                "id": class_id,
                "category_id": facts.category_ids.get(class_id),
                "name": name,
                "isthing": class_id in facts.thing_ids,
                "segments": facts.segments_of_class[class_id],
                "images": facts.images_of_class[class_id],
            }
            for class_id, name in facts.id2label.items()
        ],
        "notes": facts.notes,
    }


def spread_of(values: Sequence[int]) -> dict[str, float] | None:
    """Smallest, median and largest of some numbers; `None` of none."""
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def share(part: int, whole: int) -> float:
    """A part of a whole, 0 of nothing."""
    return part / whole if whole else 0.0


def shares_of_pixels(images: Iterable[ImageFacts]) -> dict[str, float]:
    """Share of the pixels of all images that are in segments, in crowds, ignored, and of nothing; of several segments."""
    listed = list(images)
    total = sum(image.pixels for image in listed)
    sums = {
        "crowd": sum(image.crowd_pixels for image in listed),
        "void": sum(image.void_pixels for image in listed),
        "ignored": sum(image.ignored_pixels for image in listed),
    }
    sums = {"segments": total - sum(sums.values()), **sums}
    overlapping = sum(image.overlap_pixels for image in listed)
    return {name: share(pixels, total) for name, pixels in {**sums, "several_segments": overlapping}.items()}
