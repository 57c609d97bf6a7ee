"""Distributions that neither Pyro nor torch has, or that they have only in a slower or less exact form."""

from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.errors import check_widths
from pyro_vae.infer.flows import import_zuko


class ContinuousBernoulli(TorchDistribution):
    """Density l exp(l x) / (exp(l) - 1) on [0, 1] (Loaiza-Ganem & Cunningham 2019), in its natural parameter l.

    torch's own clips its probabilities, so that its density does not integrate to one where \\|l\\| is above 15.

    Args:
        logits: l, shape ``(*)``.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
    support = constraints.unit_interval  # pyright: ignore[reportAssignmentType]
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ContinuousBernoulli":
        return type(self)(self.logits.expand(batch_shape), validate_args=self._validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(x)
        return self.logits * x - self.log_normalizer()

    def log_normalizer(self) -> Tensor:
        """``log (exp(l) - 1) / l = max(l, 0) + log (1 - exp(-a)) / a with a = |l|``; a series where a is small."""
        size = self.logits.abs()
        small = size < 0.1
        safe = torch.where(small, 1.0, size)
        exact = torch.log(-torch.expm1(-safe) / safe)
        series = -size / 2 + size.square() / 24 - size.pow(4) / 2880
        return F.relu(self.logits) + torch.where(small, series, exact)

    @property
    def mean(self) -> Tensor:
        """1 / (1 - exp(-l)) - 1 / l."""
        small = self.logits.abs() < 0.1
        safe = torch.where(small, 1.0, self.logits)
        exact = -1 / torch.expm1(-safe) - 1 / safe
        return torch.where(small, 0.5 + self.logits / 12 - self.logits.pow(3) / 720, exact)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.icdf(
            torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        )

    def icdf(self, value: Tensor) -> Tensor:
        """The inverse of the distribution function, log(1 + u (exp(l) - 1)) / l, for l > 0 from the other end."""
        size = self.logits.abs()
        small = size < 1e-3
        safe = torch.where(small, 1.0, size)
        x = torch.where(small, value, -torch.log1p(value * torch.expm1(-safe)) / safe)  # of -|l|: mass near zero
        return torch.where(self.logits > 0, 1 - x, x).clamp(0, 1)


class DiscretizedLogistic(TorchDistribution):
    """Masses of a logistic distribution on the bins [k, k + 1) / L; the first and last bins take the tails.

    Args:
        loc: location, shape ``(*)``; the bins tile [0, 1].
        scale: positive, shape ``(*)``.
        levels: number L of bins.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "DiscretizedLogistic":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogistic(loc, scale, self.levels, validate_args=self._validate_args)

    def log_prob(self, k: Tensor) -> Tensor:
        """log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - exp(l - u)), for a bin's ends l < u and the sigmoid s."""
        if self._validate_args:
            self._validate_sample(k)
        lower = (k / self.levels - self.loc) / self.scale
        upper = ((k + 1) / self.levels - self.loc) / self.scale
        first, last = k == 0, k == self.levels - 1
        width = 1 / (self.levels * self.scale)
        both = torch.log(-torch.expm1(-width))
        return (
            torch.where(last, 0.0, F.logsigmoid(upper))
            + torch.where(first, 0.0, F.logsigmoid(-lower))
            + torch.where(first | last, 0.0, both)
        )

    @property
    def mean(self) -> Tensor:
        """The sum of P(K >= k) over k = 1 .. L - 1."""
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - k / self.levels) / self.scale)
        return total

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)).detach()

    def icdf(self, value: Tensor) -> Tensor:
        """The smallest k with P(K <= k) >= u, of numbers u in (0, 1)."""
        x = self.loc + self.scale * torch.logit(value.clamp(1e-7, 1 - 1e-7))
        return torch.floor(x * self.levels).clamp(0, self.levels - 1)


