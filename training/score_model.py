"""Score a model on a data set: the program behind `python -m training.score --model ...`.

    images ── model ── results ── a record for each image ── scores, official files, report.html

Each process writes the record of an image as soon as it is scored, and the first process reads the records of all. So a run that
was stopped goes on where it was when the same command is given again, and nothing depends on how the images were shared out.
The folder with the results appears when it is complete.
"""

import argparse
import datetime
import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from training.arguments import RecipeError, make_arguments, read_recipe
from training.data import DATASETS, SegmentationDataset, SegmentationRow, load_segmentation_dataset
from training.evaluation import EvaluationBatch, collate_for_evaluation, leave_stopping_to_parent, name_classes
from training.folders import RECIPE_FILE, replace_folder, write_text
from training.layer_scores import LayerScoring
from training.metrics.consistency import format_consistency
from training.official_files import FileError
from training.predictor import LabelMap, Predictor, PredictorError, few
from training.score_options import PROGRAM
from training.score_records import ImageRecord, RecordFolder
from training.score_results import (
    GROUND_TRUTH,
    OUTPUT_NAMES,
    PREDICTIONS,
    REPORT_FILE,
    RESULTS_FILE,
    ReportMaker,
    ScoredImages,
    ScoreError,
    draw_layer_scores,
)
from training.stopping import Stopped, stop_signals
from training.targets import size_of
from training.task_scores import TASK_SCORES, TaskScores
from training.training_record import name_versions


