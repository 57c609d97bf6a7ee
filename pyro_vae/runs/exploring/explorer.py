"""What a finished run makes of one datum: the numbers and pictures of a page, without any page."""

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyro_vae.data.datasets import Column, Data
from pyro_vae.data.files import read_new
from pyro_vae.data.incoming import conditions, restored
from pyro_vae.errors import DataError, RunError
from pyro_vae.infer.diagnostics import active_units
from pyro_vae.infer.programs import evaluating, particle_trace, posterior_samples, site_of
from pyro_vae.infer.supports import innermost
from pyro_vae.infer.trees import data_size, first_tensor, select, tensors
from pyro_vae.runs import figures
from pyro_vae.runs.loading import Run
from pyro_vae.runs.reporting.drawing import pixel_by_pixel
from pyro_vae.runs.scoring import unit_of
from pyro_vae.runs.using import Filled, Using

SAMPLES = 500
"""Draws of z behind a first estimate of log p(x), and behind an imputation: as many as answer at once."""
DRAWS = 100
"""Draws of what was not seen."""
FIRST = 500
"""Test data by which active units, and how far they go, are told."""
MOST_UNITS = 24
"""Units that are moved, those that vary most."""
FEWEST = 20
"""Data whose annealed log p(x) says where another one stands among them."""

Latents = dict[str, Tensor]
"""Latents of some data by site, ``(N, *event_shape)``."""


class Datum(NamedTuple):
    """One datum.

    Attributes:
        x: of the form that :class:`Using` takes: a tensor ``(1, *shape)`` of observations, or a DataFrame of one row;
            what was not seen is NaN.
        given: the condition, values by name; None of a model without.
        told: what was done to its values, in lines.
    """

    x: Any
    given: dict[str, Any] | None = None
    told: tuple[str, ...] = ()


class Unit(NamedTuple):
    """A dimension of a latent site that varies with the data, and between which values it does."""

    site: str
    place: int
    low: float
    high: float
    discrete: bool = False


class Looked(NamedTuple):
    """What the model makes of a datum: E[x | z] at the posterior mean in the form of the datum, and q(z | x).

    Attributes:
        made: the reconstruction.
        loc, scale: means and standard deviations of q(z | x) by site, ``(1, *event_shape)``.
    """

    made: Any
    loc: Latents
    scale: Latents


class Estimate(NamedTuple):
    """log p(x) of a datum, in nats, and its place among the test data.

    Attributes:
        log_px, mc_se: with its Monte Carlo error.
        reliable: whether both are to be believed; None if that is not known.
        below: the share of the test data whose log p(x) is lower, by the same estimator if there are enough of them;
            None where some of the datum was not seen, or nothing is finite.
        among: by which estimator the test data were scored.
        number: of how many test data.
    """

    log_px: float
    mc_se: float
    reliable: bool | None
    below: float | None
    among: str
    number: int


