"""Cityscapes: `leftImg8bit` and `gtFine` (or `gtCoarse`), by split and city.

    leftImg8bit/{train,val}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png        a label id at each pixel (8 bits)
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelTrainIds.png   a train id instead, 255 is ignored; others prepare it
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_instanceIds.png     16 bits: 1000 * label id + number of the instance

A class of objects has its bare label id, below 1000, where annotators saw a group that they could not separate ("cargroup"): a crowd.
19 labels are classes, with train ids 0 to 18; all others (out of the picture, rare, caravan, trailer ...) are ignored.

Axes: H W image.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from training.data import Split, Task
from training.image_files import IMAGE_SUFFIXES, FileTree, read_ids
from training.official_files import Category, FileError
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

FOLDERS: Mapping[Split, str] = {"train": "train", "validation": "val"}
IMAGES = "leftImg8bit"
ANNOTATIONS = ("gtFine", "gtCoarse")
LABEL_IDS, TRAIN_IDS, INSTANCE_IDS = "labelIds", "labelTrainIds", "instanceIds"
IDS_PER_LABEL = 1000
LAST_LABEL = 33
IGNORED_TRAIN_ID = 255
NUM_CLASSES = 19

# Label ids of the classes, in the order of their train ids; those from `FIRST_THING` on are objects.
FIRST_THING = 24
CLASSES: Mapping[int, str] = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


class Cityscapes(Reader):
    """Cityscapes; `category_ids` are its label ids, class ids its train ids (but for instances, which count from 0)."""

    name = "cityscapes"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "panoptic",
        path: str,
        annotations: str = "gtFine",
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"` (`val`).
            task: `"semantic"` and `"panoptic"` have 19 classes, `"instance"` 8.
            path: folder with `leftImg8bit` and `gtFine`, or with the zip archives of them.
            annotations: `"gtFine"` or `"gtCoarse"`.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        if annotations not in ANNOTATIONS:
            raise ValueError(f"annotations must be one of {', '.join(ANNOTATIONS)}, got {annotations!r}.")
        folders = [find_part(self._tree, part, split) for part in (IMAGES, annotations)]
        names = [name for folder in folders for name in self._tree.below(folder, IMAGE_SUFFIXES)]
        build = partial(build_index, self._tree, *folders, annotations, task)
        facts = self._open_index((task, annotations, self._tree.stamp(names)), build, cache_dir)
        self._kind = facts["kind"]
        listed = [Category(key, name, key >= FIRST_THING) for key, name in CLASSES.items()]
        self._set_classes(listed, "Cityscapes")

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return any(
            tree.find_folders(f"{IMAGES}/{split}") and any(tree.find_folders(f"{part}/{split}") for part in ANNOTATIONS)
            for split in FOLDERS.values()
        )

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        file, what = self._file(entry["map"]), f"the labels of image {entry['image_id']!r}"
        ids = read_ids(file, what)
        segments, ignored = [], []
        for value in distinct(ids):
            label, is_group = self._label_of(value, f"{file} (image {entry['image_id']!r})")
            if label in CLASSES:
                segments.append(Segment(label, equal_to(ids, value), is_group))
            else:
                ignored.append(value)
        ignore_mask = None
        for value in ignored:
            ignore_mask = (ids == value) if ignore_mask is None else ignore_mask | (ids == value)
        return Labels(ids.shape, segments, ignore_mask)

    def _label_of(self, value: int, where: str) -> tuple[int, bool]:
        """Look up the label id of a value, and whether it is a group; a label that is no class is one below all."""
        nothing = -1
        if self._kind == TRAIN_IDS:
            if value == IGNORED_TRAIN_ID:
                return nothing, False
            if value >= NUM_CLASSES:
                raise FileError(f"{where} has the train id {value}. Expected 0 to {NUM_CLASSES - 1}, or 255.")
            return list(CLASSES)[value], False
        label = value // IDS_PER_LABEL if self._kind == INSTANCE_IDS and value >= IDS_PER_LABEL else value
        if label > LAST_LABEL:
            raise FileError(f"{where} has the value {value}: no label of Cityscapes, whose ids end at {LAST_LABEL}.")
        return label, self._kind == INSTANCE_IDS and value < IDS_PER_LABEL and label >= FIRST_THING


def find_part(tree: FileTree, part: str, split: Split) -> str:
    """Find the folder of the images, or of the labels.

    Raises:
        FileError: there is none.
    """
    folder = tree.find_folder(f"{part}/{FOLDERS[split]}")
    if folder is None:
        raise FileError(f"{tree.root} has no folder {part}/{FOLDERS[split]}, which Cityscapes should have here.")
    return folder


def build_index(tree: FileTree, image_folder: str, label_folder: str, annotations: str, task: Task) -> IndexContent:
    """List images and their maps."""
    found = by_stem(tree, image_folder, IMAGE_SUFFIXES, f"_{IMAGES}")
    kinds = (LABEL_IDS, TRAIN_IDS) if task == "semantic" else (INSTANCE_IDS,)
    maps = {kind: by_stem(tree, label_folder, (".png",), f"_{annotations}_{kind}") for kind in kinds}
    kind = next((kind for kind in kinds if maps[kind]), kinds[0])
    what = f"{annotations}_{kind}.png"
    paired = pair_by_name(tree, found, maps[kind], what, label_folder)
    # The last part of a name is unique: it begins with the name of the city.
    images, labels = ({PurePosixPath(key).name: name for key, name in names.items()} for names in (found, paired))
    facts = IndexFacts({"kind": kind})
    return IndexContent(file_columns("map"), list_rows(tree, images, {"map": labels}, facts, what), facts)
