"""The recorded cases of the original code: loading, names, configuration, inputs and fixed random points.

`load_case("a")` reads what `cut_goldens.py` stored. `to_our_names` renames weights of the original (Detectron2) to those of
transformers' Mask2Former, which are ours too; `config_fields` does the same for a Detectron2 configuration. `README.md` says what the
recordings hold.

Axes: B images, T segments of one image, P pilot slots, Q matched queries, H W the padded image.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, ResNetConfig, SwinConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("a", "b", "c", "d1", "d2")
LABEL_EMBEDDING = "model.transformer_module.pilot_label_embedder.weight"
POSITION_EMBEDDING = "model.transformer_module.queries_embedder.weight"
WITHOUT_COUNTERPART = "model.pixel_level_module.encoder.swin.layernorm."  # transformers' last norm of Swin, never used
RESNET_DEPTHS = {50: [3, 4, 6, 3]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# The original fixes the width of the pixel decoder's feed-forward layers; it has no key for it.
PIXEL_DECODER_FEEDFORWARD = 1024

# With ALL_LY_DN False the original tests `layer < 3` after the layer whose mask was used, so four layers see ground truth.
PARTIAL_PILOT_LAYERS = 4


@dataclass(frozen=True)
class Tolerance:
    """Absolute errors that float32 explains: a few times the difference of the original with itself in another summation order."""

    features: float
    class_logits: float
    mask_logits: float


# ResNet moves more than Swin does when the order of a sum changes, see README.md.
RESNET_TOLERANCE = Tolerance(features=5e-4, class_logits=1e-3, mask_logits=2e-3)
SWIN_TOLERANCE = Tolerance(features=1e-4, class_logits=2e-4, mask_logits=2e-4)


@dataclass(frozen=True)
class GoldenCase:
    """One model of the original code with everything that was recorded of it.

    Attributes:
        name: one of `CASES`.
        config: the Detectron2 configuration, as nested dictionaries.
        meta: losses, gradient norms and assignments, see `cut_goldens.cut_meta`.
        weights: original name -> parameter or buffer.
        infer: evaluation forward of one image.
        train: training inputs, and the forward passes of the training variants (names begin with the variant).
    """

    name: str
    config: dict[str, Any]
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    infer: dict[str, Tensor]
    train: dict[str, Tensor]

    @property
    def tolerance(self) -> Tolerance:
        return SWIN_TOLERANCE if "SWIN" in self.config["MODEL"] else RESNET_TOLERANCE

    @property
    def has_label_embedding(self) -> bool:
        """True for MP-Former, False for plain Mask2Former."""
        return "sem_seg_head.predictor.label_enc.weight" in self.weights

    @property
    def num_levels(self) -> int:
        """Supervised prediction levels: one before the first decoder layer and one after each."""
        return self.config["MODEL"]["MASK_FORMER"]["DEC_LAYERS"]

    def infer_levels(self, kind: str) -> list[Tensor]:
        """Tensors `kind.0`, `kind.1`, ... of the evaluation forward."""
        return numbered(self.infer, kind)

    def train_levels(self, variant: str, kind: str) -> list[Tensor]:
        """Tensors `kind.0`, `kind.1`, ... of a training variant."""
        return numbered(self.train, f"{variant}.{kind}")

    def grad_norms(self, variant: str) -> dict[str, float]:
        """Original parameter name -> norm of its gradient with the fixed points."""
        return dict(zip(self.meta["parameters"], self.meta["variants"][variant]["grad_norm"], strict=True))


@cache
def load_case(name: str) -> GoldenCase:
    """Read a recorded case; what it shares with another case is read from there."""
    folder = GOLDENS / name
    meta = json.loads((folder / "meta.json").read_text())
    shared_weights = load_case(meta["weights_as"]).weights if meta["weights_as"] else {}
    own_weights = folder / "weights.safetensors"
    forward = GOLDENS / (meta["forward_as"] or name)
    return GoldenCase(
        name=name,
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        meta=meta,
        weights=shared_weights | (load_file(own_weights) if own_weights.is_file() else {}),
        infer=read_tensors(forward / "infer.safetensors"),
        train=read_tensors(forward / "train.safetensors"),
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read tensors and unpack the masks that `cut_goldens.write_tensors` stored as bits."""
    with safe_open(file, framework="pt") as handle:
        layout = json.loads((handle.metadata() or {}).get("packed", "{}"))
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    for name, description in layout.items():
        dtype, shape = description.split(" ", maxsplit=1)
        size = json.loads(shape)
        bits = np.unpackbits(tensors.pop(f"{name}.bits").numpy(), count=int(np.prod(size)))
        tensors[name] = torch.from_numpy(bits.reshape(size)).to(getattr(torch, dtype))
    return tensors