class Explorer:
    """A finished run of images or of a table, asked about one datum at a time.

    Every answer is that of the function of :class:`Using` or of :mod:`pyro_vae.runs.figures` by the same name, with the
    random numbers of ``seed``: asked again, it is the same. One thread may ask at a time.

    Args:
        run: of images of one or three channels, or of a table.
        seed: at least 0.

    Raises:
        RunError: if it is of something else, or draws pixel by pixel.
    """

    def __init__(self, run: Run, seed: int = 0):
        self.run, self.seed, self.schema = run, seed, run.schema
        self.using = Using(run.using.vae, run.schema, told=lambda line: None)
        shape = self.schema.shape
        if not self.schema.columns and (len(shape) != 3 or shape[0] not in (1, 3)):
            kind = f"{self.schema.noun}s of shape {shape}" if len(shape) == 3 else f"{self.schema.noun}s"
            raise RunError(
                f"{run.path} is a run of {kind}: explore shows images of 1 or 3 channels and tables, "
                f"pyro-vae report {run.path} shows others"
            )
        self.unit = unit_of(run.model, self.schema)

    @cached_property
    def data(self) -> Data:
        """The data of the run.

        Raises:
            RunError: if they cannot be had, or the model draws them pixel by pixel.
        """
        data = self.run.data
        if pixel_by_pixel(self.using.vae, data):
            raise RunError(
                f"{self.run.path} draws pixel by pixel, which takes too long for a page: see its samples.png"
            )
        return data

    @property
    def is_image(self) -> bool:
        return not self.schema.columns

    @property
    def num_test(self) -> int:
        return data_size(self.data.test)

    def test_datum(self, place: float | None) -> Datum:
        """A datum of the test set, from 0.

        Raises:
            RunError: if there are not so many, or the number is not whole.
        """
        if place is None or not 0 <= place < self.num_test or place != int(place):
            told = "no such number" if place is None else f"no {place:.12g}"
            raise RunError(f"there are {self.num_test:,} test {self.schema.noun}s, from 0: there is {told}")
        place = int(place)
        data = select(self.data.test, slice(place, place + 1))
        return self._first(tensors(data)[0], data)

    def read(self, raw: Any, given: dict[str, Any] | None = None) -> Datum:
        """A datum of one's own, as the run's data are encoded; see :func:`pyro_vae.data.incoming.observations`.

        Raises:
            RunError: in one line, if it is none.
        """
        told: list[str] = []
        using = Using(self.using.vae, self.schema, told.append)
        x = using.observed_of(using.data(raw, given))
        if len(x) != 1:
            raise RunError(f"one {self.schema.noun} at a time, there are {len(x):,}")
        return Datum(restored(x, self.schema), given, tuple(told))

    def read_file(self, path: Path, given: dict[str, Any] | None = None) -> Datum:
        """The first datum of a file, as ``pyro-vae score`` reads it; a condition that the file has counts, not this.

        Raises:
            RunError: as :meth:`read`, and if it cannot be read.
        """
        try:
            new = read_new(path, self.schema)
        except DataError as error:
            raise RunError(str(error).replace(str(path), path.name)) from error
        told: list[str] = []
        using = Using(self.using.vae, self.schema, told.append)
        data = using.data(new.x, given if new.given is None else new.given)
        return self._first(using.observed_of(data), data, tuple(told))

    def read_cells(self, cells: Any, unseen: Any, given: dict[str, Any] | None = None) -> Datum:
        """A drawing: brightness 0 to 255 of each channel and pixel, ``C H W`` of them, and which pixels were not seen,
        ``H W``. Brightness is brought to the range of the run's pixels, then encoded as these are.

        Raises:
            RunError: if it is something else.
        """
        shape = self.schema.shape
        try:
            bright = np.asarray(cells, np.float64).reshape(shape)
            gaps = np.asarray(unseen, bool).reshape(shape[1:])
        except (TypeError, ValueError) as error:
            raise RunError(f"a drawing has one brightness for each of {shape} pixels") from error
        largest = self.schema.pixels.max_value if self.schema.pixels is not None else 1
        pixels = bright / 255 * largest
        pixels = pixels.round() if largest > 1 else pixels
        whole = largest > 1 and not gaps.any()
        return self.read((pixels.astype(np.int64) if whole else np.where(gaps, np.nan, pixels))[None], given)

    def cells(self, datum: Datum) -> tuple[list[int], list[int]]:
        """An image as a drawing, the other way round."""
        x = datum.x[0]
        bright = (255 * x.nan_to_num(0.0) / self._largest).round().clamp(0, 255)
        return bright.int().flatten().tolist(), x[0].isnan().int().flatten().tolist()

    def look(self, datum: Datum) -> Looked:
        """Its reconstruction and its posterior, of which a mean or deviation without a formula is that of draws."""
        made = self.using.reconstruct(datum.x, datum.given)
        loc = _by_site(self.using.encode(datum.x, None, datum.given), self._sites)
        with self._seeded():
            scale = self._formula(datum)
            if scale is None:
                drawn = self.using.encode(datum.x, 1000, datum.given)
                scale = {name: each.std(0) for name, each in _by_site(drawn, self._sites).items()}
        return Looked(made, loc, scale)

    def score(self, datum: Datum, estimator: str = "importance", num_samples: int = SAMPLES) -> Estimate:
        """log p(x), of what was seen: by ``importance``, of so many samples and without a second opinion, or
        ``annealed``, as ``pyro-vae score`` gives it."""
        how = {"num_samples": num_samples, "num_checked": 0} if estimator == "importance" else {}
        with self._seeded():
            found = self.using.score(datum.x, estimator, datum.given, **how)
        value, error = found.log_px.item(), found.mc_se.item()
        good = None if found.reliable is None else bool(found.reliable.item())
        among, known = self.scores(estimator)
        whole = not bool(self.gaps(datum).any())
        below = float((known < value).mean()) if whole and math.isfinite(value) and len(known) else None
        return Estimate(value, error, good, below, among, len(known))

    def scores(self, estimator: str) -> tuple[str, np.ndarray]:
        """log p(x) of test data that is finite, as the run scored them, and by which estimator."""
        known = self.run.annealed if estimator == "annealed" else None
        if known is not None and known.sizes["datum"] >= FEWEST:
            values = known["log_px"].values
        else:
            estimator, values = "importance", self.run.importance["log_px"].values
        return estimator, values[np.isfinite(values)]

    @cached_property
    def units(self) -> list[Unit]:
        """The active units of sites that are vectors, those that vary most with the test data first."""
        some = select(self.data.test, slice(FIRST))
        with self._seeded(), torch.no_grad():
            active = active_units(self.using.vae.guide, some) if data_size(some) > 1 else {}
            drawn = posterior_samples(self.using.vae.guide, some, 1)
            trace = particle_trace(self.using.vae.guide, select(some, slice(1)), 1)
        found = []
        for name, each in active.items():
            support = site_of(trace, name)["fn"].support
            inner = innermost(support)
            if each.dim() != 1 or inner.event_dim:  # one entry of a simplex cannot be moved alone
                continue
            values = drawn[name][0]
            for place in each.nonzero().flatten().tolist():
                low, high = (round(bound.item(), 2) for bound in values[:, place].aminmax())
                spread = values[:, place].var().item()
                found.append((spread, Unit(name, place, low, max(high, low + 0.01), bool(inner.is_discrete))))
        return [unit for _, unit in sorted(found, key=lambda pair: -pair[0])]

    def moved(self, start: Latents, values: dict[Unit, float]) -> Latents:
        """The same latents with other values of some units."""
        moved = {name: each.clone() for name, each in start.items()}
        for unit, value in values.items():
            moved[unit.site][:, unit.place] = value
        return moved

    def decode(self, latents: Latents, given: dict[str, Any] | None = None) -> Any:
        """E[x | z], in the form of a datum; rows ``(N, *shape)``."""
        with self._seeded():
            return self.using.decode(latents if len(latents) > 1 else next(iter(latents.values())), given)

    def walk(self, start: Datum, end: Datum, num_steps: int = 9) -> Any:
        """E[x | z] on the straight line between two posterior means; a condition is that of the start."""
        first, last = (_by_site(self.using.encode(each.x, None, each.given), self._sites) for each in (start, end))
        share = torch.linspace(0, 1, num_steps)
        line = {name: torch.stack([torch.lerp(z[0], last[name][0], t) for t in share]) for name, z in first.items()}
        return self.decode(line, start.given)

    def sample(self, number: int, given: dict[str, Any] | None = None, seed: int | None = None) -> Any:
        """What the model makes of draws of p(z): E[x | z] of images ``(number, *shape)``, draws of rows."""
        with self._seeded(seed):
            if not self.is_image:
                return self.using.sample(number, given)
            like = first_tensor(self.data.test)
            c = conditions(given, number, self.schema)
            c = None if c is None else c.to(like)
            made = figures.decode(self.using.vae.model, number, like, condition=c)
        return made.reshape(number, *self.schema.shape)

    def gaps(self, datum: Datum) -> Tensor:
        """Which entries were not seen, ``(1, X)``."""
        return self.using.observed_of(self.using.data(datum.x, datum.given)).isnan()

    def impute(self, datum: Datum) -> Filled:
        """Values for what was not seen, as ``pyro-vae impute --num_samples 500`` gives them, but no second opinion.

        Raises:
            RunError: if all or nothing was seen.
        """
        with self._seeded():
            return self.using.impute(datum.x, datum.given, num_samples=SAMPLES, num_draws=DRAWS, num_checked=0)

    def png(self, x: Tensor, scale: int = 1) -> str:
        """One image ``shape``, observations or their means, as it is stored, as base64 of PNG; not seen is grey."""
        pixels = (x.detach().float() / self._largest).nan_to_num(0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        pixels = (255 * pixels).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
        buffer = BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    def _first(self, x: Tensor, data: Any, told: tuple[str, ...] = ()) -> Datum:
        """The first of observations ``(N, X)``, with its condition in what programs are called with."""
        condition = self.schema.condition
        return Datum(
            restored(x[:1], self.schema), given_of(condition, tensors(data)[1][0]) if condition else None, told
        )

    @property
    def _largest(self) -> int:
        """Of an observation."""
        levels = self.schema.pixels
        return levels.max_value if levels is not None and levels.binarization == "integers" else 1

    @cached_property
    def _sites(self) -> list[str]:
        """Of the guide."""
        with torch.random.fork_rng([]), evaluating(self.using.vae.guide), torch.no_grad():
            return list(posterior_samples(self.using.vae.guide, select(self.data.test, slice(1)), 1))

    def _formula(self, datum: Datum) -> Latents | None:
        """Standard deviations, where each has a formula and depends on no draw."""
        if len(self._sites) > 1:
            return None
        with evaluating(self.using.vae.guide), torch.no_grad():
            trace = particle_trace(self.using.vae.guide, self.using.data(datum.x, datum.given), 1)
            try:
                return {name: cast(Tensor, site_of(trace, name)["fn"].stddev)[0].clone() for name in self._sites}
            except (NotImplementedError, AttributeError):  # as of flows
                return None

    @contextmanager
    def _seeded(self, seed: int | None = None) -> Iterator[None]:
        """Context: the random numbers of a seed, of which nobody outside sees any."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed if seed is None else seed)
            yield


def _by_site(found: Any, sites: list[str]) -> Latents:
    return found if isinstance(found, dict) else {sites[0]: found}


def given_of(columns: tuple[Column, ...], c: Tensor) -> dict[str, Any]:
    """A condition ``(C,)`` as values by name, as they are in the file."""
    parts = c.double().split([column.width for column in columns])
    stored = [(column, column.decode(part).item()) for column, part in zip(columns, parts, strict=True)]
    return {column.name: column.values[round(value)] if column.values else value for column, value in stored}
