"""Time and memory of the metrics at the size of a validation set: `python -m benchmarks.evaluation --help`.

Images of 640 x 480 with 20 segments each, whose shapes are ellipses with wavy outlines, of 8 to 140 pixels radius.

instance: `AveragePrecision`, adding and computing, against pycocotools (loadRes, evaluate, accumulate, summarize), both from
run lengths in memory. A prediction is its object, moved and deformed a little, three times out of twenty with another class.

panoptic: `PanopticQuality`, adding and computing, against the plain numpy algorithm of the definition, which takes the distinct values of
the maps of both and of their pairs, as panopticapi does, both from maps of ids in memory; and both from PNG files in memory, of which
decoding takes most. Some scenes, the same shapes laid over one another, are used again and again: 5000 maps would not fit.

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.measuring import measure_added_memory, measure_times, write_report
from mpformer_hf.mask_encoding import decode_rle, encode_cropped_rle
from training.metrics.average_precision import AveragePrecision
from training.metrics.panoptic_quality import PanopticQuality
from training.official_files import decode_segment_ids, encode_segment_ids

HEIGHT, WIDTH = 480, 640
RADII = (8, 140)
WAVES = (2, 3, 5, 9)  # around an outline
NUM_CLASSES = 80
NUM_SHAPES = 500  # drawn once; every image takes some of them
NUM_SCENES = 100  # panoptic
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
# Panoptic
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanopticScene:
    """A true and a predicted map, uint32 (H, W), with their segments in the official form, and both as PNG files."""

    target_map: np.ndarray
    targets: list[dict[str, int]]
    predicted_map: np.ndarray
    predictions: list[dict[str, int]]
    target_png: bytes
    predicted_png: bytes


def make_scenes(segments: int) -> list[PanopticScene]:
    """Lay shapes over one another, with ids as large as those of colours; the last segment fills the background."""
    generator = np.random.default_rng(0)
    return [make_scene(segments, generator) for _ in range(NUM_SCENES)]


def make_scene(segments: int, generator: np.random.Generator) -> PanopticScene:
    """Draw one scene; a strip at the top is void."""
    ids = generator.choice(256**3 - 1, (2, segments), replace=False).astype(np.uint32) + 1
    classes = generator.integers(1, NUM_CLASSES + 1, segments)
    found = np.where(generator.random(segments) < SHARE_OF_WRONG_CLASSES, classes % NUM_CLASSES + 1, classes)
    maps = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint32)
    maps[:, HEIGHT // 20 :] = ids[:, -1, None, None]
    for number in range(segments - 1):
        for layer, shape in enumerate(draw_shape(generator)):
            maps[layer][decode_rle(shape).numpy()] = ids[layer, number]
    return PanopticScene(
        maps[0],
        list_segments(maps[0], ids[0], classes),
        maps[1],
        list_segments(maps[1], ids[1], found),
        *map(write_png, maps),
    )


def list_segments(ids_of_pixels: np.ndarray, ids: np.ndarray, classes: np.ndarray) -> list[dict[str, int]]:
    """List the segments that are left of those that were drawn."""
    visible = set(np.unique(ids_of_pixels).tolist())
    pairs = zip(ids.tolist(), classes.tolist(), strict=True)
    return [{"id": key, "category_id": class_id} for key, class_id in pairs if key in visible]


def write_png(ids: np.ndarray) -> bytes:
    """PNG file of a map of ids."""
    file = io.BytesIO()
    encode_segment_ids(ids).save(file, "png")
    return file.getvalue()


def score_panoptic(scenes: Iterable[PanopticScene], from_png: bool = False) -> list[float]:
    """Ours: PQ, SQ and RQ of all classes."""
    quality = PanopticQuality(range(1, NUM_CLASSES + 1), [])
    for number, scene in enumerate(scenes):
        maps = (scene.predicted_map, scene.target_map)
        if from_png:
            maps = tuple(
                decode_segment_ids(Image.open(io.BytesIO(png))) for png in (scene.predicted_png, scene.target_png)
            )
        quality.add(number, maps[0], scene.predictions, maps[1], scene.targets)
    scores = quality.compute()["All"]
    return [scores["pq"], scores["sq"], scores["rq"]]


def score_panoptic_plainly(scenes: Iterable[PanopticScene], from_png: bool = False) -> list[float]:
    """Compute the same with numpy, pixel by pixel, as the definition says."""
    sums = PlainSums()
    for scene in scenes:
        maps = (scene.predicted_map, scene.target_map)
        if from_png:
            maps = tuple(
                add_colors(np.asarray(Image.open(io.BytesIO(png)))) for png in (scene.predicted_png, scene.target_png)
            )
        add_plainly(sums, maps[0], scene.predictions, maps[1], scene.targets)
    per_class = []
    for class_id in range(1, NUM_CLASSES + 1):
        iou, matches, errors = sums.iou[class_id], sums.matches[class_id], sums.errors[class_id]
        if matches + errors:
            total = matches + errors / 2
            per_class.append((iou / total, iou / matches if matches else 0.0, matches / total))
    return np.mean(per_class, axis=0).tolist()


def add_colors(pixels: np.ndarray) -> np.ndarray:
    """Return the id that each pixel's colour stands for."""
    colors = pixels.astype(np.uint32)
    return colors[..., 0] + 256 * colors[..., 1] + 256**2 * colors[..., 2]


