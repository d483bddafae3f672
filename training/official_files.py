"""Files in the official forms: COCO instances, COCO panoptic (JSON and PNG), class-index PNG. Read with checks, written as asked for.

Whatever is wrong with a file is a `FileError` that names the file and the id.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_SEGMENT_ID = 256**3 - 1
MAX_CATEGORY_ID = 2**31 - 1
MAX_IMAGE_SIDE = 100_000  # COCO's area ranges end at images of this side
MOST_EXAMPLES = 5  # in a message
BOX_NUMBERS = 4
PNG_DEPTH = 24  # place of the byte with the bits of a pixel; the next one is the kind of colour
PNG_GREY = 0


class FileError(ValueError):
    """A file that cannot be used; the message is for the user as it is."""


@dataclass(frozen=True)
class Category:
    """A class of an official file."""

    id: int
    name: str
    is_thing: bool


@dataclass(frozen=True)
class PanopticFile:
    """A panoptic JSON file with its folder of PNG files.

    `annotations` by image id, in the order of the file; `categories` are those of ground truth, and so are `images`, which a file may
    lack.
    """

    path: Path
    folder: Path
    annotations: dict[int | str, dict[str, Any]]
    categories: dict[int, Category] = field(default_factory=dict)
    images: dict[int | str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read_truth(cls, path: Path, folder: Path | None = None, *, needs_isthing: bool) -> "PanopticFile":
        """Read and check the JSON file of a ground truth, which lists its categories.

        Args:
            path: the JSON file. Its PNG files are read one by one, by `segment_map`.
            folder: of the PNG files; `None` is the path without `.json`.
            needs_isthing: whether the categories must say what is a thing.
        """
        content = _read_panoptic(path)
        categories = read_categories(content, path, needs_isthing=needs_isthing)
        truth = cls._from_content(content, path, folder, categories)
        if not truth.annotations:
            raise FileError(f"{path} holds no image: `annotations` is empty. Expected one entry for each image.")
        images = index_by_id(_list_of(content, "images", path), "id", path, "images") if "images" in content else {}
        return replace(truth, images=images)

    @classmethod
    def read_predictions(
        cls, path: Path, folder: Path | None = None, *, categories: Mapping[int, Category] | None
    ) -> "PanopticFile":
        """Read and check the JSON file of predictions; `categories` are those of the ground truth, `None` if it lists none."""
        return cls._from_content(_read_panoptic(path), path, folder, categories)

    @classmethod
    def _from_content(
        cls,
        content: Mapping[str, Any],
        path: Path,
        folder: Path | None,
        categories: Mapping[int, Category] | None,
    ) -> "PanopticFile":
        folder = path.with_suffix("") if folder is None else folder
        annotations = index_by_id(_list_of(content, "annotations", path), "image_id", path, "annotations")
        for image_id, annotation in annotations.items():
            _check_panoptic_annotation(annotation, f"{path}: image {image_id!r}", categories)
        if not folder.is_dir():
            raise FileError(f"{folder} is no folder. The PNG files of {path} were expected there; name their folder.")
        return cls(path, folder, annotations, dict(categories or {}))

    def png(self, image_id: int | str) -> Path:
        """Path of the PNG file of an image."""
        return self.folder / self.annotations[image_id]["file_name"]

    def segment_map(self, image_id: int | str) -> NDArray[np.uint32]:
        """Read the PNG file of an image: segment ids (H, W), 0 is void."""
        path = self.png(image_id)
        with open_image(path, f"image {image_id!r} of {self.path}") as image:
            if image.mode not in ("RGB", "RGBA", "P"):
                raise FileError(
                    f"{path} has {image.mode} pixels. Expected colours: segment ids as R + 256 G + 65536 B, the COCO panoptic form."
                )
            return decode_segment_ids(image)

    def category_map(self, image_id: int | str, void: int) -> NDArray[np.int64]:
        """Read the PNG file of an image: category ids (H, W), `void` where no segment is."""
        ids = self.segment_map(image_id)
        present, inverse = np.unique(ids, return_inverse=True)
        segments = {info["id"]: info["category_id"] for info in self.annotations[image_id]["segments_info"]}
        unlisted = sorted(set(present.tolist()) - segments.keys() - {0})
        if unlisted:
            raise FileError(
                f"{self.png(image_id)} shows segment ids that {self.path} does not list for image {image_id!r}: "
                f"{unlisted[:MOST_EXAMPLES]}. List every segment, or write 0 (void)."
            )
        categories = np.array([segments.get(key, void) for key in present.tolist()], dtype=np.int64)
        return categories[inverse.reshape(ids.shape)]


@dataclass(frozen=True)
class InstanceFile:
    """COCO ground truth of instances: images, their sizes and annotations by image id."""

    path: Path
    sizes: dict[int | str, tuple[int, int]]
    annotations: dict[int | str, list[dict[str, Any]]]
    categories: dict[int, Category]
    images: dict[int | str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "InstanceFile":
        """Read and check the JSON file."""
        content = _read_object(path, "`images`, `annotations` and `categories`, the COCO form")
        images = index_by_id(_list_of(content, "images", path), "id", path, "images")
        if not images:
            raise FileError(f"{path}: `images` is empty. Expected one entry for each image.")
        sizes = {image_id: size_of_image(image, image_id, path) for image_id, image in images.items()}
        categories = read_categories(content, path)
        annotations: dict[int | str, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        for key, annotation in index_by_id(_list_of(content, "annotations", path), "id", path, "annotations").items():
            where = f"{path}: annotation {key!r}"
            _check_instance(annotation, where, sizes, categories, path)
            where = f"{where} (image {annotation['image_id']!r})"
            _check_flag(annotation, "iscrowd", where)
            _check_number(annotation, "area", where)
            annotations[annotation["image_id"]].append(annotation)
        return cls(path, sizes, annotations, categories, images)

    def read_predictions(self, path: Path) -> dict[int | str, list[dict[str, Any]]]:
        """Read COCO results for these images; an image without any has an empty list.

        The official tool ends with an exception when the list is empty, or names an image that is not in the ground truth. It passes
        over categories that it does not know; here that is an error. Where the first result has a `bbox`, it takes the areas of boxes for
        those of masks, which decide what is small, medium and large; so does this. Detectron2 removes `bbox` before it scores masks.
        """
        content = read_json(path)
        if not isinstance(content, list):
            raise FileError(f"{path}: expected a list of results, the COCO form, got {_kind(content)}.")
        if not content:
            raise FileError(f"{path} holds no predictions. Expected at least one; the official tool refuses it too.")
        predictions: dict[int | str, list[dict[str, Any]]] = {image_id: [] for image_id in self.sizes}
        for number, result in enumerate(content):
            where = f"{path}: result {number}"
            _check_instance(result, where, self.sizes, self.categories, self.path)
            where = f"{where} (image {result['image_id']!r})"
            if "score" not in result:
                raise FileError(f"{where} has no `score`. Expected a number.")
            _check_number(result, "score", where)
            # An `area` of the result's own is passed over, as there.
            kept = {key: value for key, value in result.items() if key != "area"}
            area = {"area": _area_of_box(result, where)} if content[0].get("bbox") else {}
            predictions[result["image_id"]].append({**kept, **area})
        return predictions


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Read a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from None
    # Neither JSON nor text, a number of thousands of digits, or lists nested too deeply.
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no valid JSON: {error}.") from None


def read_categories(content: Mapping[str, Any], path: Path, *, needs_isthing: bool = False) -> dict[int, Category]:
    """Read the categories of ground truth by their ids."""
    categories = {}
    for key, entry in index_by_id(_list_of(content, "categories", path), "id", path, "categories").items():
        if not isinstance(key, int) or not 0 <= key <= MAX_CATEGORY_ID:
            raise FileError(f"{path}: category id {key!r} is no integer from 0 to {MAX_CATEGORY_ID}.")
        if needs_isthing and "isthing" not in entry:
            raise FileError(f"{path}: category {key} has no `isthing`. Panoptic files say 1 (thing) or 0 (stuff).")
        _check_flag(entry, "isthing", f"{path}: category {key}")
        categories[key] = Category(key, str(entry.get("name", key)), bool(entry.get("isthing", 1)))
    if not categories:
        raise FileError(f"{path}: `categories` is empty. Expected the classes of the data set.")
    return categories


def index_by_id(entries: Sequence[Any], key: str, path: Path, name: str) -> dict[int | str, dict[str, Any]]:
    """Index entries of a file by their ids, which must be there and differ."""
    indexed: dict[int | str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get(key)) not in (int, str):
            raise FileError(f"{path}: entry {number} of `{name}` has no `{key}` (an integer or text).")
        if entry[key] in indexed:
            raise FileError(f"{path}: `{key}` {entry[key]!r} occurs twice in `{name}`. Ids must be unique.")
        indexed[entry[key]] = entry
    return indexed


def open_image(path: Path, name: str) -> Image.Image:
    """Read and decode an image file."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))  # no file is left open when it cannot be decoded
        image.load()
    except FileNotFoundError:
        raise FileError(f"{path} is missing: the PNG file of {name}.") from None
    except UnidentifiedImageError:
        raise FileError(f"{path}, the PNG file of {name}, cannot be read: it is no image file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}, the PNG file of {name}, cannot be read: {error}.") from None
    return image


