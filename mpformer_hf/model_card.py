"""Model cards: the text of README.md in a model's repository, written from facts that name their sources.

    facts = facts_of_model(model, processor)          # or `read_facts`, `trained_facts`, `converted_facts`
    card = render_card(facts)                         # a `huggingface_hub.ModelCard`; `training_card` does both
    attach_card(folder, card)                         # writes README.md, unless a person has written one

    python -m mpformer_hf.model_card render model_cards/            renders every model_cards/*.json
    python -m mpformer_hf.model_card render model_cards/ --check    fails if a rendered card is not up to date

For whoever pushes a model: `card_for_model(model, processor)` is the text to upload when the repository has no
README.md; where it has one of which `is_by_a_person(text)` is true, upload nothing. A model that was loaded from a
folder or repository whose card is about exactly these weights gets that card, with its scores and its licence; if the
weights have changed since, the licence alone. The card does not belong to the code that is saved with a model, so
modelling files must not import this file; the package may hand them the function, from one that imports it when it is
called.

For whoever converts a model: `render_card(converted_facts(model, processor, Conversion(...), ...))`.

Every card ends with a comment that holds a digest of its text. A card that does not agree with its digest belongs to
the person who changed it.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import BaseImageProcessor, PreTrainedModel

from .model_facts import (
    BACKBONE_DATA_SETS,
    MASK2FORMER,
    METRICS,
    MPFORMER,
    Conversion,
    DataSet,
    ModelFacts,
    Score,
    Source,
    Task,
    TrainingRecord,
    name_of_data_set,
    public_name,
    read_all_facts,
)
from .model_inspection import CARD_FILE, REPOSITORY, facts_of_model, inherit, read_card_of, trained_facts

MAX_CLASSES_IN_LINE = 30
MILLION = 1e6
SECONDS_OF_MINUTE = 60

MASK2FORMER_PAPER = "https://arxiv.org/abs/2112.01527"
MPFORMER_PAPER = "https://arxiv.org/abs/2303.07336"

# ------------------------------------------------------------------------------------------------------------- the card


def render_card(facts: ModelFacts) -> ModelCard:
    """Write the card of a model.

    Args:
        facts: all that the card says.

    Returns:
        Front matter and text; `str` of it is the content of README.md.
    """
    sections = [
        f"# {facts.title}",
        introduce(facts),
        describe_use(facts),
        describe_model(facts),
        describe_training(facts),
        describe_results(facts),
        describe_limits(facts),
        describe_differences(facts),
        describe_making(facts),
        describe_licence(facts),
        describe_citation(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    front_matter = make_card_data(facts).to_yaml()
    return ModelCard(sign(f"---\n{front_matter}\n---\n\n{body}\n", facts.weights_digest))


def make_card_data(facts: ModelFacts) -> ModelCardData:
    """Make the front matter."""
    method = "mask2former" if facts.origin.startswith("mask2former") else "mpformer"
    data_sets = [data_set.id for data_set in facts.training_data if data_set.id not in BACKBONE_DATA_SETS]
    return ModelCardData(
        license=facts.licence.identifier if facts.licence else None,
        license_name=(facts.licence and facts.licence.name) or None,
        license_link=(facts.licence and facts.licence.link) or None,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["vision", "image-segmentation", *(f"{task}-segmentation" for task in facts.tasks), "mpformer", method],
        datasets=data_sets or None,
        base_model=facts.base_model or None,
        model_name=facts.name if facts.scores else None,
        eval_results=make_eval_results(facts.scores) or None,
    )


def make_eval_results(scores: Sequence[Score]) -> list[EvalResult]:
    """Put scores into the form of the front matter, which has one source for each data set, split and task.

    Where something was measured here, that stands there, and what is quoted stands in the text alone.
    """
    places = [(score.dataset, score.split, score.task) for score in scores]
    measured = {place for place, score in zip(places, scores, strict=True) if score.source.is_measured}
    return [
        make_eval_result(score)
        for place, score in zip(places, scores, strict=True)
        if score.source.is_measured or place not in measured
    ]


def make_eval_result(score: Score) -> EvalResult:
    """Put one score, in percent, into the form of the front matter; the name says whether it is quoted."""
    is_measured = score.source.is_measured
    return EvalResult(
        task_type="image-segmentation",
        task_name=f"{score.task} segmentation",
        dataset_type=score.dataset,
        dataset_name=name_of_data_set(score.dataset),
        dataset_config=score.task,
        dataset_split=score.split,
        metric_type=METRICS[score.metric].type,
        metric_name=f"{score.label}, percent ({'measured here' if is_measured else 'quoted'})",
        metric_value=score.percent,
        # The Hub wants an address, which a command has not.
        source_name=None if is_measured else f"Quoted from: {score.source.name}",
        source_url=None if is_measured else score.source.url,
    )


# ------------------------------------------------------------------------------------------------------------- sections


def introduce(facts: ModelFacts) -> str:
    """Say in a paragraph what the model is, and what the numbers on the card are worth."""
    paragraphs = [f"{say_origin(facts)} {say_size(facts)}"]
    if facts.scores and not any(score.source.is_measured for score in facts.scores):
        paragraphs.append(
            "**All scores on this card are quoted**, each from the page that it names. None was measured with the "
            "converted weights."
        )
    elif not facts.scores:
        paragraphs.append("**This model has not been scored**, as far as this card knows.")
    return "\n\n".join(paragraphs)


def say_origin(facts: ModelFacts) -> str:
    """Say whose weights these are, and what code runs them."""
    package = "`mpformer_hf`, MP-Former and Mask2Former for transformers"
    papers = f"[Mask2Former]({MASK2FORMER_PAPER})", f"[MP-Former]({MPFORMER_PAPER})"
    match facts.origin:
        case "mask2former-zoo":
            return f"Weights of {papers[0]} from its [model zoo]({MASK2FORMER}/blob/main/MODEL_ZOO.md), for {package}."
        case "mpformer-release":
            return f"Weights of {papers[1]} (CVPR 2023), as its [authors released]({MPFORMER}) them, for {package}."
        case "mask2former" | "mpformer":
            method = papers[0] if facts.origin == "mask2former" else papers[1]
            return f"Weights that were trained with the original code of {method}, converted for {package}."
    return f"A model of {papers[1]}, mask-piloted training of {papers[0]}, made with {package}."


def say_size(facts: ModelFacts) -> str:
    """Say what the model is for and how large it is."""
    tasks = f"For {join_words([*facts.tasks])} segmentation: " if facts.tasks else ""
    counted = f", {facts.num_parameters / MILLION:.1f} million parameters" if facts.num_parameters else ""
    return f"{tasks}{facts.backbone}, {count(facts.num_labels, 'class')}, {count(facts.num_queries, 'query')}{counted}."


POST_PROCESSING: dict[Task, str] = {
    "panoptic": """\
