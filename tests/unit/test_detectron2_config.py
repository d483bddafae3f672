"""Detectron2 configurations: reading them, and what they and a checkpoint's shapes become.

Shapes are those of the original's modules for given widths, written down here; no tensor is made.
"""

import random
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import ResNetConfig, SwinConfig

from conversion import ConversionError
from conversion.detectron2_backbones import declared, mlp_ratio
from conversion.detectron2_config import (
    SAME_FIELDS,
    Configuration,
    Detectron2Config,
    build_configuration,
    read_config,
)
from conversion.detectron2_evidence import Evidence
from conversion.detectron2_keys import DEFAULTS, IGNORED, KNOWN, SECTIONS, nearest_key
from conversion.label_sets import LabelSet
from mpformer_hf import MPFormerConfig
from tests.parity.golden_cases import CASES, GOLDENS, backbone_config, config_fields, load_case, pilot_fields

CONFIGS = Path(__file__).parent / "detectron2_configs"
PREDICTOR = "sem_seg_head.predictor"
PIXEL_DECODER = "sem_seg_head.pixel_decoder"

# --- shapes of the original -------------------------------------------------------------------------------------------------


def head_shapes(
    widths=(16, 32, 64, 128), *, classes=7, queries=20, hidden=32, feedforward=64, layers=4, conv=32, mask=32, encoder=2, heads=8,
    label_enc=True, query_embed=False,
):  # fmt: skip
    """Shapes of pixel decoder and predictor."""
    shapes = {
        f"{PREDICTOR}.query_feat.weight": (queries, hidden),
        f"{PREDICTOR}.level_embed.weight": (3, hidden),
        f"{PREDICTOR}.class_embed.weight": (classes + 1, hidden),
        f"{PREDICTOR}.mask_embed.layers.0.weight": (hidden, hidden),
        f"{PREDICTOR}.mask_embed.layers.2.weight": (mask, hidden),
        f"{PIXEL_DECODER}.transformer.level_embed": (3, conv),
        f"{PIXEL_DECODER}.mask_features.weight": (mask, conv, 1, 1),
        f"{PIXEL_DECODER}.adapter_1.weight": (conv, widths[0], 1, 1),
    }
    for level, width in enumerate(reversed(widths[1:])):
        shapes[f"{PIXEL_DECODER}.input_proj.{level}.0.weight"] = (conv, width, 1, 1)
        if conv != hidden:
            shapes[f"{PREDICTOR}.input_proj.{level}.weight"] = (hidden, conv, 1, 1)
    for layer in range(layers):
        shapes[f"{PREDICTOR}.transformer_cross_attention_layers.{layer}.norm.weight"] = (hidden,)
        shapes[f"{PREDICTOR}.transformer_self_attention_layers.{layer}.norm.weight"] = (hidden,)
        shapes[f"{PREDICTOR}.transformer_ffn_layers.{layer}.linear1.weight"] = (feedforward, hidden)
    for layer in range(encoder):
        prefix = f"{PIXEL_DECODER}.transformer.encoder.layers.{layer}"
        shapes[f"{prefix}.self_attn.sampling_offsets.weight"] = (heads * 3 * 4 * 2, conv)
        shapes[f"{prefix}.linear1.weight"] = (1024, conv)
    if label_enc:
        shapes[f"{PREDICTOR}.label_enc.weight"] = (classes, hidden)
    if query_embed:
        shapes[f"{PREDICTOR}.query_embed.weight"] = (queries, hidden)
    return shapes


def resnet_shapes(widths=(16, 32, 64, 128), *, stem=8, depths=(3, 4, 6, 3), bottleneck=True, ratio=4, groups=1):
    """Shapes of a ResNet's convolutions, and one norm."""
    shapes = {
        "backbone.stem.conv1.weight": (stem, 3, 7, 7),
        "backbone.stem.conv1.norm.running_mean": (stem,),
    }
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=2):
        for block in range(depth):
            prefix, inner = f"backbone.res{stage}.{block}", width // ratio if bottleneck else width
            shapes[f"{prefix}.conv2.weight"] = (inner, inner // groups, 3, 3)
            if bottleneck:
                shapes[f"{prefix}.conv3.weight"] = (width, inner, 1, 1)
    return shapes


def swin_shapes(dim=12, *, depths=(1, 1, 2, 1), heads=(1, 2, 3, 4), window=4, ratio=4.0, bias=True):
    """Shapes of a Swin's embedding, norms and first blocks."""
    shapes = {"backbone.patch_embed.proj.weight": (dim, 3, 4, 4), "backbone.patch_embed.norm.weight": (dim,)}
    for stage, (depth, number) in enumerate(zip(depths, heads, strict=True)):
        width = dim * 2**stage
        shapes[f"backbone.norm{stage}.weight"] = (width,)
        for block in range(depth):
            prefix = f"backbone.layers.{stage}.blocks.{block}"
            shapes[f"{prefix}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, number)
            shapes[f"{prefix}.mlp.fc1.weight"] = (int(ratio * width), width)
            if bias:
                shapes[f"{prefix}.attn.qkv.bias"] = (3 * width,)
    return shapes


SMALL_RESNET = resnet_shapes() | head_shapes()
SMALL_SWIN = swin_shapes() | head_shapes((12, 24, 48, 96))
GOLDEN_A, GOLDEN_B = GOLDENS / "a" / "config.yaml", GOLDENS / "b" / "config.yaml"


def converted(file=GOLDEN_A, *overrides: str, shapes=None, labels=None) -> Configuration:
    shapes = shapes or (SMALL_SWIN if file == GOLDEN_B else SMALL_RESNET)
    return build_configuration(
        read_config(file, overrides), {name: torch.Size(shape) for name, shape in shapes.items()}, labels
    )


def refusal(file=GOLDEN_A, *overrides: str, shapes=None) -> str:
    with pytest.raises(ConversionError) as caught:
        converted(file, *overrides, shapes=shapes)
    return str(caught.value)


def write(folder: Path, text: str | bytes, name: str = "config.yaml") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


# --- keys --------------------------------------------------------------------------------------------------------------------


def test_no_key_is_both_read_and_ignored():
    assert not DEFAULTS.keys() & IGNORED.keys()
    assert not SECTIONS & KNOWN


def test_every_key_that_is_read_has_a_use():
    """Each of them is asked for in the conversion of one of these models."""

    class Noting(Detectron2Config):
        def get(self, key):
            asked.add(key)
            return super().get(key)

    asked = set()
    for file, shapes in ((GOLDEN_A, SMALL_RESNET), (GOLDEN_B, SMALL_SWIN)):
        config = read_config(file, ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"])
        noting = Noting(config.values | {"MODEL.RESNETS.RES5_MULTI_GRID": [1, 1, 1]}, config.ignored)
        build_configuration(noting, shapes)
    assert asked == DEFAULTS.keys() - {"VERSION"}  # checked while reading


def test_keys_that_nothing_sets_have_the_defaults_of_the_original():
    config = Detectron2Config({})
    for key, value in {
        "MODEL.DN.NUM_DN": 5,
        "MODEL.DN.NOISE_SCALE": 0.2,
        "MODEL.MASK_FORMER.DN_MODE": "base",
        "MODEL.MASK_FORMER.ALL_LY_DN": False,
        "MODEL.MASK_FORMER.LB_NOISE_RATIO": -1.0,
        "MODEL.MASK_FORMER.DN_NO_LB": False,
        "MODEL.MASK_FORMER.HEAD_DN": False,
        "MODEL.MASK_FORMER.LAST_Q_RATIO": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 100,
        "INPUT.FORMAT": "BGR",
    }.items():
        assert config.get(key) == value
        assert not config.is_set(key)


def test_asking_for_a_key_that_is_not_read_names_the_nearest():
    with pytest.raises(KeyError, match=r"nearest known key is MODEL\.DN\.NUM_DN"):
        Detectron2Config({}).get("MODEL.DN.NUM_DM")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.MASK_FORMER.DEC_LAYER", "MODEL.MASK_FORMER.DEC_LAYERS"),
        ("MODEL.MASK_FORMER.NUM_DN", "MODEL.DN.NUM_DN"),
        ("SOLVER.MAX_ITERS", "SOLVER.MAX_ITER"),
    ],
)
def test_the_nearest_key_has_the_same_last_part_or_a_similar_name(key, nearest):
    assert nearest_key(key) == nearest


# --- files -------------------------------------------------------------------------------------------------------------------


def test_bases_are_read_over_folders_and_the_outermost_file_wins():
    config = read_config(CONFIGS / "swin" / "large.yaml")
    assert config.get("MODEL.BACKBONE.NAME") == "D2SwinTransformer"  # base.yaml says ResNet
    assert config.get("MODEL.SEM_SEG_HEAD.NUM_CLASSES") == 133  # panoptic.yaml
    assert config.get("DATASETS.TEST") == ("coco_2017_val_panoptic_with_sem_seg",)  # base.yaml, as text of a tuple
    assert config.get("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES") == 200
    assert config.is_set("SOLVER.STEPS")
    assert not config.is_set("MODEL.DN.NUM_DN")


@pytest.mark.parametrize("base", ["base.yaml", "./other/../base.yaml", "{folder}/base.yaml", "[first.yaml, base.yaml]"])
def test_a_base_is_relative_to_its_file_or_absolute_or_several_of_which_the_last_wins(tmp_path, base):
    (tmp_path / "other").mkdir()
    write(tmp_path, "SEED: 1\nMODEL: {DN: {NUM_DN: 2}, PIXEL_MEAN: [1, 2, 3]}", "base.yaml")
    write(tmp_path, "MODEL: {DN: {NUM_DN: 7}}", "first.yaml")
    file = write(tmp_path, f"_BASE_: {base.format(folder=tmp_path)}\nMODEL: {{DN: {{NOISE_SCALE: 0.5}}}}")
    config = read_config(file)
    assert config.values == {"MODEL.DN.NUM_DN": 2, "MODEL.DN.NOISE_SCALE": 0.5, "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0]}


def test_a_cycle_and_a_missing_base_name_the_chain(tmp_path):
    file = write(tmp_path, "_BASE_: b.yaml", "a.yaml")
    write(tmp_path, "_BASE_: c.yaml", "b.yaml")
    with pytest.raises(
        ConversionError, match=r"a\.yaml -> _BASE_ .*b\.yaml -> _BASE_ .*c\.yaml: there is no such file"
    ):
        read_config(file)
    write(tmp_path, "_BASE_: a.yaml", "c.yaml")
    with pytest.raises(ConversionError, match=r"c\.yaml -> _BASE_ .*a\.yaml: the configuration is based on itself"):
        read_config(file)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("https://example.org/base.yaml", "Nothing is downloaded"),
        ("3", "must be the path of a file, got 3"),
        ("{a: b}", "must be the path of a file"),
        ("''", "must be the path of a file"),
        ('"a\\0b"', "not a path of a file"),
        ("~", "must be the path of a file, got None"),
        ("'.'", "there is no such file"),
    ],
)
def test_a_base_that_is_not_a_file_is_refused(tmp_path, base, message):
    with pytest.raises(ConversionError, match=message):
        read_config(write(tmp_path, f"_BASE_: {base}"))


