"""The report page, without a browser: well formed, complete, escaped, accessible, and in need of nothing else."""

import base64
import dataclasses
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.report_examples import HOSTILE, LONG, NAMES, empty_report, full_report, small_analysis
from training.error_analysis import ErrorAnalysis, ErrorCounts, calibrate
from training.report import (
    TEMPLATE,
    ImageExample,
    as_jpeg,
    as_png,
    draw_calibration,
    in_words,
    number,
    percent,
    render_report,
    write_report,
)

VOID_ELEMENTS = {"meta", "link", "img", "br"}
MINIMUM_CONTRAST = 4.5
DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """Elements, in order, with attributes and text; complains about tags that are not closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[self.elements[position][0] for position in self.open]}"

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in VOID_ELEMENTS:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        last = self.open.pop()
        assert self.elements[last][0] == tag, f"</{tag}> closes <{self.elements[last][0]}>"

    def handle_data(self, data):
        for position in self.open:
            self.texts[position] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts_of(self, *tags: str) -> list[str]:
        pairs = zip(self.elements, self.texts, strict=True)
        return [" ".join(text.split()) for (name, _), text in pairs if name in tags]

    def rows_of(self, label: str) -> list[list[str]]:
        """Cells of the table inside the region with a label."""
        tags = [name for name, _ in self.elements]
        start = next(n for n, (_, attributes) in enumerate(self.elements) if attributes.get("aria-label") == label)
        table = tags.index("table", start)
        end = tags.index("table", table + 1) if "table" in tags[table + 1 :] else len(tags)
        rows: list[list[str]] = []
        for tag, text in zip(tags[table:end], self.texts[table:end], strict=True):
            if tag == "tr":
                rows.append([])
            elif tag in {"th", "td"}:
                rows[-1].append(" ".join(text.split()))
        return rows


@pytest.fixture(scope="module")
def html():
    return render_report(full_report())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.mark.parametrize("report", [full_report(), full_report(1000), empty_report()], ids=["full", "large", "empty"])
def test_every_tag_is_closed_in_turn_and_ids_are_unique(report):
    html = render_report(report)
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    ids = [attributes["id"] for _, attributes in Page(html).elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_nothing_is_asked_of_another_machine(html, page):
    addresses = [
        attributes[name]
        for _, attributes in page.elements
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href")
        if name in attributes
    ]
    assert len(addresses) > 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|@font-face", html)
    assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    # The only address in the page is a name that the example made up, and that is text.
    assert set(re.findall(r"https?://[\w.]+", html)) == {"https://example.invalid"}


def test_links_lead_to_parts_that_are_there(page):
    ids = {attributes.get("id") for _, attributes in page.elements}
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    assert len(targets) == 8
    assert set(targets) <= ids


def test_all_parts_are_present(html, page):
    assert page.texts_of("h2") == [
        "Scores",
        "Scores per class",
        "What goes wrong",
        "Calibration",
        "Recommended thresholds",
        "Images",
        "Layer consistency",
        "How it was made",
    ]
    (text,) = page.texts_of("body")
    report = full_report()
    for part in (report.dataset, report.split, report.date, "Images1 234", "torch 2.15.0", *report.notes):
        assert part in text
    assert " ".join(report.command.split()) in text
    assert "The levels & what they are." in text
    assert len(page.all("svg")) == 1
    assert len(page.all("img")) == 6  # two worst, two best, the plot, the query
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_layer_consistency_is_left_out_when_it_was_not_measured():
    page = Page(render_report(dataclasses.replace(full_report(), layers=None)))
    assert "Layer consistency" not in page.texts_of("h2")
    assert "#layers" not in [link["href"] for link in page.all("a")]


def test_names_are_text_and_never_markup(page):
    assert len(page.all("script")) == 1
    assert "alert" not in page.texts_of("script")[0]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.texts_of("title")[:1] == [f"outputs/{HOSTILE} on scenes & <more>, validation: panoptic segmentation"]
    names = [row[0] for row in page.rows_of("Scores per class")[1:]]
    assert names == list(NAMES.values())
    assert "Image <b>first</b>, one of the worst: the image" in page.all("img")[0]["alt"]
    assert any("red & <plain>" in caption for caption in page.texts_of("figcaption"))


def test_long_names_can_be_read_in_full(page):
    assert LONG in [name.get("title") for name in page.all("bdi")]


def test_scores_are_percent_with_one_decimal_and_undefined_ones_a_dash(page):
    head, *rows = page.rows_of("Scores per class")
    assert head == ["Class", "Id", "Kind", "PQ", "<SQ>"]
    assert [row[1:] for row in rows] == [
        ["0", "thing", "25.0", "50.0"],
        ["1", "thing", DASH, DASH],
        ["2", "thing", "100.0", DASH],
        ["3", "stuff", "0.0", "12.3"],
    ]
    tiles = [text for text in page.texts_of("li") if text.startswith("PQ")]
    assert tiles == ["PQ61.2 %all classes", "PQ stuff" + DASH]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.4446, "44.5"), (1.0, "100.0"), (0, "0.0"), (-1, DASH), (float("inf"), DASH), (None, DASH)],
)
def test_percent_has_one_decimal(value, expected):
    assert percent(value) == expected


def test_thousands_are_set_apart():
    assert [number(value) for value in (0, 999, 1000, 1234567)] == ["0", "999", "1\u202f000", "1\u202f234\u202f567"]


def test_the_table_of_errors_has_the_counts_with_most_errors_first(page):
    head, *rows = page.rows_of("Errors of each class")
    assert head[2:] == ["Errors", "Missed", "Wrong class", "Localisation", "Duplicate", "Background", "Found", "True"]
    # By hand from `small_analysis`: class 0 has a match, a duplicate, a badly placed one, one on background, and misses one.
    # A prediction of class 1 lies on the segment of class 2; class 3 is right.
    assert rows == [
        ["person", "", "4", "1", "0", "1", "1", "1", "1", "3"],
        [HOSTILE, "", "1", "0", "1", "0", "0", "0", "0", "0"],
        [LONG.strip(), "", "0", "0", "0", "0", "0", "0", "0", "1"],
        ["sky", "", "0", "0", "0", "0", "0", "0", "1", "1"],
    ]
    assert page.rows_of("Classes taken for one another")[1:] == [[LONG, HOSTILE, "1"]]


def test_bars_are_as_long_as_their_share_of_the_class_with_most_errors(page):
    widths = [attributes["style"] for tag, attributes in page.elements if tag == "span" and "style" in attributes]
    # First all errors together, one of each kind of five; then class 0 with four of four, class 1 with one of four.
    assert widths == ["width:20.000%"] * 5 + ["width:25.000%"] * 4 + ["width:25.000%"]
    classes = [attributes["class"] for tag, attributes in page.elements if tag == "span" and "style" in attributes]
    assert classes[5:] == ["missed", "localisation", "duplicate", "background", "wrong_class"]


def test_recommended_thresholds_are_listed_with_precision_and_recall(page):
    head, total, *rows = page.rows_of("Recommended thresholds")
    assert head == ["Class", "Threshold", "Precision, %", "Recall, %", "True"]
    assert total == [
        "One for all classes",
        "0.950",
        "100.0",
        "20.0",
        "5",
    ]  # one of five, all others come after an error
    assert [row[1:] for row in rows] == [
        ["0.950", "100.0", "33.3", "3"],
        [DASH, DASH, DASH, "0"],
        [DASH, DASH, DASH, "1"],
        ["0.450", "100.0", "100.0", "1"],
    ]


def test_calibration_is_drawn_where_the_numbers_are(page):
    # Six predictions: 0.45 right; 0.75 wrong; 0.85, 0.8 wrong; 0.95, 0.9 one right.
    rows = page.rows_of("Calibration")[1:]
    assert rows[4] == ["0.4 to 0.5", "1", "45.0", "100.0"]
    assert rows[8] == ["0.8 to 0.9", "2", "82.5", "0.0"]
    assert rows[9] == ["0.9 to 1.0", "2", "92.5", "50.0"]
    assert rows[0] == ["0.0 to 0.1", "0", DASH, DASH]
    error = (0.55 + 0.75 + 2 * 0.825 + 2 * 0.425) / 6
    assert f"Expected calibration error: {100 * error:.1f} % over 6 predictions" in page.texts_of("body")[0]
    assert len(page.all("circle")) == 4


def test_the_diagram_spans_zero_to_one_on_both_axes():
    scores = np.array([0.0, 0.0, 1.0])
    diagram = draw_calibration(calibrate(scores, np.array([False, False, True])))
    low, high = diagram.bars
    assert low.point == (diagram.left, diagram.bottom)
    assert high.point == (diagram.right, diagram.top)
    assert (high.top, high.height) == (diagram.top, diagram.bottom - diagram.top)
    assert low.count_height == 2 * high.count_height
    assert low.count_top + low.count_height == high.count_top + high.count_height == diagram.histogram_bottom


def test_maps_without_scores_have_neither_diagram_nor_thresholds():
    analysis = ErrorAnalysis(NAMES)
    analysis.add(1, predicted_classes=[0], scores=None, true_classes=[0], ious=[[1.0]])
    page = Page(render_report(dataclasses.replace(full_report(), errors=analysis.compute(), task="semantic")))
    (text,) = page.texts_of("body")
    assert text.count("Semantic maps have no scores: every pixel has its best class.") == 2
    assert "A segment is all pixels of a class in an image. All predictions are counted." in text
    assert not page.all("svg")


def test_empty_data_is_a_page_that_says_so():
    (text,) = Page(render_report(empty_report())).texts_of("body")
    for sentence in (
        "No scores were computed.",
        "There are no classes.",
        "There is no true segment",
        "No image can be",
    ):
        assert sentence in text


def test_long_tables_scroll_inside_their_frame():
    def frames(report):
        return [tag["class"] for tag in Page(render_report(report)).all("div") if "aria-label" in tag]

    assert "scroll long" not in frames(full_report())
    assert frames(full_report(1000))[0] == "scroll long"


def test_the_page_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] and image["loading"] == "lazy" and image["width"] for image in page.all("img"))
    assert {heading.get("scope") for heading in page.all("th")} == {"col", "row"}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(tag.get("tabindex") == "0" for tag in page.all("div") if tag.get("role") == "region")


def luminance(color: str) -> float:
    """Relative luminance of a colour #rrggbb, as WCAG defines it."""
    parts = [int(color[position : position + 2], 16) / 255 for position in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "surface", "head"])
