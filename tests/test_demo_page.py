"""The demo page as a server: many visitors at once, in order; long prompts; visitors who leave; other sites."""

import asyncio
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
import httpx

from rectified_diffusers.demo import page as page_module
from rectified_diffusers.demo.page import build_page
from rectified_diffusers.demo.server import launch
from rectified_diffusers.demo.studio import Studio
from tests.tiny import make_tiny_pipeline

pytestmark = pytest.mark.slow
WAIT = 300  # seconds until a test gives up


class Server:
    """The page of a tiny model, served by this process; `drawn` lists the prompts in the order of generation."""

    def __init__(self) -> None:
        self.studio = Studio(make_tiny_pipeline("flow"))
        self.drawn: list[str] = []
        generate = self.studio.generate
        self.studio.generate = lambda request: self.drawn.append(request.prompt) or generate(request)
        self.page = build_page(self.studio)
        self.url = launch(self.page, "127.0.0.1", 0)
        self.config = httpx.get(f"{self.url}config", timeout=WAIT).json()

    def function(self, name: str) -> int:
        return next(each["id"] for each in self.config["dependencies"] if each["api_name"] == name)

    async def ask(self, client: httpx.AsyncClient, visitor: str, prompt: Any, function: str = "draw") -> None:
        screen = [None, prompt, 0, 1, 1, *[1] * 6]
        body = {"data": screen, "fn_index": self.function(function), "session_hash": visitor}
        (await client.post("gradio_api/queue/join", json=body)).raise_for_status()

    async def answer(
        self, client: httpx.AsyncClient, visitor: str, until: str = "process_completed"
    ) -> dict[str, Any]:
        """Read a visitor's messages up to the first of a kind."""
        async with client.stream("GET", "gradio_api/queue/data", params={"session_hash": visitor}) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    if message["msg"] == until:
                        return message
        raise AssertionError(f"no {until} for {visitor}")

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=WAIT, limits=limits)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.page.close()


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def visit_at_once(server: Server, count: int, name: str) -> list[dict[str, Any]]:
    async with server.client() as client:
        for i in range(count):
            await server.ask(client, f"{name}-{i}", f"picture {i}")
        return await asyncio.gather(*(server.answer(client, f"{name}-{i}") for i in range(count)))


def test_a_hundred_visitors_are_answered_in_order(server):
    server.drawn.clear()
    answers = asyncio.run(visit_at_once(server, 100, "first"))
    assert all(answer["success"] for answer in answers)
    assert server.drawn == [f"picture {i}" for i in range(100)]
    pictures = {answer["output"]["data"][1]["url"] for answer in answers}
    assert len(pictures) > 1


def test_memory_stays_flat(server):
    asyncio.run(visit_at_once(server, 100, "warm"))
    before = resident_megabytes()
    for i in range(2):
        asyncio.run(visit_at_once(server, 100, f"more-{i}"))
    assert resident_megabytes() - before < 30


def test_prompts_that_are_none(server):
    async def ask_all() -> list[dict[str, Any]]:
        async with server.client() as client:
            answers = []
            for i, prompt in enumerate(["fox " * 25_000, "", "\x00\ud7ff🦊", 7, None, ["a"], "a red apple"]):
                await server.ask(client, f"odd-{i}", prompt)
                answers.append(await server.answer(client, f"odd-{i}"))
            return answers

    before = resident_megabytes()
    answers = asyncio.run(ask_all())
    assert [answer["success"] for answer in answers][:3] == [True] * 3
    assert "first 2,000 of 100,000 characters" in str(answers[0]["output"]["data"])
    assert answers[-1]["success"]
    assert resident_megabytes() - before < 50


def test_a_visitor_who_leaves_does_not_hold_up_the_others(server, monkeypatch):
    steps = []
    noticed, stepped = threading.Event(), page_module.markup.comparison_caption

    def caption(beside, generation=None, *rest):
        if generation is not None:
            steps.append(generation.step)
            noticed.set()
        return stepped(beside, generation, *rest)

    monkeypatch.setattr(page_module.markup, "comparison_caption", caption)
    monkeypatch.setattr(server.studio, "comparison", server.studio.comparison.__class__("x", 50, 1.0))
    compare = next(
        each["api_name"] for each in server.config["dependencies"] if str(each["api_name"]).startswith("_compare")
    )

    async def leave() -> dict[str, Any]:
        async with server.client() as client:
            await server.ask(client, "leaver", "a red apple", compare)
            await server.answer(client, "leaver", until="process_generating")  # and the stream is closed
        async with server.client() as client:
            await server.ask(client, "stayer", "a fox")
            return await server.answer(client, "stayer")

    assert asyncio.run(leave())["success"]
    assert noticed.is_set()


def test_the_page_is_for_this_machine_alone(server):
    assert server.url.startswith("http://127.0.0.1:")
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
            pass


def test_other_sites_cannot_use_the_page(server):
    """A site that is open in the same browser must not reach a server on the loopback."""
    refused = httpx.get(f"{server.url}config", headers={"Origin": "https://example.com"}, timeout=WAIT)
    assert refused.headers.get("access-control-allow-origin") != "https://example.com"
    assert refused.headers.get("access-control-allow-origin") != "*"
