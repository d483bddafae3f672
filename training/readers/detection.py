"""Which format a folder is in."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from training.data import Task
from training.image_files import FileTree, name_some
from training.official_files import FileError
from training.readers.reader import SAVED_MARKERS, Reader

# Formats in the order in which they are tried, their classes, and what is looked for. Earlier ones are more particular: ADE20K and
# Mapillary Vistas are class-index folders too.
FORMATS: Mapping[str, tuple[str, str]] = {
    "cityscapes": ("cityscapes:Cityscapes", "leftImg8bit/{train,val} and gtFine/{train,val}"),
    "mapillary_vistas": (
        "mapillary:MapillaryVistas",
        "config.json or config_v*.json, and {training,validation}/images",
    ),
    "ade20k": (
        "ade20k:ADE20K",
        "images/{training,validation}, and annotations/ or annotations_instance/{training,validation}",
    ),
    "yolo": ("yolo:Yolo", "a YAML file with `names` and `train` or `val`"),
    "coco_panoptic": ("coco_panoptic:CocoPanoptic", "a JSON file with `panoptic` in its name"),
    "coco_instances": ("coco_instances:CocoInstances", "a JSON file with `images` and `annotations`"),
    "class_index": (
        "class_index:ClassIndex",
        "images/{train,val} and labels/, masks/ or annotations/{train,val} with PNG files",
    ),
}
COCO_BOTH = ("coco_panoptic", "coco_instances")


def detect(path: str | Path, task: Task | None = None) -> str:
    """Find out in which format a folder or zip archive is; see `training.data.detect_format`."""
    folder = Path(path).expanduser()
    if any((folder / marker).is_file() for marker in SAVED_MARKERS):
        return "hub"
    tree = FileTree.open(folder)
    fitting = [name for name in FORMATS if reader_class(name).fits(tree)]
    if fitting[:2] == list(COCO_BOTH):
        if task is None:
            raise FileError(
                f"{tree.root} has files of COCO's panoptic form and of its instances. Say which: 'coco_panoptic' or 'coco_instances', or "
                "the task."
            )
        return "coco_instances" if task == "instance" else "coco_panoptic"
    if fitting:
        return fitting[0]
    if tree.below("", (".parquet",)):
        return "hub"
    looked_for = "\n".join(f"  {name}: {what}" for name, (_, what) in FORMATS.items())
    raise FileError(
        f"{folder} is in none of the formats that are known here. Looked for:\n{looked_for}\n  hub: a data set that `datasets` has saved, or Parquet files\n"
        f"Found {len(tree)} files, such as {name_some(tree.names[:3]) or 'none'}. Name the format, and where its parts lie with its "
        "options."
    )


def reader_class(name: str) -> type[Reader]:
    """Import the reader of a format."""
    module, _, attribute = FORMATS[name][0].partition(":")
    return getattr(importlib.import_module(f"training.readers.{module}"), attribute)
