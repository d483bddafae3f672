"""Lines of the log, as trackers, plots and alarms read them.

A line about steps has a `loss`:

    {"step": 20, "loss": 31.4, "mask": ..., "pilot_mask": ..., "levels": {"mask": [level 0, ...], ...},
     "learning_rate": ..., "images_per_second": ..., "alarms": [...]}

and one about an evaluation has scores:

    {"step": 20, "scores": {"PQ": 0.41}, "scores_of_average": {"PQ": 0.43}}
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

KINDS = ("cross_entropy", "mask", "dice")
PILOT = "pilot_"

Value = TypeVar("Value")


class LogError(ValueError):
    """A log that cannot be read; the message is for the user as it is."""


def split_levels(loss_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Name the terms of a loss by level: `loss_mask_0` becomes `level/0/mask`.

    The last level, which has no number in a `loss_dict`, gets the one after the others.

    Args:
        loss_dict: terms of one forward pass, as the criterion names them; numbers or tensors, which stay as they are.

    Returns:
        The same values, level by level, kinds in the order of `loss_dict`.
    """
    kinds: dict[str, dict[int | None, Value]] = defaultdict(dict)
    for name, value in loss_dict.items():
        kind, number = re.fullmatch(r"(?:loss_)?(.+?)(?:_(\d+))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        kinds[kind][None if number is None else int(number)] = value
    placed = [
        (len(levels) - 1 if number is None else number, kind, value)
        for kind, levels in kinds.items()
        for number, value in levels.items()
    ]
    return {f"level/{number}/{kind}": value for number, kind, value in sorted(placed, key=lambda entry: entry[0])}


def name_levels(levels: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name the values of `levels` of a line as `split_levels` does: `level/0/mask`, level by level."""
    depth = max(map(len, levels.values()), default=0)
    return {
        f"level/{number}/{kind}": values[number]
        for number in range(depth)
        for kind, values in levels.items()
        if number < len(values)
    }


def levels_of(line: Mapping[str, Any]) -> dict[str, list[float]]:
    """Losses of each kind, level by level; of a line with `levels`, or with `level/0/mask` and so on."""
    if "levels" in line:
        return {kind: list(values) for kind, values in line["levels"].items()}
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for name, value in line.items():
        if match := re.fullmatch(r"level/(\d+)/(.+)", name):
            found[match[2]][int(match[1])] = value
    return {kind: [values[number] for number in sorted(values)] for kind, values in found.items()}


def is_about_steps(line: Mapping[str, Any]) -> bool:
    """Whether a line has losses; otherwise it is about an evaluation."""
    return "loss" in line


def scores_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Scores of a line about an evaluation, by name: `PQ`, `PQ of average`; a negative one is undefined, and left out."""
    if is_about_steps(line):
        return {}
    found: dict[str, float] = {}
    for key, entry in line.items():
        beginning, _, ending = key.partition("scores")
        if isinstance(entry, Mapping) and not beginning:
            found |= {f"{name}{ending.replace('_', ' ')}": value for name, value in entry.items()}
        elif isinstance(entry, Mapping):
            found |= {f"{key.replace('_', ' ')} {name}": value for name, value in entry.items()}
        elif key not in ("step", "seconds"):
            found[key] = entry
    return {name: float(value) for name, value in found.items() if is_number(value) and not value < 0}


def is_number(value: Any) -> bool:  # noqa: ANN401 - of a log
    """Whether this is a number, which for Python truth values are too, but not here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log.

    Raises:
        LogError: it is not there, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path} cannot be read: {error}.") from error
    lines = []
    for number, words in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(words)
        except ValueError as error:
            raise LogError(f"{path}, line {number}, is no JSON: {error}.") from error
        if not isinstance(line, dict) or not is_number(line.get("step")):
            raise LogError(f"{path}, line {number}, is no line of a training: it has no step.")
        lines.append(line)
    return lines
