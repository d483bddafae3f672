"""The progress bar and the lines of the log.

{"step": 20, "loss": 31.4, "mask": ..., "pilot_mask": ..., "levels": {"mask": [level 0, ...], ...}, "learning_rate": ...,
 "gradient_norm": ..., "images_per_second": ..., "waiting": 0.02, "memory_gib": 3.1}
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from training.arguments import TrainingArguments

Batch = TypeVar("Batch")
GRADIENT_NORM = "gradient_norm"
# What in a line depends on the machine and its load; all else is the same whenever a run is repeated on it.
MEASURED = frozenset(("images_per_second", "waiting", "memory_gib", "seconds", "alarms"))


class TrainingProgress:
    """The progress bar, and the lines of the log: means over the steps since the last line, and over processes.

    Losses stay on their device until a line is due, so that no step waits for them.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        """Show the bar."""
        self.arguments = arguments
        self.accelerator = accelerator
        self.bar = tqdm(
            total=arguments.max_steps,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=bar_interval(),
        )
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self.restart_clock()

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def state(self) -> dict[str, Any]:
        """Sums of this process that are not in the log yet, for a checkpoint."""
        return {"sums": {name: term.detach().cpu() for name, term in self._sums.items()}, "passes": self._passes}

    def go_on(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Continue after a step, with the sums of this process; `None` begins them anew."""
        self.bar.initial = self.bar.n = step  # earlier sessions count for the bar, not for its speed
        if state is not None:
            self._sums = {name: term.to(self.accelerator.device) for name, term in state["sums"].items()}
            self._passes = state["passes"]

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last line."""
        self._start = time.perf_counter()
        self._timed_passes = 0
        self._waited = 0.0

    def time_waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and count how long each was waited for."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def add(self, loss_dict: Mapping[str, Tensor]) -> None:
        """Take the terms of the loss of one forward pass."""
        for name, term in loss_dict.items():
            self._add(name, term)
        self._passes += 1
        self._timed_passes += 1

    def add_gradient_norm(self, norm: Tensor | float | None) -> None:
        """Take the norm of the gradients before they were clipped."""
        if norm is not None:
            if isinstance(norm, DTensor):  # of sharded weights
                norm = norm.full_tensor()
            passes = self.arguments.gradient_accumulation_steps  # it counts once a step, the losses once a pass
            self._add(GRADIENT_NORM, torch.as_tensor(norm, device=self.accelerator.device).detach() * passes)

    def _add(self, name: str, term: Tensor) -> None:
        self._sums[name] = self._sums[name] + term if name in self._sums else term

    def end_step(self, step: int, learning_rate: float) -> list[dict[str, Any]]:
        """Count an optimiser step; returns the line of the log, if one is due."""
        self.bar.update()
        if step % self.arguments.logging_steps and step < self.arguments.max_steps:
            return []
        sums = torch.stack([term.float() for term in self._sums.values()])
        means = dict(
            zip(self._sums, self.accelerator.reduce(sums / self._passes, reduction="mean").tolist(), strict=True)
        )
        norm = {GRADIENT_NORM: means.pop(GRADIENT_NORM)} if GRADIENT_NORM in means else {}
        levels = list_levels(means)
        terms = {kind: sum(values) for kind, values in levels.items()}
        seconds = time.perf_counter() - self._start
        images = self._timed_passes * self.arguments.batch_size * self.accelerator.num_processes
        line = {
            "step": step,
            "loss": sum(terms.values()),
            **terms,
            "levels": levels,
            "learning_rate": learning_rate,
            **norm,
            "images_per_second": images / seconds,
            "waiting": self._waited / seconds,
            **measure_memory(self.accelerator.device),
        }
        self._sums, self._passes = {}, 0
        self.restart_clock()
        self.bar.set_postfix_str(format_line(line), refresh=False)
        return [line]


def list_levels(losses: Mapping[str, float]) -> dict[str, list[float]]:
    """Sort the terms of a loss by kind: `loss_mask_0`, `loss_mask_1`, `loss_mask` become `mask`, level by level.

    The last level, without a number, comes last.
    """
    kinds: dict[str, dict[float, float]] = defaultdict(dict)
    for name, value in losses.items():
        kind, number = re.fullmatch(r"(?:loss_)?(.+?)(?:_(\d+))?", name).groups()  # type: ignore[union-attr]
        kinds[kind][float("inf") if number is None else int(number)] = value
    return {kind: [levels[key] for key in sorted(levels)] for kind, levels in kinds.items()}


def bar_interval() -> float:
    """Seconds between two updates of a progress bar: a log file wants fewer lines than a terminal."""
    return 0.5 if sys.stderr.isatty() else 20


def measure_memory(device: torch.device) -> dict[str, float]:
    """Most memory that this process has needed of an accelerator so far; nothing is known of a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def format_line(line: Mapping[str, Any]) -> str:
    """Shorten a line of the log for the progress bar: losses as classes / masks / dice."""
    parts = [f"loss {line['loss']:.2f}"]
    for name, prefix in (("matched", ""), ("piloted", "pilot_")):
        terms = [line.get(f"{prefix}{kind}") for kind in ("cross_entropy", "mask", "dice")]
        shown = ["-" if term is None else f"{term:.2f}" for term in terms]
        parts += [f"{name} {'/'.join(shown)}"] if any(term is not None for term in terms) else []
    parts += [f"lr {line['learning_rate']:.1e}", f"{line['images_per_second']:.1f} images/s"]
    parts += [f"{line['memory_gib']:.1f} GiB"] if "memory_gib" in line else []
    return ", ".join(parts)
