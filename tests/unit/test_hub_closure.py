"""Every model must be loadable from the Hub by people who never installed this package.

transformers finds the files of a model with two regular expressions, follows them recursively and copies what it finds
into one flat folder. What it misses, or what its users lack, breaks there and not here, unless these tests say so.
"""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

PACKAGE = Path(__file__).parents[2] / "mpformer_hf"
KINDS = ("configuration", "image_processing", "modeling", "pipeline")
ENTRY_POINTS = [file for kind in KINDS for file in sorted(PACKAGE.glob(f"{kind}_*.py"))]
# scipy only guarded, which `get_imports` skips.
AVAILABLE_TO_ALL = sys.stdlib_module_names | {"torch", "numpy", "transformers", "huggingface_hub"}
AVAILABLE_WITH_IMAGES = AVAILABLE_TO_ALL | {"torchvision", "PIL"}
IMAGE_PARTS = {"mask_post_processing", "visualization"}

for_each_entry_point = pytest.mark.parametrize("entry", ENTRY_POINTS, ids=lambda path: path.stem)


def imports_of(file: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def siblings_of(file: Path) -> set[Path]:
    relative = [node for node in imports_of(file) if isinstance(node, ast.ImportFrom) and node.level]
    for node in relative:
        is_sibling = node.level == 1 and node.module and "." not in node.module
        assert is_sibling, (
            f"{file.name}:{node.lineno}: write `from .sibling import name`; the Hub scanner follows nothing else."
        )
    return {file.with_name(f"{node.module}.py") for node in relative}


def closure_of(entry: Path) -> set[Path]:
    """The entry and every file that it needs, directly or through others."""
    seen, queue = {entry}, [entry]
    while queue:
        for sibling in siblings_of(queue.pop()) - seen:
            seen.add(sibling)
            queue.append(sibling)
    return seen


def allowed_in(file: Path, entry: Path) -> set[str]:
    works_on_images = entry.stem.startswith(("image_processing_", "pipeline_")) or file.stem in IMAGE_PARTS
    return AVAILABLE_WITH_IMAGES if works_on_images else AVAILABLE_TO_ALL


def test_the_trio_is_among_the_entry_points():
    names = {file.stem for file in ENTRY_POINTS}
    assert {"configuration_mpformer", "image_processing_mpformer", "modeling_mpformer"} <= names


@for_each_entry_point
def test_transformers_copies_exactly_what_python_imports(entry):
    copied = {Path(file) for file in get_relative_import_files(entry)} | {entry}
    assert copied == closure_of(entry)


@for_each_entry_point
def test_every_copied_file_exists(entry):
    missing = sorted(file.name for file in closure_of(entry) if not file.is_file())
    assert not missing, f"{entry.name} needs {missing}, which are no files of {PACKAGE.name}/."


@for_each_entry_point
def test_closure_needs_nothing_a_transformers_user_lacks(entry):
    for file in closure_of(entry):
        foreign = set(get_imports(file)) - allowed_in(file, entry)  # guarded imports are no requirement
        assert not foreign, f"{file.name} imports {sorted(foreign)}, which Hub users may not have."


@for_each_entry_point
def test_closure_never_reaches_for_the_installed_package(entry):
    # Not even guarded: it would mix installed and remote code in one process.
    for file in closure_of(entry):
        for node in imports_of(file):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            own = [name for name in modules if name.split(".")[0] == PACKAGE.name]
            assert not own, f"{file.name}:{node.lineno}: import siblings as `from .sibling import name`."


def test_the_configuration_needs_no_other_file_of_the_package():
    assert closure_of(PACKAGE / "configuration_mpformer.py") == {PACKAGE / "configuration_mpformer.py"}
