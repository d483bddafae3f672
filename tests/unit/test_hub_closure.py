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
        file = queue.pop()
        new = siblings_of(file) - seen if file.is_file() else set()
        seen |= new
        queue += new
    return seen


def allowed_in(file: Path, entry: Path) -> set[str]:
    works_on_images = entry.stem.startswith(("image_processing_", "pipeline_")) or file.stem in IMAGE_PARTS
    return AVAILABLE_WITH_IMAGES if works_on_images else AVAILABLE_TO_ALL


def test_the_trio_is_among_the_entry_points():
    names = {file.stem for file in ENTRY_POINTS}
    assert {"configuration_mpformer", "image_processing_mpformer", "modeling_mpformer"} <= names


@for_each_entry_point
def test_transformers_copies_exactly_what_python_imports(entry):
    imported = closure_of(entry)
    assert {Path(file) for file in get_relative_import_files(entry)} | {entry} == imported


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


def test_the_closure_leaves_out_what_is_not_for_strangers():
    needed = {
        file.stem for entry in ("modeling", "image_processing") for file in closure_of(PACKAGE / f"{entry}_mpformer.py")
    }
    assert {"configuration_mpformer", "mask_decoder", "mask_polygons", "image_reading"} <= needed
    assert not {"__init__", "model_card", "pipeline_mpformer", "visualization"} & needed


@pytest.mark.parametrize(
    ("sibling", "check", "message"),
    [
        (None, test_every_copied_file_exists, r"needs \['part.py'\]"),
        ("from . import other", test_transformers_copies_exactly_what_python_imports, r"part.py:1: write `from .sib"),
        ("from .ops.x import y", test_transformers_copies_exactly_what_python_imports, r"part.py:1: write `from .sib"),
        ("import einops", test_closure_needs_nothing_a_transformers_user_lacks, r"part.py imports \['einops'\]"),
        ("import torchvision", test_closure_needs_nothing_a_transformers_user_lacks, r"\['torchvision'\]"),
        ("from mpformer_hf import ops", test_closure_never_reaches_for_the_installed_package, r"part.py:1: import sib"),
    ],
)
def test_these_tests_notice_what_would_fail_at_a_stranger_s(sibling, check, message, tmp_path):
    entry = tmp_path / "modeling_broken.py"
    entry.write_text("from .part import y\n")
    if sibling is not None:
        (tmp_path / "part.py").write_text(f"{sibling}\n")
    with pytest.raises(AssertionError, match=message):
        check(entry)
