"""The faults: each one harms a run of a workload in a specific way and reports what remains of the work."""

import ctypes
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.process import ENDED_WELL, REFUSED, Command
from tests.faults.workloads import Workload, digests

SURVIVORS_END = 60.0  # seconds after the death of another process


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed: its files, its records and how much there was of it."""

    files: dict[str, str]
    records: Counter[str]
    seconds: float  # that the processor worked for it
    bytes: int

    @classmethod
    def of(cls, workload: Workload, folder: Path) -> "Reference":
        command, seconds = workload.start(folder), 0.0
        while (code := command.wait(0.01)) is None:
            seconds = max(seconds, command.busy())
        if code != ENDED_WELL:
            raise RuntimeError(f"{workload.name} fails without any fault: {command.error()}")
        files = digests(folder)
        return cls(files, workload.records(folder), seconds, sum((folder / name).stat().st_size for name in files))


@dataclass(frozen=True)
class Verdict:
    """What a try left: records that are missing or there twice, and what else was wrong."""

    lost: int
    duplicated: int
    complaint: str = ""

    @property
    def survived(self) -> bool:
        return not (self.lost or self.duplicated or self.complaint)


@dataclass(frozen=True)
class Try:
    """One try: a workload, an empty folder for it, its undisturbed run and a source of chance."""

    workload: Workload
    folder: Path
    reference: Reference
    chance: random.Random

    def start(self, prepare: Callable[[], object] = lambda: None) -> Command:
        return self.workload.start(self.folder, prepare)

    def run(self, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
        return self.start(prepare).finish()

    def run_and_kill(self) -> None:
        """Run the command and end it with SIGKILL at a random moment, which may lie after its end."""
        command = self.start()
        if command.work(self.chance.uniform(0, 1.1 * self.reference.seconds)) is None:
            command.kill()

    def judge(self, code: int, error: str) -> Verdict:
        """Compare what is in the folder after the last run with the run that nothing disturbed."""
        found = self.workload.records(self.folder)
        lost = sum((self.reference.records - found).values())
        duplicated = sum((found - self.reference.records).values())
        complaint = ""
        if code != ENDED_WELL:
            complaint = f"the same command ended with {code}: {error}"
        else:
            files = digests(self.folder)
            names = sorted({*files, *self.reference.files})
            differing = [name for name in names if files.get(name) != self.reference.files.get(name)]
            if differing:
                complaint = f"{len(differing)} files differ, first: {differing[0]}"
        return Verdict(lost, duplicated, complaint)

    def run_and_judge(self) -> Verdict:
        return self.judge(*self.run())

    def mend_and_judge(self, harmed: Path) -> Verdict:
        """Run over a harmed file: it must be made again, or be named in an error whose remedy helps."""
        code, error = self.run()
        if code == ENDED_WELL:
            return self.judge(code, error)
        if code != REFUSED or harmed.name not in error or not re.search("[Dd]elete|[Rr]emove", error):
            return Verdict(0, 0, f"ended with {code} and an error without the file or its remedy: {error}")
        harmed.unlink()
        return self.run_and_judge()


def kill(case: Try) -> Verdict:
    """SIGKILL at one to three random moments."""
    for _ in range(case.chance.randint(1, 3)):
        case.run_and_kill()
    return case.run_and_judge()


def full_disk(case: Try) -> Verdict:
    """A disk with too little room, which then gets more."""
    with _small_disk(case, case.chance.uniform(0.05, 1.0)):
        code, error = case.run()
        if code == ENDED_WELL:
            return case.judge(code, error)
        if code != REFUSED or "No space left" not in error:
            return Verdict(0, 0, f"ended with {code} on a full disk, and not with an error that says so: {error}")
        _mount(case.folder, f"remount,size={8 * case.reference.bytes}")
        return case.run_and_judge()


def read_only(case: Try) -> Verdict:
    """A disk that turns read-only at a random moment, and back."""
    with _small_disk(case, 4.0):
        command = case.start()
        code = command.work(case.chance.uniform(0, case.reference.seconds))
        while code is None and not _mount(case.folder, "remount,ro"):
            code = command.wait(0.002)  # a file is open for writing; try again after it
        code = command.wait() if code is None else code
        if code not in (ENDED_WELL, REFUSED):
            return Verdict(0, 0, f"ended with {code} on a read-only disk: {command.error()}")
        _mount(case.folder, "remount,rw")
        return case.run_and_judge()


def truncated_file(case: Try) -> Verdict:
    """One file of a killed or whole run cut at a random place."""
    return _harm_one(case, lambda path: os.truncate(path, case.chance.randrange(path.stat().st_size)))


def flipped_bit(case: Try) -> Verdict:
    """One bit of one file turned over."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[case.chance.randrange(len(content))] ^= 1 << case.chance.randrange(8)
        path.write_bytes(content)

    return _harm_one(case, flip)


