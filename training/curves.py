"""Curves of a training, from the lines of its log: `python -m training.curves FOLDER [FOLDER ...] --output FILE`.

`write_curves` draws one run: its losses and their parts, for matched queries and for pilots, the losses of each decoder level,
scores, learning rate and speed. `compare_runs` puts several runs into one picture, without the losses of pilots: a run without
piloting has none.

Colours are told apart by the colour-blind (Okabe and Ito); levels go from dark to bright.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, StrMethodFormatter

from training.folders import LOG_FILE
from training.log_lines import (
    KINDS,
    PILOT,
    LogError,
    is_about_steps,
    is_number,
    levels_of,
    read_log,
    scores_of,
)

Log = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]  # steps, values

CURVES_FILE, LEVELS_FILE = "curves.png", "levels.png"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
KIND_NAMES = dict(zip(KINDS, ("label", "mask", "dice"), strict=True))
# Above so many points, means over neighbours are drawn over pale points.
MOST_POINTS = 120
MOST_LISTED_LEVELS = 4
# What would write the date or random ids into the file.
METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m training.curves", description="Draw the curves of trainings.")
    parser.add_argument(
        "runs",
        metavar="[NAME=]FOLDER",
        nargs="+",
        help=f"output_dir of training.train, finished or not, or a {LOG_FILE}; NAME, by default the folder's, is what the "
        "legend says",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("curves.png"), help="picture to write (default: curves.png)"
    )
    options = parser.parse_args(argv)
    try:
        logs = read_runs(options.runs)
        if len(logs) == 1:
            ((name, log),) = logs.items()
            save_figure(draw_run(log, name), options.output)
        else:
            compare_runs(logs, options.output)
    except (LogError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"The curves of {len(logs)} {'run is' if len(logs) == 1 else 'runs are'} in {options.output}.")


def write_curves(log: Log, folder: Path, title: str = "") -> list[Path]:
    """Draw the curves of one run, in the place of what was drawn before.

    Args:
        log: its lines so far, in order.
        folder: is made if it is not there.
        title: written above.

    Returns:
        The pictures: `curves.png`, and `levels.png` if the log has losses of single levels. Without any line there are none.
    """
    if not log:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {CURVES_FILE: draw_run(log, title)}
    if any(levels_of(line) for line in log):
        figures[LEVELS_FILE] = draw_levels(log, title)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in figures]


def compare_runs(logs: Mapping[str, Log], path: Path) -> None:
    """Draw several runs into one picture.

    Args:
        logs: name of each run to its lines.
        path: `.png`, `.svg` or `.pdf`.

    Raises:
        LogError: the format is none of these, or there is nothing to draw.
    """
    if not any(logs.values()):
        raise LogError("There is nothing to compare: no run has a line in its log.")
    figure, all_axes = make_figure("")
    quantities: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("loss of matched queries", lambda line: add_kinds(line, "", KINDS)),
        *((f"{KIND_NAMES[kind]} loss", lambda line, kind=kind: line.get(kind)) for kind in KINDS),
    ]
    shown = first_score(logs.values())
    for number, (name, log) in enumerate(logs.items()):
        color, dashes = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
        style = {"color": color, "linestyle": dashes}
        for axes, (_, value) in zip(all_axes, quantities, strict=False):
            draw_line(axes, points_of(log, value), label=name, **style)
        scores = points_of(log, lambda line: percent(scores_of(line).get(shown)))
        draw_scores(all_axes[4], scores, label=name, marker=MARKERS[number % len(MARKERS)], **style)
        draw_line(all_axes[5], points_of(log, lambda line: line.get("images_per_second")), label=name, **style)
    for axes, (title, _) in zip(all_axes, quantities, strict=False):
        finish_losses(axes, title)
    finish_axes(all_axes[4], f"validation: {shown or 'not scored'}", "percent")
    finish_axes(all_axes[5], "speed", "images/s")
    all_axes[5].set_ylim(bottom=0)
    share_steps(figure, logs.values())
    add_legend_below(figure, all_axes)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def draw_run(log: Log, title: str = "") -> Figure:
    """Draw the six panels of one run."""
    figure, (loss, parts, levels, scores, rate, speed) = make_figure(title)
    draw_line(loss, points_of(log, lambda line: line.get("loss")), color=COLORS[0], label="all terms")
    draw_parts(parts, log)
    draw_levels_of(levels, log, lambda values: [math.fsum(terms) for terms in zip(*values, strict=False)], KINDS)
    draw_all_scores(scores, log)
    draw_line(rate, points_of(log, lambda line: line.get("learning_rate")), color=COLORS[0], label="highest group")
    draw_line(speed, points_of(log, lambda line: line.get("images_per_second")), color=COLORS[0], label="images/s")
    finish_losses(loss, "loss")
    mark_alarms(loss, log)
    finish_losses(parts, "parts of the loss", "summed over levels")
    finish_losses(levels, "loss of each level, matched queries")
    finish_axes(scores, "validation", "percent")
    finish_axes(rate, "learning rate", "")
    finish_axes(speed, "speed", "images/s")
    speed.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    share_steps(figure, [log])
    add_legend(parts, columns=2)
    for axes in (levels, scores):
        add_legend(axes)
    if any(line.get("alarms") for line in log):
        add_legend(loss)
    return figure


def draw_levels(log: Log, title: str = "") -> Figure:
    """Draw each kind of loss for each level: matched queries above, pilots below."""
    prefixes = [prefix for prefix in ("", PILOT) if any(f"{prefix}mask" in levels_of(line) for line in log)]
    figure, all_axes = make_figure(title, rows=len(prefixes) or 1)
    for row, prefix in enumerate(prefixes):
        for column, kind in enumerate(KINDS):
            axes = all_axes[row * len(KINDS) + column]
            draw_levels_of(axes, log, lambda values: values[0], [f"{prefix}{kind}"])
            finish_losses(axes, f"{KIND_NAMES[kind]} loss, {'pilots' if prefix else 'matched queries'}")
    share_steps(figure, [log])
    add_legend(all_axes[0])
    return figure


def draw_parts(axes: Axes, log: Log) -> None:
    """Draw label, mask and dice losses: lines for matched queries, dashes for pilots."""
    for prefix, dashes in (("", "-"), (PILOT, "--")):
        for color, kind in zip(COLORS, KINDS, strict=False):
            label = f"{KIND_NAMES[kind]}{', pilots' if prefix else ''}"
            points = points_of(log, lambda line, name=f"{prefix}{kind}": line.get(name))
            draw_line(axes, points, color=color, linestyle=dashes, label=label)


def draw_levels_of(
    axes: Axes, log: Log, join: Callable[[list[list[float]]], list[float]], kinds: Sequence[str]
) -> None:
    """Draw a line for each level, from dark to bright; `join` makes one value a level of the lists of all `kinds`."""
    lines = [(line, levels_of(line)) for line in log]
    joined = {
        line["step"]: join([levels[kind] for kind in kinds if kind in levels])
        for line, levels in lines
        if any(kind in levels for kind in kinds)
    }
    depth = max(map(len, joined.values()), default=0)
    colors = mpl.colormaps["viridis"]
    # A legend of ten levels would hide the curves.
    listed = {round(number * (depth - 1) / (MOST_LISTED_LEVELS - 1)) for number in range(MOST_LISTED_LEVELS)}
    for number in range(depth):
        steps = [step for step, values in joined.items() if number < len(values)]
        points = (steps, [joined[step][number] for step in steps])
        name = f"level {number}" + (" (last)" if number == depth - 1 else "")
        label = name if number in listed else None
        draw_line(axes, points, color=colors(0.9 * number / max(1, depth - 1)), label=label, shows_points=False)


def draw_all_scores(axes: Axes, log: Log) -> None:
    """Draw every score that was measured."""
    names = list(dict.fromkeys(name for line in log for name in scores_of(line)))
    for number, name in enumerate(names):
        points = points_of(log, lambda line, name=name: percent(scores_of(line).get(name)))
        draw_scores(
            axes,
            points,
            color=COLORS[number % len(COLORS)],
            linestyle=DASHES[number // len(COLORS) % len(DASHES)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"{name}: {points[1][-1]:.1f}" if points[1] else name,
        )


def mark_alarms(axes: Axes, log: Log) -> None:
    """Put a triangle under each step that raised an alarm."""
    steps = [line["step"] for line in log if line.get("alarms")]
    if steps:
        bottom = axes.get_xaxis_transform()  # steps, and the height of the panel
        axes.plot(
            steps, [0.03] * len(steps), linestyle="", marker="^", color=COLORS[1], label="alarm", transform=bottom
        )


# ---------------------------------------------------------------------------------------------------------------------
# Parts of pictures
# ---------------------------------------------------------------------------------------------------------------------


def make_figure(title: str, rows: int = 2) -> tuple[Figure, list[Axes]]:
    """Make a picture of three panels in a row."""
    figure = Figure(figsize=(15, 0.4 + 3.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(rows, 3, squeeze=False).flat)


def draw_line(
    axes: Axes,
    points: Points,
    *,
    color: Any,  # noqa: ANN401 - whatever matplotlib takes
    label: str | None,
    linestyle: str = "-",
    shows_points: bool = True,
) -> None:
    """Draw values over steps; of many, the means of neighbours, and unless there are many lines all of them in pale."""
    steps, values = points
    if not steps:
        return
    window = len(steps) // MOST_POINTS + 1
    if window > 1:
        if shows_points:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        steps, values = smooth(steps, window), smooth(values, window)
    marker = "." if len(steps) == 1 else ""
    axes.plot(steps, values, color=color, linestyle=linestyle, linewidth=1.5, marker=marker, label=label)


def draw_scores(axes: Axes, points: Points, *, color: str, linestyle: str, marker: str, label: str) -> None:
    """Draw scores, which are few: each with a mark."""
    if points[0]:
        axes.plot(*points, color=color, linestyle=linestyle, marker=marker, markersize=5, label=label)


def finish_losses(axes: Axes, title: str, label: str = "") -> None:
    """Give losses a scale on which a fall by half looks the same everywhere, with plain numbers."""
    finish_axes(axes, title, label)
    values = [value for line in axes.lines for value in map(float, np.asarray(line.get_ydata())) if value > 0]
    if not values:
        return
    axes.set_yscale("log")
    is_wide = max(values) > 30 * min(values)  # more numbers would overlap
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def finish_axes(axes: Axes, title: str, label: str) -> None:
    """Name a panel and its axes."""
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=5, integer=True))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color="0.5")


def share_steps(figure: Figure, logs: Iterable[Log]) -> None:
    """Let all panels begin at step 0 and end at the last one, so that they can be compared from top to bottom."""
    last = max((line["step"] for log in logs for line in log), default=1)
    for axes in figure.axes:
        axes.set_xlim(0, 1.03 * last)


def add_legend(axes: Axes, columns: int = 1) -> None:
    """List the lines of a panel where they hide least."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", framealpha=0.85, edgecolor="0.9", ncols=columns)


