"""The demo's studio in a process of its own: it draws the same, stops, and its end and errors are told."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.demo.requests import Generation, ImageRequest
from rectified_diffusers.demo.studio import Studio
from rectified_diffusers.demo.worker import StudioProcess
from tests.demo_makers import die, fail_to_make
from tests.forks import forked_studios
from tests.tiny import make_tiny_pipeline

WAIT = 300  # seconds, for what happens in another process
ORDER = ImageRequest("a red apple", seed=3)


class CountingStudio(Studio):
    """Counts the pictures of its U-Net."""

    def __init__(self) -> None:
        pipeline = make_tiny_pipeline("flow")
        self._count = 0
        pipeline.unet.register_forward_hook(self._note)
        super().__init__(pipeline)

    def _note(self, *_: object) -> None:
        self._count += 1

    def pictures(self) -> int:
        return self._count


def pixels(generation: Generation) -> bytes:
    assert generation.image is not None
    return generation.image.tobytes()


@pytest.fixture(scope="module")
def apart() -> Iterator[Any]:
    with forked_studios(), StudioProcess(CountingStudio) as process:
        yield process.studio.result(WAIT)


@pytest.mark.slow
def test_it_draws_what_a_studio_here_draws(apart):
    here = CountingStudio()
    assert apart.about() == here.about()
    generation = apart.generate(ORDER)
    assert pixels(generation) == pixels(here.generate(ORDER))
    assert generation.image is not None
    assert generation.image.info == {"rectified_diffusers": ORDER.describe()}
    assert [generation.step for generation in apart.compare(ORDER)] == [
        generation.step for generation in here.compare(ORDER)
    ]
    way = [picture.tobytes() for picture in apart.morph(ORDER, ImageRequest("a pear"), 2, loop=False)]
    assert way == [picture.tobytes() for picture in here.morph(ORDER, ImageRequest("a pear"), 2, loop=False)]
    with pytest.raises(ValueError, match="Sketches need a ControlNet"):
        apart.generate_from_sketch(ORDER, generation.image, 1.0)


@pytest.mark.slow
def test_what_is_no_longer_watched_is_stopped_there_too(apart):
    before = apart.pictures()
    morph = apart.morph(ImageRequest("a"), ImageRequest("b", steps=50), 60, loop=True)
    next(morph)
    del morph
    apart.generate(ORDER)  # has its turn when the other has ended
    assert apart.pictures() - before < 120


def test_an_error_of_the_making_keeps_its_type():
    with StudioProcess(fail_to_make) as process, pytest.raises(OSError, match="no weights") as raised:
        process.studio.result(WAIT)
    assert "in fail_to_make" in str(raised.value.__cause__)  # which --debug shows


def test_an_error_of_the_network_is_not_taken_for_the_death_of_the_process():
    nobody_listens: Any = partial(socket.create_connection, ("127.0.0.1", 1))
    with StudioProcess(nobody_listens) as process, pytest.raises(ConnectionRefusedError):
        process.studio.result(WAIT)


def test_the_death_of_the_process_is_told():
    with StudioProcess(die) as process:
        with pytest.raises(ChildProcessError, match=r"exit code 9.*smaller model"):
            process.studio.result(WAIT)
        with pytest.raises(ChildProcessError):
            process.wait()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc to see whether a process is there")
def test_it_does_not_outlive_a_process_that_is_killed():
    code = (
        "import multiprocessing, os, signal\n"
        "from rectified_diffusers.demo.worker import StudioProcess\n"
        "from tests.demo_makers import Nothing\n"
        "with StudioProcess(Nothing) as process:\n"
        "    process.studio.result()\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=WAIT)
    status = Path(f"/proc/{int(killed.stdout)}/status")
    deadline = time.monotonic() + WAIT
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="there is no holding back of signals on Windows")
def test_ctrl_c_while_it_is_started_ends_both_without_a_traceback():
    code = (
        "import os, signal\n"
        "from rectified_diffusers.demo import worker\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job ignores
        "start = worker._Manager.start\n"
        "def interrupted(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    start(*arguments)\n"
        "    (process,) = worker.multiprocessing.active_children()\n"
        "    os.kill(process.pid, signal.SIGINT)\n"
        "    print('started', flush=True)\n"
        "worker._Manager.start = interrupted\n"
        "try:\n"
        "    with worker.StudioProcess(os.getcwd):\n"
        "        print('entered', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["started", "interrupted"], "")
