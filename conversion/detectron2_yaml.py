"""Detectron2 configuration files as data: `_BASE_` chains, `KEY VALUE` overrides, the original's defaults.

The original reads its files with a YAML loader that runs code. Here nothing of a file is run, and what it can cost is bounded:
size, depth, expanded aliases, number of files. The released semantic and Cityscapes files hold a Python expression for a key of
the training data; such a value is accepted where the key is one that the conversion ignores.

Every message names the file and the way to it over `_BASE_`, and the key.
"""

import ast
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conversion import ConversionError
from conversion.detectron2_keys import DEFAULTS, IGNORED, KNOWN, SECTIONS, Value, nearest_key

BASE_KEY = "_BASE_"
PYTHON_TUPLE = "tag:yaml.org,2002:python/tuple"
PYTHON_EVAL = "tag:yaml.org,2002:python/object/apply:eval"

# A complete dump of a configuration has 12 kB, 350 values and 6 levels.
MAX_FILE_BYTES = 2**16
MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_FILES = 16
MAX_TEXT = 1000
MAX_ITEMS = 100
MAX_INTEGER = 2**31
SHOWN_LENGTH = 80
NUM_REPORTED_KEYS = 5


@dataclass(frozen=True)
class Detectron2Config:
    """A configuration of the original.

    Attributes:
        values: key ("MODEL.DN.NUM_DN") -> value, of the keys that a file or an override sets and the conversion reads.
        ignored: keys that are set and that the conversion ignores, see `IGNORED`.
    """

    values: Mapping[str, Value]
    ignored: frozenset[str] = frozenset()

    def get(self, key: str) -> Value:
        """Return the value of a key that the conversion reads, the original's default where nothing sets it."""
        if key not in DEFAULTS:
            raise KeyError(
                f"{key} is not a key that the conversion reads. The nearest known key is {nearest_key(key)}."
            )
        return self.values.get(key, DEFAULTS[key])

    def is_set(self, key: str) -> bool:
        """Whether a file or an override sets the key."""
        return key in self.values or key in self.ignored


@dataclass(frozen=True)
class CodeNotRun:
    """Stands for a Python expression in a file; it is kept nowhere and run never."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> Detectron2Config:
    """Read a configuration file, the files that it is based on, and overrides.

    Args:
        path: a YAML file.
        overrides: "KEY", "VALUE", "KEY", "VALUE", ... as on the original's command line. Values are Python literals, else text.

    Raises:
        ConversionError: names the file or the override, the key, what was expected and what came.
    """
    values = read_with_bases(Path(path), chain=(), budget=[MAX_FILES]) | read_overrides(overrides)
    if values.get("VERSION", DEFAULTS["VERSION"]) != DEFAULTS["VERSION"]:
        raise ConversionError(
            f"{path}: VERSION is {values['VERSION']}; expected 2, the configurations of Detectron2 and Mask2Former. Load and save "
            "the file with Detectron2, which brings old ones up to date."
        )
    return Detectron2Config(
        values={key: value for key, value in values.items() if key in DEFAULTS},
        ignored=frozenset(values.keys() & IGNORED.keys()),
    )


# --- files -------------------------------------------------------------------------------------------------------------------


def read_with_bases(path: Path, chain: tuple[Path, ...], budget: list[int]) -> dict[str, Any]:
    """Read a file and those that it is based on; the file's own values win, and of several bases the later.

    Args:
        path: the file.
        chain: the files that led here, resolved, outermost first.
        budget: one number, the files that may still be read.
    """
    try:
        resolved = path.expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{describe([*chain, path])}: not a path of a file ({error}).") from error
    here = describe([*chain, resolved])
    if resolved in chain:
        raise ConversionError(f"{here}: the configuration is based on itself. Take one {BASE_KEY} out.")
    if not budget[0]:
        raise ConversionError(f"{here}: more than {MAX_FILES} files are based on one another. Join some of them.")
    budget[0] -= 1
    document = parse(read_text(resolved, here), here)
    bases = document.pop(BASE_KEY, [])
    values: dict[str, Any] = {}
    for base in base_paths(bases, here):
        values |= read_with_bases(resolved.parent / base, (*chain, resolved), budget)
    return values | checked_values(document, here)


def describe(chain: Sequence[Path]) -> str:
    """The way to a file for messages."""
    return f" -> {BASE_KEY} ".join(str(path) for path in chain)


def base_paths(bases: object, here: str) -> list[Path]:
    """Check the value of `_BASE_`: a path relative to its file, an absolute one, one that begins with `~`, or several."""
    listed = bases if isinstance(bases, list | tuple) else [bases]
    for base in listed:
        if not isinstance(base, str) or not 0 < len(base) <= MAX_TEXT:
            raise ConversionError(f"{here}: {BASE_KEY} must be the path of a file, got {shown(base)}.")
        if "://" in base:
            raise ConversionError(
                f"{here}: {BASE_KEY} is {shown(base)}. Nothing is downloaded: save that file next to this one and name its path."
            )
    return [Path(base).expanduser() if base.startswith("~/") else Path(base) for base in listed]


def read_text(path: Path, here: str) -> str:
    """Read a file of bounded size as UTF-8."""
    try:
        if not path.is_file():
            raise ConversionError(f"{here}: there is no such file.")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{here}: the file cannot be read ({error}).") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConversionError(f"{here}: larger than {MAX_FILE_BYTES} bytes, so not a configuration.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{here}: not text in UTF-8 (byte {error.start}), so not a configuration.") from error


class BoundedLoader(yaml.SafeLoader):
    """A safe loader that counts: nodes with every alias expanded, and levels."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.expanded: dict[int, int] = {}  # id of a node -> nodes below it, and itself

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Compose one node, and refuse it where the document grows out of bounds."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            self.expanded[id(node)] = 1 + sum(self.expanded.get(id(part), MAX_NODES) for part in parts_of(node))
        if self.expanded.get(id(node), MAX_NODES) >= MAX_NODES:  # not counted yet: it holds itself
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values with its aliases", problem_mark=mark)
        return node


