"""Work that several processes share: claims that a dead process loses, and workers on one machine."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from pyro_vae.errors import NonFiniteError, RunError
from pyro_vae.files import forget_partial, open_own, whole
from pyro_vae.runs.reading import text_of

CLAIMS = ".claims"
"""The folder, in a directory whose work is shared, of the files that are locked while somebody works on a part."""


class Taken(RunError):
    """Somebody else is at work on this."""


@contextlib.contextmanager
def claim(directory: Path, name: str) -> Iterator[None]:
    """Context: nobody else does the part ``name`` of the work in ``directory``, on this machine or on others that share
    its file system. The operating system frees the claim of a process that dies, however it does.

    Raises:
        Taken: if another process has claimed it.
        RunError: if the claim cannot be written.
    """
    path = directory / CLAIMS / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_own(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    with file:
        if not _lock(file):
            file.seek(0)
            raise Taken(f"{directory}: {file.read().strip() or 'another process'} is at work on {name}")
        with contextlib.suppress(OSError):  # on a full disk the claim holds, and does not say whose it is
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Context: nobody else writes to this directory, which has its settings already; what was half written is deleted.

    Raises:
        Taken: if another process does.
    """
    with (run_dir / "config.yaml").open("r+") as file:  # network file systems lock only what could be written
        if not _lock(file):
            raise Taken(f"--run_dir: another process is at work on {run_dir}")
        forget_partial(run_dir)
        yield


def _lock(file: Any) -> bool:
    """Lock a file until it is closed, if nobody else has; where a system has no such locks, nobody is told."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Shared:
    """Parts of a work by name, each done once by whoever claims it first; what is done can be seen in the directory.

    Args:
        directory: of the work.
        names: of its parts, which are names of files too, in the order in which they are taken.
        do: does one of them; an error of one does not stop the others, and its reason is written to the directory.
        is_done: whether one of them is done, by whomever.
        status: a few words on one that is on its way, for its line of progress.
        plan: what has to be settled in the directory before one is done, there or elsewhere.
        plans: the name of the file where that is written, of each part.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        do: Callable[[str], object],
        is_done: Callable[[str], bool],
        status: Callable[[str], str] = lambda name: "",
        plan: Callable[[str], object] = lambda name: None,
        plans: Callable[[str], str] | None = None,
    ):
        self.directory, self.names = directory, list(names)
        self.do, self.is_done, self.status, self.plan, self.plans = do, is_done, status, plan, plans

    def open(self) -> list[str]:
        """What is neither done nor has failed."""
        return [name for name in self.names if not self.is_done(name) and not self._failure(name).exists()]

    def failures(self) -> dict[str, str]:
        """Reasons by name."""
        return {name: text_of(self._failure(name)) for name in self.names if self._failure(name).exists()}

    def forget_failures(self) -> None:
        """Let what has failed be tried again."""
        for name in self.names:
            self._failure(name).unlink(missing_ok=True)

    def work(self, tell: Callable[[str], object] = lambda name: None) -> None:
        """Do what nobody else does, until all is done; wait for others, in case one of them dies."""
        waiting = False
        while left := self.open():
            took = False
            for name in left:
                took = self.take(name, tell) or took
            if not took:
                if not waiting:
                    print(f"waiting for other processes, which are at work on {', '.join(left)}")
                waiting = True
                time.sleep(0.5)

    def take(self, name: str, tell: Callable[[str], object] = lambda name: None) -> bool:
        """Do one part, unless somebody else is at it, which is what is returned, or it was done in the meantime."""
        try:
            with claim(self.directory, name):
                if name in self.open():
                    tell(name)
                    self._try(name)
        except Taken:
            return False
        return True

    def files(self, name: str) -> list[str]:
        """What somebody else needs, by names in the directory, to do a part, or to go on with it."""
        return [name] if self.plans is None else [name, self.plans(name)]

    def writes(self, name: str) -> list[str]:
        """What a part writes, by names in the directory."""
        return [name, f"{name}.log"]

    def _try(self, name: str) -> None:
        try:
            self.do(name)
        except Taken:
            raise
        except (RunError, NonFiniteError) as error:
            self.fail(name, str(error))
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {error}")

    def fail(self, name: str, reason: str) -> None:
        """Write why a part failed: nobody tries it again before failures are forgotten."""
        reason = " ".join(reason.split())
        print(f"{name} failed: {reason}", file=sys.stderr)
        self._failure(name).parent.mkdir(parents=True, exist_ok=True)
        with whole(self._failure(name)) as partial:
            partial.write_text(reason, encoding="utf-8")

    def _failure(self, name: str) -> Path:
        return failure(self.directory, name)


def failure(directory: Path, name: str) -> Path:
    """Where it is written why a part of a work has failed, if it has."""
    return directory / CLAIMS / f"{name}.failed"


