"""Time and memory of the metrics at the size of a validation set: `python -m benchmarks.evaluation --help`.

Images of 640 x 480 with 20 segments each, whose shapes are ellipses with wavy outlines, of 8 to 140 pixels radius.

instance: `AveragePrecision`, adding and computing, against pycocotools (loadRes, evaluate, accumulate, summarize), both from
run lengths in memory. A prediction is its object, moved and deformed a little, three times out of twenty with another class.

Runs are interleaved and the minimum counts, because other work on the machine can only make a run slower. Memory is the peak
resident set of a child process of its own, minus that before the run, which reads its images from lines of JSON one by one
(pycocotools: all at once, because it wants a list), so that no string is shared with the benchmark or between two images.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.measuring import measure_added_memory, measure_times, write_report
from mpformer_hf.mask_encoding import decode_rle, encode_cropped_rle
from training.metrics.average_precision import AveragePrecision

HEIGHT, WIDTH = 480, 640
RADII = (8, 140)
WAVES = (2, 3, 5, 9)  # around an outline
NUM_CLASSES = 80
NUM_SHAPES = 500  # drawn once; every image takes some of them
SHARE_OF_WRONG_CLASSES = 0.15
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Case:
    """How much is scored."""

    images: int
    segments: int


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


def draw_shape(generator: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run lengths of an object and of what a good model finds in its place."""
    middle = generator.random(2) * (HEIGHT, WIDTH)
    radius = np.exp(generator.uniform(*np.log(RADII)))
    radii = radius * np.exp(generator.normal(0, 0.3, 2))
    heights, phases = generator.uniform(0, 0.15, len(WAVES)), generator.uniform(0, 2 * np.pi, len(WAVES))
    true = draw_blob(middle, radii, heights, phases)
    moved = middle + generator.normal(0, 0.06, 2) * radii
    grown = radii * np.exp(generator.normal(0, 0.06, 2))
    return true, draw_blob(moved, grown, heights + generator.normal(0, 0.02, len(WAVES)), phases)


def draw_blob(middle: np.ndarray, radii: np.ndarray, heights: np.ndarray, phases: np.ndarray) -> dict[str, Any]:
    """Run lengths of an ellipse with waves of some heights (share of the radius) around its outline."""
    reach = radii * (1 + np.abs(heights).sum())
    top, left = np.clip(middle - reach, 0, (HEIGHT - 1, WIDTH - 1)).astype(int).tolist()
    bottom, right = np.clip(np.ceil(middle + reach), (top + 1, left + 1), (HEIGHT, WIDTH)).astype(int).tolist()
    y = (np.arange(top, bottom)[:, None] + 0.5 - middle[0]) / radii[0]
    x = (np.arange(left, right) + 0.5 - middle[1]) / radii[1]
    waves = np.cos(np.arctan2(y, x) * np.array(WAVES)[:, None, None] + phases[:, None, None])
    inside = np.hypot(y, x) < 1 + np.tensordot(heights, waves, axes=1)
    return encode_cropped_rle(torch.from_numpy(inside), top, left, HEIGHT, WIDTH)


# ---------------------------------------------------------------------------------------------------------------------
# Instances
# ---------------------------------------------------------------------------------------------------------------------


def make_instances(case: Case) -> list[str]:
    """One line of JSON for each image: `image_id`, `truths`, `predictions`, in COCO's form."""
    generator = np.random.default_rng(0)
    shapes = [draw_shape(generator) for _ in range(NUM_SHAPES)]
    areas = [int(decode_rle(true).sum()) for true, _ in shapes]
    lines = []
    for image_id in range(1, case.images + 1):
        chosen = generator.choice(NUM_SHAPES, case.segments, replace=False).tolist()
        classes = generator.integers(1, NUM_CLASSES + 1, case.segments)
        is_wrong = generator.random(case.segments) < SHARE_OF_WRONG_CLASSES
        found = np.where(is_wrong, generator.integers(1, NUM_CLASSES + 1, case.segments), classes).tolist()
        scores = generator.random(case.segments).round(3).tolist()
        truths = [
            {"category_id": class_id, "segmentation": shapes[shape][0], "area": areas[shape], "iscrowd": 0}
            for shape, class_id in zip(chosen, classes.tolist(), strict=True)
        ]
        predictions = [
            {"image_id": image_id, "category_id": class_id, "segmentation": shapes[shape][1], "score": score}
            for shape, class_id, score in zip(chosen, found, scores, strict=True)
        ]
        lines.append(json.dumps({"image_id": image_id, "truths": truths, "predictions": predictions}))
    return lines


