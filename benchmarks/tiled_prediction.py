"""Time and memory of tiled prediction: `python -m benchmarks.tiled_prediction --help`.

Square images with discs of 12 to 700 pixels radius, which a perfect predictor finds in each tile: it reads the number of each
disc from the colours of the tile's pixels, and gives its coverage of cells of 4 x 4 pixels as mask logits. So its own time and
memory are small, and that what is found can be compared with what was drawn.

Each case runs once, in a process of its own. Memory is the peak resident set minus that before the run; the image is there
before, the logits of a tile are counted. Beside it stand the bytes of the result's map, and those that the masks of all
instances would have at the image's size.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.measuring import measure_added_memory, write_report
from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.tiled_prediction import make_tiles, tiled_instance_segmentation, tiled_panoptic_segmentation

NUM_QUERIES, NUM_CLASSES = 100, 3
RADII = (12, 700)
GAP = 4  # pixels between two discs, at least
PIXELS_FOR_ONE_DISC = 230**2
TRIES_FOR_ONE_DISC = 50
SHARPNESS = 20.0
COMPARED_ROWS = 256
TASKS = {"instance": tiled_instance_segmentation, "panoptic": tiled_panoptic_segmentation}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    task: str
    image_size: int
    tile_size: int
    overlap: int
    threads: int


def draw_discs(size: int) -> np.ndarray:
    """A map (size, size) of discs that do not touch: 0 is nothing, the discs are numbered from 1; int32."""
    generator = np.random.default_rng(0)
    numbers = np.zeros((size, size), dtype=np.int32)
    discs = np.zeros((0, 3))
    wanted = size**2 // PIXELS_FOR_ONE_DISC
    smallest, largest = np.log(RADII[0]), np.log(min(RADII[1], size / 3))
    for _ in range(TRIES_FOR_ONE_DISC * wanted):
        x, y, radius = *(generator.random(2) * size), np.exp(generator.uniform(smallest, largest))
        free = np.hypot(discs[:, 0] - x, discs[:, 1] - y) > discs[:, 2] + radius + GAP
        if free.all():
            discs = np.vstack([discs, (x, y, radius)])
            top, left = (max(0, int(middle - radius)) for middle in (y, x))
            box = numbers[top : int(y + radius) + 1, left : int(x + radius) + 1]
            rows, columns = np.ogrid[: box.shape[0], : box.shape[1]]
            box[(columns + left + 0.5 - x) ** 2 + (rows + top + 0.5 - y) ** 2 < radius**2] = len(discs)
        if len(discs) == wanted:
            break
    return numbers


def class_of(numbers: Tensor) -> Tensor:
    """Class of each disc."""
    return numbers % NUM_CLASSES


def as_image(numbers: np.ndarray) -> Image.Image:
    """The low byte of each number as red, the high one as green."""
    return Image.fromarray(np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=-1).astype(np.uint8))


def find_discs(pixel_values: Tensor, pixel_mask: Tensor) -> SimpleNamespace:
    """The perfect predictor; sides of the tiles are multiples of 4."""
    found = [find_discs_of_tile((image[0] + 256 * image[1]).long()) for image in pixel_values]
    return SimpleNamespace(
        class_queries_logits=torch.stack([classes for classes, _ in found]),
        masks_queries_logits=torch.stack([masks for _, masks in found]),
        image_sizes=torch.stack([pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)], dim=1),
    )


def find_discs_of_tile(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (queries, classes + 1) and mask logits (queries, height / 4, width / 4) of a map of numbers."""
    height, width = numbers.shape[0] // 4, numbers.shape[1] // 4
    present, index = numbers.unique(return_inverse=True)
    cell = (torch.arange(4 * height) // 4)[:, None] * width + torch.arange(4 * width) // 4
    pixels = (cell * len(present) + index).flatten().bincount(minlength=height * width * len(present))
    coverage = pixels.reshape(height, width, len(present)).permute(2, 0, 1) / 16
    is_disc = present > 0
    masks = torch.full((NUM_QUERIES, height, width), -SHARPNESS / 2)
    masks[: int(is_disc.sum())] = SHARPNESS * (coverage[is_disc] - 0.5)
    classes = torch.zeros(NUM_QUERIES, NUM_CLASSES + 1)
    classes[torch.arange(int(is_disc.sum())), class_of(present[is_disc])] = 20
    classes[int(is_disc.sum()) :, -1] = 20
    return classes, masks


def run_case(case: Case) -> dict[str, Any]:
    """Predict once; seconds, MiB, and how what was found agrees with what was drawn."""
    torch.set_num_threads(case.threads)
    drawn = draw_discs(case.image_size)
    image = as_image(drawn)
    result: dict[str, Any] = {}
    seconds: list[tuple[float, float]] = []  # on the clock, and of all threads

    def predict(picture: Image.Image, side: int) -> None:
        start = time.perf_counter(), time.process_time()
        result.update(
            TASKS[case.task](
                find_discs,
                MPFormerImageProcessor(),
                picture,
                tile_size=(side, side),
                overlap=side // 4,
                do_resize=False,
                do_rescale=False,
                do_normalize=False,
                progress=False,
            )
        )
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))

    predict(image.crop((0, 0, 64, 64)), 32)  # what is loaded and kept at the first use
    mebibytes = measure_added_memory(lambda: predict(image, case.tile_size), "cpu")
    ious = agreement(result, drawn)
    pixels = case.image_size**2
    return {
        **asdict(case),
        "tiles": len(make_tiles((case.image_size,) * 2, (case.tile_size,) * 2, case.overlap)),
        "seconds": seconds[-1][0],
        "seconds of all threads": seconds[-1][1],
        "added MiB": mebibytes,
        "map MiB": 4 * pixels / 2**20,
        "dense masks MiB": len(ious) * pixels / 2**20,
        "drawn": int(drawn.max()),
        "found": len(result["segments_info"]),
        "lowest IoU": min(ious),
        "mean IoU": sum(ious) / len(ious),
    }