[result] = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
result["segmentation"]  # (height, width), ids of segments; 0 where there is none
result["segments_info"]  # id, label_id and score of each""",
    "instance": """\
[result] = processor.post_process_instance_segmentation(outputs, target_sizes=sizes, preset="evaluation")
result["masks"], result["scores"], result["labels"], result["boxes"]  # masks may overlap; highest score first""",
    "semantic": """\
[result] = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
result  # (height, width), the class of each pixel""",
}


PIPELINE_CALL: dict[bool, str] = {
    False: """\
segments = segment("image.jpg", subtask="semantic")""",
    True: """\
stored = segment.image_processor  # the pipeline would put thresholds of its own in the place of those of the model
segments = segment(
    "image.jpg",
    subtask="{task}",
    threshold=stored.score_threshold,
    mask_threshold=stored.mask_threshold,
    overlap_mask_area_threshold=stored.overlap_mask_area_threshold,
)""",
}


def describe_use(facts: ModelFacts) -> str:
    """Show how the model is loaded: with the package, without it, and as a pipeline."""
    return f"""\
## How to use

With `mpformer_hf` installed:

```python
import torch
from PIL import Image

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor

# This repository, or a folder with its files.
checkpoint = "OWNER/{facts.name}"
model = MPFormerForUniversalSegmentation.from_pretrained(checkpoint).eval()
processor = MPFormerImageProcessor.from_pretrained(checkpoint)

image = Image.open("image.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
sizes = [(image.height, image.width)]
{POST_PROCESSING[facts.task]}
```

Without it, the code comes with the weights. `trust_remote_code=True` runs it: read it first, and pin a `revision`.

```python
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

model = AutoModelForUniversalSegmentation.from_pretrained(checkpoint, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
```

As a pipeline:

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model=checkpoint, trust_remote_code=True)
{PIPELINE_CALL[facts.task != "semantic"].format(task=facts.task)}
```

In training mode, with `mask_labels` and `class_labels`, the model returns its loss."""


