"""Class names: the order of class ids is that of the data sets' registration."""

import json
from pathlib import Path

import pytest
from torchvision.models._meta import _COCO_CATEGORIES

from conversion import ConversionError
from conversion.label_sets import DATA_SETS, FOLDER, find_label_set, read_label_set

# Number of classes, of things, and some ids that other sources give too.
KNOWN = {
    "coco_instance_80": (80, 80, {0: "person", 2: "car", 58: "potted plant", 79: "toothbrush"}),
    "coco_panoptic_133": (133, 80, {0: "person", 79: "toothbrush", 80: "banner", 100: "road", 119: "sky-other-merged", 132: "rug-merged"}),
    "ade20k_150": (150, 100, {0: "wall", 2: "sky", 12: "person", 20: "car", 126: "animal", 149: "flag"}),
    "ade20k_instance_100": (100, 100, {0: "bed", 3: "person", 8: "car", 99: "flag"}),
    "cityscapes_19": (19, 8, {0: "road", 10: "sky", 11: "person", 13: "car", 18: "bicycle"}),
    "cityscapes_instance_8": (8, 8, {0: "person", 2: "car", 7: "bicycle"}),
    "mapillary_vistas_65": (65, 37, {0: "Bird", 13: "Road", 27: "Sky", 55: "Car", 64: "Ego Vehicle"}),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_each_set_has_the_known_counts_and_ids(name):
    classes, things, some = KNOWN[name]
    labels = read_label_set(FOLDER / f"{name}.json")
    assert len(labels) == classes
    assert sum(labels.things) == things
    assert {index: labels.id2label[index] for index in some} == some


def test_every_file_is_of_a_registered_data_set():
    assert {file.stem for file in FOLDER.glob("*.json")} == set(DATA_SETS.values()) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_each_set_says_where_it_is_defined_and_has_no_name_twice(name):
    labels = read_label_set(FOLDER / f"{name}.json")
    assert "https://" in labels.source
    assert len(set(labels.classes)) == len(labels)


def test_coco_instances_are_the_annotated_categories_of_torchvision():
    annotated = [name for name in _COCO_CATEGORIES if name not in {"__background__", "N/A"}]
    assert list(read_label_set(FOLDER / "coco_instance_80.json").classes) == annotated


def test_coco_panoptic_has_the_instance_classes_first_and_then_stuff():
    panoptic = read_label_set(FOLDER / "coco_panoptic_133.json")
    assert panoptic.classes[:80] == read_label_set(FOLDER / "coco_instance_80.json").classes
    assert panoptic.stuff_ids == tuple(range(80, 133))


def test_cityscapes_instances_are_its_things_in_the_same_order():
    semantic = read_label_set(FOLDER / "cityscapes_19.json")
    things = [name for name, is_thing in zip(semantic.classes, semantic.things, strict=True) if is_thing]
    assert list(read_label_set(FOLDER / "cityscapes_instance_8.json").classes) == things


def test_ade20k_things_are_its_instance_classes_in_the_same_order():
    # The instance task has short names; these are those that differ from every synonym in the semantic set.
    renamed = {
        "windowpane": "window",
        "bathtub": "tub",
        "railing": "rail",
        "streetlight": "street lamp",
        "television receiver": "tv",
        "airplane": "plane",
        "apparel": "clothes",
        "ashcan": "trash can",
    }
    semantic = read_label_set(FOLDER / "ade20k_150.json")
    things = [name for name, is_thing in zip(semantic.classes, semantic.things, strict=True) if is_thing]
    instances = read_label_set(FOLDER / "ade20k_instance_100.json").classes
    assert all(renamed.get(short, short) in long.split(", ") for short, long in zip(instances, things, strict=True))


@pytest.mark.parametrize(
    ("data_set", "num_classes", "first", "last"),
    [
        ("coco_2017_val", 80, "person", "toothbrush"),
        ("coco_2017_test-dev", 80, "person", "toothbrush"),
        ("coco_2017_val_panoptic_with_sem_seg", 133, "person", "rug-merged"),
        ("coco_2017_train_panoptic", 133, "person", "rug-merged"),
        ("ade20k_sem_seg_val", 150, "wall", "flag"),
        ("ade20k_panoptic_val", 150, "wall", "flag"),
        ("ade20k_instance_val", 100, "bed", "flag"),
        ("cityscapes_fine_sem_seg_val", 19, "road", "bicycle"),
        ("cityscapes_fine_panoptic_train", 19, "road", "bicycle"),
        ("cityscapes_fine_instance_seg_val", 8, "person", "bicycle"),
        ("mapillary_vistas_sem_seg_val", 65, "Bird", "Ego Vehicle"),
        ("mapillary_vistas_panoptic_val", 65, "Bird", "Ego Vehicle"),
    ],
)
def test_registered_names_of_the_original_find_their_classes(data_set, num_classes, first, last):
    labels = find_label_set([data_set], num_classes)
    assert (len(labels), labels.classes[0], labels.classes[-1]) == (num_classes, first, last)


def test_the_number_of_classes_chooses_among_several_data_sets():
    names = ["my_own_data", "coco_2017_val", "coco_2017_val_panoptic"]
    assert len(find_label_set(names, 133)) == 133
    assert len(find_label_set(names, 80)) == 80


@pytest.mark.parametrize(("data_sets", "num_classes"), [([], 80), (["my_own_data"], 80), (["coco_2017_val"], 81)])
def test_no_classes_are_guessed_from_their_number_alone(data_sets, num_classes):
    assert find_label_set(data_sets, num_classes) is None


def write_classes(folder: Path, content: object) -> Path:
    file = folder / "classes.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_of_ones_own_is_read(tmp_path):
    file = write_classes(
        tmp_path,
        {"classes": [{"id": 0, "name": "cell", "isthing": True}, {"id": 1, "name": "glass", "isthing": False}]},
    )
    labels = read_label_set(file)
    assert labels.id2label == {0: "cell", 1: "glass"}
    assert labels.stuff_ids == (1,)
    assert labels.name == "classes"


CELL = {"id": 0, "name": "cell", "isthing": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        pytest.param("[" * 100_000, "not a readable JSON file", id="deep"),
        ("[]", "expected an object with `name`, `source` and a list `classes`"),
        ({"classes": {}}, "expected an object with"),
        ({"classes": []}, "it has no class"),
        ({"classes": [CELL | {"id": 1}]}, "entry 0 of `classes` must be an object with `id` 0"),
        ({"classes": [CELL | {"isthing": 1}]}, "`isthing` true or false"),
        ({"classes": [CELL | {"name": " "}]}, "entry 0"),
        ({"classes": ["cell"]}, "entry 0 of `classes`"),
        ({"classes": [CELL, CELL | {"id": 1}]}, "two classes are called 'cell'"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_entry(tmp_path, content, message):
    file = write_classes(tmp_path, content)
    with pytest.raises(ConversionError, match=message) as caught:
        read_label_set(file)
    assert str(file) in str(caught.value)


def test_a_missing_or_huge_file_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="not a readable JSON file"):
        read_label_set(tmp_path / "absent.json")
    with pytest.raises(ConversionError, match="larger than 1048576 bytes"):
        read_label_set(write_classes(tmp_path, " " * (2**20 + 1)))
