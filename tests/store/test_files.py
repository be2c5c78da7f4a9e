"""Files appear whole or not at all: kills, full disks, the umask, links, leftovers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest

from bitween.store.files import atomic_directory, atomic_write, check_space, sweep


def fill(path, step):
    with atomic_directory(path) as folder:
        (folder / "mine").write_bytes(b"1")
        step(folder)


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a"
    atomic_write(target, b"one")
    atomic_write(target, lambda file: file.write(b"two"))
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", b"x")
        with atomic_directory(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            (folder / "inner/private").write_bytes(b"x")
            (folder / "inner/private").chmod(0o600)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes["file"] == modes["private"] == 0o666 & ~umask
    assert modes["folder"] == modes["inner"] == 0o777 & ~umask


def test_failed_content_changes_nothing(tmp_path):
    atomic_write(tmp_path / "a", b"old")

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", fails)
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "d", lambda folder: 1 / 0)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


_IN_A_SMALL_WORLD = """
import resource, sys
from pathlib import Path
from bitween.store.files import atomic_directory, atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # files end here: the kernel answers EFBIG
place = Path(sys.argv[1])
for attempt in range(2):
    try:
        if attempt == 0:
            atomic_write(place / "a", bytes(5000))
        else:
            with atomic_directory(place / "d") as folder:
                (folder / "x").write_bytes(bytes(5000))
    except OSError as error:
        print(error.errno, error)
"""


def test_row_32_full_file_reports_path_and_bytes(tmp_path):
    atomic_write(tmp_path / "a", b"old")
    said = subprocess.check_output([sys.executable, "-c", _IN_A_SMALL_WORLD, str(tmp_path)], text=True).splitlines()
    assert re.match(rf"{errno.EFBIG} .*: 1,000 of 5,000 bytes written, [\d,]+ free: '{tmp_path}/a'", said[0]), said
    assert re.match(rf"{errno.EFBIG} .*: 1,000 bytes written, [\d,]+ free: '{tmp_path}/d'", said[1]), said
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic_write(tmp_path / "nowhere" / "a", b"x")


def test_directory_must_be_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as folder:
        (folder / "x").write_bytes(b"1")
    assert (tmp_path / "empty/x").read_bytes() == b"1"
    with pytest.raises(FileExistsError, match="it has files"), atomic_directory(tmp_path / "empty"):
        pass
    with pytest.raises(FileExistsError, match="it is a file"), atomic_directory(tmp_path / "empty/x"):
        pass


def test_directory_filled_meanwhile_is_kept(tmp_path):
    def meanwhile(folder):
        (tmp_path / "d").mkdir()
        (tmp_path / "d/theirs").write_bytes(b"2")

    with pytest.raises(FileExistsError):
        fill(tmp_path / "d", meanwhile)
    assert os.listdir(tmp_path) == ["d"]
    assert os.listdir(tmp_path / "d") == ["theirs"]


def test_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "link").symlink_to("precious")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()


def leave(folder):
    """What killed writers leave, and what only looks like it."""
    (folder / ".bitween-dead.tmp").write_bytes(b"left")
    (folder / ".bitween-deadfolder.tmp").mkdir()
    (folder / ".bitween-deadfolder.tmp/x").write_bytes(b"left")
    if not (folder / "other").exists():
        (folder / ".bitween-link.tmp").symlink_to("other")
        (folder / "other").write_bytes(b"mine")
    return [".bitween-dead.tmp", ".bitween-deadfolder.tmp"]


def test_sweep_spares_writers_at_work_and_other_files(tmp_path):
    def content(file):
        file.write(b"at work")
        left = leave(tmp_path)
        assert sweep(tmp_path) == left

    leave(tmp_path)  # goes before anything is written
    atomic_write(tmp_path / "b", content)
    assert sorted(os.listdir(tmp_path)) == [".bitween-link.tmp", "b", "other"]
    leave(tmp_path)
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_bytes(b"1")
        assert sweep(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == [".bitween-link.tmp", "b", "d", "other"]


def test_check_space(tmp_path):
    check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OSError, match=r"1,000,000,000,000,000 bytes needed, [\d,]+ free") as caught:
        check_space(tmp_path, 10**15)
    assert caught.value.errno == errno.ENOSPC


_WRITER = """
import sys
from bitween.store.files import atomic_directory, atomic_write
i = 0
while True:
    i += 1
    atomic_write(sys.argv[1] + "/a", bytes([i % 256]) * 300_000)
    with atomic_directory(sys.argv[1] + f"/d{i}") as folder:
        for name in "xy":
            (folder / name).write_bytes(bytes([i % 256]) * 10_000)
    print(i, flush=True)
"""


def test_row_31_killed_writer_leaves_old_or_new(tmp_path):
    for moment in range(8):
        child = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.004 * moment)
        child.kill()
        child.communicate()
        data = (tmp_path / "a").read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
        for folder in tmp_path.glob("d*"):
            assert {p.name: p.stat().st_size for p in folder.iterdir()} == {"x": 10_000, "y": 10_000}
            shutil.rmtree(folder)
        sweep(tmp_path)
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
