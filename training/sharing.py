"""Sharing a trained model on the Hugging Face Hub; also later, by hand: `python -m training.sharing FOLDER [REPOSITORY]`.

    repository = prepare_repository(accelerator, arguments.hub_model_id, output_dir, arguments.hub_private)    before the training
    push_folder(output_dir, repository, arguments.hub_private, "Trained model")                               afterwards

What can be wrong is found before the training. An upload that fails later is told in a sentence, with the command that makes up
for it; neither the training nor the model depends on it. What is uploaded is the folder as the training program writes it, in one
commit, card of measured results included, but without the pictures of validation images, which belong to others, and without the
names of this machine's folders. A card that a person has written on the Hub stays.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mpformer_hf.model_card import is_by_a_person
from mpformer_hf.model_inspection import CARD_FILE
from training.folders import PICTURES_FOLDER, RECIPE_FILE, RESULTS_FILE
from training.optional_work import describe, tell
from training.recipe_files import RecipeError
from training.trackers import STATE_FILE
from training.training_record import hide_folders

NOT_SHARED = (PICTURES_FOLDER, STATE_FILE)
HOW_TO_LOG_IN = "Run `hf auth login`, or set HF_TOKEN, with a token that may write there"


class SharingError(RuntimeError):
    """The Hub cannot be used as asked; the message is for the user as it is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m training.sharing", description="Upload a trained model to the Hub."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="output_dir of training.train")
    parser.add_argument(
        "repository",
        metavar="REPOSITORY",
        nargs="?",
        help="OWNER/NAME (default: the folder's name, of the user logged in)",
    )
    parser.add_argument("--private", action="store_true", help="for others, a repository that is made does not exist")
    parser.add_argument("--message", default="Trained model", help="title of the commit")
    options = parser.parse_args(argv)
    try:
        require_model(options.folder)
        repository = make_repository(options.repository, options.folder, private=options.private)
        url = upload_folder(options.folder, repository, private=options.private, message=options.message)
    except SharingError as error:
        sys.exit(f"error: {error}")
    print(f"The model is at {url}.")


def prepare_repository(accelerator: Accelerator, name: str | None, output_dir: str | Path, private: bool) -> str:
    """Make sure, before the training, that there is a repository that can be written; all processes call it.

    Args:
        accelerator: of this run; the first process asks the Hub.
        name: `OWNER/NAME`, or `NAME`; `None` takes that of `output_dir`.
        output_dir: of the training.
        private: whether a repository that is made is private; one that is there must not be public then.

    Returns:
        `OWNER/NAME`, on all processes.

    Raises:
        RecipeError: there is no token, the repository cannot be written, or the Hub cannot be reached; on all processes.
    """
    repository, problem = "", None
    if accelerator.is_main_process:
        try:
            repository = make_repository(name, Path(output_dir), private=private)
        except SharingError as error:
            problem = str(error)
    repository, problem = gather_object([(repository, problem)])[0]
    if problem is not None:
        raise RecipeError(f"`push_to_hub`: {problem}")
    return repository


def push_folder(folder: Path, repo_id: str, private: bool, message: str, *, is_last: bool = True) -> str | None:
    """Upload the folder of a model; a failure is said, and nothing else comes of it.

    Args:
        folder: as the training program writes it; nobody else changes it meanwhile.
        repo_id: `OWNER/NAME`, what `prepare_repository` returned.
        private: as there.
        message: title of the commit.
        is_last: no other upload follows, so that the sentence says how to make up for this one.

    Returns:
        Address of the commit; `None` if it failed.
    """
    try:
        return upload_folder(folder, repo_id, private=private, message=message)
    except SharingError as error:
        command = f"python -m training.sharing {shlex.quote(str(folder))} {repo_id}{' --private' if private else ''}"
        later = (
            f"The model is safe in {folder}; upload it later: {command}" if is_last else "The next upload has it all."
        )
        tell(f"{str(error).rstrip('.')}. {later}")
        return None


def make_repository(name: str | None, folder: Path, *, private: bool) -> str:
    """Find out the full name of a repository, make it unless it is there, and ask for the right to write.

    Raises:
        SharingError: see `prepare_repository`.
    """
    api = HfApi()
    name = name or folder.resolve().name
    try:
        user = api.whoami()["name"]
        repository = name if "/" in name else f"{user}/{name}"
        api.create_repo(repository, private=private, exist_ok=True)
        # `create_repo` is content with a repository of somebody else. This asks how a file would be sent, and sends none.
        api.preupload_lfs_files(repository, [CommitOperationAdd(CARD_FILE, b"-")])
        is_public = not api.repo_info(repository).private
    except Exception as error:
        raise SharingError(explain(error, name)) from error
    if private and is_public:
        raise SharingError(
            f"{repository} is there already, and public, but is asked to be private. Make it private on the Hub, choose another "
            "name, or leave `hub_private` out."
        )
    return repository


def require_model(folder: Path) -> None:
    """Refuse a folder without a model."""
    if not (folder / "config.json").is_file():
        raise SharingError(f"{folder} holds no trained model. Pass the output_dir of training.train.")


def upload_folder(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a folder in one commit, and return its address.

    Raises:
        SharingError: the folder cannot be read, or the Hub did not take it.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        names = list_shared(folder)
        if CARD_FILE in names and has_card_of_person(api, repository):
            names.remove(CARD_FILE)
        files = [CommitOperationAdd(name, content_of(folder / name)) for name in names]
        return str(api.create_commit(repository, files, commit_message=message).commit_url)
    except Exception as error:
        raise SharingError(f"{folder} was not uploaded: {explain(error, repository)}") from error


def list_shared(folder: Path) -> list[str]:
    """Paths within a folder of what others get, in order: nothing hidden, and nothing of `NOT_SHARED`."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shared = [
        path for path in paths if path.parts[0] not in NOT_SHARED and not any(p.startswith(".") for p in path.parts)
    ]
    return sorted(path.as_posix() for path in shared)


def content_of(path: Path) -> str | bytes:
    """What is uploaded of a file: the file, by its path; of settings, a text that names no folders of this machine."""
    if path.name == RECIPE_FILE:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return yaml.safe_dump(hide_folders(settings), sort_keys=False, allow_unicode=True).encode()
    if path.name == RESULTS_FILE:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return (json.dumps(hide_folders(results), indent=2) + "\n").encode()
    return str(path)


def has_card_of_person(api: HfApi, repository: str) -> bool:
    """Whether a repository has a README.md that a person has written, or changed."""
    if not api.file_exists(repository, CARD_FILE):
        return False
    text = Path(api.hf_hub_download(repository, CARD_FILE)).read_text(encoding="utf-8", errors="replace")
    return is_by_a_person(text)


def explain(error: Exception, repository: str) -> str:
    """Say what is wrong with the Hub, and what to do."""
    # Not every error of a client has a response: a connection may have failed before.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hugging Face Hub is switched off. Unset HF_HUB_OFFLINE."
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token of the Hugging Face Hub. {HOW_TO_LOG_IN}."
    reasons = {
        HTTPStatus.UNAUTHORIZED: "the Hugging Face Hub does not know this token",
        HTTPStatus.FORBIDDEN: f"this token has no right to write to {repository}",
    }
    if isinstance(error, HfHubHTTPError) and status in reasons:
        return f"{reasons[status]}. {HOW_TO_LOG_IN}."
    return f"the Hugging Face Hub cannot be used for {repository} ({describe(error)})."


if __name__ == "__main__":
    main()
