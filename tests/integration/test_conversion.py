"""Checkpoints of the original become folders that answer as recorded, and come back bit for bit; whatever goes wrong leaves nothing."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from benchmarks.conversion import fuzz_in_process
from conversion import convert_detectron2, convert_to_detectron2
from conversion.convert_to_detectron2 import describe_keys
from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from tests.detectron2_checkpoints import (
    Original,
    plain_position_index,
    write_config,
    write_plain_pickle,
    write_pth,
    write_zoo_pickle,
)
from tests.hub_server import HubServer
from tests.parity.golden_cases import (
    CASES,
    GOLDENS,
    LABEL_EMBEDDING,
    POSITION_EMBEDDING,
    load_case,
    preprocess,
    to_our_names,
)

ROOT = Path(__file__).parents[2]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TOLERANCE = 1e-3  # of the largest magnitude
WRITTEN = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "modeling_mpformer.py"}
QUERIES = "sem_seg_head.predictor.query_feat.weight"
# The smallest and quickest one.
TINY = Original(
    swin=(8, (1, 1, 1, 1), (1, 1, 2, 2), 4), num_classes=3, num_queries=4, dim_feedforward=16, decoder_layers=2
)


@dataclass
class Prepared:
    """A checkpoint and its configuration in a folder."""

    checkpoint: Path
    config: Path
    output: Path

    def convert(self, *more: str | Path) -> int:
        arguments = [self.checkpoint, "--config-file", self.config, "--output-dir", self.output, *more]
        return convert_detectron2.main([str(argument) for argument in arguments])


def prepare(folder: Path, original: Original = TINY, write: Callable = write_pth, **config: Any) -> Prepared:
    suffix = "pth" if write is write_pth else "pkl"
    return Prepared(
        write(folder / f"model.{suffix}", original.weights()),
        write_config(folder / "config.yaml", original.config() | config),
        folder / "out" / "converted",
    )


def refused(prepared: Prepared, capsys: pytest.CaptureFixture, *more: str | Path) -> str:
    """The message of a conversion that is refused and leaves nothing behind."""
    before = set(prepared.output.parent.rglob("*"))
    assert prepared.convert(*more) == 1
    assert set(prepared.output.parent.rglob("*")) == before
    message = capsys.readouterr().err.splitlines()[-1]
    return message[message.index("error: ") :]


def load_quietly(folder: Path) -> MPFormerForUniversalSegmentation:
    """Load a model; all of its weights are there, and no others."""
    model, report = MPFormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def back_to_original(folder: Path, *more: str) -> dict[str, Any]:
    file = folder.parent / "back.pth"
    file.unlink(missing_ok=True)
    assert convert_to_detectron2.main([str(folder), "--output", str(file), *more]) == 0
    return torch.load(file, weights_only=True)["model"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


# ---------------------------------------------------------------------------------------------------------- recorded models


def complete_weights(name: str) -> dict[str, Tensor]:
    """A recorded checkpoint as its file had it: with the indices of Swin's windows, which are not stored a second time."""
    weights = dict(load_case(name).weights)
    for key in [key for key in weights if key.endswith("relative_position_bias_table")]:
        window = (round(len(weights[key]) ** 0.5) + 1) // 2
        weights[key.replace("bias_table", "index")] = plain_position_index(window)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_recorded_checkpoints_answer_as_recorded_and_come_back_bit_for_bit(tmp_path, capsys, name):
    case, weights = load_case(name), complete_weights(name)
    prepared = Prepared(
        write_pth(tmp_path / "model_final.pth", weights), GOLDENS / name / "config.yaml", tmp_path / "converted"
    )
    recorded = {f"infer.{key}": tensor for key, tensor in case.infer.items() if tensor.dtype != torch.bool}
    save_file(recorded, tmp_path / "recorded.safetensors")
    assert prepared.convert("--reference", tmp_path / "recorded.safetensors") == 0
    said = capsys.readouterr().out
    assert f"{2 * case.num_levels} recorded outputs differ by at most" in said
    assert (f"fresh:    {LABEL_EMBEDDING}" in said) == (not case.has_label_embedding)
    assert {file.name for file in prepared.output.iterdir()} >= WRITTEN

    model = load_quietly(prepared.output)
    with torch.no_grad():
        output = model(**preprocess(case, [case.infer["image"]]), output_auxiliary_logits=True)
    levels = [*output.auxiliary_logits, dict(output.items())]
    for level, (classes, masks) in enumerate(
        zip(case.infer_levels("pred_logits"), case.infer_levels("pred_masks"), strict=True)
    ):
        assert_close(levels[level]["class_queries_logits"], classes)
        assert_close(levels[level]["masks_queries_logits"], masks)

    assert_same(back_to_original(prepared.output), weights)


