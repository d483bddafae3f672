"""Broken images: others take their place, always the same ones, and they are counted once over all workers."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training.augmentation import Augmentation, AugmentedDataset
from training.broken_images import BrokenImages, BrokenImagesError, SkippingBroken, sentence_of
from training.compact_batches import pack_batch
from training.official_files import FileError


class Squares:
    """Images of one grey level each, which is their position; some cannot be read."""

    def __init__(self, length=20, broken=(), problems=()):
        self.id2label, self.thing_ids, self.stuff_ids, self.category_ids = {0: "square"}, (0,), (), {0: 44}
        self.length, self.broken = length, set(broken)
        self.problems = {number: f"{number}.png is missing." for number in problems}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken | self.problems.keys():
            raise FileError(f"{index}.png, image {index}, is damaged.")
        return {
            "image_id": index,
            "image": Image.new("RGB", (8, 8), (index,) * 3),
            "mask_labels": np.ones((1, 8, 8), dtype=bool),
            "class_labels": np.zeros(1, dtype=np.int64),
        }


def test_an_image_that_can_be_read_is_left_as_it_is():
    row = SkippingBroken(Squares(broken={3}), limit=1)[2]
    assert row["image_id"] == 2
    assert "skipped" not in row


def test_the_same_image_takes_the_place_of_a_broken_one_in_every_process():
    dataset = SkippingBroken(Squares(broken={3, 4, 5}), limit=3)
    again = pickle.loads(pickle.dumps(dataset))
    for index in (3, 4, 5):
        row = dataset[index]
        assert row["image_id"] not in (3, 4, 5)
        assert row["skipped"][0] == (index, f"{index}.png, image {index}, is damaged.")
        assert again[index]["image_id"] == row["image_id"]
    assert len({dataset[index]["image_id"] for index in (3, 4, 5)}) > 1, "not all of them become one"


def test_a_replacement_that_is_broken_too_is_named_too():
    dataset = SkippingBroken(Squares(length=6, broken=range(1, 6)), limit=5)
    row = dataset[1]
    assert row["image_id"] == 0
    tried = [index for index, _ in row["skipped"]]
    assert tried[0] == 1
    assert len(set(tried)) == len(tried)


def test_a_chain_of_broken_images_that_passes_the_limit_stops():
    with pytest.raises(BrokenImagesError, match=r"^3 images cannot be read, and at most 2 may be .*\(3\) \d+.png"):
        SkippingBroken(Squares(broken=range(20)), limit=2)[7]
    with pytest.raises(BrokenImagesError, match=r"No image can be read. \(1\) 1.png, image 1, .*\(2\) 0.png"):
        SkippingBroken(Squares(length=2, broken={0, 1}), limit=2)[1]


def test_more_known_problems_than_the_limit_are_refused_at_once():
    assert len(SkippingBroken(Squares(problems={1, 2}), limit=2)) == 20
    with pytest.raises(
        BrokenImagesError, match=r"2 images cannot be read, .* 1 may .* \(1\) 1.png is missing. \(2\) 2.png"
    ):
        SkippingBroken(Squares(problems={1, 2}), limit=1)


def test_other_errors_are_not_hidden():
    class Wrong(Squares):
        def __getitem__(self, index):
            raise TypeError("a mistake in the code")

    with pytest.raises(TypeError, match="a mistake in the code"):
        SkippingBroken(Wrong(), limit=5)[0]


def test_everything_else_of_the_data_set_is_still_there():
    dataset = SkippingBroken(Squares(problems={1}), limit=1)
    assert (len(dataset), dataset.id2label, dataset.thing_ids, dataset.stuff_ids) == (20, {0: "square"}, (0,), ())
    assert dataset.category_ids == {0: 44}
    assert list(dataset.problems) == [1]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dataset.nonsense


def test_each_broken_image_is_named_once_and_counted_once(capsys):
    broken = BrokenImages(limit=2)
    for _ in range(3):
        broken.add([(5, "5.png is damaged."), (7, "7.png is damaged.")])
    broken.add([])
    assert len(broken) == 2
    assert capsys.readouterr().err.splitlines() == [
        "Passed over, and another image taken instead: 5.png is damaged.",
        "Passed over, and another image taken instead: 7.png is damaged.",
    ]
    with pytest.raises(BrokenImagesError, match=r"3 images .* at most 2 .*5.png is damaged.*7.png is damaged.*9.png"):
        broken.add([(9, "9.png is damaged.")])


def test_processes_together_pass_the_limit_that_each_of_them_keeps(capsys):
    one, other = BrokenImages(limit=2), BrokenImages(limit=2)
    one.add([(5, "5.png is damaged."), (3, "3.png is damaged.")])
    other.add([(5, "5.png is damaged.")])
    one.merge([one.found, other.found])
    assert list(one.found) == [3, 5]
    other.add([(8, "8.png is damaged.")])
    capsys.readouterr()
    for process in (one, other):
        with pytest.raises(BrokenImagesError, match=r"3 images .*3.png.*5.png.*8.png"):
            process.merge([one.found, other.found])
    assert capsys.readouterr().err == ""


def test_what_was_found_survives_a_checkpoint(capsys):
    broken = BrokenImages(limit=1)
    broken.add([(5, "5.png is damaged.")])
    again = BrokenImages(limit=1)
    again.load_state_dict(broken.state_dict())
    capsys.readouterr()
    again.add([(5, "5.png is damaged.")])
    assert (again.found, capsys.readouterr().err) == (broken.found, "")


def load(dataset, num_workers):
    augmented = AugmentedDataset(dataset, Augmentation(kind="none"), seed=0)
    return DataLoader(augmented, batch_size=4, num_workers=num_workers, collate_fn=pack_batch)


def test_the_count_is_right_whatever_the_number_of_workers(capsys):
    dataset = SkippingBroken(Squares(broken={2, 3, 11}), limit=3)
    found, pixels = {}, {}
    for num_workers in (0, 2):
        broken, batches = BrokenImages(limit=3), []
        for _ in range(2):  # epochs, each with workers of its own
            for batch in load(dataset, num_workers):
                broken.add(batch.skipped)
                batches.append(batch.pixels)
        found[num_workers], pixels[num_workers] = broken.found, torch.cat(batches)
    assert sorted(found[0]) == [2, 3, 11]
    assert found[0] == found[2]
    assert torch.equal(pixels[0], pixels[2])
    assert capsys.readouterr().err.count("Passed over") == 6


def test_an_error_of_a_worker_is_one_sentence_again():
    dataset = SkippingBroken(Squares(broken=range(20)), limit=1)
    with pytest.raises(BrokenImagesError) as caught:
        list(load(dataset, num_workers=1))
    assert "Traceback" in str(caught.value)
    assert sentence_of(caught.value).startswith("2 images cannot be read, and at most 1 may be passed over")
    assert "Traceback" not in sentence_of(caught.value)
    assert sentence_of(FileError("a.png is missing.")) == "a.png is missing."
