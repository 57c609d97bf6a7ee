"""Whether Markov chains agree, and how many independent draws they are worth (Vehtari, Gelman, Simpson, Carpenter &
Buerkner 2021, "Rank-normalization, folding, and localization: an improved R-hat")."""

import math

import torch
from torch import Tensor


def split_rhat(draws: Tensor) -> Tensor:
    """Rank-normalized split R-hat, the larger of bulk and folded: N draws of C chains, ``(N, C, *) -> (*)``.

    1 where the chains cannot be told apart, which includes that none of them has seen what all of them miss. NaN where
    a draw is not finite; 1 where all draws are equal.

    >>> draws = torch.randn(1000, 4, 2) + 3 * torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> (split_rhat(draws) > 1.05).tolist()
    [False, True]
    """
    halves = _halves(draws.double())
    median = _quantiles(halves, 0.5)[0]
    return torch.maximum(_rhat(_rank_normalized(halves)), _rhat(_rank_normalized((halves - median).abs())))


def bulk_ess(draws: Tensor) -> Tensor:
    """How many independent draws would tell the middle of the distribution as well: ``(N, C, *) -> (*)``."""
    return autocorrelation_ess(_rank_normalized(_halves(draws.double())))


def tail_ess(draws: Tensor) -> Tensor:
    """The same of its 5 % and 95 % quantiles, of which the smaller counts: ``(N, C, *) -> (*)``."""
    draws = draws.double()
    least = [autocorrelation_ess(_halves((draws <= at).double())) for at in _quantiles(draws, 0.05, 0.95)]
    return torch.where(draws.isfinite().all(0).all(0), torch.minimum(*least), math.nan)


def autocorrelation_ess(draws: Tensor) -> Tensor:
    """How many independent draws would tell the mean as well: ``(N, C, *) -> (*)``, N at least 4.

    C N over the autocorrelation time, whose sum ends where two successive ones are not positive, and does not rise
    before (Geyer 1992, section 3.3); what chains differ by counts as correlation.
    """
    n, num_chains = draws.shape[:2]
    draws = draws.double()
    means = draws.mean(0)
    spectrum = torch.fft.rfft(draws - means, n=2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n].mean(1) / n  # over chains; (N, *)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (means.var(0) if num_chains > 1 else 0)
    correlation = 1 - (within - covariance) / total
    correlation[0] = 1
    pairs = correlation[: (n - 1) // 2 * 2].unflatten(0, (-1, 2))
    sums = pairs.sum(1)
    positive = (sums > 0).cumprod(0)
    positive[-1] = 0
    first_not = positive.sum(0, keepdim=True)
    last = pairs[:, 0].gather(0, first_not).squeeze(0).clamp(min=0)
    time = -1 + 2 * (sums.cummin(0).values * positive).sum(0) + last
    ess = n * num_chains / time.clamp(min=1 / math.log10(n * num_chains))
    return torch.where(total == 0, float(n * num_chains), ess)


def _halves(draws: Tensor) -> Tensor:
    """Each chain as two: ``(N, C, *) -> (N // 2, 2 C, *)``; of an odd number the middle one is left out."""
    half = len(draws) // 2
    return torch.cat([draws[:half], draws[-half:]], 1)


def _quantiles(draws: Tensor, *shares: float) -> list[Tensor]:
    """Of all chains together, by one sort; torch's own refuses large tensors."""
    values = draws.flatten(0, 1).sort(0).values
    places = [share * (len(values) - 1) for share in shares]
    return [torch.lerp(values[math.floor(at)], values[math.ceil(at)], at % 1) for at in places]


def _rank_normalized(draws: Tensor) -> Tensor:
    """The normal quantiles of the ranks among all chains, equal draws sharing theirs, as a chain that stays leaves."""
    flat = draws.flatten(0, 1)
    size = len(flat)
    values, order = flat.sort(0)
    place = torch.arange(size, device=flat.device).view(-1, *[1] * (flat.dim() - 1)).expand_as(flat)
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    first = torch.where(new, place, 0).cummax(0).values
    ends = torch.cat([new[1:], torch.ones_like(new[:1])])
    last = torch.where(ends, place, size).flip(0).cummin(0).values.flip(0)
    rank = torch.empty_like(flat).scatter_(0, order, (first + last).to(flat) / 2 + 1)
    normal = torch.special.ndtri((rank - 0.375) / (size + 0.25))
    return torch.where(flat.isfinite().all(0), normal, math.nan).view_as(draws)


def _rhat(draws: Tensor) -> Tensor:
    """The square root of the variance of all draws, about, over that within chains: ``(N, C, *) -> (*)``."""
    n = len(draws)
    within, between = draws.var(0).mean(0), draws.mean(0).var(0)
    rhat = ((n - 1) / n + between / within).sqrt()
    return torch.where((within == 0) & (between == 0), 1.0, rhat)
