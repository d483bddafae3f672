"""Convert a Detectron2 checkpoint of MP-Former or Mask2Former into a folder for transformers. Detectron2 is not needed.

    python -m conversion.convert_detectron2 model_final.pth --config-file config.yaml --output-dir converted
    python -m conversion.convert_detectron2 model.pkl --config-file config.yaml --output-dir converted MODEL.DN.NUM_DN 3

    checkpoint file ── names of today ──┬── shapes ──────── config and image processor
    config.yaml, KEY VALUE overrides ───┘                            │
                 weights under our names ───────────────── model ── checks ── folder

What the file holds decides where the configuration says something else: see README.md. Nothing is written before the model has
been checked, and the folder appears when it is complete.
"""

import argparse
import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import mpformer_hf
from conversion import ConversionError
from conversion.checkpoint_files import read_checkpoint
from conversion.detectron2_config import Detectron2Config, build_configuration, read_config
from conversion.key_map import (
    CLASS_WEIGHTS,
    LABEL_EMBEDDING,
    WITHOUT_COUNTERPART,
    Mapped,
    count_kinds,
    find_value,
    flip_input_channels,
    list_names,
    original_name,
    to_ours,
    update_names,
)
from conversion.loading import without_progress_bars
from conversion.output_folder import check_folder, new_folder, step
from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor
from mpformer_hf.model_card import attach_card, render_card
from mpformer_hf.model_facts import Conversion, ModelFacts, Task, find_published, read_all_facts
from mpformer_hf.model_inspection import converted_facts

# Of the tensor's largest magnitude. Another order of summation moves the recorded models by 1e-4.
REFERENCE_TOLERANCE = 1e-3
CHECK_SIZE = 64
COUNTER = ".num_batches_tracked"  # of batch norms, the only weight that is no real number
LABEL_EMBEDDING_SEED = 0
# In the order of what a model that can do several is shown for.
TASK_KEYS: dict[Task, str] = {
    "panoptic": "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
    "instance": "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
    "semantic": "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
}
MODEL_CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class Converted:
    """A model of the original as one of ours.

    Attributes:
        model: in evaluation mode.
        processor: its image processor.
        tasks: that the configuration has on.
        sources: our name -> name in the file.
        ignored: name in the file -> why it is not used.
        fresh: our name -> why it begins fresh.
        notes: what the user should know, one sentence each.
        checks: what has been verified, one sentence each.
    """

    model: MPFormerForUniversalSegmentation
    processor: MPFormerImageProcessor
    tasks: tuple[Task, ...]
    sources: dict[str, str]
    ignored: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    @property
    def is_mpformer(self) -> bool:
        """True for a checkpoint of MP-Former: with a label embedding, or without position embedding of the queries."""
        return LABEL_EMBEDDING in self.sources or not self.model.config.query_position_embedding

    @property
    def kind(self) -> str:
        """What the user has converted, in words."""
        backbone = self.model.config.backbone_config.model_type
        tasks = ", ".join(self.tasks) or "unknown"
        return f"{'MP-Former' if self.is_mpformer else 'Mask2Former'} ({backbone}, {tasks} segmentation)"


@dataclass(frozen=True)
class Inputs:
    """What a model is converted from.

    Attributes:
        checkpoint: `.pth`, `.pkl` or safetensors.
        config_file: a Detectron2 YAML; `_BASE_` is followed.
        overrides: "KEY", "VALUE", ... on top of the file.
        reference: recorded outputs, see `check_reference`.
        trust_pickle: see `read_checkpoint`.
    """

    checkpoint: Path
    config_file: Path
    overrides: Sequence[str] = ()
    reference: Path | None = None
    trust_pickle: bool = False

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [file for file in (self.checkpoint, self.config_file, self.reference) if file is not None]