def describe_model(facts: ModelFacts) -> str:
    """List the architecture."""
    source = cite(facts.source)
    position = f"{'with' if facts.query_position_embedding else 'without'} a position embedding"
    rows = [
        ("Backbone", facts.backbone, source),
        ("Classes", say_classes(facts), source),
        ("Queries", f"{facts.num_queries}, {position}", source),
        ("Label embedding of mask-piloted training", *LABEL_EMBEDDINGS[facts.label_embedding]),
    ]
    if facts.num_parameters:
        rows.append(("Parameters", f"{facts.num_parameters:,}", "counted in this model"))
    rows += [(detail.name, detail.value, cite(detail.source)) for detail in facts.details]
    return f"## Model\n\n{table(('', '', 'source'), rows)}"


LABEL_EMBEDDINGS = {
    "kept": ("as in the original file; training alone uses it", "the conversion"),
    "fresh": ("random, because the original has none; training alone uses it", "the conversion"),
    "trained": ("part of the model; training alone uses it", "`config.json`"),
    "none": ("none", "`config.json`"),
}


def say_classes(facts: ModelFacts) -> str:
    """Name the classes, if they are few."""
    if not facts.classes:
        return f"{facts.num_labels}; their names are in `config.json`, `id2label`"
    shown = ", ".join(facts.classes[:MAX_CLASSES_IN_LINE])
    rest = facts.num_labels - MAX_CLASSES_IN_LINE
    return f"{facts.num_labels}: {shown}" + (f", and {rest} more (`config.json`, `id2label`)" if rest > 0 else "")


def describe_training(facts: ModelFacts) -> str:
    """Say what the model learned from, and how."""
    parts = ["## Training"]
    if facts.training_data:
        rows = [
            (say_role(data_set), link(data_set.name, data_set.url), say_terms(data_set))
            for data_set in facts.training_data
        ]
        parts.append(table(("", "data", "terms"), rows))
    recipe = [(detail.name, detail.value, cite(detail.source)) for detail in facts.recipe]
    if facts.training:
        parts.append(describe_record(facts.training))
    elif recipe:
        parts.append(table(("", "", "source"), recipe))
    if facts.unknown:
        parts.append(f"Not published:\n\n{bullets(facts.unknown)}")
    return "\n\n".join(parts) if len(parts) > 1 else "## Training\n\nThis card does not know how the model was trained."


def say_role(data_set: DataSet) -> str:
    """Say what of the model learned from a data set."""
    return "backbone, before" if data_set.id in BACKBONE_DATA_SETS else "model"


def say_terms(data_set: DataSet) -> str:
    """Say under which terms the images can be had."""
    if data_set.terms_source is None:
        return "not known to this card; ask its owners"
    return f"{data_set.terms} ({cite(data_set.terms_source)})"


def describe_record(record: TrainingRecord) -> str:
    """List what a training program set and measured."""
    rows = [
        ("Data set", f"{record.dataset}, {record.task}: {count(record.num_train_images, 'image')}"),
        ("Validation split", count(record.num_validation_images, "image")),
        ("Began as", say_start(record)),
        ("Steps", f"{record.steps}, of {count(record.images_per_step, 'image')}"),
        ("Seed", str(record.settings.get("seed", "not set"))),
        ("Time of the steps", say_duration(record.seconds)),
        ("Hardware", record.hardware),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("Command", f"`{record.command}`"),
    ]
    if record.final_losses:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in record.final_losses.items())
        rows.append(("Losses at the end", losses))
    settings = json.dumps(dict(record.settings), indent=2, ensure_ascii=False)
    return (
        f"{table(('', ''), rows)}\n\n<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
    )


