"""A Detectron2 configuration and the shapes of its checkpoint, as configuration of our model and of its image processor.

    config = read_config(Path("maskformer2_R50_bs16_50ep.yaml"), ["MODEL.DN.NUM_DN", "1"])
    configuration = build_configuration(config, {name: tensor.shape for name, tensor in weights.items()})

The checkpoint decides over everything that its shapes show: backbone, widths, depths, number of queries and classes, whether there
are position embeddings of the queries and a label embedding. Where the configuration says otherwise, that is a note. What this
package has nothing for is an error that names the key. Keys that nothing sets have the original's defaults (`DEFAULTS`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size

from conversion import ConversionError
from conversion.detectron2_backbones import backbone_fields, backbone_widths, declared
from conversion.detectron2_evidence import Evidence, agree
from conversion.detectron2_yaml import Detectron2Config, read_config, shown
from conversion.label_sets import LabelSet, find_label_set
from mpformer_hf import MPFormerConfig, MPFormerImageProcessor

PREDICTOR = "sem_seg_head.predictor"
PIXEL_DECODER = "sem_seg_head.pixel_decoder"
ENCODER_LAYERS = f"{PIXEL_DECODER}.transformer.encoder.layers"
LABEL_EMBEDDING = f"{PREDICTOR}.label_enc.weight"
POSITION_EMBEDDING = f"{PREDICTOR}.query_embed.weight"

# Values that the configuration may have if it sets them at all, and why no others.
SUPPORTED = {
    "MODEL.META_ARCHITECTURE": (["MaskFormer"], "Only models of single images can be converted."),
    "MODEL.SEM_SEG_HEAD.NAME": (["MaskFormerHead"], "There is no other head here."),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (["MSDeformAttnPixelDecoder"], "There is no other pixel decoder here."),
    "MODEL.SEM_SEG_HEAD.NORM": (["GN"], "The pixel decoder here has group norms."),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": ([4], "Masks are predicted at a quarter of the image here."),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": (["multi_scale_pixel_decoder"], "The decoder here sees three scales."),
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": (
        [
            "MultiScaleMaskedTransformerDecoder",
            "MultiScaleMaskedTransformerDecoderMaskDN",
            "MultiScaleMaskedTransformerDecoderMaskDNLYSmooth",
        ],
        "There is no other transformer decoder here.",
    ),
    "MODEL.MASK_FORMER.LAST_Q_RATIO": ([0.0], "Mask embeddings are not averaged over layers here."),
    "INPUT.FORMAT": (["RGB", "BGR"], "The image processor gives RGB."),
}
PIXEL_DECODER_LEVELS = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
PIXEL_DECODER_FEATURES = ["res3", "res4", "res5"]
PLAIN_DECODER = "MultiScaleMaskedTransformerDecoder"

# Fields of our config that are a key of the original's, as it is.
SAME_FIELDS = {
    "common_stride": "MODEL.SEM_SEG_HEAD.COMMON_STRIDE",
    "ignore_value": "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
    "dropout": "MODEL.MASK_FORMER.DROPOUT",
    "pre_norm": "MODEL.MASK_FORMER.PRE_NORM",
    "use_auxiliary_loss": "MODEL.MASK_FORMER.DEEP_SUPERVISION",
    "no_object_weight": "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT",
    "class_weight": "MODEL.MASK_FORMER.CLASS_WEIGHT",
    "mask_weight": "MODEL.MASK_FORMER.MASK_WEIGHT",
    "dice_weight": "MODEL.MASK_FORMER.DICE_WEIGHT",
    "train_num_points": "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
    "oversample_ratio": "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
    "importance_sample_ratio": "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
}
# Fields that the checkpoint shows, with their keys.
SHOWN_FIELDS = {
    "num_queries": "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    "hidden_dim": "MODEL.MASK_FORMER.HIDDEN_DIM",
    "dim_feedforward": "MODEL.MASK_FORMER.DIM_FEEDFORWARD",
    "decoder_layers": "MODEL.MASK_FORMER.DEC_LAYERS",
    "num_attention_heads": "MODEL.MASK_FORMER.NHEADS",
    "enforce_input_projection": "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ",
    "feature_size": "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "mask_feature_size": "MODEL.SEM_SEG_HEAD.MASK_DIM",
    "encoder_layers": "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
}

NUM_LEVELS = 3
NUM_POINTS = 4
PIXEL_DECODER_FEEDFORWARD = 1024  # the original has no key for it

# From 100 on NUM_DN is a total number of MP queries, below it is a number of groups.
FIRST_QUERY_BUDGET = 100
# With ALL_LY_DN False the original tests `layer < 3` after the layer whose mask was used, so four layers see ground truth.
PARTIAL_PILOT_LAYERS = 4
NOISE_OF_MODE = {
    "points": "point",
    "shift": "shift",
    "scale": "scale",
    "shift_scale": "shift_scale",
    "base": "none",
    "lb": "none",
    "mask": "none",
}
# These cannot train in the released code.
MODES_WITHOUT_NOISE = ("base", "lb", "mask")

WHITE = 255
# Detectron2's backbones ask for 32, or for nothing where the configuration is to say 32.
BACKBONE_DIVISOR = 32
LARGEST_SIZE = 2**16


@dataclass(frozen=True)
class Configuration:
    """What a converted checkpoint is set up with.

    Attributes:
        model: configuration of the model.
        processor: its image processor, which gives RGB images.
        notes: what the person who converts should know: contradictions, settings without counterpart, fresh parameters.
        flip_input_channels: the checkpoint was trained on BGR images: the input channels of its first convolution must be reversed.
            Mean and standard deviation of `processor` are in RGB order already.
    """

    model: MPFormerConfig
    processor: MPFormerImageProcessor
    notes: list[str]
    flip_input_channels: bool


def build_configuration(
    config: Detectron2Config, weights: Mapping[str, Size], labels: LabelSet | None = None
) -> Configuration:
    """Set up a model and an image processor for a checkpoint.

    Args:
        config: the configuration with which the checkpoint was trained.
        weights: original name -> shape, with current names (`query_feat`, `pixel_decoder.`).
        labels: classes to use; `None` takes those of the data sets in the configuration.

    Raises:
        ConversionError: names the key or the tensor, what was expected and what came.
    """
    evidence = Evidence(config, weights)
    for key, (allowed, reason) in SUPPORTED.items():
        evidence.require(key, allowed, reason)
    num_classes = count_classes(evidence)
    fields = backbone_fields(evidence)
    fields |= {field: config.get(key) for field, key in SAME_FIELDS.items()}
    fields |= decoder_fields(evidence)
    fields |= pixel_decoder_fields(evidence)
    check_backbone(evidence, backbone_widths(fields["backbone_config"]))
    fields |= query_fields(evidence, num_classes)
    fields |= pilot_fields(evidence, fields["decoder_layers"] - 1)
    labels = choose_labels(evidence, num_classes, labels)
    fields |= label_fields(labels, num_classes)
    report_training_only(evidence)
    processor = MPFormerImageProcessor(**processor_fields(evidence, labels))
    flip = config.get("INPUT.FORMAT") == "BGR"
    if flip:
        evidence.notes.append(
            "INPUT.FORMAT is BGR: the input channels of the first convolution, the mean and the standard deviation are reversed, so "
            "that the model takes RGB images."
        )
    return Configuration(build_model_config(fields), processor, evidence.notes, flip)


def build_model_config(fields: dict[str, Any]) -> MPFormerConfig:
    """Make the config; its own messages are extended by the original's keys."""
    try:
        return MPFormerConfig(**declared(MPFormerConfig, fields))
    except (ValueError, TypeError) as error:
        keys = SAME_FIELDS | SHOWN_FIELDS
        named = [f"`{field}` is {key}" for field, key in keys.items() if re.search(rf"\b{field}\b", str(error))]
        raise ConversionError(f"{error} ({'; '.join(named)})" if named else str(error)) from error


