"""How the demo's server starts: on a port that another process takes meanwhile, and on a slow machine."""

import socket

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
import gradio as gr
import httpx

from rectified_diffusers.demo import server
from rectified_diffusers.demo.server import launch
from tests.forks import free_port

HOST = "127.0.0.1"


@pytest.fixture
def page():
    with gr.Blocks() as page:
        gr.Markdown("a page")
    yield page
    page.close(verbose=False)


@pytest.fixture
def taken():
    """A port at which another server listens."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_free_port_that_is_taken_meanwhile_is_replaced(page, taken, monkeypatch):
    ports = iter([taken, taken, free_port()])
    monkeypatch.setattr(server, "_free_port", lambda host: next(ports))
    url = launch(page, HOST, 0)
    assert f":{taken}" not in url
    assert httpx.get(url, timeout=300).is_success


def test_a_port_that_was_asked_for_is_not_replaced(page, taken):
    with pytest.raises(OSError, match=str(taken)):
        launch(page, HOST, taken)


def test_it_ends_where_no_port_is_free(page, taken, monkeypatch):
    asked = []
    monkeypatch.setattr(server, "_free_port", lambda host: asked.append(host) or taken)
    with pytest.raises(OSError, match=str(taken)):
        launch(page, HOST, 0)
    assert len(asked) == server._FREE_PORTS


def test_a_first_page_that_takes_long_is_no_error(page, monkeypatch):
    monkeypatch.setattr(gr.networking, "url_ok", lambda url: False)  # gradio gives up after 3 s
    assert httpx.get(launch(page, HOST, 0), timeout=300).is_success
