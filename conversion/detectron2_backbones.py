"""Backbones of Detectron2 as configurations of transformers: ResNet and Swin.

Widths and depths are those of the checkpoint. What transformers' backbones cannot express (deformable and grouped convolutions,
dilation, the DeepLab stem, other norms, absolute position embeddings, ...) is an error that names the key.
"""

import dataclasses
import math
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig, SwinConfig

from conversion import ConversionError
from conversion.detectron2_evidence import Evidence, agree
from conversion.detectron2_keys import STAGES
from conversion.detectron2_yaml import shown

OUT_FEATURES = ["stage1", "stage2", "stage3", "stage4"]
RESNET_BUILDERS = ("build_resnet_backbone", "build_resnet_deeplab_backbone")
SWIN_BUILDERS = ("D2SwinTransformer",)

# DEPTH -> blocks of the four stages; up to 34 the blocks are basic ones, of two convolutions.
RESNET_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
DEEPEST_BASIC_RESNET = 34
BOTTLENECK_RATIO = 4  # fixed in transformers
STEM_KERNEL = 7
IMAGE_CHANNELS = 3

# NORM -> whether statistics and affine parameters stay fixed in training
BATCH_NORMS = {
    "FrozenBN": True,
    "BN": False,
    "SyncBN": False,
    "nnSyncBN": False,
    "naiveSyncBN": False,
    "naiveSyncBN_N": False,
}

SWIN_PATCH = 4
SWIN_BLOCK = "backbone.layers.{stage}.blocks.0"


def backbone_fields(evidence: Evidence) -> dict[str, Any]:
    """Return the fields of `MPFormerConfig` that concern the backbone."""
    evidence.require(
        "MODEL.BACKBONE.NAME",
        (*RESNET_BUILDERS, *SWIN_BUILDERS),
        "Only ResNet and Swin are backbones that can be converted.",
    )
    if "backbone.patch_embed.proj.weight" in evidence.weights:
        report_builder(evidence, SWIN_BUILDERS)
        return {"backbone_config": swin_config(evidence)}
    if "backbone.stem.conv1.weight" in evidence.weights:
        report_builder(evidence, RESNET_BUILDERS)
        return {"backbone_config": resnet_config(evidence), "freeze_backbone_norm": frozen_norm(evidence)}
    raise ConversionError(
        f"The checkpoint holds neither a ResNet (backbone.stem.conv1.weight) nor a Swin (backbone.patch_embed.proj.weight) of "
        f"Detectron2; MODEL.BACKBONE.NAME is {shown(evidence.config.get('MODEL.BACKBONE.NAME'))}."
    )


def report_builder(evidence: Evidence, builders: tuple[str, ...]) -> None:
    """Report a configuration that names the other family."""
    name = evidence.config.get("MODEL.BACKBONE.NAME")
    if name not in builders:
        evidence.settle("MODEL.BACKBONE.NAME", builders[0])


def backbone_widths(backbone: PreTrainedConfig) -> list[int]:
    """Channels of the four outputs."""
    if isinstance(backbone, SwinConfig):
        return [backbone.embed_dim * 2**stage for stage in range(len(STAGES))]
    return list(backbone.hidden_sizes)