def main(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Score as the options say; a mistake of the user, and a stop, end with a sentence instead of a traceback.

    Args:
        options: of `score_options.make_parser`.
        words: of the command line, which is repeated in the results.
    """
    try:
        with stop_signals.receive():
            score_model(options, command=f"{PROGRAM} {shlex.join(words)}")
    except (ScoreError, PredictorError, FileError, RecipeError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stop:
        print(f"\nStopped: {stop.what_remains}.", file=sys.stderr)
        sys.exit(stop.exit_code)


def score_model(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Score a model as the command line says, and write the results.

    Returns:
        What was written to `results.json`; in other processes than the first, nothing.
    """
    complete_from_recipe(options)
    require_possible(options)
    output_dir = (options.output_dir or default_output_dir(options)).resolve()
    require_usable_folder(output_dir)
    run = ScoringRun.prepare(options, Accelerator(mixed_precision=options.mixed_precision))
    records = RecordFolder.beside(output_dir)
    accelerator = run.accelerator
    number = [records.begin(run.settings()) if accelerator.is_main_process else 0]
    broadcast_object_list(number)
    results: dict[str, Any] = {}
    try:
        run.score_images(records, number[0])
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            results = run.summarise(records, command)
    except Stopped as stop:
        stop.what_remains = "the same command goes on where this one was"
        raise
    if accelerator.is_main_process:
        records.clear()
        replace_folder(output_dir, records.path)
        print(f"Scores, predictions and {REPORT_FILE} are in {output_dir}.")
    accelerator.wait_for_everyone()
    return results


@dataclass
class ScoringRun:
    """Everything that takes part in a scoring."""

    options: argparse.Namespace
    accelerator: Accelerator
    dataset: SegmentationDataset
    predictor: Predictor
    labels: LabelMap
    layers: LayerScoring | None

    @classmethod
    def prepare(cls, options: argparse.Namespace, accelerator: Accelerator) -> "ScoringRun":
        """Load data set and model, and pair their classes."""
        dataset = load_dataset(options)
        predictor = Predictor.load(
            options.model, options.task, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        if options.tta and predictor.sees_squares:
            raise ScoreError(
                f"--tta shows images at several sizes, but {options.model} takes those of one size alone. Leave it out."
            )
        predictor.model.to(accelerator.device)
        pair = LabelMap.by_name if options.match_classes == "name" else LabelMap.by_id
        labels = pair(predictor.id2label, dataset)
        for names, words in (
            (labels.unknown, "classes of the model are not in the data set; their predictions are left out"),
            (labels.never_predicted, "classes of the data set are not in the model; their segments will be missed"),
        ):
            if names:
                accelerator.print(f"note: {len(names)} {words}: {few(names)}.")
        layers = LayerScoring(predictor, labels) if options.layer_consistency else None
        return cls(options, accelerator, dataset, predictor, labels, layers)

    @property
    def num_images(self) -> int:
        """Images to score."""
        return min(len(self.dataset), self.options.max_images or len(self.dataset))

    def settings(self) -> dict[str, Any]:
        """All that the record of an image depends on."""
        options = self.options
        names = ("model", "revision", "match_classes", "mixed_precision", "dataset", "task", "split", "tta", "boundary")
        return {
            **{name: getattr(options, name) for name in names},
            "dataset_options": dataset_options(options),
            "layer_consistency": options.layer_consistency,
            "write_ground_truth": options.write_ground_truth,
            "batch_size": options.batch_size,
            "num_images": self.num_images,
            "files": describe_files(Path(options.model)),
            "commit": getattr(self.predictor.model.config, "_commit_hash", None),
            "versions": name_versions(),
        }

    def make_scores(self) -> TaskScores:
        """Make an empty collection of the scores of the task."""
        return TASK_SCORES[self.options.task](self.dataset, boundary=self.options.boundary)

    def score_images(self, records: RecordFolder, run: int) -> None:
        """Score this process's share of the images that no earlier run has scored, and write their records."""
        accelerator = self.accelerator
        done = {record.index for record in records.read()}
        missing = [index for index in range(self.num_images) if index not in done]
        if done:
            accelerator.print(f"{len(done)} of {self.num_images} images were scored before; going on.")
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        progress = tqdm(total=len(mine), unit="image", desc="scoring", disable=not accelerator.is_main_process)
        accelerator.wait_for_everyone()  # all have read what was done before anyone adds to it
        with progress, records.open(run, accelerator.process_index) as file, stop_signals.hold():
            for start, batch in enumerate(self._load(mine)):
                indices = mine[start * self.options.batch_size :][: len(batch["rows"])]
                for record in self._score_batch(batch, indices, records.path):
                    file.write(json.dumps(asdict(record)) + "\n")
                progress.update(len(indices))
                stop_signals.check()

    def _load(self, indices: Sequence[int]) -> DataLoader:
        return DataLoader(
            Subset(self.dataset, indices),  # type: ignore[arg-type] # it needs no more than a length and rows
            batch_size=self.options.batch_size,
            num_workers=min(self.options.num_workers, len(indices)),
            collate_fn=partial(collate_for_evaluation, processor=self.predictor.processor),
            worker_init_fn=leave_stopping_to_parent,
        )

    def _score_batch(self, batch: EvaluationBatch, indices: Sequence[int], folder: Path) -> list[ImageRecord]:
        rows = batch["rows"]
        try:
            results, layers = self._predict_batch(batch)
            scored = zip(indices, rows, results, layers, strict=True)
            return [self._score_image(index, row, result, layer, folder) for index, row, result, layer in scored]
        except (ScoreError, PredictorError):
            raise
        except ValueError as error:
            raise ScoreError(f"The model cannot predict {name_images(rows)}: {error}") from error

    def _predict_batch(self, batch: EvaluationBatch) -> tuple[list[dict[str, Any]], Sequence[str | None]]:
        """Predict some images; also returns a line of layer consistency for each, or `None`."""
        rows, outputs = batch["rows"], None
        if self.layers is not None or not self._predicts_views():
            with self.accelerator.autocast():
                outputs = self.predictor(**batch["inputs"], **(self.layers.inputs if self.layers else {}))
        results = self._results(outputs, rows)
        return results, [None] * len(rows) if self.layers is None else self.layers.score(outputs, rows)

    def _predicts_views(self) -> bool:
        """Whether a result is an average of several views of an image."""
        return self.options.tta or self.predictor.joins_windows

    def _results(self, outputs: Any, rows: Sequence[SegmentationRow]) -> list[dict[str, Any]]:  # noqa: ANN401
        if self._predicts_views():
            with self.accelerator.autocast():
                return [self.predict(row) for row in rows]
        return self.predictor.post_process(outputs, [size_of(row) for row in rows], self.labels)

    def predict(self, row: SegmentationRow) -> dict[str, Any]:
        """Predict one image."""
        if self.options.tta:
            return self.predictor.predict_augmented(row["image"], self.labels)
        return self.predictor.predict([row["image"]], [size_of(row)], self.labels)[0]

    def _score_image(
        self, index: int, row: SegmentationRow, result: Mapping[str, Any], layer: str | None, folder: Path
    ) -> ImageRecord:
        scores = self.make_scores()
        try:
            scores.add(row, result)
        except ValueError as error:
            raise ScoreError(
                f"Image {row['image_id']!r} of {self.options.dataset} cannot be scored: {error}"
            ) from error
        truths = scores.write_truth(row, folder / GROUND_TRUTH) if self.options.write_ground_truth else []
        return ImageRecord(
            index=index,
            image_id=row["image_id"],
            height=size_of(row)[0],
            width=size_of(row)[1],
            scores=scores.scores.dump()[0],
            analysis=scores.analysis.dump()[0],
            layers=layer,
            predictions=scores.write(row["image_id"], result, folder / PREDICTIONS),
            truths=truths,
        )

    def summarise(self, records: RecordFolder, command: str) -> dict[str, Any]:
        """Sum up the records of all images and write the results; `command` made them."""
        options, folder = self.options, records.path
        scored = ScoredImages.collect(self.make_scores(), records.read())
        scores = scored.scores.scores.compute()
        errors = scored.scores.analysis.compute(threshold=options.threshold, precision=options.precision)
        consistency = scored.layers.compute() if self.layers else None
        names = self.dataset.id2label
        results = {
            "model": options.model,
            "dataset": options.dataset,
            "split": options.split,
            "task": options.task,
            "num_images": self.num_images,
            "scores": name_classes(scores, names),
            "layer_consistency": consistency,
            "errors": name_classes(asdict(errors), names),
            "command": command,
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "settings": self.settings(),
        }
        write_text(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
        scored.write_official_files(folder, with_truth=options.write_ground_truth)
        print(scored.scores.table(scores))
        layer_scores = None
        if self.layers and consistency:
            print(f"\nLayer consistency, in percent:\n{format_consistency(consistency)}\n")
            draw = partial(self.layers.draw, self.dataset[0], f"{options.model}, image {self.dataset[0]['image_id']}")
            layer_scores = draw_layer_scores(folder, options.model, consistency, draw)
        maker = ReportMaker(folder, self.dataset, self.predict, options.threshold, options.num_examples)
        maker.write(results, scored, scores, errors, layer_scores, self.notes())
        return results

    def notes(self) -> list[str]:
        """Say what else the reader of the scores should know."""
        options = self.options
        known = [
            (options.tta, "Class scores are averages over several scales and mirrored views."),
            (
                options.boundary and options.task == "instance",
                "IoU is the smaller one of masks and boundaries (boundary AP).",
            ),
            (
                bool(self.labels.unknown),
                f"Classes of the model that the data set lacks are left out: {few(self.labels.unknown)}.",
            ),
            (bool(self.labels.never_predicted), f"Classes that the model lacks: {few(self.labels.never_predicted)}."),
            (self.num_images < len(self.dataset), f"Only the first {self.num_images} of {len(self.dataset)} images."),
        ]
        return [sentence for holds, sentence in known if holds]


# ---------------------------------------------------------------------------------------------------------------------
# What the command line means
# ---------------------------------------------------------------------------------------------------------------------


def complete_from_recipe(options: argparse.Namespace) -> None:
    """Take data set, task and options that were not given from the recipe in the model's folder."""
    recipe = Path(options.model) / RECIPE_FILE
    options.recipe_options = {}
    if recipe.exists():
        arguments = make_arguments(read_recipe(recipe), str(recipe))
        options.task = options.task or arguments.task
        if options.dataset in (None, arguments.dataset):
            options.dataset = arguments.dataset
            options.recipe_options = arguments.options_of(options.split)
    for name in ("dataset", "task"):
        if getattr(options, name) is None:
            raise ScoreError(f"--{name} is missing, and there is no {RECIPE_FILE} in {options.model} that says it.")
    if options.dataset not in DATASETS:
        raise ScoreError(f"--dataset must be one of {', '.join(DATASETS)}, got {options.dataset!r}.")


def require_possible(options: argparse.Namespace) -> None:
    """Refuse options that the task has no use for."""
    if options.tta and options.task != "semantic":
        raise ScoreError(
            f"--tta averages the class scores of semantic maps; {options.task} segments of several views cannot be averaged. "
            "Leave it out, or use --task semantic."
        )
    if options.boundary and options.task == "panoptic":
        raise ScoreError(
            "--boundary is for --task instance and semantic; there is no panoptic quality of boundaries here."
        )


def dataset_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the data set: those of the recipe, and on top those of the command line."""
    given = {}
    for text in options.dataset_option:
        name, equals, value = text.partition("=")
        try:
            given[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ScoreError(f"--dataset-option {text!r} has a value that is no YAML.") from error
        if not (name and equals):
            raise ScoreError(f"--dataset-option must be NAME=VALUE, got {text!r}.")
    return {**options.recipe_options, **given, "task": options.task}


def load_dataset(options: argparse.Namespace) -> SegmentationDataset:
    """Make the data set that the command line names."""
    given = dataset_options(options)
    known = inspect.signature(DATASETS[options.dataset]).parameters
    for name in given:
        if name not in known:
            possible = ", ".join(key for key in known if key not in ("split", "task"))
            raise ScoreError(f"The data set {options.dataset} has no option {name!r}. Its options: {possible}.")
    try:
        dataset = load_segmentation_dataset(options.dataset, options.split, **given)
    except (ValueError, TypeError, OSError) as error:
        raise ScoreError(f"The data set {options.dataset} cannot be made: {error}") from error
    if len(dataset) == 0:
        raise ScoreError(f"The {options.split} split of {options.dataset} has no images.")
    return dataset


def default_output_dir(options: argparse.Namespace) -> Path:
    """Name a folder after what is scored."""
    name = re.sub(r"[^\w.-]+", "-", options.model).strip("-.") or "model"
    return Path("outputs", "scores", f"{name}-{options.dataset}-{options.task}")


def require_usable_folder(folder: Path) -> None:
    """Refuse, before the work begins, a folder that holds something else than results of this program."""
    if folder.exists() and not folder.is_dir():
        raise ScoreError(f"--output-dir {folder} is a file. Choose a folder.")
    foreign = sorted({path.name for path in folder.iterdir()} - OUTPUT_NAMES) if folder.is_dir() else []
    if foreign:
        raise ScoreError(
            f"--output-dir {folder} holds {few(foreign, 3)}: no results of this program, which would be removed. Choose another "
            "folder, or empty it."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScoreError(f"--output-dir {folder} cannot be made: {error}.") from error
    if not os.access(folder.parent, os.W_OK):
        raise ScoreError(f"--output-dir {folder} cannot be made: {folder.parent} may not be written.")


def name_images(rows: Sequence[SegmentationRow]) -> str:
    """Name images in a sentence."""
    return (
        f"image {rows[0]['image_id']!r}" if len(rows) == 1 else f"images {few(repr(row['image_id']) for row in rows)}"
    )


def describe_files(folder: Path) -> list[list[Any]]:
    """List names, sizes and times of the files of a model's folder, so that a changed model is not taken for the same."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
