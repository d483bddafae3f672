"""The evaluation loop, run with a model that knows the ground truth: what it loses, the loop has lost."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from mpformer_hf import MPFormerImageProcessor
from training.data import DigitScenes
from training.evaluation import evaluate_panoptic, format_scores

NUM_CLASSES = 12


class MixedSizes:
    """Digit scenes of two sizes, in turns."""

    def __init__(self) -> None:
        self.wide, self.tall = (DigitScenes("validation", image_size=size) for size in ((96, 144), (128, 80)))
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
        classes = torch.full((batch, 8, NUM_CLASSES + 1), -9.0)
        classes[:, :, -1] = 9.0
        masks = torch.zeros(batch, 8, height, width)
        for index, image in enumerate(pixel_values):
            row = self.find(image)
            for number, (mask, label) in enumerate(zip(row["mask_labels"], row["class_labels"], strict=True)):
                classes[index, number, [(label + self.label_shift) % NUM_CLASSES, NUM_CLASSES]] = torch.tensor(
                    [9.0, -9.0]
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
    scores = evaluate_panoptic(model, processor, dataset, Accelerator(cpu=True), **sizes)
    num_classes = len({int(label) for row in model.rows for label in row["class_labels"]})
    assert scores["All"]["rq"] == 1.0
    assert scores["All"]["n"] == num_classes
    assert scores["All"]["sq"] > 0.8  # the rest is lost at stride 4


def test_right_masks_with_wrong_classes_are_worth_nothing(dataset, processor):
    scores = evaluate_panoptic(Oracle(dataset, processor, label_shift=1), processor, dataset, Accelerator(cpu=True))
    assert scores["All"]["pq"] == 0.0


def test_the_thresholds_of_the_processor_decide(dataset):
    strict = MPFormerImageProcessor(do_resize=False, score_threshold=1.0)
    scores = evaluate_panoptic(Oracle(dataset, strict), strict, dataset, Accelerator(cpu=True))
    assert scores["All"]["pq"] == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_the_same_afterwards(dataset, processor, training):
    model = Oracle(dataset, processor).train(training)
    evaluate_panoptic(model, processor, dataset, Accelerator(cpu=True))
    assert model.training is training


def test_the_table_is_in_percent():
    group = {"pq": 0.5, "sq": 0.625, "rq": 0.8, "n": 12}
    lines = format_scores({"All": group, "Things": {**group, "n": 10}, "Stuff": {**group, "n": 2}}).splitlines()
    assert [line.split() for line in lines] == [
        ["PQ", "SQ", "RQ", "classes"],
        ["All", "50.0", "62.5", "80.0", "12"],
        ["Things", "50.0", "62.5", "80.0", "10"],
        ["Stuff", "50.0", "62.5", "80.0", "2"],
    ]
