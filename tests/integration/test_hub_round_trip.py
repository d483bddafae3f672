"""A model's way over the Hub: an author pushes it; strangers, who never installed this package, load it, save it and push it on;
people with the package load all of that without a flag, a question or a message.

Everyone is a process of their own (`hub_users.py`) with an empty cache and nothing on standard input. The Hub is a server of
the tests on loopback.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpformer_hf.model_card import is_by_a_person
from tests.hub_server import Commit, HubServer
from tests.unit.test_hub_closure import PACKAGE, closure_of

pytestmark = pytest.mark.slow

USERS = Path(__file__).with_name("hub_users.py")
REPOSITORY, COPY, TRAINED = "author/tiny-mpformer", "stranger/copy", "owner/trained"
TOKENS = {"token of the author": "author", "token of a stranger": "stranger", "token of an owner": "owner"}
ENTRIES = ("configuration_mpformer", "image_processing_mpformer", "modeling_mpformer")
CODE = {file.name for entry in ENTRIES for file in closure_of(PACKAGE / f"{entry}.py")}
DATA = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
MODEL_TITLE = "Upload MPFormerForUniversalSegmentation"
LOWEST = os.environ.get("MPFORMER_LOWEST_VERSIONS")
# transformers says this to everyone who loads code without pinning a revision.
NOTICE = re.compile(
    r"\[transformers\] A new version of the following files was downloaded from \S+:\n(- \w+\.py\n)+"
    r"\. Make sure to double-check .* you can pin a revision\.\n"
)


@dataclass
class User:
    """A process of `hub_users.py` and what it said, part by part."""

    process: subprocess.Popen
    log: dict[str, str] = field(default_factory=dict)

    def wait(self) -> None:
        """Wait for its end, which must be a good one."""
        self.read()
        assert self.process.returncode == 0, self.log

    def read(self) -> None:
        _, errors = self.process.communicate(timeout=240)
        before, *parts = re.split(r"^== (.*)\n", errors, flags=re.MULTILINE)
        self.log = {"": before, **dict(zip(parts[::2], parts[1::2], strict=True))}


@dataclass(frozen=True)
class Story:
    """Everything that happened; tests look at it."""

    folder: Path
    hub: HubServer
    author: User
    stranger: User
    second_stranger: User
    owner: User
    pushed: list[Commit]

    def numbers(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def classes(self, name: str) -> list[str]:
        return json.loads((self.folder / f"{name}.json").read_text())


def start(role: str, folder: Path, hub: HubServer, token: str, **variables: str) -> User:
    home = folder / "homes" / role
    home.mkdir(parents=True)
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = others | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, str(USERS), role, str(folder), REPOSITORY, COPY],
        stdin=subprocess.PIPE if role == "push" else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment,
    )
    return User(process)


def push_and_be_killed(folder: Path, hub: HubServer) -> User:
    """The author pushes; then changes the weights, pushes again, and is killed while they are on their way."""
    author = start("push", folder, hub, "token of the author")
    assert author.process.stdout.readline() == "pushed\n", author.process.communicate()[1]
    upload = hub.hold("PUT", "^/large/")
    author.process.stdin.write("go on\n")
    author.process.stdin.flush()
    assert upload.reached.wait(timeout=60), "the second push sent no weights"
    author.process.kill()
    author.read()
    upload.release.set()
    return author


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hub_round_trip")
    with HubServer(folder / "hub", TOKENS) as hub:
        author = push_and_be_killed(folder, hub)
        pushed = hub.commits(REPOSITORY)
        stranger = start("borrow", folder, hub, "token of a stranger")
        stranger.wait()
        second_stranger = start("borrow_copy", folder, hub, "token of a stranger")
        owner = start("own", folder, hub, "token of an owner")
        for user in (second_stranger, owner):
            user.wait()
        yield Story(folder, hub, author, stranger, second_stranger, owner, pushed)


def assert_equal_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def only_silence(user: User) -> dict[str, str]:
    return dict.fromkeys(user.log, "")


# ----------------------------------------------------------------------------------------------------------------- pushing


def test_a_push_is_one_commit_with_all_of_the_model_or_of_the_processor(story: Story) -> None:
    assert [commit.title for commit in story.pushed] == ["initial commit", MODEL_TITLE, "Upload processor"]
    assert story.pushed[1].files.keys() == CODE | DATA - {"preprocessor_config.json"}
    assert story.pushed[2].files.keys() == CODE | DATA


def test_the_pushed_code_is_that_of_the_package(story: Story) -> None:
    files = story.hub.files(REPOSITORY)
    assert {name: files[name] for name in CODE} == {name: (PACKAGE / name).read_bytes() for name in CODE}


def test_the_config_names_the_classes_for_strangers_and_the_processor_s_file_names_none(story: Story) -> None:
    files = story.hub.files(REPOSITORY)
    assert json.loads(files["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_mpformer.MPFormerConfig",
        "AutoModel": "modeling_mpformer.MPFormerModel",
        "AutoModelForUniversalSegmentation": "modeling_mpformer.MPFormerForUniversalSegmentation",
        "AutoModelForImageSegmentation": "modeling_mpformer.MPFormerForUniversalSegmentation",
        "AutoImageProcessor": "image_processing_mpformer.MPFormerImageProcessor",
    }
    assert not {"auto_map", "image_processor_type"} & json.loads(files["preprocessor_config.json"]).keys()


def test_a_wrong_token_is_refused_and_no_repository_made(story: Story) -> None:
    assert json.loads((story.folder / "refused.json").read_text()) == 401
    attempts = [request.status for request in story.hub.requests if request.path == "/api/repos/create"]
    assert attempts[:2] == [401, 200]  # 409 would mean that the first one had made it


def test_a_push_that_is_killed_midway_leaves_the_repository_as_it_was(story: Story) -> None:
    assert story.author.process.returncode < 0
    assert story.hub.commits(REPOSITORY) == story.pushed


def test_the_author_s_log_is_empty(story: Story) -> None:
    assert story.author.log == only_silence(story.author)
    assert story.author.log.keys() == {"", "wrong token", "push", "compute", "interrupted"}


def test_a_pushed_model_has_the_package_s_card(story: Story) -> None:
    card = story.hub.files(REPOSITORY)["README.md"].decode()
    assert "https://arxiv.org/abs/2303.07336" in card
    assert not is_by_a_person(card)
    assert "automatically generated" not in card


# --------------------------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("name", ["stranger", "stranger, saved", "copy"])
def test_a_stranger_s_models_and_pipeline_compute_the_author_s_bits(story: Story, name: str) -> None:
    assert_equal_bits(story.numbers(name), story.numbers("author"))


def test_without_the_compiled_operator_a_stranger_differs_from_the_author_by_rounding_alone(story: Story) -> None:
    strangers, author = story.numbers("stranger"), story.numbers("author, own operator")
    for auto in ("AutoModel", "AutoModelForUniversalSegmentation"):
        expected = author[f"{auto} masks"]
        difference = (strangers[f"{auto} masks"] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5


@pytest.mark.parametrize("name", ["stranger", "stranger, saved", "copy"])
def test_a_stranger_s_classes_are_those_of_the_repository(story: Story, name: str) -> None:
    classes = story.classes(name)
    assert {one.partition(".")[0] for one in classes} == {"transformers_modules"}
    assert [one.rpartition(".")[2] for one in classes] == [
        "MPFormerConfig",
        "MPFormerImageProcessor",
        "MPFormerForUniversalSegmentation",
        "MPFormerForUniversalSegmentation",
        "MPFormerModel",
    ]


def test_a_stranger_s_log_is_empty(story: Story) -> None:
    assert story.stranger.log == only_silence(story.stranger)
    assert story.stranger.log.keys() == {"", "stranger", "stranger saves", "stranger, saved", "stranger pushes"}


def test_without_a_revision_a_stranger_reads_transformers_notice_about_code_and_nothing_else(story: Story) -> None:
    log = dict(story.second_stranger.log)
    notices = log.pop("no revision")
    assert NOTICE.sub("", notices) == ""
    assert "- modeling_mpformer.py\n" in notices
    assert log == {"": "", "copy": ""}


def test_a_stranger_pushes_the_same_files_that_he_has_loaded(story: Story) -> None:
    ours, theirs = story.hub.files(COPY), story.hub.files(REPOSITORY)
    assert ours.keys() == theirs.keys()
    assert {name: ours[name] for name in CODE} == {name: theirs[name] for name in CODE}
    loaded = json.loads(theirs["config.json"])
    loaded["backbone_config"]["dtype"] = "float32"  # loading finds that out
    assert json.loads(ours["config.json"]) == loaded
    assert json.loads(ours["preprocessor_config.json"]) == json.loads(theirs["preprocessor_config.json"])


@pytest.mark.skipif(
    not LOWEST,
    reason="needs MPFORMER_LOWEST_VERSIONS, a folder made by scripts/install_lowest_versions.sh; tests/run.sh sets it",
)
def test_a_stranger_with_the_lowest_versions_computes_the_author_s_bits(story: Story) -> None:
    stranger = start(
        "borrow_with_lowest_versions", story.folder, story.hub, "token of a stranger", PYTHONPATH=str(LOWEST)
    )
    stranger.wait()
    assert stranger.log == {"": "", "lowest versions": ""}
    assert_equal_bits(story.numbers("lowest versions"), story.numbers("author"))


# ---------------------------------------------------------------------------------------------- people with the package


@pytest.mark.parametrize("name", ["owner", "owner, copy", "owner, saved by the stranger"])
def test_with_the_package_its_own_classes_are_taken_without_a_flag(story: Story, name: str) -> None:
    assert {one.partition(".")[0] for one in story.classes(name)} == {"mpformer_hf"}
    assert_equal_bits(story.numbers(name), story.numbers("author, own operator"))


def test_with_the_package_nothing_is_asked_and_nothing_logged_not_even_after_training(story: Story) -> None:
    assert story.owner.log == only_silence(story.owner)
    assert story.owner.log.keys() >= {"owner", "owner, copy", "owner trains", "owner, trained"}


def test_with_the_package_no_code_is_downloaded(story: Story) -> None:
    asked = {request.path for request in story.hub.requests if request.user == "owner" and "/resolve/" in request.path}
    assert any(path.endswith("/config.json") for path in asked)
    assert not [path for path in asked if path.endswith(".py")]


def test_a_trained_model_is_saved_and_pushed_with_its_code_and_loads_again(story: Story) -> None:
    trained, expected = story.numbers("owner, trained"), story.numbers("trained, in memory")
    for kind, value in expected.items():
        torch.testing.assert_close(trained[f"AutoModelForUniversalSegmentation {kind}"], value, rtol=0, atol=0)
        assert not torch.equal(
            value, story.numbers("author, own operator")[f"AutoModelForUniversalSegmentation {kind}"]
        )
    assert story.hub.files(TRAINED).keys() == CODE | DATA
