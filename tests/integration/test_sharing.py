"""Sharing a trained folder on a Hub on loopback: what is found out before the training, what others get, and what a failure leaves."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mpformer_hf.model_card import sign
from tests.hub_server import HubServer
from tests.integration.test_training import RECIPE

ROOT = Path(__file__).parents[2]
TOKENS = {"secret": "someone", "another": "stranger"}

# Everything in one process, because its imports take seconds.
STORY = """
import json, os, sys
from pathlib import Path
from accelerate import Accelerator
from huggingface_hub import HfApi, close_session
from training.arguments import RecipeError
from training.sharing import main, prepare_repository, push_folder

folder, accelerator, found = Path(sys.argv[1]), Accelerator(cpu=True), {}

def sentence(*arguments):
    try:
        return prepare_repository(accelerator, *arguments)
    except RecipeError as error:
        return str(error)

found["no token"] = sentence(None, folder, False)
os.environ["HF_TOKEN"] = "secret"
HfApi().create_repo("theirs")
HfApi().create_repo("carded")
HfApi().upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="someone/carded")
os.environ["HF_TOKEN"] = "wrong"
found["wrong token"] = sentence(None, folder, False)
os.environ["HF_TOKEN"] = "another"
found["theirs"] = sentence("someone/theirs", folder, False)
found["failed"] = push_folder(folder, "someone/theirs", True, "x")
found["failed on the way"] = push_folder(folder, "someone/theirs", False, "x", is_last=False)
os.environ["HF_TOKEN"] = "secret"
found["prepared"] = sentence(None, folder, False)
found["again"] = sentence("someone/model", folder, False)
found["bad name"] = sentence("a/b/c", folder, False)
found["public"] = sentence("model", folder, True)
found["private"] = sentence("hidden", folder, True)
found["first"] = push_folder(folder, "someone/model", False, "Step 10: PQ 1.0")
(folder / "model.safetensors").write_bytes(bytes(99))
found["second"] = push_folder(folder, "someone/model", False, "Step 20: PQ 2.0")
push_folder(folder, "someone/carded", False, "x")
main([str(folder), "someone/by_hand", "--private"])
for arguments in ([str(folder.parent)], [str(folder), "stranger/x"]):
    try:
        main(arguments)
    except SystemExit as stop:
        found[arguments[-1]] = stop.code
