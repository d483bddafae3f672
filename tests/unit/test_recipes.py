"""The recipes in training/recipes: each is complete, can be built, and says what the original did.

What cannot be here is replaced: pretrained backbones and models by networks of the same architecture without weights
(on the meta device), data by some classes.
"""

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, ResNetConfig, SwinConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor, modeling_mpformer
from mpformer_hf.modeling_mpformer import TracedBackbone, trace_backbone
from training.arguments import TrainingArguments, parse_arguments
from training.augmentation import Augmentation
from training.data import DATASETS
from training.optimization import learning_rate_factor, make_parameter_groups
from training.recipe_files import read_recipe_file

FOLDER = Path(__file__).parents[2] / "training" / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
RECIPES = [file for file in FILES if "_base" not in file.parts]
PUBLISHED = ("coco", "ade20k", "cityscapes", "mapillary_vistas")
OF_A_PUBLICATION = [file for file in RECIPES if file.relative_to(FOLDER).parts[0] in PUBLISHED]
# A test reads all recipes of a data set and task.
FOLDERS = sorted({file.parent for file in RECIPES})
PUBLISHED_FOLDERS = sorted({file.parent for file in OF_A_PUBLICATION})
NUM_LABELS = 3

STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNETS = {"50": [3, 4, 6, 3], "101": [3, 4, 23, 3]}
SWINS = {  # channels, blocks, heads, window
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
}
PRETRAINED = {
    "microsoft/resnet-50": ("resnet", "50"),
    "microsoft/resnet-101": ("resnet", "101"),
    "microsoft/swin-tiny-patch4-window7-224": ("swin", "tiny"),
    "microsoft/swin-small-patch4-window7-224": ("swin", "small"),
    "microsoft/swin-base-patch4-window12-384-in22k": ("swin", "base"),
    "microsoft/swin-large-patch4-window12-384-in22k": ("swin", "large"),
} | {
    f"facebook/mask2former-swin-{size}-{trained}": ("swin", size)
    for size in ("tiny", "small", "large")
    for trained in ("coco-instance", "coco-panoptic", "ade-semantic")
}  # fmt: skip

# Steps and milestones as published (MP-Former code, Mask2Former paper), by folder and what the file's name ends with.
STEPS = {
    ("coco", "12ep"): (88_500, (73_750, 81_125)),
    ("coco", "24ep"): (177_000, (162_250, 169_625)),
    ("coco", "36ep"): (265_500, (245_000, 260_000)),
    ("coco", "50ep"): (368_750, (327_778, 355_092)),
    ("coco", "100ep"): (737_500, (655_556, 710_184)),
    ("ade20k", "poly"): (160_000, ()),
    ("ade20k", "step"): (160_000, (135_000, 150_000)),
    ("cityscapes", "poly"): (90_000, ()),
    ("cityscapes", "step"): (90_000, (80_000, 85_000)),
    ("cityscapes", "150k"): (150_000, (80_000, 85_000)),
    ("mapillary_vistas", "r50"): (300_000, ()),
    ("mapillary_vistas", "large"): (300_000, ()),
}
# Size of the crop, and of test images, by data set.
SIZES = {
    "coco": ((1024, 1024), {"shortest_edge": 800, "longest_edge": 1333}),
    "ade20k 512": ((512, 512), {"shortest_edge": 512, "longest_edge": 2048}),
    "ade20k 640": ((640, 640), {"shortest_edge": 640, "longest_edge": 2560}),
    "cityscapes": ((512, 1024), {"shortest_edge": 1024, "longest_edge": 2048}),
    "mapillary_vistas": ((1024, 1024), {"longest_edge": 2048}),
}
TRACED: dict[tuple[str, str] | None, TracedBackbone | None] = {}
PROCESSES = 4  # of the published recipes, see _base/published.yaml


def name_of(file: Path) -> str:
    return file.relative_to(FOLDER).with_suffix("").as_posix()


def recipes_of(folder: Path) -> list[tuple[str, TrainingArguments]]:
    """List the recipes of a folder: their names, and what they say."""
    return [(file.stem, read(file)) for file in sorted(folder.glob("*.yaml"))]


