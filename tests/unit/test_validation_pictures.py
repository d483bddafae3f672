"""Pictures of validation images: which images, what of a result, and files that are complete."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mpformer_hf.visualization import draw_comparison
from training.validation_pictures import (
    PANEL_SIZE,
    ValidationPictures,
    draw_rows,
    segments_of_result,
    segments_of_row,
    show,
)

LABELS = {0: "cat", 1: "grass"}


class Data:
    id2label = LABELS


def make_row(image_id=1, size=(40, 60), **further):
    """Two cats that overlap; grass below."""
    masks = np.zeros((3, *size), dtype=bool)
    masks[0, 5:20, 5:20] = masks[1, 10:25, 15:40] = masks[2, 30:] = True
    image = Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8))
    labels = np.array([0, 0, 1])
    return {"image_id": image_id, "image": image, "mask_labels": masks, "class_labels": labels, **further}


def instances(row, scores=(0.9, 0.4, 0.5)):
    return {
        "masks": torch.from_numpy(row["mask_labels"]),
        "labels": torch.from_numpy(row["class_labels"]),
        "scores": torch.tensor(scores),
    }


def make_pictures(folder, num_images=2, task="instance"):
    return ValidationPictures(Data(), task, folder, num_images, Accelerator(cpu=True))


def described(segments):
    return [(one.label, int(one.mask.sum()), None if one.score is None else round(one.score, 2)) for one in segments]


def test_ground_truth_has_a_mask_for_each_segment_and_crowds_under_their_own_name():
    crowd = np.zeros((1, 40, 60), dtype=bool)
    crowd[0, :5] = True
    row = make_row(crowd_masks=crowd, crowd_labels=np.array([0]))
    expected = [("cat", 225, None), ("cat", 375, None), ("grass", 600, None), ("cat (crowd)", 300, None)]
    assert described(segments_of_row(row, "instance", LABELS)) == expected
    assert described(segments_of_row(make_row(), "panoptic", LABELS)) == expected[:3]


def test_semantic_ground_truth_has_one_mask_a_class():
    # The cats share 10 rows of 5 columns.
    assert described(segments_of_row(make_row(), "semantic", LABELS)) == [
        ("cat", 225 + 375 - 50, None),
        ("grass", 600, None),
    ]


def test_only_instances_that_the_model_is_sure_of_are_shown():
    assert described(segments_of_result(instances(make_row()), LABELS)) == [("cat", 225, 0.9), ("grass", 600, 0.5)]


def test_results_of_all_tasks_and_of_the_pipeline_are_read():
    classes = torch.full((40, 60), -1)
    classes[30:] = 1
    assert described(segments_of_result({"segmentation": classes}, LABELS)) == [("grass", 600, None)]
    panoptic = {"segmentation": (classes + 1) * 3, "segments_info": [{"id": 6, "label_id": 1, "score": 0.75}]}
    assert described(segments_of_result(panoptic, LABELS)) == [("grass", 600, 0.75)]
    mask = Image.fromarray((classes.numpy() == 1).astype(np.uint8) * 255)
    assert described(segments_of_result([{"mask": mask, "label": "grass", "score": 0.75}], LABELS)) == [
        ("grass", 600, 0.75)
    ]


def test_large_images_are_kept_at_the_size_of_their_panel():
    row = make_row(size=(1000, 400))
    shown = show(row, instances(row), "instance", LABELS)
    assert shown.image.size == (128, PANEL_SIZE) == (128, 320)
    assert {one.mask.shape for one in [*shown.truth, *shown.prediction]} == {(320, 128)}
    # The grass begins at row 30 of 1000, and so at row 9.6 of 320: the first whose nearest pixel is in it is the 10th.
    grass = shown.truth[2].mask
    assert bool(grass[10:].all())
    assert not bool(grass[:10].any())
    small = show(make_row(), instances(make_row()), "instance", LABELS)
    assert small.image.size == (60, 40)


@pytest.mark.parametrize("order", [[3, 1, 2, 0], [0, 1, 2, 3], [2, 3, 0, 1]])
def test_the_images_do_not_depend_on_the_order_in_which_they_are_scored(tmp_path, order):
    rows = [make_row(image_id, further) for image_id, further in enumerate([(40, 60), (60, 40), (50, 50), (30, 60)])]
    pictures = make_pictures(tmp_path / "pictures")
    for number in order:
        pictures.look(rows[number], instances(rows[number]))
    path = pictures.save(1000)
    assert path == tmp_path / "pictures" / "step-00001000.png"
    with Image.open(path) as picture:
        drawn = np.asarray(picture)
    expected = draw_rows(rows[:2], [instances(row) for row in rows[:2]], "instance", LABELS)
    assert np.array_equal(drawn, np.asarray(expected))


def test_a_row_is_image_ground_truth_and_prediction():
    row = make_row()
    sure = {name: values[[0, 2]] for name, values in instances(row).items()}
    expected = draw_comparison(
        [row["image"]], {"ground truth": [row], "prediction": [sure]}, LABELS, panel_size=PANEL_SIZE
    )
    assert np.array_equal(np.asarray(draw_rows([row], [instances(row)], "instance", LABELS)), np.asarray(expected))


def test_numbers_come_before_names_and_many_images_come_in_two_columns(tmp_path):
    pictures = make_pictures(tmp_path, num_images=5)
    for image_id in ("b", 7, "a", 10, 9, 8):
        row = make_row(image_id)
        pictures.look(row, instances(row))
    assert list(pictures._shown) == [7, 8, 9, 10, "a"]
    with Image.open(pictures.save(1)) as picture:
        width, height = picture.size
    with Image.open(save_alone(tmp_path / "alone")) as one:
        assert width == 2 * one.width
        assert 2 * one.height < height < 3 * one.height


def save_alone(folder):
    pictures = make_pictures(folder, num_images=1)
    pictures.look(make_row(), instances(make_row()))
    return pictures.save(1)


def test_each_evaluation_begins_anew_and_leaves_one_file(tmp_path):
    pictures = make_pictures(tmp_path)
    assert pictures.save(5) is None
    for step in (10, 20):
        pictures.look(make_row(step), instances(make_row()))
        pictures.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010.png", "step-00000020.png"]


def test_no_images_are_asked_for_and_none_are_kept(tmp_path):
    pictures = make_pictures(tmp_path, num_images=0)
    pictures.look(make_row(), instances(make_row()))
    assert pictures.save(1) is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert save_alone(tmp_path / "file") is None
    assert "step-00000001.png cannot be drawn: " in capsys.readouterr().err