def test_pickles_of_the_zoo_give_the_same_model_as_the_checkpoint(tmp_path):
    """With the older name of the queries, and as a plain dictionary."""
    written = {}
    for write in (write_pth, write_zoo_pickle, write_plain_pickle):
        folder = tmp_path / write.__name__
        folder.mkdir()
        prepared = Prepared(
            write(folder / "model.pth", complete_weights("c")), GOLDENS / "c" / "config.yaml", folder / "converted"
        )
        assert prepared.convert() == 0
        names = ("model.safetensors", "config.json", "preprocessor_config.json")
        written[write.__name__] = {name: (prepared.output / name).read_bytes() for name in names}
    assert written["write_zoo_pickle"] == written["write_pth"]
    assert written["write_plain_pickle"] == written["write_pth"]


def test_piloting_follows_the_recorded_configuration(tmp_path):
    prepared = Prepared(
        write_pth(tmp_path / "model.pth", complete_weights("d1")),
        GOLDENS / "d1" / "config.yaml",
        tmp_path / "converted",
    )
    assert prepared.convert() == 0
    config = load_quietly(prepared.output).config
    assert (config.pilot_layers, config.pilot_groups, config.decoder_layers) == (4, 1, 7)
    assert not config.query_position_embedding
    assert torch.equal(
        load_file(prepared.output / "model.safetensors")[LABEL_EMBEDDING],
        load_case("d1").weights["sem_seg_head.predictor.label_enc.weight"],
    )


# ------------------------------------------------------------------------------------------------------------ unseen models

