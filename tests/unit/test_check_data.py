"""Checking data before it is trained on: what is counted, what is found wrong, how much memory is estimated, what is printed."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation
from tests.data_folders import SIZE, make_scenes, save_json, save_map, write_class_index, write_coco_panoptic
from tests.factories import random_images, tiny_backbone_config, tiny_config, tiny_model
from training import check_data
from training.arguments import make_arguments
from training.augmentation import Augmentation
from training.data import DATASETS, DigitScenes
from training.data_check import ImageFacts, SplitFacts, facts_of_row, read_facts, spread, summarise
from training.data_check_text import histogram
from training.data_findings import find_problems
from training.data_pictures import GREY, choose, draw_row, draw_samples
from training.memory_estimate import bytes_kept, estimate_memory, input_size, pilot_slots, precision_of
from training.official_files import FileError

# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def small_row():
    """4 x 5 pixels: two objects that share two pixels, a crowd below them, an ignored column, the rest is nothing."""
    masks = np.zeros((2, 4, 5), dtype=bool)
    masks[0, :2, :3] = True
    masks[1, 1:3, 1:3] = True
    crowd, ignored = np.zeros((1, 4, 5), dtype=bool), np.zeros((4, 5), dtype=bool)
    crowd[0, 2:, 2:4] = True  # (2, 2) is in an object too
    ignored[:, 4] = True
    ignored[0, 0] = True  # so is this
    return {
        "image_id": "a",
        "image": Image.new("RGB", (5, 4)),
        "mask_labels": masks,
        "class_labels": np.array([1, 0]),
        "crowd_masks": crowd,
        "crowd_labels": np.array([1]),
        "ignore_mask": ignored,
    }


def test_every_pixel_of_an_image_is_counted_once():
    facts = facts_of_row(small_row(), 7)
    assert (facts.position, facts.image_id, facts.size) == (7, "a", (4, 5))
    assert (facts.classes, facts.areas) == ((1, 0), (6, 4))
    assert (facts.overlapping, facts.overlap_pixels) == (2, 2)
    assert (facts.crowds, facts.crowd_pixels, facts.ignored_pixels) == (1, 3, 4)
    assert facts.void_pixels == 20 - (6 + 4 - 2) - 3 - 4


def test_an_image_without_segments_is_all_void():
    row = {
        "image_id": 0,
        "image": Image.new("RGB", (5, 4)),
        "mask_labels": np.zeros((0, 4, 5), dtype=bool),
        "class_labels": np.zeros(0, dtype=np.int64),
    }
    facts = facts_of_row(row, 0)
    assert (facts.classes, facts.void_pixels, facts.overlapping) == ((), 20, 0)


def test_a_limit_spreads_over_the_data_set():
    assert spread(10, 3) == [0, 3, 6]
    assert spread(3, 10) == spread(3, None) == [0, 1, 2]


def open_coco(tmp_path):
    write_coco_panoptic(make_scenes(number=5), tmp_path / "coco")
    return DATASETS["coco_panoptic"]("train", path=str(tmp_path / "coco"), cache_dir=str(tmp_path / "cache"))


def test_all_broken_images_are_listed_and_the_others_counted_by_any_number_of_workers(tmp_path):
    reader = open_coco(tmp_path)
    for name in ("train_000", "train_003"):
        (tmp_path / "coco" / "train2017" / f"{name}.png").write_bytes(b"broken")
    alone, shared = (read_facts(reader, "train", "panoptic", num_workers=number) for number in (0, 2))
    assert alone == shared
    assert [image.position for image in alone.broken] == [0, 3]
    assert "train_003.png" in alone.broken[1].error
    assert [image.position for image in alone.readable] == [1, 2, 4]
    assert [list(image.classes) for image in alone.readable] == [
        reader[number]["class_labels"].tolist() for number in (1, 2, 4)
    ]


def test_what_the_index_knows_is_counted_of_all_images_though_few_are_read(tmp_path):
    reader = open_coco(tmp_path)
    facts = read_facts(reader, "train", "panoptic", limit=2)
    assert len(facts.images) == 2
    assert sum(facts.segments_of_class.values()) == sum(len(row["class_labels"]) for row in reader)


def test_errors_of_any_kind_are_listed():
    class Odd:
        id2label, thing_ids = DigitScenes("train").id2label, ()

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise (FileError("a.png is missing."), ZeroDivisionError("odd"))[index]

    facts = read_facts(Odd(), "train", "instance")
    assert [image.error for image in facts.broken] == [
        "a.png is missing.",
        "Image at position 1: ZeroDivisionError: odd",
    ]


def make_facts(images, names=("cat", "dog"), split="train", task="instance", **fields):
    id2label = dict(enumerate(names))
    values = {"thing_ids": tuple(id2label), "category_ids": {}, "num_images": len(images), **fields}
    return SplitFacts(split, task, id2label, images=list(images), **values)


def image(position, classes, areas=None, size=(40, 50), **fields):
    areas = areas or [100] * len(classes)
    return ImageFacts(position, position, size, tuple(classes), tuple(areas), checksum=position, **fields)


def test_numbers_are_those_of_the_images():
    facts = make_facts(
        [
            image(0, (0, 1, 1), (1024, 1023, 5), crowd_pixels=100, crowds=1),
            image(1, (), size=(20, 50), void_pixels=1000),
            image(2, (1,), (40,), ignored_pixels=300, void_pixels=1660),
            ImageFacts(3, error="broken"),
        ]
    )
    summary = summarise(facts, num_queries=2)
    assert (summary["segments"], summary["images_without_segments"], summary["crowd_regions"]) == (4, 1, 1)
    assert summary["images_with_more_segments_than_queries"] == 1
    assert summary["segments_an_image"] == {"min": 0, "median": 1, "max": 3}
    assert summary["heights"] == {"min": 20, "median": 40, "max": 40}
    assert summary["small_segments"] == 3 / 4
    assert summary["broken_images"] == ["broken"]
    assert summary["pixels"] == {
        "segments": (5000 - 100 - 300 - 2660) / 5000,
        "crowd": 100 / 5000,
        "void": 2660 / 5000,
        "ignored": 300 / 5000,
        "several_segments": 0,
    }
    assert [(one["name"], one["segments"], one["images"]) for one in summary["classes"]] == [
        ("cat", 1, 1),
        ("dog", 3, 2),
    ]
    json.dumps(summary)


def test_bars_are_as_long_as_the_counts():
    classes = [
        {"name": name, "isthing": True, "segments": count, "images": 1}
        for name, count in (("a", 1), ("b", 64), ("c", 32), ("d", 0))
    ]
    lines = histogram(classes)
    assert [line.split()[0] for line in lines] == ["b", "c", "a", "d"]
    assert [line.count("#") for line in lines] == [32, 16, 1, 0]
    many = [{"name": f"class {number}", "isthing": True, "segments": number, "images": 1} for number in range(200)]
    assert len(histogram(many)) == 61
    assert "140 classes between" in "\n".join(histogram(many))


# ---------------------------------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------------------------------

FINE = [image(0, (0, 1)), image(1, (1,)), image(2, (0,))]


def texts(*splits, **options):
    return [f"{one.level}: {one.text}" for one in find_problems({facts.split: facts for facts in splits}, **options)]


def test_nothing_is_found_where_nothing_is_wrong():
    validation = make_facts([image(10, (0,)), image(11, (1,))], split="validation")
    assert texts(make_facts(FINE), validation) == []


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (make_facts([image(0, ()), image(1, ())]), "error: No train image has a segment"),
        (make_facts(FINE, ("cat", "cat")), "error: Several classes are called 'cat'"),
        (
            make_facts(FINE, ("traffic-light", "Traffic light")),
            "warning: The classes 'traffic-light' and 'Traffic light'",
        ),
        (make_facts(FINE, ("Background", "dog")), "warning: 'Background' is an object class with 2 segments"),
        (make_facts(FINE, ("cat", "dog", "cow")), "warning: 1 of 3 classes have no segment in the train split: cow."),
        (make_facts(FINE[1:2], ("supercategory", "dog")), "either the ids are shifted by one, or it is the group"),
        (make_facts(FINE, category_ids={0: 255, 1: 3}), "warning: Class 'cat' has the id 255"),
        (make_facts(FINE, category_ids={0: 256, 1: 3}, task="semantic"), "1 class with ids above 255 (256)"),
        (
            make_facts([image(0, (0,) * 101)], ("cat",)),
            "1 of 1 train images have more segments than the model has queries (100)",
        ),
        (make_facts([*FINE, image(2, (0,))]), "error: 1 image ids of the train split are not unique: 2"),
        (
            make_facts([*FINE, ImageFacts(3, 3, (40, 50), (0,), (9,), checksum=2)]),
            "warning: 1 of 4 train images are copies",
        ),
        (
            make_facts([image(0, (0, 0), overlapping=2), *FINE[1:]], task="panoptic"),
            "warning: 2 of 4 segments of the train",
        ),
        (
            make_facts([image(0, (1,), ignored_pixels=500)]),
            "Only one class occurs ('dog'), and 25% of the pixels are ignored",
        ),
        (
            make_facts([image(0, (0, 1), ignored_pixels=1500)]),
            "warning: 75% of the pixels of the train split are ignored",
        ),
        (
            make_facts([image(number, (0, 1), (1500, 200)) for number in range(5)], ("scene", "dog")),
            "warning: 'scene' looks like the background",
        ),
        (make_facts(FINE, notes=["2 annotations cover no pixel."]), "warning: 2 annotations cover no pixel."),
        (make_facts([*FINE, ImageFacts(3, error="x")]), "warning: 1 training image cannot be read"),
        (make_facts([ImageFacts(3, error="x")]), "error: No training image of 1 can be read"),
        (make_facts([*FINE, ImageFacts(3, error="x")], split="validation"), "error: 1 validation image cannot be read"),
    ],
)
def test_likely_mistakes_are_found(facts, sentence):
    found = texts(facts)
    assert sentence in "\n".join(found)
    assert len(found) <= 2, "and nothing else, but for what follows from it"


def test_more_broken_images_than_a_training_passes_over_are_an_error():
    broken = make_facts([*FINE, *(ImageFacts(number, error="x") for number in range(3, 6))])
    assert texts(broken, max_broken_images=3)[0].startswith("warning")
    assert "a training stops after 2" in texts(broken, max_broken_images=2)[0]


def test_splits_are_compared():
    train = make_facts(FINE, ("cat", "dog", "cow"))
    validation = make_facts([image(10, (2,)), image(1, (0,))], ("cat", "dog", "cow"), split="validation")
    found = "\n".join(texts(train, validation))
    assert "1 class of the validation split never occur in the training split: cow" in found
    assert "1 validation images are training images too, pixel by pixel (1)" in found
    other = make_facts(FINE, ("cat", "wolf", "cow"), split="validation")
    assert "error: The splits have different classes, the first being (1, 'dog')" in "\n".join(texts(train, other))


@pytest.mark.parametrize(
    ("values", "classes", "sentence"),
    [
        (
            (1, 2, 3),
            ["a", "b", "c"],
            "have the value 3, one above the last class: .* from 0, the files probably from 1",
        ),
        ((0, 1, 2), {1: "a", 2: "b"}, "have the value 0, one below the first class. .* `ignore_index: 0`"),
    ],
)
def test_ids_that_are_shifted_by_one_are_told_from_the_files(tmp_path, values, classes, sentence):
    write_class_index(make_scenes(), tmp_path / "data")
    for number, file in enumerate(sorted((tmp_path / "data" / "labels").rglob("*.png"))):
        save_map(np.full(SIZE, values[number]), file)
    options = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "classes": classes}
    reader = DATASETS["class_index"]("train", **options)
    found = [one for one in find_problems({"train": read_facts(reader, "train", "semantic")}) if one.level == "error"]
    assert len(found) == 1
    assert re.search(sentence, found[0].text)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def make_recipe(**settings):
    config = tiny_config()
    fields = (
        "feature_size",
        "mask_feature_size",
        "hidden_dim",
        "encoder_layers",
        "decoder_layers",
        "num_queries",
        "dim_feedforward",
    )
    model = {name: getattr(config, name) for name in fields}
    model |= {
        "backbone_config": tiny_backbone_config().to_dict(),
        "encoder_feedforward_dim": 32,
        "num_attention_heads": 4,
    }
    model |= settings.pop("model", {})
    defaults = {"output_dir": "x", "max_steps": 100, "model": model, "batch_size": 2, "augmentation": {"size": 64}}
    return make_arguments({**defaults, **settings}, "test")


DATA = DigitScenes("train", num_images=1)


def estimate(**settings):
    return estimate_memory(make_recipe(**settings), DATA, most_segments=5, sizes=[(100, 90)])


@pytest.fixture(scope="module")
def memory():
    """Of two images of 64 x 64; estimates take a second each."""
    return estimate()


def test_parameters_and_what_the_optimiser_keeps_are_counted(memory):
    config = MPFormerConfig(**make_recipe().model, id2label=DATA.id2label)
    sizes = [
        (parameter.numel(), parameter.requires_grad)
        for parameter in MPFormerForUniversalSegmentation(config).parameters()
    ]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    assert (memory.parameters, memory.trained_parameters) == (parameters, trained)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * trained, 8 * trained)
    assert (memory.batch_size, memory.height, memory.width, memory.queries) == (2, 64, 64, 6 + 5)
    assert memory.targets == 2 * 5 * 64 * 64
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.targets, memory.context)
    assert memory.total == sum(parts)


def test_averages_cost_weights_and_frozen_parts_save_gradients_and_activations(memory):
    changed = estimate(average_decay=0.99, frozen=["backbone"])
    assert changed.parameters == memory.parameters
    assert changed.weights == 2 * memory.weights
    assert changed.optimizer == 8 * changed.trained_parameters < memory.optimizer
    assert changed.activations < memory.activations


def test_checkpointing_saves_activations(memory):
    assert estimate(gradient_checkpointing=True).activations < memory.activations


@pytest.mark.parametrize(
    ("fields", "slots"),
    [({}, 7), ({"pilot_groups": 3}, 21), ({"pilot_query_budget": 30}, 28), ({"mask_piloting": False}, 0)],
)
def test_mask_piloting_adds_queries(fields, slots):
    assert pilot_slots(tiny_config(**fields), most_segments=7) == slots


def test_tensors_without_memory_are_counted_like_real_ones():
    def count():
        model, images = tiny_model().train(), random_images(2, (64, 64))
        return [bytes_kept(model, images, precision_of(precision)) for precision in ("no", "bf16")]

    real = count()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = count()
    assert fake[0] == real[0]
    assert fake[1] == pytest.approx(real[1], rel=0.01), "casts of weights are kept in another way"
    assert real[1] < real[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"augmentation": {"preset": "cityscapes"}}, (512, 1024)),
        ({"augmentation": {"kind": "short_side", "short_sides": [50, 100], "longest_side": 150}}, (128, 160)),
        ({"augmentation": {"kind": "none"}}, (128, 320)),
        ({"augmentation": {}, "processor": {"pad_size": {"height": 96, "width": 224}}}, (96, 224)),
        ({"augmentation": {}, "processor": {"size": {"shortest_edge": 200, "longest_edge": 600}}}, (224, 608)),
        ({"augmentation": {}, "processor": {"size": {"max_height": 64, "max_width": 64}}}, (64, 64)),
    ],
)
def test_the_size_of_a_batch_follows_from_the_recipe(settings, expected):
    # 100 x 90 with a shorter side of 200 is 222 x 200; 100 x 300 would be 200 x 600
    assert input_size(make_recipe(**settings), [(100, 90), (100, 300)]) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_ignored_pixels_are_striped_and_crowds_are_named():
    row = small_row()
    row["ignore_mask"][:] = True
    bare = draw_row(
        {**row, "mask_labels": row["mask_labels"][:0], "class_labels": row["class_labels"][:0]}, {0: "cat", 1: "dog"}
    )
    assert max(bare.size) == 320
    without = {key: value for key, value in row.items() if key not in ("ignore_mask", "crowd_masks", "crowd_labels")}
    plain = np.asarray(
        draw_row({**without, "mask_labels": row["mask_labels"][:0], "class_labels": row["class_labels"][:0]}, {})
    )
    assert (plain == 0).all()
    striped = np.asarray(bare)
    assert (striped == GREY).all(axis=-1).any()
    assert not (striped == np.asarray(plain)).all()


def test_a_row_of_the_grid_is_an_image_and_its_augmentations():
    data = DigitScenes("train", num_images=20)
    facts = read_facts(data, "train", "panoptic")
    augmentation = Augmentation(size=64)
    sheet = draw_samples(data, facts.images, augmentation, num_images=2, num_augmented=1)
    assert sheet.size == (8 + 2 * (320 + 8), 8 + 2 * (320 + 20 + 8))
    plain = draw_samples(data, facts.images, None, num_images=5)
    assert plain.size == (8 + 4 * (320 + 8), 8 + 2 * (320 + 20 + 8))


def test_the_images_that_are_drawn_are_spread_and_have_the_fullest_among_them():
    facts = [image(number, (0,) * (9 if number == 7 else 1)) for number in range(20)]
    facts[13] = image(13, (0,), crowd_pixels=5)
    assert [fact.position for fact in choose(facts, 4)] == [0, 5, 7, 13]
    assert choose(facts[:3], 4) == facts[:3]


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def run(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        check_data.main([str(word) for word in words])
    return caught.value.code, capsys.readouterr()


def test_a_folder_is_checked_and_everything_is_written(tmp_path, capsys):
    for split in ("train", "validation"):
        write_coco_panoptic(make_scenes(split), tmp_path / "coco", split)
    output = tmp_path / "report"
    code, printed = run(
        capsys, tmp_path / "coco", "--task", "panoptic", "--output", output, "--num-workers", 0, "--augmentation", "coco",
        "--pictures", 1, "--dataset-option", f"cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert code == 0
    assert "train, task panoptic: 3 images" in printed.out
    assert "validation, task panoptic: 3 images" in printed.out
    assert "Nothing looks wrong." in printed.out
    assert (output / "report.txt").read_text().strip() == printed.out.strip()
    with Image.open(output / "samples.png") as sheet:
        assert sheet.size == (8 + 4 * 328, 8 + 348)
    assert json.loads((output / "report.json").read_text())["splits"]["train"]["images"] == 3


def test_errors_end_with_one_and_programs_get_json(tmp_path, capsys):
    write_coco_panoptic(make_scenes(), tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "panoptic_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = content["categories"][1]["name"]
    save_json(content, file)
    code, printed = run(
        capsys, "--dataset", "coco_panoptic", "--path", tmp_path / "coco", "--task", "panoptic", "--json", "--num-workers", 0,
        "--output", tmp_path / "report", "--pictures", 0, "--dataset-option", f"cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert code == 1
    content = json.loads(printed.out)
    levels = [(one["level"], one["text"]) for one in content["findings"]]
    assert ("error", "Several classes are called 'china'. Give each class a name of its own.") in levels
    assert any(level == "warning" and "The validation split cannot be opened" in text for level, text in levels)
    assert not (tmp_path / "report" / "samples.png").exists()


def test_what_cannot_be_opened_ends_with_a_sentence(tmp_path, capsys):
    code, _ = run(capsys, tmp_path / "nowhere")
    assert code == f"error: {tmp_path / 'nowhere'} is missing. Expected a folder, or a zip archive, with the data set."
    code, _ = run(capsys, tmp_path / "nowhere.yaml", "--max_steps", 3)
    assert "cannot be read" in code
    code, printed = run(capsys, tmp_path, "--batch_size", 3)
    assert code == 2
    assert "unknown option --batch_size" in printed.err


def test_a_recipe_says_what_is_checked_and_estimates_memory(tmp_path, capsys):
    recipe = make_recipe().to_dict()
    recipe |= {"dataset_options": {"preset": "easy", "num_images": 3}, "validation_options": {"num_images": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, printed = run(
        capsys,
        tmp_path / "recipe.yaml",
        "--model.num_queries",
        4,
        "--num-workers",
        0,
        "--pictures",
        0,
        "--output",
        tmp_path / "out",
    )
    assert code == 0
    assert "train, task panoptic: 3 images" in printed.out
    assert "validation, task panoptic: 2 images" in printed.out
    assert "Memory of a training step, on each GPU: about 1.0 GiB (an estimate)" in printed.out
    scenes = DigitScenes("train", num_images=3)
    crowded = sum(len(row["class_labels"]) > 4 for row in scenes)
    assert f"more than 4 segments  {crowded}" in printed.out.replace("   ", "  ").replace("   ", "  ")


def test_a_backbone_that_cannot_be_loaded_leaves_the_rest_of_the_report(tmp_path, capsys):
    recipe = {
        "output_dir": "x",
        "max_steps": 10,
        "backbone": str(tmp_path / "gone"),
        "dataset_options": {"num_images": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, printed = run(
        capsys,
        tmp_path / "recipe.yaml",
        "--num-workers",
        0,
        "--pictures",
        0,
        "--split",
        "train",
        "--output",
        tmp_path / "out",
    )
    assert code == 0
    assert "The memory of a training step cannot be estimated" in printed.out
