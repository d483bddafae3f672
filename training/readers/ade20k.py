"""ADE20K in the form of the scene parsing challenge (`ADEChallengeData2016`), with its instances (2017).

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png            a class at each pixel, 1 to 150; 0 is none of them
    annotations_instance/{training,validation}/*.png   red: class of the instance, 1 to 100; green: number of the instance, 0 is none

The 100 classes with instances are the things among the 150, in the same order. Semantic maps need the second folder, instances the
third, panoptic segments both: stuff is what the second says, things are what the third says, and where both know something the thing
is on top. Pixels of a thing's class without an instance are void. The panoptic files that others prepare hold the same.

Axes: H W image.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.label_sets import FOLDER, read_label_set
from training.data import Split, Task
from training.image_files import (
    IMAGE_SUFFIXES,
    FileTree,
    StoredFile,
    read_channels,
    read_ids,
    require_size,
)
from training.official_files import Category, FileError
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import (
    Labels,
    Mask,
    Reader,
    Segment,
    by_stem,
    distinct,
    equal_to,
    file_columns,
    list_rows,
    pair_by_name,
)

FOLDERS: Mapping[Split, str] = {"train": "training", "validation": "validation"}
SEMANTIC, INSTANCE = "annotations", "annotations_instance"
NEEDED: Mapping[Task, tuple[str, ...]] = {
    "semantic": (SEMANTIC,),
    "instance": (INSTANCE,),
    "panoptic": (SEMANTIC, INSTANCE),
}
OTHER = 0  # none of the classes
NUM_CLASSES, NUM_THINGS = 150, 100


class ADE20K(Reader):
    """ADE20K; `category_ids` are 1 to 150, or 1 to 100 for instances."""

    name = "ade20k"

    def __init__(self, split: Split, *, task: Task = "semantic", path: str, cache_dir: str | None = None) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"`.
            task: `"semantic"` (150 classes), `"instance"` (100) or `"panoptic"` (150).
            path: `ADEChallengeData2016`, a folder or zip archive with it, or with archives of its parts.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        folders = {part: find_part(self._tree, part, split) for part in ("images", *NEEDED[task])}
        names = [name for folder in folders.values() for name in self._tree.below(folder)]
        build = partial(build_index, self._tree, folders)
        self._open_index((task, self._tree.stamp(names)), build, cache_dir)
        self._set_classes(categories(task), "ADE20K")

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return any(
            tree.find_folders(f"images/{name}")
            and any(tree.find_folders(f"{part}/{name}") for part in (SEMANTIC, INSTANCE))
            for name in FOLDERS.values()
        )

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        image_id = entry["image_id"]
        if self.task == "instance":
            size, instances = read_instances(self._file(entry[INSTANCE]), image_id)
            return Labels(size, [Segment(class_id, mask) for class_id, mask in instances])
        file = self._file(entry[SEMANTIC])
        ids = read_ids(file, f"the classes of image {image_id!r}")
        classes = [value for value in distinct(ids) if value != OTHER]
        if classes and classes[-1] > NUM_CLASSES:
            raise FileError(
                f"{file} (image {image_id!r}) has the class {classes[-1]}. ADE20K has 1 to {NUM_CLASSES}, and 0 for others."
            )
        if self.task == "semantic":
            return Labels(ids.shape, [Segment(value, equal_to(ids, value)) for value in classes], ids == OTHER)
        return self._lay_things_over(ids, classes, self._file(entry[INSTANCE]), image_id)

    def _lay_things_over(self, ids: NDArray[np.int32], classes: list[int], file: StoredFile, image_id: str) -> Labels:
        size, instances = read_instances(file, image_id)
        require_size(size, ids.shape, file, f"the semantic map of image {image_id!r}")
        things = [(thing_ids()[class_id - 1], draw()) for class_id, draw in instances]
        covered = np.zeros(ids.shape, dtype=bool)
        for _, mask in things:
            covered |= mask
        is_stuff = np.ones(NUM_CLASSES + 1, dtype=bool)
        is_stuff[[OTHER, *thing_ids()]] = False
        stuff = np.where(covered | ~is_stuff[ids], OTHER, ids)
        segments = [Segment(value, equal_to(stuff, value)) for value in classes if is_stuff[value]]
        segments += [Segment(class_id, partial(np.copy, mask)) for class_id, mask in things]
        return Labels(ids.shape, segments, (stuff == OTHER) & ~covered)


def read_instances(file: StoredFile, image_id: str) -> tuple[tuple[int, int], list[tuple[int, Callable[[], Mask]]]]:
    """List the instances of a map.

    Returns:
        Height and width, and for each instance its class, 1 to 100, and a function that draws the mask.

    Raises:
        FileError: an instance has pixels of two classes, or of none.
    """
    channels = read_channels(file, f"the instances of image {image_id!r}")
    classes, numbers = channels[..., 0], channels[..., 1]
    found = []
    for pair in distinct(numbers.astype(np.int32) * 256 + classes):
        number, class_id = divmod(pair, 256)
        if number == 0:
            continue
        if not 1 <= class_id <= NUM_THINGS:
            raise FileError(
                f"{file} (image {image_id!r}): instance {number} has the class {class_id}. Expected 1 to {NUM_THINGS} in red."
            )
        found.append((number, class_id))
    repeated = sorted({number for number, _ in found if sum(number == other for other, _ in found) > 1})
    if repeated:
        both = [class_id for number, class_id in found if number == repeated[0]]
        raise FileError(
            f"{file} (image {image_id!r}): instance {repeated[0]} has pixels of the classes {both}. Expected one class."
        )
    return numbers.shape, [(class_id, equal_to(numbers, number)) for number, class_id in found]


def find_part(tree: FileTree, part: str, split: Split) -> str:
    """Find the folder of a part of the data set.

    Raises:
        FileError: there is none.
    """
    folder = tree.find_folder(f"{part}/{FOLDERS[split]}")
    if folder is None:
        raise FileError(f"{tree.root} has no folder {part}/{FOLDERS[split]}, which ADE20K should have here.")
    return folder


def build_index(tree: FileTree, folders: Mapping[str, str]) -> IndexContent:
    """List images and their maps."""
    images = by_stem(tree, folders["images"], IMAGE_SUFFIXES)
    parts = {
        part: pair_by_name(tree, images, by_stem(tree, folder, (".png",)), "PNG file", folder)
        for part, folder in folders.items()
        if part != "images"
    }
    facts = IndexFacts()
    return IndexContent(file_columns(*parts), list_rows(tree, images, parts, facts, "PNG file"), facts)


def categories(task: Task) -> list[Category]:
    """List the classes that a task has, with their numbers in the PNG files."""
    labels = read_label_set(FOLDER / ("ade20k_instance_100.json" if task == "instance" else "ade20k_150.json"))
    return [
        Category(number, name, thing)
        for number, (name, thing) in enumerate(zip(labels.classes, labels.things, strict=True), start=1)
    ]


@functools.cache
def thing_ids() -> tuple[int, ...]:
    """List the class, 1 to 150, of each of the 100 things."""
    return tuple(category.id for category in categories("panoptic") if category.is_thing)