def test_very_many_bases_are_refused_quickly(tmp_path):
    """Four files of ten bases each would be ten thousand readings."""
    for level in range(4):
        write(tmp_path, f"_BASE_: [{', '.join([f'{level + 1}.yaml'] * 10)}]", f"{level}.yaml")
    write(tmp_path, "SEED: 1", "4.yaml")
    with pytest.raises(ConversionError, match="more than 16 files"):
        read_config(tmp_path / "0.yaml")


def test_overrides_are_python_literals_or_text_and_win_over_the_file():
    overrides = (
        "MODEL.DN.NUM_DN 100 MODEL.DN.NOISE_SCALE 2e-1 MODEL.MASK_FORMER.ALL_LY_DN False MODEL.RESNETS.NORM SyncBN "
        "DATASETS.TEST ('coco_2017_val',) SOLVER.STEPS anything MODEL.PIXEL_STD (1,2,3) MODEL.SWIN.QK_SCALE None "
        "MODEL.DN.NUM_DN 3"
    )
    config = read_config(GOLDEN_A, overrides.split())
    assert config.get("MODEL.DN.NUM_DN") == 3
    assert config.get("MODEL.DN.NOISE_SCALE") == 0.2
    assert config.get("MODEL.MASK_FORMER.ALL_LY_DN") is False
    assert config.get("MODEL.RESNETS.NORM") == "SyncBN"
    assert config.get("DATASETS.TEST") == ("coco_2017_val",)
    assert config.get("MODEL.PIXEL_STD") == [1.0, 2.0, 3.0]
    assert config.get("MODEL.SWIN.QK_SCALE") is None
    assert config.is_set("SOLVER.STEPS")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.DN.NUM_DN"], "come in pairs of a key and a value, got 1"),
        (["MODEL.DN.NUM_DN=3"], "Write `KEY VALUE`, not `KEY=VALUE`"),
        (["MODEL.DN.NUM", "3"], r"unknown key 'MODEL\.DN\.NUM' \(the nearest known key is MODEL\.DN\.NUM_DN\)"),
        (["MODEL.DN", "3"], r"MODEL\.DN is a section"),
        (["_BASE_", "x.yaml"], "unknown key '_BASE_'"),
        (["MODEL.DN.NUM_DN", "2.5"], r"MODEL\.DN\.NUM_DN must be an integer, got '2\.5'"),
        (["MODEL.DN.NUM_DN", "True"], "must be an integer"),
        (["MODEL.DN.NUM_DN", "None"], "must be an integer"),
        (["MODEL.DN.NUM_DN", "9" * 5000], "must be an integer"),
        (["MODEL.DN.NUM_DN", "1e400"], "must be an integer"),
        (["MODEL.DN.NOISE_SCALE", "1e400"], r"MODEL\.DN\.NOISE_SCALE must be a finite number"),
        (["MODEL.DN.NOISE_SCALE", "much"], "must be a finite number, got 'much'"),
        (["MODEL.MASK_FORMER.ALL_LY_DN", "1"], "must be True or False"),
        (["INPUT.FORMAT", "3"], "must be text"),
        (["DATASETS.TEST", "coco_2017_val"], r"must be a list such as \('coco_2017_val',\)"),
        (["DATASETS.TEST", "(1,)"], "must be a list"),
        (["MODEL.PIXEL_MEAN", "[1, 2, 'x']"], "must be a list"),
        (["MODEL.SWIN.DEPTHS", "[" + "1," * 101 + "]"], "must be a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}_{len(str(value))}",
)
def test_broken_overrides_are_refused_with_the_key(overrides, message):
    with pytest.raises(ConversionError, match=message):
        read_config(GOLDEN_A, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of sections such as MODEL, got None"),
        ("[1, 2]", "expected a mapping"),
        ("MODEL: [", r"broken YAML \(line 1, column 9\)"),
        ("MODEL: {DN: 3}", r"MODEL\.DN is a section"),
        ("MODEL:", "MODEL is a section"),
        ("MODEL: {DN: {NUM_DN: {a: 3}}}", r"NUM_DN must be an integer, got \{'a': 3\}"),
        ("MODEL: {DN: {NUM_DM: 3}}", r"'MODEL\.DN\.NUM_DM' \(the nearest known key is MODEL\.DN\.NUM_DN\)"),
        ("MODEL: {DM: {}}", r"unknown key 'MODEL\.DM'"),
        ("MODEL.DN.NUM_DN: 3", "keys are names without a dot, got 'MODEL.DN.NUM_DN'"),
        ("MODEL: {1: 3}", "keys are names without a dot, got 1 in MODEL"),
        ("VERSION: 1", "VERSION is 1; expected 2"),
        ("a: 1\n---\nb: 2", "broken YAML"),
        ("SEED: *nothing", "undefined alias"),
        ("? [a]\n: 1", "unhashable"),
        ("SEED: !!bool maybe", "broken YAML: KeyError"),
        ("SEED: !!timestamp maybe", "broken YAML: AttributeError"),
        ("SEED: 2001-99-99", "broken YAML: ValueError"),
        pytest.param("SEED: " + "1" * 5000, "broken YAML: ValueError", id="digits"),
        pytest.param("VERSION: " + ":1" * 4000, "must be an integer, got", id="sexagesimal"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        ("SEED: \x00", "broken YAML"),
    ],
)
def test_broken_files_are_refused_with_the_file(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ConversionError, match=message) as caught:
        read_config(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_several_unknown_keys_are_reported_together_and_in_bounds(tmp_path):
    file = write(tmp_path, "MODEL: {" + ", ".join(f"FOO_{index}: 1" for index in range(50)) + "}")
    with pytest.raises(ConversionError, match=r"FOO_0' .* 'MODEL\.FOO_4' .*; and 45 more"):
        read_config(file)


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(ALIASES, "more than 20000 values with its aliases", id="aliases"),
        pytest.param("a: &a [*a]", "more than 20000 values with its aliases", id="recursion"),
        pytest.param("a: &a {<<: *a}", "more than 20000 values with its aliases", id="recursive_merge"),
        pytest.param(
            "k: &k {a: 1}\nm: {<<: [" + "*k, " * 9000 + "]}", "more than 20000 values with its aliases", id="merges"
        ),
        pytest.param("[" * 60_000, "more than 32 levels", id="brackets"),
        pytest.param("- " * 30_000, "more than 32 levels", id="dashes"),
        pytest.param("MODEL: " + "{a: " * 100 + "1" + "}" * 100, "more than 32 levels", id="braces"),
        pytest.param("x: '" + "a" * 2**16 + "'", "larger than 65536 bytes", id="size"),
    ],
)
def test_what_a_file_costs_is_bounded(tmp_path, text, message):
    file = write(tmp_path, text)
    begin = time.process_time()
    with pytest.raises(ConversionError, match=message):
        read_config(file)
    assert time.process_time() - begin < 20  # about 4 s on a slow machine


