"""`pipeline("image-segmentation")` for people who installed the package: one import, all subtasks, nothing asked, nothing logged.

A child process with an empty standard input loads two saved folders and writes down what its pipelines return; the tests
compare that with the model and the image processor called by hand.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from tests.factories import tiny_model

ROOT = Path(__file__).parents[2]
IMAGE_SIZES = [(40, 60), (60, 40), (50, 50)]
STUFF = 2
THRESHOLDS = {"threshold": 0.3, "mask_threshold": 0.45, "overlap_mask_area_threshold": 0.1}

CHILD = """
import json
import sys
from pathlib import Path

import numpy
import PIL.Image
import transformers

import mpformer_hf
from mpformer_hf.pipeline_mpformer import MPFormerImageSegmentationPipeline

transformers.utils.logging.disable_progress_bar()
folder, padded_folder, images, thresholds, results = sys.argv[1:]
thresholds = json.loads(thresholds)
images = [PIL.Image.fromarray(image) for image in numpy.load(images).values()]

standard = transformers.pipeline("image-segmentation", model=folder)
padded = transformers.pipeline("image-segmentation", model=padded_folder)
ours = transformers.pipeline(
    "image-segmentation", model=folder, pipeline_class=MPFormerImageSegmentationPipeline
)
cases = {task: [standard(images[0], subtask=task, **thresholds)] for task in ("panoptic", "instance", "semantic")}
cases["default"] = [standard(images[0])]
cases["padded batch"] = padded(images, batch_size=3, **thresholds)
cases["padded one by one"] = padded(images, **thresholds)
cases["our batch"] = ours(images, batch_size=2, **thresholds)
cases["our single image"] = [ours(images[0], **thresholds)]

masks, segments = {}, {}
for case, of_images in cases.items():
    segments[case] = [[[segment["label"], segment["score"]] for segment in image] for image in of_images]
    masks |= {
        f"{case}/{i}/{j}": numpy.asarray(segment["mask"])
        for i, image in enumerate(of_images)
        for j, segment in enumerate(image)
    }
