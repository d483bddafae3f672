"""Recipes on disk: YAML files, each of which may begin with the files that it changes.

    base: ../../_base/coco.yaml             or a list of files, of which a later one wins over an earlier one
    model: {num_queries: 200}               everything else wins over the bases

Mappings are merged key by key at every depth; anything else, lists too, is replaced. Paths of bases are relative to the file that
names them. Keys and values are not checked here.
"""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

BASE = "base"


class RecipeError(ValueError):
    """A recipe, or an option of the command line, that cannot be used; the message is for the user as it is."""


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Read a recipe and the files that it is based on.

    Returns:
        All settings, without `base`.

    Raises:
        RecipeError: a file cannot be read, is no mapping in YAML, or is based on itself; names the files that lead to it.
    """
    return _read(Path(path), ())


def merge_settings(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others: mappings are merged key by key, anything else of `upper` replaces what is there.

    >>> merge_settings({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
    {'a': {'b': 1, 'c': [3]}}
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        both_are_mappings = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_settings(below, value) if both_are_mappings else value  # type: ignore[arg-type]
    return merged


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the text says
    """Read YAML as recipes and options of the command line are written, see `RecipeLoader`."""
    return yaml.load(text, Loader=RecipeLoader)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _read(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file; `users` are the files that lead to it, the recipe first."""
    if path.resolve() in (user.resolve() for user in users):
        raise RecipeError(f"Recipe {_chain(path, users)} is based on itself. Remove one of the `{BASE}` lines.")
    own = _load(path, users)
    settings: dict[str, Any] = {}
    for name in _names_of_bases(own.pop(BASE, None), path, users):
        settings = merge_settings(settings, _read(path.parent / name, (*users, path)))
    return merge_settings(settings, own)


def _load(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    where = _chain(path, users)
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Recipe {where} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {where} is no valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"Recipe {where} must hold lines of the form `key: value`, got {type(settings).__name__}.")
    return settings


def _names_of_bases(value: object, path: Path, users: tuple[Path, ...]) -> list[str]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str):
            raise RecipeError(
                f"Recipe {_chain(path, users)}: `{BASE}` must be the path of a recipe, or a list of paths, got {value!r}."
            )
        if Path(name).is_absolute():
            raise RecipeError(
                f"Recipe {_chain(path, users)}: `{BASE}: {name}` is an absolute path, which other machines do not have. Write it "
                "relative to the folder of the recipe."
            )
    return names


def _chain(path: Path, users: tuple[Path, ...]) -> str:
    """Name a file, and which files lead to it."""
    via = f" (`{BASE}` of {', which is of '.join(str(user) for user in reversed(users))})" if users else ""
    return f"{path}{via}"


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: `1e-4` is a number, `no` is text. A key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dictionary."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key `{twice[0]}` comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)