@dataclass
class PlainSums:
    """Sums over images, by class."""

    iou: Counter[int] = field(default_factory=Counter)
    matches: Counter[int] = field(default_factory=Counter)
    errors: Counter[int] = field(default_factory=Counter)


def add_plainly(
    sums: PlainSums,
    predicted: np.ndarray,
    predictions: list[dict[str, int]],
    target: np.ndarray,
    targets: list[dict[str, int]],
) -> None:
    """Add one image without crowd: distinct values of both maps and of their pairs, then a loop over the pairs."""
    predicted_areas, target_areas = (
        dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True)), strict=True))
        for ids in (predicted, target)
    )
    predicted_class, target_class = (
        {one["id"]: one["category_id"] for one in listed} for listed in (predictions, targets)
    )
    offset = 256**3
    pairs, counts = np.unique(target.astype(np.uint64) * offset + predicted.astype(np.uint64), return_counts=True)
    overlaps = {
        (pair // offset, pair % offset): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    }
    matched_targets, matched_predictions = set(), set()
    for (true_id, predicted_id), pixels in overlaps.items():
        if true_id in target_class and target_class[true_id] == predicted_class.get(predicted_id):
            union = predicted_areas[predicted_id] + target_areas[true_id] - pixels - overlaps.get((0, predicted_id), 0)
            if pixels / union > 0.5:  # noqa: PLR2004 - the definition
                sums.iou[target_class[true_id]] += pixels / union
                sums.matches[target_class[true_id]] += 1
                matched_targets.add(true_id)
                matched_predictions.add(predicted_id)
    for true_id, class_id in target_class.items():
        sums.errors[class_id] += true_id not in matched_targets
    for predicted_id, class_id in predicted_class.items():
        is_void = overlaps.get((0, predicted_id), 0) / predicted_areas[predicted_id] > 0.5  # noqa: PLR2004
        sums.errors[class_id] += predicted_id not in matched_predictions and not is_void


PANOPTIC_RUNS = {"ours": score_panoptic, "numpy": score_panoptic_plainly}


def measure_panoptic(case: Case, repeats: int) -> dict[str, Any]:
    """Compare both, and the numbers that they compute."""
    scenes = make_scenes(case.segments)
    numbers: dict[str, list[float]] = {}

    def make_run(name: str, from_png: bool) -> Callable[[], None]:
        return lambda: numbers.update({name: PANOPTIC_RUNS[name](islice(cycle(scenes), case.images), from_png)})

    runs = {(name, from_png): make_run(name, from_png) for from_png in (False, True) for name in PANOPTIC_RUNS}
    names = {key: f"{key[0]}{', PNG files' if key[1] else ''}" for key in runs}
    seconds = measure_times({names[key]: run for key, run in runs.items()}, repeats, "cpu", "panoptic")
    return {
        "scenes": len(scenes),
        "seconds": seconds,
        "added MiB": {name: measure_memory("panoptic", name, case) for name in PANOPTIC_RUNS},
        "times as fast as numpy": seconds["numpy"]["min"] / seconds["ours"]["min"],
        "times as fast as numpy, PNG files": seconds["numpy, PNG files"]["min"] / seconds["ours, PNG files"]["min"],
        "numbers": dict(zip(("PQ", "SQ", "RQ"), numbers["ours"], strict=True)),
        "largest difference": max(abs(ours - theirs) for ours, theirs in zip(*numbers.values(), strict=True)),
    }


def run_panoptic_for_memory(name: str, case: Case) -> float:
    """MiB that one run from PNG files adds to this process."""
    scenes = make_scenes(case.segments)
    PANOPTIC_RUNS[name](scenes[:1], True)  # what is loaded at the first use
    return measure_added_memory(lambda: PANOPTIC_RUNS[name](islice(cycle(scenes), case.images), True), "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# All
# ---------------------------------------------------------------------------------------------------------------------

PARTS = {"instance": measure_instances, "panoptic": measure_panoptic}
MEMORY_RUNS = {"instance": run_instances_for_memory, "panoptic": run_panoptic_for_memory}


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