# --- what the checkpoint shows -----------------------------------------------------------------------------------------------


def count_classes(evidence: Evidence) -> int:
    """K, the classes without "no object"."""
    outputs = evidence.shape(f"{PREDICTOR}.class_embed.weight", rank=2)[0]
    if outputs < 2:  # noqa: PLR2004 - a class, and "no object"
        raise ConversionError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES: {PREDICTOR}.class_embed.weight has {outputs} row; expected 2 or more."
        )
    return evidence.settle("MODEL.SEM_SEG_HEAD.NUM_CLASSES", outputs - 1)


def decoder_fields(evidence: Evidence) -> dict[str, Any]:
    """Fields of the transformer decoder."""
    num_queries, hidden_dim = evidence.shape(f"{PREDICTOR}.query_feat.weight", rank=2)
    num_layers = agree(
        "MODEL.MASK_FORMER.DEC_LAYERS",
        {
            f"{PREDICTOR}.{part}": evidence.count(f"{PREDICTOR}.{part}")
            for part in (
                "transformer_cross_attention_layers",
                "transformer_self_attention_layers",
                "transformer_ffn_layers",
            )
        },
    )
    if not num_layers:
        raise ConversionError(
            f"MODEL.MASK_FORMER.DEC_LAYERS: the checkpoint has no {PREDICTOR}.transformer_cross_attention_layers; expected at least 1."
        )
    columns = (
        "class_embed.weight",
        "level_embed.weight",
        "mask_embed.layers.0.weight",
        "transformer_ffn_layers.0.linear1.weight",
    )
    agree(
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        {"query_feat.weight": hidden_dim}
        | {name: evidence.shape(f"{PREDICTOR}.{name}", rank=2)[1] for name in columns},
    )
    levels = f"{PREDICTOR}.level_embed.weight"
    evidence.expect(PIXEL_DECODER_LEVELS, levels, evidence.shape(levels, rank=2)[0], NUM_LEVELS, "levels")
    feedforward = evidence.shape(f"{PREDICTOR}.transformer_ffn_layers.0.linear1.weight", rank=2)[0]
    return settled(
        evidence,
        {
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "dim_feedforward": feedforward,
            # One more than its layers: the learnable queries are supervised before the first layer too.
            "decoder_layers": num_layers + 1,
        },
    )


