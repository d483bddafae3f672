"""One interface for every kind of model: what comes out is what the model's own classes give, in the classes of the data set."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForUniversalSegmentation,
    DetrForObjectDetection,
    OneFormerProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.utils import ModelOutput

from mpformer_hf.mask_post_processing import (
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
    valid_sizes,
)
from tests.checkpoints import MODELS, NAMES, save_checkpoint, tiny_detr
from training.data import TASKS
from training.predictor import NO_CLASS, LabelMap, Predictor, PredictorError, load_processor

# Height and width of images that every processor resizes to 64 x 96 and 64 x 64, without rounding or stretching.
SIZES = [(128, 192), (70, 70)]
KINDS = tuple(MODELS)
BATCHED = [kind for kind in KINDS if kind != "eomt_windows"]


@dataclass
class Classes:
    """The part of a data set that matters for classes."""

    id2label: dict[int, str]
    stuff_ids: tuple[int, ...] = ()
    thing_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        self.thing_ids = tuple(key for key in self.id2label if key not in self.stuff_ids)


# The model's classes in another order, with one that it lacks; it has `dog`, which is unknown here.
DATASET = Classes({0: "Sky", 3: "tree", 7: "CAT"}, stuff_ids=(0, 3))
SAME = Classes(dict(NAMES), stuff_ids=(2,))


def make_images(sizes=SIZES) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8) for height, width in sizes]
    return [
        Image.fromarray(pixels).resize((width, height)) for pixels, (height, width) in zip(small, sizes, strict=True)
    ]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a checkpoint of a kind when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    def find(kind: str) -> Path:
        return root / kind if (root / kind).exists() else save_checkpoint(kind, root / kind)

    return find


@pytest.fixture(scope="module")
def predictor_of(folder_of) -> Callable[[str, str], Predictor]:
    """Load a checkpoint for a task when it is first asked for."""
    return functools.cache(lambda kind, task: Predictor.load(str(folder_of(kind)), task))


# ------------------------------------------------------------------------------------------------------------- classes


def test_classes_are_paired_by_name_whatever_their_numbers_and_spelling():
    labels = LabelMap.by_name({0: "traffic-light", 1: "Sky", 2: "sea"}, Classes({4: "sky", 9: "traffic_light"}, (4,)))
    assert labels.classes.tolist() == [9, 4, NO_CLASS]
    assert labels.stuff == (1,)
    assert labels.without_instances == (1, 2)
    assert labels.unknown == ("sea",)
    assert labels.never_predicted == ()


def test_classes_of_the_data_set_that_the_model_lacks_are_named():
    labels = LabelMap.by_name(NAMES, DATASET)
    assert labels.classes.tolist() == [7, NO_CLASS, 0]
    assert labels.unknown == ("dog",)
    assert labels.never_predicted == ("tree",)


def test_classes_are_paired_by_number_whatever_their_names():
    labels = LabelMap.by_id({0: "LABEL_0", 1: "LABEL_1", 3: "LABEL_3"}, DATASET)
    assert labels.classes.tolist() == [0, NO_CLASS, NO_CLASS, 3]
    assert labels.stuff == (0, 3)
    assert labels.unknown == ("LABEL_1",)
    assert labels.never_predicted == ("CAT",)


def test_models_and_data_without_a_common_class_are_refused():
    with pytest.raises(
        PredictorError, match=r"LABEL_0, LABEL_1\) has the name .*\(Sky, tree, CAT\).*--match-classes id"
    ):
        LabelMap.by_name({0: "LABEL_0", 1: "LABEL_1"}, DATASET)
    with pytest.raises(PredictorError, match=r"numbers 1, 2\) has the number .*\(0, 3, 7\).*--match-classes name"):
        LabelMap.by_id({1: "sky", 2: "CAT"}, DATASET)


def test_instances_of_unknown_classes_are_left_out():
    labels = LabelMap.by_name(NAMES, DATASET)
    masks = torch.eye(3, dtype=torch.bool)[:, None]
    result = labels.map_instances(
        {"masks": masks, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 0, 0])}
    )
    assert result["labels"].tolist() == [7, 7]
    assert result["scores"].tolist() == pytest.approx([0.8, 0.7])
    assert torch.equal(result["masks"], masks[1:])


def test_pixels_of_segments_of_unknown_classes_become_void():
    labels = LabelMap.by_name(NAMES, DATASET)
    before = torch.tensor([[1, 1, 2], [0, 3, 2]], dtype=torch.int32)
    infos = [{"id": 1, "label_id": 2, "score": 0.9}, {"id": 2, "label_id": 1, "score": 0.8}]
    result = labels.map_segments(
        {"segmentation": before, "segments_info": [*infos, {"id": 3, "label_id": 0, "score": 0.7}]}
    )
    assert result["segmentation"].tolist() == [[1, 1, 0], [0, 3, 0]]
    assert result["segments_info"] == [
        {"id": 1, "label_id": 0, "score": 0.9},
        {"id": 3, "label_id": 7, "score": 0.7},
    ]
    assert before.tolist() == [[1, 1, 2], [0, 3, 2]]


def test_maps_have_the_classes_of_the_data_set():
    labels = LabelMap.by_name(NAMES, DATASET)
    assert labels.map_classes(torch.tensor([[0, 1], [2, 2]])).tolist() == [[7, NO_CLASS], [0, 0]]


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(128, 192), (70, 70), (100, 240), (70, 50)])
def test_images_are_prepared_as_by_the_checkpoint_s_own_processor(folder_of, predictor_of, kind, size):
    predictor = predictor_of(kind, "semantic" if kind == "eomt_windows" else "panoptic")
    [image] = make_images([size])
    seen = []
    hook = predictor.model.register_forward_pre_hook(lambda *arguments: seen.append(arguments[2]), with_kwargs=True)
    predictor.predict([image], [size], LabelMap.by_name(NAMES, SAME))
    hook.remove()
    theirs = AutoImageProcessor.from_pretrained(folder_of(kind))(image, return_tensors="pt")["pixel_values"]
    ours = torch.cat([inputs["pixel_values"] for inputs in seen])
    is_rounded = size == (70, 50)  # 64 / 50 * 70 = 89.6; the square of EoMT is 96: 68.57
    if kind in ("mask2former", "maskformer") and size in ((100, 240), (70, 50)):
        # 40 x 96 and 90 x 64: theirs stretches them to multiples of 32, ours has zeros there.
        assert ours.shape == theirs.shape
        assert not ours[:, :, 40 if size == (100, 240) else 90 :].any()
        assert theirs.any(dim=1).all()
    elif is_rounded and kind in ("oneformer", "detr"):
        assert (ours.shape, theirs.shape) == ((1, 3, 90, 64), (1, 3, 89, 64))
    elif is_rounded and kind == "eomt":
        assert torch.equal(ours[..., 69:], theirs[..., 69:])  # padding: 69 columns of image here, 68 there
        assert (ours[..., 69:].amax((0, 2, 3)) < -1.8).all()  # black
    elif kind == "eomt_windows" and size[0] != size[1]:
        # Windows are cut before they are resized, and not after.
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean() < 0.1 * theirs.std()
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["eomt", "eomt_windows"])
def test_images_for_eomt_are_made_to_fit_into_its_square(folder_of, kind):
    processor = load_processor(str(folder_of(kind)), "eomt", "panoptic", {})
    inputs = processor(make_images([(50, 200)]), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert valid_sizes(inputs["pixel_mask"]).tolist() == [[24, 96]]


# ------------------------------------------------------------------------------------------------------------- results


def prepare_as_its_users_do(folder: Path, kind: str, task: str) -> tuple[nn.Module, dict]:
    model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    if kind == "oneformer":
        inputs = OneFormerProcessor.from_pretrained(folder)(make_images(), [task] * 2, return_tensors="pt")
        return model, dict(inputs)
    inputs = dict(AutoImageProcessor.from_pretrained(folder)(make_images(), return_tensors="pt"))
    inputs.pop("patch_offsets", None)
    return model, inputs


def run_by_hand(folder: Path, kind: str, task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class logits, mask logits and valid sizes, without anything of the module under test."""
    model, inputs = prepare_as_its_users_do(folder, kind, task)
    with torch.no_grad():
        outputs = model(**inputs)
    # EoMT has no pixel mask: both images come to lie in the upper left of the square.
    valid = torch.tensor([[64, 96], [96, 96]]) if kind == "eomt" else valid_sizes(inputs["pixel_mask"])
    if kind == "detr":
        return outputs.logits, outputs.pred_masks, valid
    return outputs.class_queries_logits, outputs.masks_queries_logits, valid


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", BATCHED)
def test_results_are_those_of_the_model_and_of_post_processing(folder_of, predictor_of, kind, task):
    results = predictor_of(kind, task).predict(make_images(), SIZES, LabelMap.by_name(NAMES, DATASET))
    logits = run_by_hand(folder_of(kind), kind, task)
    if task == "semantic":
        for result, expected in zip(results, semantic_segmentation(*logits, SIZES), strict=True):
            classes = torch.tensor([7, NO_CLASS, 0])[expected.segmentation]
            assert torch.equal(result["segmentation"], classes)
    elif task == "instance":
        for result, expected in zip(results, instance_segmentation(*logits, SIZES), strict=True):
            is_cat = expected.labels == 0  # sky is stuff, dog is unknown
            assert torch.equal(result["masks"], expected.masks[is_cat])
            assert torch.equal(result["scores"], expected.scores[is_cat])
            assert result["labels"].tolist() == [7] * int(is_cat.sum())
        assert sum(len(result["labels"]) for result in results) > 0
    else:
        expectations = panoptic_segmentation(*logits, SIZES, label_ids_to_fuse=[2])
        for result, expected in zip(results, expectations, strict=True):
            kept = {one.id: {0: 7, 2: 0}[one.label_id] for one in expected.segments if one.label_id != 1}
            assert {one["id"]: one["label_id"] for one in result["segments_info"]} == kept
            is_kept = torch.isin(expected.segmentation, torch.tensor(list(kept)))
            assert torch.equal(result["segmentation"], expected.segmentation * is_kept)