@functools.cache
def read(file: Path) -> TrainingArguments:
    return parse_arguments([str(file)])


def backbone_config(kind: str, size: str) -> PreTrainedConfig:
    if kind == "resnet":
        return ResNetConfig(depths=RESNETS[size], out_features=STAGES)
    channels, depths, heads, window = SWINS[size]
    return SwinConfig(embed_dim=channels, depths=depths, num_heads=heads, window_size=window, out_features=STAGES)


@functools.cache
def build(architecture: tuple[str, str] | None, fields: str) -> MPFormerForUniversalSegmentation:
    """Make a model without weights; `fields` is JSON, so that equal ones are made once."""
    settings: dict[str, Any] = json.loads(fields)
    if architecture is not None:
        settings["backbone_config"] = backbone_config(*architecture)
    config = MPFormerConfig(num_labels=NUM_LABELS, **settings)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        # A second with a large backbone; its answer depends on nothing else.
        patch.setattr(modeling_mpformer, "trace_backbone", lambda backbone: trace_once(architecture, backbone))
        return MPFormerForUniversalSegmentation(config)


def trace_once(architecture: tuple[str, str] | None, backbone: torch.nn.Module) -> TracedBackbone | None:
    if architecture not in TRACED:
        TRACED[architecture] = trace_backbone(backbone)
    return TRACED[architecture]


def model_of(arguments: TrainingArguments) -> MPFormerForUniversalSegmentation:
    start = arguments.model_name_or_path or arguments.backbone
    return build(PRETRAINED[start] if start else None, json.dumps(arguments.model, sort_keys=True))


