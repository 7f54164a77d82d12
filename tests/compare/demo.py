"""Request an image from the page of the command `demo`, as a browser would."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

import httpx
from PIL import Image

COMMAND = [sys.executable, "-m", "rectified_diffusers.cli", "demo", "--json", "--port", "0", "--device", "cpu"]
WAIT = 300  # seconds


def draw(prompt: str, output: str, *arguments: str) -> None:
    """Serve the page with the package of this process, generate an image, write it and stop the server."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [*COMMAND, *arguments], env={**os.environ, "GRADIO_TEMP_DIR": folder}, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        try:
            assert server.stdout
            address = json.loads(server.stdout.readline())["address"]
            with httpx.Client(base_url=address, timeout=WAIT) as client:
                picture = _picture(client, prompt)
        finally:
            server.send_signal(signal.SIGINT)
        picture.save(output)


def _picture(client: httpx.Client, prompt: str) -> Image.Image:
    """Press the button: what all fields of the page say as it begins, and the prompt in the first field of text."""
    config = client.get("config").raise_for_status().json()
    fields = {each["id"]: each for each in config["components"]}
    function = next(each for each in config["dependencies"] if each["api_name"] == "draw")
    values: list[Any] = [fields[id]["props"].get("value") for id in function["inputs"]]
    values[next(i for i, id in enumerate(function["inputs"]) if fields[id]["type"] == "textbox")] = prompt
    body = {"data": values, "fn_index": function["id"], "session_hash": "comparison"}
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "comparison"}) as stream:
        messages = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
        done = next(message for message in messages if message["msg"] == "process_completed")
    drawn = next(each for each in done["output"]["data"] if isinstance(each, dict) and "url" in each)
    return Image.open(io.BytesIO(client.get(drawn["url"]).raise_for_status().content))