def decode_segment_ids(image: Image.Image) -> NDArray[np.uint32]:
    """Return R + 256 G + 65536 B of every pixel, (H, W); the image has colours, or a palette of them."""
    # The three colours and a fourth byte are one number already; this takes a third of the time of adding up the colours.
    return np.asarray(image.convert("RGBA")).view("<u4")[..., 0] & np.uint32(MAX_SEGMENT_ID)


def encode_segment_ids(ids: NDArray[np.integer]) -> Image.Image:
    """Write segment ids (H, W), 0 to 256**3 - 1, as colours R + 256 G + 65536 B."""
    if ids.max(initial=0) > MAX_SEGMENT_ID or ids.min(initial=0) < 0:
        raise ValueError(f"Segment ids must be from 0 to {MAX_SEGMENT_ID}, got {ids.min()} to {ids.max()}.")
    colors = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    return Image.fromarray(np.ascontiguousarray(colors[..., :3]))


def read_class_indices(path: Path, ignore_index: int, void: int) -> NDArray[np.int64]:
    """Read a PNG file that holds a class at each pixel, (H, W); `ignore_index` becomes `void`."""
    with open_image(path, "a semantic map") as image:
        if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise FileError(
                f"{path} has {image.mode} pixels. Expected one number a pixel (8 or 16 bits, or a palette): the class. "
                "For colours R + 256 G + 65536 B, pass the panoptic JSON file."
            )
        classes = np.asarray(image).astype(np.int64)
    # Pillow spreads grey values of 2 and 4 bits over 0 to 255.
    with path.open("rb") as file:
        file.seek(PNG_DEPTH)
        depth, color = file.read(2)
    if color == PNG_GREY and depth in (2, 4):
        classes //= 255 // (2**depth - 1)
    return np.where(classes == ignore_index, void, classes)


