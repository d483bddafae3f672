"""Images a second of two training loaders, side by side: `python -m benchmarks.loader --help`.

Both read the same JPEG files and the same PNG files (red: class, green: segment), do large-scale jitter to a fixed size with
flips, and end with what a model takes. Each is a `DataLoader` with workers of its own that live on; the time is that of one pass
over all images, and the runs are interleaved.

    ours, maps       the PNG as one map of segments
    ours, runs       COCO run lengths instead of the PNG
    ours, arrays     the same, decoded to an array of masks before the augmentation, as a data set that knows no other form does
    processor        transformers' Mask2Former processor on the augmented map; the classes of the segments are known
    example          the same, and the classes come from `numpy.unique` over the pixels, as in run_instance_segmentation

The other two resize image and map as a whole with torchvision (8 bits, several times faster than Pillow), then cut and pad, which
is what such pipelines do. Their processor is spared the resizing.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import BatchFeature, Mask2FormerImageProcessor

from benchmarks.measuring import measure_times, write_report
from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.mask_encoding import encode_rle
from training.augmentation import Augmentation, AugmentedDataset, generator_of
from training.compact_batches import pack_batch, unpack_batch
from training.windows import CocoMasks, MapMasks

NUM_CLASSES = 5
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OURS, THEIRS = ("ours, maps", "ours, runs", "ours, arrays"), ("processor", "example")


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    images: int
    size: int
    segments: int
    workers: int
    batch_size: int
    repeats: int


def write_images(folder: Path, setting: Setting) -> None:
    """Write photographs, and for each a map of cells around random points: every pixel belongs to the nearest one."""
    generator = np.random.default_rng(0)
    for number in range(setting.images):
        photograph = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
        scale = setting.size / max(photograph.size)
        height, width = round(photograph.height * scale), round(photograph.width * scale)
        photograph.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        points = generator.random((setting.segments, 2)) * (height, width)
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        distances = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in points]
        segments = np.argmin(distances, axis=0).astype(np.uint8) + 1
        labels = np.stack([segments % NUM_CLASSES, segments, np.zeros_like(segments)], axis=-1)
        Image.fromarray(labels).save(folder / f"{number}.png")
        masks = torch.from_numpy(segments[None] == np.arange(1, setting.segments + 1)[:, None, None])
        (folder / f"{number}.json").write_text(json.dumps(encode_rle(masks)))


class OurRows(Dataset):
    """Rows as a data set of ours gives them, masks in one of three forms."""

    def __init__(self, folder: Path, setting: Setting, form: str) -> None:
        self.folder = folder
        self.setting = setting
        self.form = form

    def __len__(self) -> int:
        return self.setting.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(self.folder / f"{index}.jpg")
        if self.form == "ours, maps":
            segment_map = np.asarray(Image.open(self.folder / f"{index}.png").getchannel("G"))
            masks: Any = MapMasks(segment_map, np.flatnonzero(np.bincount(segment_map.ravel())))
            classes = np.asarray(masks.ids) % NUM_CLASSES
        else:
            masks = CocoMasks(json.loads((self.folder / f"{index}.json").read_text()), (image.height, image.width))
            classes = np.arange(1, len(masks) + 1) % NUM_CLASSES
            masks = masks if self.form == "ours, runs" else np.asarray(masks)
        return {"image_id": index, "image": image, "mask_labels": masks, "class_labels": classes}


class TheirRows(Dataset):
    """Model inputs of one image at a time, as the example prepares them."""

    def __init__(self, folder: Path, setting: Setting, form: str) -> None:
        self.folder = folder
        self.setting = setting
        self.form = form
        self.processor = Mask2FormerImageProcessor(do_resize=False, image_mean=MEAN, image_std=DEVIATION)

    def __len__(self) -> int:
        return self.setting.images

    def __getitem__(self, index: int) -> BatchFeature:
        image = torch.from_numpy(np.array(Image.open(self.folder / f"{index}.jpg").convert("RGB"))).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(Image.open(self.folder / f"{index}.png")))[..., :2].permute(2, 0, 1)
        image, labels = self.jitter(image, labels, generator_of(0, 0, index))
        classes, segments = labels.numpy()
        if self.form == "processor":
            mapping = {
                int(number): int(number) % NUM_CLASSES for number in np.flatnonzero(np.bincount(segments.ravel()))
            }
        else:
            pairs = np.unique(np.stack([classes, segments], axis=-1).reshape(-1, 2), axis=0)
            mapping = {int(number): int(label) for label, number in pairs}
        mapping.setdefault(0, 0)  # the padding
        return self.processor(
            images=[image.numpy()],
            segmentation_maps=[segments],
            instance_id_to_semantic_id=mapping,
            ignore_index=0,
            return_tensors="pt",
        )

    def jitter(self, image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Resize both as a whole, cut, flip, pad; the draws are those of `training.augmentation`, so the pictures are the same."""
        size = self.setting.size
        scale, flip, place = rng.random(3)
        factor = (0.1 + 1.9 * scale) * min(size / image.shape[1], size / image.shape[2])
        resized = [max(1, round(side * factor)) for side in image.shape[1:]]
        top, left = (round(max(0, side - size) * place) for side in resized)
        parts = []
        for part, mode, padding in ((image, "bilinear", 128), (labels, "nearest", 0)):
            part = functional.resize(part, resized, InterpolationMode(mode), antialias=True)  # noqa: PLW2901
            part = part[:, top : top + size, left : left + size]  # noqa: PLW2901
            part = part.flip(-1) if flip < 1 / 2 else part  # noqa: PLW2901
            parts.append(functional.pad(part, [0, 0, size - part.shape[2], size - part.shape[1]], fill=padding))
        return parts[0], parts[1]