def say_start(record: TrainingRecord) -> str:
    """Say what the weights were before."""
    if record.start:
        return f"`{public_name(record.start)}`"
    return (
        f"random weights, backbone `{public_name(record.backbone_start)}`"
        if record.backbone_start
        else "random weights"
    )


def describe_results(facts: ModelFacts) -> str:
    """List all scores, each with its source."""
    if not facts.scores:
        return ""
    rows = [
        (
            f"{name_of_data_set(score.dataset)} {score.split}",
            score.task,
            score.label,
            say_number(score),
            cite(score.source),
        )
        for score in facts.scores
    ]
    header = ("data", "segmentation", "metric", "percent", "source")
    text = f"## Results\n\n{table(header, rows)}"
    if facts.training:
        images = count(facts.training.num_validation_images, "image")
        text += f"\n\nMeasured on {images}, at their own size, with the stored thresholds."
    return text


def say_number(score: Score) -> str:
    """Write a score in percent: quoted ones with the digits that they came with, measured ones with two."""
    if score.source.is_measured:
        return f"{score.percent:.2f}"
    text = f"{score.percent:g}"
    return text if "." in text else f"{text}.0"


def describe_limits(facts: ModelFacts) -> str:
    """Say what the model is good for, and what nobody should conclude from its scores."""
    seen = join_words([data_set.name for data_set in facts.training_data if data_set.id not in BACKBONE_DATA_SETS])
    seen = seen or (facts.training.dataset if facts.training else "")
    points = [
        f"Meant for research on segmentation, for images like those of {seen or 'its training data'}, and as a start "
        "for training on "
        "other data.",
        f"It knows {count(facts.num_labels, 'class')}. Anything else in an image is left out, or is taken for one of "
        "them.",
        "Its scores say nothing about other cameras, places, times or groups of people; none of that was measured. Do "
        "not decide about "
        "people's safety or rights with it without an evaluation of your own.",
        "The network sees padding as it sees any other pixel, as in the original, so that results depend slightly on "
        "the batch in which "
        "an image stands. Padding itself never appears in them.",
    ]
    values = {score.metric: score.percent for score in reversed(facts.scores) if score.task == "instance"}
    if {"ap_small", "ap_large"} <= values.keys():
        points.append(
            f"Small objects are found far less well than large ones (mask AP {values['ap_small']:g} against "
            f"{values['ap_large']:g}, "
            "see the table)."
        )
    if facts.licence and "-nc-" in facts.licence.identifier:
        points.append("Not for commercial use: see the licence below.")
    return f"## Intended use and limits\n\n{bullets(points)}"


def describe_differences(facts: ModelFacts) -> str:
    """List what is not as in the code that trained the weights."""
    if not facts.is_converted:
        return ""
    embedding = {
        "kept": "The label embedding of mask-piloted training (`label_enc`) was kept; evaluation does not use it.",
        "fresh": "The original has no label embedding of mask-piloted training. One with random values was added, for "
        "training only; "
        "`mask_piloting=False` leaves it out, and the model is exactly Mask2Former.",
    }
    position = {
        True: "The position embedding of the queries was kept.",
        False: "The queries have no position embedding, because the released code of MP-Former has none "
        "(`query_position_embedding=False`).",
    }
    points = [
        "**Weights**: the same numbers under the names of transformers' Mask2Former; fused projections of queries, "
        "keys and values "
        "were cut in three.",
        f"**Queries**: {position[facts.query_position_embedding]}",
        *([f"**Label embedding**: {embedding[facts.label_embedding]}"] if facts.label_embedding in embedding else []),
        "**Colours**: the model takes RGB. Where a configuration says `INPUT.FORMAT: BGR`, the converter turns the "
        "channels of the first "
        "layer, and mean and standard deviation, around.",
        "**Computation**: attention masks are predicted at the size at which they are used, instead of being shrunk; "
        "the results are equal "
        "up to rounding.",
        "**Results**: the rules of the original, with its thresholds stored in `preprocessor_config.json`. Instances "
        "come sorted by their "
        "score, with boxes around their masks (the original returns zeros).",
        "**Compared with transformers' Mask2Former**: padding is cropped before results are resized, logits are "
        "resized to the image instead "
        "of to 384x384, panoptic results have void, and instances may overlap.",
    ]
    return f"## Differences from the original\n\n{bullets(points)}"


