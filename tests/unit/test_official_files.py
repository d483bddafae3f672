"""Official files: segment ids as colours, PNG files of every kind, and JSON files that are read with checks."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from training.official_files import (
    FileError,
    InstanceFile,
    PanopticFile,
    class_index_files,
    decode_segment_ids,
    encode_segment_ids,
    open_image,
    read_categories,
    read_class_indices,
    read_json,
)

LARGEST = 256**3 - 1
VOID = -1


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Segment ids as colours
# ---------------------------------------------------------------------------------------------------------------------


def test_segment_id_is_red_and_256_green_and_65536_blue():
    ids = np.array([[0, 255, 256, 65535, 65536, LARGEST, 3 + 256 * 5 + 65536 * 7]])
    expected = [[0, 0, 0], [255, 0, 0], [0, 1, 0], [255, 255, 0], [0, 0, 1], [255, 255, 255], [3, 5, 7]]
    assert np.asarray(encode_segment_ids(ids)).tolist() == [expected]
    assert decode_segment_ids(Image.fromarray(np.array([expected], dtype=np.uint8))).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64, ">i4"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 1)])
def test_ids_survive_a_png_file(tmp_path, shape, dtype):
    ids = np.random.default_rng(0).integers(0, LARGEST + 1, shape).astype(dtype)
    encode_segment_ids(ids).save(tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(decode_segment_ids(image), ids)


def test_views_of_maps_are_encoded_as_they_look():
    ids = np.arange(60).reshape(6, 10) * 1000
    for view in (ids.T, ids[::-1, ::2], np.asfortranarray(ids)):
        np.testing.assert_array_equal(decode_segment_ids(encode_segment_ids(view)), view)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_transparency_and_palette_do_not_change_an_id(mode):
    ids = np.array([[0, 300, 70000], [1, 300, LARGEST]])
    image = encode_segment_ids(ids).convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}))
    if mode == "RGBA":
        image.putalpha(0)
    assert decode_segment_ids(image).tolist() == ids.tolist()


@pytest.mark.parametrize("wrong", [-1, LARGEST + 1])
def test_ids_that_no_colour_can_hold_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"from 0 to 16777215, got {min(wrong, 0)} to {max(wrong, 0)}"):
        encode_segment_ids(np.array([[0, wrong]]))


# ---------------------------------------------------------------------------------------------------------------------
# Class indices
# ---------------------------------------------------------------------------------------------------------------------


def write_classes(path, classes, mode):
    dtype = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16, "1": np.bool_}[mode]
    image = Image.fromarray(np.array(classes, dtype=dtype))
    if mode == "P":
        image = image.convert("L")
        image.putpalette([(7 * number) % 256 for number in range(768)])
    image.save(path)
    with Image.open(path) as written:
        assert written.mode in (mode, "I"), "older Pillow reads 16 bits as I"
    return path


@pytest.mark.parametrize(
    ("mode", "classes"),
    [("L", [[0, 7, 254]]), ("P", [[0, 7, 254]]), ("I;16", [[0, 256, 65535]]), ("1", [[0, 1, 1]])],
)
def test_every_pixel_of_a_class_index_file_is_a_class(tmp_path, mode, classes):
    path = write_classes(tmp_path / "classes.png", classes, mode)
    assert read_class_indices(path, ignore_index=255, void=VOID).tolist() == classes


def write_grey_png(path, rows, bits):
    """Write a grey PNG file of 2 or 4 bits a pixel, which Pillow cannot."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    lines = b""
    for row in rows:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        lines += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_files_of_few_bits_keep_their_classes(tmp_path, bits):
    classes = [list(range(2**bits)), list(range(2**bits))[::-1]]
    write_grey_png(tmp_path / "classes.png", classes, bits)
    assert read_class_indices(tmp_path / "classes.png", ignore_index=255, void=VOID).tolist() == classes


