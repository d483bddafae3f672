"""The evaluation loop, run with a model that knows the ground truth: what it loses, the loop has lost."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from mpformer_hf import MPFormerImageProcessor
from training.data import DigitScenes
from training.evaluation import evaluate_model, format_scores, headlines, order_by_shape


class MixedSizes:
    """Digit scenes of two sizes, in turns."""

    def __init__(self, task="panoptic") -> None:
        self.wide, self.tall = (
            DigitScenes("validation", task=task, image_size=size) for size in ((96, 144), (128, 80))
        )
        self.id2label, self.thing_ids, self.stuff_ids = self.wide.id2label, self.wide.thing_ids, self.wide.stuff_ids

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index):
        scenes = self.tall if index % 2 else self.wide
        return {**scenes[index], "image_id": index}


class Oracle(nn.Module):
    """Recognises the images of a data set and predicts their ground truth, at stride 4 as a model does."""

    def __init__(self, dataset, processor, label_shift: int = 0) -> None:
        super().__init__()
        self.rows = [dataset[index] for index in range(len(dataset))]
        self.images = [processor(row["image"], return_tensors="pt").pixel_values[0] for row in self.rows]
        self.label_shift = label_shift
        self.num_classes = len(dataset.id2label)

    def find(self, image):
        height, width = image.shape[1:]
        return next(
            row
            for row, known in zip(self.rows, self.images, strict=True)
            if known.shape[1] <= height
            and known.shape[2] <= width
            and image[:, : known.shape[1], : known.shape[2]].equal(known)
        )

    def forward(self, pixel_values, pixel_mask):
        assert not self.training
        batch, _, height, width = pixel_values.shape
        classes = torch.full((batch, 8, self.num_classes + 1), -9.0)
        classes[:, :, -1] = 9.0
        masks = torch.zeros(batch, 8, height, width)
        for index, image in enumerate(pixel_values):
            row = self.find(image)
            for number, (mask, label) in enumerate(zip(row["mask_labels"], row["class_labels"], strict=True)):
                classes[index, number, [(label + self.label_shift) % self.num_classes, self.num_classes]] = (
                    torch.tensor([9.0, -9.0])
                )
                masks[index, number, : mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask).float()
        masks = nn.functional.interpolate(masks, scale_factor=0.25, mode="area") * 20 - 10
        sizes = torch.stack([pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)], dim=1)
        return ModelOutput(class_queries_logits=classes, masks_queries_logits=masks, image_sizes=sizes)


@pytest.fixture(scope="module")
def dataset():
    return MixedSizes()


@pytest.fixture(scope="module")
def processor():
    return MPFormerImageProcessor(do_resize=False)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 1), (16, 0)])
def test_a_model_that_knows_everything_finds_every_segment(dataset, processor, batch_size, num_workers):
    model = Oracle(dataset, processor)
    sizes = {"batch_size": batch_size, "num_workers": num_workers}
    scores = evaluate_model(model, processor, dataset, Accelerator(cpu=True), "panoptic", **sizes)
    num_classes = len({int(label) for row in model.rows for label in row["class_labels"]})
    assert scores["All"]["rq"] == 1.0
    assert scores["All"]["n"] == num_classes
    assert scores["All"]["sq"] > 0.8  # the rest is lost at stride 4


def test_right_masks_with_wrong_classes_are_worth_nothing(dataset, processor):
    scores = evaluate_model(
        Oracle(dataset, processor, label_shift=1), processor, dataset, Accelerator(cpu=True), "panoptic"
    )
    assert scores["All"]["pq"] == 0.0


def test_the_thresholds_of_the_processor_decide(dataset):
    strict = MPFormerImageProcessor(do_resize=False, score_threshold=1.0)
    scores = evaluate_model(Oracle(dataset, strict), strict, dataset, Accelerator(cpu=True), "panoptic")
    assert scores["All"]["pq"] == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_the_same_afterwards(dataset, processor, training):
    model = Oracle(dataset, processor).train(training)
    evaluate_model(model, processor, dataset, Accelerator(cpu=True), "panoptic")
    assert model.training is training


@pytest.mark.parametrize(("task", "name"), [("instance", "AP50"), ("semantic", "pixel accuracy")])
def test_every_task_is_scored(processor, task, name):
    dataset = MixedSizes(task)
    looked_at = []
    scores = evaluate_model(
        Oracle(dataset, processor),
        processor,
        dataset,
        Accelerator(cpu=True),
        task,
        look=lambda row, result: looked_at.append(row["image_id"]),
    )
    assert headlines(task, scores)[name] > 0.9
    assert sorted(looked_at) == list(range(7))


def test_images_of_one_shape_come_together_if_their_sizes_are_known(dataset):
    assert list(order_by_shape(dataset)) == list(range(7))
    sizes = [(96, 144), (128, 80), (97, 145), (128, 80), (400, 600)]
    known = DigitScenes("validation", num_images=5)
    known.size = sizes.__getitem__
    assert order_by_shape(known) == [0, 2, 4, 1, 3]


def test_groups_without_classes_have_no_score_and_the_first_score_is_always_there():
    group = {"pq": 0.5, "sq": 0.625, "rq": 0.8, "n": 12}
    scores = headlines("panoptic", {"All": group, "Things": group, "Stuff": {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}})
    assert scores == {"PQ": 0.5, "PQ things": 0.5, "SQ": 0.625, "RQ": 0.8}
    assert format_scores(scores) == "PQ 50.0, PQ things 50.0, SQ 62.5, RQ 80.0"
    nothing = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), -1.0)
    assert headlines("instance", nothing) == {"AP": -1.0}
