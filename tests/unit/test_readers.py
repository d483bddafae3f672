"""Readers: what is read is what was written, in every format, from folders and archives, in every process."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.data_folders import (
    NAMES,
    SIZE,
    SPLITS,
    WRITERS,
    Scene,
    assert_reads_back_equal,
    boxed,
    known_segments,
    make_scenes,
    pack,
    pack_parts,
    save_image,
    save_json,
    save_map,
    segments_of,
    write_cityscapes,
    write_class_index,
    write_coco_instances,
    write_coco_panoptic,
    write_mapillary,
)
from training.data import DATASETS, TASKS, DigitScenes, detect_format, load_segmentation_dataset
from training.official_files import FileError
from training.readers import index as index_module
from training.readers.coco_instances import CocoInstances
from training.readers.coco_panoptic import CocoPanoptic

FORMATS = tuple(WRITERS)
# Digit, china and flower, in the classes of the format.
NAMES_IN = dict.fromkeys(FORMATS, NAMES) | {
    "ade20k": ("bed", "wall", "building"),
    "cityscapes": ("car", "building", "sky"),
    "mapillary_vistas": ("Digit", "China", "Flower"),
}
IDS_IN = {
    "coco_instances": (18, 44, 90),
    "coco_panoptic": (18, 44, 90),
    "ade20k": (8, 1, 2),
    "cityscapes": (26, 11, 23),
    "mapillary_vistas": (1, 0, 3),
    "class_index": (300, 0, 7),
    "yolo": (0, 1, 2),
}
OPTIONS = {"class_index": {"ignore_index": 65_535}}
ALL_ARE_THINGS = ("coco_instances", "yolo")
WITHOUT_CROWDS = ("ade20k", "mapillary_vistas", "yolo")
WITHOUT_VOID = ("coco_instances", "yolo")


def scenes_for(name, split="train"):
    return boxed(make_scenes(split, overlapping=True, crowd=False)) if name == "yolo" else make_scenes(split)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of each format, in a folder, as one archive and as a folder of archives."""
    base = tmp_path_factory.mktemp("data")
    for name, write in WRITERS.items():
        for split in SPLITS:
            write(scenes_for(name, split), base / "folder" / name, split)
        pack(base / "folder" / name, base / "archive" / name / "all.zip", within=f"download/{name}")
        pack_parts(base / "folder" / name, base / "parts" / name)
    return base


def open_reader(folders, name, storage="folder", split="train", **options):
    path = folders / storage / name
    path = path / "all.zip" if storage == "archive" else path
    return DATASETS[name](
        split, path=str(path), cache_dir=str(folders / "cache"), **{**OPTIONS.get(name, {}), **options}
    )


def expected_segments(scene: Scene, name: str, task: str):
    """Count what a reader should report of a scene, from the definition of the task."""
    segments = [(mask, key, crowd and name not in WITHOUT_CROWDS) for mask, key, crowd in segments_of(scene.row)]
    if task == "instance" and name not in ALL_ARE_THINGS:
        segments = [segment for segment in segments if segment[1] == 0]
    names = NAMES_IN[name]
    if task == "semantic":
        present = {key for _, key, _ in segments}
        joined = [(np.logical_or.reduce([mask for mask, one, _ in segments if one == key]), key) for key in present]
        return Counter((names[key], mask.tobytes()) for mask, key in joined), Counter()
    return tuple(
        Counter((names[key], mask.tobytes()) for mask, key, crowd in segments if crowd == wanted)
        for wanted in (False, True)
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_what_was_written(folders, name, task):
    for split in SPLITS:
        reader = open_reader(folders, name, split=split, task=task)
        scenes = scenes_for(name, split)
        assert len(reader) == len(scenes)
        rows = list(reader)
        assert len({row["image_id"] for row in rows}) == len(rows)
        for row in rows:
            pixels = np.asarray(row["image"], dtype=int)
            distances = [np.abs(pixels - np.asarray(scene.row["image"])).mean() for scene in scenes]
            scene = scenes[int(np.argmin(distances))]  # readers may order images by their names
            assert distances[scenes.index(scene)] < (12 if name in ("ade20k", "mapillary_vistas") else 0.1), "JPEG"
            assert row["mask_labels"].dtype == bool
            assert row["class_labels"].dtype == np.int64
            assert row["mask_labels"].shape == (len(row["class_labels"]), *SIZE)
            assert known_segments(row, reader.id2label) == expected_segments(scene, name, task)
            if name in WITHOUT_VOID or (name, task) == ("ade20k", "instance"):
                assert "ignore_mask" not in row
            else:
                np.testing.assert_array_equal(row["ignore_mask"], scene.row["ignore_mask"])


@pytest.mark.parametrize("storage", ["archive", "parts"])
@pytest.mark.parametrize("name", FORMATS)
def test_archives_hold_the_same_rows_as_folders(folders, name, storage):
    for split in SPLITS:
        plain, packed = (open_reader(folders, name, one, split) for one in ("folder", storage))
        assert [row["class_labels"].tolist() for row in plain] == [row["class_labels"].tolist() for row in packed]
        for one, other in zip(plain, packed, strict=True):
            assert one.keys() == other.keys()
            assert one["image"].tobytes() == other["image"].tobytes()
            for key in one.keys() - {"image", "image_id"}:
                np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FORMATS)
