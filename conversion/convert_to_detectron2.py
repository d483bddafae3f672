"""Convert a model of ours into a checkpoint that the original code of MP-Former or Mask2Former loads with `strict=True`.

    python -m conversion.convert_to_detectron2 folder-or-repository --output model_final.pth

The way back of `convert_detectron2.py`, by the same table of names: a checkpoint that went there and back is the same, bit for bit.
A model without position embedding of the queries becomes one of MP-Former, with its label embedding; one with it becomes one of
Mask2Former, which has no label embedding.
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from conversion import ConversionError
from conversion.key_map import LABEL_EMBEDDING, Mapped, count_kinds, flip_input_channels, to_original, with_versions
from conversion.loading import load_complete, without_progress_bars
from conversion.output_folder import check_file, new_file, step
from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation

RESNET_DEPTHS = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
# What the original fixes, without a key for it.
FIXED_FIELDS = {"encoder_feedforward_dim": 1024, "activation_function": "relu"}
LABEL_EMBEDDING_CHOICES = ("auto", "keep", "drop")


def convert(
    model: MPFormerForUniversalSegmentation, *, label_embedding: str = "auto", input_format: str = "RGB"
) -> tuple["OrderedDict[str, Tensor]", Mapped]:
    """Rename the weights of a model to those of the original.

    Args:
        model: with a ResNet or a Swin backbone of transformers.
        label_embedding: "keep" or "drop" that of mask-piloted training; "auto" keeps it where MP-Former has one.
        input_format: "BGR" for a configuration of the original whose images have that order; ours have "RGB".

    Returns:
        The state dict, with the versions of the original's modules, and what has no place in it.

    Raises:
        ConversionError: the original cannot express the model; the message names the field.
    """
    config = model.config
    raise_if_inexpressible(config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    keep = not config.query_position_embedding if label_embedding == "auto" else label_embedding == "keep"
    dropped = {} if keep else {name: weights.pop(name) for name in (LABEL_EMBEDDING,) if name in weights}
    mapped = to_original(weights, batch_norm_counters=not config.freeze_backbone_norm)
    mapped.ignored.update(dict.fromkeys(dropped, "is not loaded by the original's Mask2Former"))
    tensors = flip_input_channels(mapped.tensors) if input_format == "BGR" else mapped.tensors
    return with_versions({name: alone(tensor) for name, tensor in tensors.items()}), mapped


def alone(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own: `torch.save` writes the whole memory that a tensor shares."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()


def raise_if_inexpressible(config: MPFormerConfig) -> None:
    """Refuse what the original's code has no key for."""
    for field, value in FIXED_FIELDS.items():
        if getattr(config, field) != value:
            raise ConversionError(
                f"The original has `{field}` {value!r} only, this model has {getattr(config, field)!r}."
            )
    backbone = config.backbone_config
    if backbone.model_type == "resnet":
        widths = list(backbone.hidden_sizes)
        if widths != [widths[0] * 2**stage for stage in range(4)]:
            raise ConversionError(f"The original's ResNet doubles its width at each stage; `hidden_sizes` is {widths}.")
        if (backbone.layer_type, tuple(backbone.depths)) not in RESNET_DEPTHS:
            raise ConversionError(
                f"The original's ResNet has 18, 34, 50, 101 or 152 layers; this one has {backbone.layer_type} blocks, {backbone.depths} "
                "of them in its stages."
            )
    elif backbone.model_type != "swin":
        raise ConversionError(
            f"The original has ResNet and Swin backbones, this model has `{backbone.model_type}`. (Of timm's ResNets, "
            "`python -m conversion.convert_backbone` makes transformers' ResNet.)"
        )


def describe_keys(config: MPFormerConfig) -> dict[str, object]:
    """Keys of the original's configuration that its model needs for these weights."""
    keys: dict[str, object] = {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": config.count_labels(),
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": config.feature_size,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": config.mask_feature_size,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": config.encoder_layers,
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": name_decoder(config),
        "MODEL.MASK_FORMER.HIDDEN_DIM": config.hidden_dim,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": config.num_queries,
        "MODEL.MASK_FORMER.NHEADS": config.num_attention_heads,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": config.dim_feedforward,
        "MODEL.MASK_FORMER.DEC_LAYERS": config.decoder_layers,
        "MODEL.MASK_FORMER.PRE_NORM": config.pre_norm,
        "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": config.enforce_input_projection,
    }
    return keys | describe_backbone(config)


