"""One process holds a lock; the system frees the lock of a dead one; a second process is told who holds it."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep

import pytest

from finetune.system import locks
from finetune.system.locks import RUN_LOCK, RUN_LOCK_HOLDER, InUseError, file_lock, holder, run_lock


def hold_until_killed(run_dir: Path, started: Connection) -> None:
    """Hold the lock of `run_dir`, with a forked child that outlives this process."""
    with run_lock(run_dir):
        child = os.fork()
        if child == 0:
            sleep(60)
            os._exit(0)
        started.send(child)
        sleep(60)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_second_process_is_told_who_holds_the_folder_until_that_one_is_dead(tmp_path: Path) -> None:
    forking = get_context("fork")
    here, there = forking.Pipe()
    process = forking.Process(target=hold_until_killed, args=(tmp_path, there))
    process.start()
    child = here.recv()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = f"process {process.pid} on {re.escape(socket.gethostname())}, since 20.*nothing was changed.*kill"
    with pytest.raises(InUseError, match=expected), run_lock(tmp_path):
        pass
    found = holder(tmp_path)
    assert found is not None and found.pid == process.pid
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    process.kill()
    process.join()
    assert holder(tmp_path) is None
    with run_lock(tmp_path):  # though its child lives
        found = holder(tmp_path)
        assert found is not None and found.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []
    os.kill(child, signal.SIGKILL)


def test_a_damaged_record_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / RUN_LOCK).touch()
    (tmp_path / RUN_LOCK_HOLDER).write_text('{"host": "a')
    assert holder(tmp_path) is None
    with run_lock(tmp_path):
        (tmp_path / RUN_LOCK_HOLDER).write_text('{"host": "a')
        with pytest.raises(InUseError, match="by another process"), run_lock(tmp_path):
            pass


def test_an_error_within_is_not_taken_for_a_lock_that_is_held(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="of a download"), run_lock(tmp_path):
        raise TimeoutError("of a download")
    assert holder(tmp_path) is None


def test_a_wait_for_a_lock_ends_by_time_or_by_an_error(tmp_path: Path) -> None:
    def give_up() -> None:
        raise KeyboardInterrupt

    path = tmp_path / "entry.lock"
    with file_lock(path):
        with (
            pytest.raises(TimeoutError, match=r"entry\.lock is locked by another process"),
            file_lock(path, timeout_s=0),
        ):
            pass
        with pytest.raises(KeyboardInterrupt), file_lock(path, timeout_s=60, on_wait=give_up):
            pass
    with file_lock(path, timeout_s=0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="finetune"), locks.run_lock(tmp_path):
        assert holder(tmp_path) is None
    assert "has no locks" in caplog.text
