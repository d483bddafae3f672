"""`report.html`: the scores of a model, and what it gets wrong, on one page that needs nothing else.

`write_report` fills `report_template.html`. The page holds its pictures, styles and drawings itself and asks no other
machine for anything; it can be read without scripts, which only sort tables. Whatever comes from a data set or a model,
such as names of classes, is escaped.
"""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from training.data import Task
from training.error_analysis import Calibration, ErrorCounts, ErrorSummary, RecommendedThreshold
from training.folders import write_text
from training.metrics.image_scores import ImageId

TEMPLATE = Path(__file__).with_name("report_template.html")
UNDEFINED = "\N{EN DASH}"
LONGEST_SIDE = 1600  # of a picture, in pixels; larger ones are reduced
JPEG_QUALITY = 88
MOST_CONFUSIONS = 10
MANY_ROWS = 15  # a longer table scrolls inside its frame


@dataclass(frozen=True)
class Headline:
    """One score of the whole data set, a fraction; `None`, NaN and negative values are undefined."""

    name: str
    value: float | None
    meaning: str = ""  # a few words below the number


@dataclass(frozen=True)
class ClassScores:
    """A row of the table of scores: fractions in the order of the columns; `None`, NaN and negative values are undefined."""

    class_id: int
    name: str
    kind: str  # "thing" or "stuff"
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class ImageExample:
    """One of the best or worst images.

    `picture` shows it with overlays, for example as `mpformer_hf.visualization.draw_comparison` draws it; `alt` says what is to
    be seen there. `quality` and `counts` are those of `ErrorAnalysis.summarise`.
    """

    image_id: ImageId
    picture: Image.Image
    caption: str = ""
    alt: str = "the image, its ground truth and the prediction, side by side"
    quality: float | None = None
    counts: ErrorCounts | None = None


@dataclass(frozen=True)
class LayerScores:
    """Layer consistency: a plot over the levels, a table with a row for each line in it, perhaps a picture of one query."""

    plot: Image.Image
    columns: tuple[str, ...]  # names of the levels
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]  # (name, fractions in the order of the columns)
    query_picture: Image.Image | None = None
    explanation: str = ""


@dataclass(frozen=True)
class ReportContents:
    """Everything that the page says.

    Fields:
        model: folder or name of the model.
        dataset: name of the data set.
        split: part of the data set.
        task: `"instance"`, `"panoptic"` or `"semantic"`.
        num_images: images that were scored.
        date: day on which they were, as it shall be read.
        versions: name of a package to its version.
        command: what to type to get the same results.
        headlines: scores of the whole data set, the most important one first.
        columns: names of the scores of a class.
        classes: one row a class, in the order in which they are listed.
        errors: `ErrorAnalysis.compute` of the same images; its class ids are named in `classes`.
        worst, best: images in the order of `ErrorAnalysis.worst` and `best`.
        layers: layer consistency, if it was measured.
        notes: further sentences below the headlines, for example which options were on.
    """

    model: str
    dataset: str
    split: str
    task: Task
    num_images: int
    date: str
    versions: Mapping[str, str]
    command: str
    headlines: tuple[Headline, ...]
    columns: tuple[str, ...]
    classes: tuple[ClassScores, ...]
    errors: ErrorSummary
    worst: tuple[ImageExample, ...] = ()
    best: tuple[ImageExample, ...] = ()
    layers: LayerScores | None = None
    notes: tuple[str, ...] = field(default=())


def write_report(path: Path | str, report: ReportContents) -> Path:
    """Write the page; the file is complete whenever it is there.

    Args:
        path: of the file, in a folder that exists.
        report: everything that the page says.

    Returns:
        The path.
    """
    path = Path(path)
    write_text(path, render_report(report))
    return path