PARTIAL_PILOTING = (("MODEL.MASK_FORMER.ALL_LY_DN", False), ("MODEL.MASK_FORMER.LB_NOISE_RATIO", 0.2))
BGR = (
    ("INPUT.FORMAT", "BGR"),
    ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
    ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
)
UNSEEN = {
    "ResNet-101 of MSRA": Original(depth=101, stem=12, width=24, stride_in_1x1=True, num_classes=2, num_queries=9),
    "synchronised batch norm": Original(norm="SyncBN", position_embedding=True, label_embedding=False, num_classes=19),
    "widths that differ": Original(convs_dim=64, hidden_dim=32, mask_dim=40, num_heads=8),
    "Swin": Original(swin=(12, (2, 1, 3, 1), (1, 2, 3, 6), 5), enforce_input_projection=True, encoder_layers=3),
    "six layers, four piloted": Original(
        swin=TINY.swin, decoder_layers=7, overrides=(*PARTIAL_PILOTING, ("MODEL.DN.NUM_DN", 3))
    ),
    "plain decoder of MP-Former": replace(TINY, label_embedding=False),
    "BGR": Original(depth=18, width=16, overrides=BGR),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_checkpoints_answer_as_transformers_with_the_same_weights(tmp_path, name):
    original = UNSEEN[name]
    prepared = prepare(tmp_path, original, write_zoo_pickle if "norm" in name else write_pth)
    assert prepared.convert() == 0
    ours = load_quietly(prepared.output)
    theirs = transformers_model(original)
    processor = MPFormerImageProcessor.from_pretrained(prepared.output)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    inputs = processor(image, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        found, expected = ours(**inputs), theirs(as_the_original_sees_it(image, original))
    assert_close(found.class_queries_logits, expected.class_queries_logits)
    assert_close(found.masks_queries_logits, expected.masks_queries_logits)

    options = ["--input-format", "BGR"] if name == "BGR" else []
    options += ["--label-embedding", "drop"] if not original.label_embedding else []
    assert_same(back_to_original(prepared.output, *options), original.weights())


def as_the_original_sees_it(image: Tensor, original: Original) -> Tensor:
    """Normalise an image, (3, H, W), RGB, as detectron2 does; (1, 3, H, W) in the order of channels of the configuration."""
    config = original.config()
    mean, std = (torch.tensor(config["MODEL"][key])[:, None, None] for key in ("PIXEL_MEAN", "PIXEL_STD"))
    channels = image.flip(0) if config["INPUT"]["FORMAT"] == "BGR" else image
    return ((channels - mean) / std)[None]


def transformers_model(original: Original) -> Mask2FormerForUniversalSegmentation:
    """Another implementation, with the weights renamed by another table than the converter's."""
    if original.swin:
        embed_dim, depths, heads, window = original.swin
        backbone = SwinConfig(
            embed_dim=embed_dim, depths=list(depths), num_heads=list(heads), window_size=window, out_features=STAGES
        )
    else:
        backbone = ResNetConfig(
            embedding_size=original.stem,
            hidden_sizes=original.widths,
            depths={18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[original.depth],
            layer_type="basic" if original.depth == 18 else "bottleneck",
            downsample_in_bottleneck=original.stride_in_1x1,
            out_features=STAGES,
        )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=original.num_classes,
        feature_size=original.convs_dim,
        mask_feature_size=original.mask_dim,
        hidden_dim=original.hidden_dim,
        num_queries=original.num_queries,
        num_attention_heads=original.num_heads,
        dim_feedforward=original.dim_feedforward,
        encoder_feedforward_dim=1024,
        encoder_layers=original.encoder_layers,
        decoder_layers=original.decoder_layers,
        enforce_input_projection=original.enforce_input_projection,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    no_weights = ("relative_position_index", "num_batches_tracked")
    weights = {name: tensor for name, tensor in original.weights().items() if not name.endswith(no_weights)}
    projections = {name: weights.pop(name) for name in list(weights) if "predictor.input_proj" in name}
    renamed = to_our_names(weights)
    renamed |= {
        name.replace("sem_seg_head.predictor.input_proj", "model.transformer_module.input_projections"): tensor
        for name, tensor in projections.items()
    }
    renamed.pop(LABEL_EMBEDDING, None)
    renamed.setdefault(POSITION_EMBEDDING, torch.zeros(original.num_queries, original.hidden_dim))
    report = model.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert all("swin.layernorm" in name or "num_batches_tracked" in name for name in report.missing_keys)
    return model


def test_the_same_checkpoint_gives_the_same_folder(tmp_path):
    """The fresh label embedding too."""
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        prepared = prepare(tmp_path / name, replace(TINY, label_embedding=False))
        assert prepared.convert() == 0
        contents.append({file.name: file.read_bytes() for file in prepared.output.iterdir()})
    assert contents[0] == contents[1]


def test_half_precision_is_converted_to_float32_and_reported(tmp_path, capsys):
    prepared = prepare(tmp_path)
    half = {name: t.half() if t.is_floating_point() else t for name, t in TINY.weights().items()}
    write_pth(prepared.checkpoint, half)
    assert prepared.convert() == 0
    assert "torch.float16 are converted to float32" in capsys.readouterr().out
    back = back_to_original(prepared.output)
    assert torch.equal(back[QUERIES], half[QUERIES].float())


def test_without_piloting_the_label_embedding_is_left_out(tmp_path, capsys):
    prepared = prepare(tmp_path)
    assert prepared.convert("MODEL.DN.NUM_DN", "0") == 0
    assert "not used: sem_seg_head.predictor.label_enc.weight" in capsys.readouterr().out
    assert not load_quietly(prepared.output).config.mask_piloting


def test_overrides_of_the_command_line_win_over_the_file(tmp_path):
    prepared = prepare(tmp_path)
    assert prepared.convert("MODEL.DN.NUM_DN", "4", "MODEL.DN.NOISE_SCALE", "0.5") == 0
    config = load_quietly(prepared.output).config
    assert (config.pilot_groups, config.pilot_mask_noise_ratio) == (4, 0.5)


def test_the_keys_for_the_way_back_describe_the_same_model(tmp_path, capsys):
    original = Original(stride_in_1x1=True, norm="SyncBN", convs_dim=64, num_heads=8)
    prepared = prepare(tmp_path, original)
    assert prepared.convert() == 0
    config = load_quietly(prepared.output).config
    write_config(prepared.config, {"MODEL": {"META_ARCHITECTURE": "MaskFormer"}, "INPUT": {"FORMAT": "RGB"}})
    keys = [text for key, value in describe_keys(config).items() for text in (key, str(value))]
    constant = ["MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead", "MODEL.MASK_FORMER.DROPOUT", "0.0", "MODEL.DN.NUM_DN", "1"]
    constant += [
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MSDeformAttnPixelDecoder",
        "MODEL.MASK_FORMER.DN_MODE",
        "points",
    ]
    constant += ["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder"]
    second = replace_output(prepared, "second")
    assert second.convert(*keys, *constant) == 0
    shapes = (
        "backbone_config",
        "feature_size",
        "num_attention_heads",
        "freeze_backbone_norm",
        "query_position_embedding",
    )
    again = load_quietly(second.output).config
    for field_name in shapes:
        assert getattr(again, field_name) == getattr(config, field_name) or field_name == "backbone_config"
    assert again.backbone_config.to_dict() == config.backbone_config.to_dict()


def replace_output(prepared: Prepared, name: str) -> Prepared:
    return replace(prepared, output=prepared.output.with_name(name))


# ------------------------------------------------------------------------------------------------- what cannot be converted


def without(*names: str) -> Callable[[dict], dict]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def with_weights(**changes: Tensor) -> Callable[[dict], dict]:
    return lambda weights: weights | {name.replace("__", "."): tensor for name, tensor in changes.items()}


@dataclass(frozen=True)
class Defect:
    """A change of the tiny checkpoint, and what the message must name."""

    change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    says: tuple[str, ...] = field(default=())


DEFECTS = {
    "a weight is missing": Defect(
        without("sem_seg_head.predictor.decoder_norm.bias"),
        ("lacks 1 weight", "sem_seg_head.predictor.decoder_norm.bias"),
    ),
    "a part of a joined projection is missing": Defect(
        without("sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_bias"),
        ("lacks 3 weights", "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_bias"),
    ),
    "a weight is superfluous": Defect(with_weights(backbone__norm4__bias=torch.zeros(8)), ("backbone.norm4.bias",)),
    "a name is unknown": Defect(with_weights(backbone__fpn__weight=torch.zeros(8)), ("backbone.fpn.weight",)),
    "a shape differs": Defect(
        lambda weights: weights | {"backbone.norm0.bias": torch.zeros(9)}, ("backbone.norm0.bias", "(8,)", "(9,)")
    ),
    "a weight is not finite": Defect(
        lambda weights: weights | {"backbone.norm0.bias": torch.full((8,), math.nan)},
        ("not finite", "backbone.norm0.bias"),
    ),
    "a weight holds integers": Defect(
        lambda weights: weights | {"backbone.norm0.bias": torch.zeros(8, dtype=torch.int64)},
        ("wrong kind of numbers", "backbone.norm0.bias"),
    ),
    "a weight stands there under two names": Defect(
        lambda weights: weights | {QUERIES.replace("query_feat", "static_query"): weights[QUERIES]}, ("twice",)
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_named_before_anything_is_written(tmp_path, capsys, name):
    prepared = prepare(tmp_path)
    write_pth(prepared.checkpoint, DEFECTS[name].change(TINY.weights()))
    message = refused(prepared, capsys)
    for text in DEFECTS[name].says:
        assert text in message


def test_a_recording_of_another_model_is_refused(tmp_path, capsys):
    prepared = prepare(tmp_path)
    reference = tmp_path / "reference.safetensors"
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    save_file({"infer.image": image, "infer.pred_logits.1": torch.ones(1, 4, 4)}, reference)
    assert "infer.pred_logits.1` differs by" in refused(prepared, capsys, "--reference", reference)
    save_file({"infer.image": image, "infer.pred_logits.2": torch.ones(1, 4, 4)}, reference)
    assert "no such level" in refused(prepared, capsys, "--reference", reference)
    save_file({"infer.image": image, "infer.pred_masks.1": torch.ones(1, 4, 3, 3)}, reference)
    assert "(1, 4, 16, 16)" in refused(prepared, capsys, "--reference", reference)
    save_file({"image": image}, reference)
    assert "Expected `infer.image`" in refused(prepared, capsys, "--reference", reference)
    save_file({"infer.image": image, "infer.pred_logits.1": torch.full((1, 4, 4), math.nan)}, reference)
    assert "differs by nan" in refused(prepared, capsys, "--reference", reference)


def test_missing_files_are_named(tmp_path, capsys):
    prepared = prepare(tmp_path)
    assert "nowhere.pth" in refused(replace(prepared, checkpoint=tmp_path / "nowhere.pth"), capsys)
    assert "nowhere.yaml" in refused(replace(prepared, config=tmp_path / "nowhere.yaml"), capsys)
    assert "nowhere.safetensors" in refused(prepared, capsys, "--reference", tmp_path / "nowhere.safetensors")


def test_models_that_the_original_cannot_express_are_refused_on_the_way_back(tmp_path, capsys):
    prepared = prepare(tmp_path)
    assert prepared.convert() == 0
    config = json.loads((prepared.output / "config.json").read_text())
    (prepared.output / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    back = tmp_path / "back.pth"
    assert convert_to_detectron2.main([str(prepared.output), "--output", str(back)]) == 1
    assert "activation_function" in capsys.readouterr().err
    assert not back.exists()
    assert convert_to_detectron2.main([str(tmp_path / "nothing"), "--output", str(back)]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- where the result stands


def test_a_folder_with_something_in_it_is_not_touched(tmp_path, capsys):
    prepared = prepare(tmp_path)
    prepared.output.mkdir(parents=True)
    (prepared.output / "notes.txt").write_text("mine")
    assert "--overwrite" in refused(prepared, capsys)
    assert "no config.json" in refused(prepared, capsys, "--overwrite")
    (prepared.output / "config.json").write_text("{}")
    (prepared.output / "runs").mkdir()
    assert "`runs`" in refused(prepared, capsys, "--overwrite")
    inputs = replace(prepared, output=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for entry in (prepared.output / "runs", prepared.output):
        for file in [child for child in entry.iterdir() if child.is_file()]:
            file.unlink()
        entry.rmdir()
    prepared.output.parent.rmdir()
    assert inputs.convert("--overwrite") == 1
    assert "would replace" in capsys.readouterr().err
    assert prepared.checkpoint.exists()


def test_overwriting_replaces_all_of_an_earlier_conversion(tmp_path):
    prepared = prepare(tmp_path)
    assert prepared.convert() == 0
    (prepared.output / "stale.txt").write_text("of the earlier one")
    write_pth(prepared.checkpoint, TINY.weights(seed=1))
    assert prepared.convert("--overwrite") == 0
    assert not (prepared.output / "stale.txt").exists()
    assert [entry.name for entry in prepared.output.parent.iterdir()] == ["converted"]
    assert_same(back_to_original(prepared.output), TINY.weights(seed=1))


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    """Here a limit on the size of files: the weights do not fit."""
    prepared = prepare(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = refused(prepared, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in message

    assert prepared.convert() == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert convert_to_detectron2.main([str(prepared.output), "--output", str(tmp_path / "back.pth")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*back*"))


KILLED_WHILE_WRITING = """
import os, signal, sys
from conversion.convert_detectron2 import main

def die_at(event, arguments):
    if event == "open" and str(arguments[0]).endswith("preprocessor_config.json") and "w" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint, config, *outputs = sys.argv[1:]
for output in outputs:
    child = os.fork()  # importing once is enough
    if not child:
        sys.addaudithook(die_at)
        main([checkpoint, "--config-file", config, "--overwrite", "--output-dir", output])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_conversion_that_is_killed_while_it_writes_changes_nothing(tmp_path):
    fresh = prepare(tmp_path)
    there = replace_output(fresh, "there")
    assert there.convert() == 0
    before = {file.name: file.read_bytes() for file in there.output.iterdir()}
    write_pth(fresh.checkpoint, TINY.weights(seed=1))
    arguments = map(str, (fresh.checkpoint, fresh.config, fresh.output, there.output))
    child = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert child.stdout.split() == 2 * [str(-signal.SIGKILL)], child.stderr
    assert not fresh.output.exists()
    assert {file.name: file.read_bytes() for file in there.output.iterdir()} == before
    halves = [entry for entry in fresh.output.parent.iterdir() if entry != there.output]
    assert len(halves) == 2
    assert all(entry.name.startswith(".") and (entry / "model.safetensors").is_file() for entry in halves)
    assert fresh.convert() == 0  # what is left behind is in nobody's way


# ------------------------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.slow
def test_a_converted_model_goes_to_the_hub_with_its_card(tmp_path):
    prepared = prepare(tmp_path)
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with HubServer(tmp_path / "hub", {"token": "author"}) as hub:
        hub_environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "token",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }
        arguments = [prepared.checkpoint, "--config-file", prepared.config, "--output-dir", prepared.output]
        command = [
            sys.executable,
            "-m",
            "conversion.convert_detectron2",
            *map(str, arguments),
            "--push-to-hub",
            "author/tiny",
        ]
        child = subprocess.run(
            command, cwd=ROOT, env=others | hub_environment, check=False, capture_output=True, text=True, timeout=200
        )
        assert child.returncode == 0, child.stderr
        pushed = hub.files("author/tiny")
    local = {file.name: file.read_bytes() for file in prepared.output.iterdir()}
    assert {name: pushed[name] for name in local} == local
    assert b"python -m conversion.convert_detectron2 model.pth" in pushed["README.md"]


# ------------------------------------------------------------------------------------------------------------------ fuzzing


def test_damaged_files_lead_to_messages_and_nothing_else(tmp_path):
    """The small form of `python -m benchmarks.conversion fuzz`, without its limit on memory, which would stay."""
    outcomes = list(fuzz_in_process(tmp_path, range(100), seed=1, limit_memory=False))
    assert len(outcomes) == 100
    assert [outcome for outcome in outcomes if not outcome.is_good] == []
    assert {outcome.result for outcome in outcomes} == {"converted", "refused"}


def test_help_tells_what_the_arguments_do(capsys):
    with pytest.raises(SystemExit) as end:
        convert_detectron2.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for argument in ("--config-file", "--output-dir", "--reference", "--trust-pickle", "--push-to-hub", "KEY VALUE"):
        assert argument in said


def test_the_card_names_the_file_and_its_licence(tmp_path):
    prepared = prepare(tmp_path)
    assert prepared.convert("MODEL.DN.NUM_DN", "2") == 0
    card = (prepared.output / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["license"] == "cc-by-nc-4.0"
    assert "python -m conversion.convert_detectron2 model.pth --config-file config.yaml" in card
    assert "MODEL.DN.NUM_DN 2" in card
    assert str(tmp_path) not in card