def describe_making(facts: ModelFacts) -> str:
    """Say how the weights were converted, or how to convert them."""
    if facts.conversion:
        return describe_conversion(facts.conversion)
    if facts.original is None:
        return ""
    original = facts.original
    code = original.repository.rsplit("/", 1)[-1]
    digits = f" (its MD5 begins with `{original.md5_prefix}`)" if original.md5_prefix else ""
    config = f"[`{original.config}`]({original.repository}/blob/main/{original.config})"
    return f"""\
## How it is made

From [`{original.file_name}`]({original.weights}){digits}, with the configuration
{config}, in a checkout of `mpformer_hf`:

```bash
python -m conversion.convert_detectron2 {original.file_name} \\
    --config-file {code}/{original.config} \\
    --output-dir {facts.name}
```

The converter runs the converted model once, and reports every key that it did not simply rename."""


def describe_conversion(conversion: Conversion) -> str:
    """Say how the weights were converted."""
    digest = f" (SHA-256 `{conversion.sha256}`)" if conversion.sha256 else ""
    versions = ", ".join(f"{name} {version}" for name, version in conversion.versions.items())
    parts = [
        "## How it was made",
        f"From `{conversion.file_name}`{digest}{f', with {versions}' if versions else ''}:",
        f"```bash\n{conversion.command}\n```",
    ]
    if sentences := [*conversion.report, *conversion.checks]:
        parts.append(bullets(sentences))
    return "\n\n".join(parts)


def describe_licence(facts: ModelFacts) -> str:
    """Say under which licence the weights and the code are."""
    weights = (
        facts.licence.text
        if facts.licence
        else (
            "Nobody has chosen a licence for these weights yet: add `license:` to the front matter. Mind the terms of "
            "the training data, and "
            "of the weights that the training began with."
        )
    )
    terms = [data_set for data_set in facts.training_data if data_set.terms]
    data = (
        f" The terms of the images that it learned from ({join_words(unique(d.name for d in terms))}) are listed above."
        if terms
        else ""
    )
    code = "The code of `mpformer_hf`, also where it lies beside the weights, is under Apache-2.0."
    return f"## Licence\n\n{weights}{data}\n\n{code}"


CITATIONS = {
    "mpformer": """\
@inproceedings{zhang2023mpformer,
  title     = {{MP-Former}: Mask-Piloted Transformer for Image Segmentation},
  author    = {Zhang, Hao and Li, Feng and Xu, Huaizhe and Huang, Shijia and Liu, Shilong and Ni, Lionel M. and
               Zhang, Lei},
  booktitle = {CVPR},
  year      = {2023}
}""",
    "mask2former": """\
@inproceedings{cheng2022mask2former,
  title     = {Masked-attention Mask Transformer for Universal Image Segmentation},
  author    = {Cheng, Bowen and Misra, Ishan and Schwing, Alexander G. and Kirillov, Alexander and Girdhar, Rohit},
  booktitle = {CVPR},
  year      = {2022}
}""",
}


def describe_citation(facts: ModelFacts) -> str:
    """List the papers."""
    names = ("mask2former",) if facts.origin.startswith("mask2former") else ("mpformer", "mask2former")
    return "## Citation\n\n```bibtex\n{}\n```".format("\n\n".join(CITATIONS[name] for name in names))


# ------------------------------------------------------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; line breaks and bars in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[re.sub(r"\s+", " ", cell).strip().replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def bullets(points: Iterable[str]) -> str:
    """Write a list."""
    return "\n".join(f"- {point}" for point in points)


def link(name: str, url: str) -> str:
    """Write a link, or the name alone where there is no address."""
    return f"[{name}]({url})" if url else name


