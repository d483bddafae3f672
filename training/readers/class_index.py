"""A folder of images and one of PNG files with a class at each pixel; if there are instances, a third with their numbers.

    images/{train,val}/*.jpg                    also {train,val}/images, and val may be called validation or valid
    labels/{train,val}/*.png                    or masks, annotations: a class at each pixel; 8 or 16 bits, a palette, or colours
    instances/{train,val}/*.png                 optional: a number of the instance at each pixel; 0 is none
    classes.txt, classes.json, id2label.json    the names of the classes, see `class_names.py`

Numbers of several bytes are 16-bit grey, or colours R + 256 G + 65536 B. An instance is a number together with a class. Pixels of a
thing's class with number 0 are a crowd: objects that nobody separated. `ignore_index` marks pixels of which nothing is known.

Axes: H W image.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data import Split, Task
from training.image_files import IMAGE_SUFFIXES, FileTree, describe_state, read_ids, require_size
from training.official_files import MOST_EXAMPLES, FileError
from training.readers.class_names import Names, find_names, to_categories
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import (
    SPLIT_NAMES,
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

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
LABEL_FOLDERS = ("labels", "masks", "annotations", "label", "mask", "annotation", "SegmentationClass")
INSTANCE_FOLDERS = ("instances", "instance")
MAP_SUFFIXES = (".png",)
GREY = 1 + 256 + 256**2  # what red, green and blue of one level are, as a number


class ClassIndex(Reader):
    """Class-index PNG files; `category_ids` are the values in the files."""

    name = "class_index"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "semantic",
        path: str,
        images: str | None = None,
        labels: str | None = None,
        instances: str | None = None,
        classes: Names | None = None,
        things: Collection[str] | None = None,
        ignore_index: int | Collection[int] = 255,
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"`.
            task: `"semantic"`; `"instance"` and `"panoptic"` need PNG files of instances, and to know what is a thing.
            path: the folder of the data set, or a zip archive of it.
            images: folder of this split's images, relative to `path`; looked for if not said. So are the next two.
            labels: folder of this split's classes.
            instances: folder of this split's numbers of instances.
            classes: the names, or a file with them, see `class_names.py`; looked for if not said.
            things: names of the classes with instances; not needed where the file of the classes says `isthing`.
            ignore_index: value, or values, of pixels of which nothing is known.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        tree = self._tree
        named, file = find_names(tree, classes)
        self._ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)
        parts = {
            "image": require_part(tree, split, images, IMAGE_FOLDERS, IMAGE_SUFFIXES, "images"),
            "map": require_part(tree, split, labels, LABEL_FOLDERS, MAP_SUFFIXES, "labels"),
        }
        if task != "semantic":
            numbers = find_part(tree, split, instances, INSTANCE_FOLDERS, MAP_SUFFIXES)
            if numbers is None and task == "instance":
                require_part(tree, split, instances, INSTANCE_FOLDERS, MAP_SUFFIXES, "instances")
            parts |= {} if numbers is None else {"instances": numbers}
        names = [name for folder in parts.values() for name in tree.below(folder)]
        state = (sorted(parts.items()), describe_state(file.path) if file else None, tree.stamp(names))
        self._open_index(state, partial(build_index, tree, parts), cache_dir)
        where = str(file or "the option `classes`")
        listed = to_categories(named, things, unsaid=False if task == "semantic" else None, where=where)
        self._check_classes([category.id for category in listed], where)
        self._is_thing = {category.id: category.is_thing for category in listed}
        if "instances" not in parts and task == "panoptic" and any(self._is_thing.values()):
            require_part(tree, split, instances, INSTANCE_FOLDERS, MAP_SUFFIXES, "instances")
        self._set_classes(listed, where)

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return any(
            find_part(tree, split, None, IMAGE_FOLDERS, IMAGE_SUFFIXES) is not None
            and find_part(tree, split, None, LABEL_FOLDERS, MAP_SUFFIXES) is not None
            for split in SPLIT_NAMES
        )

    def _check_classes(self, values: Collection[int], where: str) -> None:
        both = sorted(set(values) & set(self._ignored))
        if both:
            raise FileError(
                f"{where} names a class of value {both[0]}, which `ignore_index` makes ignored. Choose another `ignore_index`, or leave "
                "the class out."
            )

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        file, what = self._file(entry["map"]), f"the labels of image {entry['image_id']!r}"
        values = read_ids(file, what)
        present = distinct(values)
        unknown = [value for value in present if value not in self._is_thing and value not in self._ignored]
        if unknown:
            raise FileError(
                f"{file} (image {entry['image_id']!r}) has the values {unknown[:MOST_EXAMPLES]}, which are no classes and not ignored. "
                f"{explain_unknown(unknown, self._is_thing, self._ignored)} Name them with the option `classes`, or ignore them with "
                "`ignore_index`."
            )
        ignore_mask = None
        for value in self._ignored:
            if value in present:
                ignore_mask = values == value if ignore_mask is None else ignore_mask | (values == value)
        classes = [value for value in present if value in self._is_thing]
        if self.task == "semantic" or "instances" not in entry:
            return Labels(values.shape, [Segment(value, equal_to(values, value)) for value in classes], ignore_mask)
        file = self._file(entry["instances"])
        numbers = read_ids(file, f"the instances of image {entry['image_id']!r}")
        require_size(numbers.shape, values.shape, file, what)
        segments = [segment for value in classes for segment in self._split(values, numbers, value)]
        return Labels(values.shape, segments, ignore_mask)

    def _split(self, values: NDArray[np.int32], numbers: NDArray[np.int32], value: int) -> list[Segment]:
        """List the segments of a class: one of stuff, or one for each number of a thing's pixels."""
        if not self._is_thing[value]:
            return [Segment(value, equal_to(values, value))]
        return [
            Segment(value, partial(draw_both, values, value, numbers, number), number == 0)
            for number in distinct(numbers[values == value])
        ]


