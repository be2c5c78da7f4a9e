"""The journal: every finished step of a run on the disk at once, so that a killed run goes on where it stopped.

    with Journal.open("out/journal", identity_of(model, windows, options)) as journal:
        scores = journal.get("scores")
        if scores is None:
            scores = journal.put("scores", measure())

A directory holds one run:

    run.json          the run's identity: what went in
    steps.jsonl       one line a step: key, record, the file of its arrays, and a checksum that chains the lines
    arrays/*.safetensors
    lock              held while a process works on the run

A step's arrays are written, pushed to the disk and renamed before its line is appended and pushed. So after a kill at
any moment the directory holds the steps that were finished, and at most one torn line or one file that no line names;
both are removed when the run is opened again. Nothing here is ever executed: JSON and safetensors only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bitween.gradual.journal import strict_json
from bitween.gradual.journal.identity import differences, identity_of
from bitween.store import files

__all__ = ["Journal", "JournalError", "JournalMismatch", "NullJournal", "Step", "identity_of"]

_FORMAT = 1
_ARRAY_NAME = re.compile(r"\d{6}-[0-9a-f]{16}\.safetensors")
_OURS = {"run.json", "steps.jsonl", "arrays", "lock"}


class JournalError(ValueError):
    """The journal cannot be used; the message names the file and says why."""


class JournalMismatch(JournalError):
    """The directory holds a run of other inputs. `.differences` lists what differs, one line each."""

    def __init__(self, directory: Path, found: list[str]):
        self.differences = found
        listed = "\n  ".join(found)
        super().__init__(
            f"{directory}: holds a run of other inputs; choose another directory or start over.\n  {listed}"
        )


@dataclass(frozen=True)
class Step:
    """One finished step: its key, its record, and the file of its arrays (a name inside arrays/) or None."""

    key: str
    record: dict
    file: dict | None = None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _line_of(step: Step, previous: str) -> tuple[bytes, str]:
    """The step's line and its checksum, which covers the checksum of the line before."""
    body = {"key": step.key, "record": step.record, "arrays": step.file}
    check = _digest(f"{previous}{strict_json.dumps(body)}".encode())[:32]
    return strict_json.dumps({**body, "check": check}).encode() + b"\n", check


def _checked(key: Any, record: Any) -> tuple[str, dict]:
    if not isinstance(key, str) or not key:
        raise TypeError(f"key: expected a string; got {key!r}")
    if not isinstance(record, dict):
        raise TypeError(f"record: expected a dict; got {type(record).__name__}")
    return key, strict_json.plain(record)


