"""A Hub on this machine: as much of the protocol as huggingface_hub speaks to load and upload a model, and faults.

Weights are kept as the Hub keeps them, outside git: their metadata names a sha256, and their content is elsewhere,
behind a redirect. Everything else is served where it is asked for, named by its git hash.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WEIGHTS = (".safetensors", ".bin")
DATE = "2023-09-13T00:00:00.000Z"

Files = Mapping[str, bytes]


def read_files(folder: Path) -> dict[str, bytes]:
    """Read what a repository made from a folder holds: contents by path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@dataclass
class Repository:
    """Commits by their hash, and the names of some of them: a branch, `main`, and tags.

    Args:
        token: what a reader must send for the files, as for a gated model; its listing stays public.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: Files, *names: str) -> str:
        """Store a version, let `main` and the given names point at it, and return its hash."""
        parent = self.names.get("main", "")
        sha = hashlib.sha1(parent.encode() + b"".join(name.encode() + files[name] for name in files)).hexdigest()
        self.commits[sha] = dict(files)
        self.names |= dict.fromkeys(("main", *names), sha)
        return sha

    def find(self, revision: str) -> str | None:
        """Return the hash that a branch, a tag or a hash stands for."""
        sha = self.names.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    """What is wrong with the answers about a file.

    Args:
        statuses: errors to answer with first, one for each request.
        cuts: how many transfers of the content break off in the middle: its full length was announced.
        loop: redirect the content to itself, without end.
        damage: what the content becomes on its way; its metadata stays that of the whole file.
        pause: seconds between the quarters of the content.
    """

    statuses: list[int] = field(default_factory=list)
    cuts: int = 0
    loop: bool = False
    damage: Callable[[bytes], bytes] = bytes
    pause: float = 0.0


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    """Describe a file as the Hub's listing does."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(WEIGHTS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serve `repositories` on a free port of this machine; `requests` records the methods and paths of requests.

    `faults` are by the end of a path, so that "" is the whole Hub; `moved` has the new names of repositories.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, Fault] = {}
        self.moved: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_of(self, path: str) -> Fault:
        return next((fault for name, fault in self.faults.items() if path.endswith(name)), Fault())

    def recover(self) -> None:
        """Remove all faults."""
        self.faults.clear()
        self.moved.clear()

    def fail(self) -> None:
        """Answer every request with 503."""
        self.faults[""] = Fault(statuses=[503] * 1000)

    def downloads(self) -> list[str]:
        """Return the paths of the files that were requested; again for each further part of a broken download."""
        pattern = re.compile(r"(?:/[^/]+/[^/]+/resolve/[^/]+|/weights/[^/]+/[^/]+/[0-9a-f]{40})/(.+)")
        found = [pattern.fullmatch(path) for method, path in self.requests if method == "GET"]
        return sorted(match[1] for match in found if match)