def test_classes_have_their_official_ids(folders, name, task):
    reader = open_reader(folders, name, task=task)
    ids = dict(zip(NAMES_IN[name], IDS_IN[name], strict=True))
    if (name, task) == ("mapillary_vistas", "panoptic"):
        ids = {key: value + 1 for key, value in ids.items()}
    if (name, task) == ("ade20k", "instance"):
        ids = {"bed": 1}
    things_alone = task == "instance" and name not in ALL_ARE_THINGS
    expected = {key: value for key, value in ids.items() if not things_alone or key == NAMES_IN[name][0]}
    found = {label: reader.category_ids[class_id] for class_id, label in reader.id2label.items()}
    assert {key: found.get(key) for key in expected} == expected
    assert list(reader.id2label) == list(range(len(found)))
    assert sorted((*reader.thing_ids, *reader.stuff_ids)) == list(reader.id2label)
    is_thing = {label: class_id in reader.thing_ids for class_id, label in reader.id2label.items()}
    assert is_thing[NAMES_IN[name][0]] or task == "semantic"
    assert all(is_thing[key] == (name in ALL_ARE_THINGS) for key in NAMES_IN[name][1:] if not things_alone)


def test_official_classes_are_complete(folders):
    counts = {
        ("ade20k", "semantic"): (150, 100),
        ("ade20k", "instance"): (100, 100),
        ("ade20k", "panoptic"): (150, 100),
        ("cityscapes", "semantic"): (19, 8),
        ("cityscapes", "instance"): (8, 8),
        ("cityscapes", "panoptic"): (19, 8),
    }
    for (name, task), expected in counts.items():
        reader = open_reader(folders, name, task=task)
        assert (len(reader.id2label), len(reader.thing_ids)) == expected
    labels = json.loads(Path("conversion/labels/cityscapes_19.json").read_text())["classes"]
    reader = open_reader(folders, "cityscapes", task="semantic")
    assert [entry["name"] for entry in labels] == list(reader.id2label.values())


# ---------------------------------------------------------------------------------------------------------------------
# Official files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FORMATS)
def test_ground_truth_in_the_official_form_reads_back_equal(folders, tmp_path, name, task):
    if name == "yolo" and task != "instance":
        pytest.skip("its objects overlap, and maps have one value a pixel")
    assert_reads_back_equal(open_reader(folders, name, task=task), task, tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_digit_scenes_in_the_official_form_read_back_equal(tmp_path, task):
    scenes = DigitScenes("train", task=task, preset="hard", image_size=64, num_images=3)
    assert_reads_back_equal(scenes, task, tmp_path)


def test_objects_that_overlap_read_back_equal(tmp_path):
    assert_reads_back_equal(coco(tmp_path), "instance", tmp_path / "official")


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def first_of_batch(rows):
    return rows[0]


@pytest.mark.parametrize("name", ["coco_instances", "coco_panoptic", "class_index"])
def test_workers_of_a_loader_read_the_same_rows(folders, name):
    reader = open_reader(folders, name, "parts")
    loader = DataLoader(reader, batch_size=1, num_workers=2, collate_fn=first_of_batch)
    for row, other in zip(reader, loader, strict=True):
        assert row["image_id"] == other["image_id"]
        assert row["image"].tobytes() == other["image"].tobytes()
        np.testing.assert_array_equal(row["mask_labels"], other["mask_labels"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_is_small_when_it_is_pickled_and_reads_the_same(folders, name):
    reader = open_reader(folders, name, "parts", task="semantic")
    data = pickle.dumps(reader)
    assert len(data) < 30_000, "no list of files, no masks"
    again = pickle.loads(data)
    np.testing.assert_array_equal(again[-1]["mask_labels"], reader[-1]["mask_labels"])


@pytest.mark.parametrize("name", FORMATS)
def test_the_index_knows_sizes_and_the_end(folders, name):
    reader = open_reader(folders, name)
    assert [reader.size(number) for number in range(len(reader))] == [SIZE] * len(reader)
    assert reader[-1]["image_id"] == reader[len(reader) - 1]["image_id"]
    for number in (len(reader), -len(reader) - 1):
        with pytest.raises(IndexError, match=f"of {len(reader)}"):
            reader[number]


def test_an_index_is_made_once_and_anew_when_the_files_change(tmp_path, monkeypatch):
    write_coco_instances(make_scenes(), tmp_path / "coco")
    options = {"path": str(tmp_path / "coco"), "cache_dir": str(tmp_path / "cache")}
    first = CocoInstances("train", **options)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_index", lambda *_: pytest.fail("made again"))
        again = CocoInstances("train", **options)
    assert again.index.cache_files == first.index.cache_files
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:-1]
    save_json(content, file)
    changed = CocoInstances("train", **options)
    counts = [sum(len(entry["segments"]) for entry in one.index) for one in (first, changed)]
    assert counts[1] == counts[0] - 1
    assert not list((tmp_path / "cache").glob(".*-*/")), "nothing half done remains"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    write_coco_instances(make_scenes(), tmp_path / "coco")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"index of the data set cannot be written into .*file/cache.*`cache_dir`"):
        CocoInstances("train", path=str(tmp_path / "coco"), cache_dir=str(tmp_path / "file" / "cache"))


# ---------------------------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["folder", "archive", "parts"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_detected(folders, name, storage):
    path = folders / storage / name
    path = path / "all.zip" if storage == "archive" else path
    assert detect_format(path) == name
    row = load_segmentation_dataset(
        "auto", "train", path=str(path), cache_dir=str(folders / "cache"), **OPTIONS.get(name, {})
    )[0]
    assert row["mask_labels"].shape[1:] == SIZE


def test_the_task_decides_between_both_forms_of_coco(tmp_path):
    write_coco_instances(make_scenes(), tmp_path)
    write_coco_panoptic(make_scenes(), tmp_path)
    assert detect_format(tmp_path, "instance") == "coco_instances"
    assert detect_format(tmp_path, "panoptic") == "coco_panoptic"
    with pytest.raises(FileError, match="Say which: 'coco_panoptic' or 'coco_instances'"):
        detect_format(tmp_path)
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    assert isinstance(load_segmentation_dataset("auto", "train", task="instance", **options), CocoInstances)
    assert isinstance(load_segmentation_dataset("auto", "train", task="panoptic", **options), CocoPanoptic)


def test_an_unknown_folder_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(FileError) as caught:
        detect_format(tmp_path)
    for name in (*FORMATS, "hub", "notes.md"):
        assert name in str(caught.value)
    with pytest.raises(FileError, match=r"nowhere is missing. Expected a folder"):
        detect_format(tmp_path / "nowhere")


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match=r"coco_instances has no option 'pth'\. Its options: task, path"):
        load_segmentation_dataset("coco_instances", "train", pth="x")
    with pytest.raises(ValueError, match="coco_panoptic needs the option 'path'"):
        load_segmentation_dataset("coco_panoptic", "train")
    with pytest.raises(ValueError, match="'auto' needs the option 'path'"):
        load_segmentation_dataset("auto", "train")
    with pytest.raises(ValueError, match="Unknown data set 'coco'"):
        load_segmentation_dataset("coco", "train")


