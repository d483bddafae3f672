"""The pictures of layer consistency: the plot shows the numbers, the program explains what it cannot plot."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer_hf.layer_consistency import image_layer_consistency
from mpformer_hf.mask_matching import CostWeights
from mpformer_hf.visualization import draw_layers
from training.layer_plot import ResultsError, draw_query, main, make_figure, plot_layer_consistency

SCORES = {
    "levels": 4,
    "mIoU_L": [0.5, 0.6, 0.7],
    "mIoU_L_matched": [0.6, 0.7, 0.8],
    "Util": [0.2, 0.0, 1.0],
    "num_images": 3,
    "num_images_matched": 2,
}
WITHOUT_MATCHES = {**SCORES, "mIoU_L_matched": None, "Util": None, "num_images_matched": 0}
SHORT = {**SCORES, "levels": 2, "mIoU_L": [0.1], "mIoU_L_matched": [0.2], "Util": [0.3]}


def write(folder, scores, **others):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"layer_consistency": scores, **others}))
    return folder


def test_each_panel_has_a_line_for_each_model_with_its_numbers():
    figure = make_figure({"one": SCORES, "short": SHORT})
    keys = ("mIoU_L", "mIoU_L_matched", "Util")
    assert [axes.get_title() for axes in figure.axes] == ["mIoU-L, all queries", "mIoU-L, matched queries", "Util"]
    for axes, key in zip(figure.axes, keys, strict=True):
        assert axes.get_xlabel() == "level i"
        assert axes.get_ylabel()
        one, short = axes.get_lines()
        np.testing.assert_array_equal(one.get_xydata(), [[level, SCORES[key][level]] for level in range(3)])
        np.testing.assert_array_equal(short.get_xydata(), [[0, SHORT[key][0]]])
        assert one.get_color() != short.get_color()
        assert one.get_marker() != short.get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "short"]


def test_a_model_without_matched_queries_has_one_panel_and_a_word_in_the_legend():
    figure = make_figure({"one": WITHOUT_MATCHES})
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 0, 0]
    assert figure.legends[0].get_texts()[0].get_text() == "one (no matched queries)"


def test_a_model_keeps_its_color_where_another_has_no_line():
    figure = make_figure({"one": WITHOUT_MATCHES, "two": SCORES})
    assert {axes.get_lines()[-1].get_color() for axes in figure.axes} == {"C1"}


def test_two_dozen_models_have_lines_of_their_own():
    lines = make_figure({str(number): SCORES for number in range(24)}).axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 24


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_scores_give_the_same_file(tmp_path, suffix):
    paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for path in paths:
        plot_layer_consistency({"one": SCORES, "two": WITHOUT_MATCHES}, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[0].read_bytes()) > 5000


def test_program_writes_the_plot_of_files_and_folders(tmp_path, capsys):
    first, second = write(tmp_path / "first", SCORES, PQ=0.5), write(tmp_path / "b=c", WITHOUT_MATCHES)
    output = tmp_path / "plot.png"
    main([f"a={first / 'results.json'}", str(second), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    plot_layer_consistency({"a": SCORES, "b=c": WITHOUT_MATCHES}, tmp_path / "expected.png")
    assert output.read_bytes() == (tmp_path / "expected.png").read_bytes()
    with Image.open(output) as picture:
        assert picture.width > 1500
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "has no 'layer_consistency'. Score the model with --layer-consistency"),
        ({"levels": 4, "Util": None}, "'a' lacks mIoU_L, mIoU_L_matched"),
        ({**SCORES, "levels": None, "mIoU_L": None}, "'a' is of no image"),
        ({**SCORES, "Util": [0.2, 0.0]}, r"Util of 'a' should be 3 numbers in [0, 1], for 4 levels, but is [0.2, 0.0]"),
        ({**SCORES, "mIoU_L": [0.2, 0.0, 1.5]}, "mIoU_L of 'a' should be 3 numbers"),
        ({**SCORES, "mIoU_L": None}, "mIoU_L of 'a' should be 3 numbers"),
        ({**SCORES, "levels": "4"}, "levels of 'a' should be a whole number of at least 2, but is '4'"),
    ],
)
def test_results_that_cannot_be_plotted_end_with_a_sentence(tmp_path, scores, message):
    folder = write(tmp_path / "a", scores)
    with pytest.raises(SystemExit) as stop:
        main([str(folder), "--output", str(tmp_path / "plot.png")])
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["x=empty"], "results.json is not there"),
        (["x=broken.json"], "broken.json is no JSON"),
        (["x=list.json"], "list.json has no 'layer_consistency'"),
        (["x=good", "x=good"], "Two models are called 'x'"),
        (["good", "--output", "plot.bmp"], "plot.bmp should end with one of .png, .svg, .pdf"),
        (["good", "--output", "missing/plot.png"], "missing"),
    ],
)
def test_arguments_that_cannot_be_used_end_with_a_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(Path("good"), SCORES)
    Path("empty").mkdir()
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code


def test_a_plot_needs_a_model(tmp_path):
    with pytest.raises(ResultsError, match="at least one model"):
        plot_layer_consistency({}, tmp_path / "plot.png")


def three_queries():
    """Two levels of 2 x 3 cells: queries 0 and 1 are matched to the segments, which are the left and the right half."""
    mask_logits = torch.full((2, 3, 2, 3), -4.0)
    mask_logits[:, 0, :, 0] = 4  # the same at both levels
    mask_logits[0, 1, 0, 2] = mask_logits[1, 1, :, 2] = 4  # grows from one cell to two
    class_logits = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]]).expand(2, -1, -1)
    mask_labels = np.zeros((2, 16, 24), dtype=bool)
    mask_labels[0, :, :8] = mask_labels[1, :, 16:] = True
    weights = CostWeights(2.0, 5.0, 5.0)
    consistency = image_layer_consistency(class_logits, mask_logits, mask_labels, [0, 0], weights=weights)
    return Image.new("RGB", (24, 16), "blue"), mask_logits, consistency, mask_labels


def test_the_picture_of_a_query_shows_its_masks_and_its_segment():
    image, mask_logits, consistency, mask_labels = three_queries()
    masks = np.zeros((2, 16, 24), dtype=bool)
    masks[0, :8, 16:] = masks[1, :, 16:] = True
    expected = draw_layers(
        image,
        masks,
        title="model a, query 1",
        ground_truth=mask_labels[1],
        next_iou=[0.5],
        notes=["matched to segment 1"] * 2,
    )
    assert draw_query(image, mask_logits, consistency, mask_labels, title="model a").tobytes() == expected.tobytes()


def test_any_query_can_be_drawn_also_without_a_segment():
    image, mask_logits, consistency, mask_labels = three_queries()
    expected = draw_layers(image, np.zeros((2, 16, 24)), title="query 2", next_iou=[1.0], notes=["not matched"] * 2)
    assert draw_query(image, mask_logits, consistency, mask_labels, query=2).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"query in \[0, 3\), got 3"):
        draw_query(image, mask_logits, consistency, mask_labels, query=3)
