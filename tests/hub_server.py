"""A Hugging Face Hub on loopback, for tests of what is pushed and loaded: the endpoints that huggingface_hub calls, over real HTTP.

    with HubServer(folder, {"secret": "someone"}) as hub:
        ...  # a child process with HF_ENDPOINT=hub.url, HF_TOKEN=secret, HF_HUB_DISABLE_XET=1 and without HF_HUB_OFFLINE
        hub.files("someone/model")["config.json"]

It must be a child process: huggingface_hub reads these variables when it is imported, and the tests' own process is offline.
Files are stored once each in the folder, under their SHA-256; repositories are chains of commits, of models and of data sets.
Large and binary files take the way of Git LFS (batch, upload, verify; download through a redirect to another host, as on the
Hub, where no token may follow). Xet is not spoken: newer clients upload with it unless HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pkl", ".parquet", ".arrow", ".npz", ".png", ".jpg", ".zip", ".gz")
LARGEST_REGULAR_FILE = 10 * 2**20
CREATED = "2024-01-01T00:00:00.000Z"
KINDS = {"models": "", "datasets": "datasets/"}  # in the addresses of the API, and of files


@dataclass(frozen=True)
class Blob:
    """One content of a file; `oid` is git's name of it, or for a large file that of its pointer."""

    sha256: str
    size: int
    oid: str
    is_large: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A branch that is no key of `branches` does not exist; every branch begins with an empty first commit."""

    kind: str
    name: str
    private: bool
    branches: dict[str, list[Commit]]

    def find(self, revision: str) -> Commit | None:
        """The head of a branch, or the commit of that name."""
        revision = revision.removeprefix("refs/heads/")
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass(frozen=True)
class Request:
    """What came whole, from whom by the token, and what was answered."""

    method: str
    path: str
    status: int
    user: str | None


@dataclass
class Hold:
    """Requests that wait for the test: `reached` when one is there, until `release` is set."""

    method: str
    pattern: str
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """An answer other than success, with the headers that huggingface_hub makes its exceptions of."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


@dataclass(frozen=True)
class Answer:
    """JSON, or the content of a blob (of which `Range` may ask for a part)."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    blob: Blob | None = None


class HubServer:
    """Serves while it is entered.

    Attributes:
        url: what HF_ENDPOINT must be.
        requests: everything that was asked and answered, in order of the answers.
    """

    def __init__(self, folder: Path, users_of_tokens: dict[str, str]) -> None:
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.users_of_tokens = users_of_tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.expected_uploads: dict[str, int] = {}
        self.holds: list[Hold] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.url_of_large_files = f"http://localhost:{self.server.server_port}/large"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self.holds:
            hold.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # What a test looks at and does.

    def commits(self, name: str, kind: str = "models", branch: str = "main") -> list[Commit]:
        """The commits of a branch, the empty first one included."""
        return list(self.repositories[kind, name].branches[branch])

    def files(self, name: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """Path and content of every file at the head of a branch."""
        head = self.repositories[kind, name].branches[branch][-1]
        return {path: self.read(blob) for path, blob in head.files.items()}

    def hold(self, method: str, pattern: str) -> Hold:
        """Let requests whose address matches the pattern wait, before any of their body is read."""
        hold = Hold(method, pattern)
        self.holds.append(hold)
        return hold

    # Storage.

    def read(self, blob: Blob) -> bytes:
        return (self.blobs / blob.sha256).read_bytes()

    def store(self, content: bytes) -> Blob:
        """Keep a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.blobs / sha256).write_bytes(content)
        return Blob(sha256, len(content), git_name("blob", content), is_large=False)

    def find_large(self, sha256: str, size: int | None) -> Blob | None:
        path = self.blobs / sha256
        if not path.is_file() or size not in {None, path.stat().st_size}:
            return None
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Blob(sha256, size, git_name("blob", pointer.encode()), is_large=True)

    def user_of(self, token: str | None) -> str | None:
        if token is not None and token not in self.users_of_tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return None if token is None else self.users_of_tokens[token]

    def find_repository(self, kind: str, name: str, user: str | None, *, to_write: bool = False) -> Repository:
        repository = self.repositories.get((kind, name))
        is_owner = user == name.partition("/")[0]
        if repository is None or (repository.private and not is_owner):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if to_write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if to_write and not is_owner:
            raise Refusal(403, f"{user} has no right to write to {name}")
        return repository