@pytest.mark.parametrize("name", FORMATS)
def test_unknown_splits_and_tasks_are_refused(folders, name):
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', got 'test'"):
        open_reader(folders, name, split="test")
    with pytest.raises(ValueError, match=r"task must be one of .* got 'boxes'"):
        open_reader(folders, name, task="boxes")


# ---------------------------------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------------------------------


def coco(tmp_path, change=lambda content: None, **options):
    """Open a COCO folder whose JSON file was changed."""
    write_coco_instances(make_scenes(overlapping=True), tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    save_json(content, file)
    return CocoInstances("train", path=str(tmp_path / "coco"), cache_dir=str(tmp_path / "cache"), **options)


def test_objects_that_overlap_stay_separate_masks(tmp_path):
    reader = coco(tmp_path)
    scenes = make_scenes(overlapping=True)
    assert max(scene.row["mask_labels"].sum(axis=0).max() for scene in scenes if len(scene.row["mask_labels"])) > 1
    for row, scene in zip(reader, scenes, strict=True):
        np.testing.assert_array_equal(row["mask_labels"], scene.row["mask_labels"])
    assert reader[1]["crowd_labels"].tolist() == [0]
    assert len(reader[2]["mask_labels"]) == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_polygons_are_filled_as_pycocotools_does(tmp_path):
    coco_masks = pytest.importorskip("pycocotools.mask")
    polygons = [
        [3.3, 4.7, 30.2, 6.1, 22.9, 40.5],
        [50.0, 10.0, 60.5, 10.0, 60.5, 20.0, 50.0, 20.0],
        [1.0, 2.0, 3.0, 4.0],
    ]

    def change(content):
        content["annotations"][0]["segmentation"] = polygons

    expected = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons[:2], *SIZE))).astype(bool)
    np.testing.assert_array_equal(coco(tmp_path, change)[0]["mask_labels"][0], expected)


def test_compressed_run_lengths_are_read_too(tmp_path):
    coco_masks = pytest.importorskip("pycocotools.mask")
    masks = make_scenes(overlapping=True)[0].row["mask_labels"]

    def change(content):
        for annotation, mask in zip(content["annotations"], masks, strict=False):
            rle = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}

    np.testing.assert_array_equal(coco(tmp_path, change)[0]["mask_labels"], masks)