class WholeNumbers(dist.Categorical):
    """``Categorical`` with a mean, and values of the type of its logits."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * torch.arange(self._num_events, device=self.probs.device)).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return super().sample(sample_shape).to(self.logits.dtype)


class BernoulliVector(dist.Independent):
    """Independent Bernoulli variables along the last dimension, scored in one fused pass.

    log p(x) = sum_d x_d l_d - softplus(l_d), for logits l: the value of
    ``Bernoulli(logits=l).to_event(1).log_prob(x)``, at a fraction of its cost without gradients.

    Args:
        logits: shape ``(*, X)``.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(dist.Bernoulli(logits=logits, validate_args=validate_args), 1, validate_args=validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(x)
        if torch.is_grad_enabled():
            return (x * self.logits - F.softplus(self.logits, threshold=50)).sum(-1)
        return _bernoulli_log_prob(self.logits, x)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "BernoulliVector":
        return BernoulliVector(self.logits.expand(*batch_shape, -1), validate_args=self.base_dist._validate_args)


def _bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """sum_d x_d l_d - softplus(l_d) without gradients, where memory traffic and logarithms dominate on a CPU.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)). Sixteen factors 1 + exp(-|l|), each in (1, 2], are multiplied before
    the logarithm is taken, so it runs 16 times less often and nothing overflows; one buffer serves all steps.
    """
    logits, x = torch.broadcast_tensors(logits, x)
    buffer = logits * x
    result = buffer.sum(-1)
    factors = torch.abs(logits, out=buffer).neg_().exp_().add_(1)
    for _ in range(4):
        if factors.shape[-1] % 2:
            break
        left, right = factors.chunk(2, dim=-1)
        factors = left.mul_(right)
    result -= factors.log().sum(-1)
    return result.sub_(torch.clamp(logits, min=0, out=buffer).sum(-1))


class Scaled(TorchDistribution):
    """loc + scale y, with y from a distribution of real numbers without event dimensions.

    Args:
        base: that of y, batch shape ``(*)``.
        loc: broadcasts with ``(*)``.
        scale: positive, likewise.
    """

    arg_constraints = {}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(self, base: Any, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.base, self.loc, self.scale = base, loc, scale
        super().__init__(base.batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        low, high = (getattr(self.base.support, name, None) for name in ("lower_bound", "upper_bound"))
        if low is None and high is None:
            return constraints.real
        ends = [
            self.loc + self.scale * (end if end is not None else sign * float("inf"))
            for end, sign in ((low, -1), (high, 1))
        ]
        return constraints.interval(*ends)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Scaled":
        return Scaled(self.base.expand(batch_shape), self.loc, self.scale, self._validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(x)
        return self.base.log_prob((x - self.loc) / self.scale) - self.scale.log()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + self.scale * self.base.sample(sample_shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + self.scale * self.base.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.base.mean

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * self.base.variance


class _ColumnSupport(constraints.Constraint):
    """Each column in the support of its own distribution; discrete if all are, since else log p(x) is a density."""

    event_dim = 0

    def __init__(self, columns: "Columns"):
        self.columns = columns

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.support.is_discrete for part in self.columns.parts)

    def check(self, value: Tensor) -> Tensor:
        pairs = zip(self.columns.parts, self.columns.split(value), strict=True)
        return self.columns.join([part.support.check(mine) for part, mine in pairs])


class ExactNegativeBinomial(dist.NegativeBinomial):
    """Its log-probabilities are computed in double precision, where the device has it."""

    def log_prob(self, value: Tensor) -> Tensor:
        if value.device.type == "mps":
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        wide = torch.distributions.NegativeBinomial(
            self.total_count.double(), logits=self.logits.double(), validate_args=False
        )
        return wide.log_prob(value.double()).to(value)


class Columns(TorchDistribution):
    """Columns of several distributions, side by side along the last batch dimension.

    Args:
        parts: of batch shapes ``(*, n_i)`` and no event dimension.
        order: which columns of x they are, one after the other, shape ``(sum n_i,)``.
    """

    arg_constraints = {}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(self, parts: Sequence[Any], order: Tensor, validate_args: bool | None = None):
        self.parts, self.order = tuple(parts), order
        self.widths = [part.batch_shape[-1] for part in parts]
        super().__init__(torch.Size([*parts[0].batch_shape[:-1], sum(self.widths)]), validate_args=validate_args)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        return _ColumnSupport(self)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.has_rsample for part in self.parts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The columns of each part, ``(*, n_i)``."""
        return x[..., self.order].split(self.widths, -1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`split` splits."""
        return torch.cat(list(parts), -1)[..., self.order.argsort()]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Columns":
        parts = [part.expand((*batch_shape[:-1], n)) for part, n in zip(self.parts, self.widths, strict=True)]
        return Columns(parts, self.order, self._validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(x)
        return self.join([part.log_prob(mine) for part, mine in zip(self.parts, self.split(x), strict=True)])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.join([part.sample(sample_shape) for part in self.parts])

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.join([part.rsample(sample_shape) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        return self.join([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return self.join([part.variance for part in self.parts])


class FlowDistribution(TorchDistribution):
    """loc + exp(log_scale) * y with y from a zuko flow, given a context: what Pyro asks of a distribution.

    The density of its last draw is remembered: for an inverse autoregressive flow that is D times cheaper.

    Args:
        flow: a lazy zuko flow over D features.
        context: shape ``(*, C)``; None for a flow without context, of batch shape ``()``.
        loc: shape ``(*, D)``; None for zero.
        log_scale: shape ``(*, D)``; None for zero.
    """

    arg_constraints = {}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
    support = constraints.real_vector  # pyright: ignore[reportAssignmentType]
    has_rsample = True

    def __init__(
        self,
        flow: nn.Module,
        features: int,
        context: Tensor | None = None,
        loc: Tensor | None = None,
        log_scale: Tensor | None = None,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ):
        self.flow = flow
        self.context, self.loc, self.log_scale = context, loc, log_scale
        self._last: tuple[Tensor, Tensor] | None = None
        if batch_shape is None:
            batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(torch.Size(batch_shape), torch.Size([features]), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        return FlowDistribution(
            self.flow,
            self.event_shape[0],
            self.context,
            self.loc,
            self.log_scale,
            torch.Size(batch_shape),
            self._validate_args,
        )

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        if self.context is None:
            z, log_q = self.flow().rsample_and_log_prob(shape)
        else:
            z, log_q = self.flow(self.context.expand(*shape, -1)).rsample_and_log_prob()
        if self.loc is not None and self.log_scale is not None:
            z = self.loc + self.log_scale.exp() * z
            log_q = log_q - self.log_scale.sum(-1)
        self._last = (z, log_q)
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        if self._last is not None and z is self._last[0]:
            return self._last[1]
        if self.loc is not None and self.log_scale is not None:
            z = (z - self.loc) * torch.exp(-self.log_scale)
        log_q = self.flow(self.context).log_prob(z)
        return log_q if self.log_scale is None else log_q - self.log_scale.sum(-1)


def make_flow(
    features: int,
    context: int,
    architecture: Literal["autoregressive", "inverse_autoregressive", "coupling"],
    transform: Literal["affine", "spline"],
    transforms: int,
    hidden: Sequence[int],
) -> nn.Module:
    """A lazy zuko flow over a standard normal.

    Raises:
        ValueError: if there are fewer than two features, no transform or more than 1,000, or a width below 1.
    """
    if features < 2:
        raise ValueError(f"a flow needs at least 2 latent dimensions, got {features}")
    if not 1 <= transforms <= 1000:  # zuko makes lists of so many before anything else
        raise ValueError(f"transforms must be at least 1, and at most 1,000, got {transforms}")
    check_widths("hidden", hidden)
    zuko = import_zuko()
    bins = 8
    spline = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(bins,), (bins,), (bins - 1,)]}
    options = {"hidden_features": tuple(hidden)} | (spline if transform == "spline" else {})
    if architecture == "coupling":
        flow = zuko.flows.NICE(features, context, transforms, **options)
    else:
        flow = zuko.flows.MAF(features, context, transforms, **options)
    if architecture == "inverse_autoregressive":
        steps = [zuko.lazy.LazyInverse(step) for step in flow.transform.transforms]
        flow = zuko.lazy.Flow(steps, flow.base)
    return flow