def class_index_files(folder: Path) -> dict[str, Path]:
    """Find the PNG files of a folder and its subfolders by their path without `.png`."""
    if not folder.is_dir():
        raise FileError(f"{folder} is neither a JSON file nor a folder of PNG files.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png")
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if not files:
        raise FileError(f"{folder} holds no PNG file.")
    return files


def _list_of(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise FileError(f"{path}: `{key}` is missing, or no list. Found: {', '.join(map(str, content)) or 'nothing'}.")
    return entries


def _read_object(path: Path, expected: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected an object with {expected}, got {_kind(content)}.")
    return content


def _read_panoptic(path: Path) -> dict[str, Any]:
    return _read_object(path, "`annotations`, the COCO panoptic form")


def _check_panoptic_annotation(
    annotation: Mapping[str, Any], where: str, categories: Mapping[int, Category] | None
) -> None:
    """Refuse an image without PNG file, or with segments that no PNG file and no list of categories can have."""
    if not isinstance(annotation.get("file_name"), str) or not isinstance(annotation.get("segments_info"), list):
        raise FileError(f"{where} has no `file_name` (text) or no `segments_info` (a list).")
    for segment in annotation["segments_info"]:
        if not isinstance(segment, dict) or not all(type(segment.get(key)) is int for key in ("id", "category_id")):
            raise FileError(f"{where} has a segment without an integer `id` and `category_id`: {str(segment)[:80]}.")
        if not 0 < segment["id"] <= MAX_SEGMENT_ID:
            raise FileError(f"{where} has the segment id {segment['id']}. Expected 1 to {MAX_SEGMENT_ID}; 0 is void.")
        name = f"{where}, segment {segment['id']}"
        if not 0 <= segment["category_id"] <= MAX_CATEGORY_ID:
            raise FileError(f"{name} has category {segment['category_id']}. Expected 0 to {MAX_CATEGORY_ID}.")
        if categories is not None and segment["category_id"] not in categories:
            raise FileError(
                f"{name} has category {segment['category_id']}, which is not among the categories of the ground truth."
            )
        _check_flag(segment, "iscrowd", name)
        _check_number(segment, "area", name)
    counts = Counter(segment["id"] for segment in annotation["segments_info"])
    repeated = [segment_id for segment_id, count in counts.items() if count > 1]
    if repeated:
        raise FileError(f"{where} lists segment id {repeated[0]} twice. Give each segment its own id: a pixel has one.")


def _check_flag(entry: Mapping[str, Any], key: str, where: str) -> None:
    if entry.get(key, 0) not in (0, 1):
        raise FileError(f"{where} has the `{key}` {entry[key]!r}. Expected 0 or 1.")


def _check_number(entry: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse what is no finite number, if it is there."""
    if key in entry and not (_is_finite(entry[key]) and (key != "area" or entry[key] >= 0)):
        kind = "number of at least 0" if key == "area" else "finite number"
        raise FileError(f"{where} has the `{key}` {repr(entry[key])[:80]}. Expected a {kind}.")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def size_of_image(image: Mapping[str, Any], image_id: int | str, path: Path) -> tuple[int, int]:
    """Read height and width of an entry of `images`."""
    sides = image.get("height"), image.get("width")
    if not all(type(side) is int and 0 < side <= MAX_IMAGE_SIDE for side in sides):
        raise FileError(
            f"{path}: image {image_id!r} has the height and width {str(sides)[:80]}. Expected integers from 1 to "
            f"{MAX_IMAGE_SIDE}."
        )
    return sides


def _check_instance(
    entry: Any,  # noqa: ANN401 - whatever the file holds
    where: str,
    sizes: Mapping[int | str, tuple[int, int]],
    categories: Mapping[int, Category],
    ground_truth: Path,
) -> None:
    """Refuse an annotation, or a result, that names no image, no category or no mask."""
    if not isinstance(entry, dict):
        raise FileError(f"{where} is {_kind(entry)}. Expected an object.")
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not isinstance(image_id, Hashable) or image_id not in sizes:
        raise FileError(f"{where} is for image {image_id!r}, which is not among the images of {ground_truth}.")
    if not isinstance(category_id, Hashable) or category_id not in categories:
        raise FileError(
            f"{where} (image {image_id!r}) has category {category_id!r}, which is not among the categories of {ground_truth}."
        )
    segmentation = entry.get("segmentation")
    if not isinstance(segmentation, dict | list):
        raise FileError(f"{where} (image {image_id!r}) has no `segmentation`. Boxes alone cannot be scored here.")
    size = list(sizes[image_id])
    if isinstance(segmentation, dict) and segmentation.get("size") != size:
        raise FileError(
            f"{where} (image {image_id!r}) has a mask of size {segmentation.get('size')}, but the image is {size} "
            f"(height, width) in {ground_truth}."
        )


def _area_of_box(result: Mapping[str, Any], where: str) -> float:
    box = result.get("bbox")
    if not isinstance(box, list) or len(box) != BOX_NUMBERS or not all(_is_finite(side) for side in box):
        raise FileError(
            f"{where} has the `bbox` {box}. Expected [x, y, width, height], as the first result has; or remove `bbox` everywhere."
        )
    return float(box[2]) * float(box[3])


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