def test_annotations_without_a_pixel_are_left_out_and_noted(tmp_path):
    def change(content):
        content["annotations"][0]["segmentation"] = []
        content["annotations"][1]["segmentation"] = {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}

    reader, whole = coco(tmp_path / "some", change), make_scenes(overlapping=True)[0].row
    assert len(reader[0]["mask_labels"]) == len(whole["mask_labels"]) - 2
    assert "2 of" in reader.notes[0]
    assert "7000, 7001" in reader.notes[0]

    def without_masks(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = []

    with pytest.raises(FileError, match="no annotation has a mask"):
        coco(tmp_path / "none", without_masks)


def set_first(key, value, part="annotations"):
    def change(content):
        content[part][0][key] = value

    return change


def copy_first(part):
    def change(content):
        content[part].append(content[part][0])

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_first("category_id", 5), r"instances_train2017.json: annotation 7000 .image 100000. has category 5"),
        (set_first("image_id", 5), "annotation 7000 is for image 5, which is not among the images"),
        (copy_first("annotations"), "`id` 7000 occurs twice in `annotations`"),
        (copy_first("images"), "`id` 100000 occurs twice in `images`"),
        (copy_first("categories"), "`id` 18 occurs twice in `categories`"),
        (
            set_first("segmentation", [[500, 500, 600, 500, 600, 600]]),
            r"annotation 7000 .image 100000. has a mask that cannot be read: it lies outside of the image of 80 x 112",
        ),
        (set_first("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "annotation 7000 .* must be pairs of finite numbers"),
        (
            set_first("segmentation", {"size": list(SIZE), "counts": [1, 2]}),
            "annotation 7000 .*add up to 3, but the image has 80 x 112 = 8960 pixels",
        ),
        (set_first("segmentation", {"size": [9, 9], "counts": [81]}), r"has a mask of size \[9, 9\], but the image is"),
        (
            set_first("segmentation", {"size": list(SIZE), "counts": "~"}),
            "annotation 7000 .* consist of the characters",
        ),
        (set_first("segmentation", {"size": list(SIZE)}), "`counts` must be text or a list"),
        (set_first("file_name", "gone.png", "images"), "gone.png, image 100000, is missing"),
        (set_first("file_name", 5, "images"), "image 100000 has no `file_name`"),
        (set_first("id", "x", "images"), "annotation 7000 is for image 100000"),
    ],
)
def test_mistakes_in_a_json_file_are_named(tmp_path, change, sentence):
    with pytest.raises(FileError, match=sentence):
        coco(tmp_path, change)[0]


def test_an_image_that_is_missing_is_known_from_the_start_and_leaves_the_others_alone(tmp_path):
    reader = coco(tmp_path)
    file = next((tmp_path / "coco").rglob("train_000.png"))
    content = file.read_bytes()
    file.unlink()
    options = {"path": str(tmp_path / "coco"), "cache_dir": str(tmp_path / "cache")}
    again = load_segmentation_dataset("coco_instances", "train", **options)
    assert again.problems == {0: f"{file}, image 100000, is missing."}
    with pytest.raises(FileError, match=r"train_000.png, image 100000, is missing"):
        again[0]
    np.testing.assert_array_equal(again[1]["mask_labels"], reader[1]["mask_labels"])
    file.write_bytes(content)
    assert CocoInstances("train", **options).problems == {}


def test_a_validation_split_with_an_image_that_cannot_be_read_is_refused(tmp_path):
    write_class_index(make_scenes("validation"), tmp_path / "data", "validation")
    one_of(tmp_path / "data" / "images", "*.png").write_bytes(b"broken")
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "ignore_index": 65_535}
    with pytest.raises(FileError, match=r"1 of 3 validation images cannot be read. The first: .*scene 1.png, image"):
        load_segmentation_dataset("class_index", "validation", **options)
    assert len(DATASETS["class_index"]("validation", **options)) == 3


def test_a_file_without_a_single_usable_image_is_refused(tmp_path):
    def change(content):
        for image in content["images"]:
            image["file_name"] = f"gone/{image['file_name']}"

    with pytest.raises(FileError, match=r"gone/train_000.png and the other images that .* lists are nowhere below"):
        coco(tmp_path / "coco", change)
    write_class_index(make_scenes(), tmp_path / "maps")
    for file in (tmp_path / "maps" / "images").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(FileError, match=r"none of 3 images of the train split can be used. The first: .*no image file"):
        DATASETS["class_index"](
            "train", path=str(tmp_path / "maps"), cache_dir=str(tmp_path / "cache"), ignore_index=65_535
        )


def test_images_without_objects_are_left_out_when_asked_for(tmp_path):
    def change(content):
        del content["annotations"][:-1]  # the crowd region of the second image alone
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"].append({**content["annotations"][0], "id": 1, "image_id": 100_000, "iscrowd": 0})

    assert [row["image_id"] for row in coco(tmp_path, change, drop_empty=True)] == [100_000]
    assert len(coco(tmp_path, change)) == 3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["coco_instances", "coco_panoptic"])
def test_the_index_of_coco_knows_the_classes_of_an_image(folders, name, task):
    reader = open_reader(folders, name, task=task)
    expected = [row["class_labels"].tolist() for row in reader]
    assert [reader.classes_of(number) for number in range(3)] == expected
    assert reader.classes_of_all() == expected
    assert not hasattr(open_reader(folders, "class_index"), "classes_of")


def test_broken_json_and_ambiguous_files_are_named(tmp_path):
    coco(tmp_path)
    folder, options = tmp_path / "coco" / "annotations", {"cache_dir": str(tmp_path / "cache")}
    shutil.copy(folder / "instances_train2017.json", folder / "instances_train_mini.json")
    with pytest.raises(FileError, match=r"several JSON files .*`annotations`"):
        CocoInstances("train", path=str(tmp_path / "coco"), **options)
    mini = CocoInstances(
        "train", path=str(tmp_path / "coco"), annotations="annotations/instances_train_mini.json", **options
    )
    assert len(mini) == 3
    (folder / "instances_train_mini.json").write_text('{"images": [')
    with pytest.raises(FileError, match=r"instances_train_mini.json is no valid JSON"):
        CocoInstances(
            "train", path=str(tmp_path / "coco"), annotations="annotations/instances_train_mini.json", **options
        )
    with pytest.raises(FileError, match=r"no JSON file of instances for the validation split: .* word val"):
        CocoInstances("validation", path=str(tmp_path / "coco"), **options)


