"""Compile csrc/ into shared libraries, and find them again. Standard library only: the build backend loads this file by its path.

A library's name holds a hash of its sources and flags, so one of other sources is never loaded. It lies in the package's own
folder `lib/` when the package was installed on a machine with a compiler, else in the user's cache, where it is built at first use
(CPU) or when asked for (CUDA): `$XDG_CACHE_HOME/mpformer_hf/<hash of sources, flags and compiler>/`.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("mpformer_hf.ops")

KINDS = ("cpu", "cuda")
HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
INSTALLED = HERE / "lib"
SWITCH = "MPFORMER_BUILD"  # "0": never compile without being asked
LOCK_SECONDS = 300.0
MACHINES = ("x86_64", "aarch64")
GPU_ARCHITECTURES = (75, 80, 86, 89, 90)  # machine code; newer GPUs translate the last one's PTX


class BuildError(RuntimeError):
    """Compiling failed; the message says what was run, what came back and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How one kind of library is made."""

    source: str
    also_read: tuple[str, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    hint: str


RECIPES = {
    "cpu": Recipe(
        "ms_deform_attn_cpu.c",
        ("ms_deform_attn.h", "ms_deform_attn_cpu_kernel.h"),
        ("-O3", "-std=c11", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden"),
        ("-lm", "-ldl", "-lpthread"),
        "Set CC to another C compiler (gcc 9 or newer, clang 12 or newer), or go on with plain PyTorch.",
    ),
    "cuda": Recipe(
        "ms_deform_attn_cuda.cu",
        ("ms_deform_attn.h",),
        ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"),
        (),
        "Set CUDACXX or CUDA_HOME to a CUDA toolkit (12.8 or newer), or go on with plain PyTorch.",
    ),
}


# ----------------------------------------------------------------------------------------------------------------- finding


def find_library(kind: str) -> Path | None:
    """The library of the present sources, in the package's folder or in the cache. Starts no process."""
    if explain_platform() is not None:
        return None
    name = library_name(kind)
    folders = [INSTALLED]
    compiler = find_compiler(kind)
    if compiler is not None:
        folders += [folder for folder in cache_folders(kind, compiler) if is_private(folder)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@functools.cache
def library_name(kind: str) -> str:
    """File name, with a hash of sources and flags."""
    recipe = RECIPES[kind]
    parts = [(SOURCES / name).read_bytes() for name in (recipe.source, *recipe.also_read)]
    parts += [" ".join(recipe.flags + recipe.libraries).encode(), platform.machine().encode()]
    return f"libmpformer_msda_{kind}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:12]}.so"


def find_compiler(kind: str) -> list[str] | None:
    """The compiler's command, or None."""
    return next(
        (
            [found, *arguments]
            for program, *arguments in _compiler_candidates(kind)
            if (found := shutil.which(program)) is not None
        ),
        None,
    )


def _compiler_candidates(kind: str) -> list[list[str]]:
    """Commands in order of preference. A variable of the environment is the only one if it is set."""
    if kind == "cpu":
        own = shlex.split(os.environ.get("CC", ""))
        return [own] if own else [["cc"], ["gcc"], ["clang"]]
    own = shlex.split(os.environ.get("CUDACXX", ""))
    if own:
        return [own]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [home] if home else []
    return [*([str(Path(folder) / "bin" / "nvcc")] for folder in homes), ["nvcc"], ["/usr/local/cuda/bin/nvcc"]]


def cache_folders(kind: str, compiler: list[str]) -> list[Path]:
    """Where a library that this compiler makes may lie: the user's cache, then a private temporary folder."""
    status = Path(compiler[0]).resolve().stat()
    identity = [library_name(kind), *compiler, Path(compiler[0]).resolve(), status.st_mtime_ns, status.st_size]
    key = hashlib.sha256("|".join(map(str, identity)).encode()).hexdigest()[:16]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    temporary = Path(tempfile.gettempdir()) / f"mpformer_hf-{os.getuid()}"
    return [user_cache / "mpformer_hf" / key, temporary / key]


def is_private(folder: Path) -> bool:
    """Whether nobody else can put a library there."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


# ---------------------------------------------------------------------------------------------------------------- building


def ensure_library(kind: str) -> Path | None:
    """Find the library; build the CPU's once if there is none. None if that cannot be: see `explain_absence`."""
    found = find_library(kind)
    if found is not None or kind != "cpu" or explain_refusal(kind) is not None or read_failure(kind) is not None:
        return found
    start = time.monotonic()
    logger.info("Compiling the deformable attention for this processor, once; it takes some seconds.")
    try:
        path = build_library(kind)
    except BuildError as error:
        logger.warning(
            "The deformable attention could not be compiled and runs on plain PyTorch, several times slower. "
            "`python -m mpformer_hf.ops doctor` shows why: %s",
            str(error).splitlines()[0],
        )
        return None
    logger.info("Compiled in %.0f s: %s", time.monotonic() - start, path)
    return path


def build_library(kind: str, destination: Path | None = None, *, force: bool = False) -> Path:
    """Compile, unless the library is there already. Several processes may do so at once: one works, the others wait.

    Args:
        kind: "cpu" or "cuda".
        destination: folder for the library; None is the user's cache.
        force: compile again even if the library is there.

    Returns:
        The library.

    Raises:
        BuildError: there is no compiler, it fails, or no folder can be written to.
    """
    refusal = explain_refusal(kind, asked=True)
    compiler = find_compiler(kind)
    if compiler is None or refusal is not None:
        raise BuildError(f"{refusal}. {RECIPES[kind].hint}")
    if destination is None:
        folder = make_private_folder(cache_folders(kind, compiler))
    else:
        folder = destination
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / library_name(kind)
    try:
        with lock(folder / "lock"):
            if force or not path.is_file():
                _compile(kind, compiler, path)
    except BuildError as error:
        if destination is None:
            (folder / _failure_name(kind)).write_text(str(error))
        raise
    finally:
        if destination is not None:  # it may be packed into a wheel
            (folder / "lock").unlink(missing_ok=True)
    (folder / _failure_name(kind)).unlink(missing_ok=True)
    return path


def _compile(kind: str, compiler: list[str], path: Path) -> None:
    recipe = RECIPES[kind]
    # Under its name only when it is whole: what a killed compiler leaves behind is never loaded.
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        flags = [*recipe.flags, *(_gpu_flags(compiler) if kind == "cuda" else [])]
        command = [*compiler, *flags, str(SOURCES / recipe.source), "-o", temporary, *recipe.libraries]
        _run(command, recipe.hint)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str], hint: str) -> str:
    """Output of a command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}. {hint}") from error
    if done.returncode != 0:
        last_lines = "\n".join((done.stderr + done.stdout).strip().splitlines()[-15:])
        raise BuildError(
            f"{command[0]} ended with status {done.returncode}. {hint}\nCommand: {shlex.join(command)}\n{last_lines}"
        )
    return done.stdout


def _gpu_flags(compiler: list[str]) -> list[str]:
    """Machine code for each architecture that this nvcc knows, and PTX for newer GPUs."""
    known = _run([*compiler, "--list-gpu-code"], RECIPES["cuda"].hint).split()
    chosen = [number for number in GPU_ARCHITECTURES if f"sm_{number}" in known]
    if not chosen:
        raise BuildError(f"{compiler[0]} knows none of the architectures {GPU_ARCHITECTURES}. {RECIPES['cuda'].hint}")
    codes = [f"arch=compute_{number},code=sm_{number}" for number in chosen]
    codes.append(f"arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    return [part for code in codes for part in ("-gencode", code)]


def make_private_folder(candidates: list[Path]) -> Path:
    """The first folder that can be made and written to, by nobody else."""
    problems = []
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
            continue
        if is_private(folder):
            return folder
        problems.append(f"{folder}: other users can write to it")
    raise BuildError(
        f"No folder for the library can be written to ({'; '.join(problems)}). Set XDG_CACHE_HOME to one that can."
    )


@contextlib.contextmanager
def lock(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold a file's lock. The system releases it when a process ends, however it ends."""
    import fcntl  # noqa: PLC0415 - other systems than Linux, which have none, come here never

    with path.open("w") as file:
        deadline, is_waiting = time.monotonic() + seconds, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_waiting:
                    logger.info("Waiting for another process that compiles the deformable attention.")
                    is_waiting = True
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"Another process has held {path} for {seconds:.0f} s. If it hangs, end it, or set {SWITCH}=0."
                    ) from None
                time.sleep(0.05)
        yield