def collate_theirs(examples: list[BatchFeature]) -> dict[str, Any]:
    """Stack images, list labels."""
    batch = {name: torch.cat([one[name] for one in examples]) for name in ("pixel_values", "pixel_mask")}
    return {**batch, **{name: [one[name][0] for one in examples] for name in ("mask_labels", "class_labels")}}


def make_loaders(folder: Path, setting: Setting) -> dict[str, DataLoader]:
    """Make all loaders; each has workers of its own."""
    augmentation = Augmentation(kind="large_scale_jitter", size=setting.size)
    ours = {form: AugmentedDataset(OurRows(folder, setting, form), augmentation, seed=0) for form in OURS}
    theirs = {form: TheirRows(folder, setting, form) for form in THEIRS}
    return {
        form: DataLoader(
            dataset,
            batch_size=setting.batch_size,
            collate_fn=pack_batch if form in OURS else collate_theirs,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
        )
        for form, dataset in (ours | theirs).items()
    }


def model_inputs(form: str) -> Callable[[Any], dict[str, Any]]:
    """What the process of the model does with a batch."""
    processor = MPFormerImageProcessor(do_resize=False, image_mean=MEAN, image_std=DEVIATION)
    return partial(unpack_batch, processor=processor) if form in OURS else dict


def make_runs(folder: Path, setting: Setting) -> dict[str, Callable[[], int]]:
    """One pass over the images for each of the loaders; a pass gives the number of masks."""

    def run(loader: DataLoader, finish: Callable[[Any], dict[str, Any]]) -> int:
        return sum(len(masks) for batch in loader for masks in finish(batch)["mask_labels"])

    return {form: partial(run, loader, model_inputs(form)) for form, loader in make_loaders(folder, setting).items()}


def measure(setting: Setting) -> dict[str, Any]:
    """Images a second of each, and how many times faster ours are."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        write_images(Path(folder), setting)
        times = measure_times(make_runs(Path(folder), setting), setting.repeats, "cpu", "loaders")
    speeds = {form: setting.images / seconds["min"] for form, seconds in times.items()}
    return {
        **asdict(setting),
        "seconds": times,
        "images a second": speeds,
        "times faster": {form: {other: speeds[form] / speeds[other] for other in THEIRS} for form in OURS},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="in a pass")
    parser.add_argument("--size", type=int, default=1024, help="longer side of the photographs, and side of the result")
    parser.add_argument("--segments", type=int, default=20, help="of each image")
    parser.add_argument("--workers", type=int, default=2, help="of each loader")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    report = measure(Setting(**arguments))
    print(json.dumps(report, indent=2))
    write_report(output, "loader", report)


if __name__ == "__main__":
    main()