@pytest.mark.parametrize("ink", ["text", "muted", "accent"])
def test_words_stand_out_from_their_ground(scheme, ground, ink):
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[("light", "dark").index(scheme)]))
    lighter, darker = sorted((luminance(colors[ground]), luminance(colors[ink])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= MINIMUM_CONTRAST


def decode(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1])))


def test_pictures_are_embedded_as_they_are(page):
    first, plot = decode(page.all("img")[0]["src"]), decode(page.all("img")[4]["src"])
    assert (first.format, first.size) == ("JPEG", (60, 20))
    assert first.getpixel((30, 10)) == pytest.approx((255, 0, 0), abs=3)
    assert (plot.format, plot.size, plot.getpixel((1, 1))) == ("PNG", (40, 30), (0, 0, 255))


def test_large_pictures_are_reduced_and_transparent_ones_lie_on_white():
    large = as_jpeg(Image.new("L", (3200, 100)))
    assert (large.width, large.height) == decode(large.address).size == (1600, 50)
    clear = as_png(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert decode(clear.address).getpixel((0, 0)) == (255, 255, 255)


def test_errors_of_an_image_are_said_in_words():
    counts = ErrorCounts(objects=5, correct=2, missed=1, wrong_class=2)
    assert in_words(counts) == "2 of 5 found; 1 missed, 2 of the wrong class"
    assert in_words(ErrorCounts(objects=1, correct=1, ignored=3)) == "1 of 1 found; no errors"


def test_captions_name_image_quality_and_errors(page):
    first = page.texts_of("figcaption")[0]
    # One match of IoU 0.9; four wrong predictions and three true segments without match: 0.9 / (1 + 7 / 2).
    assert first.startswith(
        "Image <b>first</b> · quality 20.0 % · 1 of 4 found; 1 missed, 1 of the wrong class, 1 badly"
    )


def test_an_image_without_quality_and_counts_has_its_name_alone():
    example = ImageExample(7, Image.new("RGB", (4, 4)))
    page = Page(render_report(dataclasses.replace(full_report(), worst=(example,))))
    assert page.texts_of("figcaption")[0] == "Image 7"


def test_the_file_is_whole_and_alone_in_its_folder(tmp_path):
    path = write_report(tmp_path / "report.html", full_report())
    assert path.read_text(encoding="utf-8") == render_report(full_report())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    bad = dataclasses.replace(full_report(), columns=("PQ",))
    with pytest.raises(ValueError, match=r"Class 0 \('person'\) has 2 values for 1 columns"):
        write_report(path, bad)
    assert path.read_text() == "old"


def test_equal_contents_make_equal_pages():
    assert render_report(full_report()) == render_report(full_report())


def test_classes_without_scores_are_named_by_their_ids():
    report = dataclasses.replace(full_report(), classes=(), errors=small_analysis().compute())
    assert "class 0" in [row[0] for row in Page(render_report(report)).rows_of("Errors of each class")]
