"""Lock of the folders that a run writes into. Rank 0 holds it, and the lock names its holder.

It is a plain file: the operating system's locks do not name their holder, some network file systems refuse them or keep
them on one machine, and a server may keep the lock of a killed client for any length of time. The holder counts as
running if its process is found on this machine or if it keeps counting up the number in the file, and as ended if its
SLURM job was restarted.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from mtp_dist.config import Config
from mtp_dist.distributed.launcher import env_rank, env_world_size
from mtp_dist.errors import LaunchError, UserError
from mtp_dist.monitoring.events import EVENTS, check_progress
from mtp_dist.training.stopping import StopSignals

logger = logging.getLogger(__name__)

LOCK = "run.lock"
REFRESH_EVERY_S = 10.0
STALE_AFTER_S = 60.0
"""Time without a refresh after which a lock of another machine is stale."""
POLL_INTERVAL_S = 1.0
SETTLE_S = 1.0
"""Seconds after a takeover until it is checked whether another start has taken the lock over too."""

Record = dict[str, str]


def describe_process() -> Record:
    """Return this process's record in a lock; `process` is empty if /proc cannot be read."""
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "process": _process_identity(os.getpid()) or "",
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "started": datetime.now(UTC).isoformat(" ", timespec="seconds"),
    }


def _machine_identity() -> str | None:
    """Return the boot and the PID namespace, equal for processes that see each other's PIDs; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_identity(pid: int) -> str | None:
    """Return an identity that a later process with the same PID does not have; None if no such process runs."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    start_time = fields[18]
    return None if state in "ZX" else f"{_machine_identity()} {start_time}"


def _describe(record: Record) -> str:
    job = f", SLURM job {record['job']}" if record["job"] else ""
    return f"a run on {record['host']} (process {record['pid']}{job}), started {record['started']}"


def _parse(content: str) -> Record | None:
    """Return the record in a lock, or None if the lock is incomplete."""
    try:
        record = json.loads(content)
    except ValueError:
        return None
    known = isinstance(record, dict) and {*describe_process(), "token"} <= record.keys()
    return record if known and all(isinstance(value, str) for value in record.values()) else None


