"""The ELBO written by hand, without Pyro: as a lecture derives it, and the yardstick for the Pyro programs.

For q(z | x) = N(mu, diag(sigma^2)), p(z) = N(0, I) and a Bernoulli decoder with logits l(z)
(Kingma & Welling 2014, equation 10 and appendix B):

    ELBO = -CE(x, l(mu + sigma * eps)) - KL,     KL = 1/2 sum_d (mu_d^2 + sigma_d^2 - 1 - 2 log sigma_d)
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) of Bernoulli pixels, summed over the last dimension: ``(*, X), (*, X) -> (*)``, nats per datum."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def gaussian_kl(loc: Tensor, log_scale: Tensor) -> Tensor:
    """KL(N(loc, exp(log_scale)^2) || N(0, I)) in closed form: ``(*, D), (*, D) -> (*)``, nats per datum.

    >>> gaussian_kl(torch.tensor([1.0, 0.0]), torch.zeros(2)).item()
    0.5
    """
    return 0.5 * (loc.square() + torch.exp(2 * log_scale) - 1 - 2 * log_scale).sum(-1)


def sampled_gaussian_kl(loc: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    """log q(z) - log p(z) at z = loc + exp(log_scale) * noise, whose mean over standard normal noise is the KL.

    ``(*, D), (*, D), (*, D) -> (*)``, nats per datum.
    """
    z = loc + log_scale.exp() * noise
    log_q = (-0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
    log_p = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(-1)
    return log_q - log_p


def elbo(
    encoder: Callable[[Tensor], Tensor],
    decoder: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: Tensor | None = None,
    sampled_kl: bool = False,
) -> Tensor:
    """One-sample ELBO of each observation: shape ``(B,)``, nats per datum, larger is better.

    Args:
        encoder: maps ``(B, X)`` to ``(B, 2 D)``, the means and then the log scales of q(z | x).
        decoder: maps ``(B, D)`` to logits ``(B, X)``.
        x: binary observations, shape ``(B, X)``.
        noise: the standard normal eps, shape ``(B, D)``; drawn if not given.
        sampled_kl: use the one-sample estimate of the KL divergence, as ``Trace_ELBO`` does, in place of the
            closed form, as ``TraceMeanField_ELBO`` does.
    """
    loc, log_scale = encoder(x).chunk(2, dim=-1)
    noise = torch.randn_like(loc) if noise is None else noise
    reconstruction = -cross_entropy(decoder(loc + log_scale.exp() * noise), x)
    kl = sampled_gaussian_kl(loc, log_scale, noise) if sampled_kl else gaussian_kl(loc, log_scale)
    return reconstruction - kl
