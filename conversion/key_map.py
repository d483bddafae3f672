"""Names of weights in Detectron2's Mask2Former and MP-Former, and ours: a table, read in both directions.

    backbone.res2.0.conv1.weight   <->   model.pixel_level_module.encoder.encoder.stages.0.layers.0.layer.0.convolution.weight

Ours are those of transformers' `Mask2FormerForUniversalSegmentation`. `RULES` holds all names: `to_ours` and `to_original` read
the same table, so that what goes one way comes back bit for bit. What a name may stand for is in `FIELDS`; any other field is a
number, and `{stage+2}` one that is larger by two on that side. A rule with `{qkv}` on our side splits a tensor in three along
its first axis: the original joins the projections of query, key and value.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from conversion import ConversionError

T = TypeVar("T")

ENCODER = "model.pixel_level_module.encoder"
SWIN = f"{ENCODER}.swin"
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
LAYER = f"{TRANSFORMER}.decoder.layers.{{i}}"
QUERY_POSITIONS = f"{TRANSFORMER}.queries_embedder.weight"
LABEL_EMBEDDING = f"{TRANSFORMER}.pilot_label_embedder.weight"
CLASS_WEIGHTS = "criterion.empty_weight"
NAMES_IN_A_MESSAGE = 5

FIELDS: Mapping[str, tuple[str, ...]] = {
    "wb": ("weight", "bias"),
    "norm": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    "sampling": ("sampling_offsets", "attention_weights", "value_proj", "output_proj"),
    "fpn": ("adapter_1", "layer_1"),
    "qkv": ("q", "k", "v"),
}

# (name in the original, name here)
RESNET_RULES = (
    ("backbone.stem.conv1.weight", f"{ENCODER}.embedder.embedder.convolution.weight"),
    ("backbone.stem.conv1.norm.{norm}", f"{ENCODER}.embedder.embedder.normalization.{{norm}}"),
    (
        "backbone.res{stage+2}.{block}.conv{conv+1}.weight",
        f"{ENCODER}.encoder.stages.{{stage}}.layers.{{block}}.layer.{{conv}}.convolution.weight",
    ),
    (
        "backbone.res{stage+2}.{block}.conv{conv+1}.norm.{norm}",
        f"{ENCODER}.encoder.stages.{{stage}}.layers.{{block}}.layer.{{conv}}.normalization.{{norm}}",
    ),
    (
        "backbone.res{stage+2}.{block}.shortcut.weight",
        f"{ENCODER}.encoder.stages.{{stage}}.layers.{{block}}.shortcut.convolution.weight",
    ),
    (
        "backbone.res{stage+2}.{block}.shortcut.norm.{norm}",
        f"{ENCODER}.encoder.stages.{{stage}}.layers.{{block}}.shortcut.normalization.{{norm}}",
    ),
)
SWIN_BLOCK = "backbone.layers.{i}.blocks.{j}"
OUR_SWIN_BLOCK = f"{SWIN}.encoder.layers.{{i}}.blocks.{{j}}"
SWIN_RULES = (
    ("backbone.patch_embed.proj.{wb}", f"{SWIN}.embeddings.patch_embeddings.projection.{{wb}}"),
    ("backbone.patch_embed.norm.{wb}", f"{SWIN}.embeddings.norm.{{wb}}"),
    (f"{SWIN_BLOCK}.norm1.{{wb}}", f"{OUR_SWIN_BLOCK}.layernorm_before.{{wb}}"),
    (f"{SWIN_BLOCK}.norm2.{{wb}}", f"{OUR_SWIN_BLOCK}.layernorm_after.{{wb}}"),
    (
        f"{SWIN_BLOCK}.attn.relative_position_bias_table",
        f"{OUR_SWIN_BLOCK}.attention.relative_position_bias.relative_position_bias_table",
    ),
    (f"{SWIN_BLOCK}.attn.qkv.{{wb}}", f"{OUR_SWIN_BLOCK}.attention.{{qkv}}_proj.{{wb}}"),
    (f"{SWIN_BLOCK}.attn.proj.{{wb}}", f"{OUR_SWIN_BLOCK}.attention.o_proj.{{wb}}"),
    (f"{SWIN_BLOCK}.mlp.fc{{n}}.{{wb}}", f"{OUR_SWIN_BLOCK}.mlp.fc{{n}}.{{wb}}"),
    ("backbone.layers.{i}.downsample.reduction.weight", f"{SWIN}.encoder.layers.{{i}}.downsample.reduction.weight"),
    ("backbone.layers.{i}.downsample.norm.{wb}", f"{SWIN}.encoder.layers.{{i}}.downsample.norm.{{wb}}"),
    ("backbone.norm{i}.{wb}", f"{ENCODER}.hidden_states_norms.stage{{i+1}}.{{wb}}"),
)
ENCODER_LAYER = "sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}"
OUR_ENCODER_LAYER = f"{PIXEL_DECODER}.encoder.layers.{{i}}"
PIXEL_DECODER_RULES = (
    (
        "sem_seg_head.pixel_decoder.input_proj.{i}.{part}.{wb}",
        f"{PIXEL_DECODER}.input_projections.{{i}}.{{part}}.{{wb}}",
    ),
    ("sem_seg_head.pixel_decoder.transformer.level_embed", f"{PIXEL_DECODER}.level_embed"),
    (f"{ENCODER_LAYER}.self_attn.{{sampling}}.{{wb}}", f"{OUR_ENCODER_LAYER}.self_attn.{{sampling}}.{{wb}}"),
    (f"{ENCODER_LAYER}.norm1.{{wb}}", f"{OUR_ENCODER_LAYER}.self_attn_layer_norm.{{wb}}"),
    (f"{ENCODER_LAYER}.linear{{n}}.{{wb}}", f"{OUR_ENCODER_LAYER}.fc{{n}}.{{wb}}"),
    (f"{ENCODER_LAYER}.norm2.{{wb}}", f"{OUR_ENCODER_LAYER}.final_layer_norm.{{wb}}"),
    ("sem_seg_head.pixel_decoder.{fpn}.weight", f"{PIXEL_DECODER}.{{fpn}}.0.weight"),
    ("sem_seg_head.pixel_decoder.{fpn}.norm.{wb}", f"{PIXEL_DECODER}.{{fpn}}.1.{{wb}}"),
    ("sem_seg_head.pixel_decoder.mask_features.{wb}", f"{PIXEL_DECODER}.mask_projection.{{wb}}"),
)
SELF_ATTENTION = "sem_seg_head.predictor.transformer_self_attention_layers.{i}"
CROSS_ATTENTION = "sem_seg_head.predictor.transformer_cross_attention_layers.{i}"
FEED_FORWARD = "sem_seg_head.predictor.transformer_ffn_layers.{i}"
PREDICTOR_RULES = (
    ("sem_seg_head.predictor.query_feat.weight", f"{TRANSFORMER}.queries_features.weight"),
    ("sem_seg_head.predictor.query_embed.weight", QUERY_POSITIONS),
    ("sem_seg_head.predictor.label_enc.weight", LABEL_EMBEDDING),
    ("sem_seg_head.predictor.level_embed.weight", f"{TRANSFORMER}.level_embed.weight"),
    ("sem_seg_head.predictor.input_proj.{i}.{wb}", f"{TRANSFORMER}.input_projections.{{i}}.{{wb}}"),
    (f"{SELF_ATTENTION}.self_attn.in_proj_{{wb}}", f"{LAYER}.self_attn.{{qkv}}_proj.{{wb}}"),
    (f"{SELF_ATTENTION}.self_attn.out_proj.{{wb}}", f"{LAYER}.self_attn.out_proj.{{wb}}"),
    (f"{SELF_ATTENTION}.norm.{{wb}}", f"{LAYER}.self_attn_layer_norm.{{wb}}"),
    (f"{CROSS_ATTENTION}.multihead_attn.in_proj_{{wb}}", f"{LAYER}.cross_attn.in_proj_{{wb}}"),
    (f"{CROSS_ATTENTION}.multihead_attn.out_proj.{{wb}}", f"{LAYER}.cross_attn.out_proj.{{wb}}"),
    (f"{CROSS_ATTENTION}.norm.{{wb}}", f"{LAYER}.cross_attn_layer_norm.{{wb}}"),
    (f"{FEED_FORWARD}.linear{{n}}.{{wb}}", f"{LAYER}.fc{{n}}.{{wb}}"),
    (f"{FEED_FORWARD}.norm.{{wb}}", f"{LAYER}.final_layer_norm.{{wb}}"),
    ("sem_seg_head.predictor.decoder_norm.{wb}", f"{TRANSFORMER}.decoder.layernorm.{{wb}}"),
    (
        "sem_seg_head.predictor.mask_embed.layers.{i}.{wb}",
        f"{TRANSFORMER}.decoder.mask_predictor.mask_embedder.{{i}}.0.{{wb}}",
    ),
    ("sem_seg_head.predictor.class_embed.{wb}", "class_predictor.{wb}"),
    ("criterion.empty_weight", CLASS_WEIGHTS),
)
RULES = RESNET_RULES + SWIN_RULES + PIXEL_DECODER_RULES + PREDICTOR_RULES

# Convolutions that read the image.
FIRST_CONVOLUTIONS = ("backbone.stem.conv1.weight", "backbone.patch_embed.proj.weight")

# Names of older files, and those of today. Detectron2 renames them while it loads.
OLD_NAMES = (
    (r"module\.(.+)", r"\1"),  # of DistributedDataParallel
    (r"sem_seg_head\.(?!predictor\.|pixel_decoder\.)(.+)", r"sem_seg_head.pixel_decoder.\1"),
    (r"sem_seg_head\.predictor\.static_query\.weight", "sem_seg_head.predictor.query_feat.weight"),
)

# In files of the original, without a place here: what they hold follows from the configuration.
RECOMPUTED = (
    (r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index", "follows from the window size"),
    (r"pixel_(mean|std)", "stands in the configuration of the image processor"),
)

# Here, without a place in the original, and what it is set to: transformers' Swin has a last norm that no output uses; batch norms
# that Detectron2 freezes have no counter.
WITHOUT_COUNTERPART = (
    (r"model\.pixel_level_module\.encoder\.swin\.layernorm\.weight", 1),
    (r"model\.pixel_level_module\.encoder\.swin\.layernorm\.bias", 0),
    (r"model\.pixel_level_module\.encoder\..+\.normalization\.num_batches_tracked", 0),
)


@dataclass(frozen=True)
class Mapped:
    """Renamed weights.

    Attributes:
        tensors: new name -> tensor.
        sources: new name -> old name.
        ignored: old name -> why it has no place.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    ignored: dict[str, str] = field(default_factory=dict)