@pytest.mark.parametrize("ignore_index", [0, 255, 65535])
def test_ignored_index_becomes_void(tmp_path, ignore_index):
    path = write_classes(tmp_path / "classes.png", [[0, 7, 255, 65535]], "I;16")
    expected = [VOID if value == ignore_index else value for value in (0, 7, 255, 65535)]
    assert read_class_indices(path, ignore_index, VOID).tolist() == [expected]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_classes(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(FileError, match=rf"colours\.png has {mode} pixels.*pass the panoptic JSON"):
        read_class_indices(tmp_path / "colours.png", 255, VOID)


def test_class_index_files_are_named_by_their_path_in_the_folder(tmp_path):
    (tmp_path / "city").mkdir()
    for name in ("b.png", "a.v2.PNG", "city/c.png", "notes.txt"):
        (tmp_path / name).touch()
    files = class_index_files(tmp_path)
    assert files == {
        "a.v2": tmp_path / "a.v2.PNG",
        "b": tmp_path / "b.png",
        "city/c": tmp_path / "city" / "c.png",
    }


def test_folder_without_png_files_and_no_folder_are_refused(tmp_path):
    with pytest.raises(FileError, match="holds no PNG file"):
        class_index_files(tmp_path)
    with pytest.raises(FileError, match="neither a JSON file nor a folder"):
        class_index_files(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Panoptic files
# ---------------------------------------------------------------------------------------------------------------------

CATEGORIES = [{"id": 4, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]


def write_panoptic(folder, ids, segments, name="truth", **content):
    """Write a panoptic file of one image, 7, whose PNG file is in the folder of the JSON file's name."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    encode_segment_ids(np.array(ids)).save(folder / name / "7.png")
    listed = [{"id": key, "category_id": category_id} for key, category_id in segments]
    annotation = {"image_id": 7, "file_name": "7.png", "segments_info": listed}
    return write_json(
        folder / f"{name}.json", {"annotations": [annotation], "categories": CATEGORIES, "images": [], **content}
    )


def test_panoptic_file_gives_ids_categories_and_maps(tmp_path):
    file = PanopticFile.read_truth(
        write_panoptic(tmp_path, [[0, 300, LARGEST]], [(300, 4), (LARGEST, 9)]), needs_isthing=True
    )
    assert file.png(7) == tmp_path / "truth" / "7.png"
    assert file.segment_map(7).tolist() == [[0, 300, LARGEST]]
    assert file.category_map(7, VOID).tolist() == [[VOID, 4, 9]]
    assert {key: (entry.name, entry.is_thing) for key, entry in file.categories.items()} == {
        4: ("cat", True),
        9: ("sky", False),
    }


@pytest.mark.parametrize("name", ["pred.v2", "pred"])
def test_folder_of_png_files_is_the_path_without_json(tmp_path, name):
    path = write_panoptic(tmp_path, [[1]], [(1, 4)], name)
    assert path.name == f"{name}.json"
    assert PanopticFile.read_predictions(path, categories=None).segment_map(7).tolist() == [[1]]


def test_another_folder_may_be_named(tmp_path):
    path = write_panoptic(tmp_path, [[1]], [(1, 4)])
    (tmp_path / "truth").rename(tmp_path / "maps")
    with pytest.raises(FileError, match=r"truth is no folder. The PNG files of .*truth\.json were expected there"):
        PanopticFile.read_predictions(path, categories=None)
    assert PanopticFile.read_predictions(path, tmp_path / "maps", categories=None).folder == tmp_path / "maps"


def test_category_map_refuses_ids_that_are_not_listed(tmp_path):
    file = PanopticFile.read_predictions(write_panoptic(tmp_path, [[0, 1, 500, 600]], [(1, 4)]), categories=None)
    with pytest.raises(FileError, match=r"7\.png shows segment ids that .*truth\.json .* image 7: \[500, 600\]"):
        file.category_map(7, VOID)


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "LA"])
def test_segment_map_refuses_pixels_without_colours(tmp_path, mode):
    path = write_panoptic(tmp_path, [[1]], [(1, 4)])
    Image.new(mode, (1, 1)).save(tmp_path / "truth" / "7.png")
    file = PanopticFile.read_predictions(path, categories=None)
    with pytest.raises(FileError, match=r"7\.png has .* pixels. Expected colours"):
        file.segment_map(7)


def test_predictions_need_no_categories_of_their_own_but_those_of_the_ground_truth(tmp_path):
    truth = PanopticFile.read_truth(write_panoptic(tmp_path, [[1]], [(1, 4)]), needs_isthing=True)
    path = write_panoptic(tmp_path, [[1]], [(1, 5)], name="predictions", categories=None)
    assert PanopticFile.read_predictions(path, categories=None).category_map(7, VOID).tolist() == [[5]]
    with pytest.raises(FileError, match=r"predictions\.json: image 7, segment 1 has category 5.*ground truth"):
        PanopticFile.read_predictions(path, categories=truth.categories)


@pytest.mark.parametrize("category_id", [-1, 2**31, 10**30])
def test_categories_that_no_map_can_hold_are_refused_without_a_list_too(tmp_path, category_id):
    path = write_panoptic(tmp_path, [[1]], [(1, category_id)])
    with pytest.raises(FileError, match=rf"truth\.json: image 7, segment 1 has category {category_id}\. Expected 0 to"):
        PanopticFile.read_predictions(path, categories=None)


# ---------------------------------------------------------------------------------------------------------------------
# Instance files
# ---------------------------------------------------------------------------------------------------------------------

RLE = {"size": [4, 4], "counts": [2, 3, 11]}


def write_instances(folder, **content):
    annotation = {"id": 1, "image_id": "left", "category_id": 4, "segmentation": RLE, "iscrowd": 0, "area": 3}
    images = [{"id": "left", "height": 4, "width": 4}, {"id": 2, "height": 3, "width": 5}]
    return write_json(
        folder / "truth.json",
        {"images": images, "annotations": [annotation], "categories": [{"id": 4, "name": "cat"}], **content},
    )


def test_instance_file_lists_annotations_and_predictions_by_image(tmp_path):
    file = InstanceFile.read(write_instances(tmp_path))
    assert file.sizes == {"left": (4, 4), 2: (3, 5)}
    assert [annotation["area"] for annotation in file.annotations["left"]] == [3]
    assert file.annotations[2] == []
    result = {"image_id": 2, "category_id": 4, "score": 1, "segmentation": [[0, 0, 2, 0, 2, 2]]}
    predictions = file.read_predictions(write_json(tmp_path / "results.json", [result, {**result, "score": 0.5}]))
    assert [entry["score"] for entry in predictions[2]] == [1, 0.5]
    assert predictions["left"] == []


def test_categories_without_a_name_are_named_by_their_id(tmp_path):
    categories = read_categories({"categories": [{"id": 0}, {"id": 5, "name": "dog"}]}, tmp_path / "truth.json")
    assert [category.name for category in categories.values()] == ["0", "dog"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b'{"annotations": [', "no valid JSON"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "no valid JSON"),
        (b"[" * 200_000, "no valid JSON"),
        (b"9" * 5000, "no valid JSON"),
    ],
    ids=["empty", "cut off", "no text", "nested too deeply", "a number of thousands of digits"],
)
def test_broken_json_is_named(tmp_path, content, message):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(FileError, match=rf"broken\.json is {message}"):
        read_json(tmp_path / "broken.json")


def test_json_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.json cannot be read: No such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_damaged_png_file_is_an_error_that_names_it_or_an_image(tmp_path):
    """Every byte of a small file changed or cut off: PIL's many errors all become one kind."""
    path = tmp_path / "damaged.png"
    encode_segment_ids(np.arange(12).reshape(3, 4) * 999).save(path)
    content = path.read_bytes()
    damaged = [content[:length] for length in range(len(content))]
    damaged += [
        content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :] for place in range(len(content))
    ]
    messages = []
    for data in damaged:
        path.write_bytes(data)
        try:
            open_image(path, "image 7").close()
        except FileError as error:
            messages.append(str(error))
    assert len(messages) > len(damaged) / 2
    assert all(str(path) in message and "image 7" in message for message in messages)


def test_missing_png_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.png is missing: the PNG file of image 7"):
        open_image(tmp_path / "nowhere.png", "image 7")
    with pytest.raises(FileError, match="cannot be read"):
        open_image(tmp_path, "image 7")
