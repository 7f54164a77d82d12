"""Refuse requests that come from other sites, are too large, or name a file by a URL."""

import socket
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MEGABYTE = 2**20
MAX_BODY = 16 * MEGABYTE  # of a request; the largest sketch has about 1 MB
MAX_UPLOAD = 256 * MEGABYTE  # of a request with a style file
MAX_FILES = 4096 * MEGABYTE  # of all uploaded files and generated images that the server stores
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")  # compared with the address, not bound


class Guard:
    """ASGI middleware that checks the Host and Origin headers and the body length of every request.

    Host: a site whose name resolves to this machine must not reach the page (DNS rebinding). Origin: neither must any
    other page that is open in the visitor's browser.

    Args:
        app: application that gets the accepted requests.
        host: address that the server is bound to. A wildcard allows every IP address and the name of this machine.
        allowed_hosts: further names of the server, for example those of a reverse proxy.
        folder: where the server stores files.
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed_hosts: Iterable[str], folder: str) -> None:
        self._app = app
        self._any_address = host in WILDCARDS
        self._proxies = {name.lower() for name in allowed_hosts}
        self._names = {*LOOPBACK, *self._proxies, socket.gethostname().lower() if self._any_address else host.lower()}
        self._folder = Path(folder)
        self._arriving = 0  # bytes of the uploads in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        status, reason = self._check_sender(headers) or self._check_body(headers, is_upload) or (200, "")
        if scope["type"] == "websocket" and reason:
            await send({"type": "websocket.close", "code": 1008})
        elif reason:
            await PlainTextResponse(reason, status, {"Connection": "close"})(scope, receive, send)
        else:
            arriving = int(headers.get("content-length", 0)) if is_upload else 0
            self._arriving += arriving
            try:
                await self._app(scope, receive, send)
            finally:
                self._arriving -= arriving

    def _check_sender(self, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal, or None."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_known(_name(hosts[0])):
            shown = ", ".join(hosts)[:100]
            return 403, f"This page is not served at {shown!r}. Its operator can allow a name with --allow-host NAME."
        for origin in origins:
            address = origin.partition("://")[2].lower()
            if address != hosts[0].lower() and _name(address) not in self._proxies:
                return 403, f"Requests from the site {origin[:100]!r} are refused. Use the page itself."
        return None

    def _is_known(self, name: str) -> bool:
        return name in self._names or (self._any_address and _is_address(name))

    def _check_body(self, headers: Headers, is_upload: bool) -> tuple[int, str] | None:
        if "transfer-encoding" in headers:
            return 411, "The length of the request is unknown. Send a Content-Length header."
        length, limit = int(headers.get("content-length", 0)), MAX_UPLOAD if is_upload else MAX_BODY
        if length > limit:
            return 413, f"A request has at most {limit // MEGABYTE} MB, got {length / MEGABYTE:.0f} MB."
        if is_upload and _size(self._folder) + self._arriving + length > MAX_FILES:
            return 507, "The server has no room for more files. Its operator can add this one with --style FILE."
        return None


class GuardedBlocks(gr.Blocks):
    """A page that takes uploaded files only. gradio downloads a file that a request names by a URL, of any size."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        if _has_url(inputs):
            raise gr.Error("This page downloads no files. Upload the file itself.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *rest, **options)


def _name(address: str) -> str:
    """Return the host name of "name:port", in lower case; an empty name if there is none."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # removed by gradio in the meantime
            continue
    return total


def _has_url(value: Any) -> bool:
    if isinstance(value, dict):
        return str(value.get("path", "")).lower().startswith(("http:", "https:")) or _has_url(list(value.values()))
    return isinstance(value, list) and any(map(_has_url, value))
