"""The index of a data set: which files and which segments an image has, as a `datasets.Dataset` on disk.

It is written once and mapped into memory afterwards, so worker processes and training processes share its pages, and starting again
takes no time. Its folder is named after everything that it was made of; if that changes, another one is made.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from training.image_files import StoredFile
from training.official_files import FileError

if TYPE_CHECKING:
    import datasets

VERSION = 3  # of the form of the index; an older one is not read
INDEX_FILE = "index.arrow"
FACTS_FILE = "facts.json"
CACHE_FOLDER = "mpformer_hf"
SILENT_SECONDS = 3  # after which making an index shows a progress bar

# What `StoredFile.to_record` writes.
FILE_COLUMNS = {
    "path": "string",
    "member": "string",
    "offset": "int64",
    "packed_size": "int64",
    "size": "int64",
    "method": "int32",
    "crc": "int64",
}


@dataclass(frozen=True)
class IndexContent:
    """What an index is made of.

    Attributes:
        columns: type of each column, as `datasets.Value` names it; a dictionary is a struct, a list of one entry a list.
        rows: one for each image, made while they are written.
        facts: what holds for the whole data set; goes into a JSON file. Read after `rows` is exhausted.
    """

    columns: Mapping[str, Any]
    rows: Iterable[Mapping[str, Any]]
    facts: "IndexFacts"


@dataclass
class IndexFacts:
    """What is known of a data set beside its rows.

    Attributes:
        content: whatever the format needs, such as its classes; JSON.
        notes: sentences about what was left out.
        problems: position -> sentence of the images that cannot be read.
        watched: path -> state of the files on which problems depend; if one changes, the index is made anew.
    """

    content: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    watched: dict[str, str] = field(default_factory=dict)

    def add_problem(self, number: int, sentence: str, file: StoredFile | None = None) -> None:
        """Take what is wrong with image `number`; of an image the first counts. `file` is the one to be mended, if it is there."""
        self.problems.setdefault(number, sentence)
        if file is not None:
            self.watched[str(file.path)] = state_of_file(file.path)

    def is_current(self) -> bool:
        """Say whether the files with problems are as they were."""
        return all(state_of_file(Path(path)) == state for path, state in self.watched.items())

    @classmethod
    def read(cls, path: Path) -> "IndexFacts":
        """Read the JSON file."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "problems": {int(number): text for number, text in values["problems"].items()}})


def state_of_file(path: Path) -> str:
    """Write down size and time of the last change; nothing if it is missing."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"


def load_or_build(
    name: str, state: object, build: Callable[[], IndexContent], cache_dir: str | Path | None = None
) -> tuple["datasets.Dataset", IndexFacts]:
    """Open the index of a data set; make it first if there is none for this state of its files.

    Several processes may ask for it at once: one makes it, the others wait.

    Args:
        name: of the format.
        state: everything that the index depends on; its `repr` counts.
        build: collects the content.
        cache_dir: folder of all indices; `None` is one in the cache of `datasets`.

    Returns:
        The index and the facts.

    Raises:
        FileError: the index cannot be written; whatever `build` raises.
    """
    import datasets  # noqa: PLC0415 - takes two seconds, which asking for options or formats need not wait for

    folder = Path(datasets.config.HF_DATASETS_CACHE, CACHE_FOLDER) if cache_dir is None else Path(cache_dir)
    digest = hashlib.sha256(repr((VERSION, name, state)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    target = folder / f"{name}-{digest}"
    if not is_current(target):
        with explain_failure(folder), lock(folder, target.name):
            if not is_current(target):  # another process may have made it meanwhile
                write_index(build(), target)
    return datasets.Dataset.from_file(str(target / INDEX_FILE)), IndexFacts.read(target / FACTS_FILE)


def is_current(target: Path) -> bool:
    """Say whether an index is there, complete, and its files with problems are as they were."""
    return (target / FACTS_FILE).is_file() and IndexFacts.read(target / FACTS_FILE).is_current()


def write_index(content: IndexContent, target: Path) -> None:
    """Write an index into a folder, which appears when it is complete."""
    from datasets.arrow_writer import ArrowWriter  # noqa: PLC0415 - as above

    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with ArrowWriter(features=make_features(content.columns), path=str(folder / INDEX_FILE)) as writer:
            # Reading the sizes of 100 000 images, or filling their polygons, takes a minute or more.
            for row in tqdm(
                content.rows, desc=f"index of {target.name.partition('-')[0]}", unit="image", delay=SILENT_SECONDS
            ):
                writer.write(dict(row))
            writer.finalize()
        (folder / FACTS_FILE).write_text(json.dumps(asdict(content.facts)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # it is not current
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_features(columns: Mapping[str, Any]) -> "datasets.Features":
    """Write types of columns as `datasets.Features`."""
    import datasets  # noqa: PLC0415 - as above

    def convert(kind: Any) -> Any:  # noqa: ANN401 - nested
        if isinstance(kind, str):
            return datasets.Value(kind)
        if isinstance(kind, list):
            return datasets.List(convert(kind[0]))
        return {key: convert(value) for key, value in kind.items()}

    return datasets.Features(convert(columns))


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time in; the lock of a process that was killed is released."""
    from filelock import FileLock  # noqa: PLC0415 - comes with `datasets`

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        yield


@contextmanager
def explain_failure(folder: Path) -> Iterator[None]:
    """Say in a sentence that an index cannot be written."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"The index of the data set cannot be written into {folder}: {error.strerror or error}. Choose another folder with the "
            "option `cache_dir`."
        ) from None
