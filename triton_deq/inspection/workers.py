"""Compile many kernels at a time, each in a process that may die without harm to the others."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory

from .compiling import Job, Row, compile_job, name_of


def compile_all(jobs: list[Job], processes: int) -> Iterator[Row]:
    """The rows of all jobs, in their order.

    Everything is compiled anew, into a cache that is removed afterwards: times are true, and neither a
    cache that cannot be written nor an old kernel in it matters.

    Raises:
        OSError: there is no folder for the cache.
    """
    try:
        cache = TemporaryDirectory(prefix="triton-deq-inspect-")
    except OSError as error:
        raise OSError(f"no folder for the compiled kernels ({error}): set TMPDIR to one") from error
    with cache as folder, _environment(folder):
        crew = _Crew(Path(folder))
        with ThreadPoolExecutor(max(1, min(processes, len(jobs)))) as threads:
            try:
                yield from threads.map(crew.compile, jobs)
            finally:
                threads.shutdown(cancel_futures=True)
                crew.dismiss()


class _Crew:
    """One compiling process for each thread that asks; a new one where the last has died.

    MLIR aborts the process when an assertion of its own fails. An executor with several processes would
    then give up all that it had been asked, so each has one.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._own = threading.local()
        self._all: list[ProcessPoolExecutor] = []

    def compile(self, job: Job) -> Row:
        log = self._folder / f"{threading.get_ident()}.log"
        try:
            return self._process(log).submit(compile_job, job).result()
        except BrokenProcessPool:
            del self._own.process
            message = _tail(log) or "no message"
            return Row(*name_of(job), job.target, error=f"the compiler's process died: {message}")

    def _process(self, log: Path) -> ProcessPoolExecutor:
        if not hasattr(self._own, "process"):
            # Spawned: a fork would inherit kernels that were imported for the interpreter.
            context = multiprocessing.get_context("spawn")
            self._own.process = ProcessPoolExecutor(1, context, initializer=_quiet, initargs=(str(log),))
            self._all.append(self._own.process)
        return self._own.process

    def dismiss(self) -> None:
        for process in self._all:
            process.shutdown(cancel_futures=True)


def _quiet(log: str) -> None:
    """Send all that compilers print, also from C++, to a file: standard output belongs to the rows."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())


def _tail(log: Path, lines: int = 20) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.strip().splitlines()[-lines:])


@contextlib.contextmanager
def _environment(cache: str) -> Iterator[None]:
    """What the processes inherit: an empty cache, and a Triton that compiles instead of interpreting."""
    before = dict(os.environ)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
