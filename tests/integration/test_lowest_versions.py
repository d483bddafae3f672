"""The oldest versions that are supported, among them the only ones on which transformers can attach a kernel of the hub.

They cannot live in the environment of the other tests. `tests/run.sh` installs them beside it, and
`on_lowest_versions.py` runs in a Python of its own that sees them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("MPFORMER_LOWEST_VERSIONS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER,
        reason="needs MPFORMER_LOWEST_VERSIONS, a folder made by scripts/install_lowest_versions.sh; tests/run.sh sets it",
    ),
]
FLOAT32_ONCE = [
    ["torch.float32", "torch.float32", "torch.float32", 1, 1]
]  # types of the arguments, images, images at once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lowest")
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER),
        "HF_HOME": str(folder / "hub"),
        "XDG_CACHE_HOME": str(folder),
    }
    environment.pop("MPFORMER_MSDA_BACKEND", None)
    child = subprocess.run(
        [sys.executable, "-m", "tests.integration.on_lowest_versions", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-5000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_the_versions_are_the_lowest(found: dict[str, Any]):
    assert found["versions"][:2] == ["5.17.0", "0.16.2"]
    assert found["versions"][2].startswith("1.")


def test_a_saved_model_is_loaded_and_computes_the_same(found: dict[str, Any]):
    assert found["basics"] == {"difference": 0.0, "model type": "mpformer", "pixels": [1, 3, 64, 96]}


def test_decorator_attached(found: dict[str, Any]):
    assert found["kernels are available"]
    assert found["layer name"] == "MultiScaleDeformableAttention"
    assert found["absence"] == "kernels-community/deformable-detr is made for CUDA, not for cpu"


def test_nothing_is_touched_without_use_kernels(found: dict[str, Any]):
    assert found["without use_kernels"] == {
        "is attached": False,
        "calls": None,
        "types around": ["torch.float32", "torch.float32"],
        "difference": 0.0,
        "messages": [],
        "keys": True,
    }


def test_use_kernels_runs_the_kernel(found: dict[str, Any]):
    good = found["good"]
    assert good["calls"] == FLOAT32_ONCE
    assert good["messages"] == []
    assert good["difference"] < 1e-5
    assert good["keys"]


def test_the_kernel_of_a_bfloat16_model_gets_float32_and_its_output_is_cast_back(found: dict[str, Any]):
    half = found["good in bfloat16"]
    assert half["calls"] == FLOAT32_ONCE
    assert half["types around"] == [
        "torch.bfloat16",
        "torch.bfloat16",
    ]  # of the value, and of what is projected afterwards
    assert half["messages"] == []
    assert half["difference"] < 0.1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong", "off by 1.0e-02"),
        ("exiting", "exit status 3 while it ran"),
        ("deadly", "exit status 17 while it was loaded"),
    ],
)
def test_a_bad_kernel_is_tried_in_another_process_and_never_loaded_into_this_one(
    found: dict[str, Any], kind: str, reason: str
):
    bad = found[kind]
    assert not bad["is attached"]
    assert bad["difference"] == 0.0
    assert len(bad["messages"]) == 1
    assert reason in bad["messages"][0]


@pytest.mark.parametrize(("kind", "reason"), [("missing", "Could not find kernel"), ("offline", "offline mode")])
def test_a_kernel_that_cannot_be_had_does_not_keep_a_model_from_being_loaded(
    found: dict[str, Any], kind: str, reason: str
):
    absent = found[kind]
    assert not absent["is attached"]
    assert absent["difference"] == 0.0
    assert len(absent["messages"]) == 1
    assert reason in absent["messages"][0]


def test_doctor_finds_a_kernel_that_was_downloaded_and_only_such_a_one(found: dict[str, Any]):
    doctor = found["doctor"]
    assert doctor["before"].startswith("kernels-community/deformable-detr is not in the local cache")
    assert doctor["file"].endswith(f"/snapshots/{'0123456789' * 4}/build/torch-universal/__init__.py")
    assert doctor["verdict"]["is_good"]
    assert doctor["difference"] < 1e-5


def test_training_with_a_kernel_gives_the_same_loss_and_gradients(found: dict[str, Any]):
    training = found["training"]
    assert training["calls"] == 1
    assert training["losses"][1] == pytest.approx(training["losses"][0], rel=1e-5)
    assert training["difference"] < 1e-4
