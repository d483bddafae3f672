"""The doctor tells what is there, what is not and why, and never dies of what it finds."""

import json
import logging
import subprocess
import sys

import pytest
import torch

from mpformer_hf.ops import __main__ as command_line
from mpformer_hf.ops import backends, build, doctor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHAPES", ((4, 4), (8, 8)))
    monkeypatch.setattr(doctor, "MIN_SECONDS", 0.0)
    monkeypatch.delenv("MPFORMER_MSDA_BACKEND", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mpformer_hf.ops", *arguments])
    return command_line.main()


def test_every_backend_is_measured_or_has_a_reason():
    report = doctor.examine(CPU)
    assert tuple(finding.name for finding in report.findings) == backends.BACKENDS
    for finding in report.findings:
        if finding.absence is None:
            assert finding.error < 1e-5
            assert 0 < finding.forward_ms < finding.both_ms
        else:
            assert "\n" not in finding.absence
    reference = report.findings[-1]
    assert reference.absence is None


def test_the_error_is_seen(monkeypatch: pytest.MonkeyPatch):
    exact = backends.EmbeddingBagBackend.run
    monkeypatch.setattr(backends.EmbeddingBagBackend, "run", lambda *arguments: 1.5 * exact(*arguments))
    (finding,) = [finding for finding in doctor.examine(CPU).findings if finding.name == "embedding_bag"]
    assert finding.error == pytest.approx(0.5, rel=1e-4)


def test_a_backend_that_raises_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def explode(*_) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(backends.EmbeddingBagBackend, "run", explode)
    assert run(monkeypatch, "doctor", "--device", "cpu") == 0
    assert "embedding_bag failed: RuntimeError: no such instruction\n" in capsys.readouterr().out


def test_the_table_marks_what_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "embedding_bag")
    assert run(monkeypatch, "doctor", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["embedding_bag"]
    assert lines[-1] == "In use: embedding_bag (forced by MPFORMER_MSDA_BACKEND)."
    assert f"torch {torch.__version__}," in " ".join(" ".join(lines).split())


def test_a_forced_backend_that_cannot_be_used_is_the_conclusion(monkeypatch, capsys):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "compiled")
    monkeypatch.setattr(backends.CompiledBackend, "explain_absence", lambda self, device: "it rains")
    assert run(monkeypatch, "doctor", "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "compiled      it rains" in out
    assert out.splitlines()[-1].startswith(
        "None can be used: MPFORMER_MSDA_BACKEND=compiled cannot be used on cpu: it rains."
    )


def test_an_unknown_name_is_the_conclusion_too(monkeypatch, capsys):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "fast")
    assert run(monkeypatch, "doctor", "--device", "cpu") == 1
    assert "'fast' is no backend. Choose one of: hub, deformops," in capsys.readouterr().out


def test_json_has_no_numbers_where_nothing_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(backends.EmbeddingBagBackend, "explain_absence", lambda self, device: "it rains")
    assert run(monkeypatch, "doctor", "--device", "cpu", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (finding,) = [finding for finding in report["findings"] if finding["name"] == "embedding_bag"]
    expected = {"name": "embedding_bag", "absence": "it rains", "error": None, "forward_ms": None, "both_ms": None}
    assert finding == expected
    assert report["chosen"] in backends.BACKENDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_explained(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "--device", "cuda") == 1
    error = capsys.readouterr().err
    assert error.startswith("The device 'cuda' cannot be used: ")
    assert error.endswith("Try --device cpu.\n")


def test_build_says_where_the_library_is(monkeypatch, capsys, tmp_path):
    library = tmp_path / "library.so"
    monkeypatch.setattr(build, "find_library", lambda kind: None)
    monkeypatch.setattr(build, "build_library", lambda kind, force: library)
    assert run(monkeypatch, "build") == 0
    out = capsys.readouterr().out
    assert out.startswith("Compiling the deformable attention for CPUs...\nDone in 0 s: ")
    assert str(library) in out
    monkeypatch.setattr(build, "find_library", lambda kind: library)
    assert run(monkeypatch, "build", "--cuda") == 0
    assert capsys.readouterr().out == f"It is there already: {library}\nAdd --force to compile it again.\n"


def test_build_that_fails_gives_the_reason_and_status_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(build, "INSTALLED", tmp_path)
    assert run(monkeypatch, "build") == 1
    assert "no compiler found (looked for: no-such-compiler). Set CC" in capsys.readouterr().err


def test_help_names_the_variables():
    for command, expected in [("doctor", "MPFORMER_MSDA_BACKEND"), ("build", "CUDACXX")]:
        done = subprocess.run(
            [sys.executable, "-m", "mpformer_hf.ops", command, "--help"], capture_output=True, text=True, check=True
        )
        assert expected in done.stdout
