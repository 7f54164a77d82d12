"""Write files and folders that are either complete or absent, check the free space, and lock a folder."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

TEMPORARY = ".tmp-"  # prefix of the names of files and folders that are being written


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` to create a file or folder under a temporary name, flush it to disk and rename it to `path`.

    `path` is complete or absent, even if the process or the machine stops. Several processes may write the same file:
    each uses its own temporary name, and the last to finish wins. The permissions are those that the umask allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        try:
            with system_errors():
                write(temporary)
            follow_umask(temporary)
            flush(temporary)
            if path.is_dir():
                shutil.rmtree(path)
            temporary.replace(path)
            flush(path.parent, recursive=False)
        finally:
            with suppress(OSError):  # the disk that refused the file may also refuse to remove it
                remove(temporary)
    except OSError as error:
        if not is_full(error):
            raise
        raise no_space(path.parent, path.name) from error


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed processes from a folder to which no other process writes."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        remove(leftover)


def flush(path: Path, recursive: bool = True) -> None:
    """Flush a file or folder to disk, so that after a power cut a rename never exists without its content."""
    is_folder = path.is_dir()
    if recursive and is_folder:
        for child in path.iterdir():
            flush(child)
    if is_folder and os.name == "nt":  # cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(path: Path) -> None:
    """Set the permissions of a new file on a file, or on all safetensors files in a folder.

    safetensors creates files that only their owner can read, whatever the umask.
    """
    mode = 0o666 & ~_umask()
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def _umask() -> int:
    """Return the umask from where Linux shows it; other systems let it be read only by setting it, for all threads."""
    with suppress(OSError):
        if found := re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@contextmanager
def lock(folder: Path, *, shared: bool = False) -> Iterator[bool | None]:
    """Lock a folder until the end of the block, or of the process if it is killed.

    A shared lock waits for its turn; an exclusive one does not. Yields False if another process has the folder locked,
    None if the file system has no locks, else True. Windows has no such locks either, but yields True: it does not let
    one process remove the open files of another.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    held: bool | None = True
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        yield held
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


_locks: set[int] = set()


def _close_locks() -> None:
    """Close the locks in a forked process, such as one that reads ahead: they end with the process that took them."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def require_space(folder: Path, size: int, what: str, remedy: str | None = None) -> None:
    """Raise OSError if the disk that holds, or will hold, a folder has less than `size` bytes free."""
    if _free_space(folder) < size:
        raise no_space(folder, what, size, remedy)


def no_space(folder: Path, what: str, needed: int | None = None, remedy: str | None = None) -> OSError:
    """Return the error for a full disk: what was to be written, the free space, and how to continue."""
    takes = "" if needed is None else f"it takes {_size(needed)}, "
    return OSError(
        errno.ENOSPC,
        f"No space left in {folder} for {what}: {takes}{_size(_free_space(folder))} are free. "
        f"{remedy or 'Complete files are kept: make room, then run the same again to go on.'}",
    )


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 2**20 else f"{count / 2**20:,.1f} MiB"


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk or the user's share of it is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _free_space(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def system_errors() -> Iterator[None]:
    """Convert system errors that safetensors reports as text, `(os error 28)`, `Os { code: 28, ... }`, to OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\b(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
