"""COCO panoptic: a JSON file with `segments_info` of each image, a folder of PNG files and a folder of images.

    annotations/panoptic_{train,val}2017.json, annotations/panoptic_{train,val}2017/*.png, {train,val}2017/*.jpg

The colour of a pixel is the id of its segment, R + 256 G + 65536 B; 0 is void. `segments_info` gives the class of each id, and
`iscrowd` 1 for a region of many objects; `categories` say what is a thing (`isthing`). Cityscapes, Mapillary Vistas and ADE20K are
distributed, or prepared by others, in this form too.

Axes: H W image.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from training.data import Split, Task
from training.image_files import IMAGE_SUFFIXES, FileTree, StoredFile, TreeFolder, read_ids, read_size, require_size
from training.official_files import MOST_EXAMPLES, Category, FileError, PanopticFile, size_of_image
from training.readers.coco_files import find_images, find_json, id_type, json_files, state_of
from training.readers.index import IndexContent, IndexFacts
from training.readers.reader import (
    CLASS_COLUMNS,
    NO_FILE,
    IndexedClasses,
    Labels,
    Segment,
    class_columns,
    distinct,
    equal_to,
    file_columns,
)

VOID = 0


class CocoPanoptic(IndexedClasses):
    """A data set in COCO's panoptic form; `category_ids` are those of the file."""

    name = "coco_panoptic"

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "panoptic",
        path: str,
        annotations: str | None = None,
        maps: str | None = None,
        images: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """Find and index the files.

        Args:
            split: `"train"` or `"validation"`.
            task: `"panoptic"`; `"instance"` reports the things, `"semantic"` joins the segments of a class.
            path: the folder of the data set, or a zip archive of it.
            annotations: JSON file of this split, relative to `path`; looked for if not said.
            maps: folder of this split's PNG files, relative to `path`; if not said, it has the name of the JSON file without `.json`.
            images: folder of this split's images, relative to `path`; looked for if not said.
            cache_dir: folder of the index; `None` is the cache of `datasets`.
        """
        super().__init__(split, task, path)
        tree = self._tree
        file = find_json(tree, split, annotations, panoptic=True)
        self._source = str(file)
        build = partial(build_index, tree, split, file, find_maps(tree, file, maps), images)
        facts = self._open_index((state_of(tree, file, images), maps), build, cache_dir)
        self._set_classes([Category(**category) for category in facts["categories"]], str(file))

    @classmethod
    def fits(cls, tree: FileTree) -> bool:
        """Say whether a folder looks like this form."""
        return bool(json_files(tree, None, panoptic=True))

    def _read(self, entry: Mapping[str, Any]) -> Labels:
        file, what = self._file(entry["map"]), f"image {entry['image_id']!r} of {self._source}"
        ids = read_ids(file, what, palette_is_colours=True)
        require_size(ids.shape, (entry["height"], entry["width"]), file, what)
        present = set(distinct(ids)) - {VOID}
        listed = {segment["id"] for segment in entry["segments"]}
        if present - listed:
            raise FileError(
                f"{file} shows segment ids that {self._source} does not list for image {entry['image_id']!r}: "
                f"{sorted(present - listed)[:MOST_EXAMPLES]}. List every segment, or write 0 (void)."
            )
        if listed and not present:
            raise FileError(
                f"{file} shows none of the segments that {self._source} lists for image {entry['image_id']!r}. Does it belong to it?"
            )
        return Labels(
            ids.shape,
            [
                Segment(segment["category"], equal_to(ids, segment["id"]), segment["crowd"])
                for segment in entry["segments"]
                if segment["id"] in present
            ],
            ids == VOID,
        )


def find_maps(tree: FileTree, file: StoredFile, maps: str | None) -> TreeFolder:
    """Find the folder of the PNG files."""
    if maps is not None:
        folder = tree.find_folder(maps.strip("/"))
        return TreeFolder(tree, folder) if folder is not None else TreeFolder(FileTree.open(tree.root / maps), "")
    names = [name for name in tree.below("", (".json",)) if tree.file(name) == file]
    beside = names[0].removesuffix(".json") if names else file.stem
    # Beside the JSON file, as COCO's archive unpacks, or anywhere else.
    return TreeFolder(tree, beside if beside in tree.folders else tree.find_folder(file.stem) or beside)


def build_index(tree: FileTree, split: Split, file: StoredFile, maps: TreeFolder, images: str | None) -> IndexContent:
    """Read the JSON file."""
    truth = PanopticFile.read_truth(file, maps, needs_isthing=True)  # type: ignore[arg-type] - they are like paths
    entries = {image_id: image_entry(truth, image_id, tree) for image_id in truth.annotations}
    files, missing = find_images(tree, split, entries, images, file, maps.folder if maps.tree is tree else None)
    columns = {
        **file_columns("map"),
        "image_id": id_type(list(files), file),
        **CLASS_COLUMNS,
        "segments": [{"id": "int64", "category": "int64", "crowd": "bool"}],
    }
    facts = IndexFacts({"categories": [vars(category) for category in truth.categories.values()]})
    for number, image_id in enumerate(entries):
        if image_id in missing:
            facts.add_problem(number, f"{files[image_id]}, image {image_id!r}, is missing.", files[image_id])
    return IndexContent(columns, make_rows(truth, entries, files, tree, facts), facts)


def make_rows(
    truth: PanopticFile,
    entries: Mapping[int | str, Mapping[str, Any]],
    files: Mapping[int | str, StoredFile],
    tree: FileTree,
    facts: IndexFacts,
) -> Iterator[dict[str, Any]]:
    """List the segments of each image."""
    for number, (image_id, annotation) in enumerate(truth.annotations.items()):
        file, size = None, (0, 0)
        try:
            file = truth.png(image_id)
            if "height" in entries[image_id]:
                size = size_of_image(entries[image_id], image_id, truth.path)
            else:
                size = read_size(file, f"the PNG file of image {image_id!r}")
        except FileError as error:
            facts.add_problem(number, f"{error} It belongs to image {image_id!r} of {truth.path}.", file)
        segments = [
            {"id": info["id"], "category": info["category_id"], "crowd": bool(info.get("iscrowd", 0))}
            for info in annotation["segments_info"]
        ]
        yield {
            "image_id": image_id,
            "height": size[0],
            "width": size[1],
            "image": files[image_id].to_record(tree.root),
            "map": NO_FILE if file is None else file.to_record(tree.root),
            **class_columns(segments),
            "segments": segments,
        }


def image_entry(truth: PanopticFile, image_id: int | str, tree: FileTree) -> Mapping[str, Any]:
    """Look up the entry of `images`; where a file has none, the image has the name of its PNG file, with any ending."""
    if image_id in truth.images:
        return truth.images[image_id]
    if truth.images:
        raise FileError(f"{truth.path}: image {image_id!r} has an annotation, but is not among the `images`.")
    stem = PurePosixPath(truth.annotations[image_id]["file_name"]).stem
    maps: TreeFolder = truth.folder  # type: ignore[assignment] - as it was passed
    for suffix in IMAGE_SUFFIXES:
        name = f"{stem}{suffix}"
        if any(f"{folder}/{name}".lstrip("/") in tree for folder in tree.folders if folder != maps.folder):
            return {"file_name": name}
    raise FileError(f"{truth.path} has no `images`, and no image file is called {stem}.")
