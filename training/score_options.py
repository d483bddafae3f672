"""Command line of the program that scores models; it needs no more than names, so that `--help` is there at once."""

import argparse
from pathlib import Path

from training.data import DATASETS, SPLITS, TASKS

PROGRAM = "python -m training.score"
EXAMPLES = f"""\
a model that training.train has made, whose folder says which data set and task it was made for:
  {PROGRAM} --model outputs/quickstart --layer-consistency
any other model, here in two processes:
  accelerate launch --num_processes 2 training/score.py --model USER/NAME --dataset {next(iter(DATASETS))} --task semantic
files of predictions:
  {PROGRAM} files --help
"""


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Score a model on a data set, at the original resolution. A run that was stopped goes on where it was when the "
        "same command is given again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, metavar="NAME", help="folder, or repository of the Hub: MPFormer or any model of transformers "
        "for universal segmentation")  # fmt: skip
    add("--revision", metavar="NAME", help="commit, branch or tag of the repository")
    add("--trust-remote-code", action="store_true", help="run the code that a repository holds")
    add(
        "--match-classes",
        choices=("name", "id"),
        default="name",
        help="how classes of model and data set are paired (default: name)",
    )
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="of the forward pass (default: no)")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: that of the recipe in the model's folder)",
    )
    add("--task", choices=TASKS, help="default: that of the recipe in the model's folder")
    add("--split", choices=SPLITS, default="validation", help="default: validation")
    add(
        "--dataset-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the data set; may be repeated",
    )
    add("--max-images", type=positive, metavar="N", help="score the first N images alone")

    add = parser.add_argument_group("what is measured").add_argument
    add("--tta", action="store_true", help="average several scales and mirrored views (semantic)")
    add(
        "--boundary",
        action="store_true",
        help="boundary AP in the place of AP (instance), also boundary IoU (semantic)",
    )
    add("--layer-consistency", action="store_true", help="mIoU-L and Util: how predictions change from layer to layer")
    add(
        "--threshold",
        type=share,
        default=0.5,
        metavar="X",
        help="score from which on a prediction counts as an error, and is drawn (default: %(default)s)",
    )
    add(
        "--precision",
        type=share,
        default=0.9,
        metavar="X",
        help="precision for which thresholds are recommended (default: %(default)s)",
    )

    add = parser.add_argument_group("running and output").add_argument
    add("--output-dir", type=Path, metavar="FOLDER", help="default: outputs/scores/MODEL-DATASET-TASK")
    add("--batch-size", type=positive, default=1, metavar="N", help="images in a forward pass of each process; images of one batch are "
        "padded to one size, which changes predictions slightly (default: 1)")  # fmt: skip
    add(
        "--num-workers",
        type=not_negative,
        default=2,
        metavar="N",
        help="processes that prepare batches, for each process (default: 2)",
    )
    add(
        "--num-examples",
        type=not_negative,
        default=4,
        metavar="N",
        help="best, and worst, images in the report (default: 4)",
    )
    add("--write-ground-truth", action="store_true", help="write the ground truth in the official form too")
    return parser


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """Read a number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Read a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value
