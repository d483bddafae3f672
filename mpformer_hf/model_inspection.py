"""The facts of a real model: what it says about itself, what its training or conversion knows, and what it inherits.

A model inherits the licence of the weights that it began as, which stands in the card beside them (`read_card_of`).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import BaseImageProcessor, PreTrainedModel

from .model_facts import (
    DATA_SETS,
    LICENCES,
    NAME_LENGTH,
    Conversion,
    Detail,
    Licence,
    ModelFacts,
    Origin,
    Score,
    Source,
    Task,
    TrainingRecord,
    name_of_data_set,
    public_name,
)

CARD_FILE = "README.md"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def facts_of_model(
    model: PreTrainedModel, processor: BaseImageProcessor | None = None, *, tasks: Sequence[Task] = (), name: str = ""
) -> ModelFacts:
    """Collect what a model says about itself.

    Args:
        model: an `MPFormerForUniversalSegmentation`.
        processor: its image processor, for sizes and thresholds.
        tasks: what it was trained for, first that which examples show; the model itself does not know.
        name: of the repository; by default the last part of where the model came from.
    """
    config: Any = model.config
    names = [str(config.id2label[key]) for key in sorted(config.id2label)]
    return ModelFacts(
        name=name or name_of_model(model),
        title=name or name_of_model(model),
        origin="trained",
        tasks=tuple(tasks),
        backbone=name_backbone(config.backbone_config),
        num_labels=len(names),
        num_queries=config.num_queries,
        source=Source("configuration", file="config.json"),
        details=(*describe_piloting(config), *describe_processor(processor)),
        query_position_embedding=config.query_position_embedding,
        label_embedding="trained" if config.mask_piloting else "none",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=tuple(names),
        weights_digest=digest_weights(model),
    )


def name_of_model(model: PreTrainedModel) -> str:
    """Last part of the folder or repository that a model was loaded from, if it can be a name."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", str(model.name_or_path or "").rstrip("/").rsplit("/", 1)[-1]).strip("-._")
    return last[:NAME_LENGTH] or "mpformer"


def name_backbone(config: Any) -> str:  # noqa: ANN401 - of any backbone
    """Name a backbone by its type and by the numbers that tell its sizes apart."""
    if getattr(config, "backbone", None):  # timm
        return f"{config.backbone} (timm)"
    fields = {"depths": "depths", "hidden_sizes": "widths", "embed_dim": "width", "window_size": "window"}
    values = {word: getattr(config, name, None) for name, word in fields.items()}
    parts = [
        f"{word} {'-'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for word, value in values.items()
        if value is not None
    ]
    return f"{config.model_type} ({', '.join(parts)})" if parts else str(config.model_type)


def describe_piloting(config: Any) -> tuple[Detail, ...]:  # noqa: ANN401 - MPFormerConfig, which may be remote code's
    """Say how the model is trained if its training goes on."""
    layers = "all layers" if config.pilot_layers is None else f"the first {config.pilot_layers} layers"
    groups = (
        f"budget of {config.pilot_query_budget} queries"
        if config.pilot_query_budget
        else f"groups: {config.pilot_groups}"
    )
    piloting = (
        f"{groups}, {layers}, {config.pilot_mask_noise} noise of masks {config.pilot_mask_noise_ratio:g}, noise of "
        "labels "
        f"{config.pilot_label_noise_ratio:g}"
        if config.mask_piloting
        else "off: trains as Mask2Former"
    )
    source = Source("configuration", file="config.json")
    return (
        Detail(
            "Layers",
            f"{config.encoder_layers} in the pixel decoder, {config.decoder_layers - 1} in the transformer decoder",
            source,
        ),
        Detail("Mask piloting", piloting, source),
    )


SIZES = {
    "shortest_edge": "shorter side",
    "longest_edge": "longer side at most",
    "height": "height",
    "width": "width",
    "max_height": "height at most",
    "max_width": "width at most",
}


def describe_processor(processor: BaseImageProcessor | None) -> tuple[Detail, ...]:
    """List sizes and thresholds that are stored with a model."""
    if processor is None:
        return ()
    source = Source("configuration of the processor", file="preprocessor_config.json")
    sizes = dict(getattr(processor, "size", None) or {})
    size = ", ".join(f"{word} {sizes[name]}" for name, word in SIZES.items() if sizes.get(name) is not None)
    fields = {
        "score_threshold": "score",
        "mask_threshold": "mask",
        "overlap_mask_area_threshold": "overlap",
        "top_k": "instances at most",
    }
    stored = [
        f"{word} {getattr(processor, name)}"
        for name, word in fields.items()
        if getattr(processor, name, None) is not None
    ]
    return (
        Detail("Size of images", size or "as they are", source),
        *([Detail("Stored thresholds", ", ".join(stored), source)] if stored else []),
    )