def numbered(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """`prefix.0`, `prefix.1`, ... in order."""
    values = []
    while f"{prefix}.{len(values)}" in tensors:
        values.append(tensors[f"{prefix}.{len(values)}"])
    return values


# --- names -----------------------------------------------------------------------------------------------------------------

ENCODER = "model.pixel_level_module.encoder"
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
DECODER_LAYER = rf"{TRANSFORMER}.decoder.layers.\1"

# (pattern of the whole original name, our name). `{q,k,v}` in our name splits the tensor in three along its first axis.
NAME_RULES = (
    (r"backbone\.stem\.conv1\.weight", rf"{ENCODER}.embedder.embedder.convolution.weight"),
    (r"backbone\.stem\.conv1\.norm\.(\w+)", rf"{ENCODER}.embedder.embedder.normalization.\1"),
    (r"backbone\.patch_embed\.proj\.(\w+)", rf"{ENCODER}.swin.embeddings.patch_embeddings.projection.\1"),
    (r"backbone\.patch_embed\.norm\.(\w+)", rf"{ENCODER}.swin.embeddings.norm.\1"),
    (
        r"backbone\.layers\.(\d+\.blocks\.\d+)\.attn\.qkv\.(\w+)",
        rf"{ENCODER}.swin.encoder.layers.\1.attention.{{q,k,v}}_proj.\2",
    ),
    (
        r"backbone\.layers\.(\d+\.blocks\.\d+)\.attn\.proj\.(\w+)",
        rf"{ENCODER}.swin.encoder.layers.\1.attention.o_proj.\2",
    ),
    (
        r"backbone\.layers\.(\d+\.blocks\.\d+)\.attn\.relative_position_bias_table",
        rf"{ENCODER}.swin.encoder.layers.\1.attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"backbone\.layers\.(\d+\.blocks\.\d+)\.norm1\.(\w+)", rf"{ENCODER}.swin.encoder.layers.\1.layernorm_before.\2"),
    (r"backbone\.layers\.(\d+\.blocks\.\d+)\.norm2\.(\w+)", rf"{ENCODER}.swin.encoder.layers.\1.layernorm_after.\2"),
    (r"backbone\.layers\.(\d+\.blocks\.\d+\.mlp\.fc\d\.\w+)", rf"{ENCODER}.swin.encoder.layers.\1"),
    (r"backbone\.layers\.(\d+\.downsample\.\w+\.\w+)", rf"{ENCODER}.swin.encoder.layers.\1"),
    (r"sem_seg_head\.pixel_decoder\.input_proj\.(\d+\.\d+\.\w+)", rf"{PIXEL_DECODER}.input_projections.\1"),
    (r"sem_seg_head\.pixel_decoder\.transformer\.level_embed", rf"{PIXEL_DECODER}.level_embed"),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+\.self_attn\.\w+\.\w+)",
        rf"{PIXEL_DECODER}.encoder.layers.\1",
    ),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.(\w+)",
        rf"{PIXEL_DECODER}.encoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.(\w+)",
        rf"{PIXEL_DECODER}.encoder.layers.\1.final_layer_norm.\2",
    ),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear(\d)\.(\w+)",
        rf"{PIXEL_DECODER}.encoder.layers.\1.fc\2.\3",
    ),
    (r"sem_seg_head\.pixel_decoder\.(adapter_1|layer_1)\.weight", rf"{PIXEL_DECODER}.\1.0.weight"),
    (r"sem_seg_head\.pixel_decoder\.(adapter_1|layer_1)\.norm\.(\w+)", rf"{PIXEL_DECODER}.\1.1.\2"),
    (r"sem_seg_head\.pixel_decoder\.mask_features\.(\w+)", rf"{PIXEL_DECODER}.mask_projection.\1"),
    (r"sem_seg_head\.predictor\.query_feat\.weight", rf"{TRANSFORMER}.queries_features.weight"),
    (r"sem_seg_head\.predictor\.query_embed\.weight", POSITION_EMBEDDING),
    (r"sem_seg_head\.predictor\.label_enc\.weight", LABEL_EMBEDDING),
    (r"sem_seg_head\.predictor\.level_embed\.weight", rf"{TRANSFORMER}.level_embed.weight"),
    (
        r"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(\w+)",
        rf"{DECODER_LAYER}.self_attn.{{q,k,v}}_proj.\2",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.(\w+)",
        rf"{DECODER_LAYER}.self_attn.out_proj.\2",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.norm\.(\w+)",
        rf"{DECODER_LAYER}.self_attn_layer_norm.\2",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        rf"{DECODER_LAYER}.cross_attn.\2",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.norm\.(\w+)",
        rf"{DECODER_LAYER}.cross_attn_layer_norm.\2",
    ),
    (r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.linear(\d)\.(\w+)", rf"{DECODER_LAYER}.fc\2.\3"),
    (r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.norm\.(\w+)", rf"{DECODER_LAYER}.final_layer_norm.\2"),
    (r"sem_seg_head\.predictor\.decoder_norm\.(\w+)", rf"{TRANSFORMER}.decoder.layernorm.\1"),
    (
        r"sem_seg_head\.predictor\.mask_embed\.layers\.(\d)\.(\w+)",
        rf"{TRANSFORMER}.decoder.mask_predictor.mask_embedder.\1.0.\2",
    ),
    (r"sem_seg_head\.predictor\.class_embed\.(\w+)", r"class_predictor.\1"),
    (r"criterion\.empty_weight", r"criterion.empty_weight"),
)


def our_names(original: str) -> list[str]:
    """Names of an original parameter in our model: one, or three (q, k, v in this order) where the original joins them.

    Raises:
        ValueError: no rule, so the recording holds a part that the tests do not know.
    """
    if resnet := re.fullmatch(r"backbone\.res(\d)\.(\d+)\.(conv\d|shortcut)\.(.+)", original):
        return [resnet_name(*resnet.groups())]
    if stage := re.fullmatch(r"backbone\.norm(\d)\.(\w+)", original):
        return [f"{ENCODER}.hidden_states_norms.stage{int(stage[1]) + 1}.{stage[2]}"]
    for pattern, template in NAME_RULES:
        if found := re.fullmatch(pattern, original):
            name = found.expand(template)
            return [name.replace("{q,k,v}", part) for part in "qkv"] if "{q,k,v}" in name else [name]
    raise ValueError(f"No rule for the recorded parameter {original!r}. Add one to NAME_RULES.")


def resnet_name(stage: str, block: str, part: str, leaf: str) -> str:
    """Name of one tensor in a ResNet block; the original counts stages from 2 and convolutions from 1."""
    place = part if part == "shortcut" else f"layer.{int(part.removeprefix('conv')) - 1}"
    kind = "normalization" if leaf.startswith("norm.") else "convolution"
    return f"{ENCODER}.encoder.stages.{int(stage) - 2}.layers.{block}.{place}.{kind}.{leaf.removeprefix('norm.')}"


def to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename recorded weights; joined q, k, v projections become three tensors."""
    renamed: dict[str, Tensor] = {}
    for original, value in weights.items():
        names = our_names(original)
        renamed |= dict(zip(names, value.chunk(len(names)), strict=True))
    return renamed


def our_loss_name(original: str) -> str:
    """`loss_ce_dn_0` -> `loss_pilot_cross_entropy_0`, `loss_mask_3` -> `loss_mask_3`."""
    found = re.fullmatch(r"loss_(ce|mask|dice)(_dn)?(_\d+)?", original)
    if found is None:
        raise ValueError(f"Recorded loss {original!r} is not loss_{{ce,mask,dice}}[_dn][_level].")
    kind, pilot, level = found.groups(default="")
    return f"loss_{'pilot_' if pilot else ''}{'cross_entropy' if kind == 'ce' else kind}{level}"


# --- configuration -----------------------------------------------------------------------------------------------------------


def config_fields(case: GoldenCase) -> dict[str, Any]:
    """Fields that transformers' `Mask2FormerConfig` and ours share, for a recorded case."""
    head, former = case.config["MODEL"]["SEM_SEG_HEAD"], case.config["MODEL"]["MASK_FORMER"]
    return {
        "backbone_config": backbone_config(case.config["MODEL"]),
        "num_labels": head["NUM_CLASSES"],
        "feature_size": head["CONVS_DIM"],
        "mask_feature_size": head["MASK_DIM"],
        "encoder_layers": head["TRANSFORMER_ENC_LAYERS"],
        "encoder_feedforward_dim": PIXEL_DECODER_FEEDFORWARD,
        "common_stride": head["COMMON_STRIDE"],
        "ignore_value": head["IGNORE_VALUE"],
        "hidden_dim": former["HIDDEN_DIM"],
        "num_queries": former["NUM_OBJECT_QUERIES"],
        "num_attention_heads": former["NHEADS"],
        "dropout": former["DROPOUT"],
        "dim_feedforward": former["DIM_FEEDFORWARD"],
        "decoder_layers": former["DEC_LAYERS"],
        "pre_norm": former["PRE_NORM"],
        "enforce_input_projection": former["ENFORCE_INPUT_PROJ"],
        "use_auxiliary_loss": former["DEEP_SUPERVISION"],
        "no_object_weight": former["NO_OBJECT_WEIGHT"],
        "class_weight": former["CLASS_WEIGHT"],
        "mask_weight": former["MASK_WEIGHT"],
        "dice_weight": former["DICE_WEIGHT"],
        "train_num_points": former["TRAIN_NUM_POINTS"],
        "oversample_ratio": former["OVERSAMPLE_RATIO"],
        "importance_sample_ratio": former["IMPORTANCE_SAMPLE_RATIO"],
    }


def pilot_fields(case: GoldenCase, num_dn: int) -> dict[str, Any]:
    """Fields that only our config has.

    Args:
        case: a recorded case.
        num_dn: the original's `NUM_DN`: groups below 100, a total number of pilot slots from 100 on, no piloting at 0.
    """
    former = case.config["MODEL"]["MASK_FORMER"]
    if not case.has_label_embedding:
        return {"mask_piloting": False}
    return {
        "query_position_embedding": False,
        "mask_piloting": num_dn > 0,
        "pilot_groups": num_dn if 0 < num_dn < 100 else 1,
        "pilot_query_budget": num_dn if num_dn >= 100 else None,
        "pilot_layers": None if former["ALL_LY_DN"] else PARTIAL_PILOT_LAYERS,
        "pilot_label_loss": not former["DN_NO_LB"],
        "pilot_mask_noise_ratio": case.config["MODEL"]["DN"]["NOISE_SCALE"],
        "pilot_label_noise_ratio": max(former["LB_NOISE_RATIO"], 0.0),
    }


def backbone_config(model: dict[str, Any]) -> PreTrainedConfig:
    """Backbone of a Detectron2 `MODEL` node: Swin when it has that node, else ResNet."""
    if swin := model.get("SWIN"):
        return SwinConfig(
            embed_dim=swin["EMBED_DIM"],
            depths=swin["DEPTHS"],
            num_heads=swin["NUM_HEADS"],
            window_size=swin["WINDOW_SIZE"],
            use_absolute_embeddings=swin["APE"],
            drop_path_rate=swin["DROP_PATH_RATE"],
            image_size=swin["PRETRAIN_IMG_SIZE"],
            out_features=STAGES,
        )
    resnet = model["RESNETS"]
    return ResNetConfig(
        embedding_size=resnet["STEM_OUT_CHANNELS"],
        hidden_sizes=[resnet["RES2_OUT_CHANNELS"] * 2**stage for stage in range(4)],
        depths=RESNET_DEPTHS[resnet["DEPTH"]],
        layer_type="bottleneck",
        downsample_in_bottleneck=resnet["STRIDE_IN_1X1"],
        out_features=STAGES,
    )


# --- inputs ------------------------------------------------------------------------------------------------------------------


def preprocess(case: GoldenCase, images: list[Tensor]) -> dict[str, Tensor]:
    """Normalise, then pad with 0 at the right and the bottom to the batch maximum, rounded up to a multiple of 32.

    Args:
        case: a recorded case.
        images: uint8, (3, height, width) each.

    Returns:
        `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W), int64, 1 where the image is.
    """
    mean, std = (torch.tensor(case.config["MODEL"][key])[:, None, None] for key in ("PIXEL_MEAN", "PIXEL_STD"))
    divisor = case.config["MODEL"]["MASK_FORMER"]["SIZE_DIVISIBILITY"]
    height, width = (-(-max(image.shape[axis] for image in images) // divisor) * divisor for axis in (1, 2))
    pixel_values = torch.zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = (image - mean) / std
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def training_inputs(case: GoldenCase, variant: str) -> dict[str, Any]:
    """Arguments of a training forward; the targets have their image's own size. Images without instances follow the variant."""
    counts = case.meta["variants"][variant]["n_instances"]
    keep = [slice(None) if count else slice(0) for count in counts]
    return {
        **preprocess(case, [case.train[f"image.{index}"] for index in range(len(counts))]),
        "mask_labels": [case.train[f"masks.{index}"][part] for index, part in enumerate(keep)],
        "class_labels": [case.train[f"labels.{index}"][part] for index, part in enumerate(keep)],
    }


@contextmanager
def fixed_random_points(points: Tensor) -> Iterator[None]:
    """Answer each `torch.rand(..., m, 2)` with the first m rows of `points`, the same for all leading axes.

    Args:
        points: (rows, 2), (x, y) in [0, 1] of the padded image.
    """
    draw = torch.rand

    def answer(*size: Any, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if len(shape) < 2 or shape[-1] != 2 or not 0 < shape[-2] <= len(points):
            return draw(*size, **options)
        rows = points[: shape[-2]].to(dtype=options.get("dtype") or points.dtype, device=options.get("device"))
        return rows.expand(shape).clone()

    with mock.patch.object(torch, "rand", answer):
        yield


@contextmanager
def recorded_results(owner: Any, attribute: str, note: Callable[..., None]) -> Iterator[None]:
    """Call `note(result, *args, **kwargs)` after every call of `owner.attribute`, which works as ever."""
    original = getattr(owner, attribute)

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note(result, *args, **kwargs)
        return result

    with mock.patch.object(owner, attribute, noted):
        yield


# --- the model under test ----------------------------------------------------------------------------------------------------


def build_model(case: GoldenCase, num_dn: int) -> MPFormerForUniversalSegmentation:
    """Our model with the weights of a recorded case, set up as the original was with `NUM_DN` = `num_dn`."""
    config = MPFormerConfig(**config_fields(case), **pilot_fields(case, num_dn))
    model = MPFormerForUniversalSegmentation(config)
    weights = to_our_names(case.weights)
    if not config.mask_piloting:
        weights.pop(LABEL_EMBEDDING, None)
    outcome = model.load_state_dict(weights, strict=False)
    unset = [name for name in outcome.missing_keys if not name.startswith(WITHOUT_COUNTERPART)]
    if unset or outcome.unexpected_keys:
        raise ValueError(f"Recorded weights do not fit: missing {unset}, unexpected {outcome.unexpected_keys}.")
    return model


@dataclass
class SeenByDecoder:
    """What reached the transformer decoder's layers in one forward.

    Attributes:
        queries: (B, P + Q, C), contents before the first layer.
        cross_attention_masks: per layer, bool, (B, 1, P + Q, cells). True blocks.
        self_attention_masks: per layer, bool, (1, 1, P + Q, P + Q), or `None`. True blocks.
    """

    queries: Tensor | None = None
    cross_attention_masks: list[Tensor] = field(default_factory=list)
    self_attention_masks: list[Tensor | None] = field(default_factory=list)


@contextmanager
def watch_decoder(model: MPFormerForUniversalSegmentation) -> Iterator[SeenByDecoder]:
    """Note the inputs of every decoder layer while the context is open."""
    seen = SeenByDecoder()

    def note_queries(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.queries = argument(module, "queries", args, kwargs).detach()

    def note_cross_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.cross_attention_masks.append(argument(module, "attention_mask", args, kwargs))

    def note_self_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.self_attention_masks.append(argument(module, "attention_mask", args, kwargs))

    layers = model.get_submodule(f"{TRANSFORMER}.decoder.layers")
    with ExitStack() as stack:
        hooks = [(layers[0], note_queries)]
        hooks += [(layer.cross_attn, note_cross_attention) for layer in layers]
        hooks += [(layer.self_attn, note_self_attention) for layer in layers]
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument `name` of a call of `module`, however it was passed."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments[name]
