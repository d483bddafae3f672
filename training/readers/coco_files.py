"""Where the files of a data set in one of COCO's forms lie: the JSON file of a split, and the images that it lists."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from training.data import Split
from training.image_files import FileTree, StoredFile, describe_state, name_some
from training.official_files import FileError
from training.readers.reader import SPLIT_NAMES

# Words in the names of COCO's other files.
OTHER_FORMS = ("captions", "keypoints", "panoptic", "image_info", "stuff_", "densepose", "package")
KEEP_IN_MESSAGE = 5


def names_split(name: str, split: Split) -> bool:
    """Say whether a path has the name of a split in it, as in `annotations/instances_train2017.json`.

    >>> names_split("annotations/instances_train2017.json", "train"), names_split("constraints.json", "train")
    (True, False)
    """
    return re.search(rf"(?<![a-z])(?:{'|'.join(SPLIT_NAMES[split])})(?![a-z])", name.lower()) is not None


def json_files(tree: FileTree, split: Split | None, *, panoptic: bool) -> list[str]:
    """List the JSON files that may hold the annotations of a split, of any if `None`, those with COCO's name before others."""
    names = [name for name in tree.below("", (".json",)) if split is None or names_split(name, split)]
    basenames = {name: PurePosixPath(name).name.lower() for name in names}
    if panoptic:
        return [name for name in names if "panoptic" in basenames[name]]
    instances = [name for name in names if basenames[name].startswith("instances")]
    return instances or [name for name in names if not any(word in basenames[name] for word in OTHER_FORMS)]


def find_json(tree: FileTree, split: Split, annotations: str | None, *, panoptic: bool) -> StoredFile:
    """Find the JSON file of a split.

    Args:
        tree: the data set.
        split: its split.
        annotations: name of the file, if the user has said one.
        panoptic: whether the panoptic form is wanted, or that of instances.

    Raises:
        FileError: there is none, or several fit.
    """
    if annotations is not None:
        return tree.locate(annotations)
    found = json_files(tree, split, panoptic=panoptic)
    if len(found) == 1:
        return tree.file(found[0])
    form, words = "panoptic" if panoptic else "instances", " or ".join(SPLIT_NAMES[split])
    if found:
        raise FileError(
            f"{tree.root} has several JSON files that may hold the {form} of the {split} split: {name_some(found)}. Name one with the "
            "option `annotations`."
        )
    raise FileError(
        f"{tree.root} has no JSON file of {form} for the {split} split: its path should have the word {words} in it, as "
        f"annotations/{form}_{SPLIT_NAMES[split][0]}2017.json. Found: {name_some(tree.below('', ('.json',))) or 'no JSON file'}. Name "
        "it with the option `annotations`."
    )


def state_of(tree: FileTree, file: StoredFile, images: str | None) -> tuple[Any, ...]:
    """Describe everything that the index of COCO files depends on."""
    pictures = [name for name in tree.names if not name.endswith(".json")]
    return str(file), describe_state(file.path), images, tree.stamp(pictures)


def find_images(
    tree: FileTree,
    split: Split,
    entries: Mapping[int | str, Mapping[str, Any]],
    images: str | None,
    json_file: StoredFile,
    maps: str | None = None,
) -> tuple[dict[int | str, StoredFile], set[int | str]]:
    """Find the image files that a JSON file lists.

    Args:
        tree: the data set.
        split: its split; decides where several folders have files of these names.
        entries: of `images` in the JSON file, by image id.
        images: folder of the images, if the user has said one.
        json_file: the JSON file.
        maps: folder of the PNG files, which may have the names of the images.

    Returns:
        The file of each image, and the ids of those whose file is missing.

    Raises:
        FileError: an entry has no name, or all files are missing.
    """
    names = {}
    for image_id, entry in entries.items():
        if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            raise FileError(f"{json_file}: image {image_id!r} has no `file_name` (text).")
        names[image_id] = entry["file_name"].replace("\\", "/").removeprefix("./")
    holder, folder = image_folder(tree, split, list(names.values()), images, json_file, maps)
    places = {image_id: f"{folder}/{name}" if folder else name for image_id, name in names.items()}
    missing = {image_id for image_id, place in places.items() if place not in holder}
    if len(missing) == len(places):
        raise FileError(
            f"All {len(names)} images that {json_file} lists are missing in {holder.root / folder}: "
            f"{name_some(set(names.values()))}."
        )
    return {
        image_id: StoredFile(holder.root / place) if image_id in missing else holder.file(place)
        for image_id, place in places.items()
    }, missing


def image_folder(
    tree: FileTree, split: Split, names: Sequence[str], images: str | None, json_file: StoredFile, maps: str | None
) -> tuple[FileTree, str]:
    """Find the folder in which the first image that is there, and so all of them, should lie, and the tree that has it."""
    if images is not None:
        folder = tree.find_folder(images.strip("/"))
        return (tree, folder) if folder is not None else (FileTree.open(tree.root / Path(images).expanduser()), "")
    basenames = {name.rpartition("/")[2] for name in tree.names}
    first = next((name for name in names if name.rpartition("/")[2] in basenames), names[0])
    folders = [name[: -len(first)].rstrip("/") for name in tree.names if name == first or name.endswith(f"/{first}")]
    folders = [folder for folder in folders if folder != maps]
    # PNG files of segment ids have the names of the images, where these are PNG files too.
    folders = [folder for folder in folders if "panoptic" not in PurePosixPath(folder).name] or folders
    if not folders:
        raise FileError(
            f"{first} and the other images that {json_file} lists are nowhere below {tree.root}. Name the folder of the images with "
            "the option `images`."
        )
    home = (json_file.member or json_file.path.as_posix()).rpartition("/")[0]
    preferences = [
        [folder for folder in folders if names_split(folder, split)],
        [folder for folder in folders if home.endswith(folder)],
        folders,
    ]
    chosen = next((choice for choice in preferences if len(choice) == 1), None)
    if chosen is None:
        raise FileError(
            f"{first}, which {json_file} lists, is in several folders of {tree.root}: {name_some(folders)}. Name one "
            "with the option `images`."
        )
    return tree, chosen[0]


def id_type(image_ids: Sequence[int | str], json_file: StoredFile) -> str:
    """Say how image ids are stored: as integers or as text.

    Raises:
        FileError: some are integers, some are text.
    """
    kinds = {type(image_id) for image_id in image_ids}
    if len(kinds) > 1:
        raise FileError(f"{json_file} has image ids that are integers, and others that are text. Use one kind.")
    return "int64" if kinds == {int} else "string"
