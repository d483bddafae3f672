"""Facts of models: nothing without a source, no number that may be read in two ways, and what is published is what it was."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest

from mpformer_hf.model_facts import (
    LICENCES,
    PUBLISHED_ORIGINS,
    DataSet,
    Detail,
    ModelFacts,
    OriginalFiles,
    Score,
    Source,
    find_published,
    read_all_facts,
    read_facts,
)

CARDS = Path(__file__).parents[2] / "model_cards"
PAPER = Source("a paper", url="https://example.org/paper")
OTHER = Source("another paper", url="https://example.org/other")
MEASURED = Source("a program", command="python -m training.score model")
SCORE = {"metric": "pq", "percent": 51.9, "task": "panoptic", "dataset": "coco", "split": "val2017", "source": "paper"}


def make_score(**fields):
    return Score(
        **{"metric": "pq", "task": "panoptic", "dataset": "coco", "split": "val2017", "source": PAPER, **fields}
    )


def make_facts(**fields):
    basic = {"name": "model", "title": "A model", "origin": "trained", "backbone": "ResNet-50", "source": PAPER}
    return ModelFacts(**{**basic, "num_labels": 3, "num_queries": 5, **fields})


def family(**checkpoint):
    """The content of a file of facts that can be read, with some fields of its checkpoint replaced."""
    own = {
        "name": "model-a",
        "title": "Model A",
        "backbone": "ResNet-50",
        "details": [["Parameters", "44 M", "paper"]],
        "scores": [SCORE],
        "original": {"weights": "https://example.org/a_abcdef.pkl", "md5_prefix": "abcdef"},
    }
    return {
        "sources": {"paper": {"name": PAPER.name, "url": PAPER.url}},
        "shared": {
            "origin": "mask2former-zoo",
            "source": "paper",
            "num_labels": 133,
            "num_queries": 100,
            "tasks": ["panoptic"],
            "training_data": ["coco"],
            "recipe": [["Steps", "10", "paper"]],
            "original": {"repository": "https://example.org/code", "config": "configs/a.yaml"},
        },
        "checkpoints": [{**own, **checkpoint}],
    }


def write(folder, content, name="family.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Numbers and their sources


@pytest.mark.parametrize("source", [None, "a paper", ""])
def test_a_number_without_a_source_is_an_error(source):
    with pytest.raises(ValueError, match=r"The score 'pq' on coco val2017 has no source"):
        make_score(value=51.9, unit="percent", source=source)


def test_a_detail_and_an_architecture_without_a_source_are_errors():
    with pytest.raises(ValueError, match=r"The detail 'FLOPs' has no source"):
        Detail("FLOPs", "226 G", None)
    with pytest.raises(ValueError, match=r"The architecture of model has no source"):
        make_facts(source=None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"url": "https://example.org", "command": "python x.py"},
        {"url": "https://example.org", "file": "config.json"},
        {"url": "example.org/paper"},
        {"url": "https://example.org/a b"},
    ],
)
def test_a_source_is_one_page_one_command_or_one_file(fields):
    with pytest.raises(ValueError, match=r"Expected the source 'x' to have"):
        Source("x", **fields)


def test_a_score_is_never_read_in_a_configuration_file():
    with pytest.raises(ValueError, match=r"either quoted from a page or measured by a command"):
        make_score(value=0.5, unit="fraction", source=Source("configuration", file="config.json"))


def test_terms_of_a_data_set_need_a_source():
    with pytest.raises(ValueError, match=r"terms together with their source"):
        DataSet(id="x", name="X", terms="free for all")


@pytest.mark.parametrize(
    ("value", "unit", "sentence"),
    [
        (0.519, "percent", "looks like a fraction"),
        (1, "percent", "give the fraction 0.01"),
        (51.9, "fraction", "must be from 0 to 1 as a fraction, got 51.9"),
        (100.1, "percent", "must be from 0 to 100 as a percent"),
        (-0.1, "fraction", "must be from 0 to 1"),
        (math.nan, "percent", "must be a finite number"),
        (math.inf, "percent", "must be a finite number"),
        ("51.9", "percent", "must be a finite number"),
        (True, "fraction", "must be a finite number"),
        (51.9, "points", "Unknown unit 'points'"),
    ],
)
def test_a_number_that_may_be_read_in_two_ways_is_an_error(value, unit, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_score(value=value, unit=unit)


@pytest.mark.parametrize(
    ("value", "unit", "percent"),
    [
        (51.9, "percent", 51.9),
        (0.519, "fraction", 51.9),
        (0.004, "fraction", 0.4),
        (0, "percent", 0),
        (1, "fraction", 100),
    ],
)
def test_percentages_and_fractions_say_the_same(value, unit, percent):
    assert make_score(value=value, unit=unit).percent == percent


def test_scores_of_one_place_come_from_one_page_but_may_be_measured_beside_it():
    quoted = make_score(value=51.9, unit="percent")
    with pytest.raises(ValueError, match=r"from 'a paper' and 'another paper'\. Quote one of them"):
        make_facts(scores=(quoted, make_score(metric="sq", value=80.0, unit="percent", source=OTHER)))
    elsewhere = make_score(metric="sq", value=80.0, unit="percent", source=OTHER, split="test-dev")
    measured = make_score(value=0.518, unit="fraction", source=MEASURED)
    assert len(make_facts(scores=(quoted, elsewhere, measured)).scores) == 3


def test_a_score_that_stands_there_twice_is_an_error_unless_a_note_tells_them_apart():
    one = make_score(metric="miou", value=47.2, unit="percent")
    with pytest.raises(ValueError, match=r"has the score mIoU on coco val2017 twice"):
        make_facts(scores=(one, make_score(metric="miou", value=49.2, unit="percent")))
    make_facts(scores=(one, make_score(metric="miou", value=49.2, unit="percent", note="multi-scale")))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "a/b"}, "Expected a name of letters"),
        ({"name": "x" * 97}, "Expected a name of letters"),
        ({"num_queries": 0}, "`num_queries` of model must be at least 1, got 0"),
        ({"tasks": ("panoptics",)}, "Did you mean 'panoptic'"),
        ({"classes": ("cat",)}, "has 3 classes, but 1 names"),
        ({"origin": "mask2former-zoo"}, "needs? the original files and a licence"),
    ],
)
def test_facts_that_do_not_fit_together_are_errors(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_facts(**fields)


# Files


def test_a_file_gives_each_checkpoint_the_shared_facts_and_its_own(tmp_path):
    content = family(recipe=[["Hardware", "8 V100", "paper"]])
    content["checkpoints"].append({**content["checkpoints"][0], "name": "model-b", "training_data": ["imagenet-1k"]})
    first, second = read_facts(write(tmp_path, content))
    assert [line.name for line in first.recipe] == ["Steps", "Hardware"]
    assert [data_set.id for data_set in first.training_data] == ["coco"]
    assert [data_set.id for data_set in second.training_data] == ["coco", "imagenet-1k"]
    assert first.scores[0] == make_score(value=51.9, unit="percent")
    assert (first.original.file_name, first.original.config) == ("a_abcdef.pkl", "configs/a.yaml")
    assert first.licence is LICENCES["mask2former-zoo"]
    assert read_all_facts(tmp_path) == {"model-a": first, "model-b": second}


def without(name):
    return {key: value for key, value in SCORE.items() if key != name}


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ({"scores": [without("source")]}, "has no source"),
        ({"scores": [{**SCORE, "source": "papr"}]}, r"Unknown source 'papr'. Did you mean 'paper'\?"),
        ({"scores": [{**without("percent"), "value": 51.9}]}, "one of the keys `percent` and `fraction`"),
        ({"scores": [{**SCORE, "fraction": 0.519}]}, "one of the keys `percent` and `fraction`"),
        ({"scores": [{**SCORE, "percent": 0.519}]}, "looks like a fraction"),
        ({"scores": [{**SCORE, "metrics": "pq"}]}, "metrics"),
        ({"details": [["Parameters", "44 M"]]}, r"Expected a detail to be \[name, value, key of its source\]"),
        ({"details": [["Parameters", "44 M", ""]]}, "Unknown source ''"),
        ({"training_data": ["cocoa"]}, r"Unknown data set 'cocoa'. Did you mean 'coco'\?"),
        ({"num_querys": 5}, r"Unknown field 'num_querys'. Did you mean 'num_queries'\?"),
        ({"num_queries": 200}, "num_queries of model-a stand in `shared` too"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_a_sentence(tmp_path, checkpoint, sentence):
    path = write(tmp_path, family(**checkpoint))
    with pytest.raises(ValueError, match=sentence) as error:
        read_facts(path)
    assert str(path) in str(error.value)


def test_keys_that_stand_twice_sources_without_use_and_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the keys name stand twice"):
        read_facts(write(tmp_path, '{"sources": {"paper": {"name": "a", "name": "b"}}}'))
    unused = family()
    unused["sources"]["blog"] = {"name": "a blog", "url": "https://example.org/blog"}
    with pytest.raises(ValueError, match="sources that nothing refers to: blog"):
        read_facts(write(tmp_path, unused))
    with pytest.raises(ValueError, match=r"Unknown part 'model'"):
        read_facts(write(tmp_path, '{"model": 1}'))
    with pytest.raises(ValueError, match="cannot be read as facts"):
        read_facts(write(tmp_path, "not JSON"))


def test_one_name_in_two_files_is_an_error(tmp_path):
    write(tmp_path, family(), "a.json")
    write(tmp_path, family(), "b.json")
    with pytest.raises(ValueError, match="has the facts of model-a more than once"):
        read_all_facts(tmp_path)


def test_a_published_file_is_known_by_its_name_and_content_together(tmp_path):
    content = b"weights"
    prefix = hashlib.md5(content).hexdigest()[:6]
    original = OriginalFiles(
        weights=f"https://example.org/model_final_{prefix}.pkl",
        repository="https://example.org",
        config="a.yaml",
        md5_prefix=prefix,
    )
    published = make_facts(origin="mask2former-zoo", original=original, licence=LICENCES["mask2former-zoo"])
    files = {
        name: tmp_path / name for name in (f"model_final_{prefix}.pkl", "model_final_ffffff.pkl", f"other_{prefix}.pkl")
    }
    for file in files.values():
        file.write_bytes(content)
    assert find_published([published], files[f"model_final_{prefix}.pkl"]) is published
    assert find_published([published], files["model_final_ffffff.pkl"]) is None
    files[f"other_{prefix}.pkl"].write_bytes(b"other weights")
    assert find_published([published], files[f"other_{prefix}.pkl"]) is None


# What is published. The numbers are those of tables 1 to 6 and of the appendix of arXiv 2112.01527, as the model zoo lists them.

BACKBONES = {
    "r50": "resnet50",
    "r101": "resnet101",
    "t": "swin-tiny",
    "s": "swin-small",
    "b": "swin-base",
    "b22": "swin-base-in21k",
    "l22": "swin-large-in21k",
}
MAIN_SCORES = {
    ("coco-panoptic", "pq"): {"r50": 51.9, "r101": 52.6, "t": 53.2, "s": 54.6, "b": 55.1, "b22": 56.4, "l22": 57.8},
    ("coco-instance", "ap"): {"r50": 43.7, "r101": 44.2, "t": 45.0, "s": 46.3, "b": 46.7, "b22": 48.1, "l22": 50.1},
    ("ade20k-semantic", "miou"): {"r50": 47.2, "r101": 47.8, "t": 47.7, "s": 51.3, "b": 52.4, "b22": 53.9, "l22": 56.1},
    ("ade20k-panoptic", "pq"): {"r50": 39.7, "l22": 48.1},
    ("ade20k-instance", "ap"): {"r50": 26.4, "l22": 34.9},
    ("cityscapes-panoptic", "pq"): {"r50": 62.1, "r101": 62.4, "t": 63.9, "s": 64.8, "b22": 66.1, "l22": 66.6},
    ("cityscapes-instance", "ap"): {"r50": 37.4, "r101": 38.5, "t": 39.7, "s": 41.8, "b22": 42.0, "l22": 43.7},
    ("cityscapes-semantic", "miou"): {"r50": 79.4, "r101": 80.1, "t": 82.1, "s": 82.6, "b22": 83.3, "l22": 83.3},
    ("mapillary-vistas-panoptic", "pq"): {"r50": 36.3, "l22": 45.5},
    ("mapillary-vistas-semantic", "miou"): {"r50": 57.4, "l22": 63.2},
}
LABELS = {
    "coco-panoptic": 133,
    "coco-instance": 80,
    "ade20k-semantic": 150,
    "ade20k-panoptic": 150,
    "ade20k-instance": 100,
    "cityscapes-panoptic": 19,
    "cityscapes-instance": 8,
    "cityscapes-semantic": 19,
    "mapillary-vistas-panoptic": 65,
    "mapillary-vistas-semantic": 65,
}


@pytest.fixture(scope="module")
def published():
    return read_all_facts(CARDS)


def test_every_family_of_the_zoo_has_its_checkpoints_with_their_published_scores(published):
    found = {
        name: (facts.num_labels, facts.scores[0].metric, facts.scores[0].percent) for name, facts in published.items()
    }
    expected = {
        f"mask2former-{BACKBONES[backbone]}-{data}": (LABELS[data], metric, value)
        for (data, metric), values in MAIN_SCORES.items()
        for backbone, value in values.items()
    }
    expected["mpformer-resnet50-coco-instance-12ep"] = (80, "ap", 40.15)
    assert found == expected


def test_large_swins_have_200_queries_unless_they_are_semantic(published):
    for name, facts in published.items():
        is_wide = "swin-large" in name and not name.endswith("semantic")
        assert facts.num_queries == (200 if is_wide else 100), name


def test_every_published_checkpoint_names_file_configuration_data_and_licence(published):
    for name, facts in published.items():
        data, task = re.search(r"(coco|ade20k|cityscapes|mapillary-vistas)-(panoptic|instance|semantic)", name).groups()
        assert facts.origin in PUBLISHED_ORIGINS
        assert facts.task == task
        assert facts.training_data[0].id == data
        backbone_data = "imagenet-22k" if "in21k" in name else "imagenet-1k"
        assert facts.training_data[1].id == backbone_data
        assert facts.original.config.startswith(f"configs/{data}/{task}-segmentation/")
        assert ("swin/" in facts.original.config) == ("swin" in name)
        assert ("IN21k" in facts.original.config) == ("in21k" in name)
        assert facts.licence.identifier == "cc-by-nc-4.0"
        assert all(score.source.url for score in facts.scores)


def test_files_of_the_zoo_carry_their_md5_and_belong_to_their_configuration(published):
    zoo = [facts for facts in published.values() if facts.origin == "mask2former-zoo"]
    assert len({facts.original.md5_prefix for facts in zoo}) == len(zoo) == 47
    for facts in zoo:
        folder, file = facts.original.weights.split("/")[-2:]
        assert file == f"model_final_{facts.original.md5_prefix}.pkl"
        # The zoo names one configuration differently on its two sides.
        assert folder.replace("maskformer_", "maskformer2_") == Path(facts.original.config).stem.replace(
            "maskformer_", "maskformer2_"
        )
        assert f"/{facts.training_data[0].id.replace('-', '_')}/{facts.task}/" in facts.original.weights


def test_only_mpformer_has_no_position_embedding_of_the_queries_and_brings_its_label_embedding(published):
    for facts in published.values():
        is_mpformer = facts.origin == "mpformer-release"
        assert facts.query_position_embedding == (not is_mpformer)
        assert facts.label_embedding == ("kept" if is_mpformer else "fresh")