def parts_of(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield the nodes directly below a node."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


BoundedLoader.add_constructor(PYTHON_TUPLE, lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))
BoundedLoader.add_constructor(PYTHON_EVAL, lambda _loader, _node: CodeNotRun())


def parse(text: str, here: str) -> dict[Any, Any]:
    """Parse one YAML document that is a mapping."""
    try:
        document = yaml.load(text, Loader=BoundedLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConversionError(f"{here}: broken YAML{place}: {error.problem or error.context}.") from error
    # PyYAML's constructors of explicitly tagged values raise whatever they stumble over.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ConversionError(f"{here}: broken YAML: {type(error).__name__}: {str(error)[:SHOWN_LENGTH]}.") from error
    if not isinstance(document, dict):
        raise ConversionError(f"{here}: expected a mapping of sections such as MODEL, got {shown(document)}.")
    return document


# --- values ------------------------------------------------------------------------------------------------------------------


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Check overrides: key, value, key, value, ..."""
    if len(overrides) % 2:
        hint = " Write `KEY VALUE`, not `KEY=VALUE`." if any("=" in part for part in map(str, overrides)) else ""
        raise ConversionError(
            f"Overrides come in pairs of a key and a value, got {len(overrides)}: {shown(list(overrides))}.{hint}"
        )
    values: dict[str, Any] = {}
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        here = f"override {str(key)[:SHOWN_LENGTH]}"
        refuse_unknown([key], here)
        values[key] = checked_value(key, value, here)
    return values


def checked_values(document: Mapping[Any, Any], here: str) -> dict[str, Any]:
    """Turn nested sections into "MODEL.DN.NUM_DN" -> value, and check keys and values."""
    leaves = dict(flatten(document, "", here))
    refuse_unknown(list(leaves), here)
    return {key: checked_value(key, value, here) for key, value in leaves.items()}


def flatten(section: Mapping[Any, Any], prefix: str, here: str) -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of everything in a section."""
    for name, value in section.items():
        if not isinstance(name, str) or "." in name or not name:
            raise ConversionError(
                f"{here}: keys are names without a dot, got {shown(name)} in {prefix[:-1] or 'the file'}."
            )
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (value or key in SECTIONS) and key not in KNOWN:
            yield from flatten(value, f"{key}.", here)
        else:
            yield key, value


def refuse_unknown(keys: Sequence[Any], here: str) -> None:
    """Refuse keys of which nobody knows whether they matter, and values where a section should be."""
    if section := next((key for key in keys if key in SECTIONS), None):
        raise ConversionError(f"{here}: {section} is a section with keys of its own, not a value.")
    unknown = [key for key in keys if key not in KNOWN]
    if not unknown:
        return
    listed = "; ".join(
        f"{shown(key)} (the nearest known key is {nearest_key(str(key)[:SHOWN_LENGTH])})"
        for key in unknown[:NUM_REPORTED_KEYS]
    )
    more = f"; and {len(unknown) - NUM_REPORTED_KEYS} more" if len(unknown) > NUM_REPORTED_KEYS else ""
    raise ConversionError(
        f"{here}: unknown key {listed}{more}. Correct it; or, if it belongs to an extension that does not change the model, take it "
        "out."
    )


def checked_value(key: str, value: object, here: str) -> Value:
    """Decode text as the original does, and check that the value fits the key; what is ignored may be anything."""
    if key in IGNORED:
        return None
    default = DEFAULTS[key]
    decoded = decode(value)
    fitted = fit(decoded, default)
    if fitted is None and not (decoded is None and default is None):
        raise ConversionError(f"{here}: {key} must be {kind_of(default)}, got {shown(value)}.")
    return fitted


def decode(value: object) -> object:
    """Read text as a Python literal where it is one: "1e-4", '("coco_2017_val",)', "None"."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def fit(value: object, default: Value) -> Value:
    """Return the value as the type of the default, or `None` where it does not fit.

    As in the original lists and tuples stand for each other; an integer also stands for a float.
    """
    if isinstance(default, list | tuple):
        return fit_items(value, default)
    if isinstance(default, bool) or isinstance(value, bool):
        return value if isinstance(default, bool) and isinstance(value, bool) else None
    if isinstance(default, str):
        return value if isinstance(value, str) and len(value) <= MAX_TEXT else None
    return fit_number(value, default)


def fit_items(values: object, default: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...] | None:
    """Return a sequence of the default's type, whose items are of the type of its items (text, where it is empty)."""
    if not isinstance(values, list | tuple) or len(values) > MAX_ITEMS:
        return None
    items = [fit(item, default[0] if default else "") for item in values]
    return None if None in items else type(default)(items)


def fit_number(value: object, default: float | None) -> int | float | None:
    """Return an integer where the default is one, else a finite float; `None` where the value does not fit."""
    if isinstance(value, int) and abs(value) <= MAX_INTEGER:
        return value if isinstance(default, int) else float(value)
    if isinstance(value, float) and math.isfinite(value) and not isinstance(default, int):
        return value
    return None


def kind_of(default: Value) -> str:
    """What a value of this type is called in messages."""
    if isinstance(default, list | tuple):
        return f"a list such as {shown(default or ('coco_2017_val',))}"
    kinds = {bool: "True or False", int: "an integer", float: "a finite number", str: "text"}
    return kinds.get(type(default), "a finite number or None")


def shown(value: object) -> str:
    """The value for messages, short in any case."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} of many digits"
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."
