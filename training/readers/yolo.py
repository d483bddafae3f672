"""YOLO segmentation: a text file of polygons for each image, and a YAML file that names classes and folders.

    data.yaml                   `names` (a list, or number -> name), `train` and `val`: folders, lists of them, or text files of images
    images/{train,val}/*.jpg
    labels/{train,val}/*.txt    one object a line: `class x0 y0 x1 y1 ...`, in shares of width and height

The labels of `.../images/.../NAME.jpg` are `.../labels/.../NAME.txt`; an image without this file has no objects. All classes are
things, masks may overlap, and there are no crowds. A pixel belongs to an object when its centre lies inside.

Axes: H W image.
"""

import posixpath
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml

from mpformer_hf.mask_encoding import MIN_POLYGON_NUMBERS, rasterize_polygons
from training.data import SPLITS, Split, Task
from training.image_files import IMAGE_SUFFIXES, FileTree, StoredFile, describe_state, name_some
from training.official_files import Category, FileError
from training.readers.class_names import parse_names
from training.readers.coco_files import names_split
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import SPLIT_NAMES, Labels, Mask, Reader, Segment, file_columns, list_rows

YAML_SUFFIXES = (".yaml", ".yml")
TOLERANCE = 1e-3  # by which a share may leave 0 to 1: rounding, and half a pixel of small images
BOX_NUMBERS = 4


