"""Convert ImageNet weights of a ResNet or a Swin into a backbone folder for `MPFormerForUniversalSegmentation.from_backbone`.

    python -m conversion.convert_backbone R-50.pkl --output-dir resnet-50
    python -m conversion.convert_backbone swin_tiny_patch4_window7_224.pth --output-dir swin-tiny

Read are the files of the original recipes (`R-50.pkl`, `R-101.pkl` in Detectron2's names, `swin_*.pth` and `.pkl` in those of Swin's
authors), torchvision's ResNets, and timm's ResNets and Swins; also whole checkpoints of Detectron2, of which the backbone is taken.
Widths, depths, heads and windows are read from the shapes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoBackbone, PreTrainedModel, ResNetConfig, SwinConfig

from conversion import ConversionError
from conversion.checkpoint_files import read_checkpoint
from conversion.key_map import (
    ENCODER,
    FIRST_CONVOLUTIONS,
    NameTable,
    count_kinds,
    find_value,
    flip_input_channels,
    list_names,
    to_ours,
    update_names,
)
from conversion.loading import without_progress_bars
from conversion.output_folder import check_folder, new_folder, step

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CHECK_SIZE = 64
# Mask2Former trains all Swins with this; transformers' default is 0.1.
SWIN_DROP_PATH = 0.3

# Names of torchvision and timm, and of Detectron2.
TORCHVISION = NameTable(
    (
        ("conv1.weight", "backbone.stem.conv1.weight"),
        ("bn1.{norm}", "backbone.stem.conv1.norm.{norm}"),
        ("layer{stage+1}.{block}.conv{n}.weight", "backbone.res{stage+2}.{block}.conv{n}.weight"),
        ("layer{stage+1}.{block}.bn{n}.{norm}", "backbone.res{stage+2}.{block}.conv{n}.norm.{norm}"),
        ("layer{stage+1}.{block}.downsample.0.weight", "backbone.res{stage+2}.{block}.shortcut.weight"),
        ("layer{stage+1}.{block}.downsample.1.{norm}", "backbone.res{stage+2}.{block}.shortcut.norm.{norm}"),
    )
)
# timm counts a downsampling to the stage after it, Swin's authors to the one before.
TIMM_SWIN = NameTable(
    (
        ("layers.{i+1}.downsample.reduction.weight", "backbone.layers.{i}.downsample.reduction.weight"),
        ("layers.{i+1}.downsample.norm.{wb}", "backbone.layers.{i}.downsample.norm.{wb}"),
    )
)
BACKBONE_START = r"(stem|res\d|patch_embed|layers)\..+|norm\d\.(weight|bias)"
# Beside a backbone, without a place in one.
UNUSED = (
    (r"(stem\.)?fc\.(weight|bias)", "classifies ImageNet"),
    (r"head\.(fc\.)?(weight|bias)", "classifies ImageNet"),
    (r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)", "follows from the window size"),
    (r"sem_seg_head\..+|criterion\..+|pixel_(mean|std)", "is not of the backbone"),
)
LAST_NORM = r"norm\.(weight|bias)"  # of Swin; transformers keeps it, and no output uses it


@dataclass
class Backbone:
    """A backbone with pretrained weights.

    Attributes:
        model: of transformers, with four outputs.
        ignored: name in the file -> why it is not used.
        notes: what the user should know, one sentence each.
    """

    model: PreTrainedModel
    ignored: dict[str, str]
    notes: list[str] = field(default_factory=list)


def convert(
    path: Path, *, stride_in_1x1: bool = False, input_format: str = "RGB", trust_pickle: bool = False
) -> Backbone:
    """Read the weights of a backbone.

    Args:
        path: of the file.
        stride_in_1x1: True for a ResNet whose blocks halve the image in their first convolution (the original of MSRA), False in the
            3x3 one (torchvision, timm). The weights do not show it.
        input_format: "BGR" for weights that were trained on such images: the first convolution is turned to RGB.
        trust_pickle: see `read_checkpoint`.

    Raises:
        ConversionError: the file is not a ResNet or a Swin that transformers can express.
    """
    file = read_checkpoint(path, trust_pickle=trust_pickle)
    weights, ignored = to_detectron2_names(file.tensors)
    first = next((name for name in FIRST_CONVOLUTIONS if name in weights), None)
    if first is None:
        raise ConversionError(
            f"Expected weights of a ResNet or a Swin, but `{path}` has no first convolution in the names of Detectron2, torchvision, timm "
            f"or Swin's authors; it has {list_names(list(file.tensors))}. Other backbones load with "
            "`MPFormerForUniversalSegmentation.from_backbone('timm:...')` or from a transformers repository."
        )
    if input_format == "BGR":
        weights = flip_input_channels(weights)
    last_norms = {name: weights.pop(name) for name in ("norm.weight", "norm.bias") if name in weights}
    mapped = to_ours(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    )
    ours = {name.removeprefix(f"{ENCODER}."): tensor for name, tensor in mapped.tensors.items()}
    ours |= {f"swin.layer{name}": tensor.float() for name, tensor in last_norms.items()}
    is_resnet = first == FIRST_CONVOLUTIONS[0]
    config = resnet_config(ours, stride_in_1x1=stride_in_1x1) if is_resnet else swin_config(ours)
    model = fill(AutoBackbone.from_config(config), ours)
    check_forward(model, path)
    notes = [] if is_resnet else [f"`drop_path_rate` is {SWIN_DROP_PATH}, as in Mask2Former's recipes."]
    return Backbone(model, ignored | mapped.ignored, [*file.notes, *notes])


# ------------------------------------------------------------------------------------------------------------------- names


def to_detectron2_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names of Detectron2's checkpoints, with `backbone.`; Swin's last norm keeps its name.

    Returns:
        The weights, and those that are not of a backbone (name -> why).
    """
    tensors, _ = update_names(tensors)
    plain = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    of_timm = any(name.startswith("layers.3.downsample.") for name in plain)
    weights: dict[str, Tensor] = {}
    ignored: dict[str, str] = {}
    for name, tensor in plain.items():
        reason = find_value(UNUSED, name)
        renamed = (TIMM_SWIN.forward(name) if of_timm else None) or TORCHVISION.forward(name)
        if reason is not None:
            ignored[name] = reason
        elif renamed is not None:
            weights[renamed[0]] = tensor
        else:
            weights[name if find_value(((LAST_NORM, True),), name) else f"backbone.{name}"] = tensor
    return weights, ignored


