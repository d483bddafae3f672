"""Train a model as a recipe says: `python -m training.train RECIPE [--NAME VALUE ...]`, or with `accelerate launch`.

    recipe ── data set, model, processor ── steps ── folder with model, processor and card ── scores, in the same folder

`train` is the story; the parts follow in the order in which it needs them. The folder appears when it is complete: a run
that is stopped, or fails, leaves what was there before, and a checkpoint beside it from which the same command goes on.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, as `accelerate launch training/train.py` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from safetensors import SafetensorError

from mpformer_hf.model_card import is_by_a_person
from mpformer_hf.model_inspection import CARD_FILE
from training.arguments import RecipeError, TrainingArguments, parse_arguments
from training.broken_images import sentence_of
from training.checkpoints import CheckpointError
from training.evaluation import format_scores, headlines
from training.folders import RECIPE_FILE, RESULTS_FILE, complete_or_nothing, write_text
from training.loop import TrainingRun
from training.official_files import FileError
from training.preparation import prepare_run
from training.stopping import Stopped, stop_signals
from training.training_record import summarise


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; a mistake of the user, and a stop, end with a sentence instead of a traceback."""
    try:
        with stop_signals.receive():
            train(parse_arguments(argv))
    except (RecipeError, CheckpointError, FileError, FloatingPointError) as error:
        sys.exit(f"error: {sentence_of(error)}")
    except Stopped as stop:
        print(f"\nStopped: {stop.what_remains}.", file=sys.stderr)
        sys.exit(stop.exit_code)


def train(arguments: TrainingArguments) -> dict[str, Any] | None:
    """Train and save a model, and score it.

    Returns:
        What was written to `results.json`; `None` without `evaluate`.
    """
    output_dir = Path(arguments.output_dir)
    require_usable_folder(output_dir)
    run = prepare_run(arguments)
    run.accelerator.print(run.describe())
    try:
        run.train_steps()
        save_result(run, output_dir)
    except Stopped as stop:
        if run.checkpoints.steps():
            stop.what_remains = run.checkpoints.describe_newest()
        raise
    run.accelerator.print(f"The model is in {output_dir}.")
    results = score_result(run, output_dir) if arguments.evaluate else None
    if results is None:
        run.finish(output_dir, None)
    if run.accelerator.is_main_process:
        run.checkpoints.remove()
    return results


def save_result(run: TrainingRun, output_dir: Path) -> None:
    """Write the trained model to the place of what was there before; one process writes, and all wait."""
    run.gather()
    if run.accelerator.is_main_process:
        try:
            with complete_or_nothing(output_dir) as folder:
                run.save(folder)
                keep_card_of_person(output_dir, folder)
                run.write_card(folder, run.seconds)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"The model cannot be written to {output_dir}: {error}. What was there before is untouched, and "
                f"{run.checkpoints.describe_newest()}."
            ) from error
    run.accelerator.wait_for_everyone()


def score_result(run: TrainingRun, output_dir: Path) -> dict[str, Any]:
    """Score the trained model; returns what it writes to `results.json`."""
    try:
        scores = run.evaluate(with_pictures=True)
        scores_of_average = run.evaluate_average()
    except Stopped as stop:
        stop.what_remains = f"the model is in {output_dir}, without scores"
        raise
    task = run.arguments.task
    run.accelerator.print(f"On the validation images, in percent: {format_scores(headlines(task, scores))}.")
    if scores_of_average is not None:
        words = format_scores(headlines(task, scores_of_average))
        run.accelerator.print(f"With the average of the weights: {words}.")
    results = summarise(run, scores, scores_of_average)
    if run.accelerator.is_main_process:
        write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
        run.write_card(output_dir, run.seconds, scores)
    run.finish(output_dir, scores)
    return results


def require_usable_folder(folder: Path) -> None:
    """Refuse, before the work begins, a folder that cannot be written, or that holds something else than a result."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output_dir` {folder} is a file. Choose a folder.")
    is_result = (folder / RECIPE_FILE).exists() and (folder / "config.json").exists()
    if folder.is_dir() and not is_result and any(folder.iterdir()):
        raise RecipeError(
            f"`output_dir` {folder} holds files that are no result of this program, and would be replaced. Choose "
            "another "
            "folder, or empty it."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"`output_dir` {folder} cannot be made: {error}.") from error
    if not os.access(folder.parent, os.W_OK):
        raise RecipeError(f"`output_dir` {folder} cannot be made: {folder.parent} may not be written.")


def keep_card_of_person(previous: Path, folder: Path) -> None:
    """Carry a README.md that a person has written, or changed, into the folder that takes the place of its own."""
    card = previous / CARD_FILE
    if card.is_file() and is_by_a_person(card.read_text(encoding="utf-8", errors="replace")):
        shutil.copy2(card, folder / CARD_FILE)


if __name__ == "__main__":
    main()
