"""Conversion of Detectron2 checkpoints: time and memory at full size, and files that are damaged on purpose.

    python -m benchmarks.conversion swin-large      one conversion of 216 million parameters, in a process of its own
    python -m benchmarks.conversion fuzz            2000 mutated checkpoints and configurations

Both add their result to `--output`. The weights are random, under the original's names, in its files.

Fuzzing: a tiny checkpoint (zip and older format of torch, pickles of the zoo) or its YAML is changed in a few bytes, most of them
where the file describes what it holds, and converted. Expected is a conversion, or a message that begins with "error: ": no other
exception, no end of the process, no call of what the file names, no memory beyond a bound, and no folder left behind.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.measuring import read_status
from tests.detectron2_checkpoints import (
    SWIN_LARGE,
    Original,
    write_config,
    write_plain_pickle,
    write_pth,
    write_zoo_pickle,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion_cpu.json"
NUM_FILES = 2000
FILES_IN_A_PROCESS = 100
MEBIBYTE = 2**20
# Address space that a process of the fuzzing may add to what it had after one conversion; resident it must add far less.
ADDED_ADDRESS_SPACE = 8 * 2**30
ADDED_MEMORY = 300 * MEBIBYTE
# Share of the changed YAML files that are text again; a YAML reader refuses all others at once.
READABLE_YAML = 0.9
TINY = Original(
    swin=(8, (1, 1, 1, 1), (1, 1, 2, 2), 4),
    num_classes=3,
    num_queries=4,
    dim_feedforward=16,
    decoder_layers=2,
    encoder_layers=1,
)
# Audit events of Python that no conversion may raise.
FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
)


# --------------------------------------------------------------------------------------------------------------- full size


def measure_swin_large() -> dict[str, float]:
    """Seconds and added memory of converting a Swin-L checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_pth(folder / "model_final.pth", SWIN_LARGE.weights())
        write_config(folder / "config.yaml", SWIN_LARGE.config())
        command = [sys.executable, "-m", "benchmarks.conversion", "convert", "--folder", name]
        started = time.perf_counter()
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
        peak = json.loads(lines.splitlines()[-1])["added"]
        size = checkpoint.stat().st_size
    return {
        "seconds, imports included": round(seconds, 1),
        "file, MiB": round(size / MEBIBYTE),
        "peak resident memory above that of importing torch and transformers, MiB": round(peak / MEBIBYTE),
        "the same as multiple of the file": round(peak / size, 2),
    }