def test_a_file_of_100_mb_is_not_read_to_its_end(tmp_path):
    file = write(tmp_path, "SEED: 1\n")
    with file.open("r+b") as stream:
        stream.truncate(100 * 2**20)
    with pytest.raises(ConversionError, match="larger than 65536 bytes"):
        read_config(file)


def test_aliases_as_dumps_hold_them_are_read(tmp_path):
    file = write(tmp_path, "MODEL:\n  PIXEL_MEAN: &id001 [1.0, 2.0, 3.0]\n  PIXEL_STD: *id001\n")
    assert read_config(file).get("MODEL.PIXEL_STD") == [1.0, 2.0, 3.0]


def test_tuples_of_python_are_read(tmp_path):
    file = write(tmp_path, "DATASETS:\n  TEST: !!python/tuple [coco_2017_val]\n")
    assert read_config(file).get("DATASETS.TEST") == ("coco_2017_val",)


def test_a_complete_dump_of_the_originals_settings_is_read(tmp_path):
    """`cfg.dump()` writes every key, sorted, tuples as lists."""
    nested = {}
    for key, value in (DEFAULTS | dict.fromkeys(IGNORED, "whatever")).items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = list(value) if isinstance(value, tuple) else value
    config = read_config(write(tmp_path, yaml.safe_dump(nested)))
    assert config.values == DEFAULTS
    assert config.ignored == IGNORED.keys()


# --- no code -----------------------------------------------------------------------------------------------------------------

EVIL_TAGS = ("apply:os.system", "apply:eval", "apply:builtins.exec", "new:os.system")


@pytest.mark.parametrize("tag", EVIL_TAGS)
@pytest.mark.parametrize(
    "place", ["INPUT: {MIN_SIZE_TRAIN: %s}", "INPUT: {FORMAT: %s}", "%s", "_BASE_: %s", "? %s\n: 1"]
)
def test_no_code_of_a_file_is_run(tmp_path, tag, place):
    trace = tmp_path / "trace"
    code = f"!!python/object/{tag} [\"__import__('pathlib').Path('{trace}').touch()\"]"
    file = write(tmp_path, place % code)
    if tag == "apply:eval" and "MIN_SIZE_TRAIN" in place:  # the released files hold such a thing
        assert read_config(file).ignored == {"INPUT.MIN_SIZE_TRAIN"}
    else:
        with pytest.raises(ConversionError):
            read_config(file)
    assert not trace.exists()


def test_an_unknown_tag_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"python/object/apply:os\.system"):
        read_config(write(tmp_path, "SEED: !!python/object/apply:os.system ['true']"))
    with pytest.raises(ConversionError, match=r"python/name:os\.system"):
        read_config(write(tmp_path, "SEED: !!python/name:os.system"))


def test_mutated_files_give_a_configuration_or_a_message(tmp_path):
    """Bytes changed, cut, doubled and mixed of four real files: never another exception, never code."""
    generator = random.Random(0)
    sources = [file.read_bytes() for file in (GOLDEN_A, GOLDEN_B, CONFIGS / "base.yaml", CONFIGS / "panoptic.yaml")]
    outcomes = [outcome(write(tmp_path, mutate(generator, sources))) for _ in range(200)]
    assert outcomes.count("read") > 5
    assert len(set(outcomes)) > 50  # different messages


def outcome(file):
    """ "read", or the message of the refusal."""
    try:
        build_configuration(read_config(file), SMALL_RESNET)
    except ConversionError as error:
        return str(error)
    return "read"


def mutate(generator, sources):
    """One file, with one or two changes at random places."""
    data = bytearray(generator.choice(sources))
    for _ in range(generator.randint(1, 2)):
        begin, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        end = min(end, begin + generator.choice([1, 4, 40]))
        match generator.randrange(5):
            case 0:
                data[begin:end] = generator.randbytes(end - begin)
            case 1:
                del data[begin:end]
            case 2:
                data[begin:begin] = data[begin:end] * 3
            case 3:
                other = generator.choice(sources)
                data[begin:end] = other[begin:end]
            case 4:
                data[begin:begin] = generator.choice(
                    [b"!!python/object/apply:eval ", b"&a ", b"*a", b"{", b"]", b": ", b"\n- "]
                )
    return bytes(data)


# --- recorded models ---------------------------------------------------------------------------------------------------------


def weights_of(case):
    """Shapes of a recorded checkpoint."""
    return {name: tensor.shape for name, tensor in case.weights.items()}


@pytest.mark.parametrize("name", CASES)
def test_recorded_configurations_give_the_fields_that_the_parity_tests_derive(name):
    case = load_case(name)
    model = build_configuration(read_config(GOLDENS / name / "config.yaml"), weights_of(case)).model
    expected = config_fields(case)
    assert model.backbone_config.to_dict() == expected.pop("backbone_config").to_dict()
    assert len(model.id2label) == expected.pop("num_labels")
    assert {field: getattr(model, field) for field in expected} == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "c"])