def update_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give weights of older files the names that the original uses today.

    Returns:
        The renamed weights, and what was renamed, for the user.

    Raises:
        ConversionError: a file holds the old and the new name.
    """
    updated: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, tensor in tensors.items():
        new_name = name
        for pattern, template in OLD_NAMES:
            new_name = re.sub(rf"^{pattern}$", template, new_name)
        if new_name in updated:
            raise ConversionError(
                f"The checkpoint holds `{new_name}` twice: also under an older name, such as `{name}`. Remove one of them."
            )
        updated[new_name] = tensor
    changed = [name for name in tensors if name not in updated]
    if changed:
        notes.append(f"{len(changed)} weights have names of older files, such as `{changed[0]}`; read as today's.")
    return updated, notes


def to_ours(tensors: Mapping[str, Tensor]) -> Mapped:
    """Rename weights of the original, in its names of today (see `update_names`), to ours.

    Tensors are not copied; a joined projection becomes three views of it.

    Raises:
        ConversionError: a name is not in the table, or two of them mean the same weight.
    """
    mapped = Mapped({}, {})
    unknown: list[str] = []
    for name, tensor in tensors.items():
        reason = find_value(RECOMPUTED, name)
        names = TABLE.forward(name)
        if reason is not None:
            mapped.ignored[name] = reason
        elif names is None:
            unknown.append(name)
        else:
            for new_name, part in zip(names, _split(name, tensor, len(names)), strict=True):
                mapped.tensors[new_name] = part
                mapped.sources[new_name] = name
    if unknown:
        raise ConversionError(
            f"{len(unknown)} names of the checkpoint are not known: {list_names(unknown)}. Expected a Mask2Former or MP-Former of "
            "Detectron2 with a ResNet or a Swin backbone and the MSDeformAttn pixel decoder. For a backbone alone use "
            "`python -m conversion.convert_backbone`."
        )
    return mapped


def to_original(tensors: Mapping[str, Tensor], *, batch_norm_counters: bool) -> Mapped:
    """Rename our weights to those of the original, in the names of its `state_dict()`.

    Args:
        tensors: of `MPFormerForUniversalSegmentation.state_dict()`.
        batch_norm_counters: True keeps `num_batches_tracked`, which the original's SyncBN has and its FrozenBN has not.

    Raises:
        ConversionError: a name is not in the table, or a part of a joined projection is missing.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    mapped = Mapped({}, {})
    unknown: list[str] = []
    for name, tensor in tensors.items():
        has_no_place = find_value(WITHOUT_COUNTERPART, name) is not None
        if has_no_place and not (batch_norm_counters and name.endswith(".num_batches_tracked")):
            mapped.ignored[name] = "has no counterpart in the original"
            continue
        found = TABLE.backward(name)
        if found is None:
            unknown.append(name)
            continue
        original, siblings = found
        parts.setdefault(original, {})[siblings.index(name)] = tensor
        counts[original] = len(siblings)
        mapped.sources.setdefault(original, name)
    incomplete = [original for original, pieces in parts.items() if len(pieces) != counts[original]]
    if unknown:
        raise ConversionError(f"The original has no place for {list_names(unknown)}.")
    if incomplete:
        raise ConversionError(
            f"The original joins query, key and value, but not all of them are there: {list_names(incomplete)}."
        )
    for original, pieces in parts.items():
        mapped.tensors[original] = pieces[0] if len(pieces) == 1 else torch.cat([pieces[i] for i in sorted(pieces)])
        if original.endswith(".attn.relative_position_bias_table"):
            index_name = original.replace("_bias_table", "_index")
            mapped.tensors[index_name] = relative_position_index(pieces[0])
            mapped.sources[index_name] = mapped.sources[original]
    return mapped


