"""The self-test of kernels: real child processes try kernels that are right, wrong, or end their process."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpformer_hf import kernel_self_test
from mpformer_hf.deformable_attention import ms_deform_attn_reference
from mpformer_hf.kernel_self_test import Candidate, Verdict, draw_inputs, examine, find_fault, verdict_file

CPU = torch.device("cpu")
PACKAGE = Path(kernel_self_test.__file__).parent
# The opener of each kind of kernel, beside copies of the files that a Hub user has.
OPENERS = """
import os, signal, sys, time
import torch
from .deformable_attention import ms_deform_attn_reference
from .kernel_self_test import Trial

def open_kernel(arguments, device):
    with open(arguments["count"], "a") as file:
        file.write("x")
    if arguments["kind"] == "missing":
        raise ImportError("libcudart.so.11.0: cannot open shared object file\\nmore lines")

    def run(value, shapes, locations, weights):
        kind = arguments["kind"]
        print("chatter of a kernel" * 10000)
        output = ms_deform_attn_reference(value, shapes, locations, weights)
        if kind == "exits":
            os._exit(0)
        if kind == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hangs":
            time.sleep(600)
        if kind == "raises":
            raise RuntimeError("no kernel image is available for execution on the device")
        if kind == "wrong in bfloat16" and value.dtype == torch.bfloat16:
            return output * 1.1
        return output

    return Trial(run, notes={"offline": os.environ.get("PROBE"), "torch": torch.__version__})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat copy of the files, as transformers makes it for users of the Hub, without the package around them."""
    folder = tmp_path_factory.mktemp("flat")
    for name in (
        "kernel_self_test",
        "deformable_attention",
        "embedding_bag_attention",
        "hub_kernel",
        "position_embedding",
    ):
        shutil.copy(PACKAGE / f"{name}.py", folder)
    (folder / "openers.py").write_text(OPENERS)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, nothing remembered, and children that find their files in the flat folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_self_test, "__file__", str(folder / "kernel_self_test.py"))
    kernel_self_test._remembered.clear()
    yield tmp_path / "cache" / "mpformer_hf" / "self_tests"
    kernel_self_test._remembered.clear()


@pytest.fixture
def candidate(tmp_path: Path):
    """Make a candidate of a kind; `openings` counts how often one was opened."""

    def make(kind: str, version: str | None = "1") -> Candidate:
        arguments = {"kind": kind, "count": str(tmp_path / "count")}
        return Candidate("probe", version, "openers:open_kernel", arguments, {"PROBE": "yes"})

    return make


@pytest.fixture
def openings(tmp_path: Path):
    return lambda: len((tmp_path / "count").read_text())


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    ("kind", "reason", "is_kept"),
    [
        ("wrong in bfloat16", "wrong numbers: the output of a value of torch.bfloat16 is off by 1.", True),
        ("exits", "it ended its process with exit status 0 while it ran", True),
        ("crashes", "it ended its process with signal SIGSEGV while it ran", True),
        ("missing", "it cannot be loaded: ImportError: libcudart.so.11.0: cannot open shared object file", False),
    ],
)
def test_bad_kernels_are_told_from_good_ones(candidate, cache: Path, kind: str, reason: str, is_kept: bool):
    verdict = examine(candidate(kind), CPU)
    assert not verdict.is_good
    assert verdict.reason.startswith(reason)
    assert "\n" not in verdict.reason
    assert len(list(cache.glob("*"))) == is_kept


@pytest.mark.parametrize(
    ("status", "stage", "reason", "is_final"),
    [
        (5, "start", "it ended its process with exit status 5 while it was loaded", True),
        (-11, "start", "it ended its process with signal SIGSEGV while it was loaded", True),
        (-9, "run", "it ended its process with signal SIGKILL while it ran", False),  # memory may have run out
        (-250, "run", "it ended its process with signal 250 while it ran", True),
        (None, "start", "it did not finish within 300 s, stopped while it was loaded", True),
    ],
)
def test_ends_of_a_process_are_put_in_words(status: int | None, stage: str, reason: str, is_final: bool):
    verdict = Verdict(is_good=False, reason=reason)
    assert kernel_self_test.judge(status, {"stage": stage}, 300.0) == (verdict, is_final)


def test_a_kernel_that_hangs_is_stopped(candidate):
    start = time.monotonic()
    verdict = examine(candidate("hangs"), CPU, timeout=6)
    assert time.monotonic() - start < 60  # it sleeps for ten minutes
    assert not verdict.is_good
    # On a slow machine it does not even come to the kernel.
    assert "did not finish within 6 s" in verdict.reason or "time limit" in verdict.reason


def test_the_verdict_on_a_good_kernel_is_asked_for_once_and_kept(candidate, openings, cache: Path):
    good = candidate("good")
    verdict = examine(good, CPU)
    assert verdict == Verdict(is_good=True, notes={"offline": "yes", "torch": torch.__version__})
    assert examine(good, CPU) is verdict
    kernel_self_test._remembered.clear()  # as in another process
    assert examine(good, CPU) == verdict
    assert openings() == 1
    (file,) = cache.iterdir()
    identity = json.loads(file.read_text())["identity"]
    assert identity["torch"] == torch.__version__
    assert identity["version"] == "1"

    another = kernel_self_test.identify(replace(good, version="2"), CPU)
    assert kernel_self_test.read_verdict(another) is None
    file.write_text("{ half of a fi")
    assert kernel_self_test.read_verdict(identity) is None


def test_a_cache_that_cannot_be_written_does_no_harm(candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    identity = kernel_self_test.identify(candidate("good"), CPU)
    kernel_self_test.keep_verdict(identity, Verdict(is_good=True))
    assert kernel_self_test.read_verdict(identity) is None


def test_a_kernel_without_a_version_is_tried_but_not_kept(candidate, cache: Path):
    verdict = examine(candidate("raises", version=None), CPU)
    assert verdict.reason == "it failed: RuntimeError: no kernel image is available for execution on the device"
    assert not cache.exists()


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_where_no_child_can_run_the_kernel_is_not_blamed(
    candidate, cache: Path, python: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "executable", shutil.which(python) or python)
    verdict = examine(candidate("good"), CPU)
    assert not verdict.is_good
    assert "self-test" in verdict.reason
    assert not cache.exists()


def test_a_child_starts_no_child(candidate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(kernel_self_test.IN_CHILD, "1")
    assert examine(candidate("good"), CPU).reason == "this process is itself a self-test"


@pytest.mark.parametrize("change", ["torch", "python", "device", "test"])
def test_a_verdict_depends_on_the_surroundings(candidate, change: str, monkeypatch: pytest.MonkeyPatch):
    identity = kernel_self_test.identify(candidate("good"), CPU)
    assert verdict_file({**identity, change: "another"}) != verdict_file(identity)


def test_readers_never_see_half_of_a_verdict(candidate, cache: Path):
    identity = kernel_self_test.identify(candidate("good"), CPU)
    verdict = Verdict(is_good=True, notes={"text": "x" * 100_000})
    kernel_self_test.keep_verdict(identity, verdict)
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(kernel_self_test.keep_verdict, identity, verdict) for _ in range(50)]
        while not all(writer.done() for writer in writers):
            assert kernel_self_test.read_verdict(identity) == verdict
    assert [file.suffix for file in cache.iterdir()] == [".json"]


# ------------------------------------------------------------------------------------------------------------- the comparison


def test_the_definition_passes():
    assert find_fault(ms_deform_attn_reference, CPU) is None


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("output", "the output of a value of torch.float32 is off by"),
        ("value", "the gradient of the value of a value of torch.float32"),
        ("locations", "the gradient of the locations"),
        ("weights", "the gradient of the weights"),
    ],
)
def test_each_number_is_compared(what: str, reason: str):
    def run(value, shapes, locations, weights):
        scaled = {"value": value, "locations": locations, "weights": weights}
        if what != "output":
            scaled[what] = scaled[what] * 1.01 - scaled[what].detach() * 0.01  # the same number, another derivative
        output = ms_deform_attn_reference(scaled["value"], shapes, scaled["locations"], scaled["weights"])
        return output * 1.001 if what == "output" else output

    assert reason in find_fault(run, CPU)


def test_numbers_that_are_not_finite_do_not_pass():
    def run(*inputs):
        return ms_deform_attn_reference(*inputs) * float("nan")

    assert "off by nan" in find_fault(run, CPU)


def test_another_shape_does_not_pass():
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        find_fault(lambda *inputs: ms_deform_attn_reference(*inputs).flatten(2), CPU)


def test_a_kernel_that_lets_bad_locations_spoil_others_does_not_pass():
    def run(value, shapes, locations, weights):
        spoiled = 0 * locations.sum() if not locations.isfinite().all() else 0
        return ms_deform_attn_reference(value, shapes, locations, weights) + spoiled

    assert find_fault(run, CPU) == "locations that are not finite spoil other queries"


def test_inputs_are_the_same_in_every_process_and_keep_away_from_centres():
    first, second = (draw_inputs(kernel_self_test.SMALL, 2, 50, torch.float32, CPU) for _ in range(2))
    assert torch.equal(first.locations, second.locations)
    sizes = torch.tensor([(width, height) for height, width in kernel_self_test.SMALL])[:, None]
    fractions = (first.locations.double() * sizes - 0.5) % 1
    assert fractions.min() > 0.05
    assert fractions.max() < 0.95
    assert (first.locations < 0).any()
    assert (first.locations > 1).any()
