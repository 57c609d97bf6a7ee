"""Training objectives: bounds on log p(x), each a reduction of the log-weights."""

from abc import ABC, abstractmethod

from torch import Tensor

from pyro_vae.log_weights import Program, check_pathwise, log_weights_of, traces


class Objective(ABC):
    """``objective(model, guide, x)`` is a scalar loss: minus the bound, averaged over the batch, in nats per datum."""

    @abstractmethod
    def __call__(self, model: Program, guide: Program, x: Tensor) -> Tensor:
        """The loss for observations ``x``, shape ``(B, X)``; its gradient is an estimate of the bound's."""


class ELBO(Objective):
    """The evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014, equation 2).

    The gradient is the pathwise one of the sampled bound, unbiased for reparametrized guides: that of Pyro's
    ``Trace_ELBO``, divided by the batch size.

    Args:
        num_particles: samples of z per observation, at least 1.

    Raises:
        ValueError: if ``num_particles`` is below 1.
        ContractError: when called, if draws of the guide have no gradient.
    """

    def __init__(self, num_particles: int = 1):
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        self.num_particles = num_particles

    def __call__(self, model: Program, guide: Program, x: Tensor) -> Tensor:
        both = traces(model, guide, x, self.num_particles)
        check_pathwise(both.guide)
        return -log_weights_of(both).mean()