# ------------------------------------------------------------------------------------------------------------------- parts


def resnet_config(weights: Mapping[str, Tensor], *, stride_in_1x1: bool) -> ResNetConfig:
    """Widths and depths of a ResNet, from its weights in transformers' names."""
    layers = "encoder.stages.{stage}.layers.{block}.layer.{conv}.convolution.weight"
    is_bottleneck = layers.format(stage=0, block=0, conv=2) in weights
    last = 2 if is_bottleneck else 1
    depths = [count(weights, f"encoder.stages.{stage}.layers") for stage in range(4)]
    widths = [len(need(weights, layers.format(stage=stage, block=0, conv=last))) for stage in range(4)]
    inner = [len(need(weights, layers.format(stage=stage, block=0, conv=0))) for stage in range(4)]
    if is_bottleneck and inner != [width // 4 for width in widths]:
        raise ConversionError(
            f"transformers' ResNet has inner widths of a quarter of its outputs; the file has {inner} with outputs {widths}. "
            "`from_backbone('timm:...')` loads wider ones."
        )
    first = need(weights, "embedder.embedder.convolution.weight")
    return ResNetConfig(
        num_channels=first.shape[1],
        embedding_size=len(first),
        hidden_sizes=widths,
        depths=depths,
        layer_type="bottleneck" if is_bottleneck else "basic",
        downsample_in_bottleneck=stride_in_1x1,
        out_features=STAGES,
    )


def swin_config(weights: Mapping[str, Tensor]) -> SwinConfig:
    """Width, depths, heads and window of a Swin, from its weights in transformers' names."""
    blocks = "swin.encoder.layers.{stage}.blocks"
    table = "swin.encoder.layers.{stage}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    tables = [need(weights, table.format(stage=stage)) for stage in range(4)]
    patches = need(weights, "swin.embeddings.patch_embeddings.projection.weight")
    window = (round(len(tables[0]) ** 0.5) + 1) // 2
    return SwinConfig(
        image_size=32 * window,  # 224 for a window of 7, 384 for 12; without effect on other sizes
        num_channels=patches.shape[1],
        patch_size=patches.shape[-1],
        embed_dim=len(patches),
        depths=[count(weights, blocks.format(stage=stage)) for stage in range(4)],
        num_heads=[table.shape[-1] for table in tables],
        window_size=window,
        mlp_ratio=len(need(weights, f"{blocks.format(stage=0)}.0.mlp.fc1.weight")) / len(patches),
        qkv_bias=f"{blocks.format(stage=0)}.0.attention.q_proj.bias" in weights,
        drop_path_rate=SWIN_DROP_PATH,
        out_features=STAGES,
    )


def need(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight that must be there and have an axis."""
    if name not in weights or not weights[name].dim():
        raise ConversionError(
            f"The file has no weight for `{name}` of transformers' backbone. It is not complete, or another network."
        )
    return weights[name]


def count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix in the names."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in weights if name.startswith(f"{prefix}.")})


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Load all weights into a backbone; only norms that a classifier does not have keep their initial values, one and zero."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = [name for name, tensor in weights.items() if name in expected and tensor.shape != expected[name]]
    superfluous = [name for name in weights if name not in expected]
    optional = ("hidden_states_norms.", "swin.layernorm.")
    missing = [
        name
        for name in expected
        if name not in weights and not name.startswith(optional) and not name.endswith("num_batches_tracked")
    ]
    for names, what in (
        (superfluous, "no place for"),
        (missing, "no weights in the file for"),
        (differing, "other shapes for"),
    ):
        if names:
            raise ConversionError(
                f"transformers' {model.config.model_type} has {what} {list_names(names)}. The file is not complete, or its network is a "
                "variant; `from_backbone('timm:...')` loads those of timm."
            )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def check_forward(model: PreTrainedModel, path: Path) -> None:
    """Refuse a backbone whose maps are not finite."""
    channels = model.config.num_channels
    image = torch.linspace(-1, 1, channels * CHECK_SIZE**2).view(1, channels, CHECK_SIZE, CHECK_SIZE).sin()
    with torch.no_grad():
        maps = model(image).feature_maps
    if not all(bool(level.isfinite().all()) for level in maps):
        raise ConversionError(f"The weights in `{path}` give values that are not finite. Download it again.")


# ----------------------------------------------------------------------------------------------------------------- program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_backbone",
        description="Convert ImageNet weights of a ResNet or a Swin into a folder for `MPFormerForUniversalSegmentation.from_backbone`.",
    )
    parser.add_argument(
        "weights", type=Path, help=".pkl of Detectron2, .pth of torchvision or Swin's authors, safetensors of timm"
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder to write; it appears when it is complete"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that an earlier conversion has written"
    )
    parser.add_argument(
        "--stride-in-1x1",
        action="store_true",
        help="a ResNet whose blocks halve the image in their first convolution (MSRA), not in the 3x3 one (torchvision, timm)",
    )
    parser.add_argument(
        "--input-format", choices=("RGB", "BGR"), default="RGB", help="order of channels of its training images"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load other classes with Python's pickle, which runs the file's code",
    )
    return parser.parse_args(argv)


@without_progress_bars()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        check_folder(arguments.output_dir, overwrite=arguments.overwrite, inputs=[arguments.weights])
        with step(f"Reading {arguments.weights.name}"):
            backbone = convert(
                arguments.weights,
                stride_in_1x1=arguments.stride_in_1x1,
                input_format=arguments.input_format,
                trust_pickle=arguments.trust_pickle,
            )
        with (
            step(f"Writing {arguments.output_dir}"),
            new_folder(arguments.output_dir, overwrite=arguments.overwrite, inputs=[arguments.weights]) as unfinished,
        ):
            backbone.model.save_pretrained(unfinished)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output_dir}: {type(backbone.model).__name__}")
    for text in count_kinds(backbone.ignored):
        print(f"  not used: {text}")
    for note in backbone.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