@pytest.mark.parametrize("kind", KINDS)
def test_panoptic_results_are_not_empty(predictor_of, kind):
    """Otherwise the comparison above would say little."""
    results = predictor_of(kind, "panoptic").predict(make_images(), SIZES, LabelMap.by_name(NAMES, SAME))
    assert [tuple(result["segmentation"].shape) for result in results] == SIZES
    assert any(result["segments_info"] for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_the_same_outputs_alone_and_in_a_batch_without_further_padding(predictor_of, kind):
    predictor = predictor_of(kind, "panoptic")
    # All images for EoMT are padded into the same square.
    images = make_images(SIZES if kind.startswith("eomt") else [(128, 192), (64, 96)])
    together = predictor.run(images)
    for number, image in enumerate(images):
        alone = predictor.run([image])
        for name in ("class_queries_logits", "masks_queries_logits"):
            logits = getattr(alone, name)[0]
            error = (getattr(together, name)[number] - logits).abs().max()
            assert error < 1e-4 * logits.abs().max(), name
        assert together.image_sizes[number].tolist() == alone.image_sizes[0].tolist()


def test_semantic_maps_of_eomt_are_made_of_windows_as_its_own_processor_makes_them(folder_of, predictor_of):
    folder, size = folder_of("eomt_windows"), (96, 240)  # windows at 0, 72 and 144, at the resolution of the model
    [image] = make_images([size])
    predictor = predictor_of("eomt_windows", "semantic")
    assert predictor.joins_windows
    [result] = predictor.predict([image], [size], LabelMap.by_name(NAMES, SAME))
    theirs = AutoImageProcessor.from_pretrained(folder)
    inputs = theirs(image, return_tensors="pt")
    assert [offsets.tolist() for offsets in inputs["patch_offsets"]] == [[0, 0, 96], [0, 72, 168], [0, 144, 240]]
    with torch.no_grad():
        outputs = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()(**inputs)
    [expected] = theirs.post_process_semantic_segmentation(outputs, target_sizes=[size])
    assert torch.equal(result["segmentation"], expected)
    assert len(expected.unique()) > 1


def test_eomt_that_pads_makes_semantic_maps_of_the_whole_image(predictor_of):
    assert not predictor_of("eomt", "semantic").joins_windows
    assert not predictor_of("eomt_windows", "panoptic").joins_windows


@pytest.mark.parametrize("task", TASKS)
def test_oneformer_reads_its_task_in_the_words_of_its_processor(folder_of, predictor_of, task):
    processor = OneFormerProcessor.from_pretrained(folder_of("oneformer"))
    theirs = processor(make_images(), [task] * 2, return_tensors="pt")
    assert torch.equal(
        predictor_of("oneformer", task).further_inputs["task_inputs"].expand(2, -1), theirs["task_inputs"]
    )


@pytest.mark.parametrize("kind", ["mpformer", "detr"])
def test_several_scales_are_averaged_at_the_size_of_the_image(predictor_of, kind):
    [image] = make_images([(60, 90)])
    result = predictor_of(kind, "semantic").predict_augmented(image, LabelMap.by_name(NAMES, SAME))
    assert result["segmentation"].shape == (60, 90)


def test_masks_of_another_resolution_are_refused(folder_of):
    predictor = Predictor.load(str(folder_of("mpformer")), "panoptic")

    class Coarse(nn.Linear):
        def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> ModelOutput:
            return ModelOutput(class_queries_logits=torch.zeros(1, 2, 4), masks_queries_logits=torch.zeros(1, 2, 8, 12))

    predictor.model = Coarse(1, 1)
    with pytest.raises(
        PredictorError, match=r"Coarse predicts masks of \(8, 12\) cells for images of \(64, 96\) pixels"
    ):
        predictor.run(make_images([(64, 96)]))


# -------------------------------------------------------------------------------------------------------------- errors


def refusal_of(name: object) -> str:
    with pytest.raises(PredictorError) as refusal:
        Predictor.load(str(name), "panoptic")
    return str(refusal.value)


def test_a_model_of_another_kind_is_refused(tmp_path):
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    expected = (
        f"{tmp_path} is a resnet model. Expected one for universal segmentation of images: mpformer, detr, eomt, "
    )
    assert refusal_of(tmp_path).startswith(expected)


def test_a_model_for_videos_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videomt"}))
    assert "is a videomt model. Expected one for universal segmentation of images" in refusal_of(tmp_path)


@pytest.mark.parametrize("name", ["missing", "missing/deeper/still"])
def test_a_missing_folder_is_refused(tmp_path, name):
    path = tmp_path / name
    assert refusal_of(path).startswith(f"{path} is no folder. Pass the folder of a saved model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert refusal_of(tmp_path).startswith(f"{tmp_path} cannot be loaded: ")


def test_a_detector_without_masks_is_refused_although_it_is_a_detr_model(tmp_path):
    config = tiny_detr().config
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    sentence = (
        rf"{tmp_path} lacks \d+ of the \d+ weights of DetrForSegmentation: bbox_attention\.k_proj\.bias, .* Pass a"
    )
    assert re.match(sentence, refusal_of(tmp_path))


def test_a_file_of_weights_that_is_cut_off_is_refused(tmp_path):
    folder = save_checkpoint("mpformer", tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal_of(folder).startswith(f"{folder} cannot be loaded: ")


def test_a_checkpoint_without_processor_is_refused(tmp_path):
    folder = save_checkpoint("mask2former", tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    assert refusal_of(folder).startswith(f"{folder} cannot be loaded: ")
