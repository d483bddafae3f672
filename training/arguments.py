"""Settings of a training run: a recipe (YAML), the command line on top of it, one dataclass that holds the result.

The fields of `TrainingArguments` are the keys of a recipe and the options of the program. `parse_arguments` reads both and
refuses what it does not know: a wrong key, a wrong type or a value out of range ends with a sentence, before anything is
loaded.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from training.data import DATASETS, Split, Task
from training.recipe_files import RecipeError, load_yaml, read_recipe_file

TRACKERS = ("tensorboard", "trackio", "wandb")
# Parts of a model that can be frozen, and how the names of their parameters begin.
PARTS = {
    "backbone": "model.pixel_level_module.encoder.",
    "pixel_decoder": "model.pixel_level_module.decoder.",
    "transformer_decoder": "model.transformer_module.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """What a training run depends on; the annotations are what `--help` says.

    A field without a default must be in the recipe or on the command line.
    """

    output_dir: Annotated[str, "folder of the trained model, its scores, its log and this recipe"]
    logging_steps: Annotated[int, "steps between two lines of the log, and two updates of the losses shown"] = 10
    save_every: Annotated[int | None, "steps between two checkpoints, see resume; null: only when it is stopped"] = 500
    keep_checkpoints: Annotated[int, "how many of the newest are left; they disappear when the model is there"] = 1
    resume: Annotated[
        bool, "go on with the unfinished run of output_dir, if there is one; false: begin anew, and remove it"
    ] = True
    trackers: Annotated[tuple[str, ...], f"also send the log to these: {', '.join(TRACKERS)}"] = ()
    push_to_hub: Annotated[
        Literal["end", "evaluation"] | None,
        "upload the model to the Hub: once, or at each evaluation too; null: do not",
    ] = None
    hub_model_id: Annotated[
        str | None, "repository of push_to_hub; null: the name of output_dir, of the user who is logged in"
    ] = None
    hub_private: Annotated[bool, "whether a repository that is made for push_to_hub is private"] = False

    dataset: Annotated[str, f"name of the data set: {', '.join(DATASETS)}"] = "digit_scenes"
    task: Annotated[Task, "which segments the data set gives"] = "panoptic"
    dataset_options: Annotated[dict[str, Any], "options of the data set, both splits"] = dataclasses.field(
        default_factory=dict
    )
    train_options: Annotated[dict[str, Any], "on top of dataset_options, training split"] = dataclasses.field(
        default_factory=dict
    )
    validation_options: Annotated[dict[str, Any], "on top of dataset_options, validation split"] = dataclasses.field(
        default_factory=dict
    )
    augmentation: Annotated[
        dict[str, Any],
        "fields of training.augmentation.Augmentation, and preset; empty: as the processor prepares images",
    ] = dataclasses.field(default_factory=dict)
    exclude_ignored: Annotated[
        bool,
        "points of the mask losses avoid pixels whose label is unknown; false: they count as background (original)",
    ] = False
    repeat_threshold: Annotated[
        float | None, "images with a class that a smaller share of images has come more often, as in LVIS; null: do not"
    ] = None
    max_broken_images: Annotated[int, "images that cannot be read and are passed over; one more stops the run"] = 10
    num_workers: Annotated[int, "processes that prepare batches, for each training process; 0: itself"] = 2

    model_name_or_path: Annotated[str | None, "start from this model: a folder, or a name on the Hub"] = None
    backbone: Annotated[
        str | None, "start from this pretrained backbone alone: a folder, a name on the Hub, or timm:NAME"
    ] = None
    model: Annotated[
        dict[str, Any],
        "fields of MPFormerConfig. With neither of the two above everything starts from scratch, and "
        "model.backbone_config says with which backbone",
    ] = dataclasses.field(default_factory=dict)
    processor: Annotated[dict[str, Any], "fields of MPFormerImageProcessor, such as size and pad_size"] = (
        dataclasses.field(default_factory=dict)
    )

    frozen: Annotated[
        tuple[str, ...],
        f"parts that are not trained: {', '.join(PARTS)}, or beginnings of names of parameters",
    ] = ()
    class_weights: Annotated[
        dict[str, Any], "weights of classes in the classification loss, by label name; 1 for all others"
    ] = dataclasses.field(default_factory=dict)
    gradient_checkpointing: Annotated[bool, "compute features twice instead of keeping them: less memory, slower"] = (
        False
    )
    compile: Annotated[bool, "torch.compile of backbone and pixel decoder; the first steps take minutes"] = False

    max_steps: Annotated[int, "optimiser steps"]
    batch_size: Annotated[int, "images in a forward pass, for each process"] = 16
    gradient_accumulation_steps: Annotated[int, "forward passes in an optimiser step"] = 1
    learning_rate: Annotated[float, "the highest (AdamW)"] = 1e-4
    reference_batch_size: Annotated[
        int | None, "learning_rate is for so many images in a step, and is scaled to their number; null: not scaled"
    ] = None
    backbone_learning_rate_factor: Annotated[
        float | None, "for the backbone; null: 0.1, or 1 when it starts from scratch"
    ] = None
    weight_decay: Annotated[float, "of everything but norms, embeddings and position tables"] = 0.05
    max_gradient_norm: Annotated[float | None, "longer gradients are scaled down to it; null: never"] = 0.01
    schedule: Annotated[
        Literal["poly", "step"],
        "poly: the learning rate falls along (1 - share of steps done) ** schedule_power; step: at schedule_milestones",
    ] = "poly"
    schedule_power: Annotated[float, "exponent of schedule poly"] = 0.9
    schedule_milestones: Annotated[
        tuple[int, ...], "steps after which schedule step multiplies the learning rate by schedule_factor"
    ] = ()
    schedule_factor: Annotated[float, "see schedule_milestones"] = 0.1
    warmup_steps: Annotated[int, "steps in which the learning rate rises linearly from 0"] = 10
    average_decay: Annotated[
        float | None, "average the weights over about 1 / (1 - average_decay) steps, as 0.999 does; null: do not"
    ] = None
    average_warmup_steps: Annotated[int, "the decay of step t is at most t / (t + average_warmup_steps)"] = 10
    save_average: Annotated[
        Literal["instead", "beside"],
        "instead: the averages are the model that is scored and saved; beside: scored too, and saved in output_dir/average",
    ] = "instead"

    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], "precision of the forward pass"] = "no"
    seed: Annotated[int, "of weights, order of images, noise and points"] = 0

    evaluate: Annotated[bool, "score the trained model on the validation split"] = True
    evaluation_steps: Annotated[int | None, "also score it every so many steps; null: at the end alone"] = None
    keep_best: Annotated[bool, "the model is that of the best score, not of the last step; needs evaluation_steps"] = (
        False
    )
    early_stopping: Annotated[
        int | None, "stop after so many evaluations without a better score; needs evaluation_steps; null: never"
    ] = None
    evaluation_batch_size: Annotated[int, "images in a forward pass, for each process"] = 16
    validation_pictures: Annotated[
        int, "validation images that are drawn at each evaluation, beside the curves; 0: draw neither"
    ] = 8

    def __post_init__(self) -> None:
        """Check ranges, and what must fit together."""
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"`{name}` must be above 0, got {value}.")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RecipeError(f"`{name}` must not be below 0, got {value}.")
        if self.dataset not in DATASETS:
            raise RecipeError(f"`dataset` must be one of {', '.join(DATASETS)}, got {self.dataset!r}.")
        self._check_schedule()
        self._check_start()
        self._check_average_and_best()
        self._check_choices()

    def _check_schedule(self) -> None:
        if self.schedule == "step" and not self.schedule_milestones:
            raise RecipeError("`schedule: step` needs `schedule_milestones`, the steps after which the rate falls.")
        if self.schedule == "poly" and self.schedule_milestones:
            raise RecipeError("`schedule_milestones` belongs to `schedule: step`, but it is poly. Remove one of them.")
        if self.warmup_steps > self.max_steps:
            raise RecipeError(
                f"`warmup_steps` ({self.warmup_steps}) must not be above `max_steps` ({self.max_steps}): the learning "
                "rate would never be reached."
            )

    def _check_start(self) -> None:
        starts = {
            "model_name_or_path": self.model_name_or_path,
            "backbone": self.backbone,
            "model.backbone_config": self.model.get("backbone_config"),
        }
        given = [f"`{name}`" for name, value in starts.items() if value]
        if len(given) != 1:
            raise RecipeError(
                "Expected exactly one of `model_name_or_path` (a trained model), `backbone` (a pretrained backbone) and "
                f"`model.backbone_config` (a backbone from scratch), got {' and '.join(given) or 'none of them'}."
            )
        for name in ("num_labels", "id2label", "label2id"):
            if name in self.model:
                raise RecipeError(f"`model.{name}` comes from the data set. Remove it.")

    def _check_average_and_best(self) -> None:
        if self.average_decay is not None and not 0 <= self.average_decay < 1:
            raise RecipeError(
                f"`average_decay` must be at least 0 and below 1, got {self.average_decay}. 0.999 averages about 1000 "
                "steps."
            )
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and not (self.evaluate and self.evaluation_steps):
                raise RecipeError(f"`{name}` compares scores: set `evaluate: true` and `evaluation_steps` too.")

    def _check_choices(self) -> None:
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise RecipeError(f"`trackers` has no choice {tracker!r}. Choices: {', '.join(TRACKERS)}.")
        for label, weight in self.class_weights.items():
            if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
                raise RecipeError(f"`class_weights.{label}` must be a number of at least 0, got {weight!r}.")
        if self.push_to_hub == "evaluation" and not (self.evaluate and self.evaluation_steps):
            raise RecipeError("`push_to_hub: evaluation` needs `evaluate: true` and `evaluation_steps` too.")
        if self.exclude_ignored and not self.augmentation:
            raise RecipeError("`exclude_ignored` needs `augmentation`; `augmentation: {kind: none}` changes no image.")

    @property
    def starts_from_scratch(self) -> bool:
        """True if no pretrained weights are loaded at all."""
        return self.model_name_or_path is None and self.backbone is None

    @property
    def backbone_factor(self) -> float:
        """Learning rate of the backbone, as a multiple of that of the rest."""
        factor = self.backbone_learning_rate_factor
        if factor is None:
            factor = 1.0 if self.starts_from_scratch else 0.1
        return factor

    def options_of(self, split: Split) -> dict[str, Any]:
        """Options of `load_segmentation_dataset` for a split."""
        own = self.train_options if split == "train" else self.validation_options
        return {"task": self.task, **self.dataset_options, **own}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in the types of YAML and JSON: lists instead of tuples."""
        settings = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    def save(self, path: Path) -> None:
        """Write a recipe that gives the same settings when it is read."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


POSITIVE = (
    "max_steps",
    "save_every",
    "keep_checkpoints",
    "batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "evaluation_steps",
    "evaluation_batch_size",
    "early_stopping",
    "repeat_threshold",
    "reference_batch_size",
    "learning_rate",
    "max_gradient_norm",
    "schedule_power",
)
NOT_NEGATIVE = (
    "num_workers",
    "max_broken_images",
    "validation_pictures",
    "average_warmup_steps",
    "weight_decay",
    "warmup_steps",
    "seed",
    "schedule_factor",
    "backbone_learning_rate_factor",
)

# A run may go on with other values of these: they change no weight.
FREE_WHEN_RESUMING = (
    "output_dir",
    "logging_steps",
    "save_every",
    "keep_checkpoints",
    "resume",
    "num_workers",
    "evaluate",
    "evaluation_steps",
    "evaluation_batch_size",
    "early_stopping",
    "keep_best",
    "save_average",
    "trackers",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "max_broken_images",
    "validation_pictures",
)

# `--help` begins a new paragraph at each of these fields.
GROUPS = {
    "output_dir": "output",
    "dataset": "data",
    "model_name_or_path": "model",
    "max_steps": "optimisation",
    "mixed_precision": "running",
    "evaluate": "evaluation",
}

FIELDS = {dataclass_field.name: dataclass_field for dataclass_field in dataclasses.fields(TrainingArguments)}
FIELD_TYPES = typing.get_type_hints(TrainingArguments)


def parse_arguments(argv: Sequence[str] | None = None, program: str = "python -m training.train") -> TrainingArguments:
    """Read the recipe that the command line names, and the other options on top of it.

    Args:
        argv: the words after the program's name; `None` takes those of this process.
        program: how the program was called, for `--help`.

    Raises:
        RecipeError: an unknown key or option, a wrong type, a value out of range, or a file that cannot be read.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser(program)
    for option in sorted({word.partition("=")[0] for word in words if re.match(r"--\w+\.", word)}):
        parser.add_argument(option, dest=option.removeprefix("--"), help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise _unknown_option(unknown[0])
    settings = read_recipe(options.recipe)
    for name, text in vars(options).items():
        if name != "recipe" and text is not None:
            settings = _set_option(settings, name, text)
    return make_arguments(settings, options.recipe)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe. Its keys are names of fields; its values are not checked yet."""
    settings = read_recipe_file(path)
    for key in settings:
        if key not in FIELDS:
            raise RecipeError(f"{path}: unknown key `{key}`.{_nearest(str(key), FIELDS)}")
    return settings


def make_arguments(settings: Mapping[str, Any], source: str) -> TrainingArguments:
    """Check settings and make the dataclass of them; `source` names where they came from in messages."""
    for name, dataclass_field in FIELDS.items():
        if _is_required(dataclass_field) and name not in settings:
            raise RecipeError(
                f"{source}: `{name}` ({_describe_type(name)}) is missing. Add it to the recipe, or pass --{name}."
            )
    values = {name: _convert(value, name, source) for name, value in settings.items()}
    try:
        arguments = TrainingArguments(**values)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    _refuse_unknown_nested_keys(arguments, source)
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_unknown_nested_keys(arguments: TrainingArguments, source: str) -> None:
    """Check the keys inside of mappings; their values are checked by what they are for."""
    # These imports take seconds, which `--help` and most mistakes need not wait for.
    from mpformer_hf import MPFormerConfig  # noqa: PLC0415
    from mpformer_hf.image_processing_mpformer import MPFormerImageProcessorKwargs  # noqa: PLC0415

    known_keys = {
        "model": [config_field.name for config_field in dataclasses.fields(MPFormerConfig)],
        "processor": list(typing.get_type_hints(MPFormerImageProcessorKwargs)),
    }
    parameters = inspect.signature(DATASETS[arguments.dataset]).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):  # a format to be detected
        options = [name for name in parameters if name not in ("split", "task")]
        known_keys |= dict.fromkeys(("dataset_options", "train_options", "validation_options"), options)
    for name, known in known_keys.items():
        for key in getattr(arguments, name):
            if key not in known:
                raise RecipeError(f"{source}: unknown key `{name}.{key}`.{_nearest(str(key), known, f'{name}.')}")


def _unknown_option(word: str) -> RecipeError:
    name = word.removeprefix("--").partition("=")[0]
    hint = _nearest(name, FIELDS, "--") if word.startswith("--") else " Options are written --NAME VALUE."
    return RecipeError(f"Command line: unknown option `{word}`.{hint} See --help for all of them.")


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" Did you mean `{prefix}{near[0]}`?" if near else ""


# ---------------------------------------------------------------------------------------------------------------------
# Types
# ---------------------------------------------------------------------------------------------------------------------


def _convert(value: object, name: str, source: str) -> object:
    """Return a value in the type of the field `name`."""
    for expected in _alternatives(FIELD_TYPES[name]):
        if _fits(value, expected):
            kind = typing.get_origin(expected) or expected
            return kind(value) if kind in (float, tuple) else value
    raise RecipeError(f"{source}: `{name}` must be {_describe_type(name)}, got {value!r} ({type(value).__name__}).")


def _fits(value: object, expected: object) -> bool:
    origin = typing.get_origin(expected)
    if origin is Literal:
        return type(value) is str and value in typing.get_args(expected)
    if origin is tuple:
        kind = typing.get_args(expected)[0]
        return type(value) in (list, tuple) and all(type(entry) is kind for entry in value)
    kinds = (int, float) if expected is float else (origin or expected,)
    return type(value) in kinds  # exact, because True is an int to `isinstance`


def _alternatives(expected: object) -> tuple[Any, ...]:
    is_union = typing.get_origin(expected) in (types.UnionType, typing.Union)
    return typing.get_args(expected) if is_union else (expected,)


def _describe_type(name: str) -> str:
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        dict: "a mapping of names to values",
        tuple[int, ...]: "a list of integers",
        tuple[str, ...]: "a list of words",
    }
    descriptions = [
        f"one of {', '.join(typing.get_args(expected))}"
        if typing.get_origin(expected) is Literal
        else words[expected if expected in words else typing.get_origin(expected)]
        for expected in _alternatives(FIELD_TYPES[name])
    ]
    return " or ".join(descriptions)


def _is_required(dataclass_field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return dataclass_field.default is missing and dataclass_field.default_factory is missing


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _make_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} RECIPE [--NAME VALUE ...]",
        description="Train a model as a recipe says. Every key of a recipe is an option too, and the option wins.",
        epilog="One key of a mapping is set by --model.num_queries 50 and the like. Recipes are in training/recipes/.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file with lines of the form `key: value`")
    group = parser
    helps = typing.get_type_hints(TrainingArguments, include_extras=True)
    for name, dataclass_field in FIELDS.items():
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        text = f"{helps[name].__metadata__[0]} ({_describe_type(name)}; {_describe_default(dataclass_field)})"
        group.add_argument(f"--{name}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser


def _describe_default(dataclass_field: dataclasses.Field) -> str:
    if _is_required(dataclass_field):
        return "required"
    default = dataclass_field.default
    if default is dataclasses.MISSING or default == ():
        return "default: empty"
    return f"default: {default if isinstance(default, str) else json.dumps(default)}"


def _set_option(settings: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """Return settings with one option of the command line; `name` may lead into a mapping: `model.num_queries`."""
    first, *rest = name.split(".")
    if first not in FIELDS or not all(rest):
        raise _unknown_option(f"--{name}")
    if not rest:
        return {**settings, name: _read_value(text, FIELD_TYPES[name])}
    if typing.get_origin(FIELD_TYPES[first]) is not dict:
        raise RecipeError(f"Command line: `--{name}` does not exist, because `{first}` is {_describe_type(first)}.")
    return {**settings, first: _set_nested(settings.get(first), rest, _read_value(text, None))}


def _set_nested(mapping: object, names: Sequence[str], value: object) -> dict[str, Any]:
    first, *rest = names
    known: dict[str, Any] = mapping if isinstance(mapping, dict) else {}
    return {**known, first: _set_nested(known.get(first), rest, value) if rest else value}


def _read_value(text: str, expected: object) -> object:
    """Read the value of an option as YAML, but text as it is: a folder may be called 2024."""
    alternatives = _alternatives(expected)
    if str in alternatives and not (text == "null" and types.NoneType in alternatives):
        return text
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text  # its type is wrong, which is said where types are checked
    is_word = tuple[str, ...] in alternatives and type(value) is str
    return value.split(",") if is_word else value