def test_files_beside_each_other_as_roboflow_writes_them_are_found(tmp_path):
    write_coco_instances(make_scenes(), tmp_path / "a")
    write_coco_instances(make_scenes("validation"), tmp_path / "a", "validation")
    for split, folder in (("train", "train"), ("validation", "valid")):
        (tmp_path / "b").mkdir(exist_ok=True)
        shutil.move(tmp_path / "a" / SPLITS[split][2], tmp_path / "b" / folder)
        file = tmp_path / "a" / "annotations" / f"instances_{SPLITS[split][2]}.json"
        shutil.move(file, tmp_path / "b" / folder / "_annotations.coco.json")
    assert detect_format(tmp_path / "b") == "coco_instances"
    for split in SPLITS:
        reader = CocoInstances(split, path=str(tmp_path / "b"), cache_dir=str(tmp_path / "cache"))
        assert [row["image"].tobytes() for row in reader] == [
            scene.row["image"].tobytes() for scene in make_scenes(split)
        ]


def test_rotation_by_exif_is_never_applied(tmp_path):
    reader = coco(tmp_path)
    file = next((tmp_path / "coco").rglob("train_000.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.asarray(make_scenes()[0].row["image"])
    Image.fromarray(pixels).save(file, exif=exif)
    np.testing.assert_array_equal(np.asarray(reader[0]["image"]), pixels)
    Image.fromarray(pixels.transpose(1, 0, 2)).save(file)
    with pytest.raises(
        FileError, match=r"train_000.png has 112 x 80 pixels .*image 100000 has 80 x 112.* turned by 90"
    ):
        reader[0]


def test_broken_and_missing_images_are_named_when_they_are_read(tmp_path):
    reader = coco(tmp_path)
    file = next((tmp_path / "coco").rglob("train_000.png"))
    for content, sentence in (
        (file.read_bytes()[:200], r"train_000.png, image 100000, cannot be used: it is damaged"),
        (b"no image", r"train_000.png, image 100000, cannot be used: it is no image file"),
    ):
        file.write_bytes(content)
        with pytest.raises(FileError, match=sentence):
            reader[0]
    save_map(np.full(SIZE, 300), file)
    with pytest.raises(FileError, match=r"image 100000, .* more than 8 bits"):
        reader[0]
    file.unlink()
    with pytest.raises(FileError, match=r"train_000.png, image 100000, is missing"):
        reader[0]
    assert reader[1]["image_id"] == 100_001


# ---------------------------------------------------------------------------------------------------------------------
# Panoptic
# ---------------------------------------------------------------------------------------------------------------------


def panoptic(tmp_path, change=lambda content: None):
    write_coco_panoptic(make_scenes(), tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "panoptic_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    save_json(content, file)
    return CocoPanoptic("train", path=str(tmp_path / "coco"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda content: content["annotations"][0]["segments_info"].pop(),
            r"train_000.png shows segment ids .*image 0",
        ),
        (lambda content: content["annotations"][0].update(file_name="gone.png"), r"gone.png is missing"),
        (
            lambda content: content["images"][0].update(height=81),
            r"train_000.png has 80 x 112 .* image 0 .* has 81 x 112",
        ),
        (lambda content: content["images"].pop(0), "image 0 has an annotation, but is not among the `images`"),
        (lambda content: content["categories"][0].pop("isthing"), "category 18 has no `isthing`"),
        (lambda content: content["annotations"].append(content["annotations"][0]), "`image_id` 0 occurs twice"),
        (
            lambda content: content["annotations"][0]["segments_info"].append(
                content["annotations"][0]["segments_info"][0]
            ),
            "image 0 lists segment id 16777215 twice",
        ),
        (
            lambda content: content["annotations"][0]["segments_info"][0].update(category_id=5),
            "image 0, segment 16777215 has category 5",
        ),
    ],
)
def test_mistakes_in_panoptic_files_are_named(tmp_path, change, sentence):
    with pytest.raises(FileError, match=sentence):
        panoptic(tmp_path, change)[0]


def test_a_map_of_another_image_is_refused(tmp_path):
    reader = panoptic(tmp_path)
    save_image(Image.new("RGB", SIZE[::-1]), tmp_path / "coco" / "annotations" / "panoptic_train2017" / "train_000.png")
    with pytest.raises(FileError, match=r"train_000.png shows none of the segments .* image 0. Does it belong to it"):
        reader[0]


def test_panoptic_files_without_images_find_them_by_the_names_of_the_maps(tmp_path):
    reader = panoptic(tmp_path, lambda content: content.pop("images"))
    np.testing.assert_array_equal(reader[0]["mask_labels"], make_scenes()[0].row["mask_labels"])
    assert reader[0]["image"].tobytes() == make_scenes()[0].row["image"].tobytes()
    assert reader.size(0) == SIZE


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


def one_of(folder, pattern):
    return min(folder.rglob(pattern))


@pytest.mark.parametrize(
    ("name", "pattern", "values", "task", "sentence"),
    [
        ("ade20k", "annotations/training/*.png", 151, "semantic", r"has the class 151. ADE20K has 1 to 150"),
        ("cityscapes", "*_labelIds.png", 40, "semantic", r"_labelIds.png .image 'ulm_000000_000019'. has the value 40"),
        ("cityscapes", "*_instanceIds.png", 34_001, "panoptic", "has the value 34001: no label of Cityscapes"),
        ("mapillary_vistas", "instances/*.png", 5 * 256, "panoptic", "has the class 5, but the configuration lists 4"),
        ("class_index", "labels/train/*.png", 8, "semantic", r"has the values \[8\], which are no classes"),
    ],
)
def test_values_that_are_no_classes_are_named_with_their_file(tmp_path, name, pattern, values, task, sentence):
    WRITERS[name](make_scenes(), tmp_path / "data")
    file = one_of(tmp_path / "data", pattern)
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "task": task}
    reader = DATASETS[name]("train", **options, **OPTIONS.get(name, {}))
    save_map(np.full(SIZE, values), file)
    with pytest.raises(FileError, match=sentence) as caught:
        reader[0]
    assert file.name in str(caught.value)


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "mapillary_vistas", "class_index"])
def test_maps_of_another_size_and_missing_maps_are_named(tmp_path, name):
    WRITERS[name](make_scenes(), tmp_path / "data")
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "task": "semantic"}
    options |= OPTIONS.get(name, {})
    reader = DATASETS[name]("train", **options)
    file = reader._file(reader.index[0].get("map") or reader.index[0]["annotations"]).path
    with Image.open(file) as picture:
        cut = np.asarray(picture)[:-1]
    save_map(cut, file)
    with pytest.raises(FileError, match=r"has 80 x 112 pixels .*height x width.* has 79 x 112"):
        reader[0]
    file.write_bytes(b"no image")
    with pytest.raises(FileError, match="it is no image file") as caught:
        reader[0]
    assert file.name in str(caught.value)
    file.unlink()
    with pytest.raises(FileError, match="is missing"):
        reader[0]
    again = DATASETS[name]("train", **options)
    assert list(again.problems) == [0]
    with pytest.raises(FileError, match=rf"image {reader.index[0]['image_id']!r}. has no .*(PNG file|labelIds.png)"):
        again[0]
    assert len(again[1]["mask_labels"])


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "mapillary_vistas", "class_index", "yolo"])
def test_a_broken_image_is_a_problem_of_its_own_until_it_is_mended(tmp_path, name):
    WRITERS[name](scenes_for(name), tmp_path / "data")
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), **OPTIONS.get(name, {})}
    whole = list(DATASETS[name]("train", **{**options, "cache_dir": str(tmp_path / "another cache")}))
    file = next(path for path in sorted((tmp_path / "data").rglob("*.*g")) if {"images", "leftImg8bit"} & {*path.parts})
    content = file.read_bytes()
    file.write_bytes(b"")
    reader = DATASETS[name]("train", **options)
    assert len(reader) == 3
    ((number, sentence),) = reader.problems.items()
    assert file.name in sentence
    with pytest.raises(FileError, match="is no image file"):
        reader[number]
    assert [reader[other]["image_id"] for other in {0, 1, 2} - {number}]
    file.write_bytes(content)
    mended = DATASETS[name]("train", **options)
    assert mended.problems == {}
    np.testing.assert_array_equal(mended[number]["mask_labels"], whole[number]["mask_labels"])


