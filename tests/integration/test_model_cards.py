"""Model cards in use: their code runs as it is printed, and a repository gets a card without losing a person's."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from mpformer_hf import MPFormerImageProcessor
from mpformer_hf.model_card import render_card
from mpformer_hf.model_facts import LICENCES
from mpformer_hf.model_inspection import facts_of_model
from tests.factories import tiny_model
from tests.hub_server import HubServer
from tests.unit.test_readme import blocks_of

ROOT = Path(__file__).parents[2]
TASKS = ("panoptic", "instance", "semantic")

RUN_BLOCKS = """
import json, sys
from pathlib import Path

found = {}
for task, blocks in json.loads(Path("blocks.json").read_text()).items():
    names = {}
    for number, source in enumerate(blocks):
        exec(compile(source, f"{task}, block {number}", "exec"), names)
        if number == 0:
            first = names["model"], names["outputs"], names["result"]
    found[task] = {
        "keys": sorted(first[2]) if isinstance(first[2], dict) else list(first[2].shape),
        "same": bool((names["model"](**names["processor"](names["image"], return_tensors="pt")).class_queries_logits
                      == first[1].class_queries_logits).all()),
        "segments": [sorted(segment) for segment in names["segments"]],
    }
Path("found.json").write_text(json.dumps(found))
"""

PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub import create_repo, upload_file, upload_folder
from mpformer_hf import MPFormerForUniversalSegmentation
from mpformer_hf.model_card import attach_card, card_for_model

folder = Path(sys.argv[1])
first, second = ((folder / f"{name}.md").read_text() for name in ("first", "second"))
found = {}
create_repo("someone/tiny")
found["empty"] = attach_card("someone/tiny", first)
found["ours"] = attach_card("someone/tiny", second)
create_repo("someone/theirs")
upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="someone/theirs")
found["theirs"] = attach_card("someone/theirs", first)

create_repo("someone/start")
upload_folder(folder_path=folder / "start", repo_id="someone/start")
model = MPFormerForUniversalSegmentation.from_pretrained("someone/start")
found["unchanged"] = card_for_model(model)
model.class_predictor.bias.data.zero_()
found["changed"] = card_for_model(model)
(folder / "found.json").write_text(json.dumps(found))
"""


def run_child(code, *words, folder=ROOT, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.slow
def test_the_code_on_a_card_runs_for_every_task(model, tmp_path):
    folder = tmp_path / "here"
    model.save_pretrained(folder / "tiny")
    sizes = {"shortest_edge": 64, "longest_edge": 96}
    MPFormerImageProcessor(size=sizes, score_threshold=0.0).save_pretrained(folder / "tiny")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / "image.jpg")
    blocks = {}
    for task in TASKS:
        text = str(render_card(facts_of_model(model, tasks=(task,), name="tiny")))
        python = [block.source for block in blocks_of(text) if block.language == "python"]
        assert python[0].count('"OWNER/tiny"') == 1
        blocks[task] = [python[0].replace("OWNER/tiny", "./tiny"), *python[1:]]
    (folder / "blocks.json").write_text(json.dumps(blocks))
    child = run_child(RUN_BLOCKS, folder=folder, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert child.returncode == 0, child.stderr
    found = json.loads((folder / "found.json").read_text())
    assert {"segmentation", "segments_info"} <= set(found["panoptic"]["keys"])
    assert {"masks", "scores", "labels", "boxes"} <= set(found["instance"]["keys"])
    assert found["semantic"]["keys"] == [50, 70]
    for task in TASKS:
        assert found[task]["same"]
        assert found[task]["segments"]
        assert all(segment == ["label", "mask", "score"] for segment in found[task]["segments"])


@pytest.mark.slow
def test_a_repository_gets_a_card_keeps_a_persons_and_passes_on_its_licence(model, tmp_path):
    facts = facts_of_model(model, name="tiny")
    released = dataclasses.replace(facts, name="start", licence=LICENCES["mpformer"])
    texts = {
        "first": str(render_card(facts)),
        "second": str(render_card(dataclasses.replace(facts, tasks=("panoptic",)))),
        "start/README": str(render_card(released)),
    }
    model.save_pretrained(tmp_path / "start")
    for name, text in texts.items():
        (tmp_path / f"{name}.md").write_text(text)
    with HubServer(tmp_path / "hub", {"secret": "someone"}) as hub:
        cache = str(tmp_path / "hf")
        address = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1", "HF_HOME": cache}
        child = run_child(PUSH, str(tmp_path), **address)
        assert child.returncode == 0, child.stderr
        assert hub.files("someone/tiny")["README.md"].decode() == texts["second"]
        assert hub.files("someone/theirs")["README.md"] == b"# Mine"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["empty"], found["ours"], found["theirs"]) == (True, True, False)
    assert found["unchanged"] == texts["start/README"]
    data = ModelCard(found["changed"]).data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "someone/start")
    assert "The weights began as those of `someone/start`" in found["changed"]


def test_the_command_checks_the_cards_of_this_repository():
    child = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::RuntimeWarning",
            "-m",
            "mpformer_hf.model_card",
            "render",
            "model_cards/",
            "--check",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "Every card is up to date.\n", "")
