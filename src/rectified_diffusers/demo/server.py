"""Serve the page from this process."""

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import gradio as gr
from starlette.middleware import Middleware

from rectified_diffusers.demo import markup
from rectified_diffusers.demo.guard import MAX_UPLOAD, MEGABYTE, Guard

SESSIONS = 256  # sessions whose histories the server keeps
_FREE_PORTS = 5  # free ports that are tried
FOLDER = "GRADIO_TEMP_DIR"  # environment variable with gradio's folder of uploads and images


@contextmanager
def private_folder() -> Iterator[None]:
    """Store uploads and images in a folder that only this user can read and that is removed at the end.

    By default, all gradio servers of a machine share one folder, which stays.
    """
    parent = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory(prefix="rectified-diffusers-", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]
            if parent is not None:
                os.environ[FOLDER] = parent


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    *,
    open_browser: bool = False,
    allowed_hosts: Sequence[str] = (),
    auth: tuple[str, str] | None = None,
) -> str:
    """Serve the page from threads of this process and return its URL. `page.close()` stops it.

    Port 0 selects any free port. Nothing is fetched from or reported to the internet: no fonts, no usage data, no
    tunnel. `Guard` checks every request; `allowed_hosts` are further names of the server. With `auth`, visitors have
    to enter this user name and password.

    Raises:
        OSError: the port is in use.
    """
    theme = gr.themes.Soft(
        primary_hue="pink", neutral_hue="slate", font=("system-ui", "sans-serif"), font_mono=("monospace",)
    ).set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        body_text_color_subdued="*neutral_600",  # this and the next two: contrast of at least 4.5
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    guard = Middleware(Guard, host=host, allowed_hosts=allowed_hosts, folder=page.GRADIO_CACHE)
    start = partial(
        page.launch,
        server_name=host,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=MAX_UPLOAD - MEGABYTE,  # the rest of a request with a file of this size fits too
        app_kwargs={"middleware": [guard]},
        auth=auth,
        state_session_capacity=SESSIONS,
        _frontend=False,  # no error if the first page takes longer than gradio waits for it, 3 s
        theme=theme,
        css=markup.packaged("page.css"),
        js=f"() => {{{markup.packaged('names.js')}}}",
    )
    for _ in range(0 if port else _FREE_PORTS - 1):
        with suppress(OSError):  # another process has taken the free port since it was found
            return start(server_port=_free_port(host))[1]
    return start(server_port=port or _free_port(host))[1]
