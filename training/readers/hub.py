"""Any data set that `datasets` can load, from the Hub or from disk: a column of images, one of masks, perhaps one of classes.

    mask_form       mask_column                                     further columns
    class_index     a picture with a class at each pixel            instance_column: a picture with numbers of instances, 0 is none
    class_instance  a picture: red is the class, green the          -
                    number of the instance, 0 is none
    panoptic        a picture of segment ids R + 256 G + 65536 B,   segments_column: `id`, `category_id`, perhaps `iscrowd`, of each
                    0 is void
    masks           a list of masks: pictures, arrays, run          label_column: their classes; crowd_column: 1 for regions of many
                    lengths or polygons of COCO; they may overlap   objects

A column inside of another is named with a dot, `objects.segmentation`. Pictures are decoded here, not by `datasets`, which would
rotate them by their EXIF tags; labels belong to stored pixels. `Hub` reads by position; `HubStream` reads in order, without a copy on
disk, and shares the files of the data set out among the workers of a loader.

Axes: H W image.
"""

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from mpformer_hf.segment_labels import classes_of_segments, coco_mask
from training.data import SegmentationRow, Split, Task
from training.image_files import MODES_WITH_NUMBERS, StoredFile, decode_image, read_ids, require_size, to_rgb
from training.official_files import MOST_EXAMPLES, FileError, decode_segment_ids
from training.readers.class_names import NamedClass, Names, parse_names, read_names, to_categories
from training.readers.reader import SAVED_MARKERS, SPLIT_NAMES, ClassTable, Labels, Mask, Segment, distinct, equal_to

if TYPE_CHECKING:
    import datasets

MASK_FORMS = ("class_index", "class_instance", "panoptic", "masks")
COLOURS = ("RGB", "RGBA")
VOID = 0
CHANNELS_LAST = 3  # axes of an array of colours