def flip_input_channels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the original whose first convolution reads the channels of an image in the opposite order: BGR and RGB."""
    first = [name for name in FIRST_CONVOLUTIONS if name in tensors and tensors[name].dim() > 1]
    return {**tensors, **{name: tensors[name].flip(1) for name in first}}


def original_name(name: str) -> str:
    """The original's name of one of our weights; ours where it has none."""
    found = TABLE.backward(name)
    return name if found is None else found[0]


def relative_position_index(table: Tensor) -> Tensor:
    """Row of Swin's bias table for each pair of cells of a window: int64, (cells, cells).

    Args:
        table: ((2 * side - 1) ** 2, heads), for a window of side x side cells. Row (dy + side - 1) * (2 * side - 1) + dx + side - 1
            is for a difference (dy, dx) of two cells.
    """
    width = round(len(table) ** 0.5)  # 2 * side - 1
    side = (width + 1) // 2
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + side - 1) * width + (x[:, None] - x + side - 1)


def with_versions(tensors: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Weights in the original's names with the versions of its modules, as its `state_dict()` has them.

    Without versions, or with older ones, the original renames the weights of the head while it loads, and those of the pixel decoder
    are lost.
    """
    state = OrderedDict(tensors)
    versions = {"": {"version": 1}}
    for name in tensors:
        parents = name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            versions.setdefault(".".join(parents[:depth]), {"version": 1})
    for head in ("sem_seg_head", "sem_seg_head.predictor"):
        versions[head] = {"version": 2}
    for module in [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]:
        is_frozen = f"{module}.num_batches_tracked" not in tensors
        versions[module] = {"version": 3 if is_frozen else 2}
    state._metadata = OrderedDict(versions)  # type: ignore[attr-defined] # noqa: SLF001 - torch's name for it
    return state


# ------------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class _Template:
    """A name with fields, such as `layers.{i}.{wb}`."""

    text: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"(\{[^}]+\})", self.text)
        return re.compile("".join(self._pattern_of(part) if part[:1] == "{" else re.escape(part) for part in parts))

    @staticmethod
    def _pattern_of(part: str) -> str:
        name = part.strip("{}").partition("+")[0]
        return f"(?P<{name}>{'|'.join(FIELDS[name])})" if name in FIELDS else rf"(?P<{name}>0|[1-9]\d{{0,5}})"

    def read(self, name: str) -> dict[str, str | int] | None:
        """Values of the fields in a name; `None` when it is not of this kind. The part of `{qkv}` is left out."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        offsets = {key: int(offset) for key, offset in re.findall(r"\{(\w+)\+(\d+)\}", self.text)}
        values = {
            key: value if key in FIELDS else int(value) - offsets.get(key, 0)
            for key, value in found.groupdict().items()
            if key != "qkv"
        }
        return None if any(isinstance(value, int) and value < 0 for value in values.values()) else values

    def names(self, fields: Mapping[str, str | int]) -> list[str]:
        """The name with these fields; three of them for query, key and value."""

        def fill(found: re.Match[str]) -> str:
            value = fields[found[1]]
            return str(value + int(found[2] or 0)) if isinstance(value, int) else value

        parts = FIELDS["qkv"] if "{qkv}" in self.text else ("",)
        return [re.sub(r"\{(\w+)(?:\+(\d+))?\}", fill, self.text.replace("{qkv}", part)) for part in parts]


class NameTable:
    """Names of two sides: pairs of templates, see the beginning of this file."""

    def __init__(self, rules: Iterable[tuple[str, str]]) -> None:
        self.rules = [(_Template(left), _Template(right)) for left, right in rules]

    def forward(self, name: str) -> list[str] | None:
        """Names on the right side of one on the left: one, or three of query, key and value; `None` if it is unknown."""
        for left, right in self.rules:
            fields = left.read(name)
            if fields is not None:
                return right.names(fields)
        return None

    def backward(self, name: str) -> tuple[str, list[str]] | None:
        """The name on the left side of one on the right, and all names that it stands for; `None` if it is unknown."""
        for left, right in self.rules:
            fields = right.read(name)
            if fields is not None:
                return left.names(fields)[0], right.names(fields)
        return None


TABLE = NameTable(RULES)


def find_value(table: Iterable[tuple[str, T]], name: str) -> T | None:
    """The value of the first pattern of a table that the whole name matches."""
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), None)


def _split(name: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    if count == 1:
        return (tensor,)
    if tensor.dim() == 0 or len(tensor) == 0 or len(tensor) % count:
        raise ConversionError(
            f"Expected `{name}` to hold query, key and value one after the other, got the shape {tuple(tensor.shape)}, whose first "
            f"axis is no multiple of {count}. The checkpoint is damaged or of another model."
        )
    return tensor.chunk(count)


def count_kinds(ignored: Mapping[str, str]) -> list[str]:
    """One line for each kind of names that differ in numbers only, with the reason."""
    kinds = Counter((re.sub(r"\d+", "*", name), reason) for name, reason in ignored.items())
    return [f"{f'{count} x ' if count > 1 else ''}{name} ({reason})" for (name, reason), count in kinds.items()]


def list_names(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMES_IN_A_MESSAGE} more" if len(names) > NAMES_IN_A_MESSAGE else ""
    return ", ".join(f"`{name[:100]}`" for name in names[:NAMES_IN_A_MESSAGE]) + more
