"""Pictures of segmentations: every form of a result gives the same picture, and its words can be read."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from transformers import Mask2FormerImageProcessor

from mpformer_hf import visualization
from mpformer_hf.visualization import (
    DrawnSegment,
    class_palette,
    draw_comparison,
    draw_layers,
    draw_segments,
    segment_color,
)

NAMES = {0: "sky", 1: "boat", 2: "gull"}
GREY = Image.new("RGB", (120, 80), (100, 100, 100))


def three_masks():
    """Disjoint masks (3, 80, 120): the upper half, a square, a small square."""
    masks = np.zeros((3, 80, 120), dtype=bool)
    masks[0, :40] = True
    masks[1, 50:75, 10:40] = True
    masks[2, 55:65, 80:90] = True
    return masks


def all_forms():
    masks = three_masks()
    ids = (masks * np.array([4, 9, 2])[:, None, None]).sum(axis=0)
    infos = [{"id": key, "label_id": label} for key, label in zip((4, 9, 2), (0, 1, 2), strict=True)]
    classes = np.full((80, 120), 255)
    for class_id, mask in enumerate(masks):
        classes[mask] = class_id
    pictures = [Image.fromarray((mask * 255).astype(np.uint8)) for mask in masks]
    return {
        "ground truth": {"mask_labels": masks, "class_labels": np.arange(3)},
        "float ground truth": {"mask_labels": torch.from_numpy(masks).float(), "class_labels": torch.arange(3)},
        "instances": {"masks": torch.from_numpy(masks), "labels": torch.arange(3), "scores": None},
        "panoptic": {"segmentation": torch.from_numpy(ids), "segments_info": infos},
        "panoptic of 16 bits": {"segmentation": ids.astype(np.uint16), "segments_info": infos},
        "binary maps": {"segmentation": torch.from_numpy(masks).int(), "segments_info": infos},
        "semantic": torch.from_numpy(classes),
        "pipeline": [{"label": NAMES[key], "score": None, "mask": picture} for key, picture in enumerate(pictures)],
        "segments": [DrawnSegment(torch.from_numpy(mask), key, NAMES[key]) for key, mask in enumerate(masks)],
    }


@pytest.mark.parametrize("form", all_forms())
def test_every_form_of_the_same_segments_gives_the_same_picture(form):
    expected = draw_segments(GREY, all_forms()["ground truth"], NAMES)
    assert draw_segments(GREY, all_forms()[form], NAMES).tobytes() == expected.tobytes()


def test_scores_are_written_wherever_they_are_given():
    masks = three_masks()[1:]
    scores = [0.873, 0.5]
    infos = [{"id": key, "label_id": key, "score": score} for key, score in zip((1, 2), scores, strict=True)]
    ids = (masks * np.array([1, 2])[:, None, None]).sum(axis=0)
    forms = [
        {"masks": masks, "labels": [1, 2], "scores": torch.tensor(scores)},
        {"segmentation": torch.from_numpy(ids), "segments_info": infos},
        [
            {"label": NAMES[key], "score": score, "mask": Image.fromarray(mask)}
            for key, score, mask in zip((1, 2), scores, masks, strict=True)
        ],
    ]
    for form in forms:
        assert [segment.text for segment in visualization.read_segments(form, NAMES)] == ["boat 0.87", "gull 0.50"]


def test_without_names_the_class_ids_are_written():
    assert [segment.text for segment in visualization.read_segments(all_forms()["panoptic"])] == ["0", "1", "2"]


def test_results_of_transformers_own_processor_can_be_drawn():
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        class_queries_logits=6 * torch.randn(1, 5, 4, generator=generator),
        masks_queries_logits=6 * torch.randn(1, 5, 8, 8, generator=generator),
    )
    processor = Mask2FormerImageProcessor()
    size = [(80, 120)]
    instances = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=size)[0]
    panoptic = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.0, overlap_mask_area_threshold=0.0, target_sizes=size
    )[0]
    semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0]
    assert instances["segments_info"]
    assert panoptic["segments_info"]
    for result in (instances, panoptic, semantic):
        assert ImageChops.difference(draw_segments(GREY, result, NAMES), GREY).getbbox() is not None


def test_masks_are_filled_with_transparent_color_and_have_an_outline_of_full_color():
    mask = three_masks()[1]
    result = {"mask_labels": mask[None], "class_labels": [1]}
    picture = np.asarray(draw_segments(GREY, result, {1: ""}, opacity=0.5)).astype(int)
    rim = mask.copy()
    rim[51:74, 11:39] = False
    assert (picture[rim] == segment_color(1)).all()
    blended = np.array([(100 + part) / 2 for part in segment_color(1)])
    assert np.abs(picture[mask & ~rim] - blended).max() <= 1
    assert (picture[~mask] == 100).all()


def test_pixels_without_a_segment_keep_their_color_except_under_one_label():
    picture = np.asarray(draw_segments(GREY, {"mask_labels": three_masks()[2:], "class_labels": [2]}, NAMES))
    changed = (picture != 100).any(axis=-1) & ~three_masks()[2]
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert np.ptp(rows) < 25, "the label is one line high and close to its segment"
    assert np.ptp(columns) < 50
    assert abs(rows.mean() - 60) < 25
    assert abs(columns.mean() - 85) < 40


@pytest.mark.parametrize("reverse", [False, True])
def test_the_higher_score_lies_on_top_whatever_the_order(reverse):
    masks = torch.zeros(2, 480, 480, dtype=torch.bool)
    masks[0, 40:400, 40:300] = masks[1, 120:300, 100:460] = True
    segments = [DrawnSegment(masks[0], 0, "", 0.9), DrawnSegment(masks[1], 1, "", 0.4)]
    image = Image.new("RGB", (480, 480))
    picture = np.asarray(draw_segments(image, segments[::-1] if reverse else segments, opacity=1.0))
    shared = picture[masks.all(dim=0)]
    assert (shared == segment_color(0)).all(axis=-1).mean() > 0.9, "but for a label"


def test_of_masks_without_score_the_smaller_lies_on_top():
    masks = np.zeros((2, 80, 120), dtype=bool)
    masks[0, 30:50, 30:60] = masks[1, 5:75, 5:115] = True
    picture = np.asarray(
        draw_segments(GREY, {"mask_labels": masks, "class_labels": [0, 1]}, {0: "", 1: ""}, opacity=1.0)
    )
    assert ((picture[masks[0]] == segment_color(0)).all(axis=-1)).mean() > 0.7


@pytest.mark.parametrize("background", ["black", "white", "noise"])
def test_words_are_the_same_on_any_background(background):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (80, 120, 3), dtype=np.uint8)
    image = Image.fromarray(noise) if background == "noise" else Image.new("RGB", (120, 80), background)
    segments = {"masks": three_masks()[2:], "labels": [2], "scores": [0.75]}
    picture, on_grey = (np.asarray(draw_segments(each, segments, NAMES, opacity=1.0)) for each in (image, GREY))
    drawn = (on_grey != 100).any(axis=-1)
    assert drawn.sum() > 500, "a label of nine letters"
    np.testing.assert_array_equal(picture[drawn], on_grey[drawn])
    np.testing.assert_array_equal(picture[~drawn], np.asarray(image)[~drawn])


def test_words_stand_out_from_their_box_in_every_color():
    def luminance(color):
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in np.divide(color, 255)
        ]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for class_id, occurrence in itertools.product(range(256), range(5)):
        color = segment_color(class_id, occurrence)
        low, high = sorted((luminance(color), luminance(visualization._ink_on(color))))
        assert (high + 0.05) / (low + 0.05) > 3, "the ratio that WCAG 2 asks of large text"


def test_labels_of_a_crowd_neither_leave_the_picture_nor_hide_each_other():
    rng = np.random.default_rng(1)
    masks = np.zeros((12, 384, 384), dtype=bool)
    for mask in masks[:-1]:
        top, left = rng.integers(100, 220, 2)
        mask[top : top + 70, left : left + 40] = True
    masks[-1, :, :300] = True
    layout = visualization._LabelLayout(list(masks))
    boxes = [layout.place(number, (60, 20)) for number in range(12)]
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (60, 20)
        assert min(left, top) >= 0
        assert max(right, bottom) <= 384
    for (left, top, right, bottom), (left2, top2, right2, bottom2) in itertools.combinations(boxes, 2):
        assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
    left, top, right, bottom = boxes[-1]
    assert masks[-1, top:bottom, left:right].all(), "a large segment carries its label inside"


def test_a_label_wider_than_the_picture_is_cut_and_one_pixel_can_be_drawn():
    picture = draw_segments(Image.new("RGB", (1, 1)), {"mask_labels": np.ones((1, 1, 1)), "class_labels": [0]}, NAMES)
    assert picture.size == (1, 1)


def test_window_sums_equal_sums_over_slices():
    values = np.random.default_rng(0).random((9, 11))
    rows, columns = np.arange(0, 6, 2), np.arange(0, 8)
    expected = [[values[row : row + 3, column : column + 4].sum() for column in columns] for row in rows]
    np.testing.assert_allclose(visualization._window_sums(values, (rows, columns, 3, 4)), expected)


def test_distances_to_a_mask_equal_a_count_of_free_pixels():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 10:12] = True
    # The window, 2 high and 3 wide, at row 12 leaves rows 9, 10, 11 free; at column 16 columns 12 to 15.
    gap, offset = visualization._distances(mask, (np.array([6, 12]), np.array([9, 16]), 2, 3))
    np.testing.assert_allclose(gap, [[0, 4], [3, 5]])
    np.testing.assert_allclose(offset, np.hypot([[0.0], [6.0]], [[-0.5, 6.5]]))


def test_outline_is_the_rim_of_a_mask_but_not_the_frame_of_the_image():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:4, 1:5] = True
    outline = visualization._outline(mask, 1)
    expected = mask.clone()
    expected[:3, 2:4] = False
    assert torch.equal(outline, expected)


def test_first_two_dozen_class_colors_are_far_apart():
    colors = np.array(class_palette()[:24], dtype=float)
    distances = [np.linalg.norm(one - other) for one, other in itertools.combinations(colors, 2)]
    assert min(distances) > 70
    assert len(set(class_palette())) == 256


def test_segments_of_one_class_have_different_shades():
    shades = np.array([segment_color(3, occurrence) for occurrence in range(5)], dtype=float)
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(shades, 2)) > 20
    assert segment_color(3) == class_palette()[3]
    masks = three_masks()
    picture = np.asarray(draw_segments(GREY, {"mask_labels": masks, "class_labels": [1, 1, 1]}, {1: ""}, opacity=1.0))
    means = [np.median(picture[mask], axis=0) for mask in masks]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(means, 2)) > 20


def test_pipeline_labels_without_a_table_have_their_own_lasting_color():
    entry = {"label": "gull", "score": 0.5, "mask": Image.fromarray(three_masks()[1])}
    segment = visualization.read_segments([entry])[0]
    checksum = 0xFFFFFFFF  # CRC-32 of the name, bit by bit: the same in every process, unlike `hash`
    for byte in b"gull":
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0xEDB88320 if checksum & 1 else 0)
    assert segment.class_id == checksum ^ 0xFFFFFFFF
    assert visualization.read_segments([entry], NAMES)[0].class_id == 2, "with a table, the id of the class"


@pytest.mark.parametrize(("longest_side", "size"), [(None, (120, 80)), (360, (360, 240)), (60, (60, 40))])
def test_pictures_are_enlarged_or_reduced_as_asked(longest_side, size):
    picture = draw_segments(GREY, all_forms()["panoptic"], NAMES, longest_side=longest_side)
    assert (picture.mode, picture.size) == ("RGB", size)


def test_enlarged_masks_keep_their_corners():
    segments = {"mask_labels": three_masks()[1:2], "class_labels": [1]}
    picture = np.asarray(draw_segments(GREY, segments, {1: ""}, longest_side=360, opacity=1.0))
    filled = (picture == segment_color(1)).all(axis=-1)
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (150, 224, 30, 119)


@pytest.mark.parametrize(
    "image",
    [
        GREY.convert("L"),
        GREY.convert("RGBA"),
        np.full((80, 120, 3), 100, dtype=np.uint8),
        torch.full((3, 80, 120), 100, dtype=torch.uint8),
    ],
    ids=["grey", "RGBA", "array", "tensor"],
)
def test_images_of_any_kind_give_the_same_picture(image):
    result = all_forms()["panoptic"]
    assert draw_segments(image, result, NAMES).tobytes() == draw_segments(GREY, result, NAMES).tobytes()


@pytest.mark.parametrize(
    "result",
    [
        [],
        {"mask_labels": np.zeros((0, 80, 120), dtype=bool), "class_labels": np.zeros(0, dtype=np.int64)},
        {"segmentation": torch.full((80, 120), -1), "segments_info": []},
        {"masks": torch.zeros(1, 80, 120, dtype=torch.bool), "labels": [0], "scores": [0.9]},
        torch.full((80, 120), 255),
    ],
    ids=["pipeline", "ground truth", "map", "mask without a pixel", "ignored classes"],
)
def test_nothing_to_draw_leaves_the_image_as_it_is(result):
    assert draw_segments(GREY, result, NAMES).tobytes() == GREY.tobytes()


def test_comparison_shows_each_image_and_its_results_in_one_row():
    images = [GREY, Image.new("RGB", (40, 80), (0, 0, 200))]
    second = {"mask_labels": np.ones((1, 80, 40), dtype=bool), "class_labels": [2]}
    results = [all_forms()["panoptic"], second]
    table = draw_comparison(images, {"ground truth": results, "prediction": [[], second]}, NAMES, panel_size=240)
    panels = [
        [draw_segments(image, each, NAMES, longest_side=240) for each in row]
        for image, row in zip(images, [[[], results[0], []], [[], second, second]], strict=True)
    ]
    assert panels[0][0].size == (240, 160)
    assert panels[1][0].size == (120, 240)
    pixels = np.asarray(table)
    gap = (table.width - 3 * 240) // 4
    bottom = table.height - gap
    for row, height in ((1, 240), (0, 160)):
        for column, panel in enumerate(panels[row]):
            left = gap + column * (240 + gap)
            part = pixels[bottom - height : bottom, left : left + panel.width]
            np.testing.assert_array_equal(part, np.asarray(panel))
        bottom -= height + gap
    for column in range(3):
        title = pixels[: bottom + gap, gap + column * (240 + gap) :][:, :240]
        assert (title < 100).any(), "a title in black"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"mask_labels": np.ones((1, 8, 8)), "class_labels": [0]}, r"Image is 80 x 120 .*\(8, 8\).*target_sizes"),
        ({"mask_labels": np.ones((2, 80, 120)), "class_labels": [0]}, "2 masks, 1 class labels"),
        ({"segmentation": [{"size": [1, 1]}], "segments_info": []}, "segmentation .a map, not run lengths"),
        ({"boxes": []}, r"keys \['boxes'\]"),
        ([{"label": "sky"}], "needs mask and label"),
        ("sky", "Cannot draw str"),
        (torch.zeros(1, 80, 120), "Cannot draw Tensor"),
    ],
)
def test_what_cannot_be_drawn_is_explained(result, message):
    with pytest.raises(ValueError, match=message):
        draw_segments(GREY, result, NAMES)


def test_a_column_needs_one_result_for_each_image():
    with pytest.raises(ValueError, match="'prediction' has 1 results for 2 images"):
        draw_comparison([GREY, GREY], {"prediction": [[]]})


def layer_masks():
    """Masks (3, 80, 120) of three levels: a square, the same shifted by half of it, and nothing."""
    masks = np.zeros((3, 80, 120), dtype=bool)
    masks[0, 20:60, 20:60] = masks[1, 20:60, 40:80] = True
    return masks


def written_lines(monkeypatch):
    """Collect all words that are drawn."""
    lines = []
    original = visualization.ImageDraw.ImageDraw.text

    def text(self, position, words, **options):
        lines.append(words)
        return original(self, position, words, **options)

    monkeypatch.setattr(visualization.ImageDraw.ImageDraw, "text", text)
    return lines


def test_under_each_level_stand_its_overlaps_with_the_segment_and_the_next_level(monkeypatch):
    lines = written_lines(monkeypatch)
    notes = ["matched", "not matched", "matched"]
    draw_layers(GREY, layer_masks(), title="query 4", ground_truth=layer_masks()[0], notes=notes)
    # Two squares of 40 x 40 that share 40 x 20: 800 of 2400 pixels.
    assert lines == [
        *("query 4", "image, segment outlined"),
        *("level 0", "matched", "IoU with segment: 1.00", "IoU with level 1: 0.33"),
        *("level 1", "not matched", "IoU with segment: 0.33", "IoU with level 2: 0.00"),
        *("level 2 (last)", "matched", "IoU with segment: 0.00"),
    ]


def test_without_a_segment_only_the_levels_are_compared_by_the_numbers_given(monkeypatch):
    lines = written_lines(monkeypatch)
    draw_layers(GREY, torch.from_numpy(layer_masks()), next_iou=[0.25, 0.75])
    expected = ["image", "level 0", "IoU with level 1: 0.25", "level 1", "IoU with level 2: 0.75", "level 2 (last)"]
    assert [line for line in lines if line] == expected


def test_two_empty_levels_agree(monkeypatch):
    lines = written_lines(monkeypatch)
    draw_layers(GREY, np.zeros((2, 80, 120), dtype=bool))
    assert "IoU with level 1: 1.00" in lines


def test_each_level_shows_its_own_mask_and_the_outline_of_the_segment_around_it():
    picture = np.asarray(draw_layers(GREY, layer_masks(), ground_truth=layer_masks()[0], panel_size=240)).astype(int)
    # Each panel of a level begins and ends with pale grey; that of the image is darker.
    pale = np.array([round(100 + 0.45 * 155)] * 3)
    is_orange = (picture[..., 0] - picture[..., 2]) > 60
    is_pale = (np.abs(picture - pale) <= 1).all(axis=-1)
    panels = [np.flatnonzero(is_pale[10])[0]]
    panels += [
        column for column, before in itertools.pairwise(np.flatnonzero(is_pale[10])[::-1]) if column - before > 1
    ][::-1]
    areas = [is_orange[:, left : left + 240].sum() for left in panels]
    # Squares twice as large as in the image; the outline, 2 pixels white and 2 black, lies outside of the first.
    assert areas == [80 * 80, 80 * 80 - 4 * 80, 0]
    left = panels[0]
    rows = np.flatnonzero(is_orange[:, left : left + 240].any(axis=1))
    assert (picture[rows[0] - 1, left + 60] == 255).all(), "white around the segment"
    assert (picture[rows[0] - 3, left + 60] == 0).all(), "black around the white"


@pytest.mark.parametrize(("columns", "rows"), [(6, 1), (4, 1), (2, 2), (1, 4)])
def test_levels_that_do_not_fit_into_a_row_go_into_the_next(columns, rows):
    one, several = (draw_layers(GREY, layer_masks(), panel_size=120, columns=number) for number in (4, columns))
    if rows == 1:
        assert several.tobytes() == one.tobytes()
    assert several.width == one.width if rows == 1 else several.width < one.width
    assert several.height > (rows - 0.5) * one.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": np.ones((2, 40, 60))}, r"Expected masks \(levels, 80, 120\).*got \(40, 60\).*enlarge_masks"),
        ({"masks": np.ones((80, 120))}, r"got \(\)"),
        ({"ground_truth": np.ones((1, 80, 120))}, r"got \(1, 80, 120\)"),
        ({"next_iou": [0.5] * 3}, "3 levels but the last.*got 3 and 0"),
        ({"notes": ["a"]}, "3 levels but the last.*got 2 and 1"),
    ],
)
def test_layers_that_cannot_be_drawn_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_layers(GREY, **{"masks": layer_masks(), **arguments})