class HubTable(ClassTable):
    """What both readers share: options, classes, and how a row of columns becomes one of segments."""

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "semantic",
        path: str,
        name: str | None = None,
        split_name: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        mask_column: str = "label",
        mask_form: str = "class_index",
        segments_column: str = "segments_info",
        instance_column: str | None = None,
        label_column: str | None = None,
        crowd_column: str | None = None,
        id_column: str | None = None,
        classes: Names | None = None,
        things: Collection[str] | None = None,
        ignore_index: int | Collection[int] = 255,
        cache_dir: str | None = None,
    ) -> None:
        """Open the data set.

        Args:
            split: `"train"` or `"validation"`.
            task: what is reported.
            path: name on the Hub, folder of a data set, or folder that `save_to_disk` wrote.
            name: of the configuration, for data sets with several.
            split_name: of the split in the data set; looked for if not said.
            revision: of the repository.
            image_column: column of the images.
            mask_column: column of the masks.
            mask_form: `"class_index"`, `"class_instance"`, `"panoptic"` or `"masks"`, see above.
            segments_column: for `"panoptic"`.
            instance_column: for `"class_index"`.
            label_column: for `"masks"`.
            crowd_column: for `"masks"`.
            id_column: of the image ids; if not said, images are counted.
            classes: the names, or a file with them, see `class_names.py`; not needed where `label_column` is of the type `ClassLabel`.
            things: names of the classes with instances. If not said, the file of the classes says it; else all classes of
                `"masks"` and `"class_instance"` are things, and for the task `"semantic"` it does not matter.
            ignore_index: value, or values, of pixels of which nothing is known.
            cache_dir: folder in which `datasets` keeps its copy.
        """
        super().__init__(split, task)
        if mask_form not in MASK_FORMS:
            raise ValueError(f"mask_form must be one of {', '.join(MASK_FORMS)}, got {mask_form!r}.")
        if mask_form == "masks" and label_column is None:
            raise ValueError("mask_form 'masks' needs `label_column`, the classes of the masks.")
        if mask_form == "class_index" and task == "instance" and instance_column is None:
            raise ValueError("mask_form 'class_index' needs `instance_column` for task 'instance'.")
        self.columns = {
            "image": image_column,
            "mask": mask_column,
            "segments": segments_column if mask_form == "panoptic" else None,
            "instance": instance_column if mask_form == "class_index" else None,
            "label": label_column if mask_form == "masks" else None,
            "crowd": crowd_column if mask_form == "masks" else None,
            "id": id_column,
        }
        self.mask_form = mask_form
        self._ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)
        self._where = f"{path} ({split})"
        table = load_table(path, name, split, split_name, revision, cache_dir, streaming=self._streaming)
        self.table = undecoded(table, [column for column in self.columns.values() if column], self._where)
        named = find_classes(table.features, classes, label_column, self._where)
        all_things = mask_form in ("masks", "class_instance")
        unsaid = all_things if all_things or task == "semantic" else None
        listed = to_categories(named, things, unsaid=unsaid, where=f"`classes` of {path}")
        self._is_thing = {category.id: category.is_thing for category in listed}
        self._set_classes(listed, self._where)

    _streaming = False

    def convert(self, columns: Mapping[str, Any], number: int) -> SegmentationRow:
        """Make a row of segments of a row of columns.

        Raises:
            FileError: it makes no sense; names the data set and the image.
        """
        values = {role: look_up(columns, column) for role, column in self.columns.items() if column}
        image_id = values.get("id", number)
        where = f"{self._where}, image {image_id!r}"
        try:
            image = decode_picture(values["image"], rgb=True)
            readers: Mapping[str, Callable[..., Labels]] = {
                "class_index": self._read_classes,
                "class_instance": self._read_instances,
                "panoptic": self._read_panoptic,
                "masks": self._read_masks,
            }
            labels = readers[self.mask_form](values, (image.height, image.width))
            if self.mask_form != "masks":
                require_size(labels.size, (image.height, image.width), f"`{self.columns['mask']}`", "the image")
            row = self._make_row(image_id, image, labels)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise FileError(f"{where}: {error}") from None
        return row

    def _read_classes(self, values: Mapping[str, Any], size: tuple[int, int]) -> Labels:
        ids = decode_ids(values["mask"])
        numbers = decode_ids(values["instance"]) if self.task != "semantic" and "instance" in values else None
        if numbers is not None:
            require_size(numbers.shape, ids.shape, f"`{self.columns['instance']}`", f"`{self.columns['mask']}`")
        return self._split(ids, numbers)

    def _read_instances(self, values: Mapping[str, Any], size: tuple[int, int]) -> Labels:
        picture = decode_picture(values["mask"])
        if picture.mode not in COLOURS:
            raise ValueError(f"`{self.columns['mask']}` has {picture.mode} pixels. Expected colours: class, instance.")
        channels = np.asarray(picture.convert("RGB")).astype(np.int32)
        ids, numbers = channels[..., 0], channels[..., 1]
        pairs = [divmod(pair, 256) for pair in distinct(256 * numbers + ids) if pair >= 256]  # noqa: PLR2004 - number 0 is none
        self._require_known([class_id for _, class_id in pairs])
        return Labels(
            ids.shape, [Segment(class_id, equal_to_both(ids, class_id, numbers, number)) for number, class_id in pairs]
        )

    def _split(self, ids: NDArray[np.int32], numbers: NDArray[np.int32] | None) -> Labels:
        """List the segments of a map of classes, and of numbers of instances, if there are any."""
        present = distinct(ids)
        unknown = [value for value in present if value not in self._is_thing and value not in self._ignored]
        if unknown:
            raise ValueError(
                f"`{self.columns['mask']}` has the values {unknown[:MOST_EXAMPLES]}, which are no classes and not ignored. The "
                f"classes have the values {min(self._is_thing)} to {max(self._is_thing)}, ignored is {self._ignored}."
            )
        segments = []
        for value in present:
            if value not in self._is_thing:
                continue
            if numbers is None or not self._is_thing[value]:
                segments.append(Segment(value, equal_to(ids, value)))
                continue
            segments += [
                Segment(value, equal_to_both(ids, value, numbers, number), number == 0)
                for number in distinct(numbers[ids == value])
            ]
        return Labels(ids.shape, segments, np.isin(ids, self._ignored))

    def _read_panoptic(self, values: Mapping[str, Any], size: tuple[int, int]) -> Labels:
        ids = decode_ids(values["mask"])
        infos = list_of_dicts(values["segments"])
        classes, crowds = classes_of_segments(infos)
        classes |= {info["id"]: info["category_id"] for info in infos if info["id"] in crowds}
        present = set(distinct(ids)) - {VOID}
        if present - classes.keys():
            raise ValueError(
                f"`{self.columns['mask']}` shows segment ids that `{self.columns['segments']}` does not list: "
                f"{sorted(present - classes.keys())[:MOST_EXAMPLES]}."
            )
        self._require_known(classes.values())
        return Labels(
            ids.shape,
            [
                Segment(classes[key], equal_to(ids, key), key in crowds)
                for key in (info["id"] for info in infos)
                if key in present
            ],
            ids == VOID,
        )

    def _read_masks(self, values: Mapping[str, Any], size: tuple[int, int]) -> Labels:
        masks, classes = list(values["mask"]), [int(value) for value in values["label"]]
        crowd = [bool(value) for value in values.get("crowd", [0] * len(masks))]
        if not len(masks) == len(classes) == len(crowd):
            raise ValueError(
                f"`{self.columns['mask']}` has {len(masks)} masks, but there are {len(classes)} classes and {len(crowd)} crowd flags."
            )
        self._require_known(classes)
        segments = []
        for position, (mask, class_id, is_crowd) in enumerate(zip(masks, classes, crowd, strict=True)):
            drawn = decode_mask(mask, size)
            require_size(drawn.shape, size, f"mask {position} of `{self.columns['mask']}`", "the image")
            segments.append(Segment(class_id, partial(np.copy, drawn), is_crowd))
        return Labels(size, segments)

    def _require_known(self, classes: Collection[int]) -> None:
        unknown = sorted(set(classes) - self._is_thing.keys())
        if unknown:
            raise ValueError(f"its segments have the classes {unknown[:MOST_EXAMPLES]}, which are not among `classes`.")


