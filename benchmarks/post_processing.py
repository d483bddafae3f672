"""Time and memory of post-processing: `python -m benchmarks.post_processing --help`.

An image of 1920 x 1080, resized to 1333 x 750 and padded to 1344 x 768, with 100 queries and 80 classes. Compared are

    plain         the definition in one piece: all logits, two bilinear steps, float32 (`tests/plain_post_processing.py`)
    transformers  its Mask2FormerImageProcessor, which squashes the logits to 384 x 384 first and keeps the padding
    mpformer      our image processor

in two cases: "all", where each query is an object and the threshold is 0, and "confident", where 20 are and the threshold is
0.5. Repeats are interleaved and the minimum counts, because other work on the machine can only make a run slower. Memory is the
peak resident set of a child process of its own (on a GPU: what torch allocates), minus that before the run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Mask2FormerImageProcessor

from benchmarks.measuring import measure_added_memory, measure_times, write_report
from mpformer_hf import MPFormerImageProcessor
from tests import plain_post_processing as plain

TASKS = ("instance", "panoptic", "semantic")
CONTENDERS = ("plain", "transformers", "mpformer")
PADDED, VALID, TARGET = (768, 1344), (750, 1333), (1080, 1920)
NUM_QUERIES, NUM_CLASSES = 100, 80


@dataclass(frozen=True)
class Case:
    """How many queries are objects, and the threshold of their scores."""

    objects: int
    threshold: float


CASES = {"all": Case(NUM_QUERIES, 0.0), "confident": Case(20, 0.5)}


def make_outputs(case: Case, device: str) -> SimpleNamespace:
    """Ellipses of many sizes with uneven borders; the other queries are confident to be no object."""
    generator = torch.Generator().manual_seed(0)
    height, width = PADDED[0] // 4, PADDED[1] // 4
    y, x = torch.arange(height)[:, None], torch.arange(width)
    largest = torch.tensor([height, width, height / 4, width / 4])
    masks = []
    for drawn in torch.rand(NUM_QUERIES, 4, generator=generator) * largest:
        center_y, center_x, radius_y, radius_x = (drawn + torch.tensor([0, 0, 4, 4])).tolist()
        inside = 1 - ((y - center_y) / radius_y) ** 2 - ((x - center_x) / radius_x) ** 2
        masks.append((inside * min(radius_y, radius_x) / 2).clamp(-8, 8))
    bumps = torch.randn(1, NUM_QUERIES, height // 8, width // 8, generator=generator)
    bumps = nn.functional.interpolate(bumps, (height, width), mode="bicubic")
    classes = torch.randn(1, NUM_QUERIES, NUM_CLASSES + 1, generator=generator)
    labels = torch.randint(NUM_CLASSES, (NUM_QUERIES,), generator=generator)
    classes[0, torch.arange(NUM_QUERIES), labels] += 7
    classes[0, case.objects :, -1] += 14
    return SimpleNamespace(
        class_queries_logits=classes.to(device),
        masks_queries_logits=(torch.stack(masks) + 0.5 * bumps).to(device),
        image_sizes=torch.tensor([VALID]),
    )


def make_run(contender: str, task: str, case: Case, device: str) -> Callable[[], Any]:
    """One contender at one task."""
    outputs = make_outputs(case, device)
    if contender == "plain":
        return make_plain_run(task, outputs.class_queries_logits[0], outputs.masks_queries_logits[0], case.threshold)
    processor = Mask2FormerImageProcessor() if contender == "transformers" else MPFormerImageProcessor()
    post_process = getattr(processor, f"post_process_{task}_segmentation")
    thresholds = {} if task == "semantic" else {"threshold": case.threshold}
    return lambda: post_process(outputs, target_sizes=[TARGET], **thresholds)


def make_plain_run(task: str, classes: Tensor, masks: Tensor, threshold: float) -> Callable[[], Any]:
    """The definition."""
    if task == "instance":
        return lambda: plain.instances(classes, masks, VALID, TARGET, score_threshold=threshold)
    if task == "panoptic":
        return lambda: plain.panoptic(classes, masks, VALID, TARGET, score_threshold=threshold)
    return lambda: plain.semantic_scores(classes, masks, VALID, TARGET).argmax(0)


def measure_memory(contender: str, task: str, case: Case, threads: int, device: str) -> float:
    """MiB that one run adds at its peak, in a process of its own."""
    arguments = ["--child", contender, task, json.dumps(asdict(case)), "--threads", str(threads), "--device", device]
    command = [sys.executable, "-m", "benchmarks.post_processing", *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(output.stdout.strip().splitlines()[-1])


def measure(repeats: int, threads: int, device: str) -> list[dict[str, Any]]:
    """One row for each case and task."""
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(CASES) * len(TASKS)) as progress:
        for name, case in CASES.items():
            for task in TASKS:
                runs = {one: make_run(one, task, case, device) for one in CONTENDERS}
                seconds = measure_times(runs, repeats, device)
                memory = {one: measure_memory(one, task, case, threads, device) for one in CONTENDERS}
                best = {one: times["min"] for one, times in seconds.items()}
                rows.append(
                    {
                        "case": name,
                        "task": task,
                        "seconds": seconds,
                        "MiB": memory,
                        "times as fast as plain": best["plain"] / best["mpformer"],
                        "times as fast as transformers": best["transformers"] / best["mpformer"],
                        "share of plain's memory": memory["mpformer"] / memory["plain"],
                    }
                )
                progress.update()
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader, with minimum seconds."""
    lines = ["case       task      plain    transformers  mpformer   against plain  transformers   memory, MiB"]
    for row in rows:
        plain_time, theirs, ours = (1000 * row["seconds"][name]["min"] for name in CONTENDERS)
        memory = " / ".join(f"{row['MiB'][name]:.0f}" for name in CONTENDERS)
        lines.append(
            f"{row['case']:10} {row['task']:9} {plain_time:5.0f} ms {theirs:9.0f} ms  {ours:6.0f} ms  "
            f"{row['times as fast as plain']:12.1f}x {row['times as fast as transformers']:12.1f}x   {memory}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        contender, task, case = arguments.child
        run = make_run(contender, task, Case(**json.loads(case)), arguments.device)
        print(measure_added_memory(run, arguments.device))
        return
    rows = measure(arguments.repeats, arguments.threads, arguments.device)
    print(format_table(rows))
    setting = {
        "padded": PADDED,
        "valid": VALID,
        "target": TARGET,
        "queries": NUM_QUERIES,
        "classes": NUM_CLASSES,
        "threads": arguments.threads,
        "device": arguments.device,
    }
    report = {"setting": setting, "repeats": arguments.repeats, "rows": rows}
    write_report(arguments.output, "post_processing", report)


if __name__ == "__main__":
    main()