def pixel_decoder_fields(evidence: Evidence) -> dict[str, Any]:
    """Fields of the pixel decoder, and of the projection between it and the transformer decoder."""
    if sorted(features := evidence.config.get(PIXEL_DECODER_LEVELS)) != PIXEL_DECODER_FEATURES:
        raise ConversionError(f"{PIXEL_DECODER_LEVELS} is {features}; expected {PIXEL_DECODER_FEATURES}.")
    levels, feature_size = evidence.shape(f"{PIXEL_DECODER}.transformer.level_embed", rank=2)
    evidence.expect(PIXEL_DECODER_LEVELS, f"{PIXEL_DECODER}.transformer.level_embed", levels, NUM_LEVELS, "levels")
    mask_size, *_ = evidence.shape(f"{PIXEL_DECODER}.mask_features.weight", rank=4)
    last = f"{PREDICTOR}.mask_embed.layers.2.weight"
    agree("MODEL.SEM_SEG_HEAD.MASK_DIM", {"mask_features.weight": mask_size, last: evidence.shape(last, rank=2)[0]})
    return settled(
        evidence,
        {
            "feature_size": feature_size,
            "mask_feature_size": mask_size,
            "encoder_layers": evidence.count(ENCODER_LAYERS),
            "num_attention_heads": count_heads(evidence),
            "enforce_input_projection": enforced_projection(evidence, feature_size),
        },
    ) | {"encoder_feedforward_dim": encoder_feedforward(evidence)}


def settled(evidence: Evidence, found: dict[str, Any]) -> dict[str, Any]:
    """Report where the configuration says otherwise."""
    return {field: evidence.settle(SHOWN_FIELDS[field], value) for field, value in found.items()}


def count_heads(evidence: Evidence) -> int:
    """Heads of the deformable attention, which the original shares with the transformer decoder."""
    if not evidence.count(ENCODER_LAYERS):
        return evidence.config.get("MODEL.MASK_FORMER.NHEADS")
    name = f"{ENCODER_LAYERS}.0.self_attn.sampling_offsets.weight"
    offsets = evidence.shape(name, rank=2)[0]
    of_one_head = NUM_LEVELS * NUM_POINTS * 2
    if offsets % of_one_head:
        raise ConversionError(
            f"MODEL.MASK_FORMER.NHEADS: {name} has {offsets} rows, not a multiple of {of_one_head} ({NUM_LEVELS} levels x "
            f"{NUM_POINTS} points x 2)."
        )
    return offsets // of_one_head


def encoder_feedforward(evidence: Evidence) -> int:
    """Width of the pixel decoder's feed-forward layers; the original has no key for it."""
    if not evidence.count(ENCODER_LAYERS):
        return PIXEL_DECODER_FEEDFORWARD
    return evidence.shape(f"{ENCODER_LAYERS}.0.linear1.weight", rank=2)[0]