def declared(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> dict[str, Any]:
    """Assert that every field is one of the class: transformers' configurations keep misspelt ones silently."""
    unknown = set(fields) - {field.name for field in dataclasses.fields(config_class)} - {"out_features"}
    assert not unknown, f"{config_class.__name__} has no fields {sorted(unknown)}"
    return fields


# --- ResNet ------------------------------------------------------------------------------------------------------------------


def resnet_config(evidence: Evidence) -> ResNetConfig:
    """Build the configuration of a ResNet."""
    refuse_other_resnets(evidence)
    stem, channels, *kernel = evidence.shape("backbone.stem.conv1.weight", rank=4)
    if kernel != [STEM_KERNEL, STEM_KERNEL] or "backbone.stem.conv2.weight" in evidence.weights:
        raise ConversionError(
            "MODEL.RESNETS.STEM_TYPE: the checkpoint has the stem of DeepLab, several 3x3 convolutions. transformers' ResNet has one "
            "7x7 convolution."
        )
    evidence.expect("INPUT.FORMAT", "backbone.stem.conv1.weight", channels, IMAGE_CHANNELS, "input channels")
    depths = [evidence.count(f"backbone.{stage}") for stage in STAGES]
    if 0 in depths:
        missing = STAGES[depths.index(0)]
        raise ConversionError(f"MODEL.RESNETS.OUT_FEATURES: the checkpoint has no {missing}; expected {STAGES}.")
    is_bottleneck = "backbone.res2.0.conv3.weight" in evidence.weights
    widths = [stage_width(evidence, stage, is_bottleneck=is_bottleneck) for stage in STAGES]
    evidence.settle("MODEL.RESNETS.STEM_OUT_CHANNELS", stem)
    evidence.settle("MODEL.RESNETS.RES2_OUT_CHANNELS", widths[0])
    settle_depth(evidence, depths, is_bottleneck=is_bottleneck)
    report_frozen_stages(evidence)
    fields = {
        "embedding_size": stem,
        "hidden_sizes": widths,
        "depths": depths,
        "layer_type": "bottleneck" if is_bottleneck else "basic",
        "downsample_in_bottleneck": evidence.config.get("MODEL.RESNETS.STRIDE_IN_1X1"),
        "out_features": OUT_FEATURES,
    }
    return ResNetConfig(**declared(ResNetConfig, fields))


def refuse_other_resnets(evidence: Evidence) -> None:
    """Refuse what shapes may not show and transformers' ResNet does not have."""
    no_counterpart = "transformers' ResNet has nothing for it."
    for key, allowed in {
        "MODEL.RESNETS.STEM_TYPE": ["basic"],
        "MODEL.RESNETS.RES4_DILATION": [1],
        "MODEL.RESNETS.RES5_DILATION": [1],
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [[False, False, False, False]],
        "MODEL.RESNETS.DEPTH": list(RESNET_DEPTHS),
        "MODEL.RESNETS.NORM": list(BATCH_NORMS),
    }.items():
        evidence.require(key, allowed, no_counterpart)
    if deformed := next((name for name in evidence.weights if ".conv2_offset." in name), None):
        raise ConversionError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE: the checkpoint has deformable convolutions ({deformed}). {no_counterpart}"
        )
    grid = evidence.config.get("MODEL.RESNETS.RES5_MULTI_GRID")
    if evidence.config.get("MODEL.BACKBONE.NAME") == "build_resnet_deeplab_backbone" and set(grid) != {1}:
        raise ConversionError(f"MODEL.RESNETS.RES5_MULTI_GRID is {grid}; expected [1, 1, 1]. {no_counterpart}")
    refuse_missing_features(evidence, "MODEL.RESNETS.OUT_FEATURES")
    refuse_other_ratios(evidence)


def refuse_missing_features(evidence: Evidence, key: str) -> None:
    """Refuse a list of features that leaves one of the four stages out."""
    features = evidence.config.get(key)
    if evidence.config.is_set(key) and set(features) != set(STAGES):
        raise ConversionError(
            f"{key} is {features}; expected {STAGES}: the pixel decoder needs strides 4, 8, 16 and 32."
        )


def refuse_other_ratios(evidence: Evidence) -> None:
    """Refuse bottlenecks of more than one group, or that are not a quarter of their stage's width."""
    groups, width, output = (
        evidence.config.get(f"MODEL.RESNETS.{name}") for name in ("NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")
    )
    evidence.require("MODEL.RESNETS.NUM_GROUPS", [1], "transformers' ResNet has no grouped convolutions (ResNeXt).")
    is_basic = evidence.config.get("MODEL.RESNETS.DEPTH") <= DEEPEST_BASIC_RESNET
    if (
        evidence.config.is_set("MODEL.RESNETS.WIDTH_PER_GROUP")
        and not is_basic
        and groups * width * BOTTLENECK_RATIO != output
    ):
        raise ConversionError(
            f"MODEL.RESNETS.WIDTH_PER_GROUP is {width}; expected {output / BOTTLENECK_RATIO:g}, a quarter of "
            f"MODEL.RESNETS.RES2_OUT_CHANNELS = {output}. transformers' ResNet has no other ratio."
        )


def stage_width(evidence: Evidence, stage: str, *, is_bottleneck: bool) -> int:
    """Output channels of one stage, from its first block."""
    block = f"backbone.{stage}.0"
    if not is_bottleneck:
        return evidence.shape(f"{block}.conv2.weight", rank=4)[0]
    width = evidence.shape(f"{block}.conv3.weight", rank=4)[0]
    inner, inputs, *_ = evidence.shape(f"{block}.conv2.weight", rank=4)
    if inner != inputs:
        raise ConversionError(
            f"MODEL.RESNETS.NUM_GROUPS: {block}.conv2.weight has {inner} output and {inputs} input channels a group. transformers' "
            "ResNet has no grouped convolutions (ResNeXt)."
        )
    if inner * BOTTLENECK_RATIO != width:
        raise ConversionError(
            f"MODEL.RESNETS.WIDTH_PER_GROUP: {block} narrows {width} channels to {inner}; expected {width / BOTTLENECK_RATIO:g}, a "
            "quarter, the only ratio of transformers' ResNet."
        )
    return width


