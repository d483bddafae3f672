"""What the `evaluate` modules of this folder share: images are scored when they are added, and only their scores are stored.

`evaluate` keeps what is added in an Arrow file for each process, and process 0 reads them all in `compute`. Maps and masks of a
whole data set would fill the disk; one line of JSON an image does not.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from training.metrics.image_scores import ImageId, ImageScores

CITATION = """\
@inproceedings{zhang2023mpformer,
  title     = {{MP-Former}: Mask-Piloted Transformer for Image Segmentation},
  author    = {Zhang, Hao and Li, Feng and Xu, Huaizhe and Huang, Shijia and Liu, Shilong and Ni, Lionel M. and Zhang, Lei},
  booktitle = {CVPR},
  year      = {2023}
}"""


class StreamingMetric(evaluate.Metric, ABC):
    """A metric that scores each image in the process that adds it.

    Load it with `evaluate.load`, whose arguments `num_process`, `process_id` and `experiment_id` say which processes on one file system
    belong together; `compute` returns the scores of all of them in process 0, and `None` in the others. Process 0 waits for the
    slowest one as many seconds as the argument `timeout` says (100). The classes are further arguments of `evaluate.load`, see the
    docstring of the metric.
    """

    DESCRIPTION: ClassVar[str]
    INPUTS: ClassVar[str]
    # Arguments of `evaluate.load` besides those of `evaluate`: what the metric cannot do without, and what it can.
    NEEDED: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        """Take the options of `evaluate.load` and those of the metric."""
        self.options = {name: options.pop(name) for name in tuple(options) if name not in OPTIONS_OF_EVALUATE}
        self._check_options()
        self._added: set[ImageId] = set()
        self._make_scores()  # before anything is added, so that wrong classes are named here
        super().__init__(config_name=config_name, **options)

    def _check_options(self) -> None:
        for name in self.NEEDED:
            if name not in self.options:
                raise ValueError(
                    f"`{name}` is missing. Pass it to evaluate.load, as in evaluate.load(path, {name}=...)."
                )
        unknown = self.options.keys() - {*self.NEEDED, *self.OPTIONAL}
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no such option. Besides those of evaluate, this metric takes "
                f"{', '.join((*self.NEEDED, *self.OPTIONAL))}."
            )

    @abstractmethod
    def _make_scores(self) -> ImageScores:
        """Make an empty collection with the options of this metric."""

    @abstractmethod
    def _score(self, scores: ImageScores, prediction: Any, reference: Mapping[str, Any]) -> None:  # noqa: ANN401
        """Add one image to a collection."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=CITATION,
            inputs_description=self.INPUTS,
            features=datasets.Features({"image": datasets.Value("string")}),
        )

    def add(self, *, prediction: Any = None, reference: Mapping[str, Any] | None = None, **_: Any) -> None:  # noqa: ANN401
        """Score one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None, **_: Any
    ) -> None:
        """Score some images; `predictions` and `references` have one entry for each."""
        if predictions is None or references is None or len(predictions) != len(references):
            lengths = [None if entries is None else len(entries) for entries in (predictions, references)]
            raise ValueError(
                f"Expected one prediction and one reference for each image, got {lengths[0]} predictions and "
                f"{lengths[1]} references."
            )
        scores = self._make_scores()
        for prediction, reference in zip(predictions, references, strict=True):
            image_id = image_id_of(reference)
            if image_id in self._added:
                raise ValueError(f"Image {image_id!r} was added before. Add each image once.")
            self._score(scores, prediction, reference)
        self._added.update(image_id_of(reference) for reference in references)
        super().add_batch(image=scores.dump())

    def compute(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None, **options: Any
    ) -> Any:  # noqa: ANN401
        """Compute the scores of all images that all processes have added; the next image begins anew."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:  # a process without images leaves an empty file, for which process 0 looks
            self.selected_feature_format = self.info.features
            self._init_writer()
        self._added = set()
        return super().compute(**options)

    def _compute(self, *, image: list[str]) -> dict[str, Any]:
        scores = self._make_scores()
        scores.load(image)
        return scores.compute()


OPTIONS_OF_EVALUATE = (
    "keep_in_memory",
    "cache_dir",
    "num_process",
    "process_id",
    "seed",
    "experiment_id",
    "hash",
    "max_concurrent_cache_files",
    "timeout",
)


def image_id_of(reference: Mapping[str, Any]) -> ImageId:
    """Return the id of a reference; ids are integers or text."""
    if not isinstance(reference, Mapping) or "image_id" not in reference:
        raise ValueError(f"Expected a reference with `image_id`, got {type(reference).__name__} {str(reference)[:80]}.")
    image_id = reference["image_id"]
    if isinstance(image_id, str):
        return image_id
    try:
        return operator.index(image_id)  # also of a numpy integer, or of a tensor with one
    except TypeError:
        raise ValueError(f"`image_id` must be an integer or text, got {image_id!r}.") from None


def require_entries(values: Any, names: Sequence[str], what: str) -> None:  # noqa: ANN401 - whatever was passed
    """Refuse what is no mapping with these entries; `what` is for the message."""
    found = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
    if not isinstance(values, Mapping) or not set(names) <= values.keys():
        raise ValueError(f"The {what} must have the entries {', '.join(names)}, got {found}.")
