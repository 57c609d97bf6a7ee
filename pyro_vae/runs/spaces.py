"""Spaces of settings: what a search chooses from, read from text, drawn by seed, and asked of Optuna."""

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from pyro_vae.errors import RunError

RANGES = ("uniform", "loguniform", "int")
"""Kinds of ranges; ``choice`` is another word for a list."""
MOST = 10_000
"""Trials of a search at most."""


class Dimension(NamedTuple):
    """What one setting may be: one of several values, or anything in a range from ``values[0]`` to ``values[1]``."""

    name: str
    kind: str
    values: tuple[Any, ...]

    def text(self, value: Any) -> str:
        """A value as the command line spells it; a choice is given by its number."""
        return spelled(self.values[value]) if self.kind == "choice" else repr(value)

    def extremes(self) -> list[str]:
        """All choices, or both ends of a range."""
        return [self.text(value) for value in (range(len(self.values)) if self.kind == "choice" else self.values)]

    def draw(self, seed: int, number: int) -> Any:
        """A value that depends on the seed, the number of the trial and the setting's name, and on nothing else."""
        numbers = np.random.default_rng([seed, number, *self.name.encode()])
        if self.kind == "choice":
            return int(numbers.integers(len(self.values)))
        low, high = self.values
        if self.kind == "int":
            return int(numbers.integers(low, high + 1))
        if self.kind == "uniform":
            return float(numbers.uniform(low, high))
        return min(max(math.exp(numbers.uniform(math.log(low), math.log(high))), low), high)

    def distribution(self, optuna: Any) -> Any:
        """The same as a distribution of Optuna."""
        if self.kind == "choice":
            return optuna.distributions.CategoricalDistribution(range(len(self.values)))
        if self.kind == "int":
            return optuna.distributions.IntDistribution(*self.values)
        return optuna.distributions.FloatDistribution(*self.values, log=self.kind == "loguniform")


def spelled(value: Any) -> str:
    """A value of a YAML list as the command line spells it."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()


def read_space(space: Mapping[str, str]) -> list[Dimension]:
    """The dimensions that texts describe, those of parts before those of their options.

    Raises:
        ValueError: naming the option.
    """
    return sorted((_dimension(name, str(text)) for name, text in space.items()), key=lambda each: each.name.count("."))


def _dimension(name: str, text: str) -> Dimension:
    option = f"--space.{name}"
    if not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", name):
        raise ValueError(f"{option}: expected the name of a setting, such as --space.lr")
    called = re.fullmatch(r"\s*([A-Za-z]+)\s*\((.*)\)\s*", text, re.DOTALL)
    kind = called[1] if called else "choice"
    if kind not in (*RANGES, "choice"):
        raise ValueError(f"{option}: expected a list, or one of {', '.join(RANGES)}, choice, got '{kind}(...)'")
    try:
        values = yaml.safe_load(f"[{called[2]}]" if called else text)
    except yaml.YAMLError as error:
        raise ValueError(f"{option}: {' '.join(str(error).split())}") from error
    if not isinstance(values, list):
        raise ValueError(
            f"{option}: expected a list such as '[1e-3, 1e-2]', or uniform(low, high), loguniform(low, high) or "
            f"int(low, high), got '{text}'"
        )
    if kind == "choice":
        texts = [spelled(value) for value in values]
        if not texts or "" in texts:
            raise ValueError(f"{option}: the list is empty, or a value in it is")
        if len(set(texts)) < len(texts):
            raise ValueError(f"{option}: a value is listed twice in {text}")
        return Dimension(name, kind, tuple(values))
    return Dimension(name, kind, _range(option, kind, values))


def _range(option: str, kind: str, values: Sequence[Any]) -> tuple[Any, Any]:
    """Both ends of a range, checked."""
    try:
        low, high = (float(value) for value in values if not isinstance(value, bool))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {kind} takes two numbers, got {list(values)}") from error
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{option}: {kind}({low:g}, {high:g}) must go from a lower to a higher finite number")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{option}: loguniform needs positive numbers, got {low:g}")
    if kind != "int":
        return low, high
    if not (low.is_integer() and high.is_integer() and max(-low, high) < 2**53):
        raise ValueError(f"{option}: int takes whole numbers below 2^53, got {list(values)}")
    return int(low), int(high)


def grid(dimensions: Sequence[Dimension]) -> list[dict[str, str]]:
    """All combinations, the last dimension first.

    Raises:
        ValueError: naming an option that is a range, or if there are too many.
    """
    for each in dimensions:
        if each.kind != "choice":
            raise ValueError(f"--space.{each.name}: a grid needs a list of values, not {each.kind}; or --search random")
    if (size := math.prod(len(each.values) for each in dimensions)) > MOST:
        raise ValueError(f"--space: the grid has {size:,} trials, more than {MOST:,}; --search random draws some")
    names = [each.name for each in dimensions]
    return [dict(zip(names, each, strict=True)) for each in itertools.product(*(d.extremes() for d in dimensions))]


def options(values: Mapping[str, str]) -> list[str]:
    """Settings as arguments of a command; what follows a value in its text, such as ``MLP --encoder.hidden [8]``, too.

    Raises:
        RunError: naming the option.
    """
    result = []
    for name, text in values.items():
        value, more = text, []
        if re.search(r"\s--\w", text):
            try:
                value, *more = shlex.split(text)
            except ValueError as error:
                raise RunError(f"--space.{name}: {text}: {error}") from error
        result += [f"--{name}={value}", *more]
    return result
