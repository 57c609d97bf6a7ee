"""What was not seen of an observation, drawn and averaged given what was."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_parts, seen_entries
from pyro_vae.infer.evidence.annealed import Paths, one_way
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work, joined, power_of_two
from pyro_vae.infer.evidence.chains import anneal, resample
from pyro_vae.infer.evidence.importance import SAMPLES_PER_CHUNK, rows_per_chunk
from pyro_vae.infer.evidence.opinion import check_start, confirmed
from pyro_vae.infer.evidence.result import Evidence, as_part, concatenate, from_part
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import Program, evaluating, log_weights_of, sample_sites, scoring, site_of, traces
from pyro_vae.infer.supports import Latents, without_mask
from pyro_vae.infer.trees import Data, data_size, select, split


class Imputation(NamedTuple):
    """Values for what was not seen of B observations, of shape ``(X,)`` each; what was seen stays as it is.

    Attributes:
        draws: S draws from p(x_missing | x_seen), shape ``(S, B, X)``. ``draws.mode(0).values`` are the most frequent
            ones, for categories; ``draws.quantile(q, 0)`` are quantiles.
        mean: E[x_missing | x_seen], shape ``(B, X)``.
        std: standard deviations of p(x_missing | x_seen), 0 where x was seen; not the error of ``mean``, which is about
            ``std / ess.sqrt()`` at most.
        seen: booleans, shape ``(B, X)``.
        evidence: log p(x_seen), with the diagnostics of the weights behind all this: where it is not reliable, nor is
            the rest.
    """

    draws: Tensor
    mean: Tensor
    std: Tensor
    seen: Tensor
    evidence: Evidence

    @property
    def ess(self) -> Tensor:
        """The effective number of the weighted draws of z behind each row, shape ``(B,)``."""
        return self.evidence.ess


def impute(
    model: Program,
    guide: Program,
    data: Data,
    num_samples: int = 1000,
    num_draws: int = 100,
    chains: Annealing | None = None,
    site: str | None = None,
    memory: int | None = None,
    num_checked: int = 16,
    work: Work | None = None,
) -> Imputation:
    """Draw what was not seen of each observation, given what was, by sampling importance resampling (Rubin 1987).

    z_1 .. z_K ~ q(z | x_seen) have weights w_k = p(x_seen, z_k) / q(z_k | x_seen), so that

        E[x_missing | x_seen] is about sum_k w_k E[x | z_k] / sum_k w_k     (Mattei & Frellsen 2019, section 4),

    and draws of x given z_k, resampled by the weights, are about draws from p(x_missing | x_seen).

    Args:
        model, guide: see :func:`pyro_vae.traces`; what was not seen is masked at the model's observed site, as a
            :class:`pyro_vae.VAE` does.
        data: see :func:`pyro_vae.traces`: for a VAE whose encoder is Incomplete, x with NaN; otherwise ``(x, seen)``.
        num_samples: K, at least 1; without effect with ``chains``.
        num_draws: S, at least 1.
        chains: z by chains that are annealed to p(z | x_seen), of a given ``num_temperatures`` or as many as a trial
            of some observations tells, whose weights vary less; 100 chains or more are advised. None: z of the guide.
        site: the observed site; None: the only one.
        memory: see :func:`pyro_vae.importance_sampling`.
        num_checked, work: likewise.

    Raises:
        ValueError: if a number is below 1.
        ContractError: as :func:`pyro_vae.importance_sampling`, and if there are several observed sites, and none is
            named.
    """
    if num_samples < 1 or num_draws < 1:
        raise ValueError(f"num_samples and num_draws must be at least 1, got {num_samples} and {num_draws}")
    with scoring(model, guide):
        blocks = Blocks(data, work)
        with blocks.apart("checks"):
            check_parts(model, guide, data)
            rows = rows_per_chunk(model, guide, data, memory)
            name = _observed_site(model, guide, data, site)
    if chains is None:
        draw = partial(_from_guide, model, guide, data, name, num_samples, rows)
    else:
        draw = _from_chains(model, guide, data, name, chains, max(1, rows // 3), blocks)

    def do(at: slice) -> Part:
        with scoring(model, guide) if chains is None else evaluating(model, guide), torch.no_grad():
            filled = [_filled(*each, num_draws) for each in draw(at)]
        draws = torch.cat([each.draws for each in filled], 1).movedim(1, 0)
        rest = {name: torch.cat([getattr(each, name) for each in filled]) for name in ("mean", "std", "seen")}
        return {"draws": draws, **rest} | as_part(concatenate(each.evidence for each in filled))

    found = joined(blocks.of("impute", data_size(data), do))
    evidence = confirmed(model, guide, data, from_part(found), rows, blocks, num_checked)
    return Imputation(found["draws"].movedim(0, 1), found["mean"], found["std"], found["seen"], evidence)


class _Scored(NamedTuple):
    """The observed site at draws of z: x, which of it was seen, draws and means of x given z, ``(K, B, *)`` but x."""

    x: Tensor
    seen: Tensor
    draws: Tensor
    means: Tensor


_Drawn = tuple[list[_Scored], Tensor, Evidence]
"""Of a chunk of observations: what the model says of x, log-weights ``(K, B)``, and evidence."""


def _from_guide(
    model: Program, guide: Program, data: Data, site: str, num_samples: int, rows: int, at: slice
) -> Iterator[_Drawn]:
    """The chunks of a block, from draws of the guide."""
    at_once = min(num_samples, SAMPLES_PER_CHUNK, rows)
    for part in split(select(data, at), power_of_two(rows // num_samples)):
        scored, weights = [], []
        for first in range(0, num_samples, at_once):
            both = traces(model, guide, part, min(at_once, num_samples - first))
            scored.append(_read(both.model, site, data_size(part)))
            weights.append(log_weights_of(both).double())
        yield scored, torch.cat(weights), reduce_log_weights(weights, num_samples)


def _from_chains(
    model: Program, guide: Program, data: Data, site: str, chains: Annealing, rows: int, blocks: Blocks
) -> Callable[[slice], Iterator[_Drawn]]:
    """The same by chains that end at the posterior."""
    with evaluating(model, guide), torch.no_grad():
        with blocks.apart("latents"):
            latents = Latents(model, guide, data, gaussian=True)
        paths = Paths(latents, chains, rows, False, blocks)

    def draw(at: slice) -> Iterator[_Drawn]:
        known, first = check_start(latents.select(at), at.start), 0
        for path, steps in paths.of(latents.select(at)):
            log_w, state, acceptance = anneal(path, paths.betas, path.evaluate(path.draw(chains.num_chains)), steps)
            evidence = one_way(log_w, acceptance, path)
            size = path.latents.size
            reliable = cast(Tensor, evidence.reliable) & known[first : first + size]
            first += size
            trace = path.latents.trace_at(path.coordinates.to_latents(state.e))
            yield [_read(trace, site, size)], log_w, evidence._replace(reliable=reliable)

    return draw


def _observed_site(model: Program, guide: Program, data: Data, site: str | None) -> str:
    trace = traces(model, guide, select(data, slice(1)), 1).model
    observed = [name for name in sample_sites(trace) if site_of(trace, name)["is_observed"]]
    if site is None and len(observed) == 1:
        return observed[0]
    if site not in observed:
        asked = "site= must name one" if site is None else f"'{site}' is none of them"
        raise ContractError(f"the model's observed sites are {', '.join(map(repr, observed))}: {asked}")
    return site


def _read(trace: poutine.Trace, site: str, size: int) -> _Scored:
    """What a trace ``(K, B)`` of the model says of the observed site."""
    found = site_of(trace, site)
    fn: Any = without_mask(found["fn"])
    draws = fn.sample()
    shape = fn.event_shape
    x = found["value"].expand(*draws.shape)[0]
    seen = seen_entries(found)
    while seen.dim() > draws.dim():
        seen = seen.all(0)
    seen = seen.expand(draws.shape)[0]
    try:
        means = fn.mean
    except NotImplementedError:  # a draw has the same mean, and varies more
        means = draws
    return _Scored(x, seen, draws, means.expand(-1, size, *shape))


def _filled(scored: list[_Scored], log_w: Tensor, evidence: Evidence, num_draws: int) -> Imputation:
    """The imputation of a chunk of observations."""
    x, seen = scored[0].x, scored[0].seen
    draws, means = (torch.cat([getattr(each, name) for each in scored]) for name in ("draws", "means"))
    weight = torch.softmax(log_w.nan_to_num(nan=-math.inf), 0).to(means)
    weight = weight.view(*weight.shape, *[1] * (means.dim() - 2))
    mean = (weight * means).sum(0)
    std = (weight * (draws - mean).square()).sum(0).sqrt()
    chosen = resample(log_w, num_draws)
    chosen = chosen.view(*chosen.shape, *[1] * (draws.dim() - 2)).expand(-1, *draws.shape[1:])
    drawn = torch.where(seen, x, draws.gather(0, chosen))
    return Imputation(drawn, torch.where(seen, x, mean), torch.where(seen, 0.0, std), seen, evidence)