def cite(source: Source) -> str:
    """Write where a statement comes from."""
    if source.file:
        return f"`{source.file}`"
    return f"measured here: `{source.command}`" if source.is_measured else link(source.name, source.url)


def count(number: int, noun: str) -> str:
    """Write a number with its noun."""
    plurals = {"class": "classes", "query": "queries"}
    return f"{number:,} {noun if number == 1 else plurals.get(noun, f'{noun}s')}"


def join_words(words: Sequence[str]) -> str:
    """Write "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def unique(words: Iterable[str]) -> list[str]:
    """Drop repetitions; the order stays."""
    return list(dict.fromkeys(words))


def say_duration(seconds: float) -> str:
    """Write a duration in the unit that suits it."""
    if seconds < SECONDS_OF_MINUTE:
        return f"{seconds:.1f} s"
    minutes = seconds / SECONDS_OF_MINUTE
    return f"{minutes:.1f} min" if minutes < SECONDS_OF_MINUTE else f"{minutes / SECONDS_OF_MINUTE:.1f} h"


# -------------------------------------------------------------------------------------- for programs that save and push


def training_card(
    model: PreTrainedModel, processor: BaseImageProcessor | None, record: TrainingRecord, *, name: str
) -> ModelCard:
    """Write the card of a model from what its training program has measured.

    Args:
        model: the trained model, without wrappers.
        processor: of the model.
        record: what was set and measured.
        name: of the model, a suggestion for its repository.
    """
    return render_card(trained_facts(model, processor, record, name=name))


def card_for_model(
    model: PreTrainedModel, processor: BaseImageProcessor | None = None, *, name: str | None = None
) -> str:
    """Write the README.md that a model is pushed with when its repository has none.

    Args:
        model: an `MPFormerForUniversalSegmentation`.
        processor: its image processor, if it is at hand.
        name: of the repository that it is pushed to; `None`: of where it was loaded from.

    Returns:
        The card of the folder or repository that the model was loaded from, if it is about exactly these weights;
        otherwise a new one with what the model says about itself.
    """
    start = str(model.name_or_path or "")
    facts = facts_of_model(model, processor)
    text = read_card_of(start)
    if text is not None and f"weights {facts.weights_digest}" in signature_of(text):
        return text
    return str(render_card(dataclasses.replace(facts, name=name or facts.name, **inherit(start))))


# ----------------------------------------------------------------------------------------------------- files and people

SIGNATURE = re.compile(r"<!-- card by mpformer_hf: text (?P<text>[0-9a-f]{16})[^>]*-->\s*\Z")


def sign(text: str, weights_digest: str = "") -> str:
    """Add the comment by which a card is known to be as it was written."""
    weights = f", weights {weights_digest}" if weights_digest else ""
    return f"{text}\n<!-- card by mpformer_hf: text {digest_text(text)}{weights} -->\n"


def digest_text(text: str) -> str:
    """Digest that does not depend on line ends, nor on blank lines around."""
    return hashlib.sha256("\n".join(text.strip().splitlines()).encode()).hexdigest()[:16]


def signature_of(text: str) -> str:
    """The comment at the end of a card that is as it was written; empty for any other text."""
    found = SIGNATURE.search(text)
    return found[0] if found and found["text"] == digest_text(text[: found.start()]) else ""


def add_tags(text: str, tags: Iterable[str]) -> str:
    """Add tags to the front matter of a card; one that is as it was written stays so."""
    signature = signature_of(text)
    card = ModelCard(text[: -len(signature)] if signature else text)
    present = card.data.get("tags") or []
    missing = [tag for tag in unique(tags) if tag not in present]
    if not missing:
        return text
    card.data["tags"] = [*present, *missing]
    if not signature:
        return str(card)
    weights = re.search(r"weights ([0-9a-f]+)", signature)
    return sign(f"{str(card).rstrip()}\n", weights[1] if weights else "")


def is_by_a_person(text: str) -> bool:
    """True for a README.md that this module has not written, or that was changed since."""
    return not signature_of(text)


def attach_card(
    folder_or_repository: str | Path,
    card: ModelCard | str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
) -> bool:
    """Write the README.md of a folder, or of a repository on the Hub, unless a person has written one there.

    Args:
        folder_or_repository: a folder that exists, or `owner/name`.
        card: what to write.
        token: for a repository; `None` takes the stored one.
        revision: branch of a repository.

    Returns:
        True if the card was written, False if a person's README.md was left as it is.

    Raises:
        FileNotFoundError: there is no such folder, and the name cannot be one of a repository.
    """
    folder = Path(folder_or_repository)
    if folder.is_dir():
        path = folder / CARD_FILE
        if path.exists() and is_by_a_person(path.read_text(encoding="utf-8", errors="replace")):
            return False
        unfinished = folder / f".{CARD_FILE}.unfinished"
        unfinished.write_text(str(card), encoding="utf-8", newline="\n")
        unfinished.replace(path)
        return True
    if not REPOSITORY.fullmatch(str(folder_or_repository)):
        raise FileNotFoundError(
            f"{folder_or_repository} is neither a folder that exists nor a repository (`owner/name`)."
        )
    return push_card(str(folder_or_repository), card, token=token, revision=revision)


def push_card(repository: str, card: ModelCard | str, *, token: str | bool | None, revision: str | None) -> bool:
    """Upload a card to a repository that has none, or one of ours; says whether it was done."""
    api = HfApi(token=token)
    if api.file_exists(repository, CARD_FILE, revision=revision):
        there = Path(api.hf_hub_download(repository, CARD_FILE, revision=revision))
        if is_by_a_person(there.read_text(encoding="utf-8", errors="replace")):
            return False
    api.upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo=CARD_FILE,
        repo_id=repository,
        revision=revision,
        commit_message="Model card",
    )
    return True


# ---------------------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; what is wrong with the facts ends with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m mpformer_hf.model_card", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="render every *.json of a folder to *.md beside it")
    render.add_argument("folder", type=Path, metavar="FOLDER")
    render.add_argument("--check", action="store_true", help="write nothing; fail if a card is not up to date")
    options = parser.parse_args(argv)
    try:
        stale = check_folder(options.folder) if options.check else render_folder(options.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.check and stale:
        sys.exit(
            "".join(stale)
            + f"error: {len(stale)} card(s) are not up to date. Run: {parser.prog} render {options.folder}"
        )
    sys.stdout.write("Every card is up to date.\n" if options.check else "".join(f"{line}\n" for line in stale))


def render_texts(folder: Path) -> dict[str, str]:
    """Render the facts in a folder: name of each file to its text."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    facts = read_all_facts(folder)
    if not facts:
        raise ValueError(f"{folder} holds no facts (*.json).")
    return {f"{name}.md": str(render_card(fact)) for name, fact in facts.items()}


