"""What a model card states, each statement with its source: records that are checked when they are made.

    model_cards/*.json ── `read_facts` ──┐
    a converted model ── `Conversion` ───┼── `ModelFacts` ── `model_card.render_card`
    a trained model ── `TrainingRecord` ─┘

A number without a source, one that may be a percentage or a fraction, and a field that nobody reads are errors, not
warnings: what is on a card is believed.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Task = Literal["panoptic", "instance", "semantic"]
Origin = Literal["mpformer-release", "mask2former-zoo", "mpformer", "mask2former", "trained"]
LabelEmbedding = Literal["kept", "fresh", "trained", "none"]
TASKS: tuple[Task, ...] = get_args(Task)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
PUBLISHED_ORIGINS = ("mpformer-release", "mask2former-zoo")

PERCENT = 100
# What a repository of the Hub, and one part of its name, may be called.
NAME_LENGTH = 96
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LENGTH - 1}}}")


@dataclass(frozen=True)
class Source:
    """Where a statement comes from: a page that says so, a command that measured it here, or a file beside the card.

    Exactly one of `url`, `command` and `file` is given.
    """

    name: str
    url: str = ""
    command: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        """Check that there is something to look up."""
        if not self.name.strip():
            raise ValueError("A source needs a name, such as the title of a paper.")
        if sum(map(bool, (self.url, self.command, self.file))) != 1:
            raise ValueError(
                f"Expected the source {self.name!r} to have one of a URL (quoted), a command (measured here) and a "
                "file, got "
                f"url={self.url!r}, command={self.command!r} and file={self.file!r}."
            )
        if self.url and not re.fullmatch(r"https?://[^\s<>()|]+", self.url):
            raise ValueError(f"Expected the source {self.name!r} to have an http(s) address, got {self.url!r}.")

    @property
    def is_measured(self) -> bool:
        """True if the statement was measured with this package, False if it is quoted."""
        return bool(self.command)


@dataclass(frozen=True)
class Detail:
    """A line of a table: what it is, what it says, who says so."""

    name: str
    value: str
    source: Source

    def __post_init__(self) -> None:
        """Check that all three are there."""
        require_source(self.source, f"The detail {self.name!r}")
        if not self.name.strip() or not self.value.strip():
            raise ValueError(f"Expected a detail to have a name and a value, got {self.name!r} and {self.value!r}.")


@dataclass(frozen=True)
class Metric:
    """How a score is called: `type` in the front matter, `name` for people."""

    type: str
    name: str


METRICS = {
    "pq": Metric("pq", "PQ"),
    "pq_things": Metric("pq_things", "PQ of things"),
    "pq_stuff": Metric("pq_stuff", "PQ of stuff"),
    "sq": Metric("sq", "SQ"),
    "rq": Metric("rq", "RQ"),
    "ap": Metric("ap", "mask AP"),
    "ap50": Metric("ap50", "mask AP at IoU 0.5"),
    "ap75": Metric("ap75", "mask AP at IoU 0.75"),
    "ap_small": Metric("ap_small", "mask AP of small objects"),
    "ap_medium": Metric("ap_medium", "mask AP of medium objects"),
    "ap_large": Metric("ap_large", "mask AP of large objects"),
    "boundary_ap": Metric("boundary_ap", "boundary AP"),
    "miou": Metric("mean_iou", "mIoU"),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number that a model reached.

    Attributes:
        metric: a key of `METRICS`.
        value: in the unit that `unit` says.
        unit: "percent" (0 to 100) or "fraction" (0 to 1). A percentage in (0, 1] is refused, because it is most often a
            fraction; give it as one.
        task: what was scored.
        dataset: a key of `DATA_SETS`, or the name of a data set that has no entry there.
        split: part of the data set.
        source: who says so.
        note: what sets this score apart from another one of the same metric, such as "multi-scale and flipped".
    """

    metric: str
    value: float
    unit: Literal["percent", "fraction"]
    task: Task
    dataset: str
    split: str
    source: Source
    note: str = ""

    def __post_init__(self) -> None:
        """Check source, metric, unit and range."""
        what = f"The score {self.metric!r} on {self.dataset} {self.split}"
        require_source(self.source, what)
        if self.source.file:
            raise ValueError(
                f"{what} is either quoted from a page or measured by a command, not read in {self.source.file}."
            )
        require_choice("metric", self.metric, METRICS)
        require_choice("unit", self.unit, ("percent", "fraction"))
        require_choice("task", self.task, TASKS)
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"{what} must be a finite number, got {self.value!r}.")
        largest = PERCENT if self.unit == "percent" else 1
        if not 0 <= self.value <= largest:
            raise ValueError(f"{what} must be from 0 to {largest} as a {self.unit}, got {self.value}.")
        if self.unit == "percent" and 0 < self.value <= 1:
            raise ValueError(
                f"{what} is {self.value} percent, which looks like a fraction. If it is one, say so with the unit; if "
                "it is not, "
                f"give the fraction {self.value / PERCENT:g}."
            )
        if not self.dataset or not self.split:
            raise ValueError(f"{what} needs the name of the data set and of its split.")

    @property
    def percent(self) -> float:
        """The value in percent; a quoted percentage keeps its digits."""
        return self.value if self.unit == "percent" else round(PERCENT * self.value, 4)

    @property
    def label(self) -> str:
        """Name of the metric, with the note."""
        name = METRICS[self.metric].name
        return f"{name} ({self.note})" if self.note else name


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Images that a model, or its backbone, learned from.

    Attributes:
        id: short name in the front matter.
        name: what people call it.
        url: its home.
        terms: under which terms it can be had, in our words; empty if they are not known to us.
        terms_source: who says so; with `terms`.
    """

    id: str
    name: str
    url: str = ""
    terms: str = ""
    terms_source: Source | None = None

    def __post_init__(self) -> None:
        """Terms need a source, and the other way round."""
        if bool(self.terms) != (self.terms_source is not None):
            raise ValueError(
                f"Expected the data set {self.name!r} to have its terms together with their source, or neither."
            )


DATA_SETS = {
    "coco": DataSet(
        id="coco",
        name="COCO",
        url="https://cocodataset.org",
        terms="annotations under CC BY 4.0; the images belong to others, and Flickr's terms of use apply to them",
        terms_source=Source("COCO, terms of use", url="https://cocodataset.org/#termsofuse"),
    ),
    "ade20k": DataSet(
        id="ade20k",
        name="ADE20K",
        url="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        terms="images for non-commercial research and education; MIT does not own their copyright",
        terms_source=Source(
            "ADE20K, terms of use", url="https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/index.html"
        ),
    ),
    "cityscapes": DataSet(
        id="cityscapes",
        name="Cityscapes",
        url="https://www.cityscapes-dataset.com",
        terms="non-commercial purposes; models trained on it may be distributed, but they are named among the "
        "derivative works "
        "that may not be used commercially either",
        terms_source=Source("Cityscapes, licence agreement", url="https://www.cityscapes-dataset.com/license/"),
    ),
    "mapillary-vistas": DataSet(
        id="mapillary-vistas", name="Mapillary Vistas", url="https://www.mapillary.com/dataset/vistas"
    ),
    "imagenet-1k": DataSet(
        id="imagenet-1k",
        name="ImageNet-1K",
        url="https://www.image-net.org",
        terms="non-commercial research and education",
        terms_source=Source("ImageNet, terms of access", url="https://www.image-net.org/download.php"),
    ),
    "imagenet-22k": DataSet(
        id="imagenet-22k",
        name="ImageNet-22K",
        url="https://www.image-net.org",
        terms="non-commercial research and education",
        terms_source=Source("ImageNet, terms of access", url="https://www.image-net.org/download.php"),
    ),
}
DATA_SETS["digit_scenes"] = DataSet(
    id="digit_scenes",
    name="digit_scenes",
    url="https://scikit-learn.org/stable/datasets.html",
    terms="drawn from the handwritten digits and the two photographs (CC BY) that scikit-learn brings",
    terms_source=Source(
        "scikit-learn, licences of the photographs",
        url="https://github.com/scikit-learn/scikit-learn/blob/main/sklearn/datasets/images/README.txt",
    ),
)
BACKBONE_DATA_SETS = ("imagenet-1k", "imagenet-22k")


@dataclass(frozen=True)
class Licence:
    """A licence of weights.

    Attributes:
        identifier: of the Hub.
        text: what is to be said about it, with links, in Markdown.
        name, link: what the Hub asks for when the identifier is "other".
    """

    identifier: str
    text: str
    name: str = ""
    link: str = ""


MASK2FORMER = "https://github.com/facebookresearch/Mask2Former"
MPFORMER = "https://github.com/IDEA-Research/MP-Former"

# The one place where it is decided which licence converted weights carry.
LICENCES: dict[Origin, Licence] = {
    "mpformer-release": Licence(
        "cc-by-nc-4.0",
        f"The weights were converted from the release of [MP-Former]({MPFORMER}), which is under CC BY-NC 4.0. "
        "Conversion does not "
        "change that: they, and what is trained from them, are for non-commercial use, and name their authors.",
    ),
    "mpformer": Licence(
        "cc-by-nc-4.0",
        f"The weights were trained with the code of [MP-Former]({MPFORMER}), which is under CC BY-NC 4.0, or start "
        "from its release. "
        "They are passed on under the same licence; whoever trained them may say more.",
    ),
    "mask2former-zoo": Licence(
        "cc-by-nc-4.0",
        "The page of Mask2Former's model zoo puts [the models that it "
        f"lists]({MASK2FORMER}/blob/main/MODEL_ZOO.md#license) under "
        "CC BY-NC 4.0. The repository around it changed from CC BY-NC 4.0 to "
        f"[MIT]({MASK2FORMER}/commit/9b0651c6c1d5b3af2e6da0589b719c514ec0d69a) in May 2022, the page did not, and the "
        "question "
        f"whether MIT covers the weights ([204]({MASK2FORMER}/issues/204), [206]({MASK2FORMER}/issues/206)) had no "
        "answer when this "
        "was written. This card names the licence of the page, because it names the weights and is the stricter one.",
    ),
    "mask2former": Licence(
        "mit",
        f"The weights were trained with the code of [Mask2Former]({MASK2FORMER}), which is under the MIT licence, and "
        "are passed on "
        "under it; whoever trained them may say more. (The files of Mask2Former's own model zoo are under another "
        "licence.)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class OriginalFiles:
    """A published checkpoint as its authors offer it.

    Attributes:
        weights: address of the file.
        repository: address of the code that wrote it.
        config: path of its configuration in that repository.
        md5_prefix: first hexadecimal digits of the file's MD5, where the authors publish them.
    """

    weights: str
    repository: str
    config: str
    md5_prefix: str = ""

    @property
    def file_name(self) -> str:
        """Last part of the address."""
        return self.weights.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How weights were converted, as the converter saw it.

    Attributes:
        command: that converts the file again.
        file_name: of the converted file.
        sha256: of the converted file.
        versions: of the packages that took part.
        report: sentences on what was not simply renamed, such as a label embedding that begins fresh.
        checks: sentences on what was verified.
    """

    command: str
    file_name: str
    sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    report: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """A training as the program that ran it saw it; everything here was measured or set, nothing is quoted.

    Attributes:
        command: that runs it again, from the folder of the model.
        dataset: name of the data set.
        task: what its segments are.
        settings: everything that can be set, name to value.
        num_train_images, num_validation_images: in the splits.
        steps, images_per_step: optimiser steps, and images that each of them saw in all processes.
        seconds: of the training steps, on the wall.
        hardware: such as "1 x NVIDIA H200".
        versions: of the packages that took part.
        final_losses: mean terms of the loss in the last interval of the log.
        scores: metric (a key of `METRICS`) to fraction in [0, 1], on the validation split; empty if nothing was scored.
        start: the model that the weights began as, a name of the Hub or a folder; empty if they did not.
        backbone_start: the model that the backbone began as, likewise.
    """

    command: str
    dataset: str
    task: Task
    settings: Mapping[str, Any]
    num_train_images: int
    num_validation_images: int
    steps: int
    images_per_step: int
    seconds: float
    hardware: str
    versions: Mapping[str, str]
    final_losses: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    start: str = ""
    backbone_start: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Everything that the card of one model says.

    Attributes:
        name: of the card and, as a suggestion, of the repository.
        title: heading of the card.
        origin: where the weights come from.
        tasks: what the model can be used for, the one that it was trained for first; empty if nobody said.
        backbone: in words.
        num_labels: K, classes without "no object".
        num_queries: learnable queries.
        source: of backbone, classes and queries.
        details: further lines on the architecture.
        recipe: lines on the training.
        training_data: images that the model learned from, that of the backbone included.
        scores: in the order of the table.
        unknown: what a reader would ask and nobody published, one sentence each.
        licence: of the weights; `None` if nobody has chosen one.
        base_model: name on the Hub of the model that the training started from.
        query_position_embedding: whether the queries have one.
        label_embedding: "kept" or "fresh" (at the conversion), "trained", or "none".
        original: the published files, for converted weights.
        conversion, training: how the weights came to be, if this package did it.
        num_parameters: counted.
        classes: names, in the order of their ids.
        weights_digest: of the weights that the card is about, see `model_card.digest_weights`.
    """

    name: str
    title: str
    origin: Origin
    backbone: str
    num_labels: int
    num_queries: int
    source: Source
    tasks: tuple[Task, ...] = ()
    details: tuple[Detail, ...] = ()
    recipe: tuple[Detail, ...] = ()
    training_data: tuple[DataSet, ...] = ()
    scores: tuple[Score, ...] = ()
    unknown: tuple[str, ...] = ()
    licence: Licence | None = None
    base_model: str = ""
    query_position_embedding: bool = True
    label_embedding: LabelEmbedding = "none"
    original: OriginalFiles | None = None
    conversion: Conversion | None = None
    training: TrainingRecord | None = None
    num_parameters: int | None = None
    classes: tuple[str, ...] = ()
    weights_digest: str = ""

    def __post_init__(self) -> None:
        """Check names, counts, and what must fit together."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Expected a name of letters, digits, dots, dashes and underscores, got {self.name!r}.")
        require_choice("origin", self.origin, ORIGINS)
        require_source(self.source, f"The architecture of {self.name}")
        for task in self.tasks:
            require_choice("task", task, TASKS)
        for name in ("num_labels", "num_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` of {self.name} must be at least 1, got {getattr(self, name)}.")
        if self.classes and len(self.classes) != self.num_labels:
            raise ValueError(f"{self.name} has {self.num_labels} classes, but {len(self.classes)} names.")
        if self.origin in PUBLISHED_ORIGINS and (self.original is None or self.licence is None):
            raise ValueError(f"{self.name} is published: its facts need the original files and a licence.")
        self._check_scores()

    def _check_scores(self) -> None:
        """Scores of one task and split are listed once, and those that are quoted come from one source."""
        seen: set[tuple[object, ...]] = set()
        sources: dict[tuple[object, ...], Source] = {}
        for score in self.scores:
            kind = (score.dataset, score.split, score.task, score.source.is_measured)
            if (kind, score.label) in seen:
                raise ValueError(f"{self.name} has the score {score.label} on {score.dataset} {score.split} twice.")
            seen.add((kind, score.label))
            # The front matter has one source for each task and split.
            if sources.setdefault(kind, score.source) != score.source:
                raise ValueError(
                    f"{self.name} has scores of {score.task} segmentation on {score.dataset} {score.split} from "
                    f"{sources[kind].name!r} and {score.source.name!r}. Quote one of them."
                )

    @property
    def task(self) -> Task:
        """What to show in examples."""
        return self.tasks[0] if self.tasks else "panoptic"

    @property
    def is_converted(self) -> bool:
        """True for weights that another program trained."""
        return self.origin != "trained"


