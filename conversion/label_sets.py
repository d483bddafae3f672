"""Class names of the data sets on which the original's models are trained, in the order of their class ids.

Each file of `labels/` is a set: `name`, `source` (where it is defined) and `classes`, of which each has `id` (0, 1, ...), `name` and
`isthing`. A model's class ids follow from the data set's registration in Detectron2, Mask2Former and MP-Former, so a set is found by
the registered name in `DATASETS.TEST` or `DATASETS.TRAIN`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conversion import ConversionError

FOLDER = Path(__file__).parent / "labels"
MAX_FILE_BYTES = 2**20

# registered names -> file
DATA_SETS = {
    r"coco_20(14|17)_(train|val|val_100|test|test-dev|minival|valminusminival)": "coco_instance_80",
    r"coco_2017_(train|val|val_100)_panoptic(_with_sem_seg)?": "coco_panoptic_133",
    r"ade20k_(sem_seg|panoptic)_(train|val)": "ade20k_150",
    r"ade20k_instance_(train|val)": "ade20k_instance_100",
    r"cityscapes_fine_(sem_seg|panoptic)_(train|val|test)": "cityscapes_19",
    r"cityscapes_fine_instance_seg_(train|val|test)": "cityscapes_instance_8",
    r"mapillary_vistas_(sem_seg|panoptic)_(train|val)": "mapillary_vistas_65",
}


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set.

    Attributes:
        name: of the data set.
        source: where the classes are defined.
        classes: their names, by class id.
        things: of each class, whether it has instances.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    things: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def id2label(self) -> dict[int, str]:
        """Class id -> name."""
        return dict(enumerate(self.classes))

    @cached_property
    def stuff_ids(self) -> tuple[int, ...]:
        """Ids of the classes without instances; panoptic results fuse them."""
        return tuple(index for index, thing in enumerate(self.things) if not thing)


def find_label_set(data_sets: Sequence[str], num_classes: int) -> LabelSet | None:
    """Return the set of the first of these registered data sets that is known and has `num_classes` classes, else `None`."""
    for data_set in data_sets:
        for pattern, file in DATA_SETS.items():
            if (
                re.fullmatch(pattern, data_set)
                and len(labels := read_label_set(FOLDER / f"{file}.json")) == num_classes
            ):
                return labels
    return None


def read_label_set(file: Path) -> LabelSet:
    """Read a file of classes, one of ours or of the same form.

    Raises:
        ConversionError: names the file and what is wrong in it.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConversionError(f"{file}: larger than {MAX_FILE_BYTES} bytes, so not a file of classes.")
        content = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise ConversionError(f"{file}: expected an object with `name`, `source` and a list `classes`.")
    rows = content["classes"]
    for index, row in enumerate(rows):
        check_class(row, index, file)
    names = tuple(row["name"] for row in rows)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConversionError(f"{file}: two classes are called {twice!r}. Give each a name of its own.")
    if not names:
        raise ConversionError(f"{file}: it has no class.")
    return LabelSet(
        name=str(content.get("name", file.stem)),
        source=str(content.get("source", "")),
        classes=names,
        things=tuple(row["isthing"] for row in rows),
    )


def check_class(row: object, index: int, file: Path) -> None:
    """Refuse an entry that is not `{"id": index, "name": ..., "isthing": ...}`."""
    is_class = (
        isinstance(row, dict)
        and type(row.get("id")) is int
        and isinstance(row.get("name"), str)
        and isinstance(row.get("isthing"), bool)
    )
    if not is_class or row["id"] != index or not row["name"].strip():
        raise ConversionError(
            f"{file}: entry {index} of `classes` must be an object with `id` {index}, a `name`, and `isthing` true or false, got "
            f"{str(row)[:80]}."
        )
