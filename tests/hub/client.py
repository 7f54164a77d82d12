"""A client of the Hub in another process: huggingface_hub and diffusers as a user's program uses them."""

import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import huggingface_hub
import torch
from diffusers import DiffusionPipeline

from tests.forks import TIMEOUT, fork_server
from tests.hub.server import the_hub


@dataclass(frozen=True)
class Loaded:
    """What came of loading and sampling a pipeline: class names, latents as nested lists, messages of our package."""

    pipeline: str
    scheduler: str
    module: str
    latents: Any
    messages: list[str]


class HubError(Exception):
    """What loading raised in the other process, with its causes: their types and texts, the outermost first."""

    def __init__(self, types: list[str], texts: list[str]) -> None:
        super().__init__(types, texts)
        self.types, self.texts = types, texts

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in zip(self.types, self.texts, strict=True))


def sample(pipeline: Any, **arguments: Any) -> torch.Tensor:
    """Sample two unguided steps from seed 0, as latents `(1, 4, 8, 8)`."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", **arguments}
    return pipeline("a red apple", generator=torch.manual_seed(0), **arguments).images


def load(
    loader: str, source: str, scheduler: str | None = None, method: str = "from_pretrained", **arguments: Any
) -> Loaded:
    """Call `loader.from_pretrained(source, ...)` and sample; `scheduler` is the name of a class to pass one of."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname}: {record.getMessage()}")
    logger = logging.getLogger("rectified_diffusers")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with portable_errors():
            if scheduler is not None:
                arguments["scheduler"] = getattr(diffusers, scheduler)()
            pipeline = getattr(getattr(diffusers, loader), method)(source, **arguments)
            name, its, latents = type(pipeline).__name__, type(pipeline.scheduler), sample(pipeline).tolist()
            return Loaded(name, its.__name__, its.__module__, latents, messages)
    finally:
        logger.removeHandler(handler)


def save_again(source: str, target: str) -> None:
    """Load a portable folder and save it by diffusers' own means."""
    DiffusionPipeline.from_pretrained(source, trust_remote_code=True).save_pretrained(target)


def can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def portable_errors() -> Iterator[None]:
    """Raise what can be sent to another process of an error and its causes."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a loader raises goes back to the test)
        types, texts, seen = [], [], error
        while seen is not None:
            types.append(type(seen).__name__)
            texts.append(str(seen))
            seen = seen.__cause__ or seen.__context__
        raise HubError(types, texts) from None


def _begin(with_us: bool) -> None:
    """Begin a client process: with our package imported, or with one where it is not installed."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the Hub's client waits a second before it tries again
    if with_us:
        import rectified_diffusers  # noqa: F401
    else:
        sys.modules["rectified_diffusers"] = None  # pyright: ignore[reportArgumentType]


class Client(NamedTuple):
    """A process that is online: `client.load("DiffusionPipeline", repo_id)` runs `load` there."""

    pool: ProcessPoolExecutor

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.pool.submit(function, *args, **kwargs).result(TIMEOUT)

    def load(self, *args: Any, **kwargs: Any) -> Loaded:
        return self.call(load, *args, **kwargs)


@contextmanager
def start_client(with_us: bool) -> Iterator[Client]:
    """Start a process for which `the_hub()` is the Hub, and our package is installed or not."""
    with ProcessPoolExecutor(1, fork_server(), _begin, (with_us,)) as pool:
        client = Client(pool)
        if (endpoint := client.call(_endpoint)) != the_hub().url:
            raise RuntimeError(f"the processes' Hub is {endpoint}, not ours: something else uses the fork server")
        yield client


def _endpoint() -> str:
    return huggingface_hub.constants.ENDPOINT