class NullJournal:
    """A journal for runs without a directory: it lists the steps and keeps no results."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def get(self, key: str) -> dict | None:
        """None: nothing is kept."""
        return None

    def arrays(self, key: str) -> dict[str, np.ndarray] | None:
        """None: nothing is kept."""
        return None

    def put(self, key: str, record: dict, arrays: dict[str, np.ndarray] | None = None) -> dict:
        """Check and list the step; returns the record as a real journal would read it back."""
        key, record = _checked(key, record)
        self.steps.append(Step(key, record))
        return record

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Journal(NullJournal):
    """The record of one run in a directory; made by `Journal.open`.

    Attributes
    ----------
    directory : Path
    steps : list of Step, in the order they were finished
    """

    @classmethod
    def open(cls, directory: str | os.PathLike, identity: dict, resume: bool = True) -> Self:
        """Start a run in `directory`, or go on with the one that it holds.

        Parameters
        ----------
        directory : the journal's own; made when missing
        identity : what determines the run's results, as `identity_of` gives it. What stands under "machine" may
            differ in a resumed run, with a warning; all else must be equal.
        resume : False removes the steps found and starts over

        Raises
        ------
        JournalMismatch
            the directory holds a run of other inputs (with resume=False: it is replaced)
        JournalError
            another process works on the run, a file is damaged, or the directory holds other things
        OSError
            the disk refuses; the message names path and bytes
        """
        journal = cls(Path(directory))
        try:
            journal._start(strict_json.plain(identity, "identity"), resume)
        except BaseException:
            journal.close()
            raise
        return journal

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self._by_key: dict[str, Step] = {}
        self._check = ""
        self._lock_file: int | None = None
        self._steps_file: int | None = None
        self._guard = threading.Lock()

    def get(self, key: str) -> dict | None:
        """The record of a finished step, or None. The caller may change it; the journal keeps its own."""
        step = self._by_key.get(key)
        return None if step is None else strict_json.plain(step.record)

    def arrays(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished step, read from the disk, or None when it has none.

        JournalError when the file is missing or not the one that was written.
        """
        step = self._by_key.get(key)
        if step is None or step.file is None:
            return None
        from safetensors.numpy import load

        path = self.directory / "arrays" / step.file["name"]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise JournalError(f"{path}: missing, though step {key!r} names it") from None
        if len(data) != step.file["n_bytes"] or _digest(data) != step.file["sha256"]:
            raise JournalError(f"{path}: damaged; expected {step.file['n_bytes']:,} bytes as step {key!r} wrote them")
        return {name: array.copy() for name, array in load(data).items()}

    def put(self, key: str, record: dict, arrays: dict[str, np.ndarray] | None = None) -> dict:
        """Keep a finished step. On return it is on the disk.

        Parameters
        ----------
        key : names the step; each step is kept once
        record : JSON values; finite numbers only
        arrays : NumPy arrays by name

        Returns
        -------
        The record as `get` gives it, so that a resumed run goes on from the same values.

        Raises
        ------
        TypeError, ValueError
            a value that JSON or safetensors cannot keep, or a key kept before with other content
        OSError
            the disk refuses; the message names path and bytes. The journal is as before; put may be tried again.
        """
        key, record = _checked(key, record)
        data = None if arrays is None else _serialized(arrays)
        with self._guard:
            if self._steps_file is None:
                raise JournalError(f"{self.directory}: the journal is closed")
            step = Step(key, record, None if data is None else self._file_of(data))
            if key in self._by_key:
                self._refuse_other_content(step)
                return record
            if data is not None:
                files.atomic_write(self.directory / "arrays" / step.file["name"], data)
            self._append(step)
        return strict_json.plain(record)

    def close(self) -> None:
        """Release the lock. The steps stay on the disk; more cannot be put."""
        for name in ("_steps_file", "_lock_file"):
            descriptor = getattr(self, name)
            setattr(self, name, None)
            if descriptor is not None:
                os.close(descriptor)

    def _file_of(self, data: bytes) -> dict:
        digest = _digest(data)
        return {"name": f"{len(self.steps):06d}-{digest[:16]}.safetensors", "n_bytes": len(data), "sha256": digest}

    def _refuse_other_content(self, step: Step) -> None:
        kept = self._by_key[step.key]
        same_file = (kept.file or {}).get("sha256") == (step.file or {}).get("sha256")
        if kept.record != step.record or not same_file:
            raise ValueError(f"key: step {step.key!r} was kept before, with other content")

    def _append(self, step: Step) -> None:
        """Write the step's line. When that fails, cut the file back to the lines before."""
        line, check = _line_of(step, self._check)
        descriptor = self._steps_file
        before, written = os.fstat(descriptor).st_size, 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except BaseException as error:
            os.ftruncate(descriptor, before)
            if not isinstance(error, OSError):
                raise
            path = self.directory / "steps.jsonl"
            text = f"{error.strerror}: {written:,} of {len(line):,} bytes of step {step.key!r} written"
            raise OSError(error.errno, text, str(path)) from error
        self._take(step, check)

    def _take(self, step: Step, check: str) -> None:
        self.steps.append(step)
        self._by_key[step.key] = step
        self._check = check

    def _start(self, identity: dict, resume: bool) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        files.sweep(self.directory)
        run = self.directory / "run.json"
        if run.exists() and resume:
            self._compare(identity, run)
        else:
            self._clear(strangers_allowed=run.exists())
            content = {"format": _FORMAT, "identity": identity, "sha256": _digest(strict_json.dumps(identity).encode())}
            files.atomic_write(run, strict_json.dumps(content).encode() + b"\n")
        (self.directory / "arrays").mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._steps_file = os.open(self.directory / "steps.jsonl", flags, 0o666)
        self._read_steps()
        files.sync_directory(self.directory)
        self._sweep_arrays()

    def _lock(self) -> None:
        path = self.directory / "lock"
        self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock_file, 32).decode(errors="replace").strip()
            raise JournalError(f"{path}: process {holder or 'unknown'} works on this run") from None
        with contextlib.suppress(OSError):  # the number is a courtesy; the lock itself holds without it
            os.ftruncate(self._lock_file, 0)
            os.pwrite(self._lock_file, f"{os.getpid()}\n".encode(), 0)

    def _compare(self, identity: dict, path: Path) -> None:
        try:
            content = strict_json.loads(path.read_bytes())
            recorded = content["identity"]
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}; this version writes {_FORMAT}")
            if content["sha256"] != _digest(strict_json.dumps(recorded).encode()):
                raise ValueError("wrong checksum")
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{path}: damaged: {error}") from error
        machine_then, machine_now = recorded.pop("machine", {}), identity.get("machine", {})
        now = {key: value for key, value in identity.items() if key != "machine"}
        if found := differences(recorded, now):
            raise JournalMismatch(self.directory, found)
        if found := differences(machine_then, machine_now, "machine"):
            warnings.warn(f"{path}: resumed elsewhere, results may differ: {'; '.join(found)}", stacklevel=4)

    def _clear(self, strangers_allowed: bool) -> None:
        """Before a new run: nothing of another one may stay, and nothing that is not ours may go."""
        foreign = sorted(set(os.listdir(self.directory)) - _OURS)
        if foreign and not strangers_allowed:
            raise JournalError(f"{self.directory}: expected an empty directory or a journal; it holds {foreign[0]!r}")
        for name in ("run.json", "steps.jsonl"):  # run.json first: without it nothing counts as a run
            (self.directory / name).unlink(missing_ok=True)
            files.sync_directory(self.directory)
        self._sweep_arrays()

    def _read_steps(self) -> None:
        """Take over the finished steps; cut off a last line that a kill tore."""
        path = self.directory / "steps.jsonl"
        data = path.read_bytes()
        end = 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                step, check = self._read_line(line)
            except (ValueError, KeyError, TypeError) as error:
                if end + len(line) < len(data):
                    raise JournalError(f"{path}: line {number} is damaged: {error}") from error
                break
            self._take(step, check)
            end += len(line)
        if end < len(data):
            os.ftruncate(self._steps_file, end)
            os.fsync(self._steps_file)

    def _read_line(self, line: bytes) -> tuple[Step, str]:
        content = strict_json.loads(line)
        step = Step(content["key"], content["record"], content["arrays"])
        expected, check = _line_of(step, self._check)
        if line != expected:
            raise ValueError("wrong checksum")
        if step.file is not None and not _ARRAY_NAME.fullmatch(step.file["name"]):
            raise ValueError(f"expected the name of an array file; got {step.file['name']!r}")
        return step, check

    def _sweep_arrays(self) -> None:
        """Remove array files that no line names: their step was killed before it counted."""
        folder = self.directory / "arrays"
        if not folder.is_dir():
            return
        files.sweep(folder)
        named = {step.file["name"] for step in self.steps if step.file}
        for name in set(os.listdir(folder)) - named:
            if _ARRAY_NAME.fullmatch(name):
                (folder / name).unlink()


def _serialized(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"arrays: expected names that are strings; got {name!r}")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"arrays[{name!r}]: expected a NumPy array of numbers; got {got}")
    native = {n: np.ascontiguousarray(a, a.dtype.newbyteorder("=")).reshape(a.shape) for n, a in arrays.items()}
    return save(dict(sorted(native.items())))