def test_recorded_configurations_give_the_pilot_fields_that_the_parity_tests_derive(name):
    case = load_case(name)
    num_dn = case.config["MODEL"]["DN"]["NUM_DN"]
    model = build_configuration(read_config(GOLDENS / name / "config.yaml"), weights_of(case)).model
    # With four layers the recordings call the partial mode 4, which is all of them.
    expected = pilot_fields(case, num_dn)
    assert {field: getattr(model, field) for field in expected} == expected


def test_the_recorded_mask2former_is_piloted_with_the_originals_defaults_and_says_so():
    case = load_case("c")
    configuration = build_configuration(read_config(GOLDENS / "c" / "config.yaml"), weights_of(case))
    model, notes = configuration.model, "\n".join(configuration.notes)
    assert model.query_position_embedding
    assert model.mask_piloting
    assert (model.pilot_groups, model.pilot_mask_noise, model.pilot_label_noise_ratio) == (5, "none", 0.0)
    assert model.pilot_layers is None  # case c has four layers
    assert (
        "no sem_seg_head.predictor.label_enc.weight: `mask_piloting=True` with a fresh, random label embedding" in notes
    )
    assert "MODEL.DN.NUM_DN is not set: the original's default of 5 MP groups" in notes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "a",
            {"score_threshold": 0.4, "overlap_mask_area_threshold": 0.2, "top_k": 30, "combine_before_resize": False},
        ),
        (
            "b",
            {"score_threshold": 0.35, "overlap_mask_area_threshold": 0.25, "top_k": 30, "combine_before_resize": False},
        ),
        ("c", {"score_threshold": 0.3, "overlap_mask_area_threshold": 0.3, "top_k": 30, "combine_before_resize": True}),
        (
            "d1",
            {"score_threshold": 0.8, "overlap_mask_area_threshold": 0.8, "top_k": 30, "combine_before_resize": False},
        ),
    ],
)
def test_recorded_configurations_give_the_image_processor(name, expected):
    processor = build_configuration(read_config(GOLDENS / name / "config.yaml"), weights_of(load_case(name))).processor
    assert {field: getattr(processor, field) for field in expected} == expected
    assert (processor.size_divisor, processor.mask_threshold) == (32, 0.5)
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(processor.image_std) == (0.229, 0.224, 0.225)


# --- full-size models --------------------------------------------------------------------------------------------------------


def test_a_panoptic_swin_large_of_coco_is_what_the_paper_describes():
    widths = (192, 384, 768, 1536)
    shapes = swin_shapes(192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12)
    shapes |= head_shapes(
        widths, classes=133, queries=200, hidden=256, feedforward=2048, layers=9, conv=256, mask=256, encoder=6,
        label_enc=False, query_embed=True,
    )  # fmt: skip
    configuration = converted(CONFIGS / "swin" / "large.yaml", shapes=shapes)
    model, processor = configuration.model, configuration.processor
    expected = SwinConfig(
        embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, drop_path_rate=0.3, image_size=384,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    assert model.backbone_config.to_dict() == expected.to_dict()
    same = MPFormerConfig(num_queries=200)
    for field in ("num_queries", "hidden_dim", "feature_size", "mask_feature_size", "encoder_layers", "decoder_layers"):
        assert getattr(model, field) == getattr(same, field)
    for field in ("encoder_feedforward_dim", "dim_feedforward", "num_attention_heads", "dropout", *SAME_FIELDS):
        assert getattr(model, field) == getattr(same, field)
    assert (model.id2label[0], model.id2label[132], model.label2id["rug-merged"]) == ("person", "rug-merged", 132)
    assert model.pilot_layers == 4  # the original's default with more than four layers
    assert processor.label_ids_to_fuse == tuple(range(80, 133))
    assert (processor.score_threshold, processor.overlap_mask_area_threshold, processor.top_k) == (0.8, 0.8, 100)
    assert not processor.combine_before_resize
    assert len(configuration.notes) == 3  # fresh label embedding, default number of groups, default noise


def test_the_released_mp_former_with_its_training_overrides_gives_the_released_settings():
    """run_50ep_no_noise_all_ly.sh: one group, no mask noise, all layers, label noise 0.2."""
    widths = (256, 512, 1024, 2048)
    shapes = resnet_shapes(widths, stem=64)
    shapes |= head_shapes(
        widths, classes=133, queries=100, hidden=256, feedforward=2048, layers=9, conv=256, mask=256, encoder=6
    )
    configuration = converted(
        CONFIGS / "panoptic.yaml",
        *("MODEL.DN.NUM_DN", "1", "MODEL.DN.NOISE_SCALE", "0.0"),
        *("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "MultiScaleMaskedTransformerDecoderMaskDN"),
        *("MODEL.MASK_FORMER.DN_MODE", "points", "MODEL.MASK_FORMER.ALL_LY_DN", "True"),
        *("MODEL.MASK_FORMER.DN_NO_LB", "False", "MODEL.MASK_FORMER.LB_NOISE_RATIO", "0.2"),
        shapes=shapes,
    )
    model = configuration.model
    assert configuration.notes == []
    assert not model.query_position_embedding
    assert model.mask_piloting
    assert model.pilot_groups == 1
    assert model.pilot_layers is None
    assert (model.pilot_mask_noise, model.pilot_mask_noise_ratio) == ("point", 0.0)
    assert model.pilot_label_noise_ratio == 0.2
    expected = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])  # a ResNet-50
    assert model.backbone_config.to_dict() == expected.to_dict()


# --- mask piloting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_dn", "piloting", "groups", "budget"),
    [
        (0, False, 1, None),
        (1, True, 1, None),
        (5, True, 5, None),
        (99, True, 99, None),
        (100, True, 1, 100),
        (300, True, 1, 300),
    ],
)
def test_num_dn_is_a_number_of_groups_or_from_100_on_a_budget(num_dn, piloting, groups, budget):
    model = converted(GOLDEN_A, "MODEL.DN.NUM_DN", str(num_dn)).model
    assert (model.mask_piloting, model.pilot_groups, model.pilot_query_budget) == (piloting, groups, budget)


def test_no_groups_leave_the_label_embedding_out_and_say_so():
    assert any("label_enc.weight is left out" in note for note in converted(GOLDEN_A, "MODEL.DN.NUM_DN", "0").notes)


def test_a_negative_number_of_groups_is_refused():
    assert "MODEL.DN.NUM_DN must be from 0" in refusal(GOLDEN_A, "MODEL.DN.NUM_DN", "-1")


@pytest.mark.parametrize(
    ("mode", "noise", "note"),
    [
        ("points", "point", None),
        ("shift", "shift", "what the paper means"),
        ("scale", "scale", "what the paper means"),
        ("shift_scale", "shift_scale", "what the paper means"),
        ("base", "none", "cannot train"),
        ("lb", "none", "cannot train"),
        ("mask", "none", "cannot train"),
    ],
)
def test_modes_of_noise(mode, noise, note):
    configuration = converted(GOLDEN_A, "MODEL.MASK_FORMER.DN_MODE", mode)
    assert configuration.model.pilot_mask_noise == noise
    about_mode = [text for text in configuration.notes if "DN_MODE" in text]
    assert len(about_mode) == (note is not None)
    assert all(note in text for text in about_mode)