def settle_depth(evidence: Evidence, depths: list[int], *, is_bottleneck: bool) -> None:
    """Report a configuration of another depth."""
    depth = evidence.config.get("MODEL.RESNETS.DEPTH")
    if RESNET_DEPTHS[depth] == tuple(depths) and (depth > DEEPEST_BASIC_RESNET) == is_bottleneck:
        return
    named = [
        number
        for number, blocks in RESNET_DEPTHS.items()
        if blocks == tuple(depths) and (number > DEEPEST_BASIC_RESNET) == is_bottleneck
    ]
    evidence.settle("MODEL.RESNETS.DEPTH", named[0] if named else f"stages of {depths} blocks")


def frozen_norm(evidence: Evidence) -> bool:
    """Whether the batch norms stay fixed in training; the weights are the same in both cases."""
    norm = evidence.config.get("MODEL.RESNETS.NORM")
    if "backbone.stem.conv1.norm.running_mean" not in evidence.weights:
        raise ConversionError(
            f"MODEL.RESNETS.NORM is {norm}, but the checkpoint has no backbone.stem.conv1.norm.running_mean. transformers' ResNet "
            "has batch norms only."
        )
    if BATCH_NORMS[norm] and "backbone.stem.conv1.norm.num_batches_tracked" in evidence.weights:
        evidence.notes.append(
            f"MODEL.RESNETS.NORM is {norm}, but the checkpoint counts batches as trained batch norms do. They are frozen here; set "
            "`freeze_backbone_norm=False` to train them."
        )
    return BATCH_NORMS[norm]


def report_frozen_stages(evidence: Evidence) -> None:
    """Report stages that the original keeps fixed in training: there is no field for that."""
    if stages := evidence.config.get("MODEL.BACKBONE.FREEZE_AT"):
        evidence.notes.append(
            f"MODEL.BACKBONE.FREEZE_AT is {stages}: in training the original keeps the stem and {max(stages - 1, 0)} stage(s) fixed. "
            "Here all are trained; switch `requires_grad` off for them if you want that too."
        )


# --- Swin --------------------------------------------------------------------------------------------------------------------


def swin_config(evidence: Evidence) -> SwinConfig:
    """Build the configuration of a Swin."""
    refuse_other_swins(evidence)
    embed_dim, channels, *patch = evidence.shape("backbone.patch_embed.proj.weight", rank=4)
    if patch != [SWIN_PATCH, SWIN_PATCH]:
        raise ConversionError(
            f"MODEL.SWIN.PATCH_SIZE: the checkpoint has patches of {patch}; expected 4, for strides 4 to 32."
        )
    evidence.expect("INPUT.FORMAT", "backbone.patch_embed.proj.weight", channels, IMAGE_CHANNELS, "input channels")
    num_stages = evidence.count("backbone.layers")
    if num_stages != len(STAGES):
        raise ConversionError(f"MODEL.SWIN.DEPTHS: the checkpoint has {num_stages} stages; expected {len(STAGES)}.")
    dims = [embed_dim * 2**stage for stage in range(num_stages)]
    for stage, dim in enumerate(dims):
        if (width := evidence.shape(f"backbone.norm{stage}.weight", rank=1)[0]) != dim:
            raise ConversionError(
                f"MODEL.SWIN.EMBED_DIM: stage {stage} has {width} channels; expected {dim}, twice those before it."
            )
    heads, window = attention_layout(evidence, dims)
    fields = {
        "embed_dim": evidence.settle("MODEL.SWIN.EMBED_DIM", embed_dim),
        "depths": evidence.settle(
            "MODEL.SWIN.DEPTHS", [evidence.count(f"backbone.layers.{i}.blocks") for i in range(num_stages)]
        ),
        "num_heads": evidence.settle("MODEL.SWIN.NUM_HEADS", heads),
        "window_size": evidence.settle("MODEL.SWIN.WINDOW_SIZE", window),
        "mlp_ratio": mlp_ratio(evidence, dims),
        "qkv_bias": evidence.settle(
            "MODEL.SWIN.QKV_BIAS", f"{SWIN_BLOCK.format(stage=0)}.attn.qkv.bias" in evidence.weights
        ),
        "use_absolute_embeddings": False,
        "hidden_dropout_prob": evidence.in_range("MODEL.SWIN.DROP_RATE", 0, 1),
        "attention_probs_dropout_prob": evidence.in_range("MODEL.SWIN.ATTN_DROP_RATE", 0, 1),
        "drop_path_rate": evidence.in_range("MODEL.SWIN.DROP_PATH_RATE", 0, 1),
        "image_size": evidence.in_range("MODEL.SWIN.PRETRAIN_IMG_SIZE", 1, 2**16),
        "out_features": OUT_FEATURES,
    }
    return SwinConfig(**declared(SwinConfig, fields))