numpy.savez(Path(results, "masks.npz"), **masks)
print("auto classes", file=sys.stderr)
classes = {
    name: type(getattr(transformers, name).from_pretrained(folder)).__name__
    for name in (
        "AutoConfig",
        "AutoModel",
        "AutoModelForUniversalSegmentation",
        "AutoModelForImageSegmentation",
        "AutoImageProcessor",
    )
}
Path(results, "segments.json").write_text(json.dumps({"segments": segments, "classes": classes}))
"""


@dataclass(frozen=True)
class Segment:
    label: str
    score: float | None
    mask: np.ndarray


@dataclass(frozen=True)
class ChildResult:
    """What the child printed and what its pipelines returned: for each case a list of segments an image."""

    stdout: str
    log_of_pipelines: str
    log_of_auto_classes: str
    classes: dict[str, str]
    cases: dict[str, list[list[Segment]]]


def opinionated_model() -> MPFormerForUniversalSegmentation:
    """A tiny model with varied masks, whose queries are sure of different classes, `STUFF` among them."""
    model = tiny_model(num_queries=16)
    with torch.no_grad():
        model.model.pixel_level_module.decoder.mask_projection.weight.mul_(20)
        queries = model(torch.zeros(1, 3, 64, 64)).transformer_decoder_last_hidden_state[0]
        head = model.class_predictor
        head.weight.normal_(generator=torch.Generator().manual_seed(4))
        head.bias.copy_(-head(queries.mean(0)) + head.bias)  # what all queries share says nothing
        head.bias[-1] -= 3
    return model


def processors() -> dict[str, MPFormerImageProcessor]:
    fields = {"size": {"shortest_edge": 48, "longest_edge": 96}, "label_ids_to_fuse": [STUFF]}
    return {
        "plain": MPFormerImageProcessor(**fields),
        "padded": MPFormerImageProcessor(**fields, pad_size={"height": 96, "width": 96}),
    }


def images() -> list[np.ndarray]:
    """Coloured blocks; noise would look the same everywhere."""
    generator = np.random.default_rng(0)
    pictures = []
    for height, width in IMAGE_SIZES:
        colours = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        rows, columns = math.ceil(height / 3), math.ceil(width / 4)
        pictures.append(colours.repeat(rows, 0)[:height].repeat(columns, 1)[:, :width])
    return pictures


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> ChildResult:
    folder = tmp_path_factory.mktemp("pipeline")
    for name, processor in processors().items():
        opinionated_model().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    np.savez(folder / "images.npz", *images())
    arguments = [folder / "plain", folder / "padded", folder / "images.npz", json.dumps(THRESHOLDS), folder]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "segments.json").read_text())
    with np.load(folder / "masks.npz") as masks:
        cases = {
            case: [
                [Segment(*pair, masks[f"{case}/{i}/{j}"]) for j, pair in enumerate(segments)]
                for i, segments in enumerate(of_images)
            ]
            for case, of_images in written["segments"].items()
        }
    logs = done.stderr.partition("auto classes\n")
    return ChildResult(done.stdout, logs[0], logs[2], written["classes"], cases)


def run_by_hand(processor: MPFormerImageProcessor, batch: list[np.ndarray]) -> Any:
    with torch.no_grad():
        return opinionated_model()(**processor(batch, return_tensors="pt"))


def panoptic_by_hand(processor: MPFormerImageProcessor, batch: list[np.ndarray]) -> list[list[Segment]]:
    results = processor.post_process_panoptic_segmentation(
        run_by_hand(processor, batch), target_sizes=[image.shape[:2] for image in batch], **THRESHOLDS
    )
    return [segments_of_map(result["segmentation"], result["segments_info"]) for result in results]


def segments_of_map(segmentation: Tensor, segments_info: list[dict[str, Any]]) -> list[Segment]:
    return [
        Segment(f"LABEL_{one['label_id']}", one["score"], (segmentation == one["id"]).numpy()) for one in segments_info
    ]


def assert_same_segments(ours: list[Segment], expected: list[Segment]) -> None:
    assert [segment.label for segment in ours] == [segment.label for segment in expected]
    for segment, other in zip(ours, expected, strict=True):
        assert segment.score == pytest.approx(other.score, abs=1e-4)
        assert segment.mask.shape == other.mask.shape
        assert ((segment.mask > 0) == (other.mask > 0)).mean() > 0.999  # float order decides single pixels


def test_nothing_is_asked_and_nothing_is_logged(child: ChildResult) -> None:
    assert child.log_of_pipelines == ""
    assert child.stdout == ""


def test_auto_classes_find_the_classes_of_a_saved_folder_with_an_empty_log(child: ChildResult) -> None:
    assert child.log_of_auto_classes == ""
    assert child.classes == {
        "AutoConfig": "MPFormerConfig",
        "AutoModel": "MPFormerModel",
        "AutoModelForUniversalSegmentation": "MPFormerForUniversalSegmentation",
        "AutoModelForImageSegmentation": "MPFormerForUniversalSegmentation",
        "AutoImageProcessor": "MPFormerImageProcessor",
    }


def test_panoptic_segments_are_those_of_the_processor(child: ChildResult) -> None:
    expected = panoptic_by_hand(processors()["plain"], images()[:1])
    assert len(expected[0]) > 1
    assert_same_segments(child.cases["panoptic"][0], expected[0])


def test_without_a_subtask_the_pipeline_is_panoptic_with_its_own_thresholds(child: ChildResult) -> None:
    processor = processors()["plain"]
    (result,) = processor.post_process_panoptic_segmentation(
        run_by_hand(processor, images()[:1]), 0.9, 0.5, 0.5, None, [IMAGE_SIZES[0]]
    )
    assert_same_segments(child.cases["default"][0], segments_of_map(result["segmentation"], result["segments_info"]))


def test_stuff_is_fused_by_the_checkpoint_s_own_labels(child: ChildResult) -> None:
    processor = processors()["plain"]
    (unfused,) = processor.post_process_panoptic_segmentation(
        run_by_hand(processor, images()[:1]), label_ids_to_fuse=(), target_sizes=[IMAGE_SIZES[0]], **THRESHOLDS
    )
    assert sum(one["label_id"] == STUFF for one in unfused["segments_info"]) > 1
    assert [segment.label for segment in child.cases["panoptic"][0]].count(f"LABEL_{STUFF}") == 1


def test_instances_are_those_of_the_processor_and_no_stuff(child: ChildResult) -> None:
    processor = processors()["plain"]
    (result,) = processor.post_process_instance_segmentation(
        run_by_hand(processor, images()[:1]), target_sizes=[IMAGE_SIZES[0]], **THRESHOLDS
    )
    assert len(result["segments_info"]) > 1
    assert_same_segments(child.cases["instance"][0], segments_of_map(result["segmentation"], result["segments_info"]))
    assert f"LABEL_{STUFF}" not in [segment.label for segment in child.cases["instance"][0]]


def test_semantic_maps_are_those_of_the_processor(child: ChildResult) -> None:
    processor = processors()["plain"]
    (expected,) = processor.post_process_semantic_segmentation(
        run_by_hand(processor, images()[:1]), target_sizes=[IMAGE_SIZES[0]]
    )
    assert len(expected.unique()) > 1
    segments = child.cases["semantic"][0]
    assert [segment.label for segment in segments] == [f"LABEL_{label}" for label in expected.unique().tolist()]
    for segment, label in zip(segments, expected.unique(), strict=True):
        assert ((segment.mask > 0) == (expected == label).numpy()).mean() > 0.999


def test_a_batch_of_mixed_sizes_equals_single_images_where_the_processor_pads_to_one_size(child: ChildResult) -> None:
    assert [len(segments) > 0 for segments in child.cases["padded batch"]] == [True] * 3
    for batch, single in zip(child.cases["padded batch"], child.cases["padded one by one"], strict=True):
        assert_same_segments(batch, single)


def test_our_pipeline_takes_mixed_sizes_without_a_fixed_size(child: ChildResult) -> None:
    processor = processors()["plain"]
    expected = panoptic_by_hand(processor, images()[:2]) + panoptic_by_hand(processor, images()[2:])
    for image, (ours, segments) in enumerate(zip(child.cases["our batch"], expected, strict=True)):
        assert_same_segments(ours, segments)
        assert all(segment.mask.shape == IMAGE_SIZES[image] for segment in ours)


def test_our_pipeline_takes_a_single_image_as_the_standard_one_does(child: ChildResult) -> None:
    assert_same_segments(child.cases["our single image"][0], child.cases["panoptic"][0])
