"""One training in several processes, which torchrun has started: their group, their devices, what they must share."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pyro_vae.errors import ContractError, RunError
from pyro_vae.infer.parallel import Processes
from pyro_vae.runs.blockwise import code
from pyro_vae.runs.directory import choose_device

GROUP = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
"""What torchrun tells the processes that it starts."""


def is_launched() -> bool:
    """Whether torchrun, or something like it, has started this process, alone or with others."""
    return all(name in os.environ for name in GROUP)


@contextlib.contextmanager
def launched(device: str) -> Iterator[Processes]:
    """Context: the processes that torchrun has started, as a group.

    Without torchrun this process is alone, or in the group that it is in already. A request to end (SIGTERM, by which
    torchrun ends the others when one has died) is a KeyboardInterrupt inside.

    Args:
        device: as :func:`device_of` takes it.

    Raises:
        RunError: if there is no such device, or no group can be made.
    """
    if not is_launched() or dist.is_initialized():
        yield Processes()
        return
    size = int(os.environ["WORLD_SIZE"])
    mine = device_of(device, size)
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if ours else None
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the {size} processes of torchrun do not meet: {' '.join(str(error).split())[:200]}") from error
    try:
        yield Processes()
    finally:
        leave()
        if ours:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def leave() -> None:
    """Leave the group of processes that train together, if this one is in any."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt what is put in order after the first
    raise KeyboardInterrupt


def device_of(name: str, size: int) -> torch.device:
    """The device of this process, of so many: each has the CUDA device of its number on its machine.

    Args:
        name: as :func:`choose_device` takes it.
        size: how many processes train together.

    Raises:
        RunError: if there is none.
    """
    device = choose_device(name, scores=False)
    if size == 1 or device.type == "cpu":
        return device
    if device.type == "mps" or device.index is not None:
        raise RunError(f"--device {name}: {size} processes need a device each: use cpu, or leave it out")
    local, count = (
        int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0)),
        torch.cuda.device_count(),
    )
    if local >= count:
        raise RunError(
            f"--device {name}: process {local} of this machine has no CUDA device, there are {count}: use "
            f"--nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def check_same(processes: Processes, settings: dict[str, Any]) -> None:
    """Refuse to train together what was told other settings, or is of other code.

    Args:
        settings: by the options that make them.

    Raises:
        RunError: in every process.
    """
    if not processes.grouped:
        return
    try:
        processes.check_same(code=code(), **settings)
    except ContractError as error:
        raise RunError(f"torchrun: {error}") from error