# -------------------------------------------------------------------------------------------------------------- explaining


def explain_absence(kind: str) -> str:
    """One line why there is no library."""
    refusal = explain_refusal(kind)
    if refusal is not None:
        return refusal
    failure = read_failure(kind)
    if failure is not None:
        first, last = failure.splitlines()[0], failure.splitlines()[-1]
        return f"compiling failed: {first}" + (f" It said: {last.strip()}" if last != first else "")
    return f"not built yet; run: python -m mpformer_hf.ops build{' --cuda' if kind == 'cuda' else ''}"


def explain_refusal(kind: str, *, asked: bool = False) -> str | None:
    """One line why nothing can be compiled here, or None. What is `asked` for is not switched off."""
    platform_refusal = explain_platform()
    if platform_refusal is not None:
        return platform_refusal
    if os.environ.get(SWITCH) == "0" and not asked:
        return f"not built, and building is switched off by {SWITCH}=0"
    if find_compiler(kind) is None:
        names = ", ".join(shlex.join(candidate) for candidate in _compiler_candidates(kind))
        return f"no compiler found (looked for: {names})"
    return None


def explain_platform() -> str | None:
    """One line why this system is not supported, or None."""
    if sys.platform.startswith("linux") and platform.machine() in MACHINES:
        return None
    return f"made for Linux on {' and '.join(MACHINES)}; this is {sys.platform} on {platform.machine()}"


def read_failure(kind: str) -> str | None:
    """What an earlier build with these sources, flags and compiler failed with."""
    compiler = find_compiler(kind)
    for folder in cache_folders(kind, compiler) if compiler is not None else []:
        failure = folder / _failure_name(kind)
        with contextlib.suppress(OSError):
            return failure.read_text()
    return None


def _failure_name(kind: str) -> str:
    return f"{kind}.failed.txt"
