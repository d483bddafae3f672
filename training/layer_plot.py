"""Pictures of layer consistency: `python -m training.layer_plot NAME=results.json ... --output plot.png`.

The plot compares models level by level: mIoU-L of all and of matched queries, and Util (what they are, says
`mpformer_hf/layer_consistency.py`), from the results that `training.score --layer-consistency` has written.
`draw_query` shows one query of one image at every level.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mpformer_hf.layer_consistency import LayerConsistency, enlarge_masks
from mpformer_hf.visualization import draw_layers

RESULTS_FILE = "results.json"
RESULTS_KEY = "layer_consistency"
PANELS = {
    "mIoU_L": ("mIoU-L, all queries", "mean IoU with the next level"),
    "mIoU_L_matched": ("mIoU-L, matched queries", "mean IoU with the next level"),
    "Util": ("Util", "share matched as at the last level"),
}
# One line differs from another in colour, marker and dashes.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
# What would write the date or random ids into the file.
METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


class ResultsError(ValueError):
    """Results that cannot be plotted; the message is for the user as it is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m training.layer_plot", description="Compare decoder layers of models."
    )
    parser.add_argument(
        "results",
        metavar="[NAME=]RESULTS",
        nargs="+",
        help=f"{RESULTS_FILE} of training.score --layer-consistency, or a folder that holds it; NAME, by default the "
        "folder's, is what the legend says",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("layers.png"), help="picture to write (default: layers.png)"
    )
    options = parser.parse_args(argv)
    try:
        plot_layer_consistency(read_results(options.results), options.output)
    except (ResultsError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"The plot of {len(options.results)} models is in {options.output}.")


def plot_layer_consistency(scores: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot mIoU-L and Util, one line a model, levels from left to right.

    Args:
        scores: name of each model to what `LayerConsistencyScores.compute` returned.
        path: `.png`, `.svg` or `.pdf`; the same scores give the same file.

    Raises:
        ResultsError: there is no model, scores are not what `compute` returns, or the format is none of these.
    """
    if path.suffix.lower() not in METADATA:
        raise ResultsError(f"{path} should end with one of {', '.join(METADATA)}.")
    if not scores:
        raise ResultsError("There is nothing to plot. Pass the scores of at least one model.")
    for name, score in scores.items():
        check_scores(name, score)
    with mpl.rc_context({**mpl.rcParamsDefault, "svg.hashsalt": "layer_plot", "backend": "agg"}):
        figure = make_figure(scores)
        figure.savefig(path, metadata=METADATA[path.suffix.lower()], bbox_inches="tight")


def make_figure(scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the panels, and under them a legend of all models."""
    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12)
    all_axes = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (key, (title, label)) in zip(all_axes, PANELS.items(), strict=True):
        for number, (name, score) in enumerate(scores.items()):
            if score[key] is None:
                continue
            marker, dashes = MARKERS[number % len(MARKERS)], DASHES[number // 10 % len(DASHES)]
            legend = name if score["Util"] is not None else f"{name} (no matched queries)"
            axes.plot(
                range(len(score[key])),
                score[key],
                color=f"C{number}",
                marker=marker,
                linestyle=dashes,
                label=legend,
                clip_on=False,
            )
        axes.set(title=title, xlabel="level i", ylabel=label, ylim=(0, 1))
        axes.set_xlim(-0.25, max(score["levels"] for score in scores.values()) - 1.75)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_tick_params(labelleft=True)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = all_axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), 120 // max(map(len, labels)), 6))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def draw_query(
    image: Image.Image,
    mask_logits: Sequence[torch.Tensor],
    consistency: LayerConsistency,
    mask_labels: np.ndarray | torch.Tensor,
    valid_size: Sequence[int] | torch.Tensor | None = None,
    *,
    query: int | None = None,
    title: str = "",
) -> Image.Image:
    """Draw one query of one image at every level, with the segment that the last level matches it to.

    Args:
        image: at its own size.
        mask_logits: for each level (Q, h, w), as `image_layer_consistency` took them.
        consistency: what it returned.
        mask_labels: (T, H, W), at the image's own size.
        valid_size: as there.
        query: in [0, Q); `None`: the matched query whose masks change most.
        title: begins the line above the picture, for example with the names of model and image.
    """
    number = consistency.least_consistent_query() if query is None else query
    num_queries = consistency.matches.shape[1]
    if not 0 <= number < num_queries:
        raise ValueError(f"Expected a query in [0, {num_queries}), got {number}.")
    target = int(consistency.matches[-1, number])
    return draw_layers(
        image,
        enlarge_masks(torch.stack([level[number] for level in mask_logits]), (image.height, image.width), valid_size),
        title=f"{title}, query {number}" if title else f"query {number}",
        ground_truth=None if target < 0 else mask_labels[target],
        next_iou=consistency.query_iou[:, number].tolist(),
        notes=[name_match(int(match)) for match in consistency.matches[:, number]],
    )


def name_match(target: int) -> str:
    """Say which segment a query is matched to; -1 is none."""
    return "not matched" if target < 0 else f"matched to segment {target}"


# ---------------------------------------------------------------------------------------------------------------- input


def read_results(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the scores that `[NAME=]RESULTS` arguments of the command line name."""
    scores: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, path = split_name(argument)
        if name in scores:
            raise ResultsError(f"Two models are called {name!r}. Give them names: NAME={path}.")
        scores[name] = read_file(path)
    return scores


def split_name(argument: str) -> tuple[str, Path]:
    """Divide an argument into the name of the model and the path of its results."""
    # A path may hold an equals sign: what exists as it is written is a path.
    name, separator, rest = argument.partition("=")
    if not separator or Path(argument).exists():
        name, rest = "", argument
    path = Path(rest) / RESULTS_FILE if Path(rest).is_dir() else Path(rest)
    return name or path.resolve().parent.name, path


def read_file(path: Path) -> dict[str, Any]:
    """Read the layer consistency out of a file of results."""
    if not path.is_file():
        raise ResultsError(f"{path} is not there. Pass a {RESULTS_FILE} of training.score, or its folder.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is no JSON: {error}.") from error
    scores = results.get(RESULTS_KEY) if isinstance(results, dict) else None
    if not isinstance(scores, dict):
        raise ResultsError(f"{path} has no {RESULTS_KEY!r}. Score the model with --layer-consistency.")
    return scores


def check_scores(name: str, scores: Mapping[str, Any]) -> None:
    """Refuse scores that are not what `LayerConsistencyScores.compute` returns."""
    missing = sorted({"levels", *PANELS} - scores.keys())
    if missing:
        raise ResultsError(f"The layer consistency of {name!r} lacks {', '.join(missing)}. Score the model again.")
    levels = scores["levels"]
    if levels is None:
        raise ResultsError(f"The layer consistency of {name!r} is of no image. Score the model on at least one.")
    if not isinstance(levels, int) or levels < 2:  # noqa: PLR2004 - a level and the next
        raise ResultsError(f"levels of {name!r} should be a whole number of at least 2, but is {levels!r}.")
    for key in PANELS:
        values = scores[key]
        if not (is_list_of_shares(values) and len(values) == levels - 1) and (values is not None or key == "mIoU_L"):
            raise ResultsError(
                f"{key} of {name!r} should be {levels - 1} numbers in [0, 1], for {levels} levels, but is {values!r}. "
                "Score the model again."
            )


def is_list_of_shares(values: Any) -> bool:  # noqa: ANN401 - read from a file
    """Whether this is a list of numbers in [0, 1]."""
    return isinstance(values, list) and all(
        isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1 for value in values
    )


if __name__ == "__main__":
    main()
