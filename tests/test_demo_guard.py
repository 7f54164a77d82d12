"""What the demo refuses: foreign hosts and origins, long bodies, files by URL, strangers without a password.

The page is served by this process, without a model.
"""

import asyncio
import http.client
import json
import os
import socket
import stat
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
import httpx
from gradio import processing_utils

from rectified_diffusers.demo import guard
from rectified_diffusers.demo.guard import Guard
from rectified_diffusers.demo.page import build_page
from rectified_diffusers.demo.requests import comparison_with
from rectified_diffusers.demo.server import FOLDER, launch, private_folder
from rectified_diffusers.demo.worker import LoadingStudio
from tests.marks import slow_but

PROXY = "demo.example"
WAIT = 300  # seconds until a test gives up
PATHS = [("GET", "/config"), ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join"), ("GET", "/")]
UPLOAD = "gradio_api/upload"


class Server:
    """The page on the loopback interface, behind a proxy named `demo.example`; `folder` has its files."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        studio = LoadingStudio("no model", comparison_with(False, 8, 1.0), Future(), can_sketch=False)
        self.page = build_page(studio)
        self.url = launch(self.page, "127.0.0.1", 0, allowed_hosts=[PROXY], **options)
        self.address = self.url.split("/")[2]

    def status(self, method: str, path: str, **headers: str | list[str]) -> tuple[int, str]:
        """Send the headers of a request, and only these, and return the status and the text of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=WAIT)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, values in {"Host": self.address, **headers}.items():
            for value in values if isinstance(values, list) else [values]:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("files")))
        with private_folder():
            server = Server(Path(os.environ[FOLDER]))
            yield server
            server.page.close()
        assert not server.folder.exists()


@pytest.mark.parametrize(
    "host", ["{}", "localhost:8080", "LOCALHOST", "[::1]:7860", "127.0.0.1", PROXY, f"{PROXY}:443"]
)
def test_the_names_of_this_machine_and_of_its_proxy_are_served(server, host):
    assert server.status("GET", "/config", Host=host.format(server.address))[0] == 200


FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.nip.io:7860",
    "evil.example:7860",
    "10.0.0.1",
    "[::1",
    "",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_foreign_host_is_refused(server, method, path, host):
    status, text = server.status(method, path, Host=host, Content_Length="0")
    assert status == 403
    assert text == f"This page is not served at {host!r}. Its operator can allow a name with --allow-host NAME."


def test_two_hosts_are_refused(server):
    assert server.status("GET", "/config", Host=[server.address, "evil.example"])[0] in (400, 403)


SITES = [
    "https://evil.example",
    "null",
    "http://localhost:1",
    "http://{}.evil.example",
    "http://evil.example:7860",
    "x",
]


@pytest.mark.parametrize("origin", SITES)
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_foreign_origin_is_refused(server, method, path, origin):
    origin = origin.format(server.address)
    status, text = server.status(method, path, Origin=origin, Content_Length="0")
    assert status == 403
    assert repr(origin) in text


def test_the_page_itself_and_its_proxy_may_send_requests(server):
    assert server.status("GET", "/config", Origin=f"http://{server.address}")[0] == 200
    assert server.status("GET", "/config", Origin="http://localhost:9", Host="localhost:9")[0] == 200  # ssh -L 9:...
    assert server.status("GET", "/config", Origin=f"https://{PROXY}")[0] == 200


def files(server: Server) -> list[Path]:
    return sorted(path for path in server.folder.rglob("*") if path.is_file())


def upload(server: Server, size: int, **headers: str) -> httpx.Response:
    content = {"files": ("a.safetensors", bytes(size))}
    return httpx.post(server.url + UPLOAD, files=content, headers=headers, timeout=WAIT)


def test_an_upload_is_stored_for_this_user_alone_unless_a_foreign_site_sends_it(server):
    before = files(server)
    assert upload(server, 1000, Origin="https://evil.example").status_code == 403
    assert upload(server, 1000, Host="evil.example").status_code == 403
    assert files(server) == before
    assert upload(server, guard.MAX_BODY + 1).status_code == 200
    assert len(files(server)) == len(before) + 1
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(("method", "path"), [*PATHS, ("POST", "/login"), ("POST", "/gradio_api/call/draw")])
@pytest.mark.parametrize("size", [2**30, 10**15])
def test_a_body_of_a_gigabyte_is_refused_unread(server, method, path, size):
    status, text = server.status(method, path, Content_Length=str(size))
    assert status == 413
    assert text.startswith(f"A request has at most {256 if path.endswith('upload') else 16} MB, got ")


def test_bodies_are_bounded_to_the_byte(server):
    path = "/gradio_api/queue/join"
    assert server.status("POST", path, Content_Length=str(guard.MAX_BODY + 1))[0] == 413
    assert httpx.post(server.url + path[1:], content=bytes(guard.MAX_BODY), timeout=WAIT).status_code == 422  # read
    assert server.status("POST", f"/{UPLOAD}", Content_Length=str(guard.MAX_UPLOAD + 1))[0] == 413


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_body_of_unknown_length_is_refused(server, method, path):
    assert server.status(method, path, Transfer_Encoding="chunked")[0] == 411


