"""Train a model as a recipe says: `python -m training.train RECIPE [--NAME VALUE ...]`, or with `accelerate launch`.

    recipe ── data set, model, processor ── steps ── folder with model, processor and card ── scores, in the same folder

`train` is the story; the parts follow in the order in which it needs them. The folder appears when it is complete: a run
that is stopped, or fails, leaves what was there before.
"""

import json
import os
import platform
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, as `accelerate launch training/train.py` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

import mpformer_hf
from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor
from mpformer_hf.model_card import attach_card, is_by_a_person, training_card
from mpformer_hf.model_facts import TrainingRecord
from mpformer_hf.model_inspection import CARD_FILE
from training.arguments import RecipeError, TrainingArguments, parse_arguments
from training.data import SegmentationDataset, SegmentationRow, load_segmentation_dataset
from training.evaluation import GROUPS, evaluate_panoptic, format_scores, leave_stopping_to_parent
from training.folders import complete_or_nothing, write_text
from training.stopping import Stopped, stop_signals

RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
LOG_FILE = "log.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; a mistake of the user, and a stop, end with a sentence instead of a traceback."""
    try:
        with stop_signals.receive():
            train(parse_arguments(argv))
    except (RecipeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
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
    start = time.perf_counter()
    run.train_steps()
    seconds = time.perf_counter() - start
    if run.accelerator.is_main_process:
        with complete_or_nothing(output_dir) as folder:
            run.save(folder)
            keep_card_of_person(output_dir, folder)
            run.write_card(folder, seconds)
    run.accelerator.wait_for_everyone()
    run.accelerator.print(f"The model is in {output_dir}.")
    if not arguments.evaluate:
        return None
    try:
        scores = run.evaluate()
    except Stopped as stop:
        stop.what_remains = f"the model is in {output_dir}, without scores"
        raise
    run.accelerator.print(f"Panoptic quality on {len(run.validation_data)} validation images, in percent:")
    run.accelerator.print(format_scores(scores))
    results = summarise(run, scores, seconds)
    if run.accelerator.is_main_process:
        write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
        run.write_card(output_dir, seconds, scores)
    return results


@dataclass
class TrainingRun:
    """Everything that takes part in a training; `log` has a line for each interval and each evaluation."""

    arguments: TrainingArguments
    accelerator: Accelerator
    model: nn.Module
    processor: MPFormerImageProcessor
    train_data: SegmentationDataset
    validation_data: SegmentationDataset
    log: list[dict[str, Any]] = field(default_factory=list)

    def train_steps(self) -> None:
        """Take all optimiser steps; afterwards `model` is trained, and prepared by the accelerator."""
        arguments, accelerator = self.arguments, self.accelerator
        optimizer = torch.optim.AdamW(make_parameter_groups(self.model, arguments), lr=arguments.learning_rate)
        self.model, optimizer = accelerator.prepare(self.model, optimizer)
        self.model.train()
        step = 0
        with stop_signals.hold(), TrainingProgress(arguments, accelerator) as progress:
            for batch in self._make_loader():
                with accelerator.accumulate(self.model):
                    outputs = self.model(**batch)
                    accelerator.backward(outputs.loss)
                    if accelerator.sync_gradients and arguments.max_gradient_norm is not None:
                        accelerator.clip_grad_norm_(self.model.parameters(), arguments.max_gradient_norm)
                    factor = learning_rate_factor(step, arguments)
                    for group in optimizer.param_groups:
                        group["lr"] = factor * group["initial_lr"]
                    optimizer.step()
                    optimizer.zero_grad()
                progress.add(outputs.loss_dict)
                if accelerator.sync_gradients:
                    step += 1
                    self.log += progress.end_step(step, factor * arguments.learning_rate)
                    if (
                        arguments.evaluation_steps
                        and step % arguments.evaluation_steps == 0
                        and step < arguments.max_steps
                    ):
                        self._log_scores(step)
                        progress.restart_clock()
                    stop_signals.check()

    def _make_loader(self) -> DataLoader:
        """Make one pass through all batches of the training; each process gets every n-th of them."""
        arguments = self.arguments
        passes = arguments.max_steps * arguments.gradient_accumulation_steps * self.accelerator.num_processes
        loader = DataLoader(
            self.train_data,  # type: ignore[arg-type] # it needs no more than a length and rows
            batch_size=arguments.batch_size,
            sampler=ShuffledEpochs(len(self.train_data), passes * arguments.batch_size, arguments.seed),
            num_workers=arguments.num_workers,
            collate_fn=partial(collate_for_training, processor=self.processor),
            worker_init_fn=leave_stopping_to_parent,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return self.accelerator.prepare_data_loader(loader)

    def evaluate(self) -> dict[str, Any]:
        """Score the model on the validation data."""
        return evaluate_panoptic(
            self.model,
            self.processor,
            self.validation_data,
            self.accelerator,
            batch_size=self.arguments.evaluation_batch_size,
            num_workers=self.arguments.num_workers,
        )

    def _log_scores(self, step: int) -> None:
        scores = self.evaluate()
        qualities = {name: scores[name]["pq"] for name in GROUPS}
        self.log.append({"step": step, "panoptic_quality": qualities})
        words = ", ".join(f"{name.lower()} {100 * value:.1f}" for name, value in qualities.items())
        if self.accelerator.is_main_process:
            tqdm.write(f"Panoptic quality after step {step}: {words}")

    def save(self, folder: Path) -> None:
        """Write the model, the processor, the recipe and the log."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.arguments.save(folder / RECIPE_FILE)
        (folder / LOG_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in self.log), encoding="utf-8")

    def write_card(self, folder: Path, seconds: float, scores: Mapping[str, Any] | None = None) -> None:
        """Write README.md, a model card with what was set and measured; one that a person has written stays."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        record = record_training(self, seconds, scores)
        card = training_card(model, self.processor, record, name=Path(self.arguments.output_dir).resolve().name)
        if not attach_card(folder, card) and scores is None:
            self.accelerator.print(f"{CARD_FILE} was written by a person, and is left as it is.")

    def describe(self) -> str:
        """Say in a few words what is going to be trained, on what and how."""
        arguments, accelerator = self.arguments, self.accelerator
        parameters = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        global_batch = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        return (
            f"{parameters / 1e6:.2f} million parameters on {accelerator.num_processes} x {accelerator.device.type}, "
            f"{len(self.train_data)} images of {arguments.dataset}, {arguments.max_steps} steps of {global_batch} "
            "images, "
            f"learning rate {arguments.learning_rate:g} ({arguments.backbone_learning_rate:g} in the backbone)."
        )


def summarise(run: TrainingRun, scores: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Collect the scores, as fractions, with all that they depend on."""
    names = run.validation_data.id2label
    per_class = {names[class_id]: score for class_id, score in scores["per_class"].items()}
    return {
        "dataset": run.arguments.dataset,
        "split": "validation",
        "num_images": len(run.validation_data),
        "task": run.arguments.task,
        "panoptic_quality": {**{name: scores[name] for name in GROUPS}, "per_class": per_class},
        "training_seconds": round(seconds, 1),
        "num_processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "settings": run.arguments.to_dict(),
        "versions": name_versions(),
    }


def name_versions() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    return {
        "mpformer_hf": mpformer_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def record_training(run: TrainingRun, seconds: float, scores: Mapping[str, Any] | None = None) -> TrainingRecord:
    """Collect for the model card what was set and measured; without `scores`, nothing is said about quality."""
    arguments, accelerator = run.arguments, run.accelerator
    *_, last = [line for line in run.log if "loss" in line]
    return TrainingRecord(
        command=command_for(accelerator.num_processes),
        dataset=arguments.dataset,
        task=arguments.task,
        settings=hide_folders({k: v for k, v in arguments.to_dict().items() if k not in STATED_ELSEWHERE}),
        num_train_images=len(run.train_data),
        num_validation_images=len(run.validation_data),
        steps=arguments.max_steps,
        images_per_step=arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes,
        seconds=seconds,
        hardware=name_hardware(accelerator),
        versions=name_versions(),
        final_losses={name: value for name, value in last.items() if name not in NO_LOSSES},
        scores={} if scores is None else fractions_of(scores),
        start=arguments.model_name_or_path or "",
        backbone_start=arguments.backbone or "",
    )


STATED_ELSEWHERE = ("output_dir", "model_name_or_path", "backbone")
NO_LOSSES = ("step", "learning_rate", "images_per_second")


def hide_folders(settings: Any) -> Any:  # noqa: ANN401 - whatever a recipe may hold
    """Leave the last part of absolute paths: a card is for others, and how this machine is laid out is not."""
    if isinstance(settings, Mapping):
        return {name: hide_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [hide_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings


def command_for(num_processes: int) -> str:
    """Command that repeats the training with the recipe that is saved beside the model."""
    if num_processes == 1:
        return f"python -m training.train {RECIPE_FILE}"
    return f"accelerate launch --num_processes {num_processes} training/train.py {RECIPE_FILE}"


def name_hardware(accelerator: Accelerator) -> str:
    """Say on how many of what the training ran."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return f"{accelerator.num_processes} x {accelerator.device.type}, threads of PyTorch: {torch.get_num_threads()}"


def fractions_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Name the panoptic scores as model cards do; groups without any class have none."""
    fractions = {name: scores["All"][name] for name in ("pq", "sq", "rq")}
    for group, name in (("Things", "pq_things"), ("Stuff", "pq_stuff")):
        if scores[group]["n"]:
            fractions[name] = scores[group]["pq"]
    return fractions


# ---------------------------------------------------------------------------------------------------------------------
# What the recipe asks for
# ---------------------------------------------------------------------------------------------------------------------


def prepare_run(arguments: TrainingArguments) -> TrainingRun:
    """Make the data sets, the model and the processor.

    Raises:
        RecipeError: one of them cannot be made as the recipe says.
    """
    with blame_recipe("`mixed_precision` cannot be used here"):
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        )
    set_seed(arguments.seed)
    with blame_recipe("The data set cannot be made"):
        train_data = load_segmentation_dataset(arguments.dataset, "train", **arguments.options_of("train"))
        validation_data = load_segmentation_dataset(
            arguments.dataset, "validation", **arguments.options_of("validation")
        )
    for data, split in ((train_data, "training"), (validation_data, "validation")):
        if len(data) == 0:
            raise RecipeError(f"The {split} split of {arguments.dataset} has no images.")
    with blame_recipe("The model cannot be made"):
        model = build_model(arguments, train_data)
    with blame_recipe("The image processor cannot be made"):
        processor = build_processor(arguments, train_data)
    # From here on every process draws noise and points of its own.
    set_seed(arguments.seed, device_specific=True)
    return TrainingRun(
        arguments, accelerator, synchronise_norms(model, accelerator), processor, train_data, validation_data
    )


def build_model(arguments: TrainingArguments, dataset: SegmentationDataset) -> MPFormerForUniversalSegmentation:
    """Make the model for the classes of a data set: from a trained one, from a trained backbone, or from scratch."""
    labels = {"id2label": dataset.id2label, "label2id": {name: key for key, name in dataset.id2label.items()}}
    fields = {**arguments.model, **labels}
    if arguments.model_name_or_path is not None:
        config = MPFormerConfig.from_pretrained(arguments.model_name_or_path, **fields)
        # The class head of a model for another number of classes starts from scratch; transformers reports it.
        return MPFormerForUniversalSegmentation.from_pretrained(
            arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    if arguments.backbone is not None:
        return MPFormerForUniversalSegmentation.from_backbone(arguments.backbone, **fields)
    return MPFormerForUniversalSegmentation(MPFormerConfig(**fields))


def build_processor(arguments: TrainingArguments, dataset: SegmentationDataset) -> MPFormerImageProcessor:
    """Make the processor; segments of stuff classes are joined in results, unless the recipe says otherwise."""
    fields = {"label_ids_to_fuse": list(dataset.stuff_ids), **arguments.processor}
    if arguments.model_name_or_path is not None:
        return MPFormerImageProcessor.from_pretrained(arguments.model_name_or_path, **fields)
    return MPFormerImageProcessor(**fields)


def synchronise_norms(model: MPFormerForUniversalSegmentation, accelerator: Accelerator) -> nn.Module:
    """Let trained batch norms see the batches of all processes; PyTorch can do so on accelerators alone."""
    if accelerator.num_processes == 1 or model.config.freeze_backbone_norm or accelerator.device.type == "cpu":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@contextmanager
def blame_recipe(what: str) -> Iterator[None]:
    """Turn errors that a recipe has caused into a sentence."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError) as error:
        raise RecipeError(f"{what}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class ShuffledEpochs(Sampler[int]):
    """Positions in the data set, each once in an epoch, in an order that depends on the seed and the epoch alone."""

    def __init__(self, num_images: int, num_samples: int, seed: int) -> None:
        """Describe the order; `num_samples` is the length of the whole training, so it may end within an epoch."""
        self.num_images = num_images
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.num_samples, self.num_images):
            generator = torch.Generator().manual_seed(self.seed + start // self.num_images)
            order = torch.randperm(self.num_images, generator=generator).tolist()
            yield from order[: self.num_samples - start]


def collate_for_training(rows: Sequence[SegmentationRow], processor: MPFormerImageProcessor) -> dict[str, Any]:
    """Prepare some rows as inputs of the model, labels included."""
    inputs = processor(
        [row["image"] for row in rows],
        mask_labels=[row["mask_labels"] for row in rows],
        class_labels=[row["class_labels"] for row in rows],
        return_tensors="pt",
    )
    return dict(inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------------------

POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "position_embeddings")


def make_parameter_groups(model: nn.Module, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay.

    The backbone has a learning rate of its own. Norms, embeddings (`nn.Embedding`) and position tables are not decayed;
    biases, and the level embedding of the pixel decoder, which is a plain parameter, are, as in the original.
    """
    backbone = {id(parameter) for parameter in model.get_submodule("model.pixel_level_module.encoder").parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    seen: set[int] = set()
    for module in model.modules():
        # Backbones bring norms of their own, which are no subclasses of PyTorch's.
        is_exempt = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rate = arguments.backbone_learning_rate if id(parameter) in backbone else arguments.learning_rate
            decay = 0.0 if is_exempt or name in POSITION_TABLES else arguments.weight_decay
            groups[rate, decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_factor(step: int, arguments: TrainingArguments) -> float:
    """Share of the highest learning rate in a step, counted from 0."""
    warmup = min(1.0, (step + 1) / arguments.warmup_steps) if arguments.warmup_steps else 1.0
    if arguments.schedule == "poly":
        return warmup * (1 - step / arguments.max_steps) ** arguments.schedule_power
    milestones_passed = sum(step >= milestone for milestone in arguments.schedule_milestones)
    return warmup * arguments.schedule_factor**milestones_passed


# ---------------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------------


class TrainingProgress:
    """The progress bar, and the lines of the log: means over the steps since the last line, and over processes.

    Losses stay on their device until a line is due, so that no step waits for them.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        self.arguments = arguments
        self.accelerator = accelerator
        self.bar = tqdm(
            total=arguments.max_steps,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 20,  # a log file wants fewer lines
        )
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self.restart_clock()

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last line."""
        self._start = time.perf_counter()
        self._timed_passes = 0

    def add(self, loss_dict: Mapping[str, Tensor]) -> None:
        """Take the terms of the loss of one forward pass."""
        for name, term in sum_levels(loss_dict).items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._passes += 1
        self._timed_passes += 1

    def end_step(self, step: int, learning_rate: float) -> list[dict[str, Any]]:
        """Count an optimiser step; returns the line of the log, if one is due."""
        self.bar.update()
        if step % self.arguments.logging_steps and step < self.arguments.max_steps:
            return []
        means = self.accelerator.reduce(
            torch.stack(list(self._sums.values())) / self._passes, reduction="mean"
        ).tolist()
        terms = dict(zip(self._sums, means, strict=True))
        images = self._timed_passes * self.arguments.batch_size * self.accelerator.num_processes
        speed = images / (time.perf_counter() - self._start)
        self._sums, self._passes = {}, 0
        self.restart_clock()
        line = {"step": step, "loss": sum(means), **terms, "learning_rate": learning_rate, "images_per_second": speed}
        self.bar.set_postfix_str(format_line(line), refresh=False)
        return [line]


def sum_levels(loss_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up each kind of loss over the supervised levels: `loss_mask`, `loss_mask_0` ... become `mask`."""
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, term in loss_dict.items():
        kinds[re.sub(r"_\d+$", "", name.removeprefix("loss_"))].append(term)
    return {kind: torch.stack(terms).sum() for kind, terms in kinds.items()}


def format_line(line: Mapping[str, float]) -> str:
    """Shorten a line of the log for the progress bar: losses as classes / masks / dice."""
    parts = [f"loss {line['loss']:.2f}"]
    for name, prefix in (("matched", ""), ("piloted", "pilot_")):
        terms = [line.get(f"{prefix}{kind}") for kind in ("cross_entropy", "mask", "dice")]
        shown = ["-" if term is None else f"{term:.2f}" for term in terms]
        parts += [f"{name} {'/'.join(shown)}"] if any(term is not None for term in terms) else []
    return ", ".join([*parts, f"lr {line['learning_rate']:.1e}", f"{line['images_per_second']:.1f} images/s"])


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


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