def name_of_data_set(key: str) -> str:
    """What people call a data set."""
    return DATA_SETS[key].name if key in DATA_SETS else key


def public_name(start: str) -> str:
    """Name a model as others may read it: of a folder, its last part alone."""
    return Path(start).resolve().name if Path(start).is_dir() else start


def require_source(source: object, what: str) -> None:
    """Refuse a statement without a source."""
    if not isinstance(source, Source):
        raise ValueError(  # noqa: TRY004 - the value is missing, not of a wrong type
            f"{what} has no source. Say which page it is quoted from, or which command measured it."
        )


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a word that is not in a list, and name the one that was meant."""
    known = tuple(choices)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Use one of: {', '.join(known)}."
        raise ValueError(f"Unknown {name} {value!r}. {hint}")


# --------------------------------------------------------------------------------------------------------- reading JSON

SIMPLE_FIELDS = frozenset(
    ("name", "title", "origin", "backbone", "num_labels", "num_queries", "query_position_embedding", "label_embedding")
)
LIST_FIELDS = frozenset(("details", "recipe", "tasks", "training_data", "scores", "unknown"))
JSON_FIELDS = SIMPLE_FIELDS | LIST_FIELDS | {"original", "source"}
FILE_PARTS = ("sources", "shared", "checkpoints")


def read_facts(path: Path) -> tuple[ModelFacts, ...]:
    """Read the facts of a family of checkpoints.

    The file holds `sources` (key to name and URL), `shared` (fields of all checkpoints) and `checkpoints` (fields of
    each). Lists of a checkpoint are appended to the shared ones. Scores name their unit: `"percent": 51.9` or
    `"fraction": 0.519`.

    Raises:
        ValueError: names the file, the checkpoint and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
        for part in set(content) | set(FILE_PARTS):
            require_choice("part", part, FILE_PARTS)
        sources = {key: Source(**fields) for key, fields in content["sources"].items()}
        facts = tuple(make_facts(content["shared"], own, sources) for own in content["checkpoints"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as facts of models: {error}") from error
    named = json.dumps([content["shared"], content["checkpoints"]])
    if unused := [key for key in sources if f'"{key}"' not in named]:
        raise ValueError(f"{path} has sources that nothing refers to: {', '.join(unused)}.")
    return facts


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; of two equal keys, one would be lost without a word."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the keys {', '.join(twice)} stand twice in one object.")
    return dict(pairs)


def make_facts(shared: Mapping[str, Any], own: Mapping[str, Any], sources: Mapping[str, Source]) -> ModelFacts:
    """Make the facts of one checkpoint of a family."""
    for name in (*shared, *own):
        require_choice("field", name, sorted(JSON_FIELDS))
    if both := sorted((set(shared) & set(own)) - LIST_FIELDS - {"original"}):
        raise ValueError(f"{', '.join(both)} of {own.get('name')} stand in `shared` too. Remove one of them.")
    lists = {name: [*shared.get(name, ()), *own.get(name, ())] for name in LIST_FIELDS}
    simple = {name: value for name, value in {**shared, **own}.items() if name in SIMPLE_FIELDS}
    return ModelFacts(
        **simple,
        source=find("source", {**shared, **own}.get("source"), sources),
        tasks=tuple(lists["tasks"]),
        details=tuple(make_detail(line, sources) for line in lists["details"]),
        recipe=tuple(make_detail(line, sources) for line in lists["recipe"]),
        scores=tuple(make_score(fields, sources) for fields in lists["scores"]),
        training_data=tuple(find("data set", key, DATA_SETS) for key in lists["training_data"]),
        unknown=tuple(lists["unknown"]),
        licence=LICENCES.get(simple["origin"]),
        original=OriginalFiles(**{**shared.get("original", {}), **own.get("original", {})}),
    )


def make_detail(line: Any, sources: Mapping[str, Source]) -> Detail:  # noqa: ANN401 - whatever stands in the file
    """Make a detail of `[name, value, source]`."""
    if not isinstance(line, list) or len(line) != len(dataclasses.fields(Detail)):
        raise ValueError(f"Expected a detail to be [name, value, key of its source], got {line!r}.")
    name, value, key = line
    return Detail(name, value, find("source", key, sources))


def make_score(fields: Mapping[str, Any], sources: Mapping[str, Source]) -> Score:
    """Make a score of an object that has its value under the name of its unit."""
    units = [unit for unit in ("percent", "fraction") if unit in fields]
    if len(units) != 1:
        raise ValueError(f"Expected the score {dict(fields)} to have one of the keys `percent` and `fraction`.")
    if "source" not in fields:
        raise ValueError(f"The score {dict(fields)} has no source.")
    unit = units[0]
    rest = {name: value for name, value in fields.items() if name not in (unit, "source")}
    source = find("source", fields["source"], sources)
    return Score(value=fields[unit], unit=unit, source=source, **rest)  # type: ignore[arg-type]


def find(what: str, key: Any, table: Mapping[str, T]) -> T:  # noqa: ANN401 - whatever stands in the file
    """Look up a key; an unknown one is an error that names the nearest."""
    require_choice(what, key, table)
    return table[key]


def read_all_facts(folder: Path) -> dict[str, ModelFacts]:
    """Read every `*.json` of a folder: name of the checkpoint to its facts."""
    every = [facts for path in sorted(folder.glob("*.json")) for facts in read_facts(path)]
    names = [facts.name for facts in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder} has the facts of {', '.join(twice)} more than once.")
    return {facts.name: facts for facts in every}


def find_published(facts: Iterable[ModelFacts], file: Path) -> ModelFacts | None:
    """Find the checkpoint that a file is, by the MD5 that its authors publish; `None` if it is none of them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    for published in facts:
        prefix = published.original.md5_prefix if published.original else ""
        # Six digits alone would match one file in 350,000 by chance.
        if prefix and digest.startswith(prefix) and prefix in file.name:
            return published
    return None
