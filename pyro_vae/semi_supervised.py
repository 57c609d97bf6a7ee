"""Semi-supervised learning: a VAE of observations and their classes, of which many are unknown (M2)."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyro_vae.errors import ContractError, check_at_least_one
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data, call
from pyro_vae.parts.conditional import Conditional
from pyro_vae.parts.missing import Incomplete, of_seen
from pyro_vae.parts.networks import Network
from pyro_vae.parts.posteriors import Posterior
from pyro_vae.parts.wiring import encoded, scored
from pyro_vae.vae import ConditionalVAE

__all__ = ["SemiSupervisedELBO", "SemiSupervisedVAE"]

UNKNOWN = -1
"""The label of an observation whose class nobody told."""
LEAST = -80.0
"""The least log q(y | x) of a class in a sum over all: in float32 its exponential is still no zero, which Pyro would
leave out of the sum, so that each step would be another graph; what it adds is lost in rounding."""


class SemiSupervisedVAE(nn.Module):
    """A VAE of x and its class y, which is known of some data alone: M2 of Kingma, Rezende, Mohamed & Welling (2014).

        p(x, y, z) = p(y) p(z | y) p(x | z, y)        q(y, z | x) = q(y | x) q(z | x, y)

    ``model`` and ``guide`` are Pyro programs of observations ``x``, shape ``(B, X)``, and labels ``y``, integers
    ``(B,)`` from 0 to L - 1, or -1 where unknown, with the sites ``"y_observed"`` and ``"y_unobserved"``, masked apart,
    and those of a :class:`ConditionalVAE`. The guide's ``"y_unobserved"`` is marked for enumeration: Pyro's
    ``TraceEnum_ELBO``, and :class:`SemiSupervisedELBO`, sum an unknown class out exactly, all classes at once. Where
    the class is known, the guide is certain of it, and the bound is that of log p(x, y).

    Other bounds and estimators draw y from q(y | x); those that follow gradients of draws or of log-densities refuse
    it. For them there are ``marginal_model`` and ``marginal_guide``, programs of the same arguments whose one latent
    site is ``"z"``: they give log p(x) where the class is unknown, and log p(x, y) where it is known. ``conditional``
    has the programs of log p(x | y) for given classes, of which :func:`pyro_vae.class_posterior` makes p(y | x).

    Args:
        conditional: p(x, z | y) and q(z | x, y), of L conditions: the class as 0 and 1.
        classifier: q(y | x), a network from X features to L log-odds.
        class_prob: p(y), positive, shape ``(L,)``; None: all alike.

    Raises:
        ValueError: if the parts disagree about the number of classes or of pixels, or about missing values.

    >>> from pyro_vae import MLP, Bernoulli, MeanField, StandardNormal
    >>> vae = SemiSupervisedVAE(
    ...     ConditionalVAE(
    ...         StandardNormal(2),
    ...         likelihood=Conditional(MLP(2 + 10, 784), Bernoulli(784)),
    ...         posterior=Conditional(MLP(784 + 10, 4), MeanField(2)),
    ...         condition_dim=10,
    ...     ),
    ...     classifier=MLP(784, 10),
    ... )
    >>> vae.classify(torch.zeros(3, 784)).shape
    torch.Size([3, 10])
    """

    log_prior: Tensor

    def __init__(self, conditional: ConditionalVAE, classifier: Network, class_prob: Tensor | None = None):
        super().__init__()
        self.num_classes = classes = conditional.condition_dim
        read, pixels = classifier.in_features, conditional.likelihood.head.event_size
        if classes < 2 or (read, classifier.out_features) != (pixels, classes):
            raise ValueError(
                f"the classifier must map {pixels} pixels to {classes} classes, at least 2, it maps {read} to "
                f"{classifier.out_features}"
            )
        if isinstance(classifier, Incomplete) != isinstance(conditional.posterior.network, Incomplete):
            raise ValueError("encoder and classifier must both be Incomplete, which know what is missing, or neither")
        weight = torch.ones(classes) if class_prob is None else class_prob
        if weight.shape != (classes,) or not ((weight > 0) & weight.isfinite()).all():
            raise ValueError(f"class_prob must be {classes} positive numbers, got {weight.tolist()}")
        self.conditional = conditional
        self.classifier = Conditional(classifier, _Classes(classes))
        self.register_buffer("log_prior", weight.log().log_softmax(-1).to(next(conditional.parameters())))

    def model(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, y, z) for observations ``x``, labels ``y``, and what was ``seen`` of x, shape ``(B, X)``."""
        vae, known = self.conditional, self._known(x, y)
        x, seen = scored(x, seen, vae.posterior, vae.likelihood)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            self._observe(y, known)
            with _unless(known):
                drawn = pyro.sample("y_unobserved", self._prior())
            c = self._one_of_them(torch.where(known, y, drawn))
            z = pyro.sample("z", vae.prior_given(c))
            return pyro.sample("x", of_seen(vae.likelihood_given(z, c), seen, vae.likelihood.head), obs=x)

    def guide(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(y, z | x) for observations ``x``, labels ``y``, and what was ``seen`` of x, shape ``(B, X)``."""
        vae, known = self.conditional, self._known(x, y)
        log_q = self._where_known(known, y, self.classify(x, seen).clamp(min=LEAST), LEAST)
        x = encoded(x, seen, vae.posterior)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            with _unless(known):
                drawn = pyro.sample("y_unobserved", dist.Categorical(logits=log_q), infer={"enumerate": "parallel"})
            c = self._one_of_them(torch.where(known, y, drawn))
            return pyro.sample("z", vae.posterior_given(x, c))

    def marginal_model(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z) where y is unknown, p(x, y, z) where it is known: y is summed out inside."""
        vae, known = self.conditional, self._known(x, y)
        every = torch.eye(self.num_classes).to(x)
        x, seen = scored(x, seen, vae.posterior, vae.likelihood)
        log_p = self._where_known(known, y, self.log_prior.expand(len(x), -1), -torch.inf)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            self._observe(y, known)
            prior = vae.prior_given(every)
            z = pyro.sample("z", _mixture(log_p, prior) if vae.prior_sees else prior)
            if vae.prior_sees:
                log_p = log_p + prior.log_prob(z.unsqueeze(-2))
            made = vae.likelihood_given(z.unsqueeze(-2), every)
            seen = None if seen is None else seen.unsqueeze(-2)
            return pyro.sample("x", _mixture(log_p, of_seen(made, seen, vae.likelihood.head)), obs=x)

    def marginal_guide(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(z | x), a mixture over y of q(z | x, y) with weights q(y | x); q(z | x, y) where y is known."""
        vae, known = self.conditional, self._known(x, y)
        log_q = self._where_known(known, y, self.classify(x, seen), -torch.inf)
        x = encoded(x, seen, vae.posterior)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            made = vae.posterior_given(x.unsqueeze(-2), torch.eye(self.num_classes).to(x))
            return pyro.sample("z", _mixture(log_q, made))

    def classify(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """log q(y | x) of each class, ``(B, L)``."""
        made: Any = self.classifier(encoded(x, seen, self.classifier))
        return made.logits

    def told(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which classes are known, ``(B,)``, and log q(y | x) of those, zero of others, ``(B,)``."""
        known = self._known(x, y)
        log_q = self.classify(x, seen).gather(-1, torch.where(known, y, 0).long().unsqueeze(-1)).squeeze(-1)
        return known, torch.where(known, log_q, 0.0)

    def initialize(self, x: Tensor, y: Tensor) -> None:
        """Start every part from training data, ``(N, X)`` and ``(N,)``. Call once, before making the optimizer."""
        self._known(x, y)
        self.conditional.initialize(x, self._one_of_them(y).to(x))
        self.classifier.initialize(x, self.conditional.likelihood.head)

    def _prior(self) -> Any:
        return dist.Categorical(logits=self.log_prior)

    def _observe(self, y: Tensor, known: Tensor) -> None:
        with _unless(~known):
            y = torch.where(known, y, 0).long()  # what is masked must be possible
            pyro.sample("y_observed", self._prior(), obs=y)

    def _one_of_them(self, y: Tensor) -> Tensor:
        """Classes ``(*)`` as 0 and 1, ``(*, L)``; all 0 where unknown."""
        return (y.unsqueeze(-1) == torch.arange(self.num_classes, device=y.device)).to(self.log_prior)

    def _where_known(self, known: Tensor, y: Tensor, log_p: Tensor, least: float) -> Tensor:
        """Log-probabilities ``(B, L)``, certain of the class where it is known."""
        certain = torch.where(self._one_of_them(y) > 0, 0.0, least)
        return torch.where(known.unsqueeze(-1), certain.to(log_p), log_p)

    def _known(self, x: Tensor, y: Tensor) -> Tensor:
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ContractError(
                f"labels of {len(x)} observations must be integers of shape {(len(x),)}, {UNKNOWN} where unknown, they "
                f"are of {y.dtype} and shape {tuple(y.shape)}"
            )
        known = y != UNKNOWN
        if y.device.type == "cpu" and (wrong := known & ((y < 0) | (y >= self.num_classes))).any():
            row = int(wrong.nonzero()[0])
            raise ContractError(
                f"the label of row {row} is {int(y[row])}, it must be from 0 to {self.num_classes - 1}, or {UNKNOWN} "
                "where unknown"
            )
        return known


class SemiSupervisedELBO(Objective):
    """The bound of Kingma et al. (2014), equations 6 to 9: unknown classes are summed out, all at once.

    The mean over the batch of L(x, y), the ELBO of log p(x, y), plus alpha log q(y | x), where y is known, and of
    sum_y q(y | x) (L(x, y) - log q(y | x)) where it is not. Value and pathwise gradient are unbiased. With alpha = 0 it
    is Pyro's ``TraceEnum_ELBO``, divided by the batch size.

    Args:
        vae: what it trains; model and guide are its programs.
        alpha: weight of log q(y | x) of a datum whose class is known, at least 0. The paper's is 0.1 N / M, if the
            classes of M of N data are known.
        known_weight: weight in the mean of a datum whose class is known, positive: below 1 if batches hold more of them
            than the data; (M / m) / ((N - M) / n), if each batch has m of them and n others.
        num_particles: K, samples of z per datum and class, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, vae: SemiSupervisedVAE, alpha: float = 0.0, known_weight: float = 1.0, num_particles: int = 1):
        check_at_least_one(num_particles=num_particles)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
        if not 0 < known_weight < math.inf:
            raise ValueError(f"known_weight must be positive and finite, got {known_weight}")
        self.vae, self.alpha, self.known_weight, self.num_particles = vae, alpha, known_weight, num_particles
        self._sum = TraceEnum_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        known, told = call(self.vae.told, data)
        weight = torch.where(known, self.known_weight, 1.0).to(told)
        weight = weight / weight.sum()
        scaled: Any = (poutine.scale(program, scale=weight) for program in (model, guide))
        loss: Any = call(partial(self._sum.differentiable_loss, *scaled), data)
        return loss - self.alpha * (weight * told).sum()


class _Classes(Posterior):
    """One of L classes, as 0 and 1, of log-odds."""

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim,)

    def forward(self, logits: Tensor) -> Any:
        return dist.OneHotCategorical(logits=logits)


def _unless(known: Any) -> Any:
    """Context: what is sampled inside counts where the class is not known."""
    return poutine.mask(mask=~known)


def _mixture(log_weight: Tensor, parts: Any) -> Any:
    """The mixture of distributions of batch shape ``(*, L)``, with weights of this shape."""
    log_weight = log_weight.expand(*parts.batch_shape[: -log_weight.dim()], *log_weight.shape)
    return dist.MixtureSameFamily(dist.Categorical(logits=log_weight), parts.expand(log_weight.shape))