def foreign_file(case: Try) -> Verdict:
    """One file replaced by another one of the same run, under a name that is not its own."""

    def replace(path: Path) -> None:
        others = [other for other in _weighty(case.folder) if other.read_bytes() != path.read_bytes()]
        if others:
            shutil.copyfile(case.chance.choice(others), path)

    return _harm_one(case, replace)


def clock_going_back(case: Try) -> Verdict:
    """A wall clock that runs backwards, with a kill on the way."""

    def turn_back() -> None:
        began = time.time()
        time.time = lambda: began - 10 * (time.monotonic() % 1000)
        time.time_ns = lambda: int(1e9 * time.time())

    command = case.start(turn_back)
    if command.work(case.chance.uniform(0, case.reference.seconds)) is None:
        command.kill()
    return case.judge(*case.run(turn_back))


def two_writers(case: Try) -> Verdict:
    """The same command started twice at once on one folder, and once more when both have ended.

    The second may work along or be refused, but not do harm.
    """
    first = case.start()
    ended = first.work(case.chance.uniform(0, 0.5 * case.reference.seconds))
    second = Command(case.workload.command(case.folder), case.folder.with_suffix(".second"))
    codes = first.wait() if ended is None else ended, second.wait()
    for command, code in zip((first, second), codes, strict=True):
        if code not in (ENDED_WELL, REFUSED):
            return Verdict(0, 0, f"one of two ended with {code}: {command.error()}")
    return case.run_and_judge()


def process_dying(case: Try) -> Verdict:
    """SIGKILL for one of the processes of a launcher: the others have to end too, and soon."""
    command = case.start()
    code = command.work(case.chance.uniform(0, 1.05 * case.reference.seconds))
    started: list[int] = []
    while code is None and len(started := command.children()) < case.workload.processes:
        code = command.wait(0.002)
    if code is None:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(case.chance.choice(started), signal.SIGKILL)
        if command.wait(SURVIVORS_END) is None:
            command.kill()
            return Verdict(0, 0, f"one process died, the others went on for {SURVIVORS_END:.0f} s: {command.error()}")
    return case.run_and_judge()


FAULTS: dict[str, Callable[[Try], Verdict]] = {
    "SIGKILL": kill,
    "disk full": full_disk,
    "disk turns read-only": read_only,
    "file truncated": truncated_file,
    "bit flipped": flipped_bit,
    "foreign file": foreign_file,
    "clock going back": clock_going_back,
    "two writers": two_writers,
    "one of two processes dies": process_dying,
}
NEEDS_PROCESSES = ("one of two processes dies",)
NEEDS_MOUNT = ("disk full", "disk turns read-only")


def _harm_one(case: Try, harm: Callable[[Path], object]) -> Verdict:
    """Harm one shard or checkpoint file of a run that was killed, then run the command again."""
    case.run_and_kill()
    candidates = _weighty(case.folder)
    if not candidates:
        return case.run_and_judge()
    harmed = case.chance.choice(candidates)
    harm(harmed)
    return case.mend_and_judge(harmed)


def _weighty(folder: Path) -> list[Path]:
    """Return the files that a run needs: shards, and the files of the newest checkpoint."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    newest = sorted(checkpoints[-1].iterdir()) if len(checkpoints) > 1 else []
    return [path for path in [*sorted(folder.glob("shard-*.safetensors")), *newest] if path.stat().st_size]


@contextmanager
def _small_disk(case: Try, room: float) -> Iterator[None]:
    """Mount a disk at the folder with room for a part of what the run writes, or for more than that."""
    needed = 2 * case.reference.bytes  # the files of a whole run, and one more checkpoint at most
    size = max(int(needed * room), 4096)
    case.folder.mkdir(parents=True, exist_ok=True)
    if not _mount(case.folder, f"size={size}", fresh=True):
        raise PermissionError("mounting a disk of limited size needs root")
    try:
        yield
    finally:
        _libc().umount2(str(case.folder).encode(), 2)  # MNT_DETACH


def _mount(folder: Path, options: str, fresh: bool = False) -> bool:
    """Mount or remount a tmpfs; False if the system refuses."""
    flags = 0 if fresh else 32  # MS_REMOUNT
    parts = [part for part in options.split(",") if part not in ("remount", "rw")]
    if "ro" in parts:
        parts.remove("ro")
        flags |= 1  # MS_RDONLY
    return _libc().mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, ",".join(parts).encode()) == 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
