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
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from training.data import DATASETS, Split, Task


class RecipeError(ValueError):
    """A recipe, or an option of the command line, that cannot be used; the message is for the user as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """What a training run depends on; the annotations are what `--help` says.

    A field without a default must be in the recipe or on the command line.
    """

    output_dir: Annotated[str, "folder of the trained model, its scores, its log and this recipe"]
    logging_steps: Annotated[int, "steps between two lines of the log, and two updates of the losses shown"] = 10

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

    max_steps: Annotated[int, "optimiser steps"]
    batch_size: Annotated[int, "images in a forward pass, for each process"] = 16
    gradient_accumulation_steps: Annotated[int, "forward passes in an optimiser step"] = 1
    learning_rate: Annotated[float, "the highest (AdamW)"] = 1e-4
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

    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], "precision of the forward pass"] = "no"
    seed: Annotated[int, "of weights, order of images, noise and points"] = 0

    evaluate: Annotated[bool, "score the trained model on the validation split"] = True
    evaluation_steps: Annotated[int | None, "also score it every so many steps; null: at the end alone"] = None
    evaluation_batch_size: Annotated[int, "images in a forward pass, for each process"] = 16

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
        if self.task != "panoptic" and self.evaluate:
            raise RecipeError(
                f"`task: {self.task}` can be trained, but only panoptic results can be scored. Set `evaluate: false`."
            )
        self._check_schedule()
        self._check_start()

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

    @property
    def starts_from_scratch(self) -> bool:
        """True if no pretrained weights are loaded at all."""
        return self.model_name_or_path is None and self.backbone is None

    @property
    def backbone_learning_rate(self) -> float:
        """The highest of the backbone."""
        factor = self.backbone_learning_rate_factor
        if factor is None:
            factor = 1.0 if self.starts_from_scratch else 0.1
        return self.learning_rate * factor

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
    "batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "evaluation_steps",
    "evaluation_batch_size",
    "learning_rate",
    "max_gradient_norm",
    "schedule_power",
)
NOT_NEGATIVE = (
    "num_workers",
    "weight_decay",
    "warmup_steps",
    "seed",
    "schedule_factor",
    "backbone_learning_rate_factor",
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
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {path} is no valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"Recipe {path} must hold lines of the form `key: value`, got {type(settings).__name__}.")
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

    options = [
        name for name in inspect.signature(DATASETS[arguments.dataset]).parameters if name not in ("split", "task")
    ]
    known_keys = {
        "model": [config_field.name for config_field in dataclasses.fields(MPFormerConfig)],
        "processor": list(typing.get_type_hints(MPFormerImageProcessorKwargs)),
        "dataset_options": options,
        "train_options": options,
        "validation_options": options,
    }
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
        return type(value) in (list, tuple) and all(type(entry) is int for entry in value)
    kinds = (int, float) if expected is float else (origin or expected,)
    return type(value) in kinds  # exact, because True is an int to `isinstance`


def _alternatives(expected: object) -> tuple[Any, ...]:
    return typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)


def _describe_type(name: str) -> str:
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        dict: "a mapping of names to values",
        tuple: "a list of integers",
    }
    descriptions = [
        f"one of {', '.join(typing.get_args(expected))}"
        if typing.get_origin(expected) is Literal
        else words[typing.get_origin(expected) or expected]
        for expected in _alternatives(FIELD_TYPES[name])
    ]
    return " or ".join(descriptions)


def _is_required(dataclass_field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return dataclass_field.default is missing and dataclass_field.default_factory is missing


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: `1e-4` is a number, `no` is text. A key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dictionary."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key `{twice[0]}` comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


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
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError:
        return text  # its type is wrong, which is said where types are checked
