"""What all readers share: classes by task, the row of an image, access by position.

A reader has an `index` with a row for each image, and draws the segments of one image when it is asked for: `_read` lists them as
`Segment`, and the base class selects, joins and draws those that the task reports.

    task        segments                            crowd regions
    instance    one mask a thing                    of things
    panoptic    one mask a thing or stuff region    of all classes
    semantic    one mask a class                    none: they are pixels of their class, where no segment is

Axes: n segments, c crowd regions, H W image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data import SPLITS, TASKS, SegmentationRow, Split, Task
from training.image_files import FileTree, StoredFile, name_some, read_image, read_size, require_size
from training.official_files import Category, FileError
from training.readers.index import FILE_COLUMNS, IndexContent, IndexFacts, load_or_build

if TYPE_CHECKING:
    import datasets

# How data sets call the splits.
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
}
NO_FILE = {name: "" if kind == "string" else 0 for name, kind in FILE_COLUMNS.items()}
SAVED_MARKERS = ("state.json", "dataset_dict.json")  # of a folder that `datasets` has saved
SMALL_ID = 2**16  # up to here numbers are counted instead of sorted

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """A segment, or a crowd region, that can be drawn.

    Attributes:
        category_id: its class, as the data set numbers it.
        draw: makes its mask, bool (H, W).
        is_crowd: many objects that nobody separated.
    """

    category_id: int
    draw: Callable[[], Mask]
    is_crowd: bool = False


@dataclass(frozen=True)
class Labels:
    """What is known of an image.

    Attributes:
        size: height and width.
        segments: in the order of the data set.
        ignore_mask: bool (H, W), True where no label is known; `None` is nowhere.
    """

    size: tuple[int, int]
    segments: Sequence[Segment] = field(default_factory=tuple)
    ignore_mask: Mask | None = None


class ClassTable:
    """The classes that a task reports, in the order of their official ids: `0`, `1`, ... without gaps."""

    id2label: dict[int, str]
    thing_ids: tuple[int, ...]
    stuff_ids: tuple[int, ...]
    category_ids: dict[int, int]

    def __init__(self, split: Split, task: Task) -> None:
        """Check the names of split and task."""
        for name, value, choices in (("split", split, SPLITS), ("task", task, TASKS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        self.split = split
        self.task = task

    def _set_classes(self, categories: Iterable[Category], source: str) -> None:
        listed = sorted(categories, key=lambda category: category.id)
        reported = [category for category in listed if category.is_thing or self.task != "instance"]
        if not reported:
            raise FileError(f"{source} has no classes that are things, which task 'instance' needs.")
        self.id2label = {number: category.name for number, category in enumerate(reported)}
        self.category_ids = {number: category.id for number, category in enumerate(reported)}
        self.thing_ids = tuple(number for number, category in enumerate(reported) if category.is_thing)
        self.stuff_ids = tuple(number for number, category in enumerate(reported) if not category.is_thing)
        self._class_of = {category.id: number for number, category in enumerate(reported)}

    def _make_row(self, image_id: int | str, image: Image.Image, labels: Labels) -> SegmentationRow:
        """Draw the segments that the task reports."""
        known = [segment for segment in labels.segments if segment.category_id in self._class_of]
        segments = [segment for segment in known if not segment.is_crowd]
        crowds = [segment for segment in known if segment.is_crowd]
        draw = self._draw_classes if self.task == "semantic" else self._draw_each
        masks, classes = draw(segments, labels.size)
        if self.task == "semantic":
            masks, classes = self._add_crowds(masks, classes, crowds)
            crowds = []
        row: SegmentationRow = {
            "image_id": image_id,
            "image": image,
            "mask_labels": masks,
            "class_labels": classes,
        }
        crowd_masks, crowd_labels = self._draw_each(crowds, labels.size)
        if len(crowd_masks):
            row |= {"crowd_masks": crowd_masks, "crowd_labels": crowd_labels}
        if labels.ignore_mask is not None and labels.ignore_mask.any():
            row |= {"ignore_mask": labels.ignore_mask}
        return row

    def _draw_each(
        self, segments: Sequence[Segment], size: tuple[int, int]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Draw one mask for each segment that has pixels."""
        masks = np.zeros((len(segments), *size), dtype=bool)
        classes = np.zeros(len(segments), dtype=np.int64)
        count = 0
        for segment in segments:
            mask = segment.draw()
            if mask.any():
                masks[count], classes[count] = mask, self._class_of[segment.category_id]
                count += 1
        return masks[:count], classes[:count]

    def _draw_classes(
        self, segments: Sequence[Segment], size: tuple[int, int]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Draw one mask for each class, in the order of the classes."""
        drawn: dict[int, Mask] = {}
        for segment in segments:
            class_id, mask = self._class_of[segment.category_id], segment.draw()
            drawn[class_id] = drawn[class_id] | mask if class_id in drawn else mask
        return stack({class_id: mask for class_id, mask in drawn.items() if mask.any()}, size)

    def _add_crowds(
        self, masks: NDArray[np.bool_], classes: NDArray[np.int64], crowds: Sequence[Segment]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Add crowd regions to the masks of their classes, where no segment is; of two crowds the first has a pixel."""
        if not crowds:
            return masks, classes
        drawn = dict(zip(classes.tolist(), masks, strict=True))
        taken = masks.any(axis=0)
        for crowd in crowds:
            class_id, mask = self._class_of[crowd.category_id], crowd.draw() & ~taken
            taken |= mask
            drawn[class_id] = drawn[class_id] | mask if class_id in drawn else mask
        return stack({class_id: mask for class_id, mask in drawn.items() if mask.any()}, masks.shape[1:])


class Reader(ClassTable, ABC):
    """A data set in files, read by position in any order and from any process.

    Attributes:
        index: a `datasets.Dataset` with a row for each image.
        notes: sentences about what was left out, such as annotations without a pixel.
        problems: position -> sentence of the images of which it is known already that they cannot be read.
    """

    name: ClassVar[str]  # the key of `training.data.DATASETS`
    index: "datasets.Dataset"
    notes: list[str]
    problems: dict[int, str]

    def __init__(self, split: Split, task: Task, path: str | Path) -> None:
        """List the files."""
        super().__init__(split, task)
        self.path = Path(path).expanduser().absolute()
        self._tree: FileTree | None = FileTree.open(self.path)
        self._root = self._tree.root

    def _open_index(
        self, state: object, build: Callable[[], IndexContent], cache_dir: str | Path | None
    ) -> dict[str, Any]:
        """Open the index, made first if need be, and forget the list of files; returns what the format wrote of the whole.

        Raises:
            FileError: no image can be read at all.
        """
        self.index, facts = load_or_build(self.name, (str(self.path), self.split, state), build, cache_dir)
        self.notes, self.problems = facts.notes, facts.problems
        if len(self.problems) == len(self.index):
            first = f" The first: {self.problems[0]}" if self.problems else ""
            raise FileError(
                f"{self.path}: none of {len(self.index)} images of the {self.split} split can be used.{first}"
            )
        self._tree = None  # workers read the files that the index names
        return facts.content

    def _select(self, numbers: NDArray[np.int64]) -> None:
        """Keep some images alone."""
        self.index = self.index.select(numbers)
        self.problems = {
            position: self.problems[number]
            for position, number in enumerate(numbers.tolist())
            if number in self.problems
        }
        if not len(self.index):
            raise FileError(f"{self.path}: no image of the {self.split} split has an object.")

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[SegmentationRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SegmentationRow:
        """Read the image and draw its segments; a negative index counts from the end.

        Raises:
            FileError: a file is missing or broken, or its labels make no sense; names the file and the image.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image {index} of {len(self)}: the index must lie below the number of images.")
        number = int(index) % len(self)
        if number in self.problems:
            raise FileError(self.problems[number])
        entry = self.index[number]
        file = self._file(entry["image"])
        what = f"image {entry['image_id']!r}"
        image = read_image(file, what)
        labels = self._read(entry)
        require_size((image.height, image.width), labels.size, file, f"the annotation of {what}")
        return self._make_row(entry["image_id"], image, labels)

    def size(self, index: int) -> tuple[int, int]:
        """Look up height and width of an image without reading it; zeros if it cannot be read."""
        entry = self.index[int(index)]
        return entry["height"], entry["width"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.split!r}, {self.task!r}, {len(self)} images)"

    @abstractmethod
    def _read(self, entry: Mapping[str, Any]) -> Labels:
        """Read the labels of an image, of which the index has this row."""

    def _file(self, record: Mapping[str, Any]) -> StoredFile:
        return StoredFile.from_record(record, self._root)


class IndexedClasses(Reader):
    """A reader whose index has the class of each segment, in the columns `CLASS_COLUMNS`."""

    def classes_of(self, index: int) -> list[int]:
        """Look up the classes of an image's segments without reading it: one a segment, for `"semantic"` each once.

        A crowd is no segment, but for `"semantic"` its pixels are of its class.
        """
        return self._choose(self._class_index[int(index)])

    def classes_of_all(self) -> list[list[int]]:
        """Look up `classes_of` of every image at once."""
        return [self._choose(entry) for entry in self._class_index]

    @cached_property
    def _class_index(self) -> "datasets.Dataset":
        return self.index.select_columns(list(CLASS_COLUMNS))

    def _choose(self, entry: Mapping[str, Any]) -> list[int]:
        is_semantic = self.task == "semantic"
        categories = [*entry["categories"], *(entry["crowd_categories"] if is_semantic else ())]
        found = [self._class_of[category] for category in categories if category in self._class_of]
        return sorted(set(found)) if is_semantic else found


CLASS_COLUMNS = {"categories": ["int64"], "crowd_categories": ["int64"]}


def class_columns(segments: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """List the categories of segments and of crowds, from `category` and `crowd` of each."""
    listed = list(segments)
    return {
        name: [segment["category"] for segment in listed if bool(segment["crowd"]) == is_crowd]
        for name, is_crowd in zip(CLASS_COLUMNS, (False, True), strict=True)
    }


def file_columns(*names: str) -> dict[str, Any]:
    """Types of the columns that all indices have, and of further columns for files."""
    return {
        "image_id": "string",
        "height": "int32",
        "width": "int32",
        **{name: dict(FILE_COLUMNS) for name in ("image", *names)},
    }


def stack(drawn: Mapping[int, Mask], size: Sequence[int]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Make arrays of masks by class, in the order of the classes."""
    classes = np.array(sorted(drawn), dtype=np.int64)
    masks = np.stack([drawn[key] for key in classes.tolist()]) if drawn else np.zeros((0, *size), dtype=bool)
    return masks, classes


def equal_to(ids: NDArray[np.integer], value: int) -> Callable[[], Mask]:
    """Return a function that draws the pixels of one value of a map."""
    return lambda: ids == value


def distinct(ids: NDArray[np.integer]) -> list[int]:
    """List the values of a map, in order; none is below 0."""
    if ids.size and ids.max() < SMALL_ID:
        return np.flatnonzero(np.bincount(ids.ravel())).tolist()
    return np.unique(ids).tolist()


def pair_by_name(
    tree: FileTree, images: Mapping[str, str], labels: Mapping[str, str], what: str, folder: str
) -> dict[str, str]:
    """Choose the files of labels that belong to images, by their names without endings; some images may lack theirs.

    Args:
        tree: holds both.
        images: file of each image, by its name.
        labels: file of each image's labels, by the same name.
        what: the labels are, for messages.
        folder: of the labels, for messages.

    Raises:
        FileError: there are no images, or none has labels.
    """
    if not images:
        raise FileError(f"{tree.root} holds no images for {folder}.")
    missing = images.keys() - labels.keys()
    if len(missing) == len(images):
        raise FileError(f"None of {len(images)} images has a {what} in {tree.root / folder}: {name_some(missing)}.")
    return {name: labels[name] for name in images if name in labels}


def list_rows(
    tree: FileTree,
    images: Mapping[str, str],
    parts: Mapping[str, Mapping[str, str | None]],
    facts: IndexFacts,
    what: str,
) -> Iterator[dict[str, Any]]:
    """Write a row for each image, with its size and its files; what keeps it from being read goes into the facts.

    Args:
        tree: holds the files.
        images: file of each image, by its id.
        parts: by column, the files of labels by the id of their image; `None` where there need not be one.
        facts: of the index.
        what: the labels are, for messages.
    """
    for number, (image_id, name) in enumerate(images.items()):
        file = tree.file(name)
        row = {"image_id": image_id, "height": 0, "width": 0, "image": file.to_record(tree.root)}
        try:
            row["height"], row["width"] = read_size(file, f"image {image_id!r}")
        except FileError as error:
            facts.add_problem(number, str(error), file)
        for part, labels in parts.items():
            if image_id not in labels:
                facts.add_problem(number, f"{file} (image {image_id!r}) has no {what}.")
            labels_file = labels.get(image_id)
            row[part] = NO_FILE if labels_file is None else tree.file(labels_file).to_record(tree.root)
        yield row


def by_stem(tree: FileTree, folder: str, suffixes: Sequence[str], ending: str = "") -> dict[str, str]:
    """List the files below a folder by their paths in it without `ending` and suffix.

    Raises:
        FileError: two files have one name, such as `1.jpg` and `1.png`.
    """
    found: dict[str, str] = {}
    for name in tree.below(folder, suffixes):
        stem = name.rpartition(".")[0].removeprefix(f"{folder}/" if folder else "")
        if not stem.endswith(ending):
            continue
        key = stem.removesuffix(ending)
        if key in found:
            raise FileError(f"{tree.root} holds {found[key]} and {name}. An image must have one file: remove one.")
        found[key] = name
    return dict(sorted(found.items()))
