"""Convert transformers' Mask2Former into a MP-Former folder, and back.

    python -m conversion.convert_mask2former facebook/mask2former-swin-tiny-coco-instance --output-dir converted
    python -m conversion.convert_mask2former my-mpformer --to-mask2former --output-dir converted

Both have the same weights under the same names, but for the label embedding of mask-piloted training: it begins fresh in one
direction and is dropped in the other. Mask2Former always has a position embedding of the queries; a model without one can become
a Mask2Former only with an embedding of zeros, which computes the same.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedModel,
)

from conversion import ConversionError
from conversion.key_map import LABEL_EMBEDDING, QUERY_POSITIONS
from conversion.loading import load_complete, load_processor, without_progress_bars
from conversion.output_folder import check_folder, new_folder, step
from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor

CHECK_SIZE = 64
LABEL_EMBEDDING_SEED = 0
# Of the largest magnitude. The two implementations add in other orders.
TOLERANCE = 1e-3
# Fields of our image processor that transformers' has too, with the same meaning.
PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "size_divisor",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "ignore_index",
    "do_reduce_labels",
)


@dataclass
class Counterpart:
    """A model in the other format.

    Attributes:
        model: in evaluation mode.
        processor: its image processor, `None` when the folder had none.
        notes: what the user should know, one sentence each.
    """

    model: PreTrainedModel
    processor: MPFormerImageProcessor | Mask2FormerImageProcessor | None
    notes: list[str] = field(default_factory=list)


def from_mask2former(name_or_folder: str) -> Counterpart:
    """Make a MP-Former of transformers' Mask2Former, with a fresh label embedding.

    Raises:
        ConversionError: there is no complete Mask2Former, or the two do not compute the same.
    """
    theirs = load_complete(Mask2FormerForUniversalSegmentation, name_or_folder)
    expected = run(theirs)
    del theirs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(LABEL_EMBEDDING_SEED)
        model = load_complete(MPFormerForUniversalSegmentation, name_or_folder)
    compare(run(model), expected)
    processor = load_processor(MPFormerImageProcessor, name_or_folder)
    notes = [
        f"`{LABEL_EMBEDDING}` begins fresh: Mask2Former has none. Mask-piloted training alone uses it.",
    ]
    if processor is None:
        notes.append("The folder has no image processor; none is written. Make one with `MPFormerImageProcessor(...)`.")
    return Counterpart(model, processor, notes)


def to_mask2former(name_or_folder: str, *, zero_position_embedding: bool = False) -> Counterpart:
    """Make transformers' Mask2Former of a MP-Former, without its label embedding.

    Args:
        name_or_folder: a model of ours.
        zero_position_embedding: True gives a model without position embedding of the queries one of zeros.

    Raises:
        ConversionError: there is no complete model, it has no position embedding, or the two do not compute the same.
    """
    ours = load_complete(MPFormerForUniversalSegmentation, name_or_folder)
    notes = []
    weights = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    if weights.pop(LABEL_EMBEDDING, None) is not None:
        notes.append(f"`{LABEL_EMBEDDING}` is dropped: Mask2Former has no mask-piloted training.")
    if not ours.config.query_position_embedding:
        if not zero_position_embedding:
            raise ConversionError(
                f"The model in `{name_or_folder}` has no position embedding of the queries (query_position_embedding=False), and "
                "Mask2Former cannot do without. One of zeros computes the same, but training would change it: pass "
                "`--zero-position-embedding` if that is what you want."
            )
        notes.append(f"`{QUERY_POSITIONS}` is added, all zeros.")
        weights[QUERY_POSITIONS] = torch.zeros(ours.config.num_queries, ours.config.hidden_dim)
    model = Mask2FormerForUniversalSegmentation(mask2former_config(ours.config)).eval()
    model.load_state_dict(weights)
    compare(run(model), run(ours))
    return Counterpart(model, mask2former_processor(name_or_folder, notes), notes)


# ------------------------------------------------------------------------------------------------------------------- parts


def mask2former_config(config: MPFormerConfig) -> Mask2FormerConfig:
    """All fields that both have; ours alone are those of mask-piloted training and of frozen norms."""
    fields = config.to_dict()
    shared = (Mask2FormerConfig.__annotations__.keys() & MPFormerConfig.__annotations__.keys()) | {
        "id2label",
        "label2id",
    }
    return Mask2FormerConfig(**{name: fields[name] for name in shared & fields.keys() - {"model_type"}})


def mask2former_processor(name_or_folder: str, notes: list[str]) -> Mask2FormerImageProcessor | None:
    """Transformers' image processor with the settings that it knows; notes what it does not."""
    ours = load_processor(MPFormerImageProcessor, name_or_folder)
    if ours is None:
        notes.append("The folder has no image processor; none is written.")
        return None
    notes.append(
        "Thresholds, `top_k` and `label_ids_to_fuse` of the image processor are not written: transformers' takes them as arguments of "
        "its post-processing. It also resizes images to multiples of `size_divisor`, where ours pads."
    )
    return Mask2FormerImageProcessor(**{name: getattr(ours, name) for name in PROCESSOR_FIELDS})


