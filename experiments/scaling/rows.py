"""What is measured: rows, with seconds and memory, and the exponents that are fitted to them."""

import ctypes
import gc
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pyro_vae.errors import RunError


class Row(NamedTuple):
    """One measurement.

    Attributes:
        what: was measured, such as ``importance sampling``; rows of the same ``what`` and ``by`` are a line.
        by: what grows: ``images``, ``samples``, ``latent dimensions``, ``pixels``, ``width``, or ``workers``.
        value: how much of it.
        seconds: the median of several tries.
        mebibytes: the most memory that was held beyond what was held before; None where it is not known.
        note: what else is to be said.
    """

    what: str
    by: str
    value: float
    seconds: float
    mebibytes: float | None = None
    note: str = ""


def seconds_of(command: list[str], **environment: str) -> float:
    """Seconds of a whole command, with more variables of the environment.

    Raises:
        RunError: with the last line of what it says, if it fails.
    """
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    return seconds


@dataclass(frozen=True)
class Exponent:
    """seconds = factor * value ** exponent, by least squares in the logarithm; ``error`` is the exponent's."""

    what: str
    by: str
    exponent: float
    error: float
    factor: float

    def seconds(self, value: float) -> float:
        """Seconds at a value, which may be beyond all that were measured."""
        return self.factor * value**self.exponent


def fit(what: str, by: str, values: Iterable[float], seconds: Iterable[float]) -> Exponent:
    """The exponent of a line of at least two values; with two its error is not known, and NaN.

    Raises:
        ValueError: if there are fewer.
    """
    x, y = np.log(list(values)), np.log(list(seconds))
    if len(set(x)) < 2:
        raise ValueError(f"{what} against {by}: an exponent takes at least two values")
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    start = y.mean() - slope * x.mean()
    rest = ((y - start - slope * x) ** 2).sum()
    error = math.sqrt(rest / (len(x) - 2) / spread) if len(x) > 2 else math.nan
    return Exponent(what, by, float(slope), error, float(np.exp(start)))


def exponents(rows: Iterable[Row]) -> list[Exponent]:
    """Of every line that has at least two values; workers, of whom more should take less, have their own table."""
    return [
        fit(what, by, [row.value for row in line], [row.seconds for row in line])
        for (what, by), line in lines(rows).items()
        if by != "workers" and len({row.value for row in line}) > 1
    ]


def lines(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by what was measured and what grows, in ascending order of its value."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.value):
        found.setdefault((row.what, row.by), []).append(row)
    return found


def timed(function: Callable[[], object], tries: int) -> tuple[float, float | None]:
    """Median seconds of several calls, and the most memory that one held, in MiB.

    The first call counts only if it takes so long that there are no others.
    """
    with _peak() as held:
        first = _seconds(function)
    if first > LONG:
        return first, held[0] if held else None
    with _peak() as held:
        seconds = [_seconds(function) for _ in range(tries)]
    return float(np.median(seconds)), held[0] if held else None


LONG = 10
"""Seconds of a call from which on one is enough."""


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Context: at its end the list has the most memory that this process held beyond what it had, in MiB, on Linux."""
    held: list[float] = []
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = _status("VmRSS")
    except (OSError, AttributeError):
        yield held
        return
    yield held
    held.append((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """What the kernel says of this process, in KiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
