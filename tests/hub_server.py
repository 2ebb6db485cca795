"""A Hub on this machine: the part of the Hub's HTTP interface that the unmodified huggingface_hub client uses.

Repositories, commits, branches and large files live in memory. Faults come to order:

    with HubServer() as hub:
        hub.fail("POST", "/commit/", status=503)                  # the next commit fails
        hub.fail("PUT", "/lfs/", action="drop", times=2)          # two uploads lose their connection
        ...
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".png", ".jpg")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class File:
    """One file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, title: str, files: dict[str, File], branch: str = "main") -> Commit:
        stamp = f"{self.kind}{self.id}{len(self.commits)}{sorted((path, file.oid) for path, file in files.items())}"
        commit = Commit(hashlib.sha1(stamp.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.refs[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(unquote(revision), revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"no revision {revision}", "RevisionNotFound")

    @property
    def files(self) -> dict[str, bytes]:
        """Path -> content on the main branch."""
        return {path: file.content for path, file in self.at("main").files.items()}


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind.

    `status` answers with it; "drop" closes the connection before the request takes effect, "lost" after it; "cut"
    sends half of the body; "slow" sends the body in parts with pauses; "hang" holds the request until the end.
    """

    method: str
    path: str
    status: int
    action: str
    skip: int
    times: int

    def meets(self, method: str, path: str) -> bool:
        if self.times == 0 or method != self.method or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The server; a context manager that runs it on a free port of this machine.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repos: (kind, id) -> repository, kind being "model", "dataset" or "space".
        tokens: token -> who it belongs to; `write: False` makes it a token that may only read.
        requests: (method, path, status) of all answered requests.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, dict[str, Any]] = {
            "hf_me": {"name": "me", "orgs": ["us"]},
            "hf_reader": {"name": "me", "orgs": [], "write": False},
            "hf_you": {"name": "you", "orgs": []},
        }
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.stopping = threading.Event()
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self, method: str, path: str, *, status: int = 500, action: str = "status", skip: int = 0, times: int = 1
    ) -> None:
        """Order a fault for requests whose path matches the expression `path`, the first `skip` of them excepted."""
        self.faults.append(Fault(method, path, status, action, skip, times))

    def seen(self, method: str, path: str) -> list[int]:
        """Return the status of every answered request of a kind."""
        return [status for verb, where, status in self.requests if verb == method and re.search(path, where)]

    def create(self, kind: str, repo: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository with an initial commit."""
        made = self.repos[kind, repo] = Repo(kind, repo, private)
        content = {
            path: File(data, False) for path, data in ({".gitattributes": b"*.bin lfs\n"} | (files or {})).items()
        }
        made.add("initial commit", content)
        return made

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.meets(method, path)), None)


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        hub = self.server_hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        fault = hub.fault_for(self.command, self.path)
        action = fault.action if fault else ""
        if action == "hang":
            hub.stopping.wait(60)
        if action in ("drop", "hang"):
            self._close()
            return
        try:
            if fault and action == "status":
                raise Refusal(fault.status, "a fault to order")
            with hub.lock:
                status, headers, content = self._route(body)
        except Refusal as refusal:
            status, content = refusal.status, json.dumps({"error": str(refusal)}).encode()
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": str(refusal), "Content-Type": "application/json"}
        hub.requests.append((self.command, self.path, status))
        if action == "lost":
            self._close()
            return
        self._send(status, headers, content, action)

    def _send(self, status: int, headers: dict[str, str], content: bytes, action: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if action == "cut":
            self.wfile.write(content[: len(content) // 2])
            self._close()
        elif action == "slow":
            step = max(1, len(content) // 10)
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                time.sleep(0.03)
        else:
            self.wfile.write(content)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _route(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        for method, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path) if self.command in method.split("|") else None
            if found:
                answer = handler(self, body, **found.groupdict())
                if isinstance(answer, tuple):
                    return answer
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        raise Refusal(404, f"{self.command} {path} is not part of this Hub")

    def _user(self) -> dict[str, Any]:
        given = self.headers.get("Authorization")
        if not given:
            raise Refusal(401, "Invalid username or password.")
        token = given.removeprefix("Bearer ")
        if token not in self.server_hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server_hub.tokens[token]

    def _repo(self, kind: str | None, id: str, write: bool = False) -> Repo:
        repo = self.server_hub.repos.get((KINDS.get(kind or "models", "model"), id))
        user = self._user() if write or self.headers.get("Authorization") else None
        owner = id.split("/")[0]
        member = user is not None and owner in (user["name"], *user["orgs"])
        if repo is None or (repo.private and not member):
            raise Refusal(404, "Repository Not Found", "RepoNotFound")
        if write and not (member and user and user.get("write", True)):
            raise Refusal(403, f"you don't have the rights to write to {id}")
        return repo

    def whoami(self, body: bytes) -> Any:
        user = self._user()
        role = "write" if user.get("write", True) else "read"
        token = {"displayName": "test", "role": role}
        orgs = [{"name": name} for name in user["orgs"]]
        return {"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": token}}

    def create(self, body: bytes) -> Any:
        content, user = json.loads(body), self._user()
        owner = content.get("organization") or user["name"]
        kind, id = content.get("type") or "model", f"{owner}/{content['name']}"
        if owner not in (user["name"], *user["orgs"]) or not user.get("write", True):
            raise Refusal(403, f"you don't have the rights to create a repository under {owner}")
        place = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.server_hub.url}/{place}{id}", "id": id}
        if (kind, id) in self.server_hub.repos:
            error = {"error": "You already created this repo", "url": answer["url"]}
            return 409, {"Content-Type": "application/json"}, json.dumps(error).encode()
        private = content.get("private") or content.get("visibility") == "private"
        self.server_hub.create(kind, id, private=bool(private)).sdk = content.get("sdk")
        return answer

    def delete(self, body: bytes) -> Any:
        content = json.loads(body)
        id = f"{content.get('organization') or self._user()['name']}/{content['name']}"
        repo = self._repo(f"{content.get('type') or 'model'}s", id, write=True)
        del self.server_hub.repos[repo.kind, id]
        return {}

    def validate_card(self, body: bytes) -> Any:
        text = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            yaml.safe_load(match.group(1) if match else "")
        except yaml.YAMLError as error:
            return {"errors": [{"message": str(error)}], "warnings": []}
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        files = self._repo(kind, id, write=True).at(revision).files
        answer = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE_SUFFIXES) or file["size"] > 10 * 2**20 else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def large_batch(self, body: bytes, kind: str | None, id: str) -> Any:
        self._repo(kind, id, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            href = f"{self.server_hub.url}/lfs/{entry['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            stored = entry["oid"] in self.server_hub.large
            objects.append({**entry, **({} if stored else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def store_large(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this SHA-256")
        self.server_hub.large[oid] = body
        return {}

    def verify_large(self, body: bytes, oid: str) -> Any:
        if len(self.server_hub.large.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "this object was not uploaded")
        return {}

    def commit(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        repo = self._repo(kind, id, write=True)
        files, title = dict(repo.at(revision).files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.at(revision).oid):
                    raise Refusal(412, "a commit has happened since")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server_hub.large:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.server_hub.large[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        commit = repo.add(title, files, revision)
        return {
            "commitOid": commit.oid,
            "commitUrl": f"{self.server_hub.url}/{id}/commit/{commit.oid}",
            "hookOutput": "",
        }

    def tree(self, body: bytes, kind: str, id: str, revision: str, folder: str | None = None) -> Any:
        files = self._repo(kind, id).at(revision).files
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries = [file.entry(path) for path, file in sorted(files.items()) if path.startswith(prefix)]
        if prefix and not entries:
            raise Refusal(404, f"no folder {prefix}", "EntryNotFound")
        if self.query.get("recursive", "").lower() != "true":
            below = {path[len(prefix) :].partition("/")[0] for path in files if path.startswith(prefix)}
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
            folders = sorted(name for name in below if f"{prefix}{name}" not in files)
            entries += [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders]
        return entries

    def paths_info(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        files = self._repo(kind, id).at(revision).files
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
        entries = [files[path].entry(path) for path in paths if path in files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]

    def info(self, body: bytes, kind: str, id: str, revision: str = "main") -> Any:
        repo = self._repo(kind, id)
        commit = repo.at(revision)
        match = re.match(
            r"---\n(.*?)\n---", commit.files.get("README.md", File(b"", False)).content.decode(), re.DOTALL
        )
        card = yaml.safe_load(match.group(1)) if match else {}
        library = [card["library_name"]] if "library_name" in card else []
        tags = [*library, *(card.get("tags") or [])]
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.oid} for path, file in commit.files.items()
        ]
        facts = {"private": repo.private, "tags": tags, "cardData": card, "siblings": siblings, "downloads": 0}
        return {"_id": "0", "id": id, "sha": commit.oid, "gated": False, "disabled": False, **facts}

    def branch(self, body: bytes, kind: str, id: str, name: str) -> Any:
        repo = self._repo(kind, id, write=True)
        repo.refs[name] = repo.at("main").oid
        return {}

    def resolve(self, body: bytes, kind: str | None, id: str, revision: str, path: str) -> Any:
        commit = self._repo(kind, id).at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise Refusal(404, f"no file {path}", "EntryNotFound")
        file = commit.files[path]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.command == "HEAD":
            return 200, headers | {"Content-Length": str(len(file.content))}, file.content
        size = len(file.content)
        start = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        stop = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if start >= size:
            raise Refusal(416, "the range starts past the end")
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return 206, headers, file.content[start:stop]


_REPO = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("DELETE", "/api/repos/delete", _Handler.delete),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", _Handler.large_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store_large),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify_large),
    ("POST", rf"{_API}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"{_API}/tree/{_REVISION}(?P<folder>/.*)?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", rf"{_API}/revision/{_REVISION}", _Handler.info),
    ("POST", rf"{_API}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("GET", _API, _Handler.info),
    ("GET|HEAD", rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
