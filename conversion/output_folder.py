"""Folders and files that appear complete or not at all.

Everything is written beside its place, into a folder or a file whose name begins with a dot, and renamed when it is complete. A
process that is killed leaves that behind, and the place as it was.
"""

import ctypes
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from conversion import ConversionError

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # of Linux: two names change places in one step


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when the block ends well and vanishes when it does not.

    Args:
        target: where the result is to be; its parents are made.
        overwrite: True replaces a folder that an earlier conversion has written, once the new one is complete.
        inputs: files that are read; a folder that holds one of them is never replaced.

    Raises:
        ConversionError: see `check_folder`; or the folder cannot be written.
    """
    target = target.resolve()
    check_folder(target, overwrite=overwrite, inputs=inputs)
    with _new_place(target) as unfinished:
        unfinished.mkdir()
        yield unfinished
        check_folder(target, overwrite=overwrite, inputs=inputs)
        if target.exists() and any(target.iterdir()):
            _exchange(unfinished, target)
        else:
            unfinished.replace(target)


@contextmanager
def new_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file to write, which takes the place of `target` when the block ends well and vanishes when it does not.

    Raises:
        ConversionError: see `check_file`; or the file cannot be written.
    """
    target = target.resolve()
    check_file(target, overwrite=overwrite)
    with _new_place(target) as unfinished:
        yield unfinished
        check_file(target, overwrite=overwrite)
        unfinished.replace(target)


def check_folder(target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Refuse a place that a converted model cannot take, or that holds what nobody wants to lose."""
    target = target.resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(
            f"Expected a folder to write into, but `{target}` is a file. Choose another `--output-dir`."
        )
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not overwrite:
        raise ConversionError(
            f"`{target}` is not empty. Choose another `--output-dir`, or pass `--overwrite` to replace what an earlier conversion wrote."
        )
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders or not (target / "config.json").is_file():
        found = f"the folder `{folders[0]}`" if folders else "no config.json"
        raise ConversionError(
            f"`--overwrite` replaces folders of converted models, but `{target}` has {found}. Remove it yourself, or choose another "
            "`--output-dir`."
        )
    for file in inputs:
        if file.resolve().parent == target:
            raise ConversionError(
                f"`{file}` is read, but stands in `{target}`, which `--overwrite` would replace. Choose another `--output-dir`."
            )


def check_file(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that a converted file cannot take."""
    if target.is_dir():
        raise ConversionError(f"Expected a file to write, but `{target}` is a folder. Name a file in it.")
    if target.exists() and not overwrite:
        raise ConversionError(f"`{target}` is there already. Choose another `--output`, or pass `--overwrite`.")


@contextmanager
def step(message: str) -> Iterator[None]:
    """Say on standard error what is being done, and how long it took."""
    print(f"{message} ...", end=" ", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------- parts


@contextmanager
def _new_place(target: Path) -> Iterator[Path]:
    """A name beside a target; what stands there at the end is removed, and so are folders that were made for nothing."""
    made = [parent for parent in target.parents if not parent.exists()]
    unfinished = target.with_name(f".{target.name}.unfinished-{uuid.uuid4().hex[:12]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's for a full disk is the last
        raise ConversionError(f"`{target}` cannot be written: {error}. Check the disk and the permissions.") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif unfinished.exists():
            unfinished.unlink()
        for parent in made:
            if not target.exists() and parent.is_dir():
                parent.rmdir()


def _exchange(new: Path, old: Path) -> None:
    """Put a complete folder into the place of another; the other takes its name."""
    if _exchange_in_one_step(new, old):
        return
    # Elsewhere than on Linux there is a moment without a folder. The old one has a telling name then.
    aside = old.with_name(f".{old.name}.replaced-{uuid.uuid4().hex[:12]}")
    old.replace(aside)
    try:
        new.replace(old)
    except OSError:
        aside.replace(old)
        raise
    aside.replace(new)


def _exchange_in_one_step(new: Path, old: Path) -> bool:
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0
