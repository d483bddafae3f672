"""Data sets of `datasets`: saved on disk and streamed from Parquet files, with masks in every form."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.data_folders import (
    NAMES,
    SIZE,
    assert_reads_back_equal,
    known_segments,
    make_scenes,
    runs_of,
    segments_of,
)
from training.augmentation import Augmentation
from training.broken_images import BrokenImages
from training.compact_batches import pack_batch
from training.data import TASKS, detect_format, load_segmentation_dataset
from training.official_files import FileError
from training.streaming_rows import KeptRows, StreamedRows, StreamOrder, is_stream

VALUES = (300, 0, 7)  # in the columns, of digit, china and flower
CLASSES = [{"id": value, "name": name, "isthing": value == 300} for value, name in zip(VALUES, NAMES, strict=True)]
FORMS = ("class_index", "class_instance", "panoptic", "runs", "pictures", "arrays")
VOID_VALUE = 65_535
IMAGES, PICTURES = datasets.Image(), datasets.List(datasets.Image())
SEGMENTS = datasets.List(
    {"id": datasets.Value("int64"), "category_id": datasets.Value("int64"), "iscrowd": datasets.Value("int64")}
)
RUNS = datasets.List({"size": datasets.List(datasets.Value("int64")), "counts": datasets.List(datasets.Value("int64"))})
ARRAYS = datasets.List(datasets.Array2D(SIZE, "bool"))


def as_colours(ids):
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8))


def class_index_columns(row):
    values, numbers = np.full(SIZE, VOID_VALUE, dtype=np.uint16), np.zeros(SIZE, dtype=np.int64)
    for number, (mask, class_id, is_crowd) in enumerate(segments_of(row), start=1):
        values[mask] = VALUES[class_id]
        numbers[mask] = 2**16 + number if class_id == 0 and not is_crowd else 0
    return {"mask": (Image.fromarray(values), IMAGES), "numbers": (as_colours(numbers), IMAGES)}


def class_instance_columns(row):
    """Red has values of 8 bits, so 30 stands for 300."""
    colours = np.zeros((*SIZE, 3), dtype=np.uint8)
    for number, (mask, class_id, is_crowd) in enumerate(segments_of(row), start=1):
        colours[mask] = (30, 0, 7)[class_id], 0 if is_crowd else number, 9
    return {"mask": (Image.fromarray(colours), IMAGES)}


def panoptic_columns(row):
    ids, infos = np.zeros(SIZE, dtype=np.int64), []
    for number, (mask, class_id, is_crowd) in enumerate(segments_of(row), start=1):
        ids[mask] = 70_000 * number
        infos.append({"id": 70_000 * number, "category_id": VALUES[class_id], "iscrowd": int(is_crowd)})
    return {"mask": (as_colours(ids), IMAGES), "segments_info": (infos, SEGMENTS)}


def masks_columns(row, form):
    encode, feature = {
        "runs": (lambda mask: {"size": list(SIZE), "counts": runs_of(mask)}, RUNS),
        "pictures": (lambda mask: Image.fromarray(mask.astype(np.uint8) * 255), PICTURES),
        "arrays": (lambda mask: mask, ARRAYS),
    }[form]
    segments = segments_of(row)
    numbers = datasets.List(datasets.Value("int64"))
    return {
        "mask": ([encode(mask) for mask, _, _ in segments], feature),
        "category": ([VALUES[class_id] for _, class_id, _ in segments], numbers),
        "crowd": ([int(is_crowd) for _, _, is_crowd in segments], numbers),
    }


def columns_of(row, form):
    write = {"class_index": class_index_columns, "class_instance": class_instance_columns, "panoptic": panoptic_columns}
    columns = write[form](row) if form in write else masks_columns(row, form)
    return {
        "image": (row["image"], IMAGES),
        "name": (f"image {row['image_id']}", datasets.Value("string")),
        **columns,
    }


def make_table(form, rows):
    columns = [columns_of(row, form) for row in rows]
    features = datasets.Features({name: feature for name, (_, feature) in columns[0].items()})
    return datasets.Dataset.from_dict(
        {name: [entry[name][0] for entry in columns] for name in features}, features=features
    )


def options_of(form, task):
    options = {"classes": CLASSES, "mask_column": "mask", "id_column": "name", "task": task, "ignore_index": VOID_VALUE}
    if form == "class_index":
        return {**options, "instance_column": "numbers", "mask_form": form}
    if form == "class_instance":
        return {**options, "mask_form": form, "classes": [{**entry, "id": min(entry["id"], 30)} for entry in CLASSES]}
    if form == "panoptic":
        return {**options, "mask_form": form}
    return {**options, "mask_form": "masks", "label_column": "category", "crowd_column": "crowd"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each form, as `save_to_disk` writes it."""
    base = tmp_path_factory.mktemp("hub")
    rows = [scene.row for scene in make_scenes()]
    for form in FORMS:
        datasets.DatasetDict({"train": make_table(form, rows)}).save_to_disk(base / form)
    return base


