"""What a model gets wrong, and how far its scores can be trusted: every predicted segment is right or has one reason.

Works on pairs (predicted segment, true segment) of instances, of panoptic segments and of semantic maps; in the last, a
segment is all pixels of a class in an image. Predictions are matched in the order of falling score: each takes the free
true segment of its class with the highest IoU, if that is at least 1/2. What remains gets the first reason that holds:

    ignored        more than half lies on a crowd of its class, or on void: neither right nor wrong
    duplicate      IoU >= 1/2 with a segment of its class that another prediction has taken
    wrong class    IoU >= 1/2 with a segment of another class
    localisation   1/10 <= IoU < 1/2 with a segment of its class
    background     anything else

and a true segment, not crowd, is missed if it is not matched and no wrong class or localisation points at it. These
definitions are ours, after TIDE (Bolya et al., ECCV 2020). What differs: errors are counted, not weighed by the AP that
they cost; a prediction that is badly placed and of the wrong class is background, TIDE has a kind of its own for it; and a
prediction that fits two kinds is a duplicate before it is anything else.

A prediction's outcome depends on none with a lower score. So images are analysed once, and errors at any score threshold
are counts over the predictions above it.

Axes: P predicted segments, T true segments.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from training.metrics.image_scores import ImageId, ImageScores, to_numpy

MATCH_IOU = 0.5
LOCALISATION_IOU = 0.1
MOSTLY = 0.5  # more than this share of a prediction
DEFAULT_THRESHOLD = 0.5
DEFAULT_PRECISION = 0.9
NUM_BINS = 10
ROUNDING = 1e-6  # by which products and quotients of float32 may leave [0, 1]


class Outcome(StrEnum):
    """What became of a segment; the letters are what is kept of an image."""

    CORRECT = "+"
    IGNORED = "i"
    DUPLICATE = "d"
    WRONG_CLASS = "c"
    LOCALISATION = "l"
    BACKGROUND = "b"
    MISSED = "m"


class ImageErrors(TypedDict):
    """What is kept of an image, its predictions in the order of falling score."""

    classes: list[int]  # (P,)
    scores: list[float] | None  # (P,)
    outcomes: str  # (P,) letters of `Outcome`
    targets: list[int]  # (P,) positions in `objects`; -1 where an outcome points at none
    ious: list[float]  # of the correct ones alone
    objects: list[int]  # classes of the true segments without crowds


@dataclass(frozen=True)
class ErrorCounts:
    """Segments of one class, or of all. Predictions count for the class predicted, `objects` and `missed` for the true one."""

    objects: int = 0  # true segments, without crowds
    correct: int = 0
    wrong_class: int = 0
    localisation: int = 0
    duplicate: int = 0
    background: int = 0
    missed: int = 0
    ignored: int = 0

    @property
    def errors(self) -> int:
        """All errors: four kinds of wrong predictions, and the missed segments."""
        return self.wrong_class + self.localisation + self.duplicate + self.background + self.missed


@dataclass(frozen=True)
class Confusion:
    """How often a prediction of one class lay on a segment of another."""

    predicted_class: int
    true_class: int
    count: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions with scores in [lower, upper), the last bin with its end; means are `None` in an empty bin."""

    lower: float
    upper: float
    count: int
    mean_score: float | None
    share_correct: float | None


@dataclass(frozen=True)
class Calibration:
    """How scores compare with the share of predictions that are correct.

    `expected_error` is the mean over the predictions of their bin's |share correct - mean score| (ECE), `None` without any.
    """

    bins: tuple[ReliabilityBin, ...]
    expected_error: float | None

    @property
    def count(self) -> int:
        """Predictions in all bins."""
        return sum(entry.count for entry in self.bins)