print(json.dumps(found), flush=True)  # and the Hub goes away
sys.stdin.readline()
close_session()  # its open connection would still be served
print(json.dumps([push_folder(folder, "someone/model", False, "x"), sentence(None, folder, False)]), flush=True)
"""


FILES = {
    "config.json": "{}",
    "modeling_mpformer.py": "text",
    "README.md": sign("---\nlicense: apache-2.0\n---\n# Model\n"),
    "recipe.yaml": "output_dir: /home/jane/out\ndataset_options: {path: /data/jane/coco}\nmodel: {num_queries: 20}\n",
    "results.json": json.dumps({"settings": {"dataset_options": {"path": "/data/jane/coco"}}, "num_images": 3}),
    "log.jsonl": '{"step": 1, "loss": 2.5}\n',
    "plots/curves.png": "plot",
    "pictures/step-00000010.png": "picture of somebody",
    "trackers.json": "{}",
    ".cache/huggingface/x": "hidden",
    ".config.json.unfinished": "hidden",
}
SHARED = {
    "config.json",
    "modeling_mpformer.py",
    "README.md",
    "recipe.yaml",
    "results.json",
    "log.jsonl",
    "plots/curves.png",
}
SHARED |= {"model.safetensors"}


@dataclass(frozen=True)
class Story:
    hub: HubServer
    folder: Path
    found: dict[str, str]
    without_hub: list[str | None]
    output: str
    errors: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base = tmp_path_factory.mktemp("sharing")
    folder = base / "model"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "model.safetensors").write_bytes(bytes(64))
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    address = {
        "HF_HOME": str(base / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    with HubServer(base / "hub", TOKENS) as hub:
        child = subprocess.Popen(
            [sys.executable, "-c", STORY, str(folder)],
            env=others | address | {"HF_ENDPOINT": hub.url},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output = []
        while (line := child.stdout.readline()) and not line.startswith("{"):
            output.append(line)
    without_hub, errors = child.communicate("go on\n", timeout=120)
    assert child.returncode == 0, errors
    return Story(hub, folder, json.loads(line), json.loads(without_hub), "".join(output), errors)


def test_what_is_wrong_is_a_sentence_before_the_training(story):
    found = story.found
    assert found["no token"] == (
        "`push_to_hub`: there is no token of the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN, with a token that "
        "may write there."
    )
    assert found["wrong token"].startswith("`push_to_hub`: the Hugging Face Hub does not know this token. Run `hf auth")
    assert "this token has no right to write to someone/theirs" in found["theirs"]
    assert "cannot be used for a/b/c (HFValidationError" in found["bad name"]
    assert "someone/model is there already, and public, but is asked to be private" in found["public"]
    assert "the Hugging Face Hub cannot be used for model (ConnectError" in story.without_hub[1]


def test_a_repository_is_made_once_under_the_name_of_the_folder_and_nothing_is_written_to_it(story):
    assert (story.found["prepared"], story.found["again"]) == ("someone/model", "someone/model")
    assert story.found["private"] == "someone/hidden"
    made = {name: repository.private for (_, name), repository in story.hub.repositories.items()}
    assert (made["someone/model"], made["someone/hidden"]) == (False, True)
    assert story.hub.files("someone/hidden") == {}
    assert story.hub.files("someone/theirs") == {}


def test_every_upload_is_one_commit_with_all_that_others_get(story):
    first, *uploads = story.hub.commits("someone/model")
    assert first.files == {}
    assert [commit.title for commit in uploads] == ["Step 10: PQ 1.0", "Step 20: PQ 2.0"]
    assert [story.found[name].rpartition("/")[2] for name in ("first", "second")] == [commit.oid for commit in uploads]
    files = story.hub.files("someone/model")
    assert set(files) == SHARED
    assert files["model.safetensors"] == bytes(99)
    assert files["README.md"].decode() == FILES["README.md"]
    assert len(story.hub.read(uploads[0].files["model.safetensors"])) == 64


def test_folders_of_this_machine_are_not_named(story):
    files = story.hub.files("someone/model")
    assert yaml.safe_load(files["recipe.yaml"]) == {
        "output_dir": "out",
        "dataset_options": {"path": "coco"},
        "model": {"num_queries": 20},
    }
    assert json.loads(files["results.json"]) == {"settings": {"dataset_options": {"path": "coco"}}, "num_images": 3}
    assert not any(b"jane" in content for content in files.values())


def test_a_card_that_a_person_has_written_on_the_hub_stays(story):
    files = story.hub.files("someone/carded")
    assert files["README.md"] == b"# Mine"
    assert set(files) == SHARED


def test_a_failed_upload_is_told_with_the_command_that_makes_up_for_it(story):
    assert (story.found["failed"], story.found["failed on the way"], story.without_hub[0]) == (None, None, None)
    refused, on_the_way, gone = (line for line in story.errors.splitlines() if "was not uploaded" in line)
    command = f"The model is safe in {story.folder}; upload it later: python -m training.sharing {story.folder}"
    assert "this token has no right to write to someone/theirs" in refused
    assert refused.endswith(f"{command} someone/theirs --private")
    assert on_the_way.endswith("The next upload has it all.")
    assert gone.endswith(f"{command} someone/model")
    assert (story.folder / "model.safetensors").read_bytes() == bytes(99)


def test_the_command_uploads_a_finished_training(story):
    assert set(story.hub.files("someone/by_hand")) == SHARED
    assert story.hub.repositories["models", "someone/by_hand"].private
    assert re.search(r"^The model is at http://\S+/someone/by_hand/commit/\w+\.$", story.output, re.MULTILINE)
    assert "holds no trained model. Pass the output_dir" in story.found[str(story.folder.parent)]
    assert "no right to write to stranger/x" in story.found["stranger/x"]


def test_a_training_uploads_its_model_at_each_evaluation_and_at_the_end(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    address = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "HF_TOKEN": "secret"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    words = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--push_to_hub", "evaluation"]
    words += ["--evaluation_steps", "1", "--hub_model_id", "trained", "--model.num_queries", "4"]
    with HubServer(tmp_path / "hub", TOKENS) as hub:
        program = subprocess.run(
            [sys.executable, "-m", "training.train", str(recipe), *words],
            env=others | address | {"HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.returncode == 0, program.stderr
        titles = [commit.title for commit in hub.commits("someone/trained")]
        files = hub.files("someone/trained")
    assert [title for title in titles if title in ("After step 1 of 2", "Trained model")] in (
        ["After step 1 of 2", "Trained model"],
        ["Trained model", "After step 1 of 2"],
    )
    assert "someone/trained" in program.stdout
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"| Steps | 2, of 2 images |" in files["README.md"]
    assert not any(name.startswith(("pictures/", "shared", ".")) for name in files if name != ".gitattributes")
    assert not any(path.name.startswith(".shared") for path in tmp_path.rglob("*"))
