"""A trained model used on data of any kind: latents, draws, reconstructions, log p(x), and what was not seen."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.data.datasets import Schema
from pyro_vae.data.incoming import conditions, observations, restored
from pyro_vae.errors import ContractError, DataError, RunError, check_at_least_one
from pyro_vae.infer.checks import check_data
from pyro_vae.infer.evidence.annealed import annealed_importance_sampling
from pyro_vae.infer.evidence.bridge import bridge_sampling
from pyro_vae.infer.evidence.importance import importance_sampling
from pyro_vae.infer.evidence.imputation import Imputation, impute
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.evidence.smc import smc
from pyro_vae.infer.evidence.thermodynamic import thermodynamic_integration
from pyro_vae.infer.programs import evaluating, mean_of, particle_trace, posterior_samples, sample_sites, site_of
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import call, data_size, select, split, tensors
from pyro_vae.parts.missing import Incomplete
from pyro_vae.runs.build import as_options

ESTIMATORS: dict[str, Callable[..., Evidence]] = {
    "annealed": annealed_importance_sampling,
    "importance": importance_sampling,
    "smc": smc,
    "bridge": bridge_sampling,
    "thermodynamic": thermodynamic_integration,
}
AT_ONCE = 1000
"""Rows that a network sees at once."""
DRAWS = 1000
"""Draws of which a mean is made that has no formula."""

Latents = Tensor | dict[str, Tensor]


class Filled(NamedTuple):
    """Data with values for what was not seen.

    Attributes:
        values: of the form of the observations: a tensor ``(N, *shape)``, or a DataFrame. What was not seen is
            E[x_missing | x_seen] there, and of columns with a list of values the most frequent draw.
        imputation: draws, standard deviations and the evidence behind them, see :class:`pyro_vae.Imputation`.
    """

    values: Any
    imputation: Imputation


class Using:
    """A trained model and what it must know of its data; every number is of observations as the model's were.

    New data are what :func:`pyro_vae.data.incoming.observations` takes, and ``given`` is the condition, for a model
    that has one: a value for all, or as many as there are rows; a dict or DataFrame of them, if it has several columns.

    Args:
        vae: has the programs ``model`` and ``guide``, with one observed site; in evaluation mode.
        schema: of its data.
        told: called with a line on each thing that is done to values.
    """

    def __init__(self, vae: Any, schema: Schema, told: Callable[[str], object] = print):
        self.vae, self.schema, self.told = vae, schema, told

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(itertools.chain(self.vae.parameters(), self.vae.buffers())).device

    def data(self, x: Any, given: Any = None) -> Tree:
        """New data as what the programs are called with: ``x``, ``(x, c)`` or, where entries were not seen, one more.

        Raises:
            RunError: in one line that names row and column, if the model cannot score them.
        """
        try:
            found = observations(x, self.schema, self.told).to(self.device)
            if given is None and self.schema.condition and hasattr(x, "columns"):
                given = x
            c = conditions(given, len(found), self.schema)
        except DataError as error:
            raise RunError(str(error)) from error
        gaps = found.isnan()
        if (empty := gaps.all(1)).any():
            raise RunError(f"row {int(empty.nonzero()[0])}: all of its values are missing")
        parts = [found] if c is None else [found, c.to(found)]
        if gaps.any():
            rows = int(gaps.any(1).sum())
            which = f"{rows:,} of {len(found):,} rows have" if len(found) > 1 else "the row has"
            self.told(f"{which} missing values: what follows is given what was seen")
            if not isinstance(self._part("posterior", "network"), Incomplete):
                parts = [torch.where(gaps, 0.0, found), *parts[1:], ~gaps]
        data = parts[0] if len(parts) == 1 else tuple(parts)
        try:
            check_data(self.vae.model, self.vae.guide, data)
        except ContractError as error:
            raise RunError(as_options(error)) from error
        return data

    def encode(self, x: Any, num_samples: int | None = None, given: Any = None) -> Latents:
        """Posterior means of z, shape ``(N, D)``, or ``num_samples`` draws of q(z | x), shape ``(S, N, D)``.

        Of a model with several latent sites a dict by their names. A mean that has no formula is that of 1,000 draws.
        """
        if num_samples is not None:
            _check_number(num_samples)
        joined = self._joined(self.data(x, given), num_samples)
        return next(iter(joined.values())) if len(joined) == 1 else joined

    def _joined(self, data: Tree, num_samples: int | None) -> dict[str, Tensor]:
        with evaluating(self.vae.guide), torch.no_grad():
            parts = [self._latents(part, num_samples) for part in split(data, AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts], 0 if num_samples is None else 1) for name in parts[0]}

    def _latents(self, data: Tree, num_samples: int | None) -> dict[str, Tensor]:
        if num_samples is not None:
            return posterior_samples(self.vae.guide, data, num_samples)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            trace = particle_trace(self.vae.guide, data, 1)
            names = sample_sites(trace)
            if len(names) == 1:
                try:
                    return {names[0]: site_of(trace, names[0])["fn"].mean[0].clone()}
                except (NotImplementedError, AttributeError):  # as of flows
                    pass
            draws = [posterior_samples(self.vae.guide, data, 50) for _ in range(DRAWS // 50)]
        return {name: torch.stack([each[name].mean(0) for each in draws]).mean(0) for name in names}

    def decode(self, z: Any, given: Any = None) -> Any:
        """E[x | z] of each z, ``(N, D)``, or of a dict of all latent sites, as :meth:`encode` returns it.

        Where it has no formula, as of a PixelDecoder, it is the mean of 100 draws.

        Returns:
            A tensor ``(N, *shape)``; of a table a DataFrame, with the most probable value where there is a list.
        """
        latents = z if isinstance(z, Mapping) else {"": z}
        latents = {name: torch.as_tensor(each, device=self.device).float() for name, each in latents.items()}
        sizes = {len(each) if each.dim() else 0 for each in latents.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise RunError("z must have one row for each observation")
        data = self._like(sizes.pop(), given)
        names = self._latent_shapes(data)
        if "" in latents and len(names) == 1:
            latents = {next(iter(names)): latents[""]}
        if {name: tuple(each.shape[1:]) for name, each in latents.items()} != names:
            wanted = " and ".join(f"{name} of shape (N, {', '.join(map(str, shape))})" for name, shape in names.items())
            raise RunError(f"z must be {wanted}, got {', '.join(str(tuple(each.shape)) for each in latents.values())}")
        for each in latents.values():
            if len(wrong := (~each.flatten(1).isfinite().all(1)).nonzero()):
                raise RunError(f"z must be finite numbers, row {int(wrong[0])} has others")
        x = [self._means(site) for site in self._observed(data, latents)]
        return restored(torch.cat(x), self.schema)

    def sample(self, num_samples: int, given: Any = None) -> Any:
        """Draws of x from the model, ``(num_samples, *shape)``, or a DataFrame of a table."""
        _check_number(num_samples)
        sites = self._observed(self._like(num_samples, given), {})
        return restored(torch.cat([site["value"] for site in sites]), self.schema)

    def reconstruct(self, x: Any, given: Any = None) -> Any:
        """E[x | z] at the posterior mean of z, of each row, in the form of :meth:`decode`."""
        return self.decode_data(self.data(x, given))

    def decode_data(self, data: Tree) -> Any:
        """:meth:`reconstruct` of what :meth:`data` made."""
        z = self._joined(data, None)
        x = [self._means(site) for site in self._observed(self._complete(data), z)]
        return restored(torch.cat(x), self.schema)

    def observed_of(self, data: Tree) -> Tensor:
        """Observations ``(N, X)`` in what :meth:`data` made; NaN was not seen."""
        parts = tensors(data)
        gaps = parts[-1].dtype == torch.bool
        return torch.where(parts[-1], parts[0], torch.nan) if gaps else parts[0]

    def _complete(self, data: Tree) -> Tree:
        """The same conditions, with observations without gaps, which are drawn anew."""
        x, *others = tensors(data)
        others = [each for each in others if each.dtype != torch.bool]
        filler = self._filler().expand(x.shape)
        return (filler, *others) if others else filler

    def score(self, x: Any, estimator: str = "annealed", given: Any = None, **settings: Any) -> Evidence:
        """log p(x) of each row, with errors, by one of ``ESTIMATORS`` with its own settings.

        Where there is a condition, it is log p(x | c); where entries were not seen, it is that of the others.
        """
        if estimator not in ESTIMATORS:
            raise RunError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator}")
        if estimator == "importance":
            settings = {"num_samples": 5000} | settings
        data = self.data(x, given)
        try:
            return ESTIMATORS[estimator](self.vae.model, self.vae.guide, data, **settings)
        except (ContractError, ValueError, TypeError) as error:
            raise RunError(f"estimator {estimator}: {error}") from error

    def impute(self, x: Any, given: Any = None, **settings: Any) -> Filled:
        """Values for what was not seen, NaN in ``x``; settings are those of :func:`pyro_vae.impute`."""
        data = self.data(x, given)
        if not any(leaf.isnan().any() or (leaf.dtype == torch.bool and not leaf.all()) for leaf in tensors(data)):
            raise RunError("nothing is missing: what was not seen must be NaN")
        try:
            imputation = impute(self.vae.model, self.vae.guide, data, **settings)
        except (ContractError, ValueError, TypeError) as error:
            raise RunError(f"impute: {error}") from error
        values = imputation.mean
        if discrete := [place for place, column in enumerate(self.schema.columns) if column.values]:
            values = values.clone()
            values[:, discrete] = imputation.draws[..., discrete].mode(0).values
        return Filled(restored(values, self.schema), imputation)

    def _like(self, size: int, given: Any) -> Tree:
        """Possible observations, which programs are called with where x is drawn."""
        x = self._filler().expand(size, self.schema.size)
        try:
            c = conditions(given, size, self.schema)
        except DataError as error:
            raise RunError(str(error)) from error
        return x if c is None else (x, c.to(x))

    def _filler(self) -> Tensor:
        """A value in the support, or one of each entry."""
        filler = getattr(self._part("likelihood", "head"), "filler", 0.0)
        return torch.as_tensor(filler, device=self.device, dtype=torch.float32)

    def _part(self, *names: str) -> Any:
        """A part of the model; None of one that is composed otherwise."""
        return functools.reduce(lambda part, name: getattr(part, name, None), names, self.vae)

    def _latent_shapes(self, data: Tree) -> dict[str, tuple[int, ...]]:
        with evaluating(self.vae.guide), torch.no_grad():
            draws = posterior_samples(self.vae.guide, select(data, slice(1)), 1)
        return {name: tuple(each.shape[2:]) for name, each in draws.items()}

    def _observed(self, data: Tree, latents: dict[str, Tensor]) -> list[Any]:
        """The observed site, with a draw of x, of some rows at a time."""
        sites = []
        for start in range(0, data_size(data), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            known = {name: each[some] for name, each in latents.items()}
            program = poutine.condition(poutine.uncondition(self.vae.model), data=known)
            with evaluating(self.vae.model), torch.no_grad():
                trace = poutine.trace(program).get_trace
                nodes: Any = call(trace, select(data, some)).nodes
            (site,) = (site for site in nodes.values() if site.get("infer", {}).get("was_observed"))
            sites.append(site)
        return sites

    def _means(self, site: Any) -> Tensor:
        """E[x | z], or the most probable of values that are listed."""
        fn = site["fn"]
        x = mean_of(fn)
        while hasattr(fn, "base_dist") and fn.event_shape:
            fn = fn.base_dist
        levels = torch.tensor([len(column.values) for column in self.schema.columns])
        scores = []
        for level in range(int(levels.max()) if len(levels) else 0):
            value = self._filler().expand(x.shape).clone()
            value[..., levels > level] = float(level)
            scores.append(torch.where((levels > level).to(x.device), fn.log_prob(value), -torch.inf))
        return torch.where((levels > 0).to(x.device), torch.stack(scores).argmax(0).to(x), x) if scores else x


def _check_number(num_samples: int) -> None:
    try:
        check_at_least_one(num_samples=num_samples)
    except ValueError as error:
        raise RunError(str(error)) from error