@dataclass(frozen=True)
class RecommendedThreshold:
    """The lowest score from which on the wanted precision is met, with precision and recall there; `None` if none does."""

    threshold: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of a data set. Classes are in the order of their ids; `dataclasses.asdict` makes JSON of it.

    `threshold`, `calibration` and the recommended thresholds are `None` for predictions without scores.
    """

    num_images: int
    threshold: float | None
    precision: float
    total: ErrorCounts
    per_class: dict[int, ErrorCounts]
    confusions: tuple[Confusion, ...]  # the most frequent first
    calibration: Calibration | None
    recommended: RecommendedThreshold | None
    recommended_per_class: dict[int, RecommendedThreshold] | None


@dataclass(frozen=True)
class ImageSummary:
    """Errors of one image; `quality` is `None` where there is nothing to find and nothing was predicted."""

    quality: float | None
    counts: ErrorCounts


class ErrorAnalysis(ImageScores[ImageErrors]):
    """Collects images one by one; `compute` sums up their errors, `worst` and `best` rank them.

    >>> analysis = ErrorAnalysis([0, 1])
    >>> analysis.add(
    ...     "a", predicted_classes=[0, 1], scores=[0.9, 0.6], true_classes=[0, 0], ious=[[0.8, 0.0], [0.0, 0.7]]
    ... )
    >>> analysis.compute().total.wrong_class
    1
    """

    def __init__(self, class_ids: Iterable[int]) -> None:
        """Name the classes; predictions and ground truth may hold no other."""
        super().__init__()
        self.class_ids = tuple(sorted(set(class_ids)))

    def settings(self) -> dict[str, Any]:
        """Name the classes."""
        return {"class_ids": self.class_ids}

    def add(
        self,
        image_id: ImageId,
        *,
        predicted_classes: ArrayLike | torch.Tensor,
        scores: ArrayLike | torch.Tensor | None,
        true_classes: ArrayLike | torch.Tensor,
        ious: ArrayLike | torch.Tensor,
        is_crowd: ArrayLike | torch.Tensor | None = None,
        ignored: ArrayLike | torch.Tensor | None = None,
    ) -> None:
        """Analyse one image.

        Args:
            image_id: names the image; each image is added once.
            predicted_classes: integer, (P,).
            scores: (P,), in [0, 1]; `None` if the predictions have none. Then they are matched in the order given.
            true_classes: integer, (T,).
            ious: (P, T), in [0, 1]. In the columns of crowds: intersection / area of the prediction.
            is_crowd: bool, (T,), True for a crowd, which is neither matched nor missed. `None`: there is no crowd.
            ignored: bool, (P,), True for a prediction that lies mostly on void, or on void and crowds together. It counts
                only if it matches. `None`: there is none.
        """
        self.refuse_known(image_id)
        name = f"image {image_id!r}"
        predicted, true = (
            _read_classes(classes, self.class_ids, name) for classes in (predicted_classes, true_classes)
        )
        values = None if scores is None else _read_fractions(scores, predicted.shape, f"the scores of {name}")
        overlaps = _read_fractions(ious, (len(predicted), len(true)), f"the IoUs of {name}")
        crowd = _read_flags(is_crowd, true.shape, f"is_crowd of {name}")
        excused = _read_flags(ignored, predicted.shape, f"ignored of {name}")
        order = np.arange(len(predicted)) if values is None else np.argsort(-values, kind="stable")
        outcomes = assign_outcomes(predicted[order], true, overlaps[order], crowd, excused[order])
        image = ImageErrors(
            classes=predicted[order].tolist(),
            scores=None if values is None else values[order].tolist(),
            outcomes="".join(outcomes.letters.tolist()),
            targets=outcomes.targets.tolist(),
            ious=outcomes.ious[outcomes.letters == Outcome.CORRECT].tolist(),
            objects=true[~crowd].tolist(),
        )
        self.keep(image_id, image)

    def compute(self, *, threshold: float = DEFAULT_THRESHOLD, precision: float = DEFAULT_PRECISION) -> ErrorSummary:
        """Sum up the errors of everything added so far.

        Args:
            threshold: predictions with a lower score are left out of the error counts, in [0, 1]. Calibration and
                recommended thresholds are about all predictions.
            precision: share of correct predictions that a recommended threshold shall reach, in (0, 1].
        """
        _require_fraction("threshold", threshold)
        _require_fraction("precision", precision, above_zero=True)
        images = [image for _, image in self.in_order()]
        counts: dict[int, Counter[str]] = defaultdict(Counter)
        confused: Counter[tuple[int, int]] = Counter()
        for image in images:
            for class_id, name in _segments(image, threshold):
                counts[class_id][name] += 1
            confused.update(_confusions(image, threshold))
        per_class = {class_id: ErrorCounts(**counts[class_id]) for class_id in self.class_ids}
        has_scores = self._has_scores()
        scored = _ScoredPredictions.of(images) if has_scores else None
        return ErrorSummary(
            num_images=len(images),
            threshold=threshold if has_scores else None,
            precision=precision,
            total=ErrorCounts(**sum(counts.values(), Counter())),
            per_class=per_class,
            confusions=tuple(
                Confusion(*pair, count)
                for pair, count in sorted(confused.items(), key=lambda item: (-item[1], item[0]))
            ),
            calibration=scored and calibrate(scored.scores, scored.is_correct),
            recommended=scored and scored.recommend(sum(entry.objects for entry in per_class.values()), precision),
            recommended_per_class=scored
            and {
                class_id: scored.of_class(class_id).recommend(entry.objects, precision)
                for class_id, entry in per_class.items()
            },
        )

    def summarise(self, image_id: ImageId, *, threshold: float = DEFAULT_THRESHOLD) -> ImageSummary:
        """Sum up the errors of one image that was added, over its predictions with at least the score `threshold`."""
        if image_id not in self:
            raise ValueError(f"Image {image_id!r} was not added. Ask for one of the {len(self)} images that were.")
        return _summarise_image(self._scores[image_id], threshold)

    def worst(self, n: int, *, threshold: float = DEFAULT_THRESHOLD) -> list[ImageId]:
        """Name the n images of the lowest quality, the lowest first; among equals, in the order of the ids.

        The quality of an image is the sum of the matches' IoUs / (matches + (wrong predictions + unmatched true segments) / 2)
        over all classes. Images where there is nothing to find and nothing was predicted are not ranked.
        """
        return [image_id for image_id, _ in sorted(self._qualities(threshold), key=lambda entry: entry[1])][:n]

    def best(self, n: int, *, threshold: float = DEFAULT_THRESHOLD) -> list[ImageId]:
        """Name the n images of the highest quality, the highest first; otherwise as `worst`."""
        return [image_id for image_id, _ in sorted(self._qualities(threshold), key=lambda entry: -entry[1])][:n]

    def _qualities(self, threshold: float) -> Iterator[tuple[ImageId, float]]:
        _require_fraction("threshold", threshold)
        for image_id, image in self.in_order():
            quality = _summarise_image(image, threshold).quality
            if quality is not None:
                yield image_id, quality

    def _has_scores(self) -> bool:
        """Whether the predictions have scores; images without predictions do not say."""
        with_scores = [image_id for image_id, image in self.in_order() if image["scores"] is not None]
        without = [image_id for image_id, image in self.in_order() if image["scores"] is None and image["classes"]]
        if with_scores and without:
            raise ValueError(
                f"Image {with_scores[0]!r} has scores and image {without[0]!r} has none. Pass scores for all images, or None "
                "for all."
            )
        return bool(with_scores)


# ---------------------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------------------

FIELD_OF = {
    Outcome.CORRECT: "correct",
    Outcome.IGNORED: "ignored",
    Outcome.DUPLICATE: "duplicate",
    Outcome.WRONG_CLASS: "wrong_class",
    Outcome.LOCALISATION: "localisation",
    Outcome.BACKGROUND: "background",
    Outcome.MISSED: "missed",
}


@dataclass(frozen=True)
class Outcomes:
    """Of P predictions: letters of `Outcome`, position of the true segment that each is about or -1, and IoU with it."""

    letters: NDArray[np.str_]
    targets: NDArray[np.int64]
    ious: NDArray[np.float64]


def assign_outcomes(
    predicted: NDArray[np.int64],
    true: NDArray[np.int64],
    ious: NDArray[np.float64],
    is_crowd: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
) -> Outcomes:
    """Match the predictions (P,) of an image, given in the order in which they choose, and name what the others are.

    Args:
        predicted: classes, (P,).
        true: classes, (T,).
        ious: (P, T), as in `ErrorAnalysis.add`.
        is_crowd: bool, (T,), True for a crowd.
        ignored: bool, (P,), True for a prediction that lies mostly on void.

    Returns:
        Targets are positions among the true segments that are no crowd.
    """
    is_same = predicted[:, None] == true[None, :]
    # A column of zeros more, so that each row has a largest value, also without true segments.
    own, other, crowd = (
        np.pad(np.where(mask, ious, 0.0)[:, columns], ((0, 0), (0, 1)))
        for mask, columns in ((is_same, ~is_crowd), (~is_same, ~is_crowd), (is_same, is_crowd))
    )
    matched = match_in_order(own)
    own_iou, other_iou = own.max(axis=1), other.max(axis=1)
    reasons = [
        (matched >= 0, Outcome.CORRECT, matched),
        (ignored | (crowd.max(axis=1) > MOSTLY), Outcome.IGNORED, np.full_like(matched, -1)),
        (own_iou >= MATCH_IOU, Outcome.DUPLICATE, own.argmax(axis=1)),
        (other_iou >= MATCH_IOU, Outcome.WRONG_CLASS, other.argmax(axis=1)),
        (own_iou >= LOCALISATION_IOU, Outcome.LOCALISATION, own.argmax(axis=1)),
    ]
    conditions = [condition for condition, _, _ in reasons]
    targets = np.select(conditions, [positions for _, _, positions in reasons], default=-1)
    return Outcomes(
        letters=np.select(conditions, [outcome.value for _, outcome, _ in reasons], default=Outcome.BACKGROUND.value),
        targets=targets,
        ious=np.maximum(own, other)[np.arange(len(targets)), targets],  # -1 is the column of zeros
    )


def match_in_order(ious: NDArray[np.float64]) -> NDArray[np.int64]:
    """Let each row (P, T) in turn take the free column with the highest IoU, if that is enough; -1 for the others, (P,)."""
    matched = np.full(len(ious), -1)
    free = ious.copy()
    for row in np.flatnonzero(ious.max(axis=1) >= MATCH_IOU):
        column = free[row].argmax()
        if free[row, column] >= MATCH_IOU:
            matched[row] = column
            free[:, column] = 0.0
    return matched


def _num_kept(image: ImageErrors, threshold: float) -> int:
    """Count the predictions with at least a score: they are the first ones."""
    if image["scores"] is None:
        return len(image["classes"])
    return sum(score >= threshold for score in image["scores"])


def _kept(image: ImageErrors, threshold: float) -> Iterator[tuple[int, str, int]]:
    """Go through class, outcome and target of the predictions with at least a score."""
    kept = _num_kept(image, threshold)
    return zip(image["classes"][:kept], image["outcomes"][:kept], image["targets"][:kept], strict=True)


def _segments(image: ImageErrors, threshold: float) -> Iterator[tuple[int, str]]:
    """Name class and field of `ErrorCounts` of everything that is counted in an image."""
    explained = set()
    for class_id, outcome, target in _kept(image, threshold):
        yield class_id, FIELD_OF[Outcome(outcome)]
        if outcome in {Outcome.CORRECT, Outcome.WRONG_CLASS, Outcome.LOCALISATION}:
            explained.add(target)
    for position, class_id in enumerate(image["objects"]):
        yield class_id, "objects"
        if position not in explained:
            yield class_id, FIELD_OF[Outcome.MISSED]


def _confusions(image: ImageErrors, threshold: float) -> Iterator[tuple[int, int]]:
    """Name predicted and true class of each prediction of the wrong class."""
    for class_id, outcome, target in _kept(image, threshold):
        if outcome == Outcome.WRONG_CLASS:
            yield class_id, image["objects"][target]


def _summarise_image(image: ImageErrors, threshold: float) -> ImageSummary:
    counts = ErrorCounts(**Counter(name for _, name in _segments(image, threshold)))
    wrong = counts.errors - counts.missed
    denominator = counts.correct + (wrong + counts.objects - counts.correct) / 2
    ious = math.fsum(image["ious"][: counts.correct])
    return ImageSummary(ious / denominator if denominator else None, counts)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ScoredPredictions:
    """Predictions of all images that are not ignored: classes, scores, and whether they are correct, all (n,)."""

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    is_correct: NDArray[np.bool_]

    @classmethod
    def of(cls, images: Sequence[ImageErrors]) -> "_ScoredPredictions":
        classes = np.array([class_id for image in images for class_id in image["classes"]], dtype=np.int64)
        scores = np.array([score for image in images for score in image["scores"] or []], dtype=np.float64)
        outcomes = np.array(list("".join(image["outcomes"] for image in images)), dtype="<U1")
        counts = outcomes != Outcome.IGNORED
        return cls(classes[counts], scores[counts], outcomes[counts] == Outcome.CORRECT)

    def of_class(self, class_id: int) -> "_ScoredPredictions":
        chosen = self.classes == class_id
        return _ScoredPredictions(self.classes[chosen], self.scores[chosen], self.is_correct[chosen])

    def recommend(self, num_objects: int, precision: float) -> RecommendedThreshold:
        return recommend_threshold(self.scores, self.is_correct, num_objects, precision)


def calibrate(scores: NDArray[np.float64], is_correct: NDArray[np.bool_]) -> Calibration:
    """Compare scores (n,) in [0, 1] with what is correct, bool (n,), in bins of equal width."""
    edges = np.arange(1, NUM_BINS) / NUM_BINS
    numbers = np.searchsorted(edges, scores, side="right")  # a score on an edge belongs to the bin above it
    bins = tuple(
        _make_bin(number, scores[numbers == number], is_correct[numbers == number]) for number in range(NUM_BINS)
    )
    gaps = [entry.count * abs(entry.share_correct - entry.mean_score) for entry in bins if entry.count]
    return Calibration(bins, math.fsum(gaps) / len(scores) if len(scores) else None)


def _make_bin(number: int, scores: NDArray[np.float64], is_correct: NDArray[np.bool_]) -> ReliabilityBin:
    count = len(scores)
    return ReliabilityBin(
        lower=number / NUM_BINS,
        upper=(number + 1) / NUM_BINS,
        count=count,
        mean_score=math.fsum(scores.tolist()) / count if count else None,
        share_correct=int(is_correct.sum()) / count if count else None,
    )


def recommend_threshold(
    scores: NDArray[np.float64], is_correct: NDArray[np.bool_], num_objects: int, precision: float
) -> RecommendedThreshold:
    """Find the lowest score such that the predictions with at least that score reach a precision.

    Precision goes up and down as the threshold falls. The lowest threshold is taken, not the first that fails: it keeps the
    most predictions.

    Args:
        scores: (n,), in any order.
        is_correct: bool, (n,), True for a match.
        num_objects: true segments, for the recall.
        precision: in (0, 1].
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    num_correct = np.cumsum(is_correct[order])
    precisions = num_correct / np.arange(1, len(scores) + 1)
    is_last_of_equals = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
    meeting = np.flatnonzero(is_last_of_equals & (precisions >= precision))
    if len(meeting) == 0:
        return RecommendedThreshold()
    last = meeting[-1]
    return RecommendedThreshold(float(ordered[last]), float(precisions[last]), int(num_correct[last]) / num_objects)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _read_classes(values: ArrayLike | torch.Tensor, class_ids: Sequence[int], name: str) -> NDArray[np.int64]:
    classes = to_numpy(values)
    if classes.ndim != 1 or (classes.size and classes.dtype.kind not in "iu"):
        raise ValueError(f"The classes of {name} must be integers (n,), got {classes.dtype} {classes.shape}.")
    unknown = sorted(set(classes.tolist()) - set(class_ids))
    if unknown:
        raise ValueError(
            f"A segment of {name} has class {unknown[0]}, which is not in class_ids. Name all classes there."
        )
    return classes.astype(np.int64)


