"""Processes forked from one that has imported torch, transformers and diffusers: each starts in a moment.

huggingface_hub and diffusers read their settings once, when they are imported, and the tests' own process has them set
to offline. The server of the forks imports them with `the_hub()` as the Hub, so every fork is online there.
"""

import atexit
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

import accelerate  # noqa: F401
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline  # noqa: F401

from tests.hub.server import the_hub

TIMEOUT = 300  # seconds
UNSET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH")


@cache
def fork_server() -> Any:
    """Start the server and return its multiprocessing context. Our own package is not imported there."""
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    settings = {
        "HF_ENDPOINT": the_hub().url,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # our Hub takes uploads as git-lfs has them
        "HF_HUB_DOWNLOAD_TIMEOUT": str(TIMEOUT),
        "HF_HUB_ETAG_TIMEOUT": str(TIMEOUT),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, settings):
        for name in UNSET:
            os.environ.pop(name, None)
        forkserver.ensure_running()
    return context


def call_in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a process of its own."""
    with ProcessPoolExecutor(1, fork_server()) as pool:
        try:
            return pool.submit(function, *arguments).result(TIMEOUT)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()  # or the pool waits for it
            raise


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def exit_codes(function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> list[int | None]:
    """Call a function in a fork for each tuple of arguments, all at once, and return the exit codes.

    If one fails, the others are killed. To be called in a process of one thread, see `call_in_fork`.
    """
    torch.set_num_threads(1)
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=function, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    while alive := [process for process in processes if process.exitcode is None]:
        wait([process.sentinel for process in alive])
        if any(process.exitcode for process in processes):
            for process in alive:
                process.kill()  # it would wait for the one that failed
    return [process.exitcode for process in processes]


@contextmanager
def forked_studios() -> Iterator[None]:
    """Let `StudioProcess` start its process from the server, without the seconds of its imports."""
    server = fork_server()
    with mock.patch.object(multiprocessing, "get_context", return_value=server):
        yield