def git_name(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def find_commit(repository: Repository, revision: str) -> Commit:
    commit = repository.find(unquote(revision))
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


# ------------------------------------------------------------------------------------------------------------- endpoints


@dataclass(frozen=True)
class Call:
    """A request as an endpoint sees it; `part` are the named parts of its address."""

    hub: HubServer
    user: str | None
    part: dict[str, str]
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, *, to_write: bool = False) -> Repository:
        kind = self.part.get("kind", "models").rstrip("/") or "models"
        return self.hub.find_repository(kind, self.part["name"], self.user, to_write=to_write)


def who_am_i(call: Call) -> Answer:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    return Answer(
        {"type": "user", "name": call.user, "fullname": call.user, "orgs": [], "auth": {"type": "access_token"}}
    )


def create_repository(call: Call) -> Answer:
    asked = call.json
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    name = f"{asked.get('organization') or call.user}/{asked['name']}"
    kind = f"{asked.get('type') or 'model'}s"
    address = {"url": f"{call.hub.url}/{KINDS[kind]}{name}", "name": name}
    if name.partition("/")[0] != call.user:
        raise Refusal(403, f"{call.user} has no right to create a repository in {name.partition('/')[0]}")
    with call.hub.lock:
        if (kind, name) in call.hub.repositories:
            return Answer(address | {"error": "You already created this repo"}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        first = Commit(git_name("commit", f"{kind} {name}".encode()), "initial commit", {})
        call.hub.repositories[kind, name] = Repository(kind, name, private, {"main": [first]})
    return Answer(address)


def create_branch(call: Call) -> Answer:
    repository = call.repository(to_write=True)
    name = unquote(call.part["revision"])
    with call.hub.lock:
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.branches[name] = [find_commit(repository, (call.json or {}).get("startingPoint") or "main")]
    return Answer({})


def describe_repository(call: Call) -> Answer:
    repository = call.repository()
    commit = find_commit(repository, call.part["revision"] or "main")
    return Answer(
        {
            "_id": "0" * 24,
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.partition("/")[0],
            "sha": commit.oid,
            "createdAt": CREATED,
            "lastModified": CREATED,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
    )


def list_branches(call: Call) -> Answer:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
        for name, commits in call.repository().branches.items()
    ]
    return Answer({"branches": branches, "converts": [], "tags": []})


def describe_file(path: str, blob: Blob) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
    if blob.is_large:
        described["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return described


def list_folder(files: dict[str, Blob], folder: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """Files and folders below a folder ("" is the whole repository)."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path, blob in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                folders.add(prefix + "/".join(parts[:depth]))
        if recursive or len(parts) == 1:
            yield describe_file(path, blob)
    for name in sorted(folders):
        yield {"type": "directory", "path": name, "oid": git_name("tree", name.encode()), "size": 0}


def list_tree(call: Call) -> Answer:
    commit = find_commit(call.repository(), call.part["revision"])
    recursive = call.query.get("recursive", ["false"])[0].lower() in {"true", "1"}
    folder = unquote(call.part["path"] or "").strip("/")
    listed = list(list_folder(commit.files, folder, recursive=recursive))
    if folder and not listed:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
    return Answer(listed)


def describe_paths(call: Call) -> Answer:
    commit = find_commit(call.repository(), call.part["revision"])
    # JSON or a form, by the client's version.
    asked = call.json["paths"] if call.body.startswith(b"{") else parse_qs(call.body.decode())["paths"]
    found = {path: describe_file(path, blob) for path, blob in commit.files.items()}
    found |= {one["path"]: one for one in list_folder(commit.files, "", recursive=True)}
    return Answer([found[path] for path in asked if path in found])


def validate_card(call: Call) -> Answer:
    """YAML metadata at the top of README.md."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s", call.json["content"] + "\n", re.DOTALL)
    if found is None:
        return Answer({"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []})
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return Answer({"warnings": [], "errors": [{"message": str(error)}]}, status=400)
    if not isinstance(metadata, dict):
        return Answer({"warnings": [], "errors": [{"message": "metadata must be a mapping"}]}, status=400)
    return Answer({"warnings": [], "errors": []})


def choose_upload_modes(call: Call) -> Answer:
    files = find_commit(call.repository(to_write=True), call.part["revision"]).files

    def choose(asked: dict[str, Any]) -> dict[str, Any]:
        is_large = (
            asked["path"].endswith(LFS_SUFFIXES)
            or asked["size"] > LARGEST_REGULAR_FILE
            or b"\0" in base64.b64decode(asked["sample"])
        )
        known = files.get(asked["path"])
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": False,
            "oid": None if known is None else known.sha256 if known.is_large else known.oid,
        }

    return Answer({"files": [choose(asked) for asked in call.json["files"]], "commitOid": ""})


def offer_uploads(call: Call) -> Answer:
    """Git LFS's batch: where to send each large file, and nothing where it is already here."""
    call.repository(to_write=True)
    if call.json["operation"] != "upload" or call.json.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "Only uploads with SHA-256 are possible here")

    def offer(asked: dict[str, Any]) -> dict[str, Any]:
        offered = {"oid": asked["oid"], "size": asked["size"]}
        if call.hub.find_large(asked["oid"], asked["size"]) is None:
            call.hub.expected_uploads[asked["oid"]] = asked["size"]
            offered["actions"] = {
                "upload": {"href": f"{call.hub.url_of_large_files}/{asked['oid']}", "header": {}},
                "verify": {"href": f"{call.hub.url}/api/{call.part['name']}/verify", "header": {}},
            }
        return offered

    return Answer({"transfer": "basic", "objects": [offer(asked) for asked in call.json["objects"]]})


def take_upload(call: Call) -> Answer:
    """A large file. Who holds the address may send exactly the announced content."""
    sha256 = call.part["sha256"]
    if len(call.body) != call.hub.expected_uploads.get(sha256) or hashlib.sha256(call.body).hexdigest() != sha256:
        raise Refusal(400, f"What came is not the announced {sha256}")
    (call.hub.blobs / sha256).write_bytes(call.body)
    return Answer({})


def verify_upload(call: Call) -> Answer:
    if call.hub.find_large(call.json["oid"], call.json["size"]) is None:
        raise Refusal(404, "The file has not arrived")
    return Answer({})


def commit_files(call: Call) -> Answer:
    """Lines of JSON: a header, then operations. All of them or, where one fails, none."""
    repository = call.repository(to_write=True)
    if "create_pr" in call.query:
        raise Refusal(400, "Pull requests are not possible here")
    branch = unquote(call.part["revision"])
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    with call.hub.lock:
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = repository.branches[branch][-1]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            apply_operation(call.hub, files, line["key"], line["value"])
        content = json.dumps([parent.oid, header, {path: blob.sha256 for path, blob in files.items()}], sort_keys=True)
        commit = Commit(git_name("commit", content.encode()), header["summary"], files)
        repository.branches[branch].append(commit)
    url = f"{call.hub.url}/{KINDS[repository.kind]}{repository.name}/commit/{commit.oid}"
    return Answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


def apply_operation(hub: HubServer, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Change `files` by one line of a commit."""
    if key == "file":
        files[value["path"]] = hub.store(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        blob = hub.find_large(value["oid"], value.get("size"))
        if blob is None:
            raise Refusal(400, f"The large file of {value['path']} was never uploaded, or has another size")
        files[value["path"]] = blob
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]
    elif key != "header":
        raise Refusal(400, f"Unknown operation {key}")


def resolve_file(call: Call) -> Answer:
    """A small file itself; of a large one its metadata and where it lies."""
    commit = find_commit(call.repository(), call.part["revision"])
    path = unquote(call.part["path"])
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
    if not blob.is_large:
        return Answer(headers=headers, blob=blob)
    headers |= {
        "X-Linked-Size": str(blob.size),
        "X-Linked-ETag": f'"{blob.sha256}"',
        "Location": f"{call.hub.url_of_large_files}/{blob.sha256}",
    }
    return Answer({}, status=302, headers=headers)


def send_large_file(call: Call) -> Answer:
    blob = call.hub.find_large(call.part["sha256"], None)
    if blob is None:
        raise Refusal(404, "Not found")
    return Answer(headers={"ETag": f'"{blob.sha256}"'}, blob=blob)


NAME = r"(?P<name>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
SITE = rf"/(?P<kind>datasets/)?{NAME}"
LARGE = r"/large/(?P<sha256>[0-9a-f]{64})"
ENDPOINTS: list[tuple[str, str, Callable[[Call], Answer]]] = [
    ("GET", r"/api/whoami-v2", who_am_i),
    ("POST", r"/api/repos/create", create_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", rf"/api/{NAME}/verify", verify_upload),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", describe_repository),
    ("GET", rf"{API}/refs", list_branches),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", list_tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", describe_paths),
    ("POST", rf"{API}/branch/(?P<revision>[^/]+)", create_branch),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", choose_upload_modes),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit_files),
    ("POST", rf"{SITE}\.git/info/lfs/objects/batch", offer_uploads),
    ("PUT", LARGE, take_upload),
    ("GET", LARGE, send_large_file),
    ("GET", rf"{SITE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve_file),
]


# ------------------------------------------------------------------------------------------------------------------ HTTP


class Handler(BaseHTTPRequestHandler):
    """Finds the endpoint of a request, and writes its answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self) -> None:
        try:
            self.wait_for_test()
            try:
                answer = self.find_answer()
            except Refusal as refusal:
                answer = Answer({"error": str(refusal)}, refusal.status, refusal.headers)
            self.write(answer)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has gone

    def wait_for_test(self) -> None:
        for hold in self.hub.holds:
            if hold.method == self.command and re.search(hold.pattern, self.path):
                hold.reached.set()
                hold.release.wait()

    def find_answer(self) -> Answer:
        address = urlsplit(self.path)
        body = self.read_body()
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, endpoint in ENDPOINTS:
            found = re.fullmatch(pattern, address.path)
            if expected == method and found is not None:
                part = {name: value or "" for name, value in found.groupdict().items()}
                if address.path.startswith("/large/") and self.token is not None:
                    raise Refusal(400, "A token was sent to the host of large files")
                return endpoint(Call(self.hub, self.hub.user_of(self.token), part, parse_qs(address.query), body))
        raise Refusal(404, f"{self.command} {address.path} is not known here")

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization")
        return None if header is None else header.removeprefix("Bearer ")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionAbortedError
            return body
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def write(self, answer: Answer) -> None:
        body = json.dumps(answer.body).encode() if answer.blob is None else self.hub.read(answer.blob)
        status, headers = answer.status, dict(answer.headers)
        if answer.blob is None:
            headers["Content-Type"] = "application/json"
        else:
            headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
            status, body, range_headers = cut(body, self.headers.get("Range"))
            headers |= range_headers
        # Before the answer: who has that may look at the list.
        user = self.hub.users_of_tokens.get(self.token or "")
        self.hub.requests.append(Request(self.command, unquote(urlsplit(self.path).path), status, user))
        self.send_response(status)
        headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, quote(value, safe=" -_.~:/?&=\"'(),;*"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def cut(body: bytes, asked: str | None) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers for a `Range` such as "bytes=5-", "bytes=0-9" or "bytes=-3"."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if found is None or found[0] == "bytes=-":
        return 200, body, {}
    if found[1]:
        first, last = int(found[1]), min(int(found[2] or len(body)), len(body) - 1)
    else:
        first, last = max(len(body) - int(found[2]), 0), len(body) - 1
    if first > last:
        return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
    return 206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