def rates_of(groups: list[dict[str, Any]]) -> list[float]:
    """Different learning rates, in order."""
    return sorted({group["lr"] for group in groups})


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_data_set_augmentation_and_processor_of_a_recipe_can_be_made(folder):
    for name, arguments in recipes_of(folder):
        signature = inspect.signature(DATASETS[arguments.dataset])
        for split in ("train", "validation"):
            signature.bind(split, **arguments.options_of(split))  # as the data set is called
        if arguments.dataset != "digit_scenes":  # its path is where people are told to put the data
            assert arguments.dataset_options["path"].startswith("data/"), name
            assert Augmentation.from_recipe(arguments.augmentation).size is not None, name
        MPFormerImageProcessor(**arguments.processor)


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_model_and_optimiser_groups_of_a_recipe_can_be_made(folder):
    for name, arguments in recipes_of(folder):
        model = model_of(arguments)
        groups = make_parameter_groups(model, arguments)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained, name
        highest = arguments.learning_rate
        expected = [highest] if arguments.starts_from_scratch else [highest / 10, highest]
        assert rates_of(groups) == pytest.approx(expected), name
        assert {group["weight_decay"] for group in groups} == {0.0, 0.05}, name
        torch.optim.AdamW(groups, lr=highest)


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_the_learning_rate_of_a_recipe_rises_and_falls_when_it_should(folder):
    for name, arguments in recipes_of(folder):
        last, warmup, milestones = arguments.max_steps - 1, arguments.warmup_steps, arguments.schedule_milestones
        assert all(warmup < milestone < arguments.max_steps for milestone in milestones), name
        if arguments.schedule == "step":
            first, second = milestones
            expected = {warmup: 1, last // 2: 1, first - 1: 1, first: 0.1, second - 1: 0.1, second: 0.01, last: 0.01}
        else:
            assert milestones == (), name
            expected = {step: (1 - step / (last + 1)) ** 0.9 for step in (warmup, last // 2, last)}
        expected |= {0: 1 / warmup if warmup else 1}
        for step, factor in expected.items():
            assert learning_rate_factor(step, arguments) == pytest.approx(factor), (name, step)


@pytest.mark.parametrize("folder", PUBLISHED_FOLDERS, ids=name_of)
def test_a_published_recipe_has_the_published_steps_batch_and_learning_rate(folder):
    for name, arguments in recipes_of(folder):
        steps, milestones = STEPS[folder.parent.name, name.rpartition("_")[2]]
        assert (arguments.max_steps, arguments.schedule_milestones) == (steps, milestones), name
        images = PROCESSES * arguments.batch_size * arguments.gradient_accumulation_steps
        assert images == arguments.reference_batch_size == 16, name
        groups = make_parameter_groups(model_of(arguments), arguments, images)
        assert rates_of(groups) == pytest.approx([1e-5, 1e-4]), name
        others = (arguments.max_gradient_norm, arguments.weight_decay, arguments.warmup_steps)
        assert others == (0.01, 0.05, 0), name


@pytest.mark.parametrize("folder", PUBLISHED_FOLDERS, ids=name_of)
def test_a_published_recipe_has_the_published_sizes_queries_and_thresholds(folder):
    dataset, task = folder.parent.name, folder.name
    for name, arguments in recipes_of(folder):
        is_large = name.startswith("swin_large")
        key = dataset if dataset != "ade20k" else f"ade20k {640 if is_large or task != 'semantic' else 512}"
        crop, test_size = SIZES[key]
        assert arguments.task == task, name
        assert Augmentation.from_recipe(arguments.augmentation).size == crop, name
        assert arguments.processor["size"] == test_size, name
        config = model_of(arguments).config
        assert config.num_queries == (200 if is_large and task != "semantic" else 100), name
        assert config.freeze_backbone_norm == (dataset != "cityscapes"), name
        processor = MPFormerImageProcessor(**arguments.processor)
        assert processor.combine_before_resize == (task == "semantic"), name
        if task == "panoptic":
            assert processor.score_threshold == (0.0 if dataset == "mapillary_vistas" else 0.8), name
            assert processor.overlap_mask_area_threshold == 0.8, name


@pytest.mark.parametrize("folder", PUBLISHED_FOLDERS, ids=name_of)
def test_a_published_recipe_pilots_masks_as_the_released_scripts(folder):
    for name, arguments in recipes_of(folder):
        config = model_of(arguments).config
        settings = (config.mask_piloting, config.pilot_groups, config.pilot_layers, config.pilot_mask_noise)
        assert settings == (True, 1, None, "point"), name
        ratios = (config.pilot_mask_noise_ratio, config.pilot_label_noise_ratio)
        assert (ratios, config.pilot_label_loss) == ((0.0, 0.2), True), name
        assert not config.query_position_embedding, name


def test_models_have_the_published_numbers_of_parameters():
    # Mask2Former paper, tables of COCO, in millions; mask piloting and position embeddings of queries are far below.
    expected = {"r50_50ep": 44, "r101_50ep": 63, "swin_tiny_50ep": 47, "swin_small_50ep": 69, "swin_base_50ep": 107}
    for name, millions in (expected | {"swin_large_100ep": 216}).items():
        model = model_of(read(FOLDER / "coco" / "instance" / f"{name}.yaml"))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_own_data_begins_with_position_embeddings_that_the_models_on_the_hub_have():
    for file in (FOLDER / "own_data").rglob("*.yaml"):
        arguments = read(file)
        assert model_of(arguments).config.query_position_embedding
        assert arguments.batch_size * arguments.gradient_accumulation_steps == 8
        assert arguments.task == file.parent.name
        assert arguments.model_name_or_path.endswith("ade-semantic" if arguments.task == "semantic" else arguments.task)


def test_the_comment_of_every_file_names_its_source():
    for file in FILES:
        if "digit_scenes" in file.parts:  # a data set of ours
            continue
        comment = file.read_text().partition("\n\n")[0]
        assert all(line.startswith("#") for line in comment.splitlines()), file
        assert re.search(r"^# Original: ", comment, re.MULTILINE), file
        assert re.search(r"MP-Former code at a71f504|Mask2Former (paper|code)|Mask2Former's of", comment), file


def test_recipes_write_to_folders_of_their_own():
    folders = [read(file).output_dir for file in OF_A_PUBLICATION]
    assert len(set(folders)) == len(folders)


def test_every_shared_file_is_used_by_a_recipe(monkeypatch):
    opened: set[Path] = set()
    original = Path.read_text

    def note(self, *arguments, **keywords):
        opened.add(self.resolve())
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", note)
    for file in RECIPES:
        read_recipe_file(file)
    assert {file.resolve() for file in FILES} <= opened