@pytest.mark.parametrize("mode", ["patch", "points_MAE", "point"])
def test_modes_without_counterpart_are_refused(mode):
    message = refusal(GOLDEN_A, "MODEL.MASK_FORMER.DN_MODE", mode)
    assert f"MODEL.MASK_FORMER.DN_MODE is '{mode}'; expected one of points, shift, scale" in message


@pytest.mark.parametrize(("all_layers", "layers", "expected"), [(True, 9, None), (False, 9, 4), (False, 5, 4), (False, 4, None), (False, 1, None)])  # fmt: skip
def test_partial_piloting_is_four_layers_or_all_where_there_are_no_more(all_layers, layers, expected):
    shapes = resnet_shapes() | head_shapes(layers=layers)
    assert (
        converted(GOLDEN_A, "MODEL.MASK_FORMER.ALL_LY_DN", str(all_layers), shapes=shapes).model.pilot_layers
        == expected
    )


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("MODEL.DN.NOISE_SCALE", "pilot_mask_noise_ratio"),
        ("MODEL.MASK_FORMER.LB_NOISE_RATIO", "pilot_label_noise_ratio"),
    ],
)
def test_ratios_of_noise_are_zero_at_most_one_or_refused(key, field):
    for value, expected in {"-1": 0.0, "0": 0.0, "0.3": 0.3, "1.0": 1.0}.items():
        assert getattr(converted(GOLDEN_A, key, value).model, field) == expected
    assert f"{key} must be at most 1, got 1.5" in refusal(GOLDEN_A, key, "1.5")


def test_noise_per_head_needs_point_noise():
    per_head = ("MODEL.MASK_FORMER.HEAD_DN", "True")
    assert converted(GOLDEN_A, *per_head).model.pilot_noise_per_head
    configuration = converted(GOLDEN_A, *per_head, "MODEL.MASK_FORMER.DN_MODE", "shift")
    assert not configuration.model.pilot_noise_per_head
    assert any("HEAD_DN has no effect without point noise" in note for note in configuration.notes)


@pytest.mark.parametrize("without", [True, False])
def test_the_label_loss_is_the_negation_of_dn_no_lb(without):
    assert converted(GOLDEN_A, "MODEL.MASK_FORMER.DN_NO_LB", str(without)).model.pilot_label_loss is not without


@pytest.mark.parametrize("label_enc", [True, False])
@pytest.mark.parametrize("query_embed", [True, False])
@pytest.mark.parametrize("name", ["MultiScaleMaskedTransformerDecoder", "MultiScaleMaskedTransformerDecoderMaskDN"])
def test_embeddings_of_the_checkpoint_decide_and_a_name_that_contradicts_is_reported(label_enc, query_embed, name):
    shapes = resnet_shapes() | head_shapes(label_enc=label_enc, query_embed=query_embed)
    configuration = converted(GOLDEN_A, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", name, shapes=shapes)
    assert configuration.model.query_position_embedding is query_embed
    assert configuration.model.mask_piloting
    notes = "\n".join(configuration.notes)
    assert ("fresh, random label embedding" in notes) is not label_enc
    assert ("TRANSFORMER_DECODER_NAME" in notes) is (name.endswith("MaskDN") is not label_enc)


# --- the checkpoint decides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "key", "field", "expected"),
    [
        ({"classes": 9}, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "num_labels", 9),
        ({"queries": 30}, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "num_queries", 30),
        ({"layers": 2}, "MODEL.MASK_FORMER.DEC_LAYERS", "decoder_layers", 3),
        ({"feedforward": 96}, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "dim_feedforward", 96),
        ({"hidden": 64}, "MODEL.MASK_FORMER.HIDDEN_DIM", "hidden_dim", 64),
        ({"conv": 64}, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "feature_size", 64),
        ({"mask": 48}, "MODEL.SEM_SEG_HEAD.MASK_DIM", "mask_feature_size", 48),
        ({"encoder": 1}, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "encoder_layers", 1),
        ({"encoder": 0}, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "encoder_layers", 0),
        ({"heads": 4}, "MODEL.MASK_FORMER.NHEADS", "num_attention_heads", 4),
    ],
)
def test_sizes_of_the_checkpoint_win_and_a_contradiction_is_reported(shapes, key, field, expected):
    configuration = converted(GOLDEN_A, shapes=resnet_shapes() | head_shapes(**shapes))
    assert getattr(configuration.model, field) == expected
    assert [note for note in configuration.notes if note.startswith(f"{key} is ")], configuration.notes


def test_sizes_that_nothing_sets_are_taken_without_a_word():
    configuration = converted(CONFIGS / "msra.yaml")
    contradictions = [note for note in configuration.notes if "but the checkpoint has" in note]
    assert contradictions == []
    assert configuration.model.num_queries == 20


def test_projections_between_equal_widths_are_enforced_when_the_checkpoint_has_them():
    projections = {f"{PREDICTOR}.input_proj.{level}.weight": (32, 32, 1, 1) for level in range(3)}
    configuration = converted(GOLDEN_A, shapes=SMALL_RESNET | projections)
    assert configuration.model.enforce_input_projection
    assert any("ENFORCE_INPUT_PROJ is False" in note for note in configuration.notes)
    assert not converted(GOLDEN_A, "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", "True").model.enforce_input_projection


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PREDICTOR}.class_embed.weight": None}, "The checkpoint has no sem_seg_head.predictor.class_embed.weight"),
        ({f"{PREDICTOR}.class_embed.weight": (8,)}, "must have 2 axes, none of size 0, got the shape (8,)"),
        (
            {f"{PREDICTOR}.class_embed.weight": (1, 32)},
            "NUM_CLASSES: sem_seg_head.predictor.class_embed.weight has 1 row",
        ),
        ({f"{PREDICTOR}.class_embed.weight": (8, 64)}, "HIDDEN_DIM: 32 in query_feat.weight, 64 in class_embed.weight"),
        (
            {f"{PREDICTOR}.label_enc.weight": (8, 32)},
            "NUM_CLASSES: 7 in class_embed.weight less one, 8 in label_enc.weight",
        ),
        ({f"{PREDICTOR}.label_enc.weight": (7, 16)}, "HIDDEN_DIM: 32 in query_feat.weight, 16 in label_enc.weight"),
        (
            {f"{PREDICTOR}.query_embed.weight": (21, 32)},
            "NUM_OBJECT_QUERIES: 20 in query_feat.weight, 21 in query_embed",
        ),
        (
            {f"{PREDICTOR}.query_embed.weight": (20, 31)},
            "HIDDEN_DIM: 32 in query_feat.weight, 31 in query_embed.weight",
        ),
        ({f"{PREDICTOR}.level_embed.weight": (4, 32)}, "level_embed.weight has 4 levels; expected 3"),
        ({f"{PIXEL_DECODER}.transformer.level_embed": (4, 32)}, "transformer.level_embed has 4 levels; expected 3"),
        ({f"{PIXEL_DECODER}.mask_features.weight": (64, 32, 1, 1)}, "MASK_DIM: 64 in mask_features.weight, 32 in"),
        ({f"{PIXEL_DECODER}.adapter_1.weight": None}, "COMMON_STRIDE: expected exactly one lateral convolution"),
        (
            {f"{PIXEL_DECODER}.adapter_2.weight": (32, 32, 1, 1)},
            "COMMON_STRIDE: expected exactly one lateral convolution",
        ),
        ({f"{PIXEL_DECODER}.adapter_1.weight": (32, 24, 1, 1)}, "channels of res2: 24 in"),
        ({f"{PIXEL_DECODER}.input_proj.0.0.weight": (32, 64, 1, 1)}, "channels of res5: 64 in"),
        ({f"{PREDICTOR}.transformer_ffn_layers.4.norm.weight": (32,)}, "DEC_LAYERS: 4 in"),
        ({f"{PREDICTOR}.transformer_ffn_layers.9.norm.weight": (32,)}, "but not number 4"),
        (
            {f"{PIXEL_DECODER}.transformer.encoder.layers.0.self_attn.sampling_offsets.weight": (190, 32)},
            "NHEADS: sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight has 190 rows",
        ),
        ({"backbone.stem.conv1.weight": None}, "neither a ResNet (backbone.stem.conv1.weight) nor a Swin"),
    ],
)
def test_impossible_checkpoints_are_refused_with_the_key_or_the_tensor(change, message):
    shapes = {name: shape for name, shape in (SMALL_RESNET | change).items() if shape is not None}
    assert message in refusal(GOLDEN_A, shapes=shapes)


