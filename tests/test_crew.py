from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker_bootstrap import crew
from worker_bootstrap.crew import Crew, may_fork
from worker_bootstrap.errors import ChunkMissing

CODE = str(Path(crew.__file__).parents[1])


def share_out(count: int, job: Callable[[int], int], done: Callable[[int], None], processes: int) -> None:
    with Crew(job, done, processes) as started:
        for number in range(count):
            started.give(number)
        started.finish()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, crew.WAITING_LIMIT * 2 + 1])
def test_each_job_is_done_once(processes: int, count: int, tmp_path: Path, no_leaks: None) -> None:
    journal = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    told: list[int] = []

    def job(number: int) -> int:
        os.write(journal, b"%d\n" % number)
        return number

    share_out(count, job, told.append, processes)
    os.close(journal)
    assert sorted(map(int, (tmp_path / "journal").read_text().split())) == list(range(count))
    assert sum(told) == sum(range(count))


def test_others_work_as_well(tmp_path: Path, no_leaks: None) -> None:
    """No job ends before two processes have begun one."""

    share_out(2, _shared(lambda _: 0, tmp_path), lambda _: None, 2)
    assert len({path.name for path in tmp_path.iterdir()} - {str(os.getpid())}) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_raised_wherever_it_happens(processes: int, no_leaks: None) -> None:
    def job(number: int) -> int:
        if number == 3:
            raise ChunkMissing("d" * 64, "there")
        return 0

    with pytest.raises(ChunkMissing) as caught:
        share_out(1000, job, lambda _: None, processes)
    assert caught.value.where == "there"


def test_what_is_left_in_the_middle_is_ended(no_leaks: None) -> None:
    def job(number: int) -> int:
        signal.pause()
        return 0

    with pytest.raises(KeyError), Crew(job, lambda _: None, 2) as started:
        started.give(0)
        raise KeyError


def test_an_error_that_cannot_be_pickled_is_told(no_leaks: None) -> None:
    class Local(Exception):
        pass

    def job(number: int) -> int:
        raise Local("of a class that nobody finds")

    with pytest.raises(RuntimeError, match="Local: of a class"):
        share_out(1000, job, lambda _: None, 2)


def test_a_process_that_is_killed_is_an_error(no_leaks: None) -> None:
    def job(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(ChildProcessError, match="signal 9"):
        share_out(1000, job, lambda _: None, 2)


def test_helpers_die_with_the_one_that_they_help() -> None:
    program = (
        "import os, signal; from worker_bootstrap.crew import Crew\n"
        "def job(number):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"  # at once, whatever else is printed
        "    signal.pause()\n"
        "with Crew(job, print, 2) as crew:\n"
        "    crew.give(0), crew.give(1), crew.finish()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=CODE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = {int(process.stdout.readline()), int(process.stdout.readline())}
    assert len(pids) == 2
    process.kill()
    # The pipe ends when nobody is left who could write to it.
    assert process.communicate(timeout=30) == ("", None)


def test_a_process_with_threads_is_not_forked() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert not may_fork()
    finally:
        over.set()
        thread.join()


def _shared(job: Callable[[int], int], folder: Path) -> Callable[[int], int]:
    """*job*, once two processes have begun one."""

    def waiting(number: int) -> int:
        (folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 30
        while len(list(folder.iterdir())) < 2:
            assert time.monotonic() < deadline
        return job(number)

    return waiting