class Hub(HubTable):
    """A data set of `datasets`, read by position; `category_ids` are the values in its columns."""

    name = "hub"

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[SegmentationRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SegmentationRow:
        """Read a row; a negative index counts from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image {index} of {len(self)}: the index must lie below the number of images.")
        number = int(index) % len(self)
        return self.convert(self.table[number], number)


class HubStream(HubTable, IterableDataset):
    """A data set of `datasets` that is read in order while it is downloaded; it has neither length nor positions.

    Iterating gives the rows in the order of the files. `training.streaming_rows` makes of it what a training draws from.
    """

    name = "hub_stream"
    _streaming = True

    @property
    def num_files(self) -> int:
        """Files that the data set has, each of which is read on its own."""
        return self.table.num_shards

    def read_file(self, number: int) -> Iterator[dict[str, Any]]:
        """Read the columns of the rows of one file, pictures as bytes."""
        return iter(self.table.shard(num_shards=self.num_files, index=number))

    def __iter__(self) -> Iterator[SegmentationRow]:
        """Read the rows; in a worker of a loader, those of its own files."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number, columns in enumerate(self.table):
            yield self.convert(columns, first + step * number)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_table(
    path: str,
    name: str | None,
    split: Split,
    split_name: str | None,
    revision: str | None,
    cache_dir: str | None,
    *,
    streaming: bool,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load a split from the Hub, or from disk.

    Raises:
        FileError: it cannot be loaded, or has no such split.
    """
    import datasets  # noqa: PLC0415 - takes two seconds, which asking for options or formats need not wait for

    folder = Path(path).expanduser()
    is_saved = any((folder / marker).is_file() for marker in SAVED_MARKERS)
    try:
        if is_saved:
            loaded = datasets.load_from_disk(str(folder))
        else:
            source = str(folder) if folder.exists() else path
            loaded = datasets.load_dataset(source, name, revision=revision, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:
        # Whatever a data set's files, the network or the Hub may raise.
        raise FileError(f"The data set {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        chosen = loaded
    else:
        names = (split_name,) if split_name else SPLIT_NAMES[split]
        key = next((key for key in names if key in loaded), None)
        if key is None:
            raise FileError(
                f"The data set {path} has no split {' or '.join(names)}. It has {', '.join(map(str, loaded))}. Name one with the option "
                "`split_name`."
            )
        chosen = loaded[key]
    return chosen.to_iterable_dataset() if streaming and isinstance(chosen, datasets.Dataset) else chosen


def undecoded(
    table: "datasets.Dataset | datasets.IterableDataset", columns: Sequence[str], where: str
) -> "datasets.Dataset | datasets.IterableDataset":
    """Keep some columns alone, their pictures as bytes.

    Raises:
        FileError: a column is missing.
    """
    features = table.features
    if features is None:
        raise FileError(f"{where} does not say the types of its columns.")
    tops = list(dict.fromkeys(column.partition(".")[0] for column in columns))
    missing = [column for column in tops if column not in features]
    if missing:
        raise FileError(f"{where} has no column {missing[0]!r}. It has {', '.join(features)}.")
    table = table.select_columns(tops)
    for column in tops:
        table = table.cast_column(column, without_decoding(features[column]))
    return table


def without_decoding(feature: Any) -> Any:  # noqa: ANN401 - types of columns nest
    """Write a type of column with pictures as bytes."""
    import datasets  # noqa: PLC0415 - as above

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(without_decoding(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {key: without_decoding(value) for key, value in feature.items()}
    return feature


def find_classes(
    features: Mapping[str, Any], option: Names | None, label_column: str | None, where: str
) -> list[NamedClass]:
    """Read the classes of the option, of a file, or of the type of the column of labels.

    Raises:
        FileError: nobody names them.
    """
    if isinstance(option, str):
        return read_names(StoredFile(Path(option).expanduser()))
    if option is not None:
        return parse_names(option, "The option `classes`")
    feature: Any = features
    for part in label_column.split(".") if label_column else ():
        feature = getattr(feature, "feature", feature)
        feature = feature.get(part) if isinstance(feature, Mapping) else None
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    if names:
        return parse_names(list(names), f"{where}: `{label_column}`")
    raise FileError(
        f"{where} does not name its classes. Name them with the option `classes`: a list, value -> name, or a file."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def look_up(columns: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - whatever a column holds
    """Read a column, or one inside of another: of a dictionary, or of each entry of a list."""
    value: Any = columns
    for part in name.split("."):
        value = [entry[part] for entry in value] if isinstance(value, list) else value[part]
    return value


def list_of_dicts(value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - whatever a column holds
    """Turn a dictionary of lists, as some columns come, into a list of dictionaries."""
    if isinstance(value, Mapping):
        return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    return [dict(entry) for entry in value]


def decode_picture(value: Any, *, rgb: bool = False) -> Image.Image:  # noqa: ANN401 - whatever a column holds
    """Decode a picture without rotating it.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Image.Image):
        return to_rgb(value) if rgb else value
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        data = value.get("bytes")
        data = read_anywhere(value["path"]) if data is None else data
        if rgb:
            return decode_image(data)
        try:
            picture = Image.open(io.BytesIO(data))
            picture.load()
        except UnidentifiedImageError:
            raise ValueError("its mask is no image file.") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"its mask is damaged ({error}).") from None
        return picture
    array = np.asarray(value)
    if array.dtype.kind not in "biu" or array.ndim not in (CHANNELS_LAST - 1, CHANNELS_LAST):
        raise ValueError(f"expected a picture, got {type(value).__name__}.")
    kind = np.uint8 if array.ndim == CHANNELS_LAST or array.max(initial=0) < 2**8 else np.int32
    picture = Image.fromarray(array.astype(kind))
    return to_rgb(picture) if rgb else picture


