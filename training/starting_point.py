"""The model that a training begins with: from a trained one, from a trained backbone, or from scratch.

A trained model may know other classes and have another number of queries. Whatever still has a meaning is kept:

    class head, label embedding     rows of classes with the same name; "no object"
    queries and their positions     the first ones, as many as there are in both
    all else                        weights of the same name and shape
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation
from training.arguments import RecipeError, TrainingArguments
from training.data import SegmentationDataset
from training.predictor import few, plain_name

# Tensors with a row for each class, and a last one for "no object" where the second value says so.
CLASS_ROWS = {
    "class_predictor.weight": True,
    "class_predictor.bias": True,
    "model.transformer_module.pilot_label_embedder.weight": False,
}
QUERY_ROWS = (
    "model.transformer_module.queries_features.weight",
    "model.transformer_module.queries_embedder.weight",
)
# It follows from the recipe.
LOSS_BUFFER = "criterion.empty_weight"


@dataclass(frozen=True)
class KeptWeights:
    """What a model took over from another one.

    Attributes:
        classes: names of the classes whose rows were kept.
        new_classes: names of those that begin at random.
        queries: how many were kept.
        new_queries: how many begin at random.
        random: names of other weights that begin at random, because the other model has none of this name and shape.
    """

    classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    queries: int
    new_queries: int
    random: tuple[str, ...]

    def describe(self) -> str:
        """Say in a sentence or two what was kept; nothing if it was all."""
        parts = []
        if self.new_classes:
            kept = f"{len(self.classes)} classes keep their weights" if self.classes else "no class has the same name"
            parts.append(f"{kept}, {len(self.new_classes)} begin at random ({few(self.new_classes)})")
        if self.new_queries:
            parts.append(f"{self.queries} queries keep theirs, {self.new_queries} begin at random")
        if self.random:
            parts.append(f"{len(self.random)} other weights begin at random ({few(self.random, 3)})")
        return f"From the model to start with: {'; '.join(parts)}." if parts else ""


def build_model(
    arguments: TrainingArguments, dataset: SegmentationDataset
) -> tuple[MPFormerForUniversalSegmentation, str]:
    """Make the model for the classes of a data set.

    Returns:
        The model, and a sentence about what it did not take over from the one it starts from, if anything.
    """
    labels = {"id2label": dataset.id2label, "label2id": {name: key for key, name in dataset.id2label.items()}}
    fields = {**arguments.model, **labels}
    note = ""
    if arguments.model_name_or_path is not None:
        start = MPFormerForUniversalSegmentation.from_pretrained(arguments.model_name_or_path)
        model = MPFormerForUniversalSegmentation(MPFormerConfig.from_pretrained(arguments.model_name_or_path, **fields))
        model.config.name_or_path = model.name_or_path = arguments.model_name_or_path
        note = take_over(model, start).describe()
    elif arguments.backbone is not None:
        model = MPFormerForUniversalSegmentation.from_backbone(arguments.backbone, **fields)
    else:
        model = MPFormerForUniversalSegmentation(MPFormerConfig(**fields))
    weigh_classes(model, arguments.class_weights)
    return model, note


@torch.no_grad()
def take_over(model: nn.Module, start: nn.Module) -> KeptWeights:
    """Copy into `model` what still has a meaning of `start`; both are `MPFormerForUniversalSegmentation`."""
    trained = start.state_dict()
    rows = pair_classes(start.config.id2label, model.config.id2label)
    random = []
    state = model.state_dict()
    for name, weights in state.items():
        if name == LOSS_BUFFER:
            continue
        known = trained.get(name)
        if name in CLASS_ROWS:
            if known is not None:
                copy_class_rows(weights, known, rows, has_no_object=CLASS_ROWS[name])
        elif name in QUERY_ROWS and known is not None:
            count = min(len(weights), len(known))
            weights[:count] = known[:count]
        elif known is not None and known.shape == weights.shape:
            weights.copy_(known)
        else:
            random.append(name)
    num_queries = min(start.config.num_queries, model.config.num_queries)
    names = model.config.id2label
    return KeptWeights(
        classes=tuple(names[key] for key in rows),
        new_classes=tuple(name for key, name in names.items() if key not in rows),
        queries=num_queries,
        new_queries=model.config.num_queries - num_queries,
        random=tuple(random),
    )


def pair_classes(known: Mapping[int, str], wanted: Mapping[int, str]) -> dict[int, int]:
    """Find for each wanted class the known one of the same name; upper and lower case, `-` and `_` do not matter."""
    places = {plain_name(name): key for key, name in known.items()}
    return {key: places[plain_name(name)] for key, name in wanted.items() if plain_name(name) in places}


def copy_class_rows(weights: Tensor, known: Tensor, rows: Mapping[int, int], *, has_no_object: bool) -> None:
    """Copy the rows of paired classes, in place."""
    if rows:
        weights[list(rows)] = known[list(rows.values())]
    if has_no_object:
        weights[-1] = known[-1]


@torch.no_grad()
def weigh_classes(model: MPFormerForUniversalSegmentation, class_weights: Mapping[str, float]) -> None:
    """Set the weights of some classes in the classification loss.

    Raises:
        RecipeError: a name is no class of the model.
    """
    classes = {plain_name(name): key for key, name in model.config.id2label.items()}
    weights = model.criterion.empty_weight
    weights[:-1] = 1.0
    for name, weight in class_weights.items():
        if plain_name(name) not in classes:
            raise RecipeError(
                f"`class_weights.{name}` is no class of the data set. Classes: {few(model.config.id2label.values(), 12)}."
            )
        weights[classes[plain_name(name)]] = weight


def freeze(model: MPFormerForUniversalSegmentation, parts: Mapping[str, str], names: Sequence[str]) -> None:
    """Exclude parts of a model from training.

    Args:
        model: without wrappers.
        parts: beginning of the names of a part's parameters, by the name of the part.
        names: of parts, or beginnings of names of parameters.

    Raises:
        RecipeError: nothing has such a name, nothing would be left to train, or a batch norm would go on counting.
    """
    for name in names:
        beginning = parts.get(name, name)
        found = [parameter for key, parameter in model.named_parameters() if key.startswith(beginning)]
        if not found:
            raise RecipeError(
                f"`frozen` has {name!r}, and no parameter's name begins so. Use {', '.join(parts)}, or the beginning of a name "
                f"such as {next(iter(dict(model.named_parameters())))!r}."
            )
        counting = [
            key
            for key, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and key.startswith(beginning)  # noqa: SLF001
        ]
        if counting and not model.config.freeze_backbone_norm:
            raise RecipeError(
                f"`frozen` has {name!r}, whose batch norms would still change with every batch. Set "
                "`model.freeze_backbone_norm: true`."
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"`frozen` ({', '.join(names)}) leaves nothing to train.")