class FolderLock:
    """Lock file of one folder."""

    def __init__(
        self, key: str, folder: Path, path: Path, monotonic: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self.key = key
        self.folder = folder
        self.path = path
        self._monotonic = monotonic
        self._sleep = sleep
        self._token = uuid.uuid4().hex
        self._record = describe_process() | {"token": self._token}
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Create the lock. Raise LaunchError, after up to STALE_AFTER_S, if another run holds it."""
        try:
            parent = self.path.parent
            self._created = [path for path in (parent, *parent.parents) if not path.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over_or_refuse(self._read())
        except OSError as error:
            raise LaunchError(
                f"{self.key} = '{self.folder}' cannot be written: {error.filename or self.path}: {error.strerror}"
            ) from None

    def _content(self, beat: int = 0) -> bytes:
        return f"{json.dumps(self._record | {'beat': f'{beat:010d}'})}\n".encode()

    def _create(self) -> bool:
        if self._is_ours(self._read()):
            return True  # taken over from an ended run
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb", buffering=0) as file:
            file.write(self._content())
        return True

    def _read(self) -> str | None:
        """Return the file's content, or None if it does not exist."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _is_ours(self, content: str | None) -> bool:
        record = _parse(content) if content else None
        return record is not None and record["token"] == self._token

    def _take_over_or_refuse(self, content: str | None) -> None:
        """Return once the lock may be free. Raise LaunchError if its holder still runs."""
        if content is None:
            return
        record = _parse(content)
        who = _describe(record) if record else "a run"
        reason = self._evidence_of_end(record)
        if reason is None:
            if record and self._is_alive(record):
                raise LaunchError(self._refusal(record))
            now = self._wait_for_a_change(content, who)
            if now != content:
                changed = _parse(now) if now else None
                if record and changed and changed["token"] == record["token"]:
                    raise LaunchError(self._refusal(record))
                return
            reason = f"it was not refreshed for {STALE_AFTER_S:g} s"
        if self._read() == content:
            logger.warning("%s: taking over the lock of %s: %s", self.folder, who, reason)
            mine = self.path.with_name(f"{self.path.name}.{self._token}")
            mine.write_bytes(self._content())
            mine.replace(self.path)
            self._sleep(SETTLE_S)

    def _is_alive(self, record: Record) -> bool:
        """Return whether the holder's process runs on this machine."""
        return bool(record["process"]) and _process_identity(int(record["pid"])) == record["process"]

    def _evidence_of_end(self, record: Record | None) -> str | None:
        """Return why the holder must have ended, or None if it may still run."""
        if record is None or self._is_alive(record):
            return None
        machine = _machine_identity()
        if machine and record["process"].rpartition(" ")[0] == machine:
            return "that process has ended"
        job, restarts = self._record["job"], self._record["restarts"]
        if job and job == record["job"] and int(restarts) > int(record["restarts"]):
            return "SLURM has restarted its job"
        return None

    def _wait_for_a_change(self, content: str, who: str) -> str | None:
        """Return the content once it differs, or after STALE_AFTER_S. Clocks of other machines do not matter."""
        logger.warning(
            "%s is locked by %s: waiting up to %g s to see whether it still runs", self.folder, who, STALE_AFTER_S
        )
        deadline = self._monotonic() + STALE_AFTER_S
        while (now := self._read()) == content and self._monotonic() < deadline:
            self._sleep(POLL_INTERVAL_S)
        return now

    def _refusal(self, record: Record) -> str:
        job, pid = record["job"], record["pid"]
        # Plain scancel kills the ranks after 30 seconds, and after TERM or USR1 the job would requeue itself.
        stop = f"`scancel --signal INT {job}`" if job else f"`kill {pid}` on {record['host']}"
        return (
            f"{self.key} = '{self.folder}' is in use by {_describe(record)}. Two runs in one folder would overwrite "
            f"each other's files: wait until it ends, stop it with {stop}, which saves a checkpoint, or set another "
            f"{self.key} ({self.path} is its lock)"
        )

    def refresh(self, beat: int, on_loss: Callable[[str], None]) -> None:
        """Write the next number into the file. Call `on_loss` with a message if another run has taken the lock over."""
        with suppress(OSError), self.path.open("r+b", buffering=0) as file:  # the next refresh may succeed again
            content = file.read().decode(errors="replace")
            if self._is_ours(content):
                file.seek(0)
                file.write(self._content(beat))
            elif record := _parse(content):
                on_loss(
                    f"{self.key} = '{self.folder}' was taken over by {_describe(record)}, because this run has not "
                    f"refreshed {self.path} for {STALE_AFTER_S:g} s"
                )

    def release(self) -> None:
        """Remove the file if this run still holds it, and the folders created for it if they are empty."""
        with suppress(OSError):
            if self._is_ours(self._read()):
                self.path.unlink()
                for folder in self._created:
                    folder.rmdir()


class RunLock:
    """Context that holds the locks of a run's folder and of its checkpoint folder. For rank 0 only."""

    def __init__(
        self,
        config: Config,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        locations = (
            ("run.output_dir", config.output_dir, config.output_dir / LOCK),
            ("checkpoint.directory", config.checkpoint_dir, _checkpoint_lock(config.checkpoint_dir)),
        )
        locks: dict[Path, FolderLock] = {}
        for key, folder, path in locations:  # one file if both are one folder
            locks.setdefault(path.resolve(), FolderLock(key, folder, path, monotonic, sleep))
        self._locks = list(locks.values())
        self._ended = threading.Event()
        self._beat = 0

    def __enter__(self) -> Self:
        try:
            for lock in self._locks:
                lock.acquire()
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._keep_refreshing, name="run lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release all locks. Any thread may call it, more than once."""
        self._ended.set()
        for lock in reversed(self._locks):
            lock.release()

    def refresh(self, on_loss: Callable[[str], None]) -> None:
        """Show that this run is alive. Call `on_loss` with a message if another run has taken a folder over."""
        self._beat += 1
        for lock in self._locks:
            lock.refresh(self._beat, on_loss)

    def _keep_refreshing(self) -> None:
        while not self._ended.wait(REFRESH_EVERY_S):
            self.refresh(_end_process)


def _checkpoint_lock(checkpoint_dir: Path) -> Path:
    """Return the path of a checkpoint folder's lock: next to the folder, so that it need not exist and may be moved.

    The lock is inside the folder if that is a file system of its own, or if its parent is not writable.
    """
    folder = checkpoint_dir.resolve()
    if folder.is_mount() or (folder.exists() and not os.access(folder.parent, os.W_OK)):
        return folder / LOCK
    return folder.with_name(f"{folder.name}.lock")


def _end_process(text: str) -> None:
    """End the process from any thread: the run must not write any more."""
    with suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
    os._exit(2)


@contextmanager
def hold_folders(config: Config, stop_signals: StopSignals) -> Iterator[None]:
    """Hold the RunLock on rank 0. Raise UserError on all ranks if another run holds it or if restarts save nothing."""
    rank, world_size = env_rank(), env_world_size()
    with ExitStack() as held:
        if rank == 0:
            lock = RunLock(config)
            stop_signals.end_at_once(lock.release)
            try:
                check_progress(config.output_dir / EVENTS)
                held.enter_context(lock)
            except UserError as error:
                if world_size > 1:
                    from mtp_dist.distributed.rendezvous import join  # imports torch, which takes seconds

                    join(rank, world_size, config.run.join_timeout, {}, refusal=str(error))
                raise
        yield
