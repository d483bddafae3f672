"""Checkpoints with the names, shapes and files of the original, of any size, with random weights.

The names are written down once more here, as the original's modules nest, so that tests do not ask the converter what is right.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

RESNET_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
PREDICTOR = "sem_seg_head.predictor"
PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PIXEL_DECODER_FEEDFORWARD = 1024
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Original:
    """A Mask2Former or MP-Former of the original.

    Attributes:
        swin: (embed_dim, depths, heads, window), or `None` for a ResNet.
        norm: of the ResNet.
        position_embedding: Mask2Former's `query_embed`.
        label_embedding: MP-Former's `label_enc`.
        overrides: further keys of the configuration.
    """

    depth: int = 50
    stem: int = 8
    width: int = 16
    norm: str = "FrozenBN"
    stride_in_1x1: bool = False
    swin: tuple[int, tuple[int, ...], tuple[int, ...], int] | None = None
    num_classes: int = 5
    convs_dim: int = 32
    mask_dim: int = 32
    hidden_dim: int = 32
    num_queries: int = 6
    num_heads: int = 4
    dim_feedforward: int = 48
    encoder_layers: int = 1
    decoder_layers: int = 4
    enforce_input_projection: bool = False
    position_embedding: bool = False
    label_embedding: bool = True
    overrides: tuple[tuple[str, Any], ...] = ()

    # ------------------------------------------------------------------------------------------------------------- weights

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights; statistics, norms and class weights are what they can be."""
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, Tensor] = {}
        for name, shape in self.shapes().items():
            if name.endswith("relative_position_index"):
                weights[name] = plain_position_index(round(shape[0] ** 0.5))
            elif name.endswith("num_batches_tracked"):
                weights[name] = torch.tensor(1234)
            else:
                fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
                values = torch.randn(shape, generator=generator) / fan_in**0.5
                is_scale = (
                    name.endswith(("norm.weight", "running_var", "empty_weight")) or "norm" in name.split(".")[-2]
                )
                weights[name] = values.abs() + 0.5 if is_scale and not name.endswith(("bias", "mean")) else values
        return weights

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, as the original's `state_dict()`."""
        shapes = self._swin_shapes() if self.swin else self._resnet_shapes()
        shapes |= self._pixel_decoder_shapes() | self._predictor_shapes()
        return shapes | {"criterion.empty_weight": (self.num_classes + 1,)}

    @property
    def widths(self) -> list[int]:
        """Channels of the backbone's four maps."""
        return [(self.swin[0] if self.swin else self.width) * 2**stage for stage in range(4)]

    def _norm(self, name: str, width: int) -> dict[str, Shape]:
        parts = ("weight", "bias", "running_mean", "running_var")
        counter = {} if self.norm == "FrozenBN" else {f"{name}.num_batches_tracked": ()}
        return {f"{name}.{part}": (width,) for part in parts} | counter

    def _convolution(self, name: str, outputs: int, inputs: int, size: int) -> dict[str, Shape]:
        return {f"{name}.weight": (outputs, inputs, size, size), **self._norm(f"{name}.norm", outputs)}

    def _resnet_shapes(self) -> dict[str, Shape]:
        shapes = self._convolution("backbone.stem.conv1", self.stem, 3, 7)
        inputs = self.stem
        for stage, (blocks, width) in enumerate(zip(RESNET_BLOCKS[self.depth], self.widths, strict=True)):
            for block in range(blocks):
                name = f"backbone.res{stage + 2}.{block}"
                if inputs != width or (block == 0 and stage > 0):
                    shapes |= self._convolution(f"{name}.shortcut", width, inputs, 1)
                if self.depth == 18:
                    convolutions = [(width, inputs, 3), (width, width, 3)]
                else:
                    inner = width // 4
                    convolutions = [(inner, inputs, 1), (inner, inner, 3), (width, inner, 1)]
                for number, sizes in enumerate(convolutions, start=1):
                    shapes |= self._convolution(f"{name}.conv{number}", *sizes)
                inputs = width
        return shapes

    def _swin_shapes(self) -> dict[str, Shape]:
        embed_dim, depths, heads, window = self.swin
        shapes = linear("backbone.patch_embed.norm", embed_dim)
        shapes |= {
            "backbone.patch_embed.proj.weight": (embed_dim, 3, 4, 4),
            "backbone.patch_embed.proj.bias": (embed_dim,),
        }
        for stage, width in enumerate(self.widths):
            for block in range(depths[stage]):
                name = f"backbone.layers.{stage}.blocks.{block}"
                shapes |= linear(f"{name}.norm1", width) | linear(f"{name}.norm2", width)
                shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
                shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
                shapes |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
                shapes |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
            if stage < 3:
                shapes[f"backbone.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
                shapes |= linear(f"backbone.layers.{stage}.downsample.norm", 4 * width)
            shapes |= linear(f"backbone.norm{stage}", width)
        return shapes

    def _pixel_decoder_shapes(self) -> dict[str, Shape]:
        width = self.convs_dim
        shapes: dict[str, Shape] = {f"{PIXEL_DECODER}.transformer.level_embed": (3, width)}
        for level, inputs in enumerate(self.widths[:0:-1]):
            shapes |= convolution(f"{PIXEL_DECODER}.input_proj.{level}.0", width, inputs)
            shapes |= linear(f"{PIXEL_DECODER}.input_proj.{level}.1", width)
        for layer in range(self.encoder_layers):
            name = f"{PIXEL_DECODER}.transformer.encoder.layers.{layer}"
            points = self.num_heads * 3 * 4
            shapes |= linear(f"{name}.self_attn.sampling_offsets", 2 * points, width)
            shapes |= linear(f"{name}.self_attn.attention_weights", points, width)
            shapes |= linear(f"{name}.self_attn.value_proj", width, width)
            shapes |= linear(f"{name}.self_attn.output_proj", width, width)
            shapes |= linear(f"{name}.norm1", width) | linear(f"{name}.norm2", width)
            shapes |= linear(f"{name}.linear1", PIXEL_DECODER_FEEDFORWARD, width)
            shapes |= linear(f"{name}.linear2", width, PIXEL_DECODER_FEEDFORWARD)
        shapes |= convolution(f"{PIXEL_DECODER}.mask_features", self.mask_dim, width)
        for name, inputs, size in (("adapter_1", self.widths[0], 1), ("layer_1", width, 3)):
            shapes[f"{PIXEL_DECODER}.{name}.weight"] = (width, inputs, size, size)
            shapes |= linear(f"{PIXEL_DECODER}.{name}.norm", width)
        return shapes

    def _predictor_shapes(self) -> dict[str, Shape]:
        width = self.hidden_dim
        shapes: dict[str, Shape] = {}
        for layer in range(self.decoder_layers - 1):
            own = f"{PREDICTOR}.transformer_self_attention_layers.{layer}"
            cross = f"{PREDICTOR}.transformer_cross_attention_layers.{layer}"
            feed = f"{PREDICTOR}.transformer_ffn_layers.{layer}"
            for attention, name in ((f"{own}.self_attn", own), (f"{cross}.multihead_attn", cross)):
                shapes |= {f"{attention}.in_proj_weight": (3 * width, width), f"{attention}.in_proj_bias": (3 * width,)}
                shapes |= linear(f"{attention}.out_proj", width, width) | linear(f"{name}.norm", width)
            shapes |= linear(f"{feed}.linear1", self.dim_feedforward, width)
            shapes |= linear(f"{feed}.linear2", width, self.dim_feedforward) | linear(f"{feed}.norm", width)
        shapes |= linear(f"{PREDICTOR}.decoder_norm", width) | linear(
            f"{PREDICTOR}.class_embed", self.num_classes + 1, width
        )
        for layer, outputs in enumerate((width, width, self.mask_dim)):
            shapes |= linear(f"{PREDICTOR}.mask_embed.layers.{layer}", outputs, width)
        if self.enforce_input_projection or self.convs_dim != width:
            for level in range(3):
                shapes |= convolution(f"{PREDICTOR}.input_proj.{level}", width, self.convs_dim)
        shapes |= {
            f"{PREDICTOR}.level_embed.weight": (3, width),
            f"{PREDICTOR}.query_feat.weight": (self.num_queries, width),
        }
        if self.position_embedding:
            shapes[f"{PREDICTOR}.query_embed.weight"] = (self.num_queries, width)
        if self.label_embedding:
            shapes[f"{PREDICTOR}.label_enc.weight"] = (self.num_classes, width)
        return shapes

    # ------------------------------------------------------------------------------------------------------- configuration

    def config(self) -> dict[str, Any]:
        """The configuration, as nested dictionaries."""
        keys = {
            "MODEL.META_ARCHITECTURE": "MaskFormer",
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "INPUT.FORMAT": "RGB",
            "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": self.num_classes,
            "MODEL.SEM_SEG_HEAD.CONVS_DIM": self.convs_dim,
            "MODEL.SEM_SEG_HEAD.MASK_DIM": self.mask_dim,
            "MODEL.SEM_SEG_HEAD.NORM": "GN",
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": self.encoder_layers,
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
            "MODEL.MASK_FORMER.HIDDEN_DIM": self.hidden_dim,
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": self.num_queries,
            "MODEL.MASK_FORMER.NHEADS": self.num_heads,
            "MODEL.MASK_FORMER.DROPOUT": 0.0,
            "MODEL.MASK_FORMER.DIM_FEEDFORWARD": self.dim_feedforward,
            "MODEL.MASK_FORMER.DEC_LAYERS": self.decoder_layers,
            "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": self.enforce_input_projection,
            "MODEL.MASK_FORMER.DN_MODE": "points",
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": False,
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
            "MODEL.DN.NUM_DN": 1,
            **self._backbone_keys(),
            **dict(self.overrides),
        }
        nested: dict[str, Any] = {}
        for key, value in keys.items():
            *sections, name = key.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return nested

    def _backbone_keys(self) -> dict[str, Any]:
        if self.swin:
            embed_dim, depths, heads, window = self.swin
            return {
                "MODEL.BACKBONE.NAME": "D2SwinTransformer",
                "MODEL.SWIN.EMBED_DIM": embed_dim,
                "MODEL.SWIN.DEPTHS": list(depths),
                "MODEL.SWIN.NUM_HEADS": list(heads),
                "MODEL.SWIN.WINDOW_SIZE": window,
                "MODEL.SWIN.DROP_PATH_RATE": 0.3,
            }
        return {
            "MODEL.BACKBONE.NAME": "build_resnet_backbone",
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.STEM_TYPE": "basic",
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.width,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width // 4,
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            "MODEL.RESNETS.NORM": self.norm,
            "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.RESNETS.RES5_MULTI_GRID": [1, 1, 1],
        }


SWIN_LARGE = Original(
    swin=(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    num_classes=80,
    convs_dim=256,
    mask_dim=256,
    hidden_dim=256,
    num_queries=200,
    num_heads=8,
    dim_feedforward=2048,
    encoder_layers=6,
    decoder_layers=10,
)


def linear(name: str, outputs: int, inputs: int | None = None) -> dict[str, Shape]:
    """Weight and bias of a linear layer, or of a norm."""
    return {f"{name}.weight": (outputs,) if inputs is None else (outputs, inputs), f"{name}.bias": (outputs,)}


def convolution(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    """Weight and bias of a 1x1 convolution."""
    return {f"{name}.weight": (outputs, inputs, 1, 1), f"{name}.bias": (outputs,)}


def plain_position_index(window: int) -> Tensor:
    """Swin's index: for two cells of a window, a number for their difference in rows, then in columns."""
    cells = [(row, column) for row in range(window) for column in range(window)]
    return torch.tensor(
        [[(r - s + window - 1) * (2 * window - 1) + (c - d + window - 1) for s, d in cells] for r, c in cells]
    )


# ------------------------------------------------------------------------------------------------------------------- files


def write_config(file: Path, config: dict[str, Any]) -> Path:
    """Write a configuration as YAML."""
    file.write_text(yaml.safe_dump(config))
    return file


def write_pth(file: Path, weights: dict[str, Tensor], **entries: Any) -> Path:
    """Write a checkpoint as Detectron2 does while it trains."""
    torch.save({"model": OrderedDict(weights), "iteration": 99, **entries}, file)
    return file


def write_zoo_pickle(file: Path, weights: dict[str, Tensor]) -> Path:
    """Write a checkpoint as the model zoo has them: numpy arrays, and the older name of the queries."""
    old = {name.replace("query_feat", "static_query"): tensor.numpy() for name, tensor in weights.items()}
    content = {"model": OrderedDict(old), "__author__": "third_party", "matching_heuristics": False}
    file.write_bytes(pickle.dumps(content, protocol=4))
    return file


def write_plain_pickle(file: Path, weights: dict[str, Tensor]) -> Path:
    """Write a checkpoint as a plain dictionary of arrays."""
    content = {"model": {name: tensor.numpy() for name, tensor in weights.items()}, "__author__": "third_party"}
    file.write_bytes(pickle.dumps({**content, "matching_heuristics": True}, protocol=4))
    return file
