"""README.md is run, not believed: its Python blocks work, and the files it names exist.

A block below a line `<!-- not in CI -->` is left out: it installs, trains or downloads.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_IN_CI = "<!-- not in CI -->"
TEST_COMMAND = "<!-- test command -->"


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown text."""

    language: str
    source: str
    line: int  # of its first line of code, from 1
    note: str  # the nearest line above it that is not blank


def blocks_of(text: str) -> list[Block]:
    lines, blocks, fence = text.splitlines(), [], None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number
            continue
        above = [candidate.strip() for candidate in lines[:fence] if candidate.strip()]
        source = "\n".join(lines[fence + 1 : number])
        blocks.append(Block(lines[fence].removeprefix("```").strip(), source, fence + 2, above[-1] if above else ""))
        fence = None
    assert fence is None, f"The block that begins in line {fence + 1} has no end."
    return blocks


def files_named_in(text: str) -> set[str]:
    """Targets of relative links, and words that begin with a folder of this repository."""
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    folders = "mpformer_hf|training|conversion|tests|benchmarks|docs|model_cards|scripts|\\.ci"
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./*-]*)", text)
    return {name.rstrip(".") for name in {*links, *paths}} - {""}


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_python_blocks_run_from_top_to_bottom(readme, tmp_path, monkeypatch):
    blocks = [block for block in blocks_of(readme) if block.language == "python" and block.note != NOT_IN_CI]
    assert blocks, f"README.md has no Python block that is not marked {NOT_IN_CI}; a reader wants one that runs."
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks:
        padding = "\n" * (block.line - 1)  # so that a traceback names the line of README.md
        exec(compile(padding + block.source, str(ROOT / "README.md"), "exec"), names)


def test_python_blocks_that_are_not_run_are_at_least_valid(readme):
    for block in blocks_of(readme):
        if block.language == "python":
            compile(block.source, f"README.md, line {block.line}", "exec")


def test_every_file_that_is_named_exists(readme):
    missing = sorted(name for name in files_named_in(readme) if not any(ROOT.glob(name)))
    assert not missing, f"README.md names {missing}, which do not exist."


def test_there_is_one_test_command_of_one_line_and_a_quickstart_of_one_line(readme):
    blocks = blocks_of(readme)
    commands = [block.source for block in blocks if block.note == TEST_COMMAND]
    assert commands == ["bash tests/run.sh"]
    assert "bash training/quickstart.sh" in {block.source for block in blocks}


def test_blocks_know_their_language_line_and_note():
    text = f"# Title\n\n{NOT_IN_CI}\n```python\na = 1\nb = 2\n```\ntext\n\n```\nplain\n```\n"
    assert blocks_of(text) == [Block("python", "a = 1\nb = 2", 5, NOT_IN_CI), Block("", "plain", 11, "text")]


def test_files_are_found_in_links_code_and_trees_but_not_in_addresses_or_model_names():
    text = (
        "See [guide](docs/guide.md#start), [site](https://host.example/docs/x.md) and `training/train.py`.\n"
        "Load `facebook/mask2former-tiny`, write outputs/quickstart/x.png, read tests/.\n"
    )
    assert files_named_in(text) == {"docs/guide.md", "training/train.py", "tests/"}