def read_anywhere(path: str) -> bytes:
    """Read a file from disk, or from where a data set is streamed."""
    from datasets.utils.file_utils import xopen  # noqa: PLC0415 - takes two seconds

    with xopen(path, "rb") as file:
        return file.read()


def decode_ids(value: Any) -> NDArray[np.int32]:  # noqa: ANN401 - whatever a column holds
    """Decode a picture with a number at each pixel, (H, W); colours are R + 256 G + 65536 B."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        data = read_anywhere(value["path"]) if data is None else data
        return read_ids(BytesFile(data, "a map"), "the labels")  # type: ignore[arg-type] - it reads like a file
    picture = decode_picture(value)
    if picture.mode in COLOURS:
        return decode_segment_ids(picture).astype(np.int32)
    if picture.mode not in MODES_WITH_NUMBERS:
        raise ValueError(f"a map has {picture.mode} pixels. Expected one number a pixel, or colours of 8 bits.")
    return np.asarray(picture).astype(np.int32)


@dataclass(frozen=True)
class BytesFile:
    """Bytes that read like a `StoredFile`."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Read all."""
        return self.data

    def head(self, length: int) -> bytes:
        """Read the first bytes."""
        return self.data[:length]

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Read all, as a file."""
        return io.BytesIO(self.data)


def decode_mask(value: Any, size: tuple[int, int]) -> Mask:  # noqa: ANN401 - whatever a column holds
    """Decode one mask: a picture or array (not 0 is inside), run lengths, or polygons.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, Mapping) and "counts" in value:
        return coco_mask(value, size).numpy()
    if isinstance(value, Image.Image | Mapping):
        return np.asarray(decode_picture(value).convert("L")) > 0
    if isinstance(value, list | tuple) and not is_rectangle(value, size):
        return coco_mask(list(value), size).numpy()
    return (np.asarray(value) if not isinstance(value, torch.Tensor) else value.numpy()) > 0


def is_rectangle(value: Sequence[Any], size: tuple[int, int]) -> bool:
    """Say whether nested lists are an array of height and width, not polygons."""
    return len(value) == size[0] and all(hasattr(row, "__len__") and len(row) == size[1] for row in value)


def equal_to_both(ids: NDArray[np.int32], value: int, numbers: NDArray[np.int32], number: int) -> Callable[[], Mask]:
    """Return a function that draws the pixels of an instance of a class."""
    return lambda: (ids == value) & (numbers == number)