@cache
def the_hub() -> Hub:
    """Start the one Hub of this run of the tests; its clients know its address from their start."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride] (the base class knows no other)

    def do_GET(self) -> None:
        path, fault = self._begin()
        moved = next((name for name in self.server.moved if f"/{name}/" in f"{path}/"), None)
        if fault.statuses:
            self._refuse(fault.statuses.pop(0), None, "Something went wrong on our side")
        elif moved is not None:
            self._send(307, {"Location": self.path.replace(moved, self.server.moved[moved], 1)})
        elif fault.loop and (path.startswith("/weights/") or not path.endswith(WEIGHTS)):
            self._send(307, {"Location": self.path})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._send_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._send_tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/weights/(.+)/([0-9a-f]{40})/(.+)", path):
            self._send_content(self.server.repositories[match[1]].commits[match[2]][match[3]], match[3])
        else:
            self._refuse(404, None, "Not found")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Take the parts of an upload: a new repository, which files are weights, where they go, the commit."""
        (path, fault), body = self._begin(), self._read()
        if fault.statuses:
            self._refuse(fault.statuses.pop(0), None, "Something went wrong on our side")
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []}, {})
        elif "Authorization" not in self.headers:
            self._refuse(401, None, "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._sort_files(json.loads(body))
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._take_weights(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, None, "Not found")

    def do_PUT(self) -> None:
        self._begin()
        content = self._read()
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self._send(200, {})

    def _begin(self) -> tuple[str, Fault]:
        """Record the request and return its path and fault."""
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
        return path, self.server.fault_of(path)

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _create(self, asked: Mapping[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo_id}", "id": repo_id}
        if repo_id in self.server.repositories:
            self._send(409, {"Content-Type": "application/json"}, json.dumps(url).encode())
            return
        self.server.repositories[repo_id] = Repository()
        self.server.repositories[repo_id].commit({})
        self._send_json(url, {})

    def _sort_files(self, asked: Mapping[str, Any]) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(WEIGHTS) else "regular"}
            for file in asked["files"]
        ]
        self._send_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]}, {})

    def _take_weights(self, asked: Mapping[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/uploads/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects}, {})

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[repo_id]
        files = dict(repository.commits[repository.names["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        sha = repository.commit(files)
        self._send_json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}, {})

    def _find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """Find a version, or answer that there is none, as the Hub does."""
        repository = self.server.repositories.get(repo_id)
        if repository is None:  # it does not tell strangers which repositories exist
            known = "Authorization" in self.headers
            self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        sha = repository.find(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha

    def _send_info(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            repository, sha = found
            info = {"id": repo_id, "modelId": repo_id, "sha": sha, "tags": ["diffusers"], "downloads": 0, "likes": 0}
            info |= {"private": False, "disabled": False, "gated": "manual" if repository.token else False}
            info |= {"lastModified": DATE, "createdAt": DATE}
            info |= {"siblings": [{"rfilename": path} for path in repository.commits[sha]]}
            self._send_json(info, {"X-Repo-Commit": sha})

    def _send_tree(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            repository, sha = found
            tree = [entry_of(path, content) for path, content in repository.commits[sha].items()]
            self._send_json(tree, {"X-Repo-Commit": sha})

    def _send_file(self, repo_id: str, revision: str, path: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        repository, sha = found
        sent = self.headers.get("Authorization")
        if repository.token and sent != f"Bearer {repository.token}":
            self._refuse(403 if sent else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif path not in repository.commits[sha]:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        elif path.endswith(WEIGHTS):
            content = repository.commits[sha][path]
            digest = hashlib.sha256(content).hexdigest()
            linked = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            # Another host, as the Hub's storage is: the client requests no metadata from it.
            location = f"http://localhost:{self.server.server_port}/weights/{repo_id}/{sha}/{path}"
            self._send(302, {"Location": location, **linked})
        else:
            content = repository.commits[sha][path]
            self._send_content(content, path, {"X-Repo-Commit": sha, "ETag": f'"{git_hash(content)}"'})

    def _send_content(self, content: bytes, path: str, headers: Mapping[str, str] | None = None) -> None:
        """Send a file, or its part from the requested byte on."""
        status, headers, fault = 200, dict(headers or {}), self.server.fault_of(path)
        if self.command == "GET":
            content = fault.damage(content)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        with self.server.lock:
            cut = self.command == "GET" and fault.cuts > 0
            fault.cuts -= cut
        self._send(status, headers, content, len(content) // 2 if cut else None, fault.pause)

    def _send_json(self, value: Any, headers: Mapping[str, str]) -> None:
        self._send(200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self._send(status, {**codes, "X-Error-Message": message, **(headers or {})}, message.encode())

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes = b"", length: int | None = None, pause: float = 0.0
    ) -> None:
        """Answer; with `length`, close the connection after that many bytes of a body announced as longer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            body = body[:length]
            piece = len(body) // 4 + 1 if pause else len(body) + 1
            for start in range(0, len(body), piece):
                self.wfile.write(body[start : start + piece])
                time.sleep(pause)
        if length is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `requests` has them."""