def test_different_widths_without_projection_are_refused():
    shapes = resnet_shapes() | head_shapes(conv=64)
    del shapes[f"{PREDICTOR}.input_proj.0.weight"]
    assert "MODEL.MASK_FORMER.HIDDEN_DIM: the pixel decoder has 64 channels and the transformer decoder 32" in refusal(
        shapes=shapes
    )


def test_an_empty_checkpoint_is_refused():
    with pytest.raises(ConversionError, match="The checkpoint has no"):
        build_configuration(read_config(GOLDEN_A), {})


@pytest.mark.parametrize(
    ("shapes", "overrides", "message"),
    [
        (head_shapes(conv=48), (), "`feature_size` is MODEL.SEM_SEG_HEAD.CONVS_DIM"),
        (head_shapes(), ("MODEL.MASK_FORMER.DROPOUT", "1.5"), "`dropout` is MODEL.MASK_FORMER.DROPOUT"),
        (
            head_shapes(),
            ("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "0"),
            "`train_num_points` is MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
        ),
        (head_shapes(), ("MODEL.MASK_FORMER.MASK_WEIGHT", "-1"), "`mask_weight` is MODEL.MASK_FORMER.MASK_WEIGHT"),
        (
            head_shapes(),
            ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", "2"),
            "`importance_sample_ratio` is MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
        ),
    ],
)
def test_values_that_the_model_refuses_are_named_by_their_key(shapes, overrides, message):
    assert message in refusal(GOLDEN_A, *overrides, shapes=resnet_shapes() | shapes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "VideoMaskFormer"),
        ("MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
        ("MODEL.SEM_SEG_HEAD.NORM", ""),
        ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8"),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3', 'res4', 'res5']"),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res5']"),
        ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
        ("MODEL.MASK_FORMER.LAST_Q_RATIO", "0.5"),
        ("MODEL.BACKBONE.NAME", "D2ConvNeXt"),
        ("INPUT.FORMAT", "L"),
    ],
)
def test_another_architecture_is_refused_with_the_key(key, value):
    assert f"{key} is " in refusal(GOLDEN_A, key, value)


@pytest.mark.parametrize(("field", "key"), SAME_FIELDS.items())
def test_fields_that_are_keys_are_taken_over(field, key):
    changed = {
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": "4",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "65",
        "MODEL.MASK_FORMER.PRE_NORM": "True",
        "MODEL.MASK_FORMER.DEEP_SUPERVISION": "False",
        "MODEL.MASK_FORMER.DROPOUT": "0.25",
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": "0.3",
        "MODEL.MASK_FORMER.CLASS_WEIGHT": "3",
        "MODEL.MASK_FORMER.MASK_WEIGHT": "6.5",
        "MODEL.MASK_FORMER.DICE_WEIGHT": "7.5",
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": "99",
        "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": "2.5",
        "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": "0.5",
    }[key]
    assert getattr(converted(GOLDEN_A, key, changed).model, field) == yaml.safe_load(changed.lower())


def test_dropout_is_reported_because_the_original_has_it_in_the_pixel_decoder_only():
    assert any("MODEL.MASK_FORMER.DROPOUT is 0.1" in note for note in converted(CONFIGS / "msra.yaml").notes)
    assert not any("DROPOUT" in note for note in converted(GOLDEN_A).notes)


def test_a_misspelt_field_of_ours_is_an_assertion():
    assert declared(MPFormerConfig, {"num_queries": 3}) == {"num_queries": 3}
    with pytest.raises(AssertionError, match="num_query"):
        declared(MPFormerConfig, {"num_query": 3})
    with pytest.raises(AssertionError, match="embed_dims"):
        declared(SwinConfig, {"embed_dims": 3, "out_features": []})


# --- ResNet ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "depths", "layer_type"),
    [
        (18, [2, 2, 2, 2], "basic"),
        (34, [3, 4, 6, 3], "basic"),
        (50, [3, 4, 6, 3], "bottleneck"),
        (101, [3, 4, 23, 3], "bottleneck"),
        (152, [3, 8, 36, 3], "bottleneck"),
    ],
)
def test_depths_of_resnets(depth, depths, layer_type):
    shapes = resnet_shapes(depths=depths, bottleneck=layer_type == "bottleneck") | head_shapes()
    configuration = converted(GOLDEN_A, "MODEL.RESNETS.DEPTH", str(depth), shapes=shapes)
    backbone = configuration.model.backbone_config
    assert (list(backbone.depths), backbone.layer_type) == (depths, layer_type)
    assert not any("DEPTH" in note for note in configuration.notes)


@pytest.mark.parametrize(
    ("depths", "bottleneck", "found"),
    [
        ([3, 4, 23, 3], True, "101"),
        ([3, 4, 6, 3], False, "34"),
        ([1, 2, 1, 1], True, "'stages of [1, 2, 1, 1] blocks'"),
    ],
)
def test_another_depth_of_the_checkpoint_wins_and_is_reported(depths, bottleneck, found):
    configuration = converted(GOLDEN_A, shapes=resnet_shapes(depths=depths, bottleneck=bottleneck) | head_shapes())
    assert list(configuration.model.backbone_config.depths) == depths
    assert any(note.startswith(f"MODEL.RESNETS.DEPTH is 50 in the configuration, but the checkpoint has {found},") for note in configuration.notes)  # fmt: skip


def test_widths_of_a_resnet_are_the_checkpoints():
    widths = (32, 64, 128, 256)
    configuration = converted(
        GOLDEN_A, "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
        shapes=resnet_shapes(widths, stem=24) | head_shapes(widths),
    )  # fmt: skip
    backbone = configuration.model.backbone_config
    assert (list(backbone.hidden_sizes), backbone.embedding_size) == ([32, 64, 128, 256], 24)
    assert [note for note in configuration.notes if "RESNETS" in note] == [
        "MODEL.RESNETS.STEM_OUT_CHANNELS is 8 in the configuration, but the checkpoint has 24, which is used."
    ]


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_stride_in_1x1_is_downsampling_in_the_bottleneck(stride_in_1x1):
    model = converted(GOLDEN_A, "MODEL.RESNETS.STRIDE_IN_1X1", str(stride_in_1x1)).model
    assert model.backbone_config.downsample_in_bottleneck is stride_in_1x1


@pytest.mark.parametrize(
    ("norm", "frozen"), [("FrozenBN", True), ("BN", False), ("SyncBN", False), ("nnSyncBN", False)]
)
def test_norms_are_frozen_or_trained(norm, frozen):
    assert converted(GOLDEN_A, "MODEL.RESNETS.NORM", norm).model.freeze_backbone_norm is frozen


