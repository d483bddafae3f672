"""COCO instances: a JSON file with `images`, `annotations` and `categories`, and a folder of images.

    annotations/instances_{train,val}2017.json, {train,val}2017/*.jpg
    {train,valid}/_annotations.coco.json beside the images, and any other place, named by options

An annotation has a `category_id` and a `segmentation`: a list of polygons `[x0, y0, x1, y1, ...]`, or run lengths
`{"size": [H, W], "counts": ...}`, compressed or not, with `iscrowd` 1 for a region of many objects. Masks may overlap, and stay as
they are. Polygons are filled as pycocotools does, because AP is defined with these masks.

Axes: H W image.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mpformer_hf.mask_encoding import MIN_POLYGON_NUMBERS, compress_counts, decode_rle, expand_counts
from training.data import Split, Task
from training.image_files import FileTree, StoredFile, name_some
from training.official_files import Category, FileError, InstanceFile
from training.readers.coco_files import find_images, find_json, id_type, json_files, state_of
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import (
    CLASS_COLUMNS,
    IndexedClasses,
    Labels,
    Mask,
    Segment,
    class_columns,
    file_columns,
)

SEARCHED_BYTES = 2**16  # of a JSON file whose name does not say what it holds


class CocoInstances(IndexedClasses):
    """A data set in COCO's form of instances; `category_ids` are those of the file."""

    name = "coco_instances"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "instance",
        path: str,
        annotations: str | None = None,
        images: str | None = None,
        drop_empty: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"`.
            task: `"instance"`; `"panoptic"` reports the same, as there is no stuff, and `"semantic"` joins the objects of a class.
            path: the folder of the data set, or a zip archive of it.
            annotations: JSON file of this split, relative to `path`; looked for if not said.
            images: folder of this split's images, relative to `path`; looked for if not said.
            drop_empty: leave out images without an object, or with crowds alone; the original does so in training.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        tree = self._tree
        file = find_json(tree, split, annotations, panoptic=False)
        build = partial(build_index, tree, split, file, images)
        facts = self._open_index(state_of(tree, file, images), build, cache_dir)
        self._set_classes([Category(**category) for category in facts["categories"]], str(file))
        if drop_empty:
            has_objects = np.array([len(categories) > 0 for categories in self.index["categories"]])
            has_objects[list(self.problems)] = True  # to be told of, not to be dropped
            self._select(np.flatnonzero(has_objects))

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        names = json_files(tree, None, panoptic=False)
        named = [name for name in names if name.rpartition("/")[2].startswith(("instances", "_annotations.coco"))]
        return bool(named) or any(holds_instances(tree.file(name)) for name in names)

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        size = (entry["height"], entry["width"])
        return Labels(
            size,
            [
                Segment(segment["category"], partial(decode, segment["counts"], size), segment["crowd"])
                for segment in entry["segments"]
            ],
        )


def build_index(tree: FileTree, split: Split, file: StoredFile, images: str | None) -> IndexContent:
    """Read the JSON file."""
    truth = InstanceFile.read(file)  # type: ignore[arg-type] - it reads like a path
    files, missing = find_images(tree, split, truth.images, images, file)
    columns = {
        **file_columns(),
        "image_id": id_type(list(files), file),
        **CLASS_COLUMNS,
        "segments": [{"category": "int64", "crowd": "bool", "counts": "string"}],
    }
    facts = IndexFacts({"categories": [vars(category) for category in truth.categories.values()]})
    return IndexContent(columns, make_rows(truth, files, missing, tree, facts), facts)


def make_rows(
    truth: InstanceFile,
    files: Mapping[int | str, StoredFile],
    missing: Collection[int | str],
    tree: FileTree,
    facts: IndexFacts,
) -> Iterator[dict[str, Any]]:
    """Write every mask as run lengths; annotations without a pixel are left out, and noted."""
    without_pixels: list[str] = []
    for number, (image_id, (height, width)) in enumerate(truth.sizes.items()):
        segments = []
        if image_id in missing:
            facts.add_problem(number, f"{files[image_id]}, image {image_id!r}, is missing.", files[image_id])
        for annotation in truth.annotations[image_id]:
            try:
                counts = encode(annotation["segmentation"], height, width)
            except (ValueError, TypeError) as error:
                where = f"{truth.path}: annotation {annotation['id']!r} (image {image_id!r})"
                facts.add_problem(number, f"{where} has a mask that cannot be read: {error}")
                continue
            if counts is None:
                without_pixels.append(str(annotation["id"]))
                continue
            crowd = bool(annotation.get("iscrowd", 0))
            segments.append({"category": annotation["category_id"], "crowd": crowd, "counts": counts})
        yield {
            "image_id": image_id,
            "height": height,
            "width": width,
            "image": files[image_id].to_record(tree.root),
            **class_columns(segments),
            "segments": segments,
        }
    note_empty(truth, without_pixels, facts)


