"""Reports for tests: one with all parts and names that would break a careless page, one with nothing in it."""

from PIL import Image

from training.error_analysis import ErrorAnalysis
from training.report import ClassScores, Headline, ImageExample, LayerScores, ReportContents

HOSTILE = "<script>alert(\"x\")</script> & 'quoted' <img src=https://example.invalid/x.png onerror=alert(1)>"
LONG = "überlanger Name 鳥 " + "x" * 500
NAMES = {0: "person", 1: HOSTILE, 2: LONG, 3: "sky"}


def small_analysis() -> ErrorAnalysis:
    """Two images with one error of each kind: class 3 has no error, class 0 has four."""
    analysis = ErrorAnalysis(NAMES)
    analysis.add(
        "<b>first</b>",
        predicted_classes=[0, 0, 0, 1, 0],
        scores=[0.95, 0.9, 0.85, 0.8, 0.75],
        true_classes=[0, 0, 2, 0],
        ious=[[0.9, 0, 0, 0], [0.8, 0, 0, 0], [0, 0.3, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 0]],
    )
    analysis.add(2, predicted_classes=[3], scores=[0.45], true_classes=[3], ious=[[1.0]])
    return analysis


def full_report(num_classes: int = 4) -> ReportContents:
    """All parts; classes beyond the first four occur nowhere."""
    analysis = small_analysis()
    further = {class_id: f"class {class_id}" for class_id in range(4, num_classes)}
    classes = tuple(
        ClassScores(class_id, name, "stuff" if class_id == 3 else "thing", values)
        for (class_id, name), values in zip(
            (NAMES | further).items(),
            [(0.25, 0.5), (None, -1.0), (1.0, float("nan")), (0.0, 0.12345), *[(0.5, None)] * len(further)],
            strict=True,
        )
    )
    return ReportContents(
        model=f"outputs/{HOSTILE}",
        dataset="scenes & <more>",
        split="validation",
        task="panoptic",
        num_images=1234,
        date="3 March 2025",
        versions={"torch": "2.15.0", "<i>x</i>": "1"},
        command="python -m training.score --model 'a & b' --task panoptic " + "--long-option " * 20,
        headlines=(Headline("PQ", 0.61249, "all classes"), Headline("PQ stuff", None)),
        columns=("PQ", "<SQ>"),
        classes=classes,
        errors=analysis.compute(threshold=0.4, precision=0.9),
        worst=tuple(make_example(analysis, image_id, "red") for image_id in analysis.worst(2, threshold=0.4)),
        best=tuple(make_example(analysis, image_id, "green") for image_id in analysis.best(2, threshold=0.4)),
        layers=LayerScores(
            plot=Image.new("RGB", (40, 30), "blue"),
            columns=("level 1", "level 2"),
            rows=(("mIoU-L", (0.5, 0.75)), ("Util", (None, 1.0))),
            query_picture=Image.new("RGB", (50, 20), "yellow"),
            explanation="The levels & what they are.",
        ),
        notes=("Scores are <means>.",),
    )


def make_example(analysis: ErrorAnalysis, image_id: int | str, color: str) -> ImageExample:
    summary = analysis.summarise(image_id, threshold=0.4)
    picture = Image.new("RGB", (60, 20), color)
    return ImageExample(image_id, picture, caption=f"{color} & <plain>", quality=summary.quality, counts=summary.counts)


def empty_report() -> ReportContents:
    """No classes, no images, no scores."""
    return ReportContents(
        model="",
        dataset="",
        split="",
        task="semantic",
        num_images=0,
        date="",
        versions={},
        command="",
        headlines=(),
        columns=(),
        classes=(),
        errors=ErrorAnalysis([]).compute(),
    )
