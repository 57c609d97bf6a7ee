"""An estimate on a Ray cluster: nodes compute its parts, which come home to the files of the estimate.

Every node runs the same estimator. An actor hands out the parts of its stages, takes in what nodes compute, and gives
them what others did; the process that asked writes all of it to its files and computes nothing itself. What a node had
in hand when it died is handed out again.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load, save

from pyro_vae.errors import ContractError, RunError, reason_of
from pyro_vae.infer.evidence.blocks import Part, Work
from pyro_vae.runs.blockwise import Files, as_told, one_thread, packed
from pyro_vae.runs.ray_cluster import (
    PATIENCE,
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

POLL = 0.05
"""Seconds between looks at what others do."""
DEATHS = 10
"""Nodes or workers that an estimate may outlive."""


@contextlib.contextmanager
def on_cluster(cluster: Cluster, files: Files, estimator: Callable[[Work], object]) -> Iterator[Work]:
    """Context: who computes the parts of an estimate: the nodes of a Ray cluster.

    Args:
        cluster: that computes.
        files: where the parts are kept.
        estimator: runs all of the estimate, on a node, for the work that it is given: it is shipped there.

    Raises:
        MissingExtra: without Ray.
        RunError: if the cluster cannot be used.
    """
    with connected(cluster) as ray:
        if not slots(ray, cluster):
            raise too_large(ray, cluster)
        nodes(ray, files.folder)
        work = _Asked(ray, cluster, files, estimator)
        try:
            yield work
        finally:
            work.close()


class _Asked:
    """The work as the process that asked for it sees it: parts come from files, or from nodes to files."""

    def __init__(self, ray: Any, cluster: Cluster, files: Files, estimator: Callable[[Work], object]):
        self.ray, self.files = ray, files
        self.board = ray.remote(_board()).options(num_cpus=0, scheduling_strategy=pinned(ray)).remote()
        self.task = spread(ray, cluster, _help)
        self.shipped = ray.put((estimator, os.getcwd(), files.device))
        self.tasks: dict[Any, int] = {}
        self.started = self.deaths = 0
        self.room = Room(ray, cluster)

    def __call__(self, stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
        have = {i: save(part) for i in range(number) if (part := self.files.read(stage, i)) is not None}
        self._get(self.board.open.remote(stage, number, have))
        asked = {i for i in range(number) if i not in have}
        for wanted in range(number):
            while wanted in asked:
                for i, content in self._get(self.board.collect.remote(stage)).items():
                    self.files.write(stage, i, load(content))
                    asked.discard(i)
                if wanted in asked:
                    self._keep_at_work(len(asked))
            part = self.files.read(stage, wanted)
            if part is None:
                raise RunError(f"{self.files.folder}: a part was lost; the same command goes on")
            yield part

    def _keep_at_work(self, parts: int) -> None:
        """As many nodes as there is room for; a while for those that are at work."""
        room = self.room.now()
        while len(self.tasks) < min(max(room, 1), max(parts, 1)):
            self.started += 1
            self.tasks[self.task.remote(self.shipped, self.board, self.started)] = self.started
        done, _ = self.ray.wait(list(self.tasks), timeout=POLL)
        for task in done:
            helper = self.tasks.pop(task)
            try:
                self.ray.get(task)
            except self.ray.exceptions.RayTaskError as error:
                self._get(self.board.part.remote("", 0))  # what went wrong, if it was a part
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise RunError(f"--ray: a node cannot run the estimator: {reason_of(cause)}") from error
            except self.ray.exceptions.RayError as error:
                self.deaths += 1
                if self.deaths > DEATHS:
                    raise RunError(f"--ray: {self.deaths} workers died of it: {reason_of(error)}") from error
                self._get(self.board.release.remote(helper))

    def _get(self, answer: Any) -> Any:
        try:
            return self.ray.get(answer, timeout=PATIENCE)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ContractError | RunError) else None
            raise (cause or RunError(f"--ray: {reason_of(error)}")) from error
        except self.ray.exceptions.RayError as error:
            raise RunError(f"--ray: the cluster is lost ({reason_of(error)}); the same command goes on") from error

    def close(self) -> None:
        """Let go of the nodes."""
        cancel(self.ray, self.tasks)
        self.ray.kill(self.board)


def _board() -> type:
    """The class of the actor; made here, Ray ships it by value."""

    class Board:
        """Parts by stage: those that nobody has begun, those in somebody's hand, and those that are finished."""

        def __init__(self):
            self.free, self.hands, self.parts, self.fresh, self.failure = {}, {}, {}, {}, None

        def open(self, stage, number, have):
            self.parts[stage], self.fresh[stage] = dict(have), {}
            self.free[stage] = [i for i in reversed(range(number)) if i not in have]

        def part(self, stage, number):
            if self.failure:
                raise self.failure
            return self.parts.get(stage, {}).get(number)

        def take(self, stage, helper):
            if not self.free.get(stage):
                return None
            number = self.free[stage].pop()
            self.hands[stage, number] = helper
            return number

        def give(self, stage, number, content):
            self.hands.pop((stage, number), None)
            if number not in self.parts[stage]:
                self.parts[stage][number] = self.fresh[stage][number] = content

        def release(self, helper):
            for (stage, number), owner in list(self.hands.items()):
                if owner == helper:
                    del self.hands[stage, number]
                    self.free[stage].append(number)

        def fail(self, error):
            self.failure = error

        def collect(self, stage):
            if self.failure:
                raise self.failure
            fresh, self.fresh[stage] = self.fresh[stage], {}
            return fresh

    return Board


def _help(shipped: tuple[Callable[[Work], object], str, torch.device], board: Any, helper: int) -> None:
    """Run the estimator on a node, for what parts the board hands out."""
    ray: Any = sys.modules["ray"]
    estimator, cwd, device = shipped
    with contextlib.suppress(OSError):
        os.chdir(cwd)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())

    def work(stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
        for wanted in range(number):
            while (content := ray.get(board.part.remote(stage, wanted))) is None:
                if (mine := ray.get(board.take.remote(stage, helper))) is None:
                    time.sleep(POLL)
                else:
                    try:
                        part = packed(do(mine))
                    except Exception as error:
                        ray.get(board.fail.remote(as_told(error)))
                        raise
                    ray.get(board.give.remote(stage, mine, part))
            yield {name: each.to(device) for name, each in load(content).items()}

    with one_thread(device):
        estimator(work)