def render_report(report: ReportContents) -> str:
    """Make the page: HTML."""
    for row in report.classes:
        if len(row.values) != len(report.columns):
            raise ValueError(
                f"Class {row.class_id} ({row.name!r}) has {len(row.values)} values for {len(report.columns)} columns. Pass one "
                "for each; None is undefined."
            )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "decimals": decimals, "number": number, "words": in_words}
    names = {row.class_id: row.name for row in report.classes}
    return environment.get_template(TEMPLATE.name).render(
        report=report,
        title=f"{report.model} on {report.dataset}, {report.split}: {report.task} segmentation",
        names={class_id: names.get(class_id, f"class {class_id}") for class_id in report.errors.per_class},
        kinds=ERROR_KINDS,
        kind_count=lambda counts, kind: getattr(counts, kind.field),
        share=share,
        ordered_errors=order_by_errors(report.errors),
        most_confusions=MOST_CONFUSIONS,
        many_rows=MANY_ROWS,
        diagram=draw_calibration(report.errors.calibration),
        as_jpeg=as_jpeg,
        as_png=as_png,
        unmet=RecommendedThreshold(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorKind:
    """A field of `ErrorCounts` with its name and definition."""

    field: str
    name: str
    plural: str
    meaning: str


ERROR_KINDS = (
    ErrorKind(
        "missed", "Missed", "missed", "A true segment without match, at which no wrong class or localisation points."
    ),
    ErrorKind(
        "wrong_class", "Wrong class", "of the wrong class", "IoU of at least 0.5 with a true segment of another class."
    ),
    ErrorKind(
        "localisation",
        "Localisation",
        "badly placed",
        "Right class, but an IoU of only 0.1 to 0.5 with the true segment.",
    ),
    ErrorKind(
        "duplicate", "Duplicate", "duplicate", "One more prediction for a true segment that another one has matched."
    ),
    ErrorKind(
        "background", "Background", "on background", "All other predictions: there is no such segment in that place."
    ),
)


def order_by_errors(errors: ErrorSummary) -> list[tuple[int, ErrorCounts]]:
    """List classes with their counts, most errors first; classes that occur nowhere are left out."""
    occurring = [(class_id, counts) for class_id, counts in errors.per_class.items() if counts != ErrorCounts()]
    return sorted(occurring, key=lambda entry: -entry[1].errors)


def in_words(counts: ErrorCounts) -> str:
    """Say what is wrong in an image: `3 of 5 found; 1 missed, 1 duplicate`."""
    errors = [(getattr(counts, kind.field), kind.plural) for kind in ERROR_KINDS]
    listed = ", ".join(f"{count} {name}" for count, name in errors if count)
    return f"{counts.correct} of {counts.objects} found; {listed or 'no errors'}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and pictures
# ---------------------------------------------------------------------------------------------------------------------


def is_defined(value: float | None) -> bool:
    """Whether there is a value: the official tool for instances writes -1 where there is none."""
    return value is not None and math.isfinite(value) and value >= 0


def percent(value: float | None) -> str:
    """Write a fraction in percent, without the sign."""
    return f"{100 * value:.1f}" if is_defined(value) else UNDEFINED


def decimals(value: float | None) -> str:
    """Write a score or threshold in [0, 1]."""
    return f"{value:.3f}" if is_defined(value) else UNDEFINED


def number(value: int) -> str:
    """Write a count, with thin spaces between the thousands."""
    return f"{value:,}".replace(",", "\u202f")


def share(part: int, whole: int) -> float:
    """Divide; nothing of nothing is 0."""
    return part / whole if whole else 0.0


def as_jpeg(picture: Image.Image) -> "EmbeddedPicture":
    """Embed a photograph with overlays."""
    return EmbeddedPicture.of(picture, "jpeg", quality=JPEG_QUALITY, subsampling=0)


def as_png(picture: Image.Image) -> "EmbeddedPicture":
    """Embed a plot, without loss."""
    return EmbeddedPicture.of(picture, "png", optimize=True)


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture as an address that holds it, and its size in pixels."""

    address: str
    width: int
    height: int

    @classmethod
    def of(cls, picture: Image.Image, kind: str, **options: int) -> "EmbeddedPicture":
        """Encode a picture; transparent parts become white."""
        rgba = picture.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        opaque.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = io.BytesIO()
        opaque.save(file, kind, **options)
        return cls(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", *opaque.size)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration diagram
# ---------------------------------------------------------------------------------------------------------------------

PLOT_LEFT, PLOT_TOP, PLOT_SIDE = 46, 12, 280  # of the square that both axes span, in units of the drawing
HISTOGRAM_TOP, HISTOGRAM_HEIGHT = 334, 52


@dataclass(frozen=True)
class CalibrationBar:
    """A bin in units of the drawing: its bar, its point, and its bar in the histogram below; with a text for all."""

    left: float
    width: float
    top: float
    height: float
    point: tuple[float, float]
    count_top: float
    count_height: float
    text: str


@dataclass(frozen=True)
class CalibrationDiagram:
    """Where things are in the diagram; empty bins have no bar."""

    bars: tuple[CalibrationBar, ...]
    ticks: tuple[tuple[str, float, float], ...]  # (text, x, y)
    left: float = PLOT_LEFT
    right: float = PLOT_LEFT + PLOT_SIDE
    top: float = PLOT_TOP
    bottom: float = PLOT_TOP + PLOT_SIDE
    histogram_bottom: float = HISTOGRAM_TOP + HISTOGRAM_HEIGHT


def draw_calibration(calibration: Calibration | None) -> CalibrationDiagram | None:
    """Place the bins: x is the score, y the share of correct predictions, from 0 to 1; below, how many there are."""
    if calibration is None:
        return None
    largest = max(entry.count for entry in calibration.bins)
    bars = []
    for entry in calibration.bins:
        if entry.count:
            left, right = x_of(entry.lower) + 1, x_of(entry.upper) - 1
            top, height = y_of(entry.share_correct), HISTOGRAM_HEIGHT * entry.count / largest
            bars.append(
                CalibrationBar(
                    left=left,
                    width=right - left,
                    top=top,
                    height=y_of(0.0) - top,
                    point=(x_of(entry.mean_score), top),
                    count_top=HISTOGRAM_TOP + HISTOGRAM_HEIGHT - height,
                    count_height=height,
                    text=(
                        f"Scores {entry.lower:.1f} to {entry.upper:.1f}: {number(entry.count)} predictions, mean score "
                        f"{percent(entry.mean_score)} %, correct {percent(entry.share_correct)} %"
                    ),
                )
            )
    ticks = tuple((f"{tick / 5:.1f}", x_of(tick / 5), y_of(tick / 5)) for tick in range(6))
    return CalibrationDiagram(tuple(bars), ticks)


def x_of(fraction: float) -> float:
    """Place a score."""
    return PLOT_LEFT + PLOT_SIDE * fraction


def y_of(fraction: float) -> float:
    """Place a share."""
    return PLOT_TOP + PLOT_SIDE * (1 - fraction)