def add_legend_below(figure: Figure, all_axes: Iterable[Axes]) -> None:
    """List the lines of all panels, each once."""
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, min(len(handles), 130 // (8 + max(map(len, handles)))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture that is complete whenever it is there.

    Raises:
        LogError: its format is not known.
    """
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise LogError(f"{path} should end with one of {', '.join(METADATA)}.")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with mpl.rc_context({"svg.hashsalt": "curves"}):
            figure.savefig(unfinished, format=suffix[1:], metadata=METADATA[suffix])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def points_of(log: Log, value_of: Callable[[Mapping[str, Any]], float | None]) -> Points:
    """Steps and values of the lines that have a value; what is not finite becomes a gap."""
    known: list[tuple[float, float]] = []
    for line in log:
        value = value_of(line)
        if value is not None and is_number(value):
            known.append((line["step"], value))
    return [step for step, _ in known], [value if math.isfinite(value) else math.nan for _, value in known]


def add_kinds(line: Mapping[str, Any], prefix: str, kinds: Sequence[str]) -> float | None:
    """Sum of some kinds of losses; `None` if the line has none."""
    terms = [line[f"{prefix}{kind}"] for kind in kinds if f"{prefix}{kind}" in line]
    return math.fsum(terms) if terms and is_about_steps(line) else None


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` values that follow each other, of which none is left out: fewer at the end."""
    blocks = [values[start : start + window] for start in range(0, len(values), window)]
    means = []
    for block in blocks:
        finite = [value for value in block if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def first_score(logs: Iterable[Log]) -> str | None:
    """Name of the score that comes first in the first line that has any."""
    return next((name for log in logs for line in log for name in scores_of(line)), None)


def percent(value: float | None) -> float | None:
    """Fraction as percent."""
    return None if value is None else 100 * value


# ---------------------------------------------------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------------------------------------------------


def read_runs(arguments: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Read the logs that `[NAME=]FOLDER` arguments of the command line name.

    Raises:
        LogError: one cannot be read, or two runs have the same name.
    """
    logs: dict[str, list[dict[str, Any]]] = {}
    for argument in arguments:
        # A path may hold an equals sign: what exists as it is written is a path.
        name, separator, rest = argument.partition("=")
        if not separator or Path(argument).exists():
            name, rest = "", argument
        path = find_log(Path(rest))
        name = name or (Path(rest) if Path(rest).name != LOG_FILE else Path(rest).parent).resolve().name
        if name in logs:
            raise LogError(f"Two runs are called {name!r}. Give them names: NAME={rest}.")
        logs[name] = read_log(path)
    return logs


def find_log(path: Path) -> Path:
    """Find the log of a run: a file, that of a finished run, or that of the newest checkpoint of another.

    Raises:
        LogError: there is none.
    """
    if path.is_file():
        return path
    unfinished = path.with_name(f"{path.name}.checkpoints")
    # A run that goes on is newer than the result that it will replace.
    found = sorted(unfinished.glob(f"step-*/{LOG_FILE}")) or sorted(path.glob(f"step-*/{LOG_FILE}"))
    if found:
        return found[-1]
    if not (path / LOG_FILE).is_file():
        raise LogError(f"{path} holds no {LOG_FILE}. Pass the output_dir of training.train, or a {LOG_FILE}.")
    return path / LOG_FILE


if __name__ == "__main__":
    main()