def test_instances_of_another_size_are_refused(tmp_path):
    WRITERS["ade20k"](make_scenes(), tmp_path / "data")
    reader = DATASETS["ade20k"](
        "train", task="instance", path=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")
    )
    file = reader._file(reader.index[0]["annotations_instance"]).path
    save_image(Image.new("RGB", (SIZE[1], SIZE[0] + 1)), file)
    with pytest.raises(FileError, match=r"has 80 x 112 pixels .* has 81 x 112"):
        reader[0]


def test_panoptic_maps_with_a_palette_are_read_by_their_colours(tmp_path):
    reader = panoptic(tmp_path)
    before = reader[0]
    file = reader._file(reader.index[0]["map"]).path
    with Image.open(file) as picture:
        reduced = picture.quantize(256)
        assert len(picture.getcolors()) <= 256, "nothing is lost"
    reduced.save(file)
    np.testing.assert_array_equal(reader[0]["mask_labels"], before["mask_labels"])


def test_greys_saved_as_colours_are_explained(tmp_path):
    write_class_index(make_scenes(), tmp_path / "data")
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "ignore_index": 65_535}
    reader = DATASETS["class_index"]("train", **options)
    save_image(Image.new("RGB", SIZE[::-1], (7, 7, 7)), reader._file(reader.index[0]["map"]).path)
    with pytest.raises(FileError, match=r"has the values \[460551\].* greys that were saved as colours"):
        reader[0]