def convert_in(folder: Path) -> dict[str, int]:
    """Convert the checkpoint of a folder in this process; return the bytes that it adds at its peak."""
    before = read_status("VmRSS")  # of a process that has imported torch and transformers
    from conversion.convert_detectron2 import main  # noqa: PLC0415 - its memory counts

    arguments = [
        folder / "model_final.pth",
        "--config-file",
        folder / "config.yaml",
        "--output-dir",
        folder / "converted",
    ]
    status = main([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)
    return {"added": read_status("VmHWM") - before}


# ----------------------------------------------------------------------------------------------------------------- fuzzing


@dataclass(frozen=True)
class Outcome:
    """What became of one mutated file.

    Attributes:
        number: of the file; together with the seed it makes the same file again.
        file: which of the files was changed.
        mutation: how.
        result: "converted", "refused", or what was wrong.
        detail: last line of the message.
    """

    number: int
    file: str
    mutation: str
    result: str
    detail: str

    @property
    def is_good(self) -> bool:
        """True for what a damaged file may lead to."""
        return self.result in {"converted", "refused"}


class Fuzzer:
    """Files to change, in a folder of their own."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.canary = folder / "canary"
        self.events: list[str] = []
        weights = self.weights = TINY.weights()
        inputs = folder / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        write_pth(inputs / "zip.pth", weights)
        torch.save({"model": weights}, inputs / "older.pth", _use_new_zipfile_serialization=False)
        write_zoo_pickle(inputs / "zoo.pkl", weights)
        write_plain_pickle(inputs / "plain.pkl", weights)
        (inputs / "protocol2.pkl").write_bytes(pickle.dumps({n: t.numpy() for n, t in weights.items()}, protocol=2))
        config = TINY.config()
        write_config(inputs / "base.yaml", {"MODEL": config["MODEL"]})
        write_config(inputs / "config.yaml", {"_BASE_": "base.yaml", "INPUT": config["INPUT"]})
        self.contents = {file.name: file.read_bytes() for file in sorted(inputs.iterdir())}
        self.places = {name: list(structure_of(name, content)) for name, content in self.contents.items()}
        sys.addaudithook(lambda event, _: self.events.append(event) if event in FORBIDDEN_EVENTS else None)

    def try_file(self, number: int) -> Outcome:
        """Change a file, convert it, and look at what happened."""
        rng = random.Random(f"{self.seed} {number}")
        name = rng.choice(sorted(self.contents))
        mutation = rng.choice([*MUTATIONS, "payload", *2 * ["rewrite"]])
        if mutation == "payload":
            content = self.make_payload(name, rng)
        elif mutation == "rewrite":
            content = self.rewrite(name, rng)
        else:
            content = MUTATIONS[mutation](self.contents[name], rng, self.places[name])
        if name.endswith(".yaml") and rng.random() < READABLE_YAML:
            content = "".join(
                sign for sign in content.decode(errors="ignore") if sign.isprintable() or sign == "\n"
            ).encode()
        place = self.folder / "run"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for other, original in self.contents.items():
            if other.endswith(".yaml"):
                (place / other).write_bytes(original)
        (place / name).write_bytes(content)
        checkpoint = name if not name.endswith(".yaml") else "zip.pth"
        if checkpoint != name:
            (place / checkpoint).write_bytes(self.contents[checkpoint])
        result, detail = self.convert(place / checkpoint, place / "config.yaml", place / "out" / "converted")
        return Outcome(number, name, mutation, result, detail)

    def convert(self, checkpoint: Path, config_file: Path, output_dir: Path) -> tuple[str, str]:
        """Convert, and name what is wrong."""
        from conversion.convert_detectron2 import main  # noqa: PLC0415 - after the limit on memory

        arguments = [checkpoint, "--config-file", config_file, "--output-dir", output_dir]
        messages = io.StringIO()
        self.events.clear()
        try:
            with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(io.StringIO()):
                status = main([str(argument) for argument in arguments])
        except BaseException:
            return "exception", traceback.format_exc()[-2000:]
        last = (messages.getvalue().strip().splitlines() or [""])[-1]
        if self.events or self.canary.exists():
            return "executed", ", ".join(self.events) or "canary"
        return self.judge(status, messages.getvalue(), output_dir), last[-300:]

    @staticmethod
    def judge(status: int, messages: str, output_dir: Path) -> str:
        """Compare the exit status with what was written and said."""
        left = sorted(entry.name for entry in output_dir.parent.iterdir()) if output_dir.parent.is_dir() else []
        if status == 0:
            complete = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
            there = {file.name for file in output_dir.iterdir()} if output_dir.is_dir() else set()
            return "converted" if complete <= there and left == [output_dir.name] else "incomplete"
        if left:
            return "left behind"
        return "refused" if "error: " in messages else "no message"

    def rewrite(self, name: str, rng: random.Random) -> bytes:
        """A well-formed file with a few values that make no sense."""
        if name.endswith(".yaml"):
            lines = self.contents[name].decode().splitlines()
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(lines))
                lines[place] = f"{lines[place].partition(':')[0]}: {rng.choice(STRANGE_VALUES)}"
            return "\n".join(lines).encode()
        weights = dict(self.weights)
        for key in rng.sample(sorted(weights), rng.randint(1, 3)):
            change = rng.choice(sorted(STRANGE_TENSORS))
            tensor = weights.pop(key)
            if change != "removed":
                weights[rng.choice([key, key, key[::-1]])] = STRANGE_TENSORS[change](tensor)
        if name.endswith(".pkl"):
            return pickle.dumps({"model": {key: tensor.numpy() for key, tensor in weights.items()}})
        buffer = io.BytesIO()
        torch.save({"model": weights}, buffer, _use_new_zipfile_serialization=name == "zip.pth")
        return buffer.getvalue()

    def make_payload(self, name: str, rng: random.Random) -> bytes:
        """A file that would run code if it were loaded without care."""
        command = f"touch {self.canary}"
        if name.endswith(".yaml"):
            tags = (
                "object/apply:os.system",
                "object/new:os.system",
                "object/apply:subprocess.check_output",
                "name:os.system",
            )
            line = f"\n{rng.choice(['INPUT', 'X', 'MODEL'])}: !!python/{rng.choice(tags)} [{command!r}]\n"
            return self.contents[name] + line.encode() if rng.random() < 0.5 else line.encode()  # noqa: PLR2004 - half of them
        payload = _Call(rng.choice([os.system, exec, eval]), command)
        content = {"model": {"backbone.stem.conv1.weight": payload}, "extra": payload}
        if name.endswith(".pkl"):
            return pickle.dumps(content, protocol=rng.choice([0, 2, 4, 5]))
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=name == "zip.pth")
        return buffer.getvalue()


class _Call:
    """Makes a call when it is unpickled."""

    def __init__(self, function: Callable, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


def structure_of(name: str, content: bytes) -> Iterator[int]:
    """Places in a file that describe what it holds: instructions of its pickles, the directory of a zip, all of a YAML."""
    if name.endswith(".yaml"):
        yield from range(len(content))
    elif name == "zip.pth":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            record = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            begin = content.index(archive.read(record))
        yield from (begin + place for place in instructions_of(content[begin:]))
        yield from range(content.index(b"PK\x01\x02"), len(content))
        yield from range(30)
    else:
        begin = 0
        for _ in range(5 if name == "older.pth" else 1):
            places = list(instructions_of(content[begin:]))
            yield from (begin + place for place in places)
            begin += places[-1] + 1


def instructions_of(content: bytes) -> Iterator[int]:
    """Where the instructions of a pickle begin."""
    return (place for _, _, place in pickletools.genops(content) if place is not None)


STRANGE_VALUES = (
    *(
        "-1",
        "0",
        "1",
        "3.5",
        "7",
        "1e30",
        "99999999999999999999",
        ".nan",
        ".inf",
        "true",
        "null",
        "text",
        "[]",
        "{}",
        "[1, 2]",
    ),
    *("'1' * 5", "'('", "[[[[[[]]]]]]", "{A: {B: 1}}", "&a [*a]", "'" + "x" * 5000 + "'", "1_0", "0x10", "2001-01-01"),
    *(
        "../../../etc/passwd",
        "/",
        "MODEL",
        "points",
        "SyncBN",
        "D2SwinTransformer",
        "[3, 3, 3, 3]",
        "!!binary aGk=",
        "!!set {a, b}",
    ),
)
STRANGE_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "removed": lambda tensor: tensor,
    "not a number": lambda tensor: torch.full(tensor.shape, float("nan")),
    "infinite": lambda tensor: torch.full(tensor.shape, float("inf")),
    "a scalar": lambda _: torch.tensor(1.5),
    "without rows": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "one row less": lambda tensor: tensor[1:] if tensor.dim() else tensor,
    "one axis more": lambda tensor: tensor[None],
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor,
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "twice as long": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
}
Mutation = Callable[[bytes, random.Random, Sequence[int]], bytes]


def flip_bytes(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Change bytes at and after places of the structure."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = min(rng.choice(places) + rng.randint(0, 4), len(changed) - 1)
        changed[place] = rng.randrange(256)
    return bytes(changed)


def flip_anywhere(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Change bytes, most of them weights."""
    del places
    return flip_bytes(content, rng, range(len(content)))


def write_large_number(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Write the largest number of 4 or 8 bytes over a length."""
    place, length = rng.choice(places) + 1, rng.choice([4, 8])
    return content[:place] + rng.choice([b"\xff", b"\x7f"]) * length + content[place + length :]


def delete_bytes(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Remove a few bytes."""
    place = rng.choice(places)
    return content[:place] + content[place + rng.randint(1, 16) :]


def insert_bytes(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Insert a few random bytes."""
    place = rng.choice(places)
    return content[:place] + rng.randbytes(rng.randint(1, 16)) + content[place:]


def truncate(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Cut the file off."""
    return content[: rng.choice([rng.choice(places), rng.randrange(len(content))])]


def repeat_part(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Copy a part of the file to another place."""
    begin, target = rng.choice(places), rng.choice(places)
    return content[:target] + content[begin : begin + rng.randint(1, 200)] + content[target:]


def zero_part(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Overwrite a part of the file with zeros."""
    place, length = rng.choice(places), rng.randint(1, 64)
    return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]


def replace_all(content: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """Random bytes, or the beginning of the file with random bytes behind it."""
    del places
    return content[: rng.choice([0, 4, 64, 512])] + rng.randbytes(rng.randint(0, 4096))


MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        flip_bytes,
        flip_anywhere,
        write_large_number,
        delete_bytes,
        insert_bytes,
        truncate,
        repeat_part,
        zero_part,
        replace_all,
    )
}


def fuzz_in_process(folder: Path, numbers: Sequence[int], seed: int, *, limit_memory: bool = True) -> Iterator[Outcome]:
    """Try files in this process. With a limit on its memory, which stays, the last outcome tells if it took too much."""
    fuzzer = Fuzzer(folder, seed)
    fuzzer.convert(folder / "inputs" / "zip.pth", folder / "inputs" / "config.yaml", folder / "first" / "converted")
    before = read_status("VmHWM")
    if limit_memory:
        resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + ADDED_ADDRESS_SPACE, resource.RLIM_INFINITY))
    for number in numbers:
        yield fuzzer.try_file(number)
    added = read_status("VmHWM") - before
    if limit_memory and added > ADDED_MEMORY:
        yield Outcome(numbers[-1], "", "", "memory", f"{added / MEBIBYTE:.0f} MiB")