def enforced_projection(evidence: Evidence, feature_size: int) -> bool:
    """Whether there are convolutions between pixel decoder and transformer decoder that equal widths would not ask for."""
    hidden_dim = evidence.shape(f"{PREDICTOR}.query_feat.weight", rank=2)[1]
    has_projection = f"{PREDICTOR}.input_proj.0.weight" in evidence.weights
    if feature_size == hidden_dim:
        return has_projection
    if not has_projection:
        raise ConversionError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM: the pixel decoder has {feature_size} channels and the transformer decoder {hidden_dim}, "
            f"but the checkpoint has no {PREDICTOR}.input_proj.0.weight."
        )
    return evidence.config.get("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ")


def check_backbone(evidence: Evidence, widths: Sequence[int]) -> None:
    """Check that the pixel decoder takes the four outputs of the backbone."""
    in_features = evidence.config.get("MODEL.SEM_SEG_HEAD.IN_FEATURES")
    expected = ["res2", "res3", "res4", "res5"]
    if evidence.config.is_set("MODEL.SEM_SEG_HEAD.IN_FEATURES") and sorted(in_features) != expected:
        raise ConversionError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {in_features}; expected {expected}.")
    lateral = f"{PIXEL_DECODER}.adapter_1.weight"
    if lateral not in evidence.weights or f"{PIXEL_DECODER}.adapter_2.weight" in evidence.weights:
        raise ConversionError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE: expected exactly one lateral convolution, {lateral}, for masks at a quarter of the "
            "image."
        )
    # The projections go from the coarsest feature to finer ones.
    inputs = [lateral, *(f"{PIXEL_DECODER}.input_proj.{2 - level}.0.weight" for level in range(NUM_LEVELS))]
    for name, feature, width in zip(inputs, expected, widths, strict=True):
        agree(
            f"the channels of {feature}",
            {name: evidence.shape(name, rank=4)[1], "the backbone": width},
        )


def query_fields(evidence: Evidence, num_classes: int) -> dict[str, Any]:
    """Whether queries have position embeddings; the label embedding is checked here too."""
    num_queries, hidden_dim = evidence.shape(f"{PREDICTOR}.query_feat.weight", rank=2)
    has_positions = POSITION_EMBEDDING in evidence.weights
    if has_positions:
        rows, columns = evidence.shape(POSITION_EMBEDDING, rank=2)
        agree("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", {"query_feat.weight": num_queries, "query_embed.weight": rows})
        agree("MODEL.MASK_FORMER.HIDDEN_DIM", {"query_feat.weight": hidden_dim, "query_embed.weight": columns})
    if LABEL_EMBEDDING in evidence.weights:
        rows, columns = evidence.shape(LABEL_EMBEDDING, rank=2)
        agree("MODEL.SEM_SEG_HEAD.NUM_CLASSES", {"class_embed.weight less one": num_classes, "label_enc.weight": rows})
        agree("MODEL.MASK_FORMER.HIDDEN_DIM", {"query_feat.weight": hidden_dim, "label_enc.weight": columns})
    report_decoder_name(evidence)
    return {"query_position_embedding": has_positions}


def report_decoder_name(evidence: Evidence) -> None:
    """Report a name of the decoder that does not go with the checkpoint; the released files keep the plain name."""
    key = "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME"
    name, is_piloted = evidence.config.get(key), LABEL_EMBEDDING in evidence.weights
    if evidence.config.is_set(key) and (name != PLAIN_DECODER) != is_piloted:
        evidence.notes.append(
            f"{key} is {name}, but the checkpoint has {'a' if is_piloted else 'no'} label embedding (label_enc), and that decides."
        )


# --- what the configuration says ---------------------------------------------------------------------------------------------


