"""Writing files so that a crash at any moment leaves the old state or the new one, never something between.

Everything is written under a temporary name beside its target, pushed to the disk, then renamed. The writer holds a
lock on its temporary, so that `sweep` can tell what a killed process left behind from what another is writing now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_directory", "atomic_path", "atomic_write", "check_space", "sweep"]

_PREFIX, _SUFFIX = ".bitween-", ".tmp"


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    path : where; what stands there is replaced (a symbolic link itself, not what it points to)
    content : the bytes, or a function that writes them to the binary file it is given

    Raises
    ------
    OSError
        with the errno of the failed step and a message naming path, bytes written and bytes free. What stood at
        `path` is unchanged and the temporary is gone.

    The mode follows the umask. The file and its directory are on the disk on return.
    """
    path = Path(path)
    n_wanted = None if callable(content) else memoryview(content).nbytes
    temporary, descriptor = _new_temporary(path, _open_new)
    with _all_or_nothing(path, temporary, descriptor, n_wanted):
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            content(file) if callable(content) else file.write(content)
        os.fsync(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_write` for libraries that open their file by name: yields a temporary path beside `path` to write to.

    Raises
    ------
    OSError
        as `atomic_write`; when the block raises, what stood at `path` is unchanged and the temporary is gone.
    """
    path = Path(path)
    temporary, descriptor = _new_temporary(path, _open_new)
    with _all_or_nothing(path, temporary, descriptor):
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a directory, then let it appear under its name in one step.

        with atomic_directory("out") as folder:
            (folder / "config.json").write_text("{}")

    Parameters
    ----------
    path : must not exist, or be an empty directory

    Yields
    ------
    Path of a temporary directory beside `path`. When the block ends, every file in it gets the mode that the umask
    asks for (some libraries choose their own) and is pushed to the disk, then the directory is renamed. When the
    block raises, it is removed.

    Raises
    ------
    FileExistsError
        when `path` is a file or a directory with something in it, before anything is written and again at the end.
    OSError
        as `atomic_write`.
    """
    path = Path(os.path.abspath(path))
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _new_temporary(path, _make_directory)
    with _all_or_nothing(path, temporary, descriptor):
        yield temporary
        _push_tree(temporary)
        _refuse_existing(path)
        os.rename(temporary, path)
        sync_directory(path.parent)


def check_space(directory: str | os.PathLike, n_bytes: int) -> None:
    """OSError (ENOSPC) naming bytes needed and free, unless `n_bytes` more fit on the disk of `directory`."""
    place = Path(os.path.abspath(directory))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        text = f"{os.strerror(errno.ENOSPC)}: {n_bytes:,} bytes needed, {free:,} free"
        raise OSError(errno.ENOSPC, text, str(directory))


def sweep(directory: str | os.PathLike) -> list[str]:
    """Remove what killed writers left in `directory`; temporaries of writers at work stay. Returns the names."""
    removed = []
    for entry in list(os.scandir(directory)):
        if not (entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)) or entry.is_symlink():
            continue
        if _remove_if_abandoned(entry.path):
            removed.append(entry.name)
    return sorted(removed)


def sync_directory(path: str | os.PathLike) -> None:
    """Push a directory's entries to the disk; a file system that cannot is left to its own care."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _make_directory(path: Path) -> int:
    os.mkdir(path)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _new_temporary(target: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """A new temporary beside `target` and its descriptor, locked. One that a sweep took before the lock is remade.

    What killed writers left there goes first, as nobody else would look for it.
    """
    with contextlib.suppress(OSError):
        sweep(target.parent)
    while True:
        path = target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        try:
            descriptor = create(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and target.parent.is_dir():
                continue
            raise _explained(error, target, 0, None) from error
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)


def _remove_if_abandoned(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return _remove(Path(path))
    finally:
        os.close(descriptor)


def _remove(path: Path) -> bool:
    """Remove a file or a tree as far as the system lets, by names alone: shutil.rmtree gives up when a close fails."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        for place, _, names in os.walk(path, topdown=False):
            for name in names:
                os.unlink(os.path.join(place, name))
            os.rmdir(place)
        return True
    return False


def _refuse_existing(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise FileExistsError(errno.EEXIST, "expected a directory that is new or empty; it has files", str(path))
    elif os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "expected a directory that is new or empty; it is a file", str(path))


def _push_tree(folder: Path) -> None:
    """Mode and fsync of every file, then fsync of the directories, the inner ones first."""
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = os.path.join(place, name)
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(place)


@contextlib.contextmanager
def _all_or_nothing(path: Path, temporary: Path, descriptor: int, n_wanted: int | None = None) -> Iterator[None]:
    """Around the filling of a temporary: after any error it is removed, and what the system said is explained."""
    try:
        yield
    except BaseException as error:
        failed, n_bytes = _system_error(error), _n_bytes(temporary)
        _remove(temporary)
        about = failed and failed.filename and str(failed.filename)
        if failed is None or (about and about != str(path.parent) and not about.startswith(str(temporary))):
            raise
        raise _explained(failed, path, n_bytes, n_wanted) from error
    finally:
        os.close(descriptor)


def _system_error(error: BaseException) -> OSError | None:
    """What the system said to a writer: an OSError, or the number in the words of a library that is written in Rust."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _n_bytes(path: Path) -> int:
    """Of a file, or of all files in a directory; 0 when there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _explained(error: OSError, path: Path, n_bytes: int, n_wanted: int | None) -> OSError:
    """The same error with what a person needs to act: path, bytes written, bytes free."""
    wanted = f"{n_bytes:,} bytes written" if n_wanted is None else f"{n_bytes:,} of {n_wanted:,} bytes written"
    with contextlib.suppress(OSError):
        wanted += f", {shutil.disk_usage(path.parent).free:,} free"
    return OSError(error.errno, f"{error.strerror or error}: {wanted}", str(path))