def test_frozen_norms_that_count_batches_are_reported():
    shapes = SMALL_RESNET | {"backbone.stem.conv1.norm.num_batches_tracked": ()}
    assert any("counts batches" in note for note in converted(GOLDEN_A, shapes=shapes).notes)
    assert not any(
        "counts batches" in note for note in converted(GOLDEN_A, "MODEL.RESNETS.NORM", "SyncBN", shapes=shapes).notes
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", "51"),
        ("MODEL.RESNETS.STEM_TYPE", "deeplab"),
        ("MODEL.RESNETS.NUM_GROUPS", "32"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
        ("MODEL.RESNETS.RES4_DILATION", "2"),
        ("MODEL.RESNETS.RES5_DILATION", "2"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"),
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.OUT_FEATURES", "['res4']"),
    ],
)
def test_resnets_that_transformers_does_not_have_are_refused_with_the_key(key, value):
    assert f"{key} is " in refusal(GOLDEN_A, key, value)


def test_the_deeplab_resnet_is_read_where_it_equals_the_plain_one():
    plain = ("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.RES5_MULTI_GRID")
    assert converted(GOLDEN_A, *plain, "[1, 1, 1]").model.backbone_config.model_type == "resnet"
    assert "MODEL.RESNETS.RES5_MULTI_GRID is [1, 2, 4]" in refusal(GOLDEN_A, *plain, "[1, 2, 4]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.stem.conv1.weight": (8, 3, 3, 3)}, "MODEL.RESNETS.STEM_TYPE"),
        ({"backbone.stem.conv2.weight": (8, 8, 3, 3)}, "MODEL.RESNETS.STEM_TYPE"),
        ({"backbone.stem.conv1.weight": (8, 1, 7, 7)}, "INPUT.FORMAT: backbone.stem.conv1.weight has 1 input channels; expected 3"),
        ({"backbone.res2.0.conv2_offset.weight": (18, 4, 3, 3)}, "MODEL.RESNETS.DEFORM_ON_PER_STAGE"),
        ({"backbone.res3.0.conv2.weight": (8, 2, 3, 3)}, "MODEL.RESNETS.NUM_GROUPS: backbone.res3.0.conv2.weight has 8 output and 2"),
        (resnet_shapes(ratio=2), "MODEL.RESNETS.WIDTH_PER_GROUP: backbone.res2.0 narrows 16 channels to 8; expected 4"),
        ({"backbone.stem.conv1.norm.running_mean": None}, "MODEL.RESNETS.NORM is FrozenBN, but the checkpoint has no"),
        (
            {f"backbone.res5.{block}.{part}.weight": None for block in range(3) for part in ("conv2", "conv3")},
            "MODEL.RESNETS.OUT_FEATURES: the checkpoint has no res5",
        ),
    ],
)  # fmt: skip
def test_resnets_of_the_checkpoint_that_transformers_does_not_have_are_refused(change, message):
    shapes = {name: shape for name, shape in (SMALL_RESNET | change).items() if shape is not None}
    assert message in refusal(GOLDEN_A, shapes=shapes)


def test_stages_that_the_original_keeps_fixed_are_reported():
    assert any("FREEZE_AT is 2" in note and "1 stage(s)" in note for note in converted(CONFIGS / "msra.yaml").notes)
    assert not any("FREEZE_AT" in note for note in converted(GOLDEN_A).notes)


# --- Swin --------------------------------------------------------------------------------------------------------------------


def test_a_swin_is_the_checkpoints_and_contradictions_are_reported():
    widths = (16, 32, 64, 128)
    shapes = swin_shapes(16, depths=(2, 1, 1, 2), heads=(2, 2, 4, 8), window=6, ratio=2.5, bias=False) | head_shapes(
        widths
    )
    configuration = converted(GOLDEN_B, shapes=shapes)
    backbone = configuration.model.backbone_config
    found = {
        "embed_dim": 16,
        "depths": [2, 1, 1, 2],
        "num_heads": [2, 2, 4, 8],
        "window_size": 6,
        "mlp_ratio": 2.5,
        "qkv_bias": False,
    }
    assert {field: getattr(backbone, field) for field in found} == found
    reported = [note.split(" is ")[0] for note in configuration.notes if note.startswith("MODEL.SWIN")]
    assert reported == [f"MODEL.SWIN.{key}" for key in ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE")]


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("DROP_PATH_RATE", "0.35", "drop_path_rate", 0.35),
        ("DROP_RATE", "0.1", "hidden_dropout_prob", 0.1),
        ("ATTN_DROP_RATE", "0.2", "attention_probs_dropout_prob", 0.2),
        ("PRETRAIN_IMG_SIZE", "384", "image_size", 384),
    ],
)
def test_what_shapes_do_not_show_of_a_swin_is_the_configurations(key, value, field, expected):
    assert getattr(converted(GOLDEN_B, f"MODEL.SWIN.{key}", value).model.backbone_config, field) == expected


def test_absent_keys_of_a_swin_have_the_originals_defaults():
    backbone = converted(CONFIGS / "msra.yaml", shapes=SMALL_SWIN).model.backbone_config
    assert (backbone.drop_path_rate, backbone.mlp_ratio, backbone.image_size) == (0.3, 4.0, 224)


def test_every_ratio_of_feed_forward_layers_gives_transformers_the_width_of_the_checkpoint():
    for width in range(13, 240):
        names = [f"backbone.layers.{stage}.blocks.0.mlp.fc1.weight" for stage in range(4)]
        shapes = {name: (width * 2**stage, 12 * 2**stage) for stage, name in enumerate(names)}
        found = mlp_ratio(Evidence(Detectron2Config({}), shapes), [12, 24, 48, 96])
        assert [int(12 * 2**stage * found) for stage in range(4)] == [width * 2**stage for stage in range(4)]
        assert found == pytest.approx(width / 12)