class Yolo(Reader):
    """A data set in the form of YOLO segmentation; `category_ids` are the numbers in the text files."""

    name = "yolo"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "instance",
        path: str,
        data: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"` (`val`).
            task: `"instance"`; `"panoptic"` reports the same, as there is no stuff, and `"semantic"` joins the objects of a class.
            path: the folder of the data set, or a zip archive of it.
            data: the YAML file, relative to `path`; looked for if not said.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        tree = self._tree
        file = find_yaml(tree, data)
        settings = read_yaml(file)
        images = find_images(tree, split, settings, file)
        self._source = str(file)
        state = (str(file), describe_state(file.path), tree.stamp([*images, *tree.below("", (".txt",))]))
        self._open_index(state, partial(build_index, tree, images), cache_dir)
        listed = [
            Category(entry.value, entry.name, True) for entry in parse_names(settings["names"], f"{file}: `names`")
        ]
        self._set_classes(listed, str(file))

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return any("names" in settings for settings in map(peek, (tree.file(name) for name in yaml_files(tree))))

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        size = (entry["height"], entry["width"])
        if not entry["labels"]["path"]:
            return Labels(size)
        file = self._file(entry["labels"])
        try:
            lines = file.read_bytes().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{file}, the labels of image {entry['image_id']!r}, cannot be read: {error}.") from None
        objects = [
            read_line(line, f"{file}, line {number} (image {entry['image_id']!r})")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        known = self.category_ids.values()
        for number, (category, _) in enumerate(objects, start=1):
            if category not in known:
                raise FileError(
                    f"{file} (image {entry['image_id']!r}): object {number} has the class {category}, which is not among the `names` of "
                    f"{self._source}."
                )
        return Labels(size, [Segment(category, partial(fill, corners, size)) for category, corners in objects])


def read_line(line: str, where: str) -> tuple[int, np.ndarray]:
    """Read an object: its class, and its corners as shares of width and height, float64 (corners, 2).

    Raises:
        FileError: it is no polygon, or lies outside of the image.
    """
    words = line.split()
    try:
        category, numbers = int(float(words[0])), np.array([float(word) for word in words[1:]])
    except (ValueError, OverflowError):
        raise FileError(f"{where} must be numbers: the class, then x and y of each corner. Got: {line[:80]}") from None
    if len(numbers) == BOX_NUMBERS:
        raise FileError(f"{where} has a box instead of a polygon. Boxes alone do not say where an object is.")
    if len(numbers) < MIN_POLYGON_NUMBERS or len(numbers) % 2:
        raise FileError(
            f"{where} has {len(numbers)} numbers after the class. Expected x and y of at least three corners."
        )
    if not (numbers >= -TOLERANCE).all() or not (numbers <= 1 + TOLERANCE).all():
        raise FileError(
            f"{where} has the corners {numbers.min():g} to {numbers.max():g}. Expected shares of the image's width and height, 0 to 1."
        )
    return category, numbers.reshape(-1, 2)


def fill(corners: np.ndarray, size: tuple[int, int]) -> Mask:
    """Fill a polygon of shares of width and height."""
    height, width = size
    return rasterize_polygons([(corners * (width, height)).reshape(-1).tolist()], height, width).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def yaml_files(tree: FileTree) -> list[str]:
    """List the YAML files, those nearest to the root first."""
    return sorted(tree.below("", YAML_SUFFIXES), key=lambda name: (name.count("/"), name))


def peek(file: StoredFile) -> Mapping[str, Any]:
    """Read a YAML file that may be of another kind; then it is empty."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) and ({"train", "val"} & content.keys()) else {}


def find_yaml(tree: FileTree, data: str | None) -> StoredFile:
    """Find the YAML file of a data set.

    Raises:
        FileError: there is none, or several fit.
    """
    if data is not None:
        return tree.locate(data)
    found = [name for name in yaml_files(tree) if "names" in peek(tree.file(name))]
    if len(found) > 1:
        raise FileError(
            f"{tree.root} has several YAML files with `names`: {name_some(found)}. Name one with the option `data`."
        )
    if not found:
        raise FileError(f"{tree.root} has no YAML file with `names` and `train` or `val`, such as data.yaml.")
    return tree.file(found[0])


def read_yaml(file: StoredFile) -> Mapping[str, Any]:
    """Read the YAML file.

    Raises:
        FileError: it cannot be read, or has no `names`.
    """
    try:
        content = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"{file} is no valid YAML: {error}") from None
    if not isinstance(content, dict) or "names" not in content:
        raise FileError(f"{file} has no `names`, the classes.")
    return content


def find_images(tree: FileTree, split: Split, settings: Mapping[str, Any], file: StoredFile) -> list[str]:
    """List the images of a split.

    Raises:
        FileError: the YAML file does not name the split, or nothing is there.
    """
    key = next((name for name in SPLIT_NAMES[split] if settings.get(name)), None)
    if key is None:
        raise FileError(f"{file} has no `{SPLIT_NAMES[split][0]}`, the images of the {split} split.")
    places = settings[key] if isinstance(settings[key], list) else [settings[key]]
    found: dict[str, None] = {}
    for place in places:
        images = images_at(tree, str(place))
        if not images:
            raise FileError(
                f"{file}: `{key}` names {place}, but there is no image in a folder of this name below {tree.root}."
            )
        found |= dict.fromkeys(images)
    return list(found)


def images_at(tree: FileTree, place: str) -> list[str]:
    """List the images of a folder, or those that a text file names, one a line.

    Paths may begin where the author's folders did, so the longest end of a path that exists here counts.
    """
    if place.endswith(".txt"):
        name = longest_end(tree, place, folder=False)
        lines = tree.file(name).read_bytes().decode("utf-8").splitlines() if name else []
        lines = [line.strip() for line in lines if line.strip()]
        images = [longest_end(tree, line, folder=False) for line in lines]
        missing = [line for line, image in zip(lines, images, strict=True) if image is None]
        if missing:
            raise FileError(
                f"{tree.root / place} names images that are missing below {tree.root}: {name_some(missing)}."
            )
        return [image for image in images if image is not None]
    folder = longest_end(tree, place, folder=True)
    return [] if folder is None else tree.below(folder, IMAGE_SUFFIXES)


def longest_end(tree: FileTree, place: str, *, folder: bool) -> str | None:
    """Find a file or folder by the longest end of its path that is one here.

    Of the path of a folder nothing may be missing behind the data set's own folder, nor the name of a split: the end `images` of
    `../train/images` would hold the images of all splits.
    """
    normal = posixpath.normpath(place.replace("\\", "/"))
    parts = [part for part in normal.split("/") if part not in ("", "..")]
    if folder and parts in (["."], []):
        return ""
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if not folder and end in tree:
            return end
        is_whole = start == 0 or parts[start - 1] == tree.root.name or any(names_split(end, split) for split in SPLITS)
        found = tree.find_folders(end) if folder and is_whole else []
        if found:
            return found[0]
    return None


def label_name(image: str) -> str:
    """Say where the labels of an image are.

    >>> label_name("coco/images/train/1.jpg")
    'coco/labels/train/1.txt'
    """
    before, slash, after = f"/{image}".rpartition("/images/")
    path = f"{before}/labels/{after}" if slash else f"/{image}"
    return str(PurePosixPath(path).with_suffix(".txt")).removeprefix("/")


def build_index(tree: FileTree, images: list[str]) -> IndexContent:
    """List images and their text files.

    Raises:
        FileError: no image has one.
    """
    labels = {image: label_name(image) for image in images}
    if not any(name in tree for name in labels.values()):
        raise FileError(
            f"None of {len(images)} images has a text file of labels, such as {tree.root / next(iter(labels.values()))}."
        )
    ids = [image.rpartition(".")[0] for image in images]
    if len(set(ids)) < len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise FileError(
            f"{tree.root} has two images {twice}, with different endings. An image must have one file: remove one."
        )
    facts = IndexFacts()
    files = dict(zip(ids, images, strict=True))
    texts = {key: labels[image] if labels[image] in tree else None for key, image in files.items()}
    return IndexContent(file_columns("labels"), list_rows(tree, files, {"labels": texts}, facts, "text file"), facts)