def convert(inputs: Inputs) -> Converted:
    """Read a checkpoint and its configuration, make the model, and check it.

    Raises:
        ConversionError: a file cannot be read, does not fit the others, or the model does not do what it should.
    """
    with step(f"Reading {inputs.config_file.name}"):
        config = read_config(inputs.config_file, inputs.overrides)
    with step(f"Reading {inputs.checkpoint.name}"):
        file = read_checkpoint(inputs.checkpoint, trust_pickle=inputs.trust_pickle)
    with step("Making the model"):
        converted = make_model(file.tensors, config)
    converted.notes[:0] = file.notes
    with step("Checking the model"):
        converted.checks.append(check_forward(converted))
        if inputs.reference is not None:
            converted.checks.append(check_reference(converted, inputs.reference))
    return converted


def make_model(original: Mapping[str, Tensor], config: Detectron2Config) -> Converted:
    """Make our model of the original's weights. Weights of float32 are not copied."""
    tensors, notes = update_names(original)
    tensors, dtype_notes = to_float32(tensors)
    configuration = build_configuration(config, {name: tensor.shape for name, tensor in tensors.items()})
    if configuration.flip_input_channels:
        tensors = flip_input_channels(tensors)
    mapped = to_ours(tensors)
    if not configuration.model.mask_piloting and mapped.tensors.pop(LABEL_EMBEDDING, None) is not None:
        mapped.ignored[mapped.sources.pop(LABEL_EMBEDDING)] = (
            "is for mask-piloted training, which the configuration switches off"
        )
    weights, fresh = complete(mapped, configuration.model)
    return Converted(
        model=load(weights, configuration.model),
        processor=configuration.processor,
        tasks=tuple(task for task, key in TASK_KEYS.items() if config.get(key)),
        sources=mapped.sources,
        ignored=mapped.ignored,
        fresh=fresh,
        notes=[*notes, *dtype_notes, *configuration.notes],
    )


def write_card(converted: Converted, inputs: Inputs, name: str) -> ModelCard:
    """Write the model card; of a published checkpoint, with what its authors have published about it.

    Args:
        converted: the model.
        inputs: what it was converted from.
        name: of the folder or repository.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96] or "mpformer"
    file_name = inputs.checkpoint.name
    files = f"{shlex.quote(file_name)} --config-file {shlex.quote(inputs.config_file.name)}"
    overrides = " ".join(map(shlex.quote, inputs.overrides))
    conversion = Conversion(
        command=f"python -m conversion.convert_detectron2 {files} --output-dir {name} {overrides}".strip(),
        file_name=file_name,
        versions={
            "mpformer_hf": mpformer_hf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        report=(
            *converted.notes,
            *(f"`{key}`: {why}." for key, why in converted.fresh.items() if key != LABEL_EMBEDDING),
        ),
        checks=tuple(converted.checks),
    )

    def collect(published: ModelFacts | None) -> ModelFacts:
        return converted_facts(
            converted.model,
            converted.processor,
            conversion,
            origin="mpformer" if converted.is_mpformer else "mask2former",
            label_embedding_is_fresh=LABEL_EMBEDDING in converted.fresh,
            tasks=converted.tasks,
            name=name,
            published=published,
        )

    with ThreadPoolExecutor(max_workers=1) as pool:  # the file and the weights are hashed at the same time
        digest = pool.submit(hash_file, inputs.checkpoint)
        published = find_card_facts(inputs.checkpoint)
        try:
            facts = collect(published)
        except ValueError as error:
            if published is None:
                raise
            converted.notes.append(f"The model card is a plain one: {error}")
            facts = collect(None)
        return render_card(replace(facts, conversion=replace(conversion, sha256=digest.result())))


def hash_file(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_card_facts(checkpoint: Path) -> ModelFacts | None:
    """Facts of the published checkpoint that a file is. Only files with a published digest in their name are looked at."""
    published = read_all_facts(MODEL_CARDS).values()
    named = [facts for facts in published if facts.original and (facts.original.md5_prefix or "\0") in checkpoint.name]
    return find_published(named, checkpoint) if named else None


def write(
    converted: Converted,
    output_dir: Path,
    card: ModelCard,
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> None:
    """Write the folder: weights, config, image processor, the code that loads them, and the model card.

    Raises:
        ConversionError: the folder is there already, or cannot be written. Then nothing has changed.
    """
    with new_folder(output_dir, overwrite=overwrite, inputs=inputs) as unfinished:
        converted.model.save_pretrained(unfinished)
        converted.processor.save_pretrained(unfinished)
        attach_card(unfinished, card)
    converted.model.name_or_path = str(output_dir)  # its card is found there when it is pushed


def push(converted: Converted, repository: str) -> None:
    """Upload the model with its card and code, and the image processor.

    Raises:
        ConversionError: the upload failed.
    """
    try:
        converted.model.push_to_hub(repository)
        converted.processor.push_to_hub(repository)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConversionError(
            f"The upload to `{repository}` failed; the folder is complete and can be uploaded later. {error}"
        ) from error


# ----------------------------------------------------------------------------------------------------------------- weights


def to_float32(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as the original computes with them, whatever number type the file has."""
    other = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()} - {"torch.float32"})
    notes = [f"Weights of type {', '.join(other)} are converted to float32, as the original does."] if other else []
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, notes