def fuzz(num_files: int, seed: int) -> list[Outcome]:
    """Try files in child processes, so that the end of one shows."""
    outcomes: list[Outcome] = []
    for first in range(0, num_files, FILES_IN_A_PROCESS):
        last = min(first + FILES_IN_A_PROCESS, num_files)
        with tempfile.TemporaryDirectory() as name:
            command = [
                sys.executable,
                "-m",
                "benchmarks.conversion",
                "fuzz-some",
                "--folder",
                name,
                "--seed",
                str(seed),
            ]
            child = subprocess.run(
                [*command, "--first", str(first), "--last", str(last)],
                cwd=ROOT,
                check=False,
                capture_output=True,
                text=True,
            )
        lines = [Outcome(**json.loads(line)) for line in child.stdout.splitlines() if line.startswith("{")]
        outcomes += lines
        if child.returncode:
            outcomes.append(
                Outcome(first + len(lines), "", "", "end of the process", f"{child.returncode} {child.stderr[-500:]}")
            )
        print(f"{last} files: {dict(Counter(outcome.result for outcome in outcomes))}", file=sys.stderr, flush=True)
    return outcomes


# ----------------------------------------------------------------------------------------------------------------- program


def save_result(file: Path, name: str, result: object) -> None:
    """Put one result into a file that may hold others."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    found[name] = {"torch": torch.__version__, "transformers": transformers.__version__, "result": result}
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("swin-large", "fuzz", "convert", "fuzz-some"))
    parser.add_argument("--files", type=int, default=NUM_FILES, help="how many files to fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file with the results")
    parser.add_argument("--folder", type=Path, help="of `convert` and `fuzz-some`, which the other two start")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "swin-large":
        save_result(arguments.output, "swin-large", measure_swin_large())
    elif arguments.what == "convert":
        print(json.dumps(convert_in(arguments.folder)))
    elif arguments.what == "fuzz":
        report_fuzz(fuzz(arguments.files, arguments.seed), arguments.output)
    else:
        for outcome in fuzz_in_process(arguments.folder, range(arguments.first, arguments.last), arguments.seed):
            print(json.dumps(asdict(outcome)), flush=True)


def report_fuzz(outcomes: Sequence[Outcome], output: Path) -> None:
    """Save counts, print what was wrong, and end with an error if anything was."""
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    counts = Counter(f"{outcome.file}, {outcome.result}" for outcome in outcomes)
    save_result(output, "fuzz", {"files": len(outcomes), "wrong": len(bad), **dict(sorted(counts.items()))})
    for outcome in bad:
        print(outcome, file=sys.stderr)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