def _read_fractions(values: ArrayLike | torch.Tensor, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    array = to_numpy(values).astype(np.float64)
    if array.size == 0 and math.prod(shape) == 0:
        array = array.reshape(shape)  # an empty list has one axis
    if array.shape != shape:
        raise ValueError(
            f"Expected {name} to be {shape}, by the predicted and the true segments, got {array.shape}. Pass one for each."
        )
    if not bool(((array >= -ROUNDING) & (array <= 1 + ROUNDING)).all()):  # also false for NaN
        raise ValueError(
            f"Expected {name} in [0, 1], got {array.min()} to {array.max()}. Pass probabilities and ratios."
        )
    return array.clip(0.0, 1.0)


def _read_flags(values: ArrayLike | torch.Tensor | None, shape: tuple[int, ...], name: str) -> NDArray[np.bool_]:
    if values is None:
        return np.zeros(shape, dtype=bool)
    array = to_numpy(values).astype(bool)
    if array.shape != shape:
        raise ValueError(f"Expected {name} to be {shape}, one for each segment, got {array.shape}.")
    return array


def _require_fraction(name: str, value: float, *, above_zero: bool = False) -> None:
    if not 0 <= value <= 1 or (above_zero and value == 0):
        raise ValueError(f"Expected {name} in {'(' if above_zero else '['}0, 1], got {value}. Pass a fraction.")
