"""Files that are whole or absent: everything is written under a temporary name and then renamed. Also locks, digests
and names of files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import iglob
from pathlib import Path
from typing import Any

import psutil

from prefold.errors import UserError

PATIENCE = 5.0
"""Seconds to wait for the lock of a folder: a process that was just killed releases it a little later."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)  # else a power failure may leave the name without its content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _exchange(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def unfinished_folder(path: Path, made_from: str) -> Iterator[Path]:
    """Like `new_folder`, but a process that is stopped leaves the temporary folder to the next one with the same
    `made_from`. The caller has to know which of the files in it are whole. An error of the caller removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.unfinished")
    mark = temporary / ".made_from"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != made_from:
        shutil.rmtree(temporary, ignore_errors=True)
        write_text(mark, made_from)
    for left_over in temporary.glob(".*.tmp"):
        left_over.unlink()
    try:
        yield temporary
        mark.unlink()
        _exchange(temporary, path)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(temporary: Path, path: Path) -> None:
    """Move a folder to `path`, in place of the one that may be there."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    flush_to_disk(temporary)
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or all files in a folder, to the disk, so that a power failure cannot lose them."""
    for file in [*path.rglob("*"), path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def locked(folder: Path, where: str) -> Iterator[None]:
    """Lock a folder; the lock ends with this process, however that ends. Does nothing on a file system without locks.
    Raises UserError: another process has the lock."""
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while not _lock(descriptor):
            if time.monotonic() > deadline:
                advice = "wait for it or end it, or choose another `output_dir`"
                raise UserError("another process is at work in this folder", where=where, advice=advice)
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """False where another process has the lock."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def is_locked(folder: Path) -> bool:
    """Whether a process has the lock of a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def holder_of(folder: Path) -> psutil.Process | None:
    """The process that has the lock of a folder; None where the system does not tell (it is not Linux, or the process
    belongs to another user or machine)."""
    for opened in iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError, psutil.Error):  # it has been closed meanwhile
            if os.path.samefile(opened, folder):
                process, about = opened.split("/")[2], Path(opened.replace("/fd/", "/fdinfo/")).read_text()
                # A child inherits the descriptor, but the lock names the process that took it.
                if f"FLOCK  ADVISORY  WRITE {process} " in about:
                    return psutil.Process(int(process))
    return None


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    for path in folder.glob(".*"):
        if temporary := re.fullmatch(r"\..+?\.(\d+)(\.old)?\.tmp|\.writable\.(\d+)", path.name):
            process = int(temporary[1] or temporary[3])
            if process == os.getpid() or not psutil.pid_exists(process):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


LARGE = 2**20
"""Bytes from which the digest of a file is cached."""
RECENT = 2 * 10**9
"""Nanoseconds within which two writes to a file may leave the same times."""


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes. That of a large file is cached while its path, inode, size and times stay the same.
    Raises OSError: it cannot be read."""
    stat = path.stat()
    changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    cached = cache_folder() / "digests" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if stat.st_size >= LARGE:
        with suppress(OSError):
            return cached.read_text()
    digest = sha256_of(path)
    if stat.st_size >= LARGE and time.time_ns() - changed > RECENT:
        with suppress(OSError):  # without a writable cache it only takes longer
            write_text(cached, digest)
    return digest


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def require_writable(folder: Path, advice: str = "") -> None:
    """Create `folder`, and check that a file can be written in it. Raises UserError: it cannot."""
    advice = advice or "choose another one, e.g. `output_dir=runs/mine`, or change its permissions"
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        what = "is a file, not a folder" if folder.exists() else "is a link that leads nowhere"
        raise UserError(what, where=str(folder), advice=advice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        what = f"cannot write to the folder ({error.strerror})"
        raise UserError(what, where=str(folder), advice=advice) from None


STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Native writers report a failed write in their own words.
_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "iostream error", "unexpected pos")


def storage_trouble(error: BaseException) -> str:
    """Why a file cannot be written or read, if the error is about that; empty if not."""
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{error.strerror}{f': {without_home(str(error.filename))}' if error.filename else ''}"
    if any(words in str(error) for words in _FULL):
        return os.strerror(errno.ENOSPC)
    return storage_trouble(error.__cause__) if error.__cause__ else ""


def without_home(path: str) -> str:
    """`path` with the user's home folder as `~`, so that a run folder that is passed on does not show it."""
    home = str(Path.home())
    return "~" + path[len(home) :] if path == home or path.startswith(home + os.sep) else path


def without_secrets(text: str) -> str:
    """`text` without the user names, passwords and tokens that the address of an index or a mirror can carry."""
    return re.sub(r"//[^/\s@]+@", "//", text)


def cache_folder() -> Path:
    """The folder of everything that is cached: `$PREFOLD_CACHE`, else `prefold` in the user's cache folder."""
    if chosen := os.environ.get("PREFOLD_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefold"
