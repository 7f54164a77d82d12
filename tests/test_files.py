"""Files are complete or absent, readable as the umask allows, and folders are locked until their process ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rectified_diffusers import export_unet, save_portable
from rectified_diffusers.cli import main
from rectified_diffusers.files import flush, lock, remove_leftovers, require_space, write_atomically
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.weights.weight_files import write_weights
from tests.tiny import make_tiny_pipeline
from tests.training.checkpoints import Checkpoint, write_checkpoint


def write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def failing(number: int, text: str) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, text)

    return fail


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"old")
    monkeypatch.setattr(os, "fsync", failing(28, "No space left on device"))
    with pytest.raises(OSError, match=r"No space left in .* for file: [\d,.]+ MiB are free\. Complete files") as e:
        write(path, b"new")
    assert e.value.errno == 28
    assert "make room, then run the same again to go on" in str(e.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_failure_of_a_write_is_reported_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(5, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_a_folder_and_a_file_a_file(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "a" / "file", text.encode())
        write_atomically(tmp_path / "b", lambda path, text=text: (path.mkdir(), (path / text).touch()))
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]
    assert len(list(tmp_path.iterdir())) == 2


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    def write_while_another_does(temporary: Path) -> None:
        temporary.write_bytes(b"first")
        write(tmp_path / "file", b"second")

    write_atomically(tmp_path / "file", write_while_another_does)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"first"}


def test_leftovers_are_removed_and_other_files_kept(tmp_path):
    for name in (".tmp-12-shard-00000.safetensors", "notes.tmp-", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / ".tmp-pipeline").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.tmp-"]


def test_everything_in_a_folder_is_flushed(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    flush(tmp_path)
    assert flushed == [path.stat().st_ino for path in (tmp_path / "a" / "file", tmp_path / "a", tmp_path)]


def test_the_last_byte_of_a_disk_can_be_used(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3000))
    require_space(tmp_path, 3000, "two shards")
    with pytest.raises(OSError, match=r"in .* for two shards: it takes 3,001 bytes, 3,000 bytes are free\. Complete"):
        require_space(tmp_path / "not" / "there", 3001, "two shards")


# ------------------------------------------------------------------------------------------------------- locks

needs_locks = pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
HOLD = """
import sys
from pathlib import Path
from rectified_diffusers.files import lock
with lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared") as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Start processes that hold a lock of the folder."""
    started: list[subprocess.Popen] = []

    def start(kind: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "True\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@needs_locks
@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_lock_ends_with_its_process(tmp_path, hold, kind):
    process = hold(kind)
    with lock(tmp_path) as held:
        assert held is False
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock(tmp_path) as held:
        assert held is True
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_shared_locks_go_together(tmp_path, hold):
    hold("shared")
    with lock(tmp_path, shared=True) as held, lock(tmp_path) as alone:
        assert (held, alone) == (True, False)


@needs_locks
def test_a_file_system_without_locks_is_told_from_a_locked_folder(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(37, "No locks available"))
    with lock(tmp_path) as held:
        assert held is None


def test_systems_without_posix_locks_need_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock(tmp_path) as held, lock(tmp_path) as again:
        assert held is again is True


# ------------------------------------------------------------------------------------------------- permissions


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_every_file_follows_the_umask(tmp_path, umask):
    """safetensors itself gives no one but the owner the right to read a file."""
    tensors = {"weight": torch.ones(2)}
    write_checkpoint(tmp_path / "checkpoints", Checkpoint(1, {"unet.safetensors": tensors}, {}), keep=1)
    write_weights(tmp_path / "delta.safetensors", {"weight": (2,)}, "float32", {}, tensors.__getitem__)
    pipeline = make_tiny_pipeline("flow")
    pipeline.save_pretrained(tmp_path / "ours")
    save_pipeline(make_tiny_pipeline("diffusion"), tmp_path / "stock")
    save_portable(pipeline, tmp_path / "portable")
    export_unet(pipeline, tmp_path / "unet.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) >= 12
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(
        map(str, files), oct(0o666 & ~umask)
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_of_the_user_keep_their_permissions(tmp_path, umask):
    own = tmp_path / "mine" / "own.safetensors"
    own.parent.mkdir()
    save_file({"weight": torch.ones(2)}, own)
    own.chmod(0o600)
    save_pipeline(make_tiny_pipeline("flow"), tmp_path)
    assert own.stat().st_mode & 0o777 == 0o600


# --------------------------------------------------------------------------------------------- paths of the user


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a cat", "--model=~/model", "--output=~/made/cat.png"],
        ["triplets", "--teacher=~/model", "--prompts=~/prompts.txt", "--output-dir=~/made", "--num-triplets=1",
         "--num-inference-steps=1"],
        ["verify", "~/triplets"],
        ["reflow", "--model=~/model", "--triplets=~/triplets", "--output-dir=~/made", "--max-steps=1",
         "--batch-size=1", "--warmup-steps=0"],
        ["export", "diffusers", "--model=~/model", "--output=~/made"],
        ["delta", "make", "--fine-tune=~/model", "--base=~/model", "--output=~/made/delta.safetensors"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_commands_expand_the_home_folder(command, tmp_path, monkeypatch):
    """Shells leave `--option=~/name` as it is."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "made").mkdir(parents=True)
    (home / "prompts.txt").write_text("a cat\n")
    make_tiny_pipeline("flow").save_pretrained(home / "model")
    made = ["--num-triplets=1", "--num-inference-steps=1", f"--output-dir={home}/triplets"]
    assert main(["triplets", f"--teacher={home}/model", f"--prompts={home}/prompts.txt", *made]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(command) == 0
    assert list(elsewhere.iterdir()) == []
    assert any((home / "made").iterdir()) or command[0] == "verify"


def test_optional_paths_are_expanded_and_those_of_unknown_users_are_not(monkeypatch):
    from rectified_diffusers.cli import build_parser

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    arguments = ["evaluate", "--data=~/real", "--output-dir=~no-such-user/out", "--mobilenet-weights=~/w.safetensors"]
    parsed = build_parser().parse_args(arguments)
    home = Path("/home/me")
    assert (parsed.data, parsed.mobilenet_weights) == (home / "real", home / "w.safetensors")
    assert parsed.output_dir == Path("~no-such-user/out")
