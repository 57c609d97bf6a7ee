"""log p(x) by annealed importance sampling, and between a lower and an upper bound by bidirectional Monte Carlo."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.infer.checks import check_program
from pyro_vae.infer.evidence.importance import reduce_log_weights, rows_per_chunk
from pyro_vae.infer.evidence.laplace import Coordinates, diagonal, laplace_approximation, prior_location_and_width
from pyro_vae.infer.evidence.result import Evidence, concatenate
from pyro_vae.infer.programs import Program, evaluating, scoring
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.tracing import Compiled
from pyro_vae.infer.trees import Data, data_size, split


@dataclass(frozen=True)
class Annealing:
    """How chains are annealed from a start to the posterior.

    The path is start(z)^(1 - beta) p(x, z)^beta, beta from 0 to 1. Hamiltonian Monte Carlo follows it in coordinates
    in which the start is about a unit ball. Step sizes are adapted for each observation and temperature by a warm-up
    with chains of its own, and frozen before the chains that count begin: otherwise the estimate would be biased.

    Args:
        num_chains: C, at least 2.
        num_temperatures: T, steps from beta = 0 to 1; a transition stands between any two. At least 1, which leaves
            plain importance sampling from the start. None: as many as give each log p(x) about the error below.
        start: laplace: a Gaussian with the posterior's mode and curvature; guide: q(z | x); prior: p(z).
        num_leapfrogs: gradient steps of a transition, at least 1.
        schedule: linear, or sigmoid, which is denser at both ends (Grosse, Ghahramani & Adams 2015).
        error: standard error of one log p(x), in nats, that a pilot run on a few observations aims at, positive.
        target_acceptance: of the adapted step sizes, in (0, 1).
        num_warmup_chains: at least 1.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_chains: int = 16
    num_temperatures: int | None = None
    start: Literal["laplace", "guide", "prior"] = "laplace"
    num_leapfrogs: int = 3
    schedule: Literal["linear", "sigmoid"] = "linear"
    error: float = 0.1
    target_acceptance: float = 0.8
    num_warmup_chains: int = 4

    def __post_init__(self):
        least = {"num_chains": 2, "num_temperatures": 1, "num_leapfrogs": 1, "num_warmup_chains": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "num_temperatures":
                continue
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value}")
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        for name in ("start", "schedule"):
            choices = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)}")
        if not 0 < self.error < math.inf:
            raise ValueError(f"error must be positive, got {self.error}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")

    def temperatures(self, num: int) -> Tensor:
        """beta_0 = 0 .. beta_num = 1."""
        beta = torch.linspace(0, 1, num + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            beta = torch.sigmoid(8 * beta - 4)
            beta = (beta - beta[0]) / (beta[-1] - beta[0])
        return beta

    @property
    def longest_step(self) -> float:
        """A quarter of a standard normal's period in all, after which a trajectory has forgotten where it began.

        Coordinates of other starts know the posterior's width less well, and may need twice as much.
        """
        return (0.5 if self.start == "laplace" else 1) * math.pi / self.num_leapfrogs


WU_2017 = Annealing(16, 10_000, "prior", 10, "sigmoid", target_acceptance=0.65, num_warmup_chains=16)
"""Settings of Wu, Burda, Salakhutdinov & Grosse (2017), but for the frozen step sizes: theirs adapt as they go."""
CREMER_2018 = Annealing(100, 10_000, "prior", 10, "linear", target_acceptance=0.65, num_warmup_chains=100)
"""Settings of the code of Cremer, Li & Duvenaud (2018), but for the frozen step sizes: theirs adapt as they go."""


def annealed_importance_sampling(
    model: Program,
    guide: Program,
    data: Data,
    settings: Annealing = Annealing(),
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
) -> Evidence:
    """Estimate log p(x) of each observation by annealed importance sampling (Neal 2001).

    A chain z_0 .. z_(T-1) that starts at z_0 ~ start and is annealed to the posterior has the log-weight

        log w = sum_t (beta_t - beta_(t-1)) (log p(x, z_(t-1)) - log start(z_(t-1))),    E[w] = p(x).

    log 1/C sum_c w_c is therefore low in expectation, as for :func:`pyro_vae.importance_sampling`, by about half of
    ``mc_se`` squared (:meth:`Evidence.shortfall`). An interval of 2 ``mc_se`` of so few chains covers less often than
    it says, the less the worse the start fits: the tails of a Gaussian are too light for a bounded prior, for example.
    The variance of log w falls as T grows, however far the guide is from the posterior.

    Args:
        model, guide: see :func:`pyro_vae.traces`; latent sites must be continuous, there may be several. The guide
            says where the posterior is looked for, and is the start if asked.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the chains.
        memory: bytes that the intermediate results of one chunk may take, about; None: half of a GPU's free memory,
            128 MiB on a CPU.
        compiled: compile what is called often, see :class:`pyro_vae.infer.tracing.Compiled`; not for programs with side
            effects.
        progress: show a progress bar.

    Returns:
        Evidence of the N observations, in nats per datum: ``mc_se`` is the delta method's over the C chains; ``khat``
        needs at least 21 of them.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, and if a site is discrete.
    """
    results = []
    for path, betas, steps, bar in _paths(model, guide, data, settings, memory, compiled, progress):
        log_w, acceptance, _ = _anneal(path, betas, path.draw(settings.num_chains), steps)
        results.append(reduce_log_weights([log_w], settings.num_chains)._replace(acceptance=acceptance))
        bar.update(log_w.shape[1])
    return concatenate(results)


class Sandwich(NamedTuple):
    """log p(x) of simulated observations between two estimates.

    Attributes:
        lower: annealed importance sampling, low in expectation.
        upper: the same chains in reverse from the exact posterior, high in expectation. Its chains share their first
            point, so that ``mc_se`` understates how much another simulation would differ: use that of :meth:`width`.
        data: the simulated data, as the programs take them.
    """

    lower: Evidence
    upper: Evidence
    data: Data

    def width(self) -> tuple[float, float]:
        """Mean of upper minus lower, and its standard error over observations, in nats."""
        difference = self.upper.log_px - self.lower.log_px
        size = len(difference)
        return difference.mean().item(), difference.std().item() / size**0.5 if size > 1 else math.nan


def bidirectional_monte_carlo(
    model: Program,
    guide: Program,
    data: Data,
    settings: Annealing = Annealing(),
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
) -> Sandwich:
    """Enclose log p(x) of observations that are drawn from the model itself (Grosse, Ghahramani & Adams 2015).

    The z that an observation was drawn from is an exact draw of its posterior. Chains that are annealed from it back
    to the start have weights of mean 1 / p(x), which gives an estimate that is high in expectation. A narrow
    gap between the two shows that the settings suffice for data like those simulated; a wide one, how far they may
    fail.

    Args:
        model, guide, settings, memory, compiled, progress: see :func:`annealed_importance_sampling`.
        data: what is observed is drawn anew, for as many data; conditions and masks stay.
    """
    lower, upper = [], []
    with scoring(model, guide):
        data, posterior_draws = Latents(model, guide, data).simulate()
    first = 0
    for path, betas, steps, bar in _paths(model, guide, data, settings, memory, compiled, progress):
        size = path.coordinates.loc.shape[0]
        log_w, acceptance, _ = _anneal(path, betas, path.draw(settings.num_chains), steps)
        lower.append(reduce_log_weights([log_w], settings.num_chains)._replace(acceptance=acceptance))
        exact = path.coordinates.from_latents(posterior_draws[first : first + size].expand(settings.num_chains, -1, -1))
        log_w, acceptance, _ = _anneal(path, betas.flip(0), exact, steps.flip(0))
        inverse = reduce_log_weights([log_w], settings.num_chains)
        upper.append(inverse._replace(log_px=-inverse.log_px, acceptance=acceptance))
        first += size
        bar.update(size)
    return Sandwich(concatenate(lower), concatenate(upper), data)


class _State(NamedTuple):
    """Chains at e, with the log-densities of both ends of the path and their gradients."""

    e: Tensor  # (C, B, D)
    start: Tensor  # (C, B)
    target: Tensor
    start_gradient: Tensor  # (C, B, D)
    target_gradient: Tensor


class _Path:
    """The densities start(e)^(1 - beta) p(x, e)^beta of B observations, in whitened coordinates e."""

    def __init__(self, latents: Latents, coordinates: Coordinates, settings: Annealing, evaluate: Callable):
        self.latents, self.coordinates, self.settings = latents, coordinates, settings
        self._evaluate = evaluate

    def select(self, among: slice) -> "_Path":
        return _Path(self.latents.select(among), self.coordinates.select(among), self.settings, self._evaluate)

    def draw(self, num_chains: int) -> Tensor:
        loc = self.coordinates.loc
        if self.settings.start == "laplace":
            return torch.randn(num_chains, *loc.shape, dtype=loc.dtype, device=loc.device)
        if self.settings.start == "guide":
            u = self.latents.sample_guide(num_chains)
        else:
            u = self.latents.sample_prior(num_chains)
        return self.coordinates.from_latents(u)

    def evaluate(self, e: Tensor) -> _State:
        return _State(e, *self._evaluate(e, self.latents.data, *self.coordinates))

    def transition(self, state: _State, beta: Tensor, step: Tensor) -> tuple[_State, Tensor]:
        """Hamiltonian Monte Carlo (Neal 2011, section 5.3.2) that leaves the density at ``beta`` unchanged.

        ``step`` is the step size of each observation, ``(B,)``; it is varied at random by a fifth, so that no
        trajectory keeps returning to where it began. Returns the chains and the mean acceptance probability of each
        observation.
        """

        def log_density(at: _State) -> Tensor:
            return (1 - beta) * at.start + beta * at.target

        def gradient(at: _State) -> Tensor:
            return (1 - beta) * at.start_gradient + beta * at.target_gradient

        size = (step * (0.8 + 0.4 * torch.rand_like(step))).unsqueeze(-1)
        momentum = torch.randn_like(state.e)
        energy = log_density(state) - 0.5 * momentum.square().sum(-1)
        new, momentum = state, momentum + 0.5 * size * gradient(state)
        for leapfrog in range(1, self.settings.num_leapfrogs + 1):
            new = self.evaluate(new.e + size * momentum)
            half = 0.5 if leapfrog == self.settings.num_leapfrogs else 1.0
            momentum = momentum + half * size * gradient(new)
        log_ratio = log_density(new) - 0.5 * momentum.square().sum(-1) - energy
        probability = torch.where(log_ratio.isnan(), -math.inf, log_ratio).clamp(max=0).exp()
        accepted = torch.rand_like(probability) < probability
        pairs = zip(new, state, strict=True)
        chosen = (torch.where(accepted if a.dim() == 2 else accepted.unsqueeze(-1), a, b) for a, b in pairs)
        return _State(*chosen), probability.mean(0)


@torch.enable_grad()
def _evaluate(latents: Latents, start: str, e: Tensor, data: Data, *coordinates: Tensor) -> tuple[Tensor, ...]:
    """The entries of :class:`_State` after e: log-densities of both ends of the path, and their gradients."""
    latents, coordinates, e = latents.of(data), Coordinates(*coordinates), e.detach().requires_grad_()
    u = coordinates.to_latents(e)
    if start == "guide":
        log_prior, log_likelihood, log_guide = latents.log_joint_and_guide(u)
    else:
        log_prior, log_likelihood = latents.log_joint(u)
    target = log_prior + log_likelihood + coordinates.log_det
    (target_gradient,) = torch.autograd.grad(target.sum(), e, retain_graph=start != "laplace")
    if start == "laplace":
        log_start = -0.5 * (e.square().sum(-1) + e.shape[-1] * math.log(2 * math.pi))
        start_gradient = -e
    else:
        log_start = (log_prior if start == "prior" else log_guide) + coordinates.log_det
        (start_gradient,) = torch.autograd.grad(log_start.sum(), e)
    return tuple(each.detach() for each in (log_start, target, start_gradient, target_gradient))


def _paths(
    model: Program, guide: Program, data: Data, settings: Annealing, memory: int | None, compiled: bool, progress: bool
) -> Iterator[tuple[_Path, Tensor, Tensor, tqdm]]:
    """For each chunk of observations its path, temperatures ``(T + 1,)``, frozen step sizes ``(T - 1, B)``, the bar."""
    with scoring(model, guide):
        check_program(model, guide, next(split(data, 1000)))
        # a gradient keeps what a forward pass would drop
        rows = max(1, rows_per_chunk(model, guide, data, memory) // 3)
    size, betas, evaluate = max(1, rows // settings.num_chains), None, None
    bar = tqdm(total=data_size(data), disable=not progress, unit="datum", desc="annealing")
    with bar, evaluating(model, guide):
        for part in split(data, rows):
            check_program(model, guide, part, neighbours=False)
            latents = Latents(model, guide, part)
            if evaluate is None:
                evaluate = partial(_evaluate, latents, settings.start)
                evaluate = Compiled(evaluate) if compiled else evaluate
            whole = _Path(latents, _coordinates(latents, settings), settings, evaluate)
            if betas is None:
                some = slice(None, None, max(1, data_size(part) // min(32, size)))  # spread over the chunk
                num = settings.num_temperatures or _pilot(whole.select(some))
                betas = settings.temperatures(num).to(latents.like)
                bar.set_postfix(temperatures=num)
            for first in range(0, data_size(part), size):
                path = whole.select(slice(first, first + size))
                yield path, betas, _warm_up(path, betas), bar


def _coordinates(latents: Latents, settings: Annealing) -> Coordinates:
    """Coordinates in which the start is about a unit ball."""
    if settings.start == "laplace":
        return laplace_approximation(latents)
    if settings.start == "guide":
        draws = latents.sample_guide(64)
        return diagonal(draws.mean(0), draws.std(0).clamp(min=1e-6))
    return diagonal(*(each.expand(data_size(latents.data), -1) for each in prior_location_and_width(latents)))


def _anneal(path: _Path, betas: Tensor, e: Tensor, steps: Tensor, adapt: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Take chains at e, ``(C, B, D)``, from one end of the path to the other, whichever ``betas`` begins with.

    ``steps`` holds the step sizes of each transition, ``(T - 1, B)``, where adapted ones are put if asked for.

    Returns:
        Log-weights ``(C, B)``, mean acceptance ``(B,)``, NaN without a transition, and the step sizes.
    """
    state = path.evaluate(e)
    log_w = torch.zeros_like(state.start, dtype=torch.float64)
    acceptances = []
    for t in range(1, len(betas)):
        log_w += (betas[t] - betas[t - 1]).double() * (state.target - state.start).double()
        if t == len(betas) - 1:
            break
        state, acceptance = path.transition(state, betas[t], steps[t - 1])
        acceptances.append(acceptance)
        if adapt:
            step = steps[t - 1] * torch.exp(0.5 * (acceptance - path.settings.target_acceptance))
            steps[t - 1 :] = step.clamp(max=path.settings.longest_step)
    mean = torch.stack(acceptances).mean(0) if acceptances else torch.full_like(log_w[0], math.nan)
    return log_w, mean.double(), steps


def _warm_up(path: _Path, betas: Tensor) -> Tensor:
    """Step sizes of each transition, ``(T - 1, B)``, from chains that go the whole way."""
    steps = torch.full_like(path.coordinates.log_det, path.settings.longest_step).repeat(len(betas) - 2, 1)
    return _anneal(path, betas, path.draw(path.settings.num_warmup_chains), steps, adapt=True)[-1]


def _pilot(path: _Path, least: int = 5, most: int = 1000) -> int:
    """How many temperatures it takes: more as long as the chains' log-weights vary too much for the error asked for."""
    settings = path.settings
    allowed = math.log1p(settings.num_chains * settings.error**2)  # of log w, if it is normal
    num = least
    while num < most:
        betas = settings.temperatures(num).to(path.latents.like)
        log_w, _, _ = _anneal(path, betas, path.draw(settings.num_chains), _warm_up(path, betas))
        ratio = log_w.var(0).nanmean().item() / allowed
        if ratio <= 1:
            return num
        num = most if math.isnan(ratio) else min(most, math.ceil(num * min(ratio, 4)))
    warnings.warn(
        f"{most} temperatures, the most that are tried, may not give the error asked for; num_temperatures sets more",
        stacklevel=2,
    )
    return num
