"""The tests' Hub answers as the real one: to huggingface_hub in a child process, and to requests that no good client sends."""

import base64
import hashlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer

TOKENS = {"secret": "someone", "another": "stranger"}
CONTENT = bytes(range(256)) * 4
SHA256 = hashlib.sha256(CONTENT).hexdigest()

CLIENT = """
import json, sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

def status_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code]

folder = sys.argv[1]
api, stranger, nobody = HfApi(), HfApi(token="another"), HfApi(token=False)
found = {"user": api.whoami()["name"]}
found["address"] = api.create_repo("mine").repo_id
found["again"] = status_of(api.create_repo, "mine")
found["again, allowed"] = api.create_repo("mine", exist_ok=True).repo_id
api.upload_folder(folder_path=folder, repo_id="someone/mine")
found["commits after the same files"] = api.upload_folder(folder_path=folder, repo_id="someone/mine").oid
found["head"] = api.model_info("someone/mine").sha
found["files"] = api.list_repo_files("someone/mine")
found["tree"] = sorted(entry.path for entry in api.list_repo_tree("someone/mine"))
found["large"] = api.get_paths_info("someone/mine", ["large.bin"])[0].lfs.sha256
found["downloaded"] = open(hf_hub_download("someone/mine", "large.bin"), "rb").read().hex()
found["snapshot"] = open(snapshot_download("someone/mine") + "/sub/small.txt").read()
with HfFileSystem().open("someone/mine/large.bin", "rb", block_size=64, cache_type="none") as file:
    file.seek(300)
    found["part"] = file.read(8).hex()
found["exists"] = [api.file_exists("someone/mine", name) for name in ("large.bin", "none")]
found["no file"] = status_of(hf_hub_download, "someone/mine", "none")
found["no revision"] = status_of(api.model_info, "someone/mine", revision="none")
found["no repository"] = status_of(api.model_info, "someone/none")
found["wrong token"] = status_of(HfApi(token="wrong").create_repo, "x")
found["no token"] = status_of(nobody.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/mine")
found["foreign name"] = status_of(api.create_repo, "stranger/x")
found["foreign repository"] = status_of(
    stranger.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/mine"
)
found["outdated"] = status_of(
    api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/mine", parent_commit="0" * 40
)
try:
    api.upload_file(path_or_fileobj=b"---\\nlicense: [\\n---\\n", path_in_repo="README.md", repo_id="someone/mine")
except ValueError as error:
    found["bad card"] = str(error).partition("\\n")[0]
api.create_repo("hidden", private=True)
found["private"] = [status_of(one.model_info, "someone/hidden") for one in (api, stranger, nobody)]
api.create_branch("someone/mine", branch="side")
api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id="someone/mine", revision="side")
api.delete_file("new.txt", "someone/mine", revision="side")
api.delete_folder("sub", "someone/mine", revision="side")
found["branches"] = sorted(branch.name for branch in api.list_repo_refs("someone/mine").branches)
api.create_repo("data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"a,b", path_in_repo="train.csv", repo_id="someone/data", repo_type="dataset")
found["data set"] = open(hf_hub_download("someone/data", "train.csv", repo_type="dataset")).read()
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", TOKENS) as server:
        yield server


def ask(hub: HubServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", hub.server.server_port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def say(hub: HubServer, path: str, content: Any) -> tuple[int, bytes]:
    return ask(hub, "POST", path, json.dumps(content).encode(), Authorization="Bearer secret")


def commit(hub: HubServer, *operations: dict[str, Any]) -> tuple[int, bytes]:
    lines = [{"key": "header", "value": {"summary": "test", "description": ""}}, *operations]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return ask(hub, "POST", "/api/models/someone/mine/commit/main", body, Authorization="Bearer secret")


def announce(hub: HubServer, size: int = len(CONTENT)) -> None:
    say(hub, "/api/repos/create", {"name": "mine", "type": "model"})
    batch = {"operation": "upload", "objects": [{"oid": SHA256, "size": size}]}
    status, answer = say(hub, "/someone/mine.git/info/lfs/objects/batch", batch)
    assert (status, "actions" in json.loads(answer)["objects"][0]) == (200, True)


def large_file(size: int = len(CONTENT)) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": "large.bin", "algo": "sha256", "oid": SHA256, "size": size}}


def test_huggingface_hub_finds_everything_as_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "large.bin").write_bytes(CONTENT)
    (folder / "sub" / "small.txt").write_text("small")
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    child = subprocess.run(
        [sys.executable, "-c", CLIENT, str(folder)],
        env=others
        | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    head = hub.commits("someone/mine")[-1].oid
    assert json.loads(child.stdout) == {
        "user": "someone",
        "address": "someone/mine",
        "again": ["HfHubHTTPError", 409],
        "again, allowed": "someone/mine",
        "commits after the same files": head,
        "head": head,
        "files": ["large.bin", "sub/small.txt"],
        "tree": ["large.bin", "sub"],
        "large": SHA256,
        "downloaded": CONTENT.hex(),
        "snapshot": "small",
        "part": CONTENT[300:308].hex(),
        "exists": [True, False],
        "no file": ["RemoteEntryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no repository": ["RepositoryNotFoundError", 404],
        "wrong token": ["HfHubHTTPError", 401],
        "no token": ["HfHubHTTPError", 401],
        "foreign name": ["HfHubHTTPError", 403],
        "foreign repository": ["HfHubHTTPError", 403],
        "outdated": ["HfHubHTTPError", 412],
        "bad card": "Invalid metadata in README.md.",
        "private": [None, ["RepositoryNotFoundError", 404], ["RepositoryNotFoundError", 401]],
        "branches": ["main", "side"],
        "data set": "a,b",
    }
    assert len(hub.commits("someone/mine")) == 2  # the empty first one, and one upload; the same files again make none
    assert hub.files("someone/mine") == {"large.bin": CONTENT, "sub/small.txt": b"small"}
    assert hub.files("someone/mine", branch="side") == {"large.bin": CONTENT}
    assert hub.files("someone/data", "datasets") == {"train.csv": b"a,b"}


@pytest.mark.parametrize(
    "body", [CONTENT[:-1], CONTENT + b"x", bytes(len(CONTENT))], ids=["shorter", "longer", "other bytes"]
)
def test_an_upload_that_is_not_what_was_announced_is_refused(hub: HubServer, body: bytes) -> None:
    announce(hub)
    assert ask(hub, "PUT", f"/large/{SHA256}", body)[0] == 400
    assert commit(hub, large_file())[0] == 400
    assert hub.files("someone/mine") == {}


def test_an_upload_that_nobody_announced_is_refused(hub: HubServer) -> None:
    assert ask(hub, "PUT", f"/large/{SHA256}", CONTENT)[0] == 400


def test_a_commit_with_a_wrong_size_is_refused(hub: HubServer) -> None:
    announce(hub)
    assert ask(hub, "PUT", f"/large/{SHA256}", CONTENT)[0] == 200
    assert commit(hub, large_file(size=7))[0] == 400
    assert commit(hub, large_file())[0] == 200
    assert hub.files("someone/mine") == {"large.bin": CONTENT}


def test_a_commit_of_which_one_part_fails_changes_nothing(hub: HubServer) -> None:
    announce(hub)
    small = {"path": "small.txt", "encoding": "base64", "content": base64.b64encode(b"small").decode()}
    assert commit(hub, {"key": "file", "value": small}, large_file())[0] == 400
    assert hub.files("someone/mine") == {}
    assert len(hub.commits("someone/mine")) == 1


def test_a_body_in_chunks_is_read(hub: HubServer) -> None:
    announce(hub)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (CONTENT[:100], CONTENT[100:])) + b"0\r\n\r\n"
    assert ask(hub, "PUT", f"/large/{SHA256}", chunks, **{"Transfer-Encoding": "chunked"})[0] == 200
    assert (hub.blobs / SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=10-19", 206, CONTENT[10:20]),
        ("bytes=1000-", 206, CONTENT[1000:]),
        ("bytes=1000-5000", 206, CONTENT[1000:]),
        ("bytes=-4", 206, CONTENT[-4:]),
        ("bytes=5000-", 416, b""),
        ("bytes=-", 200, CONTENT),
    ],
)
def test_a_part_of_a_file_can_be_asked_for(hub: HubServer, asked: str, status: int, expected: bytes) -> None:
    announce(hub)
    ask(hub, "PUT", f"/large/{SHA256}", CONTENT)
    assert ask(hub, "GET", f"/large/{SHA256}", Range=asked) == (status, expected)


def test_a_token_must_not_reach_the_host_of_large_files(hub: HubServer) -> None:
    announce(hub)
    ask(hub, "PUT", f"/large/{SHA256}", CONTENT)
    assert ask(hub, "GET", f"/large/{SHA256}", Authorization="Bearer secret")[0] == 400


def test_what_is_asked_stands_in_the_list_of_requests(hub: HubServer) -> None:
    ask(hub, "GET", "/api/whoami-v2", Authorization="Bearer another")
    ask(hub, "HEAD", "/nothing%20here")
    assert [(one.method, one.path, one.status, one.user) for one in hub.requests] == [
        ("GET", "/api/whoami-v2", 200, "stranger"),
        ("HEAD", "/nothing here", 404, None),
    ]
