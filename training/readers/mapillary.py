"""Mapillary Vistas, versions 1.2 and 2.0.

    config_v1.2.json, config_v2.0.json, or config.json         `labels`: the classes in order, with `readable`, `instances`, `evaluate`
    {training,validation}/images/*.jpg
    {training,validation}/{v1.2,v2.0}/instances/*.png          16 bits: 256 * class + number of the instance; older archives have no
    {training,validation}/{v1.2,v2.0}/labels/*.png             folder for the version. `labels`: a class at each pixel (8 bits)

Classes that are not evaluated (`unlabeled`) are ignored: 65 remain in version 1.2, of which 37 have instances. There are no crowds in
these files; the panoptic files of Vistas, which know some, are of COCO's form (`coco_panoptic`, with the option `annotations`).

Axes: H W image.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from training.data import Split, Task
from training.image_files import IMAGE_SUFFIXES, FileTree, StoredFile, describe_state, read_ids
from training.official_files import Category, FileError, read_json
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import (
    Labels,
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
VERSIONS = ("1.2", "2.0")
IDS_PER_CLASS = 256


class MapillaryVistas(Reader):
    """Mapillary Vistas; `category_ids` are positions in the configuration, for `"panoptic"` one more, as its panoptic files have."""

    name = "mapillary_vistas"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "panoptic",
        path: str,
        version: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"`.
            task: what is reported.
            path: the folder of the data set, or a zip archive of it.
            version: `"1.2"` or `"2.0"`; `None` is the only one there, or 1.2, that of the papers.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        if version is not None and str(version).removeprefix("v") not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}.")
        tree = self._tree
        config, folder = find_version(tree, split, version)
        kind = "labels" if task == "semantic" else "instances"
        images = find_part(tree, f"{FOLDERS[split]}/images")
        maps = find_part(tree, f"{folder}/{kind}")
        names = [name for part in (images, maps) for name in tree.below(part)]
        build = partial(build_index, tree, images, maps)
        self._open_index((kind, describe_state(config.path), str(config), tree.stamp(names)), build, cache_dir)
        self._labels = read_labels(config)
        self._first = 1 if task == "panoptic" else 0
        listed = [Category(number + self._first, *label[:2]) for number, label in enumerate(self._labels) if label[2]]
        self._set_classes(listed, str(config))

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return bool(config_files(tree)) and any(tree.find_folders(f"{split}/images") for split in FOLDERS.values())

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        file = self._file(entry["map"])
        ids = read_ids(file, f"the labels of image {entry['image_id']!r}")
        divisor = 1 if self.task == "semantic" else IDS_PER_CLASS
        values = distinct(ids)
        if values and values[-1] // divisor >= len(self._labels):
            raise FileError(
                f"{file} (image {entry['image_id']!r}) has the class {values[-1] // divisor}, but the configuration lists "
                f"{len(self._labels)} classes. Is it of another version?"
            )
        segments = [
            Segment(value // divisor + self._first, equal_to(ids, value))
            for value in values
            if self._labels[value // divisor][2]
        ]
        evaluated = np.array([label[2] for label in self._labels])
        return Labels(ids.shape, segments, ~evaluated[ids // divisor])


def config_files(tree: FileTree) -> dict[str, str]:
    """Find the configurations: name by version; one that does not say its version counts as 1.2."""
    found = {}
    for name in tree.below("", (".json",)):
        basename = name.rpartition("/")[2]
        if basename in ("config.json", "config_v1.2.json"):
            found.setdefault("1.2", name)
        elif basename == "config_v2.0.json":
            found["2.0"] = name
    return found


def find_version(tree: FileTree, split: Split, version: str | None) -> tuple[StoredFile, str]:
    """Find the configuration of a version, and the folder of its labels.

    Raises:
        FileError: there is none.
    """
    configs, folder = config_files(tree), FOLDERS[split]
    chosen = next(iter(sorted(configs)), None) if version is None else str(version).removeprefix("v")
    if chosen not in configs:
        raise FileError(
            f"{tree.root} has no config_v{chosen or VERSIONS[0]}.json, which Mapillary Vistas should have here. Found: "
            f"{', '.join(configs.values()) or 'no configuration'}."
        )
    versioned = f"{folder}/v{chosen}"
    return tree.file(configs[chosen]), versioned if tree.find_folders(versioned) else folder


def find_part(tree: FileTree, tail: str) -> str:
    """Find a folder.

    Raises:
        FileError: there is none.
    """
    folder = tree.find_folder(tail)
    if folder is None:
        raise FileError(f"{tree.root} has no folder {tail}, which Mapillary Vistas should have here.")
    return folder


def read_labels(config: StoredFile) -> list[tuple[str, bool, bool]]:
    """Read the classes of a configuration: name, whether it has instances, whether it is evaluated."""
    content = read_json(config)  # type: ignore[arg-type] - it reads like a path
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, dict) for label in labels):
        raise FileError(f"{config} has no `labels`, a list of the classes.")
    for number, label in enumerate(labels):
        if not isinstance(label.get("readable", label.get("name")), str):
            raise FileError(f"{config}: label {number} has neither `readable` nor `name`.")
    return [
        (label.get("readable") or label["name"], bool(label.get("instances")), bool(label.get("evaluate", True)))
        for label in labels
    ]


def build_index(tree: FileTree, image_folder: str, map_folder: str) -> IndexContent:
    """List images and their maps."""
    images = by_stem(tree, image_folder, IMAGE_SUFFIXES)
    labels = pair_by_name(tree, images, by_stem(tree, map_folder, (".png",)), "PNG file", map_folder)
    facts = IndexFacts()
    return IndexContent(file_columns("map"), list_rows(tree, images, {"map": labels}, facts, "PNG file"), facts)