def test_the_folder_of_uploads_is_bounded(server, monkeypatch):
    stored = sum(file.stat().st_size for file in files(server))
    monkeypatch.setattr(guard, "MAX_FILES", stored + 5000)
    assert upload(server, 1000).status_code == 200
    before = files(server)
    answer = upload(server, 5000)
    assert (answer.status_code, answer.text.partition(".")[0]) == (507, "The server has no room for more files")
    assert files(server) == before


def test_uploads_in_progress_count(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MAX_FILES", 1500)
    reached, statuses = [], []

    async def application(scope, receive, send):
        reached.append(scope)
        if len(reached) == 1:
            await call()

    async def send(message):
        statuses.append(message.get("status"))

    async def call():
        headers = [(b"host", b"localhost"), (b"content-length", b"1000")]
        await guarded({"type": "http", "path": "/upload", "headers": headers}, None, send)

    guarded = Guard(application, host="localhost", allowed_hosts=(), folder=str(tmp_path))
    asyncio.run(call())
    assert len(reached) == 1
    assert statuses[0] == 507
    asyncio.run(call())
    assert len(reached) == 2


@pytest.mark.parametrize(
    ("host", "known", "foreign"),
    [
        ("0.0.0.0", ["10.1.2.3", "[fe80::1]:7860", socket.gethostname(), "localhost"], ["evil.example", "10.1.2.3.a"]),
        ("::", ["10.1.2.3", "[fe80::1]"], ["evil.example"]),
        ("10.1.2.3", ["10.1.2.3:7860", "localhost"], ["10.1.2.4", "evil.example"]),
        ("Box.local", ["box.LOCAL:7860"], ["other.local"]),
    ],
)
def test_the_address_of_the_server_is_known(host, known, foreign, tmp_path):
    async def accepts(name):
        messages = []

        async def send(message):
            messages.append(message["type"])

        async def accept(scope, receive, send):
            messages.append("accepted")

        guarded = Guard(accept, host=host, allowed_hosts=(), folder=str(tmp_path))
        await guarded({"type": "websocket", "path": "/", "headers": [(b"host", name.encode())]}, None, send)
        return messages

    for name in known:
        assert asyncio.run(accepts(name)) == ["accepted"]
    for name in foreign:
        assert asyncio.run(accepts(name)) == ["websocket.close"]


def answer(server: Server, function: str, data: list[Any]) -> dict[str, Any]:
    """Call a handler as the page does, and return its last message."""
    config = httpx.get(f"{server.url}config", timeout=WAIT).json()
    index = next(each["id"] for each in config["dependencies"] if each["api_name"] == function)
    visitor = uuid.uuid4().hex
    body = {"data": data, "fn_index": index, "session_hash": visitor}
    httpx.post(f"{server.url}gradio_api/queue/join", json=body, timeout=WAIT).raise_for_status()
    with httpx.stream("GET", f"{server.url}gradio_api/queue/data?session_hash={visitor}", timeout=WAIT) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:") or "{}")
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


FILE = {"path": "https://evil.example/a.safetensors", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("value", [FILE, [FILE], {"x": [FILE]}, {**FILE, "path": "HTTP://evil.example/"}], ids=str)
@pytest.mark.parametrize("place", slow_but([-1], [1, -1]))
def test_the_server_downloads_no_file_that_a_request_names(server, monkeypatch, value, place):
    downloaded = []
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda url, **_: downloaded.append(url))
    data = [None, "a red apple", 0, 1, 1, *[1] * 6, None]
    data[place] = value
    message = answer(server, "_add_style", data)
    assert not message["success"]
    assert message["output"]["error"] == "This page downloads no files. Upload the file itself."
    assert downloaded == []


def test_a_file_that_was_not_uploaded_is_refused(server, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    data = [None, "a red apple", 0, 1, 1, *[1] * 6, {**FILE, "path": str(secret)}]
    assert not answer(server, "_add_style", data)["success"]
    assert server.status("GET", f"/gradio_api/file={secret}")[0] == 403


def test_a_password_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    server = Server(tmp_path, auth=("ann", "se:cret"))
    try:
        with httpx.Client(base_url=server.url, timeout=WAIT) as client:
            assert client.get("config").status_code == 401
            assert client.post(UPLOAD, files={"files": b"x"}).status_code == 401
            assert client.post("gradio_api/queue/join", json={}).status_code == 401
            assert client.post("login", data={"username": "ann", "password": "secret"}).status_code == 400
            assert client.get("config").status_code == 401
            assert client.post("login", data={"username": "ann", "password": "se:cret"}).status_code == 200
            assert client.get("config").status_code == 200
        assert files(server) == []
    finally:
        server.page.close()
