"""Mini-batches as they come in training: what is wrong with them, or with a step that met a NaN."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import ContractError, NonFiniteError, is_of_no_number
from pyro_vae.infer.checks import check_data
from pyro_vae.infer.programs import (
    Program,
    modules_of,
    non_finite,
    sample_sites,
    scoring,
    site_of,
    traces,
)
from pyro_vae.infer.supports import innermost, without_mask
from pyro_vae.infer.tracing import put_back
from pyro_vae.infer.trees import Data, call, data_size, first_tensor, named_tensors, split, tensors

ADVICE = "a smaller lr may help"


class Watch:
    """Mini-batches of programs that :func:`check_program` has passed, looked at as they come, at little cost.

    Where every site observes a tensor of the data as it is, and its support is one for all data and parameters, the
    programs are not run for that; else they are, for each batch. On a GPU nobody waits for a look at once.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        data: that have been checked.
    """

    MOST_WAITING = 64

    def __init__(self, model: Program, guide: Program, data: Data):
        self._programs = model, guide
        self._waiting: list[tuple[str, Data, Tensor]] = []
        devices = [first_tensor(data).device] if first_tensor(data).is_cuda else []
        with torch.random.fork_rng(devices), scoring(model, guide):
            trace = traces(model, guide, data, 1).model
        sites = [site_of(trace, name) for name in sample_sites(trace)]
        self._known = _observed_as_they_are([site for site in sites if site["is_observed"]], tensors(data))

    def look(self, data: Data, name: str) -> None:
        """The next mini-batch, and what it is called.

        Raises:
            ContractError: as :func:`check_program`, of this mini-batch or, on a GPU, of one before.
        """
        doubtful = torch.ones((), dtype=torch.bool)
        if self._known is not None:
            leaves = tensors(data)
            # a sum is finite only if all of it is, and takes a tenth of the time
            good = [leaf.sum().isfinite() for leaf in leaves] + [_all_in(leaves[i], where) for i, where in self._known]
            doubtful = ~torch.stack(good).all()
        self._waiting.append((name, data, doubtful))
        if not doubtful.is_cuda or len(self._waiting) >= self.MOST_WAITING:
            self.finish()

    def finish(self) -> None:
        """Look at what has not been waited for.

        Raises:
            ContractError: as ``look``.
        """
        waiting, self._waiting = self._waiting, []
        for name, data, doubtful in waiting:
            if doubtful:
                try:
                    check_data(*self._programs, data, neighbours=False)
                except ContractError as error:
                    raise ContractError(f"{name}: {error}") from error

    def step(self, step: Callable[..., Any], data: Data) -> Any:
        """A step on the mini-batch looked at last; where it meets a NaN, or Pyro refuses one, say at which site.

        Raises:
            ContractError: as ``look``.
            NonFiniteError: if the step meets a NaN or an infinity and data are as they should be.
        """
        try:
            value = call(step, data)
        except NonFiniteError as error:
            self.finish()
            raise explained(self._programs, data, str(error)) from error
        except (ValueError, RuntimeError) as error:
            self.finish()
            if "more than 1 value per channel" in str(error):
                raise ContractError(
                    "a mini-batch has one datum alone, on which batch normalization cannot be trained: choose another "
                    "batch size"
                ) from error
            if not is_refusal(error, self._programs, data):
                raise
            raise explained(self._programs, data, "Pyro refuses a value") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise explained(self._programs, data, f"the training loss is {value}")
        return value


def _observed_as_they_are(
    sites: list[dict[str, Any]], leaves: list[Tensor]
) -> list[tuple[int, constraints.Constraint]] | None:
    """For each observed site the place of its tensor and the support; None if other data may have other supports."""
    known = []
    for site in sites:
        place = next((i for i, leaf in enumerate(leaves) if leaf is site["value"]), None)
        masked = site["mask"] is not None or without_mask(site["fn"]) is not site["fn"]
        if place is None or masked or not _is_fixed(site["fn"].support):
            return None
        known.append((place, site["fn"].support))
    return known


def _all_in(value: Tensor, support: constraints.Constraint) -> Tensor:
    """Whether all of a finite value is in a support, shape ``()``; ``support.check`` takes ten times as long."""
    base: Any = innermost(support)
    if base is constraints.real:
        return torch.ones((), dtype=torch.bool, device=value.device)
    if base is constraints.boolean and value.is_floating_point():
        return (value * value).ne_(value).sum() == 0
    if base.is_discrete and hasattr(base, "lower_bound") and value.is_floating_point():
        low, high = value.aminmax()
        inside = (low >= base.lower_bound) & (high <= getattr(base, "upper_bound", math.inf))
        return inside & (value.floor().ne_(value).sum() == 0)
    return support.check(value).all()


def _is_fixed(constraint: Any) -> bool:
    """Whether a support is described by plain numbers alone, not by parameters or data."""
    parts = list(vars(constraint).values())
    while parts:
        part = parts.pop()
        if isinstance(part, constraints.Constraint):
            parts += vars(part).values()
        elif isinstance(part, list | tuple):
            parts += part
        elif not isinstance(part, bool | int | float | str | None):
            return False
    return True


def explained(programs: tuple[Program, Program], data: Data, what: str) -> NonFiniteError:
    """The error of a training that met a NaN or an infinity, which says where it is, as far as a look can tell."""
    for path, leaf in named_tensors(data):
        if leaf.isinf().any():
            row = leaf.isinf().reshape(len(leaf), -1).any(1).nonzero()[0].item()
            return NonFiniteError(f"training stopped: row {row} of the data ({path}) is infinite")
    starts = range(0, data_size(data), 1000)
    looks = zip(starts, split(data, 1000), strict=True)
    found = next(((start, *look) for start, part in looks if (look := _non_finite_site(programs, part))), None)
    place = f"{what}, with every site finite"
    if found:
        start, site, row = found
        place = f"the {site} is NaN or infinite" + (f" in row {start + row}" if row is not None else "")
    return NonFiniteError(f"training stopped: {place}; {ADVICE}")


def is_refusal(error: Exception, programs: tuple[Program, Program], data: Data) -> bool:
    """Whether a program failed because a number is none: Pyro refuses such parameters, and torch such draws."""
    if isinstance(error, RuntimeError):
        return is_of_no_number(error)
    return _non_finite_site(programs, data) is not None


def _non_finite_site(programs: tuple[Program, Program], data: Data) -> tuple[str, int | None] | None:
    """:func:`find_non_finite` in the mode of training, which changes no running mean."""
    with _buffers_kept(programs):
        try:
            return non_finite(*programs, data)
        except RuntimeError as error:
            if not is_refusal(error, programs, data):
                raise
            return "scale or probability of a distribution", None


@contextmanager
def _buffers_kept(programs: tuple[Program, Program]) -> Iterator[None]:
    buffers = [buffer for module in modules_of(*programs) for buffer in module.buffers(recurse=False)]
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        put_back(kept)