def explain_unknown(unknown: Collection[int], known: Collection[int], ignored: Collection[int]) -> str:
    """Say which values were expected, and what these may be."""
    text = f"The classes have the values {min(known)} to {max(known)}, ignored is {', '.join(map(str, ignored))}."
    if all(value % GREY == 0 for value in unknown):
        text += " They are greys that were saved as colours: save the files with one number a pixel (Pillow's mode L)."
    return text


def draw_both(values: NDArray[np.int32], value: int, numbers: NDArray[np.int32], number: int) -> Mask:
    """Draw the pixels of an instance of a class."""
    return (values == value) & (numbers == number)


def find_part(
    tree: FileTree, split: Split, option: str | None, roles: Collection[str], suffixes: Collection[str]
) -> str | None:
    """Find the folder of a part of a split, of the first of some names that holds such files; `None` if there is none."""
    if option is not None:
        return tree.find_folder(option.strip("/"))
    for role in roles:
        for name in SPLIT_NAMES[split]:
            for tail in (f"{role}/{name}", f"{name}/{role}"):
                folder = tree.find_folder(tail)
                if folder is not None and tree.below(folder, suffixes):
                    return folder
    return None


def require_part(
    tree: FileTree, split: Split, option: str | None, roles: Collection[str], suffixes: Collection[str], what: str
) -> str:
    """Find the folder of a part of a split.

    Raises:
        FileError: there is none.
    """
    folder = find_part(tree, split, option, roles, suffixes)
    if folder is None and option is not None:
        raise FileError(f"{tree.root} has no folder {option}, which the option `{what}` names.")
    if folder is None:
        name = SPLIT_NAMES[split][0]
        raise FileError(
            f"{tree.root} has no folder of {what} for the {split} split. Looked for {', '.join(f'{role}/{name}' for role in roles)} and "
            f"{name}/{next(iter(roles))} ..., also with {' and '.join(SPLIT_NAMES[split][1:])}. Name it with the option `{what}`."
        )
    return folder


def build_index(tree: FileTree, parts: Mapping[str, str]) -> IndexContent:
    """List images and their maps."""
    images = by_stem(tree, parts["image"], IMAGE_SUFFIXES)
    maps = {
        part: pair_by_name(tree, images, by_stem(tree, folder, MAP_SUFFIXES), "PNG file", folder)
        for part, folder in parts.items()
        if part != "image"
    }
    facts = IndexFacts()
    return IndexContent(file_columns(*maps), list_rows(tree, images, maps, facts, "PNG file"), facts)