def pilot_fields(evidence: Evidence, num_layers: int) -> dict[str, Any]:
    """Fields of the mask-piloted branch.

    Args:
        evidence: configuration and shapes.
        num_layers: layers of the transformer decoder.
    """
    config = evidence.config
    num_dn = evidence.in_range("MODEL.DN.NUM_DN", 0, LARGEST_SIZE)
    report_piloting(evidence, num_dn)
    noise = mask_noise(evidence)
    per_head = config.get("MODEL.MASK_FORMER.HEAD_DN")
    if per_head and noise != "point":
        evidence.notes.append(
            f"MODEL.MASK_FORMER.HEAD_DN has no effect without point noise (`pilot_mask_noise` is {noise!r})."
        )
    covers_all = config.get("MODEL.MASK_FORMER.ALL_LY_DN") or num_layers <= PARTIAL_PILOT_LAYERS
    return {
        "mask_piloting": num_dn > 0,
        "pilot_groups": num_dn if 0 < num_dn < FIRST_QUERY_BUDGET else 1,
        "pilot_query_budget": num_dn if num_dn >= FIRST_QUERY_BUDGET else None,
        "pilot_layers": None if covers_all else PARTIAL_PILOT_LAYERS,
        "pilot_mask_noise": noise,
        "pilot_mask_noise_ratio": noise_ratio(evidence, "MODEL.DN.NOISE_SCALE"),
        "pilot_label_noise_ratio": noise_ratio(evidence, "MODEL.MASK_FORMER.LB_NOISE_RATIO"),
        "pilot_noise_per_head": per_head and noise == "point",
        "pilot_label_loss": not config.get("MODEL.MASK_FORMER.DN_NO_LB"),
    }


def report_piloting(evidence: Evidence, num_dn: int) -> None:
    """Report a label embedding that starts afresh, or is left out, and groups that nobody chose."""
    has_labels = LABEL_EMBEDDING in evidence.weights
    if not num_dn:
        left_out = f"; {LABEL_EMBEDDING} is left out" if has_labels else ""
        evidence.notes.append(
            f"MODEL.DN.NUM_DN is 0: `mask_piloting=False`, training is that of Mask2Former{left_out}."
        )
        return
    if not has_labels:
        evidence.notes.append(
            f"The checkpoint has no {LABEL_EMBEDDING}: `mask_piloting=True` with a fresh, random label embedding. Inference does not "
            "use it."
        )
    if not evidence.config.is_set("MODEL.DN.NUM_DN"):
        evidence.notes.append(f"MODEL.DN.NUM_DN is not set: the original's default of {num_dn} MP groups is used.")


def mask_noise(evidence: Evidence) -> str:
    """The noise on ground-truth masks."""
    mode = evidence.config.get("MODEL.MASK_FORMER.DN_MODE")
    default = "" if evidence.config.is_set("MODEL.MASK_FORMER.DN_MODE") else " (the original's default)"
    if mode not in NOISE_OF_MODE:
        raise ConversionError(
            f"MODEL.MASK_FORMER.DN_MODE is {shown(mode)}; expected one of {', '.join(NOISE_OF_MODE)}. This package has no other noise "
            "on masks; to convert all the same, pass the override `MODEL.MASK_FORMER.DN_MODE base` (no noise)."
        )
    if mode in MODES_WITHOUT_NOISE:
        evidence.notes.append(
            f"MODEL.MASK_FORMER.DN_MODE is {mode}{default}, with which the released code cannot train: `pilot_mask_noise` is 'none'."
        )
    elif mode != "points":
        evidence.notes.append(
            f"MODEL.MASK_FORMER.DN_MODE is {mode}: this package implements what the paper means, the released code inverts such masks "
            "from the second layer on."
        )
    return NOISE_OF_MODE[mode]


def noise_ratio(evidence: Evidence, key: str) -> float:
    """Return a ratio in [0, 1]; the original switches the noise off below 0."""
    ratio = evidence.config.get(key)
    if ratio > 1:
        raise ConversionError(f"{key} must be at most 1, got {ratio}.")
    return max(ratio, 0.0)


def choose_labels(evidence: Evidence, num_classes: int, labels: LabelSet | None) -> LabelSet | None:
    """The classes given, or those of the first known data set with as many classes; `None`, with a note, where there is none."""
    if labels is not None:
        if len(labels) != num_classes:
            raise ConversionError(f"The checkpoint has {num_classes} classes, but {labels.name!r} has {len(labels)}.")
        return labels
    data_sets = [*evidence.config.get("DATASETS.TEST"), *evidence.config.get("DATASETS.TRAIN")]
    if (found := find_label_set(data_sets, num_classes)) is not None:
        return found
    fused = ", and panoptic results fuse no class" if evidence.config.get("MODEL.MASK_FORMER.TEST.PANOPTIC_ON") else ""
    evidence.notes.append(
        f"No known data set of {num_classes} classes in DATASETS.TEST or DATASETS.TRAIN ({shown(data_sets)}): the classes are called "
        f"LABEL_0, LABEL_1 and so on{fused}."
    )
    return None


