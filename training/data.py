"""Data sets of segmented images: one row an image, one binary mask a segment.

    name, or "auto" ── DATASETS ── class(split, task=..., path=..., ...) ── rows: SegmentationRow

Every data set has the interface `SegmentationDataset` and gives rows of the form `SegmentationRow`, so the training loop and
the evaluation never ask where a row came from; `load_segmentation_dataset` finds a data set by its name, and `detect_format`
finds the name for a folder. A class is imported when it is looked up: digit scenes need neither `datasets` nor pycocotools.

Axes: n segments, c crowd regions, H W image.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation"]
Task = Literal["instance", "panoptic", "semantic"]
SPLITS: tuple[Split, ...] = ("train", "validation")
TASKS: tuple[Task, ...] = ("instance", "panoptic", "semantic")


class SegmentationRow(TypedDict):
    """An image and its segments.

    `image_id` is unique in its data set, `image` is RGB as it is stored (EXIF rotation is never applied: labels belong to stored
    pixels), `mask_labels` is bool (n, H, W) with True inside the segment, `class_labels` is int64 (n,). An image without segments
    has zero of both. Masks may overlap.

    `crowd_masks`, bool (c, H, W), and `crowd_labels`, int64 (c,), are regions of many objects of a class that nobody separated: no
    segments, but scores know them. `ignore_mask`, bool (H, W), is True where no label is known. A row without crowd regions, or in
    which all is known, may lack these keys.

    `skipped` is there where the row takes the place of others that cannot be read (`training.broken_images`): position and reason of
    each of these.
    """

    image_id: int | str
    image: Image.Image
    mask_labels: NDArray[np.bool_]
    class_labels: NDArray[np.int64]
    crowd_masks: NotRequired[NDArray[np.bool_]]
    crowd_labels: NotRequired[NDArray[np.int64]]
    ignore_mask: NotRequired[NDArray[np.bool_]]
    skipped: NotRequired[tuple[tuple[int, str], ...]]


class SegmentationDataset(Protocol):
    """What the training loop and the evaluation use of a data set; rows are read by position, in any order.

    A data set with official ids of its classes also has `category_ids`, a dictionary of class id to official id. One that knows of
    images that cannot be read has `problems`, a dictionary of position to sentence. One that knows the classes of an image without
    reading it has `classes_of(index)`, a list with the class of each segment.
    """

    id2label: dict[int, str]
    thing_ids: tuple[int, ...]
    stuff_ids: tuple[int, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> SegmentationRow: ...


# ---------------------------------------------------------------------------------------------------------------------
# Finding a data set
# ---------------------------------------------------------------------------------------------------------------------

AUTO = "auto"  # the format of the folder is found out


class DatasetRegistry(MutableMapping[str, Callable[..., SegmentationDataset]]):
    """Classes of data sets by name; `"module:name"` is imported when it is looked up."""

    def __init__(self, entries: Mapping[str, Callable[..., SegmentationDataset] | str]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Callable[..., SegmentationDataset]:
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __setitem__(self, name: str, entry: Callable[..., SegmentationDataset] | str) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


DATASETS = DatasetRegistry(
    {
        "digit_scenes": "training.digit_scenes:DigitScenes",
        AUTO: "training.data:open_detected",
        "coco_instances": "training.readers.coco_instances:CocoInstances",
        "coco_panoptic": "training.readers.coco_panoptic:CocoPanoptic",
        "ade20k": "training.readers.ade20k:ADE20K",
        "cityscapes": "training.readers.cityscapes:Cityscapes",
        "mapillary_vistas": "training.readers.mapillary:MapillaryVistas",
        "class_index": "training.readers.class_index:ClassIndex",
        "yolo": "training.readers.yolo:Yolo",
        "hub": "training.readers.hub:Hub",
        "hub_stream": "training.readers.hub:HubStream",
    }
)


def load_segmentation_dataset(name: str, split: Split, **options: Any) -> SegmentationDataset:
    """Build one split of a data set.

    Args:
        name: a key of `DATASETS`; `"auto"` finds out the format of `options["path"]`.
        split: `"train"` or `"validation"`.
        options: arguments of the data set's class, such as `task` and `image_size` of `DigitScenes`, or `path` of all others.

    Raises:
        ValueError: the options make no sense, or the data set cannot be read (`FileError`). An image of the training split that is
            broken or missing is an error when it is read; one of the validation split is one now, because scores without it would
            be of other data.
    """
    dataset = open_segmentation_dataset(name, split, **options)
    problems: Mapping[int, str] = getattr(dataset, "problems", {})
    if split == "validation" and problems:
        from training.official_files import FileError  # noqa: PLC0415 - digit scenes need no files

        first = next(iter(problems.values()))
        raise FileError(
            f"{len(problems)} of {len(dataset)} validation images cannot be read. The first: {first} "
            "`python -m training.check_data` lists all."
        )
    return dataset


def open_segmentation_dataset(name: str, split: Split, **options: Any) -> SegmentationDataset:
    """Build one split of a data set, with whatever it has of images that cannot be read; see `load_segmentation_dataset`."""
    name = resolve_name(name, options)
    dataset_class = DATASETS[name]
    known = inspect.signature(dataset_class).parameters
    unknown = [option for option in options if option not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"The data set {name} has no option {unknown[0]!r}. Its options: "
            f"{', '.join(option for option in known if option != 'split')}."
        )
    needed = [
        option for option, parameter in known.items() if parameter.default is parameter.empty and option not in options
    ]
    needed = [option for option in needed if option != "split" and known[option].kind is known[option].KEYWORD_ONLY]
    if needed:
        raise ValueError(f"The data set {name} needs the option {needed[0]!r}.")
    return dataset_class(split, **options)


def resolve_name(name: str, options: Mapping[str, Any]) -> str:
    """Name the data set that these options describe: `name` itself, or for `"auto"` the format of the folder `path`.

    Raises:
        ValueError: no data set has this name, or the format cannot be found out.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}. Use one of: {', '.join(DATASETS)}.")
    if name != AUTO:
        return name
    if "path" not in options:
        raise ValueError(f"The data set {AUTO!r} needs the option 'path': a folder or a zip archive.")
    return detect_format(options["path"], options.get("task"))


