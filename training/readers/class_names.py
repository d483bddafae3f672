"""Names of classes as users write them: in an option, or in a file beside the data.

    ["road", "car"]                                     the position is the value in the PNG files
    {"1": "road", "2": "car"}                           value -> name
    [{"id": 1, "name": "road", "isthing": 0}, ...]      COCO's `categories`; also inside of an object, under `categories` or `classes`
    a text file                                         one name a line, the first is of value 0

A value is what the data has at a pixel, or in a column, of this class.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.image_files import FileTree, StoredFile
from training.official_files import Category, FileError, read_json

FILE_NAMES = ("id2label.json", "classes.json", "labels.json", "categories.json", "classes.txt", "labels.txt")

Names = list[Any] | Mapping[Any, Any] | str


@dataclass(frozen=True)
class NamedClass:
    """A class: its value in the data, its name, and whether it is a thing, if that is said."""

    value: int
    name: str
    is_thing: bool | None = None


def find_names(tree: FileTree, option: Names | None) -> tuple[list[NamedClass], StoredFile | None]:
    """Read the classes of an option, or of the first of the usual files.

    Returns:
        The classes, and the file, if they are from one.

    Raises:
        FileError: there is none, or it makes no sense.
    """
    if option is not None and not isinstance(option, str):
        return parse_names(option, "The option `classes`"), None
    if option is None:
        found = nearest_named(tree, FILE_NAMES)
        if not found:
            raise FileError(
                f"{tree.root} has no file with the names of the classes: none of {', '.join(FILE_NAMES)}. Write one, or name the classes "
                "with the option `classes`."
            )
        option = found[0]
    file = tree.locate(option)
    return read_names(file), file


def nearest_named(tree: FileTree, basenames: Sequence[str]) -> list[str]:
    """List the files of some names, those nearest to the root first, and of those in the order of `basenames`.

    An archive often has a folder around everything.
    """
    found = [name for name in tree.below("") if name.rpartition("/")[2] in basenames]
    return sorted(found, key=lambda name: (name.count("/"), basenames.index(name.rpartition("/")[2]), name))


def read_names(file: StoredFile) -> list[NamedClass]:
    """Read the classes of a file.

    Raises:
        FileError: it is missing, or makes no sense.
    """
    if file.name.endswith(".json"):
        return parse_names(read_json(file), str(file))  # type: ignore[arg-type] - it reads like a path
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read: {error}.") from None
    return parse_names([line.strip() for line in lines if line.strip()], str(file))


def parse_names(content: Any, where: str) -> list[NamedClass]:  # noqa: ANN401 - whatever a file holds
    """Read the classes of a list or a dictionary.

    Raises:
        FileError: it is of none of the forms, or a value comes twice.
    """
    if isinstance(content, Mapping):
        nested = next((content[key] for key in ("categories", "classes") if isinstance(content.get(key), list)), None)
        if nested is not None:
            return parse_names(nested, where)
        content = [{"id": key, "name": name} for key, name in content.items()]
    if not isinstance(content, list) or not content:
        raise FileError(f"{where} must be a list of names, or a dictionary of value to name, of at least one class.")
    entries = [
        {"id": number, "name": entry} if isinstance(entry, str) else entry for number, entry in enumerate(content)
    ]
    classes = [parse_class(entry, where) for entry in entries]
    values = [entry.value for entry in classes]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise FileError(f"{where} has the value {twice} twice. Each class needs its own.")
    return classes


def parse_class(entry: Any, where: str) -> NamedClass:  # noqa: ANN401 - whatever a file holds
    """Read one class."""
    try:
        value, name = int(entry["id"]), entry["name"]
    except (TypeError, KeyError, ValueError):
        raise FileError(f"{where} has the class {str(entry)[:80]}. Expected an integer `id` and a `name`.") from None
    if value < 0 or not isinstance(name, str):
        raise FileError(f"{where} has the class {str(entry)[:80]}. Expected an `id` of at least 0, and text as `name`.")
    return NamedClass(value, name, None if entry.get("isthing") is None else bool(entry["isthing"]))


def to_categories(
    classes: list[NamedClass], things: Collection[str] | None, *, unsaid: bool | None, where: str
) -> list[Category]:
    """Say of each class whether it is a thing.

    Args:
        classes: as they were read.
        things: names of those that are things, if the user has said so.
        unsaid: what a class is of which nobody has said it; `None` is an error.
        where: the classes are from, for messages.

    Raises:
        FileError: a thing is no class, or nobody has said what is a thing.
    """
    names = {entry.name for entry in classes}
    unknown = sorted(set(things or ()) - names)
    if unknown:
        raise FileError(f"The option `things` names {unknown[0]!r}, which is no class of {where}.")
    categories = []
    for entry in classes:
        is_thing = entry.is_thing if things is None else entry.name in things
        is_thing = unsaid if is_thing is None else is_thing
        if is_thing is None:
            raise FileError(
                f"{where} does not say whether {entry.name!r} is a thing. Name the classes with instances with the option `things`."
            )
        categories.append(Category(entry.value, entry.name, is_thing))
    return categories
