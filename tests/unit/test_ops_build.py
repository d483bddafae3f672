"""Building the library: once, whole or not at all, and with the reason kept where it fails."""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mpformer_hf.ops import build

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(build.explain_platform() is not None, reason="libraries are built on Linux only"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler; there is none"),
]

# Seconds that a child may take; compiling for real takes about six.
PATIENCE = 120


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without libraries, an empty cache, and no compiler but the system's."""
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name in ("CC", "CUDACXX", "CUDA_HOME", "CUDA_PATH", build.SWITCH):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for recipe in build.RECIPES.values():
        for name in (recipe.source, *recipe.also_read):
            (folder / name).write_text("int mpformer_abi_version(void) { return 1; }\n" if name.endswith(".c") else "")
    monkeypatch.setattr(build, "SOURCES", folder)
    build.library_name.cache_clear()
    yield folder
    build.library_name.cache_clear()


def make_compiler(folder: Path, script: str) -> Path:
    """A compiler that notes each call beside itself and then does what the script says."""
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
    compiler.chmod(0o755)
    return compiler


def count_calls(folder: Path) -> int:
    calls = folder / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_the_first_use_builds_and_says_so_and_the_second_finds(sources, own_cache, caplog):
    assert build.find_library("cpu") is None
    with caplog.at_level(logging.INFO):
        path = build.ensure_library("cpu")
    assert path.is_relative_to(own_cache)
    assert [record.message.split(" in ")[0].split(",")[0] for record in caplog.records] == [
        "Compiling the deformable attention for this processor",
        "Compiled",
    ]
    caplog.clear()
    assert build.ensure_library("cpu") == build.find_library("cpu") == path
    assert not caplog.records


def test_the_library_of_the_package_comes_before_the_cache(sources):
    cached = build.build_library("cpu")
    installed = build.build_library("cpu", build.INSTALLED)
    assert installed != cached
    assert build.find_library("cpu") == installed
    assert [file.name for file in build.INSTALLED.iterdir()] == [installed.name]


def test_a_library_of_other_sources_is_never_found(sources):
    old = build.build_library("cpu", build.INSTALLED)
    (sources / "ms_deform_attn_cpu_kernel.h").write_text("/* changed */")
    build.library_name.cache_clear()
    assert build.find_library("cpu") is None
    assert build.ensure_library("cpu").name != old.name


def test_cuda_is_never_built_without_being_asked(sources, own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(make_compiler(tmp_path, "exit 1")))
    assert build.ensure_library("cuda") is None
    assert count_calls(tmp_path) == 0
    assert build.explain_absence("cuda") == "not built yet; run: python -m mpformer_hf.ops build --cuda"


def test_cuda_is_built_for_the_architectures_that_nvcc_knows(sources, tmp_path, monkeypatch):
    script = 'if [ "$1" = --list-gpu-code ]; then echo sm_80; echo sm_90; echo sm_120; fi'
    monkeypatch.setenv("CUDACXX", str(make_compiler(tmp_path, script)))
    build.build_library("cuda")
    command = (tmp_path / "calls").read_text().splitlines()[1]
    codes = [word for word in command.split() if word.startswith("arch=")]
    assert codes == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]


