"""pyproject.toml tells the truth: what is imported is declared, what is declared is built, and versions agree."""

import re
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"mpformer_hf", "training", "conversion", "benchmarks", "tests"}

# Folder -> extras that its code may rely on, besides the package's own dependencies.
EXTRAS_OF = {
    "mpformer_hf": (),
    "training": ("train", "trackers", "deepspeed"),
    "conversion": ("train",),
    "benchmarks": ("train", "dev"),
    "tests": ("train", "trackers", "deepspeed", "kernels", "dev"),
}
# Import name -> distribution, where they differ.
DISTRIBUTION_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Distribution that we import without declaring it -> the one of ours that requires it.
BROUGHT_BY = {
    "filelock": "huggingface-hub",
    "numpy": "transformers",
    "packaging": "transformers",
    "pillow": "torchvision",
    "safetensors": "transformers",
}


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def declared_for(extras: tuple[str, ...]) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return names_of(lines)


def distributions_imported_by(file: Path) -> set[str]:
    """Distributions without which the file cannot be imported; guarded imports are no requirement."""
    siblings = {path.stem for path in file.parent.iterdir()}  # training/ is first on the path of its programs
    modules = set(get_imports(file)) - sys.stdlib_module_names - OWN - siblings
    return {canonicalize_name(DISTRIBUTION_OF.get(module, module)) for module in modules}


def present_folders() -> list[str]:
    return [folder for folder in EXTRAS_OF if any((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("folder", present_folders())
def test_every_import_is_declared(folder):
    declared = declared_for(EXTRAS_OF[folder])
    known = declared | {name for name, bringer in BROUGHT_BY.items() if bringer in declared}
    for file in (ROOT / folder).rglob("*.py"):
        undeclared = distributions_imported_by(file) - known
        assert not undeclared, f"{file.relative_to(ROOT)} imports {sorted(undeclared)}; declare it in pyproject.toml."


@pytest.mark.parametrize(("brought", "bringer"), BROUGHT_BY.items())
def test_a_package_that_is_not_declared_is_really_brought_by_another(brought, bringer):
    unconditional = [line for line in metadata.requires(bringer) if Requirement(line).marker is None]
    assert canonicalize_name(brought) in names_of(unconditional)


def test_development_has_what_training_has():
    requirements = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
    assert any(requirement.name == PROJECT["name"] and "train" in requirement.extras for requirement in requirements)


def version_of_package() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "mpformer_hf" / "__init__.py").read_text(), re.MULTILINE)[1]


def test_the_top_of_the_changelog_is_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == version_of_package()


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (version_of_package(), PROJECT["license"])


def test_hooks_use_the_style_tools_of_the_project():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    of_hooks = {line for hook in hooks for line in hook["additional_dependencies"] if line.startswith("ruff")}
    assert of_hooks == {line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("ruff")}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    built = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in built} == {"mpformer_hf", f"mpformer_hf-{version_of_package()}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mpformer_hf").rglob("*.py")}
    assert sources | {"mpformer_hf/py.typed"} <= built
    assert not [name for name in built if "__pycache__" in name]


def test_the_source_distribution_can_be_tested_and_carries_nothing_that_git_ignores(tmp_path):
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as opened:
        files = {name.split("/", 1)[1] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py", "tests/run.sh"} <= files
    assert {"training/quickstart.sh", "scripts/setup_environment.sh"} <= files
    unwanted = {"outputs", ".venv", ".git", ".ci", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    assert not {name.split("/")[0] for name in files} & unwanted
    assert not [name for name in files if name.endswith((".pyc", ".so"))]
