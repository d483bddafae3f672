"""ImageNet files of the original recipes become backbones that give the same maps as their own code."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from conversion.convert_backbone import main
from mpformer_hf import MPFormerForUniversalSegmentation
from tests.detectron2_checkpoints import Original

IMAGES = torch.linspace(-2, 2, 3 * 128 * 128).view(1, 3, 128, 128).cos()
# Without its head, the layers after which a map of stride 4, 8, 16 or 32 is complete.
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
SMALL = {"num_labels": 2, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 3}
SMALL |= {"decoder_layers": 2, "encoder_layers": 1, "encoder_feedforward_dim": 8, "dim_feedforward": 8}


def randomise(module: nn.Module) -> nn.Module:
    """Random statistics of batch norms too, so that they take part."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return module.eval()


def resnet(block: type = Bottleneck) -> ResNet:
    return randomise(ResNet(block, [1, 2, 1, 1], num_classes=7))


def resnet_maps(model: ResNet, images: Tensor) -> list[Tensor]:
    level, maps = model.maxpool(model.relu(model.bn1(model.conv1(images)))), []
    for stage in RESNET_STAGES:
        level = getattr(model, stage)(level)
        maps.append(level)
    return maps


def detectron2_names(model: ResNet) -> dict[str, Tensor]:
    """As Mask2Former's tool for torchvision's files names them."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        key = name if "layer" in name else f"stem.{name}"
        for stage in (4, 3, 2, 1):
            key = key.replace(f"layer{stage}", f"res{stage + 1}")
        for number in (1, 2, 3):
            key = key.replace(f"bn{number}", f"conv{number}.norm")
        renamed[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor
    return renamed


def swin() -> SwinTransformer:
    return SwinTransformer(
        img_size=128,
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
        num_classes=5,
    ).eval()


def swin_maps(model: SwinTransformer, images: Tensor) -> list[Tensor]:
    """Maps before the norms of a segmentation model, which have no pretrained weights: those of transformers normalise them."""
    cells, maps = model.patch_embed(images), []
    for layer in model.layers:
        cells = layer(cells)
        maps.append(nn.functional.layer_norm(cells, cells.shape[-1:]).permute(0, 3, 1, 2))
    return maps


def authors_names(model: SwinTransformer) -> dict[str, Tensor]:
    """As Swin's authors name them: a downsampling belongs to the stage before it, and windows have buffers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = name.replace("head.fc", "head").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts)] = tensor
    return renamed | {
        "layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
    }


def write_pickle(file: Path, weights: dict[str, Tensor]) -> Path:
    content = {
        "model": {name: t.numpy() for name, t in weights.items()},
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    file.write_bytes(pickle.dumps(content))
    return file


def write_torch(file: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"model": OrderedDict(weights)}, file)
    return file


def write_safetensors(file: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return file


CASES: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "R-50.pkl": (resnet, detectron2_names, write_pickle, resnet_maps),
    "resnet of torchvision": (resnet, nn.Module.state_dict, write_torch, resnet_maps),
    "resnet of timm": (resnet, nn.Module.state_dict, write_safetensors, resnet_maps),
    "resnet of basic blocks": (lambda: resnet(BasicBlock), nn.Module.state_dict, write_torch, resnet_maps),
    "swin.pth": (swin, authors_names, write_torch, swin_maps),
    "swin.pkl": (swin, authors_names, write_pickle, swin_maps),
    "swin of timm": (swin, nn.Module.state_dict, write_safetensors, swin_maps),
}


@pytest.mark.parametrize("name", CASES)
def test_the_backbone_gives_the_maps_of_its_own_code(tmp_path, capsys, name):
    make, rename, write, expected_maps = CASES[name]
    original = make()
    file = write(tmp_path / "weights", rename(original))
    assert main([str(file), "--output-dir", str(tmp_path / "backbone")]) == 0
    assert "not used:" in capsys.readouterr().out
    model = MPFormerForUniversalSegmentation.from_backbone(str(tmp_path / "backbone"), **SMALL).eval()
    with torch.no_grad():
        found = model.model.pixel_level_module.encoder(IMAGES).feature_maps
        expected = expected_maps(original, IMAGES)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_strides_and_channels_follow_the_arguments(tmp_path):
    """A ResNet of MSRA: strides in the first convolutions, and images in BGR."""
    original = resnet()
    for stage in RESNET_STAGES[1:]:
        block = getattr(original, stage)[0]
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    file = write_pickle(tmp_path / "R-50.pkl", detectron2_names(original))
    options = ["--stride-in-1x1", "--input-format", "BGR"]
    assert main([str(file), "--output-dir", str(tmp_path / "backbone"), *options]) == 0
    model = MPFormerForUniversalSegmentation.from_backbone(str(tmp_path / "backbone"), **SMALL).eval()
    with torch.no_grad():
        found = model.model.pixel_level_module.encoder(IMAGES).feature_maps
        expected = resnet_maps(original, IMAGES.flip(1))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("original", [Original(depth=18), Original(swin=(8, (1, 1, 1, 1), (1, 1, 2, 2), 4))])
def test_the_backbone_of_a_whole_checkpoint_is_taken(tmp_path, original):
    weights = original.weights()
    assert main([str(write_torch(tmp_path / "model.pth", weights)), "--output-dir", str(tmp_path / "backbone")]) == 0
    model = MPFormerForUniversalSegmentation.from_backbone(str(tmp_path / "backbone"), **SMALL)
    values = {tensor.sum().item() for tensor in model.model.pixel_level_module.encoder.state_dict().values()}
    name = "backbone.norm3.weight" if original.swin else "backbone.res5.1.conv2.norm.running_var"
    assert weights[name].sum().item() in values


DEFECTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no backbone": (lambda _: {"encoder.weight": torch.zeros(3)}, "no first convolution"),
    "an unknown name": (lambda weights: weights | {"layer1.0.se.weight": torch.zeros(3)}, "layer1.0.se.weight"),
    "a missing weight": (
        lambda weights: {k: t for k, t in weights.items() if k != "layer3.0.bn2.bias"},
        "no weights in the file",
    ),
    "another shape": (lambda weights: weights | {"layer3.0.bn2.bias": torch.zeros(3)}, "other shapes"),
    "a missing stage": (lambda weights: {k: t for k, t in weights.items() if "layer4" not in k}, "no weight for"),
    "wider blocks": (
        lambda weights: {
            key: torch.cat([t, t]) if ".0.conv1" in key else torch.cat([t, t], 1) if ".0.conv2" in key else t
            for key, t in weights.items()
        },
        "a quarter",
    ),
    "values that are not finite": (lambda weights: {k: t * float("nan") for k, t in weights.items()}, "not finite"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_other_networks_are_refused(tmp_path, capsys, name):
    change, says = DEFECTS[name]
    file = write_torch(tmp_path / "weights.pth", change(resnet().state_dict()))
    assert main([str(file), "--output-dir", str(tmp_path / "out" / "backbone")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