def score_instances(images: Iterable[dict[str, Any]]) -> list[float]:
    """Ours: the twelve numbers."""
    precision = AveragePrecision(range(1, NUM_CLASSES + 1))
    for image in images:
        precision.add(image["image_id"], image["predictions"], image["truths"], (HEIGHT, WIDTH))
    scores = precision.compute()
    return [scores[name] for name in NUMBERS]


def score_instances_with_pycocotools(images: Iterable[dict[str, Any]]) -> list[float]:
    """The official tool: the twelve numbers."""
    rows = list(images)
    truths: list[dict[str, Any]] = []
    for row in rows:
        truths.extend(
            {**one, "id": number, "image_id": row["image_id"]}
            for number, one in enumerate(row["truths"], start=len(truths) + 1)
        )
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = {
            "images": [{"id": row["image_id"], "height": HEIGHT, "width": WIDTH} for row in rows],
            "annotations": truths,
            "categories": [{"id": class_id} for class_id in range(1, NUM_CLASSES + 1)],
        }
        ground_truth.createIndex()
        # Copies, because loadRes writes into what it is given and would read it differently the next time.
        results = ground_truth.loadRes([{**one} for row in rows for one in row["predictions"]])
        evaluation = COCOeval(ground_truth, results, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


INSTANCE_RUNS = {"ours": score_instances, "pycocotools": score_instances_with_pycocotools}


def measure_instances(case: Case, repeats: int) -> dict[str, Any]:
    """Compare both, and the numbers that they compute."""
    lines = make_instances(case)
    images = [json.loads(line) for line in lines]
    numbers: dict[str, list[float]] = {}

    def make_run(name: str) -> Callable[[], None]:
        return lambda: numbers.update({name: INSTANCE_RUNS[name](images)})

    seconds = measure_times({name: make_run(name) for name in INSTANCE_RUNS}, repeats, "cpu", "instances")
    return {
        "seconds": seconds,
        "added MiB": {name: measure_memory("instance", name, case) for name in INSTANCE_RUNS},
        "times as fast as pycocotools": seconds["pycocotools"]["min"] / seconds["ours"]["min"],
        "numbers": dict(zip(NUMBERS, numbers["ours"], strict=True)),
        "largest difference": max(abs(ours - theirs) for ours, theirs in zip(*numbers.values(), strict=True)),
        "characters of run lengths": sum(len(one["segmentation"]["counts"]) for one in segments_of(images)),
    }


def segments_of(images: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Go through all segments, true and predicted."""
    return chain.from_iterable(chain(image["truths"], image["predictions"]) for image in images)


def run_instances_for_memory(name: str, case: Case) -> float:
    """MiB that one run adds to this process, from lines of JSON."""
    lines = make_instances(case)
    INSTANCE_RUNS[name](map(json.loads, lines[:1]))  # what is loaded at the first use
    return measure_added_memory(lambda: INSTANCE_RUNS[name](map(json.loads, lines)), "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# All
# ---------------------------------------------------------------------------------------------------------------------

PARTS = {"instance": measure_instances}
MEMORY_RUNS = {"instance": run_instances_for_memory}


def measure_memory(part: str, name: str, case: Case) -> float:
    """MiB that one run of a part adds at its peak, in a process of its own."""
    arguments = ["--child", part, name, "--images", str(case.images), "--segments", str(case.segments)]
    command = [sys.executable, "-m", "benchmarks.evaluation", *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.strip().splitlines()[-1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--segments", type=int, default=20, help="of each image, true ones and predicted ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(arguments.images, arguments.segments)
    if arguments.child:
        part, name = arguments.child
        print(MEMORY_RUNS[part](name, case))
        return
    setting = {**asdict(case), "height": HEIGHT, "width": WIDTH, "repeats": arguments.repeats}
    report = {"setting": setting, **{part: PARTS[part](case, arguments.repeats) for part in arguments.parts}}
    print(json.dumps(report, indent=2))
    write_report(arguments.output, "evaluation", report)


if __name__ == "__main__":
    main()