def refuse_other_swins(evidence: Evidence) -> None:
    """Refuse what transformers' Swin does not have."""
    evidence.require("MODEL.SWIN.PATCH_SIZE", [SWIN_PATCH], "The pixel decoder needs strides 4, 8, 16 and 32.")
    evidence.require(
        "MODEL.SWIN.APE", [False], "transformers' Swin keeps absolute position embeddings of one image size only."
    )
    evidence.require("MODEL.SWIN.PATCH_NORM", [True], "transformers' Swin always normalises its patches.")
    refuse_missing_features(evidence, "MODEL.SWIN.OUT_FEATURES")
    if "backbone.absolute_pos_embed" in evidence.weights:
        raise ConversionError(
            "MODEL.SWIN.APE: the checkpoint has absolute position embeddings (backbone.absolute_pos_embed), which transformers' Swin "
            "keeps for one image size only."
        )
    if "backbone.patch_embed.norm.weight" not in evidence.weights:
        raise ConversionError(
            "MODEL.SWIN.PATCH_NORM: the checkpoint has no backbone.patch_embed.norm.weight; transformers' Swin always normalises its "
            "patches."
        )


def attention_layout(evidence: Evidence, dims: list[int]) -> tuple[list[int], int]:
    """Heads of each stage and the window size, from the tables of relative position biases: ((2 window - 1)^2, heads)."""
    names = [f"{SWIN_BLOCK.format(stage=stage)}.attn.relative_position_bias_table" for stage in range(len(dims))]
    tables = {name: evidence.shape(name, rank=2) for name in names}
    rows = agree("MODEL.SWIN.WINDOW_SIZE", {name: table[0] for name, table in tables.items()})
    heads = [table[1] for table in tables.values()]
    window = (math.isqrt(rows) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise ConversionError(
            f"MODEL.SWIN.WINDOW_SIZE: {names[0]} has {rows} rows, not (2 window - 1)^2 for any window."
        )
    if wrong := [(dim, number) for dim, number in zip(dims, heads, strict=True) if dim % number]:
        raise ConversionError(f"MODEL.SWIN.NUM_HEADS: {wrong[0][0]} channels cannot be shared by {wrong[0][1]} heads.")
    scale = evidence.config.get("MODEL.SWIN.QK_SCALE")
    usual = {(dim // number) ** -0.5 for dim, number in zip(dims, heads, strict=True)}
    if scale is not None and any(not math.isclose(scale, one, rel_tol=1e-6) for one in usual):
        raise ConversionError(
            f"MODEL.SWIN.QK_SCALE is {shown(scale)}; expected None. transformers' Swin always scales by 1 / sqrt(channels of a head)."
        )
    return heads, window


def mlp_ratio(evidence: Evidence, dims: list[int]) -> float:
    """Width of the feed-forward layers over that of their stage; the configuration's value where it gives the same layers."""
    widths = [
        evidence.shape(f"{SWIN_BLOCK.format(stage=stage)}.mlp.fc1.weight", rank=2)[0] for stage in range(len(dims))
    ]
    said = evidence.config.get("MODEL.SWIN.MLP_RATIO")
    if [int(dim * said) for dim in dims] == widths:
        return said
    found = widths[0] / dims[0]
    if int(dims[0] * found) < widths[0]:  # the quotient was rounded down, and transformers cuts the product
        found = math.nextafter(found, math.inf)
    if [int(dim * found) for dim in dims] != widths:
        raise ConversionError(
            f"MODEL.SWIN.MLP_RATIO: the feed-forward layers have {widths} channels in stages of {dims}; expected one ratio for all."
        )
    return evidence.settle("MODEL.SWIN.MLP_RATIO", found)
