"""Checkpoints: what lets a training that was stopped, or killed, go on as if nothing had happened.

    OUTPUT_DIR.checkpoints/
      step-00000500/                a folder has such a name only when all of it is on the disk
        model.safetensors           weights and buffers
        average.safetensors         averages of the weights, if they are kept
        optimizer.pt                optimiser, and scaler of float16
        process-00000.pt            of each process: states of random generators, sums that the log still needs
        log.jsonl                   the log so far
        checkpoint.json             step, position in the data, settings; size and checksum of each file above
      .step-00001000.unfinished/    being written, or left behind by a run that was killed; never read, removed later

`CheckpointFolder.write` writes, flushes and renames, and only then removes older checkpoints; a reader therefore finds a
complete one whenever there has been one. `CheckpointFolder.find` compares sizes and checksums all the same, because a folder
may have been copied in part. No file is unpickled in a way that could run code.
"""

import json
import os
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

FORMAT = 1
MANIFEST_FILE = "checkpoint.json"
MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
LOG_FILE = "log.jsonl"
PROCESS_FILE = "process-{:05d}.pt"
STEP_FOLDER = "step-{:08d}"

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message is for the user as it is."""


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Attributes:
        step: optimiser steps that are done.
        samples: images that all processes together have taken from the data, repeated ones included.
        seconds: time of all the steps, in all sessions.
        num_images: length of the data set, which the order of the images depends on; `None` for a stream whose end was not seen.
        score: of the weights of this step, the higher the better; `None` if they were not scored.
    """

    step: int
    samples: int
    seconds: float
    num_images: int | None
    score: float | None = None


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds. All but `own` is the same on every process, and written by the first one.

    Attributes:
        progress: how far the training has come.
        settings: the recipe, in types of JSON.
        log: lines of the log.
        model: weights and buffers.
        optimizer: its `state_dict`, and that of the scaler: whatever `torch.load` reads with `weights_only=True`.
        average: averages of the weights.
        own: what differs from process to process, in the same types as `optimizer`.
    """

    progress: Progress
    settings: dict[str, Any]
    log: list[dict[str, Any]]
    model: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    average: Mapping[str, Tensor] | None = None
    own: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; its parts are read when they are asked for."""

    folder: Path
    progress: Progress
    num_processes: int
    settings: dict[str, Any]

    def read_model(self) -> dict[str, Tensor]:
        """Weights and buffers, on the CPU."""
        return safetensors.torch.load_file(self.folder / MODEL_FILE)

    def read_average(self) -> dict[str, Tensor] | None:
        """Averages of the weights, on the CPU; `None` if the run kept none."""
        path = self.folder / AVERAGE_FILE
        return safetensors.torch.load_file(path) if path.exists() else None

    def read_optimizer(self) -> dict[str, Any]:
        """What was given as `TrainingState.optimizer`, on the CPU."""
        return read_safely(self.folder / OPTIMIZER_FILE)

    def read_own(self, process_index: int) -> dict[str, Any] | None:
        """What a process has written of its own; `None` for a process that the run did not have."""
        path = self.folder / PROCESS_FILE.format(process_index)
        return read_safely(path) if process_index < self.num_processes else None

    def read_log(self) -> list[dict[str, Any]]:
        """Lines of the log."""
        return [json.loads(line) for line in (self.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


class CheckpointFolder:
    """The checkpoints of the run that will end in `output_dir`; they lie beside it, in `OUTPUT_DIR.checkpoints`.

    Several processes, also on several machines, must see the same folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        """Name the folder; nothing is read or made yet."""
        output_dir = Path(output_dir)
        self.path = output_dir.with_name(f"{output_dir.name}.checkpoints")

    # ------------------------------------------------------------------------------------------------------- reading

    def find(self, tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Checkpoint | None:
        """Return the newest complete checkpoint, or `None`; `tell` is given a sentence about each that is damaged."""
        self._put_back()
        for step in reversed(self.steps()):
            checkpoint, problem = self._read(step)
            if checkpoint is not None:
                return checkpoint
            tell(f"{self._folder_of(step)} is damaged ({problem}), and is passed over.")
        return None

    def find_together(self, accelerator: Accelerator) -> Checkpoint | None:
        """`find` for all processes: the first one looks, and every one gets what it has found."""
        found = self.find() if accelerator.is_main_process else None
        return gather_object([found])[0]

    def find_step(self, step: int) -> Checkpoint | None:
        """Return the checkpoint of a step, or `None` if there is no complete one."""
        return self._read(step)[0] if step in self.steps() else None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order; sizes and checksums are not looked at."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))

    def describe_newest(self) -> str:
        """End of a sentence about what there is to go on from."""
        steps = self.steps()
        if not steps:
            return "there is no checkpoint yet"
        return f"step {steps[-1]} is saved in {self.path}; start the same command again to go on from there"

    def _folder_of(self, step: int) -> Path:
        return self.path / STEP_FOLDER.format(step)

    def _read(self, step: int) -> tuple[Checkpoint | None, str]:
        """Return a complete checkpoint, or `None` and what is wrong with it."""
        folder = self._folder_of(step)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                return None, f"it has format {manifest['format']}, and this version reads {FORMAT}"
            for name, expected in manifest["files"].items():
                found = asdict(measure_file(folder / name))
                if found != expected:
                    return None, f"{name} has {found['size']} bytes, and not the {expected['size']} that were written"
            checkpoint = Checkpoint(
                folder, Progress(**manifest["progress"]), manifest["num_processes"], manifest["settings"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{type(error).__name__}: {error}"
        return checkpoint, ""

    # ------------------------------------------------------------------------------------------------------- writing

    def write(self, state: TrainingState, accelerator: Accelerator, *, keep: int = 1, keep_best: bool = False) -> Path:
        """Write a checkpoint, then remove older ones. All processes call it after the same step.

        Args:
            state: what is saved; each process gives its own.
            accelerator: of this run.
            keep: how many checkpoints are left, this one included; at least 1.
            keep_best: leave the one with the highest score too.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: it cannot be written; those before are untouched.
        """
        folder = self._folder_of(state.progress.step)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        is_main = accelerator.is_main_process
        with self._sentence_about_failure(folder):
            try:
                together(lambda: self._begin(unfinished) if is_main else None)
                written = together(lambda: self._write_files(unfinished, state, accelerator))
                files = {name: facts for part in written for name, facts in part.items()}
                together(lambda: self._complete(folder, unfinished, state, files, len(written)) if is_main else None)
            finally:
                if is_main:
                    shutil.rmtree(unfinished, ignore_errors=True)
        if is_main:
            self._prune(state.progress.step, keep, keep_best=keep_best)
            self.remove_leftovers()
        return folder

    def remove(self) -> None:
        """Remove all checkpoints, at once: they disappear under their names before the first file is removed."""
        if self.path.exists():
            removed = self.path.with_name(f".{self.path.name}.removed-{os.getpid()}")
            self.path.rename(removed)
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what killed runs have left: half a checkpoint, or half of what they were removing."""
        own = f".{self.path.name}.removed-"
        for folder, prefix in ((self.path, ".step-"), (self.path.parent, own)):
            if folder.is_dir():
                for leftover in folder.iterdir():
                    if leftover.name.startswith(prefix):
                        shutil.rmtree(leftover, ignore_errors=True)

    def _begin(self, unfinished: Path) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._put_back()
        self.remove_leftovers()
        unfinished.mkdir()

    def _put_back(self) -> None:
        """Undo a replacement in the middle of which a run was killed."""
        for replaced in list(self.path.glob(".step-*.replaced")):
            folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
            if not folder.exists():
                replaced.rename(folder)

    @staticmethod
    def _write_files(folder: Path, state: TrainingState, accelerator: Accelerator) -> dict[str, dict[str, int]]:
        """Write what this process writes; returns size and checksum of each file."""
        facts = {}

        def write(name: str, fill: Callable[[DurableFile], object]) -> None:
            with DurableFile(folder / name) as file:
                fill(file)
            facts[name] = asdict(file.facts)

        write(PROCESS_FILE.format(accelerator.process_index), lambda file: torch.save(state.own, file))
        if accelerator.is_main_process:
            write(MODEL_FILE, lambda file: file.write(to_safetensors(state.model)))
            if state.average is not None:
                average = state.average
                write(AVERAGE_FILE, lambda file: file.write(to_safetensors(average)))
            write(OPTIMIZER_FILE, lambda file: torch.save(state.optimizer, file))
            log = "".join(f"{json.dumps(line)}\n" for line in state.log)
            write(LOG_FILE, lambda file: file.write(log.encode()))
        return facts

    def _complete(
        self,
        folder: Path,
        unfinished: Path,
        state: TrainingState,
        files: Mapping[str, Mapping[str, int]],
        num_processes: int,
    ) -> None:
        """Write the manifest, bring everything to the disk, and give the folder its name."""
        manifest = {
            "format": FORMAT,
            "progress": asdict(state.progress),
            "num_processes": num_processes,
            "settings": state.settings,
            "files": files,
        }
        with DurableFile(unfinished / MANIFEST_FILE) as file:
            file.write((json.dumps(manifest, indent=2) + "\n").encode())
        flush_folder(unfinished)
        if folder.exists():  # the same step without its score, or damaged
            folder.rename(folder.with_name(f".{folder.name}.replaced"))
        unfinished.rename(folder)
        flush_folder(self.path)
        flush_folder(self.path.parent)

    def _prune(self, newest: int, keep: int, *, keep_best: bool) -> None:
        """Remove all but some checkpoints; one of a later step than the newest is none of this run, or damaged."""
        kept = set([step for step in self.steps() if step <= newest][-keep:])
        if keep_best:
            scores = {step: self._score_of(step) for step in self.steps() if step <= newest}
            scored = {step: score for step, score in scores.items() if score is not None}
            kept |= set(sorted(scored, key=lambda step: scored[step])[-1:])
        for step in set(self.steps()) - kept:
            folder = self._folder_of(step)
            removed = folder.with_name(f".{folder.name}.removed")
            folder.rename(removed)  # half of it must not be taken for a checkpoint
            shutil.rmtree(removed, ignore_errors=True)

    def _score_of(self, step: int) -> float | None:
        try:
            manifest = json.loads((self._folder_of(step) / MANIFEST_FILE).read_text(encoding="utf-8"))
            return Progress(**manifest["progress"]).score
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def _sentence_about_failure(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = f"{Path(error.filename).name}: " if error.filename else ""
            raise CheckpointError(
                f"The checkpoint {folder} cannot be written: {name}{error.strerror or error}. Those before are untouched: "
                f"{self.describe_newest()}. Make room, or let this folder be written, first."
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileFacts:
    """What tells a whole file from a part of it."""

    size: int
    checksum: int


class DurableFile:
    """A new file that is on the disk when the block ends.

    An error of writing is kept until then: `torch.save` writes from C++, which reports some other error or none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        self._size = 0
        self._checksum = 0

    def __enter__(self) -> "DurableFile":
        self._file = self._path.open("xb")
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes; returns how many there were, also after an error."""
        view = memoryview(data)
        if self._error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self._keep(error)
        self._size += view.nbytes
        self._checksum = zlib.crc32(view, self._checksum)
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: all is flushed at the end; `torch.save` asks for this method."""

    @property
    def facts(self) -> FileFacts:
        """Of all that was written."""
        return FileFacts(self._size, self._checksum)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._error is None and error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as flushing:
            self._keep(flushing)
        try:
            self._file.close()
        except OSError as closing:  # what could not be written is tried once more
            self._keep(closing)
        if self._error is not None:
            raise self._error

    def _keep(self, error: OSError) -> None:
        """Remember the first error, with the name of the file, which errors of writing do not have."""
        self._error = self._error or OSError(error.errno, error.strerror, str(self._path))


def measure_file(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return FileFacts(size, checksum)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Contents of a file; names that share memory each get their own copy, which loading brings together again."""
    return safetensors.torch.save(
        {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    )


def read_safely(path: Path) -> Any:  # noqa: ANN401 - whatever was written
    """Read tensors, numbers and text of `torch.save`; anything that could run code is an error."""
    return torch.load(path, map_location="cpu", weights_only=True)


def together(act: Callable[[], Result]) -> list[Result]:
    """Do something on all processes, and wait for all.

    Returns:
        The results of all processes, on each of them.

    Raises:
        OSError: on all processes, if it was raised on one.
    """
    result, problem = None, None
    try:
        result = act()
    except OSError as error:
        problem = error
    facts = None if problem is None else (problem.errno, problem.strerror or str(problem), problem.filename)
    answers = gather_object([(result, facts)])
    for _, reason in answers:
        if reason is not None:
            raise OSError(*reason) from problem
    return [answer for answer, _ in answers]


# ---------------------------------------------------------------------------------------------------------------------
# Random generators
# ---------------------------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the generators of Python, NumPy and PyTorch, those of the device included, for `read_safely`."""
    version, words, next_gauss = random.getstate()
    # The global generator is the one that libraries draw from.
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    states = {
        "python": [version, list(words), next_gauss],
        "numpy": [str(algorithm), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to states of `random_states`; that of a device that it does not know stays as it is."""
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words), next_gauss))
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def preserved_random_states(device: torch.device) -> Iterator[None]:
    """Leave the generators after the block as they were before: what follows does not depend on it."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


def seed_new_process(seed: int, step: int, process_index: int) -> None:
    """Set the generators of a process that the run did not have before it was stopped."""
    derived = int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0])
    random.seed(derived)
    np.random.seed(derived)  # noqa: NPY002
    torch.manual_seed(derived)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the types that they have when they are read back."""
    return json.loads(json.dumps(settings, default=str))


def require_same_settings(
    checkpoint: Checkpoint, settings: Mapping[str, Any], free: Collection[str], way_out: str
) -> None:
    """Refuse to go on with another recipe.

    Args:
        checkpoint: of the unfinished run.
        settings: those of this run, in types of JSON.
        free: names of settings that may differ.
        way_out: what the user can do, a sentence.

    Raises:
        CheckpointError: it names the settings that differ.
    """
    before = {name: value for name, value in checkpoint.settings.items() if name not in free}
    now = {name: value for name, value in settings.items() if name not in free}
    differences = list(find_differences(before, now))
    if differences:
        raise CheckpointError(
            f"{checkpoint.folder.parent} holds an unfinished run, at step {checkpoint.progress.step}, of another "
            f"recipe: {'; '.join(differences)}. {way_out}"
        )


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any], path: Sequence[str] = ()) -> Iterator[str]:
    """Name settings that differ, those inside of mappings with a dot: `model.num_queries` (50 before, 100 now)."""
    for name in sorted({*before, *now}):
        missing = object()
        old, new = before.get(name, missing), now.get(name, missing)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from find_differences(old, new, [*path, name])
        elif old != new:
            shown = ["not set" if value is missing else json.dumps(value, ensure_ascii=False) for value in (old, new)]
            yield f"`{'.'.join([*path, name])}` ({shown[0]} before, {shown[1]} now)"
