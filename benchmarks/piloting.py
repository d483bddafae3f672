"""The same recipe with and without mask piloting, several seeds each: `python -m benchmarks.piloting --help`.

Instance and panoptic segmentation of digit scenes, from random weights. Every run is `python -m training.train` with the same options
but for `model.mask_piloting` and the seed; it scores the validation split every so many steps. Two runs of one seed see the same images
in the same order.

What a step costs is measured apart, in one process, both kinds of steps in turns, because runs on a machine that others use say
little about time. The curves are then compared at equal steps, and at equal time: a step with piloting counts as so many steps without.

A run that is there already is not repeated, and one that was stopped goes on: the program can be started again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.measuring import measure_times, write_report
from training.arguments import TrainingArguments, parse_arguments
from training.batches import collate_for_training
from training.data import load_segmentation_dataset
from training.optimization import make_parameter_groups
from training.preparation import build_processor
from training.starting_point import build_model

ROOT = Path(__file__).parents[1]
RECIPE = "training/recipes/digit_scenes/panoptic/quickstart.yaml"
SCORES = {"instance": "AP", "panoptic": "PQ"}
# Colours that most people can tell apart (Wong 2011).
COLORS = {True: "#0072B2", False: "#D55E00"}
NAMES = {True: "mask piloting", False: "without"}


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    piloting: bool
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.task}-{'piloted' if self.piloting else 'plain'}-{self.seed}"


def main() -> None:
    """Train, measure, write."""
    options = make_parser().parse_args()
    words = [word for option in options.option for word in option_words(option)]
    runs = [
        Run(task, piloting, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        for piloting in (True, False)
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        logs = dict(
            zip(
                runs,
                tqdm(
                    pool.map(lambda run: train(run, options, words), runs),
                    total=len(runs),
                    desc="trainings",
                    unit="run",
                ),
                strict=True,
            )
        )
    costs = {task: measure_step(task, options, words) for task in options.tasks}
    report = {
        "recipe": options.recipe,
        "options": words,
        "steps": parse(Run(options.tasks[0], True, 0), options, words).max_steps,
        "cost_of_a_step": costs,
        "tasks": {
            task: summarise({run: log for run, log in logs.items() if run.task == task}, costs[task]["ratio"])
            for task in options.tasks
        },
    }
    write_report(options.output, "piloting", report)
    draw(report, options.output.with_suffix(".png"))
    for task, result in report["tasks"].items():
        print(task, json.dumps(result["final"], indent=2))


def make_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.piloting", description=__doc__)
    parser.add_argument("--recipe", default=RECIPE, help="recipe of all runs (default: %(default)s)")
    parser.add_argument(
        "--tasks", nargs="+", choices=SCORES, default=list(SCORES), help="what is trained (default: both)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with a thread each (default: %(default)s)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of training.train for all runs"
    )
    parser.add_argument("--repeats", type=int, default=20, help="steps of each kind to measure (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/piloting"), help="of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/piloting_cpu.json", help="(default: %(default)s)"
    )
    return parser


def option_words(option: str) -> list[str]:
    """Turn NAME=VALUE into words of the command line."""
    name, _, value = option.partition("=")
    return [f"--{name}", value]


def words_of(run: Run, options: argparse.Namespace, words: list[str]) -> list[str]:
    """Command line of a run, without the program."""
    return [
        *(options.recipe, "--output_dir", str(options.folder / run.name)),
        *("--task", run.task, "--seed", str(run.seed), "--model.mask_piloting", str(run.piloting).lower()),
        *words,
    ]


def parse(run: Run, options: argparse.Namespace, words: list[str]) -> TrainingArguments:
    """Settings of a run."""
    return parse_arguments(words_of(run, options, words))


def train(run: Run, options: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
    """Train, unless it is done; returns the log.

    Raises:
        RuntimeError: the program failed.
    """
    folder = options.folder / run.name
    if not (folder / "results.json").exists():
        threads = {"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}
        with (options.folder / f"{run.name}.txt").open("w") as output:
            done = subprocess.run(
                [sys.executable, "-m", "training.train", *words_of(run, options, words)],
                cwd=ROOT,
                env={**os.environ, **threads},
                stdout=output,
                stderr=output,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{run.name} failed, see {output.name}.")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    score = results["scores"]["AP"] if run.task == "instance" else results["scores"]["All"]["pq"]
    return [*log, {"step": results["steps"], "scores": {SCORES[run.task]: score}}]


def measure_step(task: str, options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Seconds of a step on the same images with and without piloting, and their ratio."""
    steps = {}
    for piloting in (True, False):
        arguments = parse(Run(task, piloting, 0), options, words)
        dataset = load_segmentation_dataset(arguments.dataset, "train", **arguments.options_of("train"))
        torch.manual_seed(0)
        model, _ = build_model(arguments, dataset)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device).train()
        optimizer = torch.optim.AdamW(make_parameter_groups(model, arguments), lr=arguments.learning_rate)
        rows = [dataset[index] for index in range(arguments.batch_size)]
        inputs = collate_for_training(rows, build_processor(arguments, dataset))
        moved = {
            name: [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
            for name, value in inputs.items()
        }

        def step(model: Any = model, moved: Any = moved, optimizer: Any = optimizer) -> None:  # noqa: ANN401
            model(**moved).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[NAMES[piloting]] = step
    times = measure_times(steps, options.repeats, device, description=f"steps, {task}")
    ratio = times[NAMES[True]]["min"] / times[NAMES[False]]["min"]
    return {"seconds": times, "ratio": ratio, "threads": torch.get_num_threads()}


def summarise(logs: dict[Run, list[dict[str, Any]]], ratio: float) -> dict[str, Any]:
    """Collect the curves of a task; compare the two kinds at the end, at equal steps and at equal time."""
    curves = {}
    for run, log in logs.items():
        scores = {line["step"]: line["scores"][SCORES[run.task]] for line in log if "scores" in line}
        losses = {
            line["step"]: {kind: line.get(kind) for kind in ("loss", "mask", "dice", "pilot_mask", "pilot_dice")}
            for line in log
            if "loss" in line
        }
        curves[run.name] = {"piloting": run.piloting, "seed": run.seed, "scores": scores, "losses": losses}
    final = {}
    for piloting in (True, False):
        last = [list(curve["scores"].values())[-1] for curve in curves.values() if curve["piloting"] == piloting]
        final[NAMES[piloting]] = describe(last)
    steps = list(next(iter(curves.values()))["scores"])
    mean = {
        piloting: np.mean([list(c["scores"].values()) for c in curves.values() if c["piloting"] == piloting], axis=0)
        for piloting in (True, False)
    }
    equal_time = np.interp(np.array(steps) / ratio, steps, mean[True], left=np.nan)
    return {
        "curves": curves,
        "final": final,
        "mean_at_equal_steps": {
            str(step): {NAMES[True]: float(mean[True][i]), NAMES[False]: float(mean[False][i])}
            for i, step in enumerate(steps)
        },
        "mean_at_equal_time": {
            str(step): {
                NAMES[True]: None if np.isnan(equal_time[i]) else float(equal_time[i]),
                NAMES[False]: float(mean[False][i]),
            }
            for i, step in enumerate(steps)
        },
    }


def describe(values: list[float]) -> dict[str, Any]:
    """Mean and spread."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.mean(values), "standard_deviation": spread}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the scores over steps and over time; thin lines are runs, thick ones their means."""
    tasks = report["tasks"]
    figure, rows = plt.subplots(len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False, layout="constrained")
    for axes, (task, result) in zip(rows, tasks.items(), strict=True):
        ratio = report["cost_of_a_step"][task]["ratio"]
        for axis, factor, words in ((axes[0], 1.0, "steps"), (axes[1], ratio, "time, in steps without piloting")):
            for piloting in (True, False):
                scale = factor if piloting else 1.0
                own = [curve["scores"] for curve in result["curves"].values() if curve["piloting"] == piloting]
                steps = np.array([int(step) for step in own[0]])
                values = 100 * np.array([list(scores.values()) for scores in own])
                for line in values:
                    axis.plot(scale * steps, line, color=COLORS[piloting], linewidth=0.7, alpha=0.5)
                axis.plot(
                    scale * steps,
                    values.mean(0),
                    color=COLORS[piloting],
                    linewidth=2.2,
                    label=NAMES[piloting],
                    linestyle="-" if piloting else "--",
                )
            axis.set_xlabel(words)
            axis.set_ylabel(f"{SCORES[task]} of {task} segmentation, %")
            axis.grid(alpha=0.3)
        axes[0].legend(loc="lower right")
        axes[1].set_title(f"a step with piloting costs {ratio:.2f} of one without", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