def expected_rows(form, task):
    """Reduce the scenes to what the task reports, from its definition."""
    for scene in make_scenes():
        segments = segments_of(scene.row)
        if form == "class_instance":  # an instance must have a number, which a crowd has not
            segments = [segment for segment in segments if not segment[2]]
        if task == "instance":
            segments = [segment for segment in segments if segment[1] == 0]
        if task == "semantic":
            present = sorted({key for _, key, _ in segments}, key=lambda key: VALUES[key])
            segments = [
                (np.logical_or.reduce([mask for mask, one, _ in segments if one == key]), key, False) for key in present
            ]
        yield scene.row, segments


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_was_saved(saved, form, task):
    data = load_segmentation_dataset("hub", "train", path=str(saved / form), **options_of(form, task))
    number_of = {name: number for number, name in enumerate(NAMES)}
    assert sorted(data.id2label.values()) == (["digit"] if task == "instance" else sorted(NAMES))
    for row, (scene, segments) in zip(data, expected_rows(form, task), strict=True):
        assert row["image_id"] == f"image {scene['image_id']}"
        assert row["image"].tobytes() == scene["image"].tobytes()
        found, crowds = known_segments(row, data.id2label)
        expected = [(NAMES[key], mask.tobytes()) for mask, key, is_crowd in segments if not is_crowd]
        assert sorted(found.elements()) == sorted(expected)
        assert sorted(crowds.elements()) == sorted(
            (NAMES[key], mask.tobytes()) for mask, key, is_crowd in segments if is_crowd
        )
        assert {number_of[data.id2label[key]] for key in row["class_labels"].tolist()} <= set(range(3))
        if form in ("class_index", "panoptic"):
            np.testing.assert_array_equal(row["ignore_mask"], scene["ignore_mask"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["class_index", "class_instance", "panoptic", "runs"])
def test_ground_truth_in_the_official_form_reads_back_equal(saved, tmp_path, form, task):
    data = load_segmentation_dataset("hub", "train", path=str(saved / form), **options_of(form, task))
    assert_reads_back_equal(data, task, tmp_path)


def test_folders_that_datasets_reads_are_detected(saved, parquet):
    assert detect_format(saved / "panoptic") == "hub"
    assert detect_format(parquet) == "hub"


def test_rotation_by_exif_is_not_applied_and_class_labels_name_themselves(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "a.png", exif=exif)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "objects": {
                "polygon": datasets.List(datasets.List(datasets.List(datasets.Value("float64")))),
                "kind": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
            },
        }
    )
    row = {"picture": str(tmp_path / "a.png"), "objects": {"polygon": [[[0, 0, 3, 0, 3, 2, 0, 2]]], "kind": [1]}}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "saved")
    data = load_segmentation_dataset(
        "hub",
        "train",
        task="instance",
        path=str(tmp_path / "saved"),
        image_column="picture",
        mask_form="masks",
        mask_column="objects.polygon",
        label_column="objects.kind",
    )
    assert data.id2label == {0: "cat", 1: "dog"}
    assert data[0]["image"].size == (6, 4)
    assert data[0]["class_labels"].tolist() == [1]
    expected = np.zeros((4, 6), dtype=bool)
    expected[:2, :3] = True
    np.testing.assert_array_equal(data[0]["mask_labels"][0], expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask_column": "gone"}, r"has no column 'gone'. It has image, name, mask, segments_info"),
        ({"classes": CLASSES[1:]}, r"image 'image 0': its segments have the classes \[300\], which are not among"),
        ({"classes": None}, "does not name its classes. Name them with the option `classes`"),
        ({"split_name": "test"}, r"has no split test. It has train"),
    ],
)
def test_mistakes_in_options_are_named(saved, options, sentence):
    with pytest.raises(FileError, match=sentence):
        load_segmentation_dataset(
            "hub", "train", path=str(saved / "panoptic"), **{**options_of("panoptic", "semantic"), **options}
        )[0]


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------

NUM_STREAMED = 10
BROKEN = 6  # position of the row that cannot be read


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Three Parquet files with ten small images, each of one grey level; the mask of one is of another size."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rows = [
        {
            "image": Image.new("RGB", (20, 16), (level,) * 3),
            "label": Image.new("L", (20, 16 if level != BROKEN else 9), 1),
        }
        for level in range(NUM_STREAMED)
    ]
    for number, part in enumerate((rows[:4], rows[4:7], rows[7:])):
        file = folder / "data" / f"train-{number:05d}-of-00003.parquet"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(part, features=features).to_parquet(file)
    return folder


