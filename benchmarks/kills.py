"""Trainings that are killed at random instants and resumed each time: `python -m benchmarks.kills --help`.

One run is left alone. Then runs of the same recipe, on the same machine, are killed with SIGKILL at random instants of their work
(the programs are real, and so are all their files) and started again with the same command, until there have been as many kills
as were asked for. Each run that comes to its end must have left the weights, the averages and the log of the one that was left
alone, bit by bit; the speed in the log does not count. Checkpoints are written every few steps, so that kills fall into that too.

The instants are drawn from a seed, but what a program is doing then depends on the machine.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.measuring import write_report
from training.checkpoints import CheckpointFolder
from training.progress import MEASURED

ROOT = Path(__file__).parents[1]
RECIPE = "training/recipes/digit_scenes/panoptic/quickstart.yaml"
OPTIONS = {
    "max_steps": 120,
    "save_every": 4,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 7,
    "train_options.num_images": 50,
    "validation_options.num_images": 4,
    "evaluation_steps": 30,
    "evaluate": "false",
    "average_decay": 0.99,
    "save_average": "beside",
}
FILES = ("model.safetensors", "average/model.safetensors")


@dataclass(frozen=True)
class Kill:
    """What a killed run left: seconds after its first step, step it can go on from, names that are not complete."""

    seconds: float
    newest_step: int
    leftovers: list[str]


def command_for(output_dir: Path, processes: int) -> list[str]:
    """Train the recipe into a folder."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    program = [RECIPE, "--output_dir", str(output_dir), *options]
    if processes == 1:
        return [sys.executable, "-m", "training.train", *program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "training/train.py", *program]


def run(output_dir: Path, processes: int, seconds: float | None = None) -> float | None:
    """Run the program, and kill it some seconds after its work begins.

    Returns:
        Seconds of its work; `None` if it was killed.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryFile("w+") as errors:
        program = subprocess.Popen(
            command_for(output_dir, processes),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert program.stdout is not None
        for line in program.stdout:
            if "million parameters" in line:  # the last thing it says before it reads a checkpoint
                break
        start = time.perf_counter()
        try:
            program.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)  # those that prepare batches, and other processes, too
            program.communicate()
            return None
        if program.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"The training into {output_dir} failed:\n{errors.read()}")
        program.communicate()
    return time.perf_counter() - start


def outcome_of(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: SHA-256 of the weights, and of the log without its speed."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return {**hashes, "log": hashlib.sha256(json.dumps(log).encode()).hexdigest()}


def describe_kill(output_dir: Path, seconds: float) -> Kill:
    """Look at what is there; a checkpoint with a complete name that is damaged would be named too."""
    folder = CheckpointFolder(output_dir)
    leftovers = [path.name for path in folder.path.glob(".*")] if folder.path.exists() else []
    leftovers += [path.name for path in output_dir.parent.glob(f".{output_dir.name}.*")]
    damaged: list[str] = []
    checkpoint = folder.find(damaged.append)
    return Kill(round(seconds, 3), 0 if checkpoint is None else checkpoint.progress.step, leftovers + damaged)


def kill_and_resume(folder: Path, num_kills: int, processes: int, work: float, seed: int) -> list[dict[str, Any]]:
    """Kill until it was enough; returns for each run that came to its end how often it was killed, and what it left."""
    generator = random.Random(seed)
    runs: list[dict[str, Any]] = []
    bar = tqdm(total=num_kills, desc="kills", unit="kill")
    while bar.n < num_kills:
        output_dir = folder / f"run{len(runs)}"
        kills: list[Kill] = []
        while True:
            # On average a session does its part of the work.
            seconds = generator.uniform(0, 2 * work / num_kills) if bar.n < num_kills else None
            if run(output_dir, processes, seconds) is not None:
                break
            kills.append(describe_kill(output_dir, seconds or 0.0))
            bar.update()
        runs.append({"kills": [asdict(kill) for kill in kills], "outcome": outcome_of(output_dir)})
    bar.close()
    return runs


def main() -> None:
    """Parse the command line, run everything, and fail if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a run is killed (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = run(folder / "uninterrupted", options.processes)
        assert work is not None
        uninterrupted = outcome_of(folder / "uninterrupted")
        runs = kill_and_resume(folder, options.kills, options.processes, work, options.seed)
    is_equal = all(one["outcome"] == uninterrupted for one in runs)
    kills = [kill for one in runs for kill in one["kills"]]
    report = {
        "processor": platform.processor() or platform.machine(),
        "processes": options.processes,
        "recipe": RECIPE,
        "options": OPTIONS,
        "seconds of the uninterrupted run": round(work, 1),
        "kills": len(kills),
        "kills while files were written or removed": sum(bool(kill["leftovers"]) for kill in kills),
        "bit by bit equal": is_equal,
        "uninterrupted": uninterrupted,
        "runs": runs,
    }
    write_report(options.output, "kills", report)
    print(json.dumps({name: value for name, value in report.items() if name != "runs"}, indent=2))
    if not is_equal:
        sys.exit("error: a run that was killed left other bits than the one that was left alone.")


if __name__ == "__main__":
    main()