def test_instances_of_ade20k_lie_over_its_stuff_and_things_without_instance_are_void(tmp_path):
    semantic, instances = np.full(SIZE, 1), np.zeros((*SIZE, 3), dtype=np.uint8)
    semantic[:10] = 8  # a bed, of which the instances know the left half alone
    instances[:10, :50] = (1, 3, 0)
    instances[20:30, 20:30] = (2, 4, 0)  # the second thing, windowpane (9), where the semantic map has wall
    save_image(Image.new("RGB", SIZE[::-1]), tmp_path / "images" / "training" / "a.jpg")
    save_map(semantic, tmp_path / "annotations" / "training" / "a.png")
    save_image(Image.fromarray(instances), tmp_path / "annotations_instance" / "training" / "a.png")
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    row = DATASETS["ade20k"]("train", task="panoptic", **options)[0]
    assert row["class_labels"].tolist() == [0, 7, 8]
    assert row["mask_labels"].sum(axis=(1, 2)).tolist() == [80 * 112 - 10 * 112 - 100, 10 * 50, 100]
    assert row["mask_labels"].sum(axis=0).max() == 1
    assert row["ignore_mask"].sum() == 10 * 62
    row = DATASETS["ade20k"]("train", task="instance", **options)[0]
    assert row["class_labels"].tolist() == [0, 1]
    instances[0, 0] = (2, 3, 0)
    save_image(Image.fromarray(instances), tmp_path / "annotations_instance" / "training" / "a.png")
    with pytest.raises(FileError, match=r"a.png .image 'a'.: instance 3 has pixels of the classes \[1, 2\]"):
        DATASETS["ade20k"]("train", task="instance", **options)[0]


def test_groups_of_cityscapes_are_crowds_and_rare_labels_are_ignored(tmp_path):
    labels = np.full(SIZE, 7)  # road
    labels[:10] = 26  # a group of cars
    labels[10:20] = 26_003
    labels[20:30] = 26_004
    labels[30:40] = 29_000  # a caravan
    labels[40:50] = 3  # out of the picture
    name = "ulm_000000_000019"
    save_image(Image.new("RGB", SIZE[::-1]), tmp_path / "leftImg8bit" / "val" / "ulm" / f"{name}_leftImg8bit.png")
    save_map(labels, tmp_path / "gtFine" / "val" / "ulm" / f"{name}_gtFine_instanceIds.png")
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    row = DATASETS["cityscapes"]("validation", task="panoptic", **options)[0]
    assert row["class_labels"].tolist() == [0, 13, 13]
    assert row["crowd_labels"].tolist() == [13]
    np.testing.assert_array_equal(row["crowd_masks"][0], labels == 26)
    np.testing.assert_array_equal(row["ignore_mask"], (labels == 29_000) | (labels == 3))
    row = DATASETS["cityscapes"]("validation", task="instance", **options)[0]
    assert (row["class_labels"].tolist(), row["crowd_labels"].tolist()) == ([2, 2], [2])


def test_train_ids_of_cityscapes_are_read_where_there_are_no_label_ids(tmp_path):
    write_cityscapes(make_scenes(), tmp_path / "a")
    options = {"task": "semantic", "path": str(tmp_path / "a"), "cache_dir": str(tmp_path / "cache")}
    before = list(DATASETS["cityscapes"]("train", **options))
    for file in (tmp_path / "a").rglob("*_labelIds.png"):
        file.unlink()
    for row, other in zip(before, DATASETS["cityscapes"]("train", **options), strict=True):
        np.testing.assert_array_equal(row["mask_labels"], other["mask_labels"])
        np.testing.assert_array_equal(row["class_labels"], other["class_labels"])
        np.testing.assert_array_equal(row["ignore_mask"], other["ignore_mask"])


def test_the_version_of_vistas_is_the_one_that_is_asked_for(tmp_path):
    scenes = make_scenes()
    write_mapillary(scenes, tmp_path / "data", version="v1.2")
    write_mapillary(scenes[:1], tmp_path / "other", version="v2.0")
    config = json.loads((tmp_path / "other" / "config_v2.0.json").read_text())
    config["labels"][0]["readable"] = "Porcelain"
    save_json(config, tmp_path / "data" / "config_v2.0.json")
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    assert DATASETS["mapillary_vistas"]("train", **options).id2label[0] == "China"
    with pytest.raises(FileError, match=r"no folder training/instances|images have no PNG file"):
        DATASETS["mapillary_vistas"]("train", version="2.0", **options)[0]
    shutil.copytree(tmp_path / "data" / "training" / "v1.2", tmp_path / "data" / "training" / "v2.0")
    assert DATASETS["mapillary_vistas"]("train", version="2.0", **options).id2label[0] == "Porcelain"
    with pytest.raises(ValueError, match=r"version must be one of 1.2, 2.0, got '3'"):
        DATASETS["mapillary_vistas"]("train", version="3", **options)


