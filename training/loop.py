"""The loop: steps, checkpoints, and scores on the way.

batches of a step ── forward and backward, each ── optimiser ── average ── log ── scores, checkpoint, stop: each when it is time
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.global_batch import GlobalBatch
from mpformer_hf.model_card import attach_card, training_card
from mpformer_hf.model_inspection import CARD_FILE
from training.arguments import TrainingArguments
from training.averaging import WeightAverage, other_weights
from training.batches import (
    TrainingBatch,
    class_labels_of,
    in_groups,
    make_loader,
    make_order,
    model_inputs,
    skipped_in,
)
from training.checkpoints import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    Progress,
    TrainingState,
    as_json,
    preserved_random_states,
    random_states,
    restore_random_states,
    seed_new_process,
)
from training.data import SegmentationDataset
from training.evaluation import evaluate_model, format_scores, headlines
from training.folders import AVERAGE_FOLDER, LOG_FILE, RECIPE_FILE, make_folder, write_text
from training.monitor import Monitor, live_folder
from training.optimization import (
    images_per_step,
    learning_rate_factor,
    make_parameter_groups,
    scaled_learning_rate,
)
from training.optional_work import optional_work
from training.progress import TrainingProgress
from training.sampling import ShuffledEpochs
from training.sharded_weights import (
    full_model_state,
    full_optimizer_state,
    full_tensors,
    load_model_state,
    load_optimizer_state,
    load_tensors,
    plain_model,
)
from training.sharing import push_folder
from training.stop_vote import StopVote
from training.stopping import Stopped, stop_signals
from training.streaming_rows import StreamOrder, is_stream
from training.training_record import record_training

HOW_TO_BEGIN_ANEW = "To begin anew and remove it, pass --resume false; to keep it, choose another `output_dir`."


@dataclass
class TrainingRun:
    """Everything that takes part in a training; `log` has a line for each interval and each evaluation.

    `validation_data` is there if the model is scored. `repeats` says how often each image comes in an epoch, `repository` where the
    model goes on the Hub. `checkpoint` is where the run goes on, and `step`, `samples` (images taken from the data, by all processes)
    and `seconds` (of steps, without evaluations) say how far it has come, earlier sessions included. `best_step` is that of the
    weights, if they are not those of the last step.
    """

    arguments: TrainingArguments
    accelerator: Accelerator
    model: nn.Module
    processor: MPFormerImageProcessor
    train_data: SegmentationDataset
    validation_data: SegmentationDataset | None
    checkpoints: CheckpointFolder
    checkpoint: Checkpoint | None = None
    repeats: Sequence[float] | None = None
    repository: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    _optimizer: AcceleratedOptimizer = field(init=False)
    _progress: "TrainingProgress" = field(init=False)
    _order: ShuffledEpochs | StreamOrder = field(init=False)
    _monitor: Monitor = field(init=False)
    _average: WeightAverage | None = field(init=False, default=None)
    _whole: Any = field(init=False, default=None)
    _whole_average: dict[str, Tensor] | None = field(init=False, default=None)
    _saved: tuple[int, float | None] | None = field(init=False, default=None)

    def train_steps(self) -> None:
        """Take all optimiser steps that are left; afterwards `model` is trained, and prepared by the accelerator."""
        arguments, accelerator = self.arguments, self.accelerator
        groups = make_parameter_groups(self.model, arguments, images_per_step(arguments, accelerator))
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        self.model, self._optimizer = accelerator.prepare(self.model, optimizer)
        self.model.train()
        if arguments.average_decay is not None:
            self._average = WeightAverage(self._network, arguments.average_decay, arguments.average_warmup_steps)
        with stop_signals.hold(StopVote(accelerator)), TrainingProgress(arguments, accelerator) as progress:
            self._progress = progress
            self._begin_or_go_on()
            try:
                self._take_steps()
            except Stopped as stop:
                if stop.in_order:  # otherwise it struck in the middle of a step
                    self._save_checkpoint()
                raise
        if arguments.keep_best:
            self._take_best()
        if self._average is not None and arguments.save_average == "instead":
            self._average.copy_to(self._network)

    def _take_steps(self) -> None:
        """Train; a step that has ended is in the log, scored and in a checkpoint where that is due."""
        arguments, accelerator = self.arguments, self.accelerator
        loader = self._make_loader()
        self._log_scores_if_due()  # of a step in whose evaluation the run was stopped
        clock = time.perf_counter()
        batches = self._progress.time_waiting(loader)
        for group in in_groups(batches, arguments.gradient_accumulation_steps):
            if self._has_stopped_improving():
                break
            factor = learning_rate_factor(self.step, arguments)
            for parameters in self._optimizer.param_groups:
                parameters["lr"] = factor * parameters["initial_lr"]
            counts = None
            if len(group) > 1:
                counts = self._network.count_global_batch([class_labels_of(batch) for batch in group])
            for batch in group:
                self._run(batch, counts)
            self.step += 1
            self.samples += images_per_step(arguments, accelerator)
            self.seconds += time.perf_counter() - clock
            if self._average is not None:
                self._average.update(self._network, self.step)
            lines = self._progress.end_step(self.step, factor * self.learning_rate)
            for line in lines:
                self._monitor.see_line(line, self._network)
            self.log += lines
            self._end_step()
            clock = time.perf_counter()
        for _ in range(2):  # of several processes, the answer to the last question comes with the next
            stop_signals.check()

    def _run(self, batch: TrainingBatch, counts: GlobalBatch | None) -> None:
        """Run one batch forward and backward; with the last one of a step the optimiser goes on.

        Args:
            batch: of this process.
            counts: of all batches of the step, if there are several.
        """
        arguments, accelerator, optimizer = self.arguments, self.accelerator, self._optimizer
        inputs = model_inputs(batch, self.processor, exclude_ignored=arguments.exclude_ignored)
        with accelerator.accumulate(self.model):
            outputs = self.model(**inputs, **({} if counts is None else {"global_batch": counts}))
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients and arguments.max_gradient_norm is not None:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), arguments.max_gradient_norm)
                self._progress.add_gradient_norm(norm)
            optimizer.step()
            optimizer.zero_grad()
        self._progress.add(outputs.loss_dict)
        self._monitor.see_batch(skipped_in(batch), outputs.class_queries_logits, class_labels_of(batch))

    def _end_step(self) -> None:
        """Score, write a checkpoint, and stop, each when it is time for it."""
        is_due = bool(self.arguments.save_every and self.step % self.arguments.save_every == 0)
        if is_due:
            self._save_checkpoint()  # scoring may fail
        self._log_scores_if_due()
        if is_due:
            self._save_checkpoint()  # with the score, if there is one
        stop_signals.check()

    def _make_loader(self) -> DataLoader:
        """Make one pass through all batches that are left; each process gets every n-th of them."""
        arguments = self.arguments
        end = self.samples + (arguments.max_steps - self.step) * images_per_step(arguments, self.accelerator)
        self._order = make_order(
            self.train_data,
            arguments,
            end,
            start=self.samples,
            num_images=self.checkpoint.progress.num_images if self.checkpoint else None,
            repeats=self.repeats,
        )
        loader = make_loader(
            self.train_data,
            self.processor,
            self._order,
            arguments,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return self.accelerator.prepare_data_loader(loader)

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    def _network(self) -> nn.Module:
        """The model without wrappers, as checkpoints and averages know it."""
        return self.accelerator.unwrap_model(self.model)

    def _begin_or_go_on(self) -> None:
        """Take up the run where its checkpoint left it, if there is one."""
        if self.accelerator.is_main_process and not self.arguments.resume:
            self.checkpoints.remove()
        if self.accelerator.is_main_process and self.checkpoint is None:
            shutil.rmtree(live_folder(self.checkpoints), ignore_errors=True)  # of a run without any checkpoint
        step = 0 if self.checkpoint is None else self.checkpoint.progress.step
        folder = live_folder(self.checkpoints)
        self._monitor = Monitor(self.arguments, self.accelerator, folder, self.validation_data, step)
        if self.checkpoint is not None:
            try:
                self._restore(self.checkpoint)
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{self.checkpoint.folder} cannot be used: {error}. {HOW_TO_BEGIN_ANEW}"
                ) from error
            self.accelerator.print(self._describe_going_on(self.checkpoint))

    def _restore(self, checkpoint: Checkpoint) -> None:
        accelerator, progress = self.accelerator, checkpoint.progress
        num_images = None if is_stream(self.train_data) else len(self.train_data)
        if num_images is not None and progress.num_images != num_images:
            raise ValueError(
                f"it belongs to a training split of {progress.num_images} images, which has {num_images} now"
            )
        load_model_state(self.model, checkpoint.read_model(), accelerator)
        optimizer = checkpoint.read_optimizer()
        rates = [group["initial_lr"] for group in self._optimizer.param_groups]
        load_optimizer_state(self.model, self._optimizer, optimizer["optimizer"], accelerator)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate  # for the number of images that a step has now
        if accelerator.scaler is not None and optimizer["scaler"] is not None:
            accelerator.scaler.load_state_dict(optimizer["scaler"])
        self._load_average(checkpoint)
        self.log = checkpoint.read_log()
        self.step, self.samples, self.seconds = progress.step, progress.samples, progress.seconds
        own = checkpoint.read_own(accelerator.process_index)
        if own is None:
            seed_new_process(self.arguments.seed, self.step, accelerator.process_index)
        else:
            restore_random_states(own["random"], accelerator.device)
            self._monitor.load_state_dict(own["monitor"])
        is_same_number = accelerator.num_processes == checkpoint.num_processes
        self._progress.go_on(self.step, own["losses"] if own and is_same_number else None)

    def _load_average(self, checkpoint: Checkpoint) -> None:
        average = checkpoint.read_average()
        if self._average is not None and average is not None:
            load_tensors(self._average.state_dict(), average)

    def _describe_going_on(self, checkpoint: Checkpoint) -> str:
        text = f"Going on after step {self.step} of {self.arguments.max_steps}, from {checkpoint.folder}."
        before, now = checkpoint.num_processes, self.accelerator.num_processes
        if before == now:
            return text
        return (
            f"{text} It was written by {before} processes, and there are {now} now: a step has "
            f"{images_per_step(self.arguments, self.accelerator)} images from here on, the learning rate is {self.learning_rate:g}, "
            "and random numbers are not those of an uninterrupted run."
        )

    def _save_checkpoint(self) -> None:
        """Write a checkpoint of this step, unless there is one; all processes call it."""
        arguments, accelerator = self.arguments, self.accelerator
        score = self._scores_of_steps().get(self.step)
        if self._saved == (self.step, score):
            return
        state = TrainingState(
            progress=Progress(self.step, self.samples, self.seconds, self._order.num_images, score),
            settings=as_json(arguments.to_dict()),
            log=self.log,
            model=full_model_state(self.model, accelerator),
            optimizer={
                "optimizer": full_optimizer_state(self.model, self._optimizer, accelerator),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            },
            average=None if self._average is None else full_tensors(self._average.state_dict(), accelerator),
            own={
                "random": random_states(accelerator.device),
                "losses": self._progress.state(),
                "monitor": self._monitor.state_dict(),
            },
        )
        self.checkpoints.write(state, accelerator, keep=arguments.keep_checkpoints, keep_best=arguments.keep_best)
        self._saved = (self.step, score)

    def _take_best(self) -> None:
        """Take the weights of the best score, if those of the last step are not."""
        scores = self._scores_of_steps()
        best = max(scores, key=lambda step: (scores[step], step))
        self.best_step = best
        if best == self.step:
            return
        checkpoint = self.checkpoints.find_step(best)
        if checkpoint is None:
            raise CheckpointError(
                f"The checkpoint of step {best}, which has the best score, is not in {self.checkpoints.path} any more. "
                "Start the same command again with --keep_best false --resume true for the weights of the last step."
            )
        load_model_state(self.model, checkpoint.read_model(), self.accelerator)
        self._load_average(checkpoint)
        self.accelerator.print(f"The weights are those of step {best}, which have the best score.")

    @property
    def num_train_images(self) -> int:
        """Images of the training split; of a stream that was not read to its end, those that were taken."""
        return self._order.num_images or self.samples

    @property
    def learning_rate(self) -> float:
        """The highest, for the number of images in a step."""
        return scaled_learning_rate(self.arguments, images_per_step(self.arguments, self.accelerator))

    # ------------------------------------------------------------------------------------------------------- scores

    def evaluate(self, *, with_pictures: bool = False) -> dict[str, Any]:
        """Score the model on the validation data; `with_pictures` keeps what the monitor is going to draw."""
        assert self.validation_data is not None  # it is there with `evaluate` or `evaluation_steps`
        return evaluate_model(
            plain_model(self.model, self.accelerator),  # a model in parts would have to run on all processes at once
            self.processor,
            self.validation_data,
            self.accelerator,
            self.arguments.task,
            batch_size=self.arguments.evaluation_batch_size,
            num_workers=self.arguments.num_workers,
            look=self._monitor.pictures.look if with_pictures and self._monitor.pictures else None,
        )

    def evaluate_average(self) -> dict[str, Any] | None:
        """Score the averages of the weights; `None` unless they are kept beside the weights."""
        if self._average is None or self.arguments.save_average != "beside":
            return None
        with self._average.used_by(self._network):
            return self.evaluate()

    def _log_scores_if_due(self) -> None:
        arguments, step = self.arguments, self.step
        if not arguments.evaluation_steps or step == 0 or step in self._scores_of_steps():
            return
        # With `evaluate` it is scored after the training, and before only to be compared.
        is_last = step == arguments.max_steps and arguments.evaluate
        if arguments.keep_best if is_last else step % arguments.evaluation_steps == 0:
            self._log_scores()
            self._progress.restart_clock()
            scores = self._scores_of_steps()
            if arguments.keep_best and scores[step] == max(scores.values()):
                self._save_checkpoint()

    def _log_scores(self) -> None:
        average = self._average if self.arguments.save_average == "instead" else None
        # What is trained afterwards does not depend on it.
        with preserved_random_states(self.accelerator.device):
            with nullcontext() if average is None else average.used_by(self._network):
                results = self.evaluate(with_pictures=True)
                if self.arguments.push_to_hub == "evaluation":
                    self._share(results)
            scores_of_average = self.evaluate_average()
        scores = headlines(self.arguments.task, results)
        line: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "scores": scores}
        if scores_of_average is not None:
            line["scores_of_average"] = headlines(self.arguments.task, scores_of_average)
        self.log.append(line)
        self._monitor.see_scores(line, self.log)
        if self.accelerator.is_main_process:
            tqdm.write(f"After step {self.step}: {format_scores(scores)}")

    def _share(self, scores: Mapping[str, Any]) -> None:
        """Upload the model as it is, with these scores on its card."""
        self.gather()
        if self.accelerator.is_main_process and self.repository is not None:
            live = live_folder(self.checkpoints)
            with (
                optional_work("The model cannot be uploaded"),
                tempfile.TemporaryDirectory(prefix=".shared-", dir=make_folder(live)) as name,
            ):
                folder = Path(name)
                self.save(folder)
                self.write_card(folder, self.seconds, scores)
                message = f"After step {self.step} of {self.arguments.max_steps}"
                push_folder(folder, self.repository, self.arguments.hub_private, message, is_last=False)
        self._whole = self._whole_average = None
        self.accelerator.wait_for_everyone()

    def finish(self, output_dir: Path, scores: Mapping[str, Any] | None) -> None:
        """Put what was drawn on the way beside the model, and upload it if that was asked for; all processes call it."""
        log = list(self.log)
        if scores is not None and self.step not in self._scores_of_steps():
            line = {"step": self.step, "seconds": self.seconds, "scores": headlines(self.arguments.task, scores)}
            log.append(line)
            self._monitor.see_scores(line, log)
            if self.accelerator.is_main_process:
                write_text(output_dir / LOG_FILE, lines_of(log))
        self._monitor.finish(log, output_dir)
        if self.accelerator.is_main_process and self.repository is not None:
            url = push_folder(output_dir, self.repository, self.arguments.hub_private, "Trained model")
            if url is not None:
                self.accelerator.print(f"It is on the Hub: {url}")

    def _scores_of_steps(self) -> dict[int, float]:
        """The score that decides what is better, of the steps that were scored."""
        return {line["step"]: next(iter(line["scores"].values())) for line in self.log if "scores" in line}

    def _has_stopped_improving(self) -> bool:
        """Whether `early_stopping` evaluations have brought nothing."""
        patience, scores = self.arguments.early_stopping, list(self._scores_of_steps().values())
        if patience is None or len(scores) <= patience or max(scores[-patience:]) > max(scores[:-patience]):
            return False
        self.accelerator.print(
            f"Stopping early after step {self.step}: {patience} evaluations have brought no better score."
        )
        return True

    def gather(self) -> None:
        """Collect what `save` and `write_card` need of a model that lies in parts; all processes call it before the first one saves."""
        self._whole = plain_model(self.model, self.accelerator)
        self._whole_average = None
        if self._average is not None and self.arguments.save_average == "beside":
            self._whole_average = full_tensors(self._average.state_dict(), self.accelerator)

    def save(self, folder: Path) -> None:
        """Write the model, the processor, the recipe and the log; `gather` comes first."""
        self._whole.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if self._whole_average is not None:
            with other_weights(self._whole, self._whole_average):
                self._whole.save_pretrained(folder / AVERAGE_FOLDER)
            self.processor.save_pretrained(folder / AVERAGE_FOLDER)
        self.arguments.save(folder / RECIPE_FILE)
        write_text(folder / LOG_FILE, lines_of(self.log))

    def write_card(self, folder: Path, seconds: float, scores: Mapping[str, Any] | None = None) -> None:
        """Write README.md, a model card with what was set and measured; one that a person has written stays."""
        record = record_training(self, seconds, scores)
        card = training_card(self._whole, self.processor, record, name=Path(self.arguments.output_dir).resolve().name)
        if not attach_card(folder, card) and scores is None:
            self.accelerator.print(f"{CARD_FILE} was written by a person, and is left as it is.")

    def describe(self) -> str:
        """Say in a few words what is going to be trained, on what and how."""
        arguments, accelerator = self.arguments, self.accelerator
        parameters = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        global_batch = images_per_step(arguments, accelerator)
        images = "a stream of images" if is_stream(self.train_data) else f"{len(self.train_data)} images"
        scaled = ""
        if self.learning_rate != arguments.learning_rate:
            scaled = f" It is that of the recipe, {arguments.learning_rate:g} for {arguments.reference_batch_size} images, scaled."
        return (
            f"{parameters / 1e6:.2f} million parameters on {accelerator.num_processes} x {accelerator.device.type}, "
            f"{images} of {arguments.dataset}, {arguments.max_steps} steps of {global_batch} "
            "images, "
            f"learning rate {self.learning_rate:g} ({self.learning_rate * arguments.backbone_factor:g} in the backbone)."
            f"{scaled}"
        )


def lines_of(log: Sequence[Mapping[str, Any]]) -> str:
    """Write a log, one line of JSON for each of its lines."""
    return "".join(f"{json.dumps(line)}\n" for line in log)
