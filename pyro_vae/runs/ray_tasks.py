"""Work on a Ray cluster: its parts are tasks there, done where they are shared or sent home whole.

Where every node sees the directory of the work, a task works in it under the same claims as other processes. Otherwise
it works in a temporary directory of its node, and what it wrote is sent home, where ``result.json`` is the last file to
be moved to its place: nothing half-written is taken for done. A part whose node dies is done elsewhere.
"""

import contextlib
import io
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyro_vae.errors import RunError, reason_of
from pyro_vae.runs.directory import writing
from pyro_vae.runs.ray_cluster import (
    Cluster,
    Room,
    cancel,
    connected,
    nodes,
    pinned,
    slots,
    spread,
    too_large,
)
from pyro_vae.runs.workers import CLAIMS, Display, Shared, Taken, claim, output_to

DEATHS = 3
"""Nodes or workers that one part may outlive; what kills more of them is the part itself."""
SHOWN = 16
"""Lines of progress at most."""


def in_cluster(shared: Callable[[Path], Shared], directory: Path, cluster: Cluster) -> None:
    """Do a shared work as tasks of a Ray cluster.

    Args:
        shared: makes the work in a directory, here and on nodes: it must be picklable.
        directory: of the work, here.
        cluster: that works.

    Raises:
        MissingExtra: without Ray.
        RunError: if the cluster cannot be used; what fails of the work is a failure of ``shared``.
    """
    with connected(cluster) as ray:
        if not slots(ray, cluster):
            raise too_large(ray, cluster)
        seen = all(node["sees"] for node in nodes(ray, directory))
        dispatcher = _Dispatcher(ray, cluster, shared, directory, seen)
        try:
            dispatcher.run()
        finally:
            dispatcher.close()


class _Ticket(NamedTuple):
    """A part of the work, for a node: at home, or from what was packed."""

    name: str
    shared: Callable[[Path], Shared]
    home: Path
    cwd: str
    threads: int
    packed: bytes | None


class _Outcome(NamedTuple):
    """How a task ended; a failure that is not written at home has its reason here."""

    taken: bool = False
    reason: str = ""
    packed: bytes | None = None


class _Dispatcher:
    """Hands out the parts of a work as tasks, and takes in what they return."""

    def __init__(
        self, ray: Any, cluster: Cluster, shared: Callable[[Path], Shared], directory: Path, seen: bool
    ) -> None:
        self.ray, self.cluster, self.shared, self.home, self.seen = ray, cluster, shared, directory.absolute(), seen
        self.work = shared(self.home)
        self.board = _board(ray)
        self.task = spread(ray, cluster, _do)
        self.tasks: dict[Any, str] = {}
        self.claims: dict[str, contextlib.ExitStack] = {}
        self.deaths: Counter[str] = Counter()
        self.rests: dict[str, float] = {}
        self.room = Room(ray, cluster)

    def run(self) -> None:
        with Display(self.work, min(len(self.work.names), SHOWN, slots(self.ray, self.cluster))) as display:
            while self.work.open() or self.tasks:
                self._hand_out()
                self._take_in()
                display.show(self._running())

    def close(self) -> None:
        """Let go of what is on its way."""
        cancel(self.ray, self.tasks)
        for stack in self.claims.values():
            stack.close()
        self.tasks, self.claims = {}, {}

    def _hand_out(self) -> None:
        room = self.room.now()
        for name in self.work.open():
            if len(self.tasks) > room:  # one more than there is room for: a cluster that can grow does
                return
            if name in self.tasks.values() or self.rests.get(name, 0) > time.monotonic():
                continue
            packed = None
            if not self.seen:
                stack = contextlib.ExitStack()
                try:
                    stack.enter_context(claim(self.home, name))
                except Taken:
                    self.rests[name] = time.monotonic() + 1
                    continue
                self.claims[name] = stack
                packed = self._pack(name)
            ticket = _Ticket(name, self.shared, self.home, os.getcwd(), self.cluster.cpus, packed)
            self.tasks[self.task.remote(ticket, self.board)] = name

    def _pack(self, name: str) -> bytes:
        self.work.plan(name)
        return pack(self.home, self.work.files(name))

    def _take_in(self) -> None:
        if not self.tasks:
            time.sleep(0.3)
            return
        done, _ = self.ray.wait(list(self.tasks), timeout=0.3)
        for task in done:
            name = self.tasks.pop(task)
            try:
                self._note(name, self.ray.get(task))
            except self.ray.exceptions.RayTaskError as error:  # an error of this file, or of what a node lacks
                self.work.fail(name, reason_of(error.cause if isinstance(error.cause, Exception) else error))
            except self.ray.exceptions.RayError as error:  # the node or the worker died
                self.deaths[name] += 1
                if self.deaths[name] > DEATHS:
                    reason = reason_of(error)
                    self.work.fail(name, f"{DEATHS + 1} workers died of it, the last one: {reason}")
            finally:
                if name in self.claims:
                    self.claims.pop(name).close()

    def _note(self, name: str, outcome: _Outcome) -> None:
        if outcome.taken:
            self.rests[name] = time.monotonic() + 1
        if outcome.packed is not None:
            with writing(self.home):
                unpack(outcome.packed, self.home, name)
        if outcome.reason:
            self.work.fail(name, outcome.reason)

    def _running(self) -> list[str]:
        """A line on each task that is on its way."""
        try:
            told = self.ray.get(self.board.read.remote(), timeout=5)
        except Exception:  # progress is not worth an error
            told = {}
        return [f"{name}: {told[name]}" for name in self.tasks.values() if name in told]


