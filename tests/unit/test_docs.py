"""The guides in docs/ are run, not believed: each Python block works, with the models that the text names."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
)

from mpformer_hf import MPFormerImageProcessor, mask_post_processing, semantic_views, tiled_prediction, visualization
from tests.factories import tiny_backbone_config, tiny_model
from tests.unit.test_readme import ROOT, blocks_of, files_named_in

GUIDES = sorted((ROOT / "docs").glob("*.md"))
POST_PROCESSING = ROOT / "docs" / "post_processing.md"
MODULES: list[ModuleType] = [mask_post_processing, semantic_views, tiled_prediction, visualization]
SIZES = [(50, 90), (70, 40)]
NUM_LABELS = 3


def images() -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def tiny_mask2former() -> PreTrainedModel:
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=tiny_backbone_config(),
            num_labels=NUM_LABELS,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            num_attention_heads=4,
            num_queries=6,
            encoder_layers=1,
            decoder_layers=3,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
        )
    )


def tiny_maskformer() -> PreTrainedModel:
    decoder = {
        "model_type": "detr",
        "d_model": 32,
        "decoder_layers": 1,
        "encoder_layers": 1,
        "decoder_ffn_dim": 32,
        "decoder_attention_heads": 4,
        "num_queries": 6,
    }
    config = MaskFormerConfig(
        backbone_config=tiny_backbone_config().to_dict(),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=NUM_LABELS,
    )
    return MaskFormerForInstanceSegmentation(config)


def tiny_eomt() -> PreTrainedModel:
    config = EomtConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_blocks=1,
        image_size=96,
        num_queries=6,
        num_labels=NUM_LABELS,
    )
    return EomtForUniversalSegmentation(config)


def run_block(name: str, **names: Any) -> dict[str, Any]:
    """Run a block of the guide with the public functions that it may use."""
    [block] = [block for block in blocks_of(POST_PROCESSING.read_text()) if block.language == f"python {name}"]
    public = {key: value for module in MODULES for key, value in vars(module).items() if not key.startswith("_")}
    names = {**public, **names}
    exec(compile("\n" * (block.line - 1) + block.source, str(POST_PROCESSING), "exec"), names)
    return names


@pytest.mark.parametrize(
    ("name", "make_model", "fields"),
    [
        ("mask2former", tiny_mask2former, {"size": {"shortest_edge": 64, "longest_edge": 96}}),
        ("maskformer", tiny_maskformer, {"size": {"shortest_edge": 64, "longest_edge": 96}}),
        ("eomt", tiny_eomt, {"size": {"longest_edge": 96}, "pad_size": {"height": 96, "width": 96}}),
    ],
)
def test_three_lines_serve_a_model_of_transformers(
    name: str, make_model: Callable[[], PreTrainedModel], fields: dict
) -> None:
    model, processor = make_model().eval(), MPFormerImageProcessor(**fields)
    with torch.no_grad():
        ran = run_block(name, model=model, processor=processor, images=images(), sizes=SIZES)
    results, outputs = ran["result"], ran["out"]
    maps = [one.masks if hasattr(one, "masks") else one.segmentation for one in results]
    assert [tuple(one.shape[-2:]) for one in maps] == SIZES
    # What the lines give is what the processor gives once it knows the valid sizes.
    outputs.image_sizes = mask_post_processing.valid_sizes(ran["batch"]["pixel_mask"])
    task = {"mask2former": "panoptic", "maskformer": "instance", "eomt": "semantic"}[name]
    settings = {"preset": "evaluation"} if task == "instance" else {}
    expected = getattr(processor, f"post_process_{task}_segmentation")(outputs, target_sizes=SIZES, **settings)
    for index, one in enumerate(expected):
        theirs = one if task == "semantic" else one["masks" if task == "instance" else "segmentation"]
        assert torch.equal(theirs, maps[index])


@pytest.mark.parametrize("name", ["instances", "augmented", "large", "pictures"])
def test_the_other_blocks_run(name: str) -> None:
    model, processor = tiny_model().eval(), MPFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    image = images()[0].resize((180, 150))
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    result = processor.post_process_panoptic_segmentation(outputs, 0.0, target_sizes=[(150, 180)])[0]
    names = {"model": model, "processor": processor, "outputs": outputs, "image": image, "result": result}
    ran = run_block(name, **names, target_sizes=[(150, 180)], id2label={0: "zero", 1: "one", 2: "two"})
    made = {"instances": "result", "augmented": "prediction", "large": "semantic", "pictures": "picture"}[name]
    assert ran[made] is not None


def test_every_block_of_the_guide_is_run() -> None:
    languages = {block.language for block in blocks_of(POST_PROCESSING.read_text())}
    run = {"mask2former", "maskformer", "eomt", "instances", "augmented", "large", "pictures"}
    assert languages == {f"python {name}" for name in run}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_files_that_a_guide_names_exist(guide: Path) -> None:
    missing = [
        name
        for name in files_named_in(guide.read_text())
        if not (any(ROOT.glob(name)) or (guide.parent / name).exists())
    ]
    assert not missing