def test_the_switch_stops_the_first_use_but_not_the_command(sources, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.ensure_library("cpu") is None
    assert build.explain_absence("cpu") == "not built, and building is switched off by MPFORMER_BUILD=0"
    assert build.build_library("cpu").is_file()


def test_without_a_compiler_the_reason_names_what_was_looked_for(sources, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert build.ensure_library("cpu") is None
    assert build.explain_absence("cpu") == "no compiler found (looked for: cc, gcc, clang)"
    with pytest.raises(build.BuildError, match=r"no compiler found .* Set CC to another C compiler"):
        build.build_library("cpu")


def test_a_compiler_that_fails_is_asked_once_and_its_words_are_kept(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", str(make_compiler(tmp_path, "echo 'no such instruction' >&2; exit 3")))
    for _ in range(2):
        assert build.ensure_library("cpu") is None
    assert count_calls(tmp_path) == 1
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    reason = build.explain_absence("cpu")
    assert reason.startswith(f"compiling failed: {tmp_path}/compiler ended with status 3. Set CC")
    assert reason.endswith("It said: no such instruction")
    with pytest.raises(build.BuildError, match="no such instruction"):
        build.build_library("cpu")
    assert count_calls(tmp_path) == 2  # whoever asks gets another attempt


def test_a_repaired_compiler_is_tried_again(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(make_compiler(tmp_path, "exit 3")))
    assert build.ensure_library("cpu") is None
    make_compiler(tmp_path, 'exec cc "$@" # repaired')
    assert build.ensure_library("cpu").is_file()


def test_arguments_in_cc_are_handed_on(sources, tmp_path, monkeypatch):
    compiler = make_compiler(tmp_path, 'exec cc "$@"')
    monkeypatch.setenv("CC", f"{compiler} -DEXTRA=1")
    build.build_library("cpu")
    assert (tmp_path / "calls").read_text().startswith("-DEXTRA=1 -O3")


def test_a_compiler_that_is_killed_leaves_nothing_that_is_loaded(sources, tmp_path, monkeypatch):
    script = 'for last; do [ "$previous" = -o ] && echo half > "$last"; previous=$last; done; kill -9 $$'
    monkeypatch.setenv("CC", str(make_compiler(tmp_path, script)))
    with pytest.raises(build.BuildError, match="status -9"):
        build.build_library("cpu")
    assert build.find_library("cpu") is None
    assert not list(tmp_path.rglob("*.so"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_at_once_build_once(tmp_path):
    """With the real sources, from the command line."""
    compiler = make_compiler(tmp_path, 'exec cc "$@"')
    command = [sys.executable, "-c", f"import importlib.util, sys; {LOAD} print(build.build_library('cpu'))"]
    environment = os.environ | {"CC": str(compiler)}
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {child.communicate(timeout=PATIENCE)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).is_file()
    assert count_calls(tmp_path) == 1


# Loads build.py by its path, as the build backend does: without torch and without the package.
LOAD = (
    f"spec = importlib.util.spec_from_file_location('build', {str(ROOT / 'mpformer_hf/ops/build.py')!r}); "
    "build = importlib.util.module_from_spec(spec); sys.modules['build'] = build; spec.loader.exec_module(build); "
)


def test_the_file_needs_neither_torch_nor_the_package():
    code = f"import importlib.util, sys; {LOAD} print('torch' in sys.modules or 'mpformer_hf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_cache_that_cannot_be_written_to_is_replaced_by_a_private_temporary_folder(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = build.ensure_library("cpu")
    assert path.is_relative_to(tmp_path / "temporary")
    assert path.parent.stat().st_mode & 0o077 == 0
    assert build.find_library("cpu") == path


def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(sources):
    path = build.build_library("cpu")
    path.parent.chmod(0o777)
    assert build.find_library("cpu") is None


def test_without_any_folder_the_package_goes_on(sources, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert build.ensure_library("cpu") is None
    assert "No folder for the library can be written to" in caplog.text


def test_waiting_for_the_lock_has_an_end(sources, tmp_path):
    path = tmp_path / "lock"
    expected = pytest.raises(build.BuildError, match=r"has held .*lock for 0 s. If it hangs, end it")
    with build.lock(path), expected, build.lock(path, seconds=0):
        pytest.fail("The lock was given twice.")
    with build.lock(path, seconds=0):
        pass


@pytest.mark.parametrize("machine", ["riscv64", "AMD64"])
def test_other_machines_are_told_what_is_supported(machine, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert build.find_library("cpu") is None
    assert build.explain_absence("cpu") == f"made for Linux on x86_64 and aarch64; this is linux on {machine}"


def test_importing_the_package_compiles_nothing(tmp_path):
    compiler = make_compiler(tmp_path, "exit 1")
    environment = os.environ | {"CC": str(compiler), "CUDACXX": str(compiler)}
    code = "import mpformer_hf, torch; print(torch.ops.mpformer.ms_deform_attn)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=ROOT, capture_output=True)
    assert count_calls(tmp_path) == 0


# ------------------------------------------------------------------------------------------------------------ distributions


def copy_checkout(target: Path) -> Path:
    """What the build needs, without libraries."""
    ignore = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "mpformer_hf", target / "mpformer_hf", ignore=ignore)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, target / name)
    return target


def run_hatchling(folder: Path, target: str, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder / "dist")]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl" if target == "wheel" else "*.tar.gz")
    return path


def libraries_in(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_made_with_a_compiler_holds_library_and_sources_and_is_for_this_platform(tmp_path):
    """From a source distribution, unpacked where git knows nothing."""
    archive = run_hatchling(copy_checkout(tmp_path / "checkout"), "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    wheel = run_hatchling(folder, "wheel")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert libraries_in(wheel) == [f"mpformer_hf/ops/lib/{build.library_name('cpu')}"]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mpformer_hf/ops/csrc/{path.name}" for path in build.SOURCES.iterdir()} <= names
    metadata = next(name for name in names if name.endswith("WHEEL"))
    assert b"Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(metadata)


@pytest.mark.parametrize("environment", [{"PATH": "/nowhere"}, {"MPFORMER_BUILD": "0"}, {"CC": "false"}], ids=str)
def test_a_wheel_made_without_a_compiler_is_pure_and_its_package_works(tmp_path, environment):
    wheel = run_hatchling(copy_checkout(tmp_path / "checkout"), "wheel", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_in(wheel) == []
    if "PATH" not in environment:
        return
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, mpformer_hf.deformable_attention as d; from pathlib import Path; "
        f"assert Path(d.__file__).is_relative_to({str(tmp_path)!r}); "
        "v = torch.randn(1, 6, 2, 4, requires_grad=True); l = torch.rand(1, 3, 2, 1, 2, 2); w = torch.rand(1, 3, 2, 1, 2); "
        "o = d.ms_deform_attn(v, [(2, 3)], l, w); o.sum().backward(); "
        "print((o - d.ms_deform_attn_reference(v, [(2, 3)], l, w)).abs().max().item() < 1e-6)"
    )
    child = {**os.environ, **environment, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=child, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_an_editable_installation_builds_into_the_source_tree_and_removes_what_is_outdated(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    outdated = checkout / "mpformer_hf" / "ops" / "lib" / "libmpformer_msda_cpu-0123456789ab.so"
    outdated.parent.mkdir()
    outdated.write_text("")
    code = (
        "import os, sys; os.chdir(sys.argv[1]); from hatchling.build import build_editable; "
        "print(build_editable(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(checkout), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    assert [file.name for file in outdated.parent.iterdir()] == [build.library_name("cpu")]
