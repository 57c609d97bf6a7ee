"""A second process with the same run, which computes what takes seconds while the first one answers at once.

Pyro's handlers are global to a process, so that two threads cannot ask its programs at the same time.
"""

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.errors import RunError
from pyro_vae.runs.exploring.explorer import Datum, Estimate, Explorer
from pyro_vae.runs.loading import load


class Aside:
    """The run in ``path``, in a process of its own, which ends when this one does."""

    def __init__(self, path: Path, trust: bool, seed: int):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._asking = threading.Lock()
        self._last: tuple[Datum, Estimate] | None = None
        self._process = context.Process(target=_serve, args=(path, trust, seed, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def annealed(self, datum: Datum) -> Estimate:
        """:meth:`Explorer.score` by annealed importance sampling.

        Raises:
            RunError: if it cannot be scored, or the process is no more.
        """
        with self._asking:
            if self._last is not None and self._last[0] is datum:
                return self._last[1]
            try:
                self._ours.send(datum if not isinstance(datum.x, Tensor) else datum._replace(x=datum.x.numpy()))
                found: Any = self._ours.recv()
            except (OSError, EOFError) as error:
                raise RunError("the process that anneals has ended: start pyro-vae explore again") from error
            if isinstance(found, str):
                raise RunError(found)
            self._last = datum, found
            return found

    def close(self) -> None:
        """End the process, at once if it is at work."""
        self._ours.close()
        self._process.join(1)
        self._process.terminate()
        self._process.join()


def _serve(path: Path, trust: bool, seed: int, pipe: Connection) -> None:
    """Score what comes, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would be shared by processes, and outlive one that is ended
    explorer = Explorer(load(path, trust), seed)
    with contextlib.suppress(EOFError, OSError):
        while True:
            datum = pipe.recv()
            try:
                found: Any = explorer.score(datum, "annealed")
            except Exception as error:  # whatever a stranger's model may raise: it goes on with the next datum
                found = " ".join(str(error).split()) or type(error).__name__
            pipe.send(found)