def test_pixels_of_a_thing_without_a_number_are_a_crowd(tmp_path):
    write_class_index(make_scenes(), tmp_path)
    values, numbers = np.zeros(SIZE, dtype=int), np.zeros(SIZE, dtype=int)
    values[:20] = 300
    values[40:50] = 7
    numbers[:10] = 5
    numbers[35:45] = 5  # the same number on stuff means nothing
    save_map(values, tmp_path / "labels" / "train" / "train_000.png")
    save_map(numbers, tmp_path / "instances" / "train" / "train_000.png")
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "ignore_index": 65_535}
    reader = DATASETS["class_index"]("train", task="panoptic", **options)
    row = next(row for row in reader if row["image_id"] == "train_000")
    assert [reader.id2label[key] for key in row["class_labels"].tolist()] == ["china", "flower", "digit"]
    assert row["mask_labels"].sum(axis=(1, 2)).tolist() == [50 * 112, 10 * 112, 10 * 112]
    assert row["crowd_masks"].sum() == 10 * 112
    assert "ignore_mask" not in row


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"classes": ["a", "b"], "ignore_index": 1}, "class of value 1, which `ignore_index` makes ignored"),
        ({"classes": {"0": "a", "00": "b"}}, "has the value 0 twice"),
        ({"classes": {"x": "a"}}, "Expected an integer `id` and a `name`"),
        ({"classes": []}, "at least one class"),
        ({"classes": "gone.txt"}, r"gone.txt is missing"),
        ({"things": ["dog"]}, "`things` names 'dog', which is no class"),
        ({"labels": "gone"}, "no folder gone, which the option `labels` names"),
        ({"classes": ["a"], "task": "panoptic"}, "does not say whether 'a' is a thing"),
    ],
)
def test_options_of_class_index_folders_are_checked(tmp_path, options, sentence):
    write_class_index(make_scenes(), tmp_path)
    with pytest.raises(FileError, match=sentence):
        DATASETS["class_index"]("train", path=str(tmp_path), cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "china\nflower\n\ndigit\n"),
        ("id2label.json", json.dumps({"0": "china", "1": "flower", "2": "digit"})),
        (
            "labels.json",
            json.dumps(
                {"categories": [{"id": 0, "name": "china"}, {"id": 1, "name": "flower"}, {"id": 2, "name": "digit"}]}
            ),
        ),
    ],
)
def test_names_of_classes_are_read_from_the_usual_files(tmp_path, name, content):
    write_class_index(make_scenes(), tmp_path)
    (tmp_path / "classes.json").unlink()
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(FileError, match="no file with the names of the classes"):
        DATASETS["class_index"]("train", **options)
    (tmp_path / name).write_text(content)
    assert list(DATASETS["class_index"]("train", **options).id2label.values()) == ["china", "flower", "digit"]


def test_two_files_of_one_image_are_refused(tmp_path):
    write_class_index(make_scenes(), tmp_path)
    shutil.copy(tmp_path / "images" / "train" / "train_000.png", tmp_path / "images" / "train" / "train_000.jpg")
    with pytest.raises(FileError, match=r"train_000.jpg and .*train_000.png. An image must have one file"):
        DATASETS["class_index"]("train", path=str(tmp_path), cache_dir=str(tmp_path / "cache"), ignore_index=65_535)


# ---------------------------------------------------------------------------------------------------------------------
# YOLO
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 0.1 0.1 0.5 0.5", r"train_000.txt, line 1 .image 'images/train/train_000'. has a box instead of a polygon"),
        ("0 0.1 0.1 0.5 0.5 0.9", "has 5 numbers after the class"),
        ("0 10 10 50 10 50 50", "has the corners 10 to 50. Expected shares"),
        ("0 0.1 nan 0.5 0.1 0.5 0.5", "has the corners nan"),
        ("car 0.1 0.1 0.5 0.1 0.5 0.5", "must be numbers"),
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "object 1 has the class 7, which is not among the `names`"),
    ],
)
def test_mistakes_in_text_files_are_named_with_their_line(tmp_path, line, sentence):
    WRITERS["yolo"](scenes_for("yolo"), tmp_path)
    (tmp_path / "labels" / "train" / "train_000.txt").write_text(line + "\n")
    reader = DATASETS["yolo"]("train", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    number = (
        reader.index["image_id"].index("images/train/train_000") if hasattr(reader.index["image_id"], "index") else 1
    )
    with pytest.raises(FileError, match=sentence):
        reader[number]


def test_a_polygon_covers_the_pixels_whose_centres_lie_inside(tmp_path):
    save_image(Image.new("RGB", (8, 4)), tmp_path / "images" / "train" / "a.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text(
        "1 0 0 0.5 0 0.5 0.4 0 0.4\n\n0 0.25 0.25 0.75 0.25 0.75 1 0.25 1\n"
    )
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnames: [a, b]\n")
    options = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(FileError, match=r"`train` names ../train/images, but there is no image"):
        DATASETS["yolo"]("train", **options)
    with pytest.raises(FileError, match=r"data.yaml has no `val`"):
        DATASETS["yolo"]("validation", **options)
    (tmp_path / "list.txt").write_text("./images/train/a.png\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [a, b]\n")
    row = DATASETS["yolo"]("train", **options)[0]
    expected = np.zeros((2, 4, 8), dtype=bool)
    expected[0, :2, :4] = True  # the rows' centres are at 0.125, 0.375, ... of the height
    expected[1, 1:, 2:6] = True
    np.testing.assert_array_equal(row["mask_labels"], expected)
    assert row["class_labels"].tolist() == [1, 0]