def run(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of an image, (64, 64)."""
    channels = model.config.backbone_config.num_channels
    image = torch.linspace(-1, 1, channels * CHECK_SIZE**2).view(1, channels, CHECK_SIZE, CHECK_SIZE).sin()
    with torch.no_grad():
        outputs = model(image)
    return {"classes": outputs.class_queries_logits, "masks": outputs.masks_queries_logits}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse a model that does not compute the same as its counterpart."""
    for name, logits in found.items():
        difference, scale = float((logits - expected[name]).abs().max()), float(expected[name].abs().max())
        if not difference <= TOLERANCE * scale:  # also when one of them is not finite
            raise ConversionError(
                f"The converted model does not compute the same: its {name} differ by {difference:.1e} (largest magnitude {scale:.1e}). "
                "The weights may be damaged; otherwise please report it."
            )


# ----------------------------------------------------------------------------------------------------------------- program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_mask2former",
        description="Convert transformers' Mask2Former into a MP-Former folder, or back.",
    )
    parser.add_argument("model", help="folder, or repository of the Hub")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder to write; it appears when it is complete"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that an earlier conversion has written"
    )
    parser.add_argument(
        "--to-mask2former", action="store_true", help="the other direction: a model of ours into a Mask2Former"
    )
    parser.add_argument(
        "--zero-position-embedding",
        action="store_true",
        help="with --to-mask2former: give a model without position embedding of the queries one of zeros",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository of the Hub (owner/name)")
    arguments = parser.parse_args(argv)
    if arguments.zero_position_embedding and not arguments.to_mask2former:
        parser.error("--zero-position-embedding needs --to-mask2former")
    return arguments


@without_progress_bars()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    arguments = parse_arguments(argv)
    source = Path(arguments.model)
    try:
        check_folder(arguments.output_dir, overwrite=arguments.overwrite, inputs=[source / "config.json"])
        with step(f"Converting {arguments.model}"):
            if arguments.to_mask2former:
                made = to_mask2former(arguments.model, zero_position_embedding=arguments.zero_position_embedding)
            else:
                made = from_mask2former(arguments.model)
        with (
            step(f"Writing {arguments.output_dir}"),
            new_folder(
                arguments.output_dir, overwrite=arguments.overwrite, inputs=[source / "config.json"]
            ) as unfinished,
        ):
            made.model.save_pretrained(unfinished)
            if made.processor is not None:
                made.processor.save_pretrained(unfinished)
        if arguments.push_to_hub:
            push(made, arguments.push_to_hub)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output_dir}: {type(made.model).__name__}")
    for note in made.notes:
        print(f"  {note}")
    return 0


def push(made: Counterpart, repository: str) -> None:
    """Upload the model and its image processor."""
    with step(f"Uploading to {repository}"):
        try:
            made.model.push_to_hub(repository)
            if made.processor is not None:
                made.processor.push_to_hub(repository)
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ConversionError(f"The upload to `{repository}` failed; the folder is complete. {error}") from error


if __name__ == "__main__":
    sys.exit(main())