def open_stream(folder):
    return load_segmentation_dataset("hub_stream", "train", path=str(folder), classes=["nothing", "all"])


def level_of(row):
    return row["image"].getpixel((0, 0))[0]


def levels(positions):
    """Read the grey levels without the code under test; a row whose mask is broken has one too."""
    return [int(np.asarray(Image.open(io.BytesIO(one.row.columns["image"]["bytes"])))[0, 0, 0]) for one in positions]


def test_a_stream_reads_the_files_in_order(parquet):
    stream = open_stream(parquet)
    assert is_stream(stream)
    assert stream.id2label == {0: "nothing", 1: "all"}
    read = []
    with pytest.raises(FileError, match=r"image 6: `label` has 9 x 20 pixels .* the image has 16 x 20"):
        read.extend(stream)
    rows = iter(stream)
    assert [level_of(next(rows)) for _ in range(BROKEN)] == list(range(BROKEN))


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(parquet):
    stream = open_stream(parquet)
    positions = list(StreamOrder(stream, 25, seed=3, buffer_size=4))
    assert len(positions) == 25
    assert [(one.epoch, one.position) for one in positions] == [divmod(number, 10) for number in range(25)]
    order = levels(positions)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order[:10] != list(range(10))
    assert order == levels(StreamOrder(open_stream(parquet), 25, seed=3, buffer_size=4))
    assert order != levels(StreamOrder(stream, 25, seed=4, buffer_size=4))


@pytest.mark.parametrize("knows_length", [True, False])
@pytest.mark.parametrize("start", [0, 3, 10, 17])
def test_going_on_reads_what_an_uninterrupted_run_would_have_read(parquet, start, knows_length):
    stream = open_stream(parquet)
    whole = StreamOrder(stream, 22, seed=1, buffer_size=4)
    expected = [(one.epoch, one.position, level) for one, level in zip(whole, levels(whole), strict=True)]
    assert whole.num_images == NUM_STREAMED
    rest = StreamOrder(
        stream, 22, seed=1, start=start, num_images=NUM_STREAMED if knows_length else None, buffer_size=4
    )
    assert len(rest) == 22 - start
    found = [(one.epoch, one.position, level) for one, level in zip(rest, levels(rest), strict=True)]
    assert found == expected[start:]


def load(folder, num_workers):
    stream = open_stream(folder)
    rows = StreamedRows(stream, Augmentation(kind="large_scale_jitter", size=16, color=True), seed=5)
    order = StreamOrder(stream, 20, seed=5, buffer_size=4)
    return list(DataLoader(rows, sampler=order, batch_size=4, num_workers=num_workers, collate_fn=pack_batch))


def test_batches_do_not_depend_on_the_number_of_workers(parquet):
    alone, shared = load(parquet, 0), load(parquet, 2)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert [mask.tolist() for mask in one.mask_bits] == [mask.tolist() for mask in other.mask_bits]
        assert one.skipped == other.skipped
    assert not torch.equal(alone[0].pixels, alone[2].pixels)


def test_a_broken_row_of_a_stream_is_replaced_and_counted_once_in_all_epochs(parquet, capsys):
    broken = BrokenImages(limit=1)
    for batch in load(parquet, 0):
        broken.add(batch.skipped)
    assert len(broken) == 1
    assert "`label` has 9 x 20 pixels" in capsys.readouterr().err
    stream = open_stream(parquet)
    rows = StreamedRows(stream, None, seed=0)
    (position,) = [one for one in StreamOrder(stream, 10, seed=0) if levels([one]) == [BROKEN]]
    assert level_of(rows[position]) == 0, "the first of the stream"


def test_rows_that_are_kept_are_read_by_position(parquet):
    kept = KeptRows(open_stream(parquet), num_images=5)
    assert len(kept) == 5
    assert [level_of(kept[number]) for number in (4, 0, -1)] == [4, 0, 4]
    assert len(KeptRows(open_stream(parquet))) == NUM_STREAMED
    with pytest.raises(IndexError, match="Image 5 of 5"):
        kept[5]


def test_a_saved_data_set_can_be_streamed_too(saved):
    options = options_of("panoptic", "panoptic")
    stream = load_segmentation_dataset("hub_stream", "train", path=str(saved / "panoptic"), **options)
    table = load_segmentation_dataset("hub", "train", path=str(saved / "panoptic"), **options)
    for row, other in zip(stream, table, strict=True):
        assert row["image_id"] == other["image_id"]
        np.testing.assert_array_equal(row["mask_labels"], other["mask_labels"])