def cards_in(folder: Path, rendered: Iterable[str]) -> dict[str, str]:
    """Read the cards that lie in a folder: files of these names, and others that this module has written."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    return {name: text for name, text in texts.items() if name in set(rendered) or not is_by_a_person(text)}


def render_folder(folder: Path) -> list[str]:
    """Write every card, and remove those whose facts are gone; returns a line for each file that changed."""
    texts = render_texts(folder)
    there = cards_in(folder, texts)
    for name in there.keys() - texts.keys():
        (folder / name).unlink()
    changed = sorted(name for name, text in texts.items() if there.get(name) != text)
    for name in changed:
        (folder / name).write_text(texts[name], encoding="utf-8", newline="\n")
    removed = [f"removed {folder / name}" for name in sorted(there.keys() - texts.keys())]
    return [f"wrote {folder / name}" for name in changed] + removed


def check_folder(folder: Path) -> list[str]:
    """Compare every card with its facts; returns the difference of each that is not up to date."""
    texts = render_texts(folder)
    there = cards_in(folder, texts)
    return [
        "".join(
            difflib.unified_diff(
                there.get(name, "").splitlines(keepends=True),
                texts.get(name, "").splitlines(keepends=True),
                fromfile=f"{folder / name}",
                tofile="rendered from the facts",
            )
        )
        for name in sorted(texts.keys() | there.keys())
        if texts.get(name) != there.get(name)
    ]


if __name__ == "__main__":
    main()