def complete(mapped: Mapped, config: MPFormerConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Check names and shapes against the model of a config, and add what the original has no counterpart for.

    Returns:
        All weights of the model, and those that begin fresh (name -> why).

    Raises:
        ConversionError: weights are missing, superfluous, or of another shape.
    """
    with torch.device("meta"):
        model = MPFormerForUniversalSegmentation(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    raise_for_shapes(mapped, expected)
    weights, fresh = dict(mapped.tensors), {}
    for name in expected.keys() - mapped.tensors.keys():
        constant = find_value(WITHOUT_COUNTERPART, name)
        if constant is not None:
            dtype = torch.int64 if name.endswith(COUNTER) else torch.float32
            weights[name] = torch.full(expected[name], constant, dtype=dtype)
        elif name == LABEL_EMBEDDING:
            generator = torch.Generator().manual_seed(LABEL_EMBEDDING_SEED)
            weights[name] = torch.randn(expected[name], generator=generator)
            fresh[name] = "the file has no label embedding; it is used by mask-piloted training alone"
        elif name == CLASS_WEIGHTS:
            weights[name] = torch.ones(expected[name])
            weights[name][-1] = config.no_object_weight
            fresh[name] = "the file has no class weights; they follow from the configuration"
    missing = [original_name(name) for name in expected if name not in weights]
    if missing:
        raise ConversionError(
            f"The checkpoint lacks {len(missing)} weights of the model that its configuration describes: {list_names(missing)}. "
            "Pass the configuration that the checkpoint was trained with, and the complete checkpoint."
        )
    return weights, fresh


def raise_for_shapes(mapped: Mapped, expected: Mapping[str, torch.Size]) -> None:
    """Refuse weights that the model has no place for, or a place of another shape."""
    superfluous = [mapped.sources[name] for name in mapped.tensors if name not in expected]
    if superfluous:
        raise ConversionError(
            f"The checkpoint holds {len(superfluous)} weights that the model of its configuration has not: "
            f"{list_names(superfluous)}. Pass the configuration that the checkpoint was trained with."
        )
    wrong = [name for name, tensor in mapped.tensors.items() if tensor.is_floating_point() == name.endswith(COUNTER)]
    if wrong:
        raise ConversionError(
            f"Weights of the checkpoint hold the wrong kind of numbers: {list_names([mapped.sources[name] for name in wrong])}, such as "
            f"{mapped.tensors[wrong[0]].dtype}. The checkpoint is damaged."
        )
    differing = [name for name, tensor in mapped.tensors.items() if tensor.shape != expected[name]]
    if differing:
        name = differing[0]
        raise ConversionError(
            f"{len(differing)} weights of the checkpoint have other shapes than the model of its configuration, among them "
            f"`{mapped.sources[name]}`: expected {tuple(expected[name])}, got {tuple(mapped.tensors[name].shape)}. Pass the "
            "configuration that the checkpoint was trained with."
        )


def load(weights: dict[str, Tensor], config: MPFormerConfig) -> MPFormerForUniversalSegmentation:
    """Make the model with these weights, all of them, without initialising or copying any."""
    model, report = MPFormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True
    )
    left = {key: names for key, names in report.items() if names}
    assert not left, left  # `complete` has compared the names
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------ checks


def check_forward(converted: Converted) -> str:
    """Run the model on an image, (64, 64), and refuse outputs that are not finite.

    Returns:
        What was checked.
    """
    config = converted.model.config.backbone_config
    images = (
        torch.linspace(-1, 1, config.num_channels * CHECK_SIZE**2)
        .view(1, config.num_channels, CHECK_SIZE, CHECK_SIZE)
        .sin()
    )
    with torch.no_grad():
        outputs = converted.model(images, output_auxiliary_logits=True)
    if not all(bool(logits.isfinite().all()) for logits in list_logits(outputs).values()):
        bad = [name for name, tensor in converted.model.state_dict().items() if not bool(tensor.isfinite().all())]
        sources = [converted.sources.get(name, name) for name in bad]
        raise ConversionError(
            f"The converted model answers an image of {CHECK_SIZE}x{CHECK_SIZE} pixels with values that are not finite. Weights with "
            f"such values: {list_names(sources) or 'none'}. The checkpoint is damaged, or its training had diverged."
        )
    return f"finite outputs of all levels on an image of {CHECK_SIZE}x{CHECK_SIZE} pixels"


def check_reference(converted: Converted, file: Path) -> str:
    """Compare with outputs that were recorded from the original.

    Args:
        converted: the model and its image processor.
        file: safetensors with `infer.image` (uint8, (3, h, w), RGB) and `infer.pred_logits.L` (1, Q, K + 1) or `infer.pred_masks.L`
            (1, Q, H / 4, W / 4) of the levels 0 to DEC_LAYERS - 1; other tensors are not read.

    Returns:
        What was checked, with the largest difference.

    Raises:
        ConversionError: a difference of more than `REFERENCE_TOLERANCE` times the largest magnitude of the recorded tensor.
    """
    recorded = read_reference(file)
    image = recorded.pop("image")
    inputs = converted.processor(images=image, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        outputs = converted.model(**inputs, output_auxiliary_logits=True)
    logits = list_logits(outputs)
    differences = {}
    for name, expected in recorded.items():
        if name not in logits or logits[name].shape != expected.shape:
            found = f"the shape {tuple(logits[name].shape)}" if name in logits else "no such level"
            raise ConversionError(
                f"`{file}` has `infer.{name}` of the shape {tuple(expected.shape)}, but the converted model has {found}. Pass the recording "
                "of this checkpoint."
            )
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        differences[name] = float((logits[name] - expected).abs().max() / scale)
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= REFERENCE_TOLERANCE:
        raise ConversionError(
            f"The converted model does not answer as recorded in `{file}`: `infer.{worst}` differs by {differences[worst]:.1e} of its "
            f"largest magnitude, allowed are {REFERENCE_TOLERANCE:.0e}. Pass the recording, the configuration and the checkpoint of "
            "one model."
        )
    return f"{len(differences)} recorded outputs differ by at most {differences[worst]:.1e} of their largest magnitude ({worst})"


def read_reference(file: Path) -> dict[str, Tensor]:
    """Image and logits of a recording, without the prefix `infer.`."""
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConversionError(
            f"Expected recorded outputs as safetensors in `{file}`, but it cannot be read: {error}."
        ) from error
    found = {name.removeprefix("infer."): tensor for name, tensor in tensors.items()}
    recorded = {name: found[name] for name in found if name.startswith(("pred_logits.", "pred_masks."))}
    if "image" not in found or not recorded:
        raise ConversionError(
            f"Expected `infer.image` with `infer.pred_logits.L` or `infer.pred_masks.L` in `{file}`, got {list_names(sorted(tensors))}."
        )
    image = found["image"]
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or not image.numel():  # noqa: PLR2004 - RGB
        raise ConversionError(
            f"Expected `infer.image` in `{file}` as uint8, (3, height, width), got {image.dtype}, {tuple(image.shape)}."
        )
    return {"image": image, **{name: tensor.float() for name, tensor in recorded.items()}}


def list_logits(outputs: object) -> dict[str, Tensor]:
    """Class and mask logits of all levels, under the names of recordings: `pred_logits.0`, `pred_masks.0`, ..."""
    last = {"class_queries_logits": outputs.class_queries_logits, "masks_queries_logits": outputs.masks_queries_logits}  # type: ignore[attr-defined]
    named = {}
    for level, logits in enumerate([*outputs.auxiliary_logits, last]):  # type: ignore[attr-defined]
        named[f"pred_logits.{level}"] = logits["class_queries_logits"]
        named[f"pred_masks.{level}"] = logits["masks_queries_logits"]
    return named


# ----------------------------------------------------------------------------------------------------------------- program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_detectron2",
        description="Convert a Detectron2 checkpoint of MP-Former or Mask2Former into a folder for transformers.",
        epilog="Example: python -m conversion.convert_detectron2 model_final.pth --config-file config.yaml --output-dir converted",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="weights: .pth of Detectron2, .pkl of its model zoo, or safetensors"
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        required=True,
        help="YAML that the checkpoint was trained with; its _BASE_ files are read too",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder to write; it appears when it is complete"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that an earlier conversion has written"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository of the Hub (owner/name)")
    parser.add_argument(
        "--reference", type=Path, help="safetensors with outputs of the original, which the converted model must repeat"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="if the checkpoint needs other classes than numbers and plain containers: load it with Python's pickle, which runs "
        "whatever code the file contains",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY VALUE",
        help="keys that were set on the command line of the training, with their values",
    )
    return parser.parse_intermixed_args(argv)


@without_progress_bars()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    arguments = parse_arguments(argv)
    inputs = Inputs(
        arguments.checkpoint, arguments.config_file, arguments.overrides, arguments.reference, arguments.trust_pickle
    )
    output_dir = arguments.output_dir
    try:
        check_folder(output_dir, overwrite=arguments.overwrite, inputs=inputs.files)
        converted = convert(inputs)
        with step(f"Writing {output_dir}"):
            name = (arguments.push_to_hub or output_dir.resolve().name).rpartition("/")[2]
            card = write_card(converted, inputs, name)
            write(converted, output_dir, card, overwrite=arguments.overwrite, inputs=inputs.files)
        print_report(converted, inputs.checkpoint, output_dir)
        if arguments.push_to_hub:
            with step(f"Uploading to {arguments.push_to_hub}"):
                push(converted, arguments.push_to_hub)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def print_report(converted: Converted, checkpoint: Path, output_dir: Path) -> None:
    """Say what became of each weight, and what the user should know."""
    print(f"{output_dir} is the {converted.kind} of {checkpoint.name}.")
    print(f"{len(set(converted.sources.values()))} weights of the file are used, {len(converted.ignored)} are not.")
    lines = {
        "not used": count_kinds(converted.ignored),
        "fresh": [f"{name} ({reason})" for name, reason in converted.fresh.items()],
        "checked": converted.checks,
        "note": converted.notes,
    }
    for what, texts in lines.items():
        for text in texts:
            print(f"  {what + ':':<10}{text}")


if __name__ == "__main__":
    sys.exit(main())
