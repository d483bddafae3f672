"""The shell scripts: what they promise before any package is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")
SCRIPTS = [
    ".ci/run",
    "scripts/install_lowest_versions.sh",
    "scripts/setup_environment.sh",
    "tests/run.sh",
    "training/quickstart.sh",
]

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in {"VENV", "PYTHON"}}
    return subprocess.run(command, env=own | environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script):
    outcome = run(BASH, "-n", ROOT / script)
    assert outcome.returncode == 0, outcome.stderr


@pytest.fixture
def checkout(tmp_path):
    """A folder with the scripts alone."""
    for script in SCRIPTS:
        (tmp_path / script).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    return tmp_path


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def path_with_browser(checkout: Path) -> str:
    """The path with something in front that `.ci/run` takes for a browser, so that it installs none."""
    executable(checkout / "bin/chromium", "exit 1")
    return f"{checkout / 'bin'}:{os.environ['PATH']}"


def test_ci_runs_the_command_of_the_readme_with_a_folder_for_the_environment_that_is_gone_afterwards(checkout):
    readme = (
        '# Title\n```bash\nfalse\n```\n<!-- test command -->\n\n```bash\necho "in $VENV"\n```\n```bash\nfalse\n```\n'
    )
    (checkout / "README.md").write_text(readme)
    outcome = run(BASH, checkout / ".ci/run", PATH=path_with_browser(checkout))
    assert outcome.returncode == 0, outcome.stderr
    *_, last = outcome.stdout.splitlines()
    environment = Path(last.removeprefix("in "))
    assert environment.name == "venv"
    assert not environment.parent.exists()


def test_ci_fails_when_the_command_fails(checkout):
    (checkout / "README.md").write_text("<!-- test command -->\n```bash\nexit 3\n```\n")
    assert run(BASH, checkout / ".ci/run", PATH=path_with_browser(checkout)).returncode == 3


@pytest.mark.parametrize(
    ("user", "apt_get", "calls", "is_announced"),
    [
        (0, "exit 0", ["update", "install --yes --no-install-recommends chromium"], False),
        (0, "exit 100", ["update"], True),
        (0, None, [], True),
        (1000, "exit 0", [], True),
    ],
    ids=["installed", "apt-get fails", "no apt-get", "not root"],
)
def test_ci_tries_to_install_a_browser_and_goes_on_without(checkout, user, apt_get, calls, is_announced):
    (checkout / "README.md").write_text("<!-- test command -->\n```bash\necho ran\n```\n")
    tools = checkout / "bin"
    tools.mkdir()
    for tool in ("awk", "bash", "cat", "dirname", "grep", "mktemp", "rm", "timeout"):
        (tools / tool).symlink_to(shutil.which(tool))
    executable(tools / "id", f"echo {user}")
    if apt_get is not None:
        executable(tools / "apt-get", f'echo "$*" >>"{checkout}/calls"; echo noise; echo noise >&2; {apt_get}')
    outcome = run(BASH, checkout / ".ci/run", PATH=str(tools))
    announced = ["chromium could not be installed: the test that looks at a page in a browser will be skipped."]
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines() == [
        *(announced if is_announced else []),
        "The test command of README.md:",
        "echo ran",
        "ran",
    ]
    assert (calls_of(checkout, "") if calls else []) == calls
    assert (checkout / "calls").exists() == bool(calls)


@pytest.mark.parametrize(
    "readme",
    [
        "# Title\n\n```bash\ntrue\n```\n",
        "<!-- test command -->\nFirst some text.\n```bash\ntrue\n```\n",
        "<!-- test command -->\n```bash\n```\n",
    ],
    ids=["no mark", "no block right after", "empty block"],
)
def test_ci_says_what_is_missing_when_the_readme_has_no_test_command(checkout, readme):
    (checkout / "README.md").write_text(readme)
    outcome = run(BASH, checkout / ".ci/run")
    assert outcome.returncode == 1
    assert "README.md has no test command" in outcome.stderr


@pytest.mark.parametrize("script", ["tests/run.sh", "training/quickstart.sh"])
def test_an_old_python_is_refused_with_the_way_out(checkout, script):
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python"):
        executable(checkout / "bin" / name, 'case "$1" in --version) echo Python 3.9.1 ;; *) exit 1 ;; esac')
    outcome = run(BASH, checkout / script, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")
    assert outcome.returncode == 1
    assert "Python 3.11 or newer is needed, but the path offers Python 3.9.1" in outcome.stderr
    assert not (checkout / ".venv").exists()


def test_a_named_python_that_does_not_run_is_refused_by_its_name(checkout):
    outcome = run(BASH, checkout / "tests/run.sh", PYTHON="/nowhere/python3.12")
    assert outcome.returncode == 1
    assert "PYTHON=/nowhere/python3.12" in outcome.stderr


def test_a_broken_environment_is_left_alone_and_named(checkout):
    (checkout / ".venv").mkdir()
    outcome = run(BASH, checkout / "tests/run.sh")
    assert outcome.returncode == 1
    assert f"{checkout}/.venv is no working virtual environment" in outcome.stderr
    assert (checkout / ".venv").exists()


@pytest.fixture
def installed_checkout(checkout):
    """A checkout whose environment writes down how it is called instead of doing it."""
    (checkout / "mpformer_hf").mkdir()
    for file in ("pyproject.toml", "mpformer_hf/__init__.py"):
        shutil.copy(ROOT / file, checkout / file)
    for tool in ("python", "ruff", "mypy"):
        executable(checkout / ".venv/bin" / tool, f'echo "{tool} $*" >>"{checkout}/calls"; [ "$1" != "$FAILING" ]')
    return checkout


def calls_of(checkout: Path, name: str) -> list[str]:
    return [line for line in (checkout / "calls").read_text().splitlines() if line.startswith(name)]


def test_every_stage_runs_and_the_failed_one_is_named(installed_checkout):
    outcome = run(BASH, installed_checkout / "tests/run.sh", "-m", "not slow", FAILING="format")
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1] == "Failed: format"
    assert calls_of(installed_checkout, "ruff") == ["ruff check .", "ruff format --check ."]
    assert calls_of(installed_checkout, "mypy") == ["mypy "]
    assert calls_of(installed_checkout, "python -m pytest") == [
        "python -m pytest --numprocesses 2 --durations=15 -m not proof -m not slow"
    ]


def test_a_second_run_installs_nothing_until_the_project_file_changes(installed_checkout):
    def installations() -> tuple[int, int]:
        """Of the package, and of the lowest versions."""
        assert run(BASH, installed_checkout / "tests/run.sh", FAILING="nothing").returncode == 0
        calls = calls_of(installed_checkout, "python -m pip install")
        return sum("--editable" in call for call in calls), sum("transformers==5.17.0" in call for call in calls)

    assert [installations(), installations()] == [(1, 1), (1, 1)]
    (installed_checkout / "pyproject.toml").write_text("# changed\n")
    assert installations() == (2, 1)


def test_other_lowest_versions_are_installed_anew_and_a_failure_leaves_nothing(installed_checkout):
    python, target = installed_checkout / ".venv/bin/python", installed_checkout / "lowest"
    script = installed_checkout / "scripts/install_lowest_versions.sh"
    assert run(BASH, script, target, PYTHON=str(python), FAILING="nothing").returncode == 0
    assert "transformers==5.17.0" in (target / "installed-wheels").read_text()
    script.write_text(script.read_text().replace("transformers==5.17.0", "transformers==5.18.0"))
    outcome = run(BASH, script, target, PYTHON=str(python), FAILING="-m")
    assert outcome.returncode == 1
    assert "could not be installed" in outcome.stderr
    assert not target.exists()
    assert "got 0. Usage:" in run(BASH, script).stderr


def test_the_quickstart_trains_and_then_predicts_in_a_new_process(installed_checkout):
    outcome = run(BASH, installed_checkout / "training/quickstart.sh", FAILING="nothing")
    assert outcome.returncode == 0, outcome.stderr
    recipe = "training/recipes/digit_scenes/panoptic/quickstart.yaml"
    assert calls_of(installed_checkout, "python -m training") == [
        f"python -m training.train {recipe} --output_dir outputs/quickstart",
        "python -m training.predictions outputs/quickstart",
    ]