def open_detected(split: Split, *, path: str, **options: Any) -> SegmentationDataset:
    """Build one split of the data set in a folder or zip archive whose format is found out."""
    return load_segmentation_dataset(AUTO, split, path=path, **options)


def detect_format(path: str | Path, task: Task | None = None) -> str:
    """Find out in which format a data set is.

    Args:
        path: a folder, or a zip archive.
        task: decides where COCO's files for instances and for panoptic segmentation lie side by side.

    Returns:
        A key of `DATASETS`.

    Raises:
        ValueError: no format fits; the message lists what was looked for.
    """
    from training.readers.detection import detect  # noqa: PLC0415 - digit scenes need no reader

    return detect(path, task)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - of a module
    """Give `DigitScenes`, whose module imports this one."""
    if name == "DigitScenes":
        return DATASETS["digit_scenes"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# For code that wants a `datasets.Dataset`
# ---------------------------------------------------------------------------------------------------------------------


def to_hf_dataset(scenes: SegmentationDataset, cache_dir: str | None = None) -> "datasets.Dataset":
    """Write rows to an Arrow file and open it as `datasets.Dataset`, for code that wants one.

    Args:
        scenes: a data set whose images all have one size. All its rows are drawn.
        cache_dir: folder of the Arrow file; `None` is the cache of `datasets`.

    Returns:
        Columns `image_id`, `image` (decoded to PIL), `mask_labels` and `class_labels` (nested lists; numpy arrays after
        `.with_format("numpy")`), in the order of `scenes`.
    """
    import datasets  # noqa: PLC0415  (drawing and scoring digit scenes must not need it)

    width, height = scenes[0]["image"].size if len(scenes) else (1, 1)
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "mask_labels": datasets.Array3D(shape=(None, height, width), dtype="bool"),
            "class_labels": datasets.Sequence(datasets.Value("int64")),
        }
    )
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs={"scenes": scenes}, cache_dir=cache_dir)


def _rows(scenes: SegmentationDataset) -> Iterator[SegmentationRow]:
    for index in range(len(scenes)):
        yield scenes[index]