def name_decoder(config: MPFormerConfig) -> str:
    """Class of the original's transformer decoder that has these weights."""
    with_labels = config.mask_piloting and not config.query_position_embedding
    return f"MultiScaleMaskedTransformerDecoder{'MaskDN' if with_labels else ''}"


def describe_backbone(config: MPFormerConfig) -> dict[str, object]:
    """Keys of the original's configuration for the backbone."""
    backbone = config.backbone_config
    if backbone.model_type == "swin":
        return {
            "MODEL.BACKBONE.NAME": "D2SwinTransformer",
            "MODEL.SWIN.EMBED_DIM": backbone.embed_dim,
            "MODEL.SWIN.DEPTHS": list(backbone.depths),
            "MODEL.SWIN.NUM_HEADS": list(backbone.num_heads),
            "MODEL.SWIN.WINDOW_SIZE": backbone.window_size,
            "MODEL.SWIN.MLP_RATIO": backbone.mlp_ratio,
            "MODEL.SWIN.PRETRAIN_IMG_SIZE": backbone.image_size,
        }
    keys: dict[str, object] = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": RESNET_DEPTHS[backbone.layer_type, tuple(backbone.depths)],
        "MODEL.RESNETS.STEM_TYPE": "basic",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": backbone.embedding_size,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": backbone.hidden_sizes[0],
        "MODEL.RESNETS.NORM": "FrozenBN" if config.freeze_backbone_norm else "SyncBN",
        "MODEL.RESNETS.RES5_MULTI_GRID": [1, 1, 1],
    }
    if backbone.layer_type == "bottleneck":
        keys["MODEL.RESNETS.WIDTH_PER_GROUP"] = backbone.hidden_sizes[0] // 4
        keys["MODEL.RESNETS.STRIDE_IN_1X1"] = backbone.downsample_in_bottleneck
    return keys


# ----------------------------------------------------------------------------------------------------------------- program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_to_detectron2",
        description="Convert a model of ours into a checkpoint for the original code of MP-Former or Mask2Former.",
    )
    parser.add_argument("model", help="folder of a model of ours, or a repository of the Hub")
    parser.add_argument("--output", type=Path, required=True, help="file to write, such as model_final.pth")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument(
        "--label-embedding",
        choices=LABEL_EMBEDDING_CHOICES,
        default="auto",
        help="that of mask-piloted training: keep it, drop it (for the original's plain decoder), or keep it where the original's "
        "MP-Former has one (auto, the default)",
    )
    parser.add_argument(
        "--input-format",
        choices=("RGB", "BGR"),
        default="RGB",
        help="order of the channels in the original's configuration (INPUT.FORMAT) that the checkpoint is for",
    )
    return parser.parse_args(argv)


@without_progress_bars()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        check_file(arguments.output, overwrite=arguments.overwrite)
        with step(f"Reading {arguments.model}"):
            model = load_complete(MPFormerForUniversalSegmentation, arguments.model)
        state, mapped = convert(model, label_embedding=arguments.label_embedding, input_format=arguments.input_format)
        with (
            step(f"Writing {arguments.output}"),
            new_file(arguments.output, overwrite=arguments.overwrite) as unfinished,
        ):
            torch.save({"model": state}, unfinished)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(state)} tensors")
    for text in count_kinds(mapped.ignored):
        print(f"  not written: {text}")
    keys = describe_keys(model.config) | {"INPUT.FORMAT": arguments.input_format}
    print("Configuration of the original that its model needs, on top of one for the same data set:")
    print("  " + " ".join(f"{key} {shell_quote(value)}" for key, value in keys.items()))
    return 0


def shell_quote(value: object) -> str:
    """A value as the original's command line reads it."""
    text = str(value)
    return f'"{text}"' if " " in text else text


if __name__ == "__main__":
    sys.exit(main())