def _board(ray: Any) -> Any:
    """An actor that knows how far each task is; its class is shipped by value, so that it starts at once."""

    class Board:
        def __init__(self):
            self.told = {}

        def tell(self, name, text):
            self.told[name] = text

        def read(self):
            return self.told

    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=pinned(ray)).remote()


def _do(ticket: _Ticket, board: Any) -> _Outcome:
    """One part of the work, on a node."""
    torch.set_num_threads(ticket.threads)
    with contextlib.suppress(OSError):
        os.chdir(ticket.cwd)  # relative paths of settings, if there is such a directory here
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # modules of one's own
    node, name = socket.gethostname(), ticket.name
    try:
        if ticket.packed is None:
            with _telling(board, name, node, ticket.shared(ticket.home)):
                return _Outcome(taken=not _take(ticket.shared(ticket.home), name))
        with tempfile.TemporaryDirectory(prefix="pyro_vae-") as folder:
            unpack(ticket.packed, Path(folder))
            work = ticket.shared(Path(folder))
            with _telling(board, name, node, work):
                _take(work, name)
            reason = work.failures().get(name, "")
            return _Outcome(reason=_on(node, reason) if reason else "", packed=pack(Path(folder), work.writes(name)))
    except (RunError, OSError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return _Outcome(reason=_on(node, where + reason_of(error)))


def _on(node: str, reason: str) -> str:
    full = "; free space there, or let TMPDIR of Ray's workers be on another disk" if "No space left" in reason else ""
    return f"on {node}: {reason}{full}"


def _take(work: Shared, name: str) -> bool:
    """Do a part, if nobody else is at it; what it prints is in its log."""
    with output_to(work.directory / f"{name}.log"):
        return work.take(name)


@contextlib.contextmanager
def _telling(board: Any, name: str, node: str, work: Shared) -> Iterator[None]:
    """Context: the board is told every second how far a part is."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(1):
            board.tell.remote(name, f"{work.status(name)}, on {node}")

    board.tell.remote(name, f"starts on {node}")
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def pack(directory: Path, names: Sequence[str]) -> bytes:
    """Files and folders of ``directory``, those that are there, as bytes; of links and the like, none."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            if (directory / name).exists():
                archive.add(directory / name, name, filter=lambda member: member if _plain(member) else None)
    return buffer.getvalue()


def _plain(member: tarfile.TarInfo) -> bool:
    return (member.isfile() or member.isdir()) and not member.name.endswith(".partial")


def unpack(packed: bytes, directory: Path, name: str = "all") -> None:
    """Move what was packed to its place in ``directory``, each file whole, ``result.json`` last."""
    arriving = directory / CLAIMS / f"{name}.arriving"
    shutil.rmtree(arriving, ignore_errors=True)  # of a process that was killed
    arriving.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for member in archive:
                place, content = arriving / member.name, archive.extractfile(member) if member.isfile() else None
                if content is None or not place.resolve().is_relative_to(arriving.resolve()):
                    continue  # files alone, and none outside; filters of tarfile begin with Python 3.11.4
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read())
        files = [path for path in sorted(arriving.rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "result.json"):
            place = directory / path.relative_to(arriving)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