def test_the_usual_scale_of_attention_is_accepted_and_another_refused():
    shapes = swin_shapes(16, heads=(1, 2, 4, 8)) | head_shapes((16, 32, 64, 128))  # 16 channels a head
    assert converted(GOLDEN_B, "MODEL.SWIN.QK_SCALE", "0.25", shapes=shapes).model.backbone_config.model_type == "swin"
    assert "MODEL.SWIN.QK_SCALE is 0.5; expected None" in refusal(GOLDEN_B, "MODEL.SWIN.QK_SCALE", "0.5", shapes=shapes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SWIN.APE", "True"),
        ("MODEL.SWIN.PATCH_NORM", "False"),
        ("MODEL.SWIN.PATCH_SIZE", "2"),
        ("MODEL.SWIN.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    ],
)
def test_swins_that_transformers_does_not_have_are_refused_with_the_key(key, value):
    assert f"{key} is " in refusal(GOLDEN_B, key, value)


@pytest.mark.parametrize("key", ["DROP_PATH_RATE", "DROP_RATE", "ATTN_DROP_RATE"])
def test_rates_of_a_swin_must_be_probabilities(key):
    assert f"MODEL.SWIN.{key} must be from 0 to 1, got 2.0" in refusal(GOLDEN_B, f"MODEL.SWIN.{key}", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.absolute_pos_embed": (1, 12, 56, 56)}, "MODEL.SWIN.APE"),
        ({"backbone.patch_embed.norm.weight": None}, "MODEL.SWIN.PATCH_NORM"),
        (
            {"backbone.patch_embed.proj.weight": (12, 3, 2, 2)},
            "MODEL.SWIN.PATCH_SIZE: the checkpoint has patches of [2, 2]",
        ),
        ({"backbone.patch_embed.proj.weight": (12, 4, 4, 4)}, "INPUT.FORMAT"),
        ({"backbone.norm1.weight": (36,)}, "MODEL.SWIN.EMBED_DIM: stage 1 has 36 channels; expected 24"),
        ({"backbone.norm0.weight": None}, "The checkpoint has no backbone.norm0.weight"),
        (
            {"backbone.layers.4.blocks.0.norm1.weight": (192,)},
            "MODEL.SWIN.DEPTHS: the checkpoint has 5 stages; expected 4",
        ),
        ({"backbone.layers.2.blocks.0.attn.relative_position_bias_table": (25, 3)}, "MODEL.SWIN.WINDOW_SIZE: 49 in"),
        (
            {"backbone.layers.2.blocks.0.attn.relative_position_bias_table": (49, 5)},
            "NUM_HEADS: 48 channels cannot be shared by 5",
        ),
        ({"backbone.layers.2.blocks.0.mlp.fc1.weight": (50, 48)}, "MODEL.SWIN.MLP_RATIO"),
        (
            {f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table": (50, 1) for stage in range(4)},
            "MODEL.SWIN.WINDOW_SIZE: backbone.layers.0.blocks.0.attn.relative_position_bias_table has 50 rows",
        ),
    ],
)
def test_swins_of_the_checkpoint_that_transformers_does_not_have_are_refused(change, message):
    shapes = {name: shape for name, shape in (SMALL_SWIN | change).items() if shape is not None}
    assert message in refusal(GOLDEN_B, shapes=shapes)


def test_a_configuration_of_the_other_backbone_is_reported():
    notes = converted(GOLDEN_A, shapes=SMALL_SWIN).notes
    assert any(note.startswith("MODEL.BACKBONE.NAME is 'build_resnet_backbone' in the configuration") for note in notes)


# --- image processor ---------------------------------------------------------------------------------------------------------


def test_bgr_models_take_rgb_images_after_their_input_channels_are_reversed():
    configuration = converted(CONFIGS / "msra.yaml")
    assert configuration.flip_input_channels
    assert any(note.startswith("INPUT.FORMAT is BGR") for note in configuration.notes)
    # The defaults are those of the MSRA models: means in BGR order, no scaling of [0, 255].
    assert configuration.processor.image_mean == pytest.approx([123.675 / 255, 116.28 / 255, 103.53 / 255])
    assert configuration.processor.image_std == pytest.approx([1 / 255] * 3)
    assert configuration.model.backbone_config.downsample_in_bottleneck
    assert not converted(GOLDEN_A).flip_input_channels


@pytest.mark.parametrize(("divisor", "expected"), [("-1", 32), ("0", 1), ("1", 1), ("32", 32), ("64", 64)])
def test_divisor_of_the_padding(divisor, expected):
    assert converted(GOLDEN_A, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", divisor).processor.size_divisor == expected


def test_test_sizes_are_shortest_and_longest_edge_and_zero_leaves_images_as_they_are():
    processor = converted(GOLDEN_A, "INPUT.MIN_SIZE_TEST", "512", "INPUT.MAX_SIZE_TEST", "2048").processor
    assert dict(processor.size) == {"shortest_edge": 512, "longest_edge": 2048}
    assert processor.do_resize
    assert not converted(GOLDEN_A, "INPUT.MIN_SIZE_TEST", "0", "INPUT.MAX_SIZE_TEST", "0").processor.do_resize


@pytest.mark.parametrize(
    ("semantic", "instance", "panoptic", "before", "expected"),
    [
        (True, False, False, False, True),
        (True, False, False, True, False),
        (True, True, False, False, False),
        (True, False, True, False, False),
        (False, True, False, False, False),
        (False, True, True, False, False),
    ],
)
def test_only_semantic_models_combine_before_the_resize(semantic, instance, panoptic, before, expected):
    test = "MODEL.MASK_FORMER.TEST"
    processor = converted(
        GOLDEN_A,
        *(
            f"{test}.SEMANTIC_ON",
            str(semantic),
            f"{test}.INSTANCE_ON",
            str(instance),
            f"{test}.PANOPTIC_ON",
            str(panoptic),
        ),
        *(f"{test}.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", str(before)),
    ).processor
    assert processor.combine_before_resize is expected
    only_semantic = semantic and not instance and not panoptic
    assert processor.ignore_index == (255 if only_semantic else None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "1.5", "must be from 0 to 1, got 1.5"),
        ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "-0.1", "must be from 0 to 1, got -0.1"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "must be from 1"),
        ("INPUT.MIN_SIZE_TEST", "-1", "must be from 0"),
        ("INPUT.MAX_SIZE_TEST", "0", "must be from 1"),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "1000000", "must be from"),
        ("MODEL.PIXEL_MEAN", "[1, 2]", "must be three numbers"),
        ("MODEL.PIXEL_MEAN", "[1, 2, 300]", "must be in [0, 255]"),
        ("MODEL.PIXEL_STD", "[1, 2, 0]", "must be above 0"),
    ],
)
def test_settings_of_the_image_processor_out_of_range_are_refused_with_the_key(key, value, message):
    text = refusal(GOLDEN_A, key, value)
    assert key in text
    assert message in text


# --- classes -----------------------------------------------------------------------------------------------------------------


def test_stuff_of_the_data_set_is_fused_only_by_panoptic_models():
    shapes = resnet_shapes() | head_shapes(classes=19)
    cityscapes = ("DATASETS.TEST", "('cityscapes_fine_panoptic_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19")
    semantic = converted(GOLDEN_A, *cityscapes, shapes=shapes)
    assert semantic.processor.label_ids_to_fuse == ()
    assert semantic.model.id2label[11] == "person"
    panoptic = converted(GOLDEN_A, *cityscapes, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "True", shapes=shapes)
    assert panoptic.processor.label_ids_to_fuse == tuple(range(11))


def test_the_training_data_names_the_classes_where_the_test_data_does_not():
    shapes = resnet_shapes() | head_shapes(classes=80)
    data = ("DATASETS.TEST", "('mine',)", "DATASETS.TRAIN", "('coco_2017_train',)")
    assert converted(GOLDEN_A, *data, shapes=shapes).model.id2label[79] == "toothbrush"


def test_classes_of_no_known_data_set_are_numbered_and_reported():
    configuration = converted(GOLDEN_A, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "True")
    assert configuration.model.id2label == {index: f"LABEL_{index}" for index in range(7)}
    assert configuration.model.label2id["LABEL_6"] == 6
    assert any("No known data set of 7 classes" in note and "fuse no class" in note for note in configuration.notes)


def test_a_number_of_classes_that_does_not_fit_the_data_set_is_not_forced_on_it():
    configuration = converted(GOLDEN_A, "DATASETS.TEST", "('coco_2017_val',)")
    assert configuration.model.id2label[0] == "LABEL_0"
    assert any("No known data set of 7 classes" in note for note in configuration.notes)


def test_given_classes_are_used_and_must_be_as_many():
    labels = LabelSet("mine", "", tuple("abcdefg"), (True,) * 5 + (False,) * 2)
    configuration = converted(GOLDEN_A, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "True", labels=labels)
    assert configuration.model.id2label[6] == "g"
    assert configuration.processor.label_ids_to_fuse == (5, 6)
    assert not any("LABEL_0" in note for note in configuration.notes)
    with pytest.raises(ConversionError, match="7 classes, but 'mine' has 1"):
        converted(GOLDEN_A, labels=LabelSet("mine", "", ("a",), (True,)))


def test_the_recorded_backbones_are_expressed_as_the_parity_tests_do():
    for name, shapes in (("a", SMALL_RESNET), ("b", SMALL_SWIN)):
        expected = backbone_config(load_case(name).config["MODEL"])
        assert (
            converted(GOLDENS / name / "config.yaml", shapes=shapes).model.backbone_config.to_dict()
            == expected.to_dict()
        )