def converted_facts(
    model: PreTrainedModel,
    processor: BaseImageProcessor | None,
    conversion: Conversion,
    *,
    origin: Origin,
    label_embedding_is_fresh: bool,
    tasks: Sequence[Task],
    name: str,
    published: ModelFacts | None = None,
) -> ModelFacts:
    """Collect the facts of a model that the converter has made.

    Args:
        model: the converted model.
        processor: of the converted model.
        conversion: what the converter did.
        origin: "mpformer" or "mask2former", for weights that are none of the published ones; it decides the licence.
        label_embedding_is_fresh: True if the file had no label embedding.
        tasks: that the configuration has on.
        name: of the repository.
        published: facts of the published checkpoint that this is (`model_facts.find_published`); they win over
            `origin`, `tasks` and `name`.

    Raises:
        ValueError: the model is not the published one.
    """
    own = facts_of_model(model, processor, tasks=tasks, name=name)
    embedding = (
        own.label_embedding if own.label_embedding == "none" else "fresh" if label_embedding_is_fresh else "kept"
    )
    own = dataclasses.replace(
        own, origin=origin, licence=LICENCES.get(origin), label_embedding=embedding, conversion=conversion
    )
    if published is None:
        return own
    for field in ("num_labels", "num_queries", "query_position_embedding"):
        expected, got = getattr(published, field), getattr(own, field)
        if expected != got:
            raise ValueError(
                f"The converted model is not {published.name}: `{field}` is {got}, not {expected}. Pass "
                "`published=None`."
            )
    counted = ("num_parameters", "classes", "weights_digest", "label_embedding", "conversion")
    return dataclasses.replace(
        published, details=(*published.details, *own.details), **{field: getattr(own, field) for field in counted}
    )


def trained_facts(
    model: PreTrainedModel, processor: BaseImageProcessor | None, record: TrainingRecord, *, name: str
) -> ModelFacts:
    """Collect the facts of a model that a training program has made.

    Its licence is that of the weights that it began as, if their card names one.
    """
    source = Source("training program", command=record.command)
    scores = [
        Score(
            metric=metric,
            value=value,
            unit="fraction",
            task=record.task,
            dataset=record.dataset,
            split="validation",
            source=source,
        )
        for metric, value in record.scores.items()
    ]
    own = facts_of_model(model, processor, tasks=(record.task,), name=name)
    return dataclasses.replace(
        own,
        title=f"{own.name}: {record.task} segmentation of {name_of_data_set(record.dataset)}",
        scores=tuple(scores),
        training=record,
        training_data=(DATA_SETS[record.dataset],) if record.dataset in DATA_SETS else (),
        **(
            {"base_model": record.backbone_start}
            if is_loaded_repository(record.backbone_start)
            else inherit(record.start)
        ),
    )


def inherit(start: str) -> dict[str, Any]:
    """Fields of `ModelFacts` that weights have from those that they began as: which these are, and their licence."""
    fields: dict[str, Any] = {"base_model": start} if is_loaded_repository(start) else {}
    stated = dict(LICENCE_LINE.findall(front_matter_of(read_card_of(start) or "")))
    if identifier := stated.get(""):
        fields["licence"] = Licence(
            identifier,
            f"The weights began as those of `{public_name(start)}`, whose card says `{identifier}`. They stay under that "
            "licence, unless it allows another choice.",
            name=stated.get("_name", ""),
            link=stated.get("_link", ""),
        )
    return fields


# By line, because a person's front matter may be anything, also no YAML.
LICENCE_LINE = re.compile(r"""^license(|_name|_link):[ \t]*["']?([^\s"'\[\]{}]+)["']?[ \t]*$""", re.MULTILINE)


def front_matter_of(text: str) -> str:
    """The part of a card between its first two lines of dashes; empty if there is none."""
    found = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    return found[1] if found else ""


def is_loaded_repository(name: str) -> bool:
    """True for a repository of the Hub whose configuration is in the cache: a model was loaded from it."""
    if not REPOSITORY.fullmatch(name) or Path(name).exists():
        return False
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def read_card_of(start: str) -> str | None:
    """Read the README.md of a folder, or of a repository; `None` if there is none, or if it cannot be reached."""
    path = Path(start) / CARD_FILE
    if not start or not path.is_file():
        if not is_loaded_repository(start):
            return None
        try:
            path = Path(hf_hub_download(start, CARD_FILE))
        except (HfHubHTTPError, OSError):  # not there, not allowed, or offline
            return None
    return path.read_text(encoding="utf-8-sig", errors="replace")


def digest_weights(model: PreTrainedModel) -> str:
    """Digest of all weights with their names, shapes and types: the same after saving and loading."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta":
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]