WIDTH = 200
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How workers begin: as copies of a process that has imported this library, and done nothing else, where there are."""


PRELOADED = ["pyro_vae.runs.studies"]
"""What workers have imported when they begin; :mod:`pyro_vae.cli` lets that begin ahead."""


def in_processes(
    shared: Callable[[], Shared], workers: int, log: Callable[[str], Path], status: Callable[[str], str]
) -> None:
    """Do a shared work in ``workers`` new processes on this machine, each with its part of the processor's threads.

    Args:
        shared: makes the work, in this process and in each of the others: it must be picklable.
        workers: how many processes.
        log: where the output of each part is written.
        status: a few words on a part that is on its way, for its line of progress.

    Raises:
        RunError: if every worker died.
        KeyboardInterrupt: when Ctrl-C was pressed, after all have stopped.
    """
    here, context = shared(), cast(Any, multiprocessing.get_context(METHOD))
    if METHOD == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    threads = max(1, torch.get_num_threads() // workers)
    told = [context.Array("c", WIDTH, lock=False) for _ in range(workers)]
    alive, held = context.Pipe(duplex=False)  # what is held here is closed when this process ends, however it does
    processes = [
        context.Process(target=_worker, args=(shared, log, threads, each, alive), daemon=True) for each in told
    ]
    try:
        for process in processes:
            process.start()
        _watch(here, processes, told, status)
    except KeyboardInterrupt:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process in processes:
            process.join(10)
            process.terminate()
        held.close()
    if here.open():
        codes = ", ".join(str(process.exitcode) for process in processes)
        raise RunError(
            f"{here.directory}: the workers ended before their work did, with exit status {codes}; see {log('*')}"
        )


def _watch(here: Shared, processes: Sequence[Any], told: Sequence[Any], status: Callable[[str], str]) -> None:
    """Show how far the work is, and each worker, until the last one ends."""
    with Display(here, len(processes)) as display:
        alive = True
        while alive:
            alive = any(process.is_alive() for process in processes)
            pairs = zip(told, processes, strict=True)
            names = [each.value.decode() for each, process in pairs if process.is_alive()]
            display.show([f"{name}: {status(name)}" for name in names if name])
            time.sleep(0.3)


class Display:
    """How far a shared work is, and what is on its way: bars of a terminal, or in a file a line for each that ends.

    Args:
        work: that is done.
        lines: how many of its parts are shown at most, while they are on their way.
    """

    def __init__(self, work: Shared, lines: int):
        self._work, self._lines, self._last = work, lines, ""
        self._bars: list[tqdm] = []

    def __enter__(self) -> "Display":
        if sys.stderr.isatty():
            bar = tqdm(total=len(self._work.names), bar_format="{desc} {n_fmt}/{total_fmt}|{bar}| {elapsed}{postfix}")
            bar.set_description_str("runs")
            self._bars = [bar, *(tqdm(bar_format="{desc}", position=1 + i) for i in range(self._lines))]
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars:
            bar.close()

    def show(self, running: Sequence[str]) -> None:
        """Show it as it is now; ``running`` is a line on each part that is on its way."""
        total, failed = len(self._work.names), len(self._work.failures())
        done = total - len(self._work.open()) - failed
        if self._bars:
            whole, *lines = self._bars
            whole.n = done
            whole.set_postfix({"failed": failed}, refresh=True)
            for i, line in enumerate(lines):
                line.set_description_str(f"  {running[i]}" if i < len(running) else "  idle", refresh=True)
        told = f"{done} of {total} are done" + (f", {failed} failed" if failed else "")
        if not self._bars and told != self._last:
            print(told, file=sys.stderr, flush=True)
        self._last = told


def _worker(shared: Callable[[], Shared], log: Callable[[str], Path], threads: int, told: Any, alive: Any) -> None:
    """The life of a worker: it ends with its parent."""
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    torch.set_num_threads(threads)

    def tell(name: str) -> None:
        told.value = name.encode()[: WIDTH - 1]
        with contextlib.suppress(OSError):  # it is written to the terminal then
            _write_to(log(name))

    with contextlib.suppress(KeyboardInterrupt):
        shared().work(tell)
    told.value = b""


def _write_to(path: Path) -> None:
    """Let all that this process prints, and what its libraries do, go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open_own(path) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Context: all that this process prints, and what its libraries do, goes to the end of a file.

    Raises:
        OSError: if there cannot be one.
    """
    before = {number: os.dup(number) for number in (1, 2)}
    try:
        _write_to(path)
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        for number, kept in before.items():
            os.dup2(kept, number)
            os.close(kept)


def _end_with_parent(alive: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os.kill(os.getpid(), signal.SIGINT)