def note_empty(truth: InstanceFile, without_pixels: Collection[str], facts: IndexFacts) -> None:
    """Note the annotations that were left out.

    Raises:
        FileError: these are all.
    """
    total = sum(len(annotations) for annotations in truth.annotations.values())
    if without_pixels and len(without_pixels) == total:
        raise FileError(f"{truth.path}: no annotation has a mask. Boxes alone do not say where an object is.")
    if without_pixels:
        facts.notes.append(
            f"{len(without_pixels)} of {total} annotations of {truth.path} cover no pixel and are left out: "
            f"{name_some(without_pixels)}."
        )


def encode(segmentation: Mapping[str, Any] | Sequence[Any], height: int, width: int) -> str | None:
    """Write polygons or run lengths as compressed run lengths; `None` if they cover no pixel.

    Raises:
        ValueError: they are malformed, or lie outside of the image.
    """
    if isinstance(segmentation, Mapping):
        return encode_runs(segmentation.get("counts"), height, width)
    polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in segmentation]
    if any(len(polygon) % 2 or not np.isfinite(polygon).all() for polygon in polygons):
        raise ValueError("a polygon must be pairs of finite numbers, x and y.")
    # As the original does: polygons of one or two corners are passed over.
    polygons = [polygon for polygon in polygons if len(polygon) >= MIN_POLYGON_NUMBERS]
    if not polygons:
        return None
    if all(is_outside(polygon.reshape(-1, 2), height, width) for polygon in polygons):
        raise ValueError(f"it lies outside of the image of {height} x {width} pixels (height x width).")
    return fill(polygons, height, width)


def encode_runs(counts: object, height: int, width: int) -> str | None:
    """Check run lengths, compressed or not, and write them compressed; `None` if they cover no pixel.

    Raises:
        ValueError: they are malformed, or of another image.
    """
    if not isinstance(counts, str | list):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            f"`counts` must be text or a list of integers, got {type(counts).__name__}."
        )
    if isinstance(counts, str):
        lengths = expand_counts(counts.encode())
    else:
        lengths = np.asarray(counts, dtype=np.int64).reshape(-1)
    if lengths.sum() != height * width or (lengths < 0).any():
        raise ValueError(
            f"its run lengths add up to {lengths.sum()}, but the image has {height} x {width} = {height * width} pixels."
        )
    if lengths[1::2].sum() == 0:
        return None
    return counts if isinstance(counts, str) else compress_counts(lengths)


def fill(polygons: Sequence[np.ndarray], height: int, width: int) -> str | None:
    """Fill polygons as pycocotools does, and return compressed run lengths; `None` if they cover no pixel."""
    from pycocotools import mask as coco_masks  # noqa: PLC0415 - needed for this form alone

    mask = coco_masks.merge(coco_masks.frPyObjects([polygon.tolist() for polygon in polygons], height, width))
    return mask["counts"].decode() if coco_masks.area(mask) else None


def is_outside(corners: np.ndarray, height: int, width: int) -> bool:
    """Say whether a polygon, (corners, 2), has no part in the image."""
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    return bool(right <= 0 or bottom <= 0 or left >= width or top >= height)


def decode(counts: str, size: tuple[int, int]) -> Mask:
    """Draw a mask of compressed run lengths."""
    return decode_rle({"size": size, "counts": counts}).numpy()


def holds_instances(file: StoredFile) -> bool:
    """Say from the first bytes of a JSON file whether it may be of COCO's form."""
    head = file.head(SEARCHED_BYTES)
    return any(f'"{key}"'.encode() in head for key in ("images", "annotations")) and b"segments_info" not in head