def agreement(result: dict[str, Any], drawn: np.ndarray) -> list[float]:
    """IoU of each drawn disc with the one that was found at its place; 0 if there is none of its class."""
    labels = {info["id"]: info["label_id"] for info in result["segments_info"]}
    found = result["segmentation"].numpy()
    # Common pixels of each pair, counted at once; what is found begins at -1 (nothing, of instances) or 0 (void).
    shape = (int(drawn.max()) + 1, int(found.max()) + 2)
    common = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for band in range(0, len(drawn), COMPARED_ROWS):
        rows = slice(band, band + COMPARED_ROWS)
        pairs = drawn[rows].astype(np.int64) * shape[1] + found[rows] + 1
        common += np.bincount(pairs.ravel(), minlength=len(common))
    common = common.reshape(shape)
    union = common.sum(1, keepdims=True) + common.sum(0, keepdims=True) - common
    ious = []
    for number, best in enumerate(common.argmax(1).tolist()):
        has_class = labels.get(best - 1) == number % NUM_CLASSES
        ious.append(float(common[number, best] / union[number, best]) if has_class else 0.0)
    return ious[1:]


def measure(case: Case) -> dict[str, Any]:
    """Run a case in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.tiled_prediction", "--child", json.dumps(asdict(case))]
    output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[2048, 4096, 8192], help="side of the image, in pixels"
    )
    parser.add_argument("--tile", type=int, default=1024, help="side of a tile, a multiple of 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_case(Case(**json.loads(arguments.child)))))
        return
    cases = [
        Case(task, size, arguments.tile, arguments.tile // 4, arguments.threads)
        for size in arguments.images
        for task in TASKS
    ]
    report = {"cases": [measure(case) for case in tqdm(cases)]}
    print(json.dumps(report, indent=2))
    write_report(arguments.output, "tiled_prediction", report)


if __name__ == "__main__":
    main()
