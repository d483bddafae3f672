"""Weights on several devices: maps of accelerate with parts on the CPU and on disk, and DistributedDataParallel."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import random_batch, random_images, random_targets, tiny_model

DEVICE_MAPS = {
    "backbone on disk": {
        "model.pixel_level_module": "disk",
        "model.transformer_module": "cpu",
        "class_predictor": "cpu",
        "criterion": "cpu",
    },
    "decoder on disk": {
        "model.pixel_level_module": "cpu",
        "model.transformer_module": "disk",
        "class_predictor": "disk",
        "criterion": "disk",
    },
    "network on disk": {"model": "disk", "class_predictor": "cpu", "criterion": "cpu"},
    "all on disk": {"": "disk"},
    "all on the CPU": {"": "cpu"},
    "auto": "auto",
}


@pytest.fixture(params=["resnet", "swin"])
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


def load(folder: Path, **arguments: Any) -> MPFormerForUniversalSegmentation:
    return MPFormerForUniversalSegmentation.from_pretrained(
        folder / "model", offload_folder=folder / "offloaded", **arguments
    )


def run_seeded(model: nn.Module, **inputs: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)


def weights_on_meta(model: nn.Module) -> set[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, tensor in tensors if tensor.device.type == "meta"}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
def test_a_model_spread_over_devices_gives_the_same_bits(device_map: str | dict[str, str], backbone: str, tmp_path):
    model = tiny_model(backbone)
    model.save_pretrained(tmp_path / "model")
    spread = load(tmp_path, device_map=device_map)
    on_disk = () if device_map == "auto" else tuple(name for name, place in device_map.items() if place == "disk")
    assert {name for name, _ in spread.named_parameters() if name.startswith(on_disk)} <= weights_on_meta(spread)
    assert bool(weights_on_meta(spread)) == bool(on_disk)

    inputs = {"pixel_values": random_images(2, (64, 64)), **random_targets([2, 1], (64, 64))}
    expected, outputs = run_seeded(model, **inputs), run_seeded(spread, **inputs)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)


def test_too_little_memory_moves_the_model_to_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    spread = load(tmp_path, device_map="auto", max_memory={"cpu": count_bytes(model) // 2})
    assert "disk" in spread.hf_device_map.values()
    inputs = {"pixel_values": random_images(1, (64, 64))}
    expected, outputs = run_seeded(model, **inputs), run_seeded(spread, **inputs)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_budget_never_splits_the_pixel_level_nor_the_transformer_module(backbone: str, share: float):
    model = tiny_model(backbone)
    limits = {"cpu": int(share * count_bytes(model)), "disk": 10 * count_bytes(model)}
    whole = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    split = infer_auto_device_map(model, limits)
    inside = ("model.pixel_level_module.", "model.transformer_module.")
    assert any(name.startswith(inside) for name in split), "This budget would split nothing, so it tests nothing."
    assert not any(name.startswith(inside) for name in whole)


def count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def test_loading_leaves_nothing_on_the_meta_device(backbone: str, tmp_path):
    tiny_model(backbone).save_pretrained(tmp_path / "model")
    model = load(tmp_path, device_map="cpu")
    assert weights_on_meta(model) == set()
    for module in model.modules():
        for name, value in vars(module).items():
            assert not (isinstance(value, torch.Tensor) and value.is_meta), name
    batch = random_batch([2, 1], (64, 64))
    assert torch.equal(run_seeded(model, **batch).loss, run_seeded(tiny_model(backbone), **batch).loss)


# --------------------------------------------------------------------------------------------- DistributedDataParallel


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("fields", [{}, {"mask_piloting": False}, {"pilot_query_budget": 2}], ids=str)
def test_data_parallel_training_misses_no_parameter_whatever_the_segments(fields: dict[str, Any], backbone: str):
    plain = tiny_model(backbone, **fields).train()
    model = DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=False)
    # The step after one with an unused parameter raises; the last one is checked by its gradients.
    for num_segments in ([2, 0], [0, 0], [3, 1], [0, 0]):
        batch = random_batch(num_segments, (64, 64))
        for one in (plain, model):
            one.zero_grad()
            torch.manual_seed(0)
            one(**batch).loss.backward()
        for (name, weight), expected in zip(model.module.named_parameters(), plain.parameters(), strict=True):
            assert (weight.grad is not None) == weight.requires_grad, name
            if weight.grad is not None:
                torch.testing.assert_close(weight.grad, expected.grad)
