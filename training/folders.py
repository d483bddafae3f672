"""Folders and files that are complete whenever they are there."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What is in the folder of a training's result, beside what transformers writes.
RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
LOG_FILE = "log.jsonl"
AVERAGE_FOLDER = "average"
PLOTS_FOLDER = "plots"
PICTURES_FOLDER = "pictures"


@contextmanager
def complete_or_nothing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder`, and of all that was in it, if the block ends well."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.unfinished-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it saved
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        replace_folder(folder, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def replace_folder(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, and of all that was in it."""
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}.previous-{os.getpid()}"))
    complete.rename(folder)
    for previous in folder.parent.glob(f".{glob.escape(folder.name)}.previous-*"):
        shutil.rmtree(previous, ignore_errors=True)  # also that of a run that was killed here


def make_folder(folder: Path) -> Path:
    """Make a folder, unless it is there, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete whenever it is there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
