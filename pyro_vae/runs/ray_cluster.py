"""A Ray cluster: how it is reached, what its nodes are, and how much work they have room for."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vae.errors import RunError, need_extra, reason_of
from pyro_vae.runs.directory import writing
from pyro_vae.runs.workers import CLAIMS

PATIENCE = 60
"""Seconds that a cluster has to find a node that is large enough."""
ANSWER = 30
"""Seconds that a cluster has to answer."""


@dataclass(frozen=True)
class Cluster:
    """Which Ray cluster works, and what each part of a work takes of it.

    Args:
        address: True: one on this machine, started for the work and stopped after it; or that of a cluster that runs:
            auto, host:port or ray://host:port.
        cpus: of a node, at least 1: as many threads.
        gpus: of a node; may be a fraction.
    """

    address: bool | str = True
    cpus: int = 1
    gpus: float = 0

    def resources(self) -> dict[str, float]:
        """What a part takes, by Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Context: the module ``ray``, connected; a connection that was there before is used, and left as it is.

    Raises:
        MissingExtra: without Ray.
        RunError: if the cluster cannot be reached, or has no node with what a part takes.
    """
    need_extra("ray", ["ray"])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield sys.modules["ray"]
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address is True:
        quiet |= {"include_dashboard": False, "address": "local"}  # whatever else runs here, or did
    else:
        quiet["address"] = _reachable(str(cluster.address))
    import ray  # pyright: ignore[reportMissingImports]

    try:
        ray.init(**quiet)
    except Exception as error:  # of many kinds
        raise RunError(f"--ray: Ray does not start: {reason_of(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reachable(address: str) -> str:
    """The address, if a cluster answers there: Ray itself tries for minutes, and may end the process that asks."""
    remedy = "start one with 'ray start --head', or leave the address out: --ray alone starts Ray on this machine"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not (colon and host and port.isdigit()):
            raise RunError(f"--ray: expected auto, host:port or ray://host:port, got '{address}'")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise RunError(f"--ray: nothing answers at {address} ({reason_of(error)}); {remedy}") from error
    ask = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='error')"
    try:
        asked = subprocess.run([sys.executable, "-c", ask, address], capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"--ray: no Ray cluster answers at {address} within {ANSWER} seconds; {remedy}") from error
    if "InvalidAuthToken" in asked.stderr:
        raise RunError(
            f"--ray: the Ray cluster at {address} asks for another authentication token than this process has: give it "
            "that of the cluster, see 'token authentication' in Ray's documentation"
        )
    if asked.returncode:
        *_, last = asked.stderr.strip().splitlines() or [f"status {asked.returncode}"]
        raise RunError(f"--ray: no Ray cluster can be used at {address} ({last.strip()}); {remedy}")
    return address


def _looker() -> Callable[[str, str, str], dict[str, Any]]:
    """A function that says what a node is; made here, Ray ships it by value, to nodes without this library too."""

    def look(where: str, mark: str, home: str) -> dict[str, Any]:
        import hashlib
        import importlib
        import pathlib
        import platform
        import socket
        import sys

        if where not in sys.path and pathlib.Path(where).is_dir():
            sys.path.insert(0, where)
        found: dict[str, Any] = {"node": socket.gethostname(), "python": platform.python_version()}
        for name in ("torch", "pyro", "pyro_vae"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                found[name] = None
                continue
            found[name] = module.__version__
            if name == "pyro_vae":
                root, digest = pathlib.Path(str(module.__file__)).parent, hashlib.sha256()
                for path in sorted(root.rglob("*.py")):
                    digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
                found["source files of pyro_vae"] = digest.hexdigest()[:12]
        try:
            found["sees"] = pathlib.Path(home).read_text() == mark
        except (OSError, UnicodeDecodeError):
            found["sees"] = False
        return found

    return look


def nodes(ray: Any, home: Path) -> list[dict[str, Any]]:
    """What each living node is, and whether it ``sees`` the directory ``home``.

    Raises:
        RunError: if one runs other versions than this process, or does not answer.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

    mark, path = uuid.uuid4().hex, home / CLAIMS / f"ray-{uuid.uuid4().hex}"
    look, given = _looker(), (os.getcwd(), mark, str(path.absolute()))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(mark)
    try:
        asked = []
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append(ray.remote(look).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(*given))
        answered, silent = ray.wait(asked, num_returns=len(asked), timeout=2 * PATIENCE)
        if silent:
            raise RunError(f"--ray: {len(silent)} of {len(asked)} nodes do not answer; see 'ray status' there")
        found = []
        for answer in answered:
            with contextlib.suppress(ray.exceptions.WorkerCrashedError, ray.exceptions.TaskUnschedulableError):
                found.append(ray.get(answer))  # but for nodes that died in the meantime
        here = look(*given)
    except ray.exceptions.RayError as error:
        raise RunError(f"--ray: a node cannot be asked what it is: {reason_of(error)}") from error
    finally:
        path.unlink(missing_ok=True)
    for there in found:
        check_same(there, here)
    return found


def pinned(ray: Any) -> Any:
    """Where an actor must be that this process cannot do without: on its own node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def check_same(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a node that runs other code than this process.

    Raises:
        RunError: naming the node, and what is other there.
    """
    for name in here:
        if name not in ("node", "sees") and there.get(name) != here[name]:
            raise RunError(
                f"--ray: the node {there['node']} has {name} {there.get(name) or 'none'}, this process has "
                f"{here[name]}: install the same there"
            )


def slots(ray: Any, cluster: Cluster) -> int:
    """How many parts the living nodes can do at a time."""
    wanted = cluster.resources().items()
    rooms = ([node["Resources"].get(name, 0) / each for name, each in wanted] for node in ray.nodes() if node["Alive"])
    return sum(int(min(room)) for room in rooms)


class Room:
    """How many parts a cluster can do at a time, which may change while it is at work."""

    def __init__(self, ray: Any, cluster: Cluster):
        self._ray, self._cluster, self._last = ray, cluster, time.monotonic()

    def now(self) -> int:
        """How many, at the moment.

        Raises:
            RunError: if there was room for none for as long as a cluster has to find a node.
        """
        room = slots(self._ray, self._cluster)
        self._last = time.monotonic() if room else self._last
        if time.monotonic() - self._last > PATIENCE:
            raise too_large(self._ray, self._cluster)
        return room


def spread(ray: Any, cluster: Cluster, function: Callable[..., Any]) -> Any:
    """The function as a task of a part, on any node; who asked for it begins it again if a node dies."""
    options = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "max_retries": 0}
    return ray.remote(function).options(**options, scheduling_strategy="SPREAD")


def cancel(ray: Any, tasks: Iterable[Any]) -> None:
    """Let go of tasks that are on their way."""
    for task in tasks:
        with contextlib.suppress(Exception):
            ray.cancel(task, force=True)


def too_large(ray: Any, cluster: Cluster) -> RunError:
    largest = {
        name: max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        for name in cluster.resources()
    }
    has = " and ".join(f"{size:g} {name}s" for name, size in largest.items())
    asked = f"--cpus_per_run {cluster.cpus}" + (f" --gpus_per_run {cluster.gpus:g}" if cluster.gpus else "")
    return RunError(f"--ray: no node of the cluster has room for {asked}: none has more than {has}; ask for less")