def label_fields(labels: LabelSet | None, num_classes: int) -> dict[str, Any]:
    """Names of the classes."""
    id2label = labels.id2label if labels else {index: f"LABEL_{index}" for index in range(num_classes)}
    return {"id2label": dict(id2label), "label2id": {name: index for index, name in id2label.items()}}


def report_training_only(evidence: Evidence) -> None:
    """Report settings of training that mean something else here."""
    if dropout := evidence.config.get("MODEL.MASK_FORMER.DROPOUT"):
        evidence.notes.append(
            f"MODEL.MASK_FORMER.DROPOUT is {dropout}: the original applies it in the pixel decoder only, `dropout` also in the "
            "transformer decoder."
        )


# --- image processor ---------------------------------------------------------------------------------------------------------


def processor_fields(evidence: Evidence, labels: LabelSet | None) -> dict[str, Any]:
    """Fields of the image processor: sizes, normalisation, post-processing."""
    config = evidence.config
    test = {
        name: config.get(f"MODEL.MASK_FORMER.TEST.{name}") for name in ("SEMANTIC_ON", "INSTANCE_ON", "PANOPTIC_ON")
    }
    semantic_only = test["SEMANTIC_ON"] and not test["INSTANCE_ON"] and not test["PANOPTIC_ON"]
    resize_first = config.get("MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE")
    fields = {
        **size_fields(evidence),
        **normalisation_fields(evidence),
        "score_threshold": evidence.in_range("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0, 1),
        "mask_threshold": 0.5,
        "overlap_mask_area_threshold": evidence.in_range("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0, 1),
        "top_k": evidence.in_range("TEST.DETECTIONS_PER_IMAGE", 1, 2**31),
        "label_ids_to_fuse": labels.stuff_ids if labels and test["PANOPTIC_ON"] else (),
        "combine_before_resize": semantic_only and not resize_first,
        # In maps of segments this value may be a segment.
        "ignore_index": config.get("MODEL.SEM_SEG_HEAD.IGNORE_VALUE") if semantic_only else None,
    }
    unknown = fields.keys() - MPFormerImageProcessor.valid_kwargs.__annotations__.keys()
    assert not unknown, f"MPFormerImageProcessor has no fields {sorted(unknown)}"
    return fields


def size_fields(evidence: Evidence) -> dict[str, Any]:
    """Size of the test images and of their padding."""
    shortest = evidence.in_range("INPUT.MIN_SIZE_TEST", 0, LARGEST_SIZE)
    divisor = evidence.in_range("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", -LARGEST_SIZE, LARGEST_SIZE)
    fields: dict[str, Any] = {"size_divisor": BACKBONE_DIVISOR if divisor < 0 else max(divisor, 1)}
    if not shortest:  # the original's way to leave images as they are
        return fields | {"do_resize": False}
    longest = evidence.in_range("INPUT.MAX_SIZE_TEST", 1, LARGEST_SIZE)
    return fields | {"do_resize": True, "size": {"shortest_edge": shortest, "longest_edge": longest}}


def normalisation_fields(evidence: Evidence) -> dict[str, Any]:
    """Mean and standard deviation of RGB images in [0, 1]; the original's are of images in [0, 255], in its own channel order."""
    fields = {}
    for field, key in {"image_mean": "MODEL.PIXEL_MEAN", "image_std": "MODEL.PIXEL_STD"}.items():
        values = evidence.config.get(key)
        if len(values) != 3:  # noqa: PLR2004 - red, green, blue
            raise ConversionError(f"{key} must be three numbers, got {shown(values)}.")
        # 123.675 / 255 is 0.48500000000000004
        scaled = [float(f"{value / WHITE:.12g}") for value in values]
        fields[field] = scaled[::-1] if evidence.config.get("INPUT.FORMAT") == "BGR" else scaled
    if min(fields["image_std"]) <= 0:
        raise ConversionError(f"MODEL.PIXEL_STD must be above 0, got {shown(evidence.config.get('MODEL.PIXEL_STD'))}.")
    if not 0 <= min(fields["image_mean"]) <= max(fields["image_mean"]) <= 1:
        raise ConversionError(
            f"MODEL.PIXEL_MEAN must be in [0, 255], got {shown(evidence.config.get('MODEL.PIXEL_MEAN'))}."
        )
    return fields


__all__ = ["Configuration", "Detectron2Config", "build_configuration", "read_config"]
