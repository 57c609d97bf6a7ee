"""What any module with parameters, and any distribution, is checked for."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.errors import ContractError, reason_of
from pyro_vae.infer.supports import innermost, into_support
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.posteriors import Posterior

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]

NUM_DRAWS, NUM_KERNELS = 10_000, 200


def check_scores(part: nn.Module, made: TorchDistribution, value: Tensor, batch: Shape) -> None:
    expected = (*batch, *made.event_shape)
    if value.shape != expected:
        raise ContractError(f"{name_of(part)}: a draw must have shape {expected}, it has {tuple(value.shape)}")
    if not innermost(support(part, made)).check(value).all():
        raise ContractError(f"{name_of(part)}: its draws must lie in its support, {made.support}, and some do not")
    log_prob = made.log_prob(value)
    if log_prob.shape != batch:
        raise ContractError(
            f"{name_of(part)}: log_prob of values of shape {expected} must have shape {batch}, it has "
            f"{tuple(log_prob.shape)}"
        )
    if not log_prob.isfinite().all():
        raise ContractError(f"{name_of(part)}: log_prob of its own draws must be finite, and some is not")


def support(part: nn.Module, made: TorchDistribution) -> constraints.Constraint:
    if not isinstance(made.support, constraints.Constraint):
        raise ContractError(f"{name_of(part)}: its distribution must say its support, it says {made.support}")
    return made.support


def check_distribution(name: str, made: TorchDistribution) -> None:
    """The mass or density of all values together is one, and draws have that distribution, as far as can be told."""
    support = innermost(made.support)
    (check_mass if support.is_discrete else check_density)(name, made)


def check_mass(name: str, made: TorchDistribution) -> None:
    draws = made(torch.Size([NUM_DRAWS])).detach().to(torch.float64)  # as pyro.sample draws
    support = innermost(made.support)
    low = int(getattr(support, "lower_bound", 0))
    high = 1 if support is constraints.boolean else int(getattr(support, "upper_bound", 4 * draws.max() + 1000))
    if (high - low + 1) ** draws.shape[-1] > 2**14:
        return
    values = torch.arange(low, high + 1, dtype=torch.float64)
    x = torch.cartesian_prod(*[values] * draws.shape[-1]).reshape(-1, draws.shape[-1])
    p = made.log_prob(x).exp().detach()
    if not abs(p.sum() - 1) < 0.01:
        raise ContractError(f"{name}: its masses must sum to one, they sum to {p.sum().item():.4g}")
    check_agree(name, [p @ x, p @ x.square()], [draws, draws.square()])


def check_density(name: str, made: TorchDistribution) -> None:
    """By importance sampling from kernels around draws, in coordinates u that are all of R^D, whitened to v."""
    try:
        into: Any = into_support(made.support)
    except NotImplementedError:
        return
    u = into.inv(made(torch.Size([NUM_DRAWS])).detach())  # as pyro.sample draws
    u = u[u.isfinite().all(-1)]
    dim = u.shape[-1]
    low, middle, high = u.quantile(u.new_tensor([0.25, 0.5, 0.75]), 0)
    bulk = u[((u - middle).abs() <= 4 * (high - low)).all(-1)]  # heavy tails have no covariance
    cov = bulk.T.cov().reshape(dim, dim) + 1e-12 * torch.eye(dim, dtype=u.dtype)
    loc, scale = bulk.mean(0), torch.linalg.cholesky(cov)
    mine = torch.linalg.solve_triangular(scale, (u - loc).T, upper=False).T
    centers, width = mine[:NUM_KERNELS], NUM_KERNELS ** (-1 / (dim + 4))
    kernel = dist.StudentT(u.new_tensor(5.0)).expand([dim]).to_event(1)
    v = centers[torch.randint(len(centers), (NUM_DRAWS,))] + width * kernel.sample((NUM_DRAWS,))
    near = [kernel.log_prob((part[:, None] - centers) / width).logsumexp(-1) for part in v.split(1000)]
    log_r = torch.cat(near) - math.log(len(centers)) - dim * math.log(width) - scale.diagonal().log().sum()

    at = loc + v @ scale.T
    x = into(at)
    log_det = into.log_abs_det_jacobian(at, x).reshape(len(at), -1).sum(-1)
    inside = cast(constraints.Constraint, made.support).check(x) & x.isfinite().all(-1)
    log_p = made.log_prob(torch.where(inside[:, None], x, x[inside][0])).detach() + log_det
    w = torch.where(inside, log_p - log_r, -math.inf).exp()
    error = (w.std() / math.sqrt(len(w))).item()
    if error > 0.1:
        return
    if abs(w.mean().item() - 1) > 0.03 + 6 * error:
        raise ContractError(f"{name}: its density must integrate to one, the integral is {w.mean().item():.4g}")
    v, mine = v.tanh(), mine.tanh()  # bounded, so that heavy tails do no harm
    check_agree(name, [w @ v / w.sum(), w @ v.square() / w.sum()], [mine, mine.square()], 0.02 + 6 * error)


def check_agree(name: str, expected: Sequence[Tensor], found: Sequence[Tensor], slack: float = 1e-3) -> None:
    for exact, values in zip(expected, found, strict=True):
        error = values.std(0) / math.sqrt(len(values))
        if not ((values.mean(0) - exact).abs() < 6 * error + slack * exact.abs().clamp(min=1)).all():
            raise ContractError(f"{name}: its draws must have the distribution of its log_prob, and have another")


def check_gradients(part: nn.Module, value: Callable[[], Tensor]) -> None:
    parameters = {name: p for name, p in part.named_parameters() if p.requires_grad and p.numel()}
    if not parameters:
        return
    made = value().sum()
    gradients = (
        torch.autograd.grad(made, list(parameters.values()), allow_unused=True)
        if made.requires_grad
        else [None] * len(parameters)
    )
    without = [
        n for n, g in zip(parameters, gradients, strict=True) if g is None or not g.any() or not g.isfinite().all()
    ]
    if without:
        raise ContractError(
            f"{name_of(part)}: every parameter must have a finite gradient, and {', '.join(without)} has none"
        )


def check_moves(part: nn.Module, value: Callable[[Any, Callable[[Any], Any]], Tensor]) -> None:
    """Nothing stays behind, as a plain tensor does, when a part moves to another type or device."""
    single = value(part, lambda x: x).detach()
    try:
        precise = value(double(part), double).detach()
    except RuntimeError as error:
        raise ContractError(
            f"{name_of(part)} must follow .to(torch.float64): {reason_of(error)}; register_buffer tensors that are no "
            "parameters"
        ) from error
    if precise.dtype != torch.float64:
        raise ContractError(f"{name_of(part)} must follow .to(torch.float64), it still makes {precise.dtype}")
    check_close(f"{name_of(part)}: float32 and float64 must agree", single.double(), precise, tolerance=5e-3)
    try:
        with pyro.validation_enabled(False):
            value(copy.deepcopy(part).to("meta"), lambda x: moved(x, "meta"))
    except RuntimeError as error:
        if "device" in str(error) and not isinstance(error, NotImplementedError):
            raise ContractError(
                f"{name_of(part)} must follow .to(device), and a tensor of it stays: {reason_of(error)}; "
                "register_buffer tensors that are no parameters"
            ) from error


def check_state(part: M, fresh: Callable[[], M], value: Callable[[M], Tensor]) -> None:
    """A part made anew, with the state of the other, is the same."""
    other = fresh()
    try:
        other.load_state_dict(part.state_dict())
    except RuntimeError as error:
        raise ContractError(
            f"{name_of(part)}: its state_dict must load into another one: {reason_of(error)}"
        ) from error
    results = []
    for each in (part, other):
        torch.manual_seed(3)
        results.append(value(each.eval()))
    check_close(f"{name_of(part)}: with the state_dict of another it must be the same", *results)


def check_close(what: str, one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    if one.shape != other.shape or not torch.allclose(one, other, rtol=tolerance, atol=tolerance):
        detail = f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
        if one.shape == other.shape:
            detail = f"they differ by {(one - other).abs().max().item():.3g}"
        raise ContractError(f"{what}: {detail}")


def made_by(make: Callable[..., M], base: type[M], **sizes: int) -> M:
    if isinstance(make, nn.Module):
        raise ContractError(f"pass what makes a {base.__name__}, such as its class, not an instance of {name_of(make)}")
    given = ", ".join(f"{name} {size}" for name, size in sizes.items())
    try:
        part = make(*sizes.values())
    except Exception as error:
        raise ContractError(f"a {base.__name__} of {given} could not be made: {told(error)}") from error
    if not isinstance(part, base):
        raise ContractError(f"{type(part).__name__} is no pyro_vae.{base.__name__}: make it a subclass")
    for name, size in sizes.items():
        if (found := getattr(part, name, None)) != size:
            raise ContractError(f"{name_of(part)}.{name} must be {size}, as it was made with, it is {found}")
    return part


def call(part: nn.Module, *arguments: Any) -> Any:
    shapes = ", ".join(str(tuple(v.shape)) for v in arguments if isinstance(v, Tensor))
    with naming(part, f"forward{' of shapes ' * bool(shapes)}{shapes}"):
        return part(*arguments)


@contextmanager
def naming(part: object, what: str) -> Iterator[None]:
    """An error inside is told in one line that names the part."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{type(part).__name__}: {what} failed: {told(error)}") from error


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def name_of(part: object) -> str:
    return type(part).__name__


def raw_outputs(head: Likelihood | Posterior, batch: Shape) -> list[Tensor]:
    return [(0.5 * torch.randn(*batch, n)).requires_grad_() for n in head.sizes]


def jittered(part: M) -> M:
    """With parameters that are not where they start, where some gradients vanish."""
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return part.eval()


def moved(x: Any, to: torch.dtype | str) -> Any:
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(to)
    return x.detach().to(to) if isinstance(x, Tensor) else [moved(v, to) for v in x]


def double(x: Any) -> Any:
    return moved(x, torch.float64)
