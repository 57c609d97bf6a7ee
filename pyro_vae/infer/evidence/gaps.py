"""Inference gaps: what the family of q(z | x), and what amortizing it, cost an ELBO."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.local import (
    LocalPosterior,
    check_draws,
    check_positive,
    local_flow,
    local_mean_field,
    mean_log_weight,
)
from pyro_vae.infer.evidence.result import Evidence, mean_and_errors
from pyro_vae.infer.programs import Program, log_weights
from pyro_vae.infer.randomness import without_effect
from pyro_vae.infer.trees import Data, data_size, select

Family = Literal["mean_field", "flow"]


class InferenceGaps(NamedTuple):
    """Bounds on log p(x) of B observations, each with its Monte Carlo standard error; nats, shape ``(B,)``.

    They are taken apart as in Cremer, Li & Duvenaud 2018, section 3, equations 3 and 4, with q* the best of a family:

        log p(x) - L[q] = (log p(x) - L[q*]) + (L[q*] - L[q]) = approximation gap + amortization gap

    Attributes:
        log_px: log p(x), as given.
        elbo: L[q] of the guide.
        elbo_mean_field: L[q*] of factorized Gaussians.
        elbo_flow: L[q*] of flows.
        log_px_se, elbo_se, elbo_mean_field_se, elbo_flow_se: their Monte Carlo errors.
    """

    log_px: Tensor
    elbo: Tensor
    elbo_mean_field: Tensor
    elbo_flow: Tensor
    log_px_se: Tensor
    elbo_se: Tensor
    elbo_mean_field_se: Tensor
    elbo_flow_se: Tensor

    def inference_gap(self) -> tuple[Tensor, Tensor]:
        """log p(x) - L[q], all that the guide loses, and its Monte Carlo error: ``(B,)`` each, nats."""
        return self.log_px - self.elbo, torch.hypot(self.log_px_se, self.elbo_se)

    def approximation_gap(self, family: Family = "mean_field") -> tuple[Tensor, Tensor]:
        """log p(x) - L[q*], what the best of ``family`` loses, and its Monte Carlo error: ``(B,)`` each, nats."""
        best, error = self._best(family)
        return self.log_px - best, torch.hypot(self.log_px_se, error)

    def amortization_gap(self, family: Family = "mean_field") -> tuple[Tensor, Tensor]:
        """L[q*] - L[q], what one network for all observations loses, and its Monte Carlo error: ``(B,)`` each, nats.

        ``family`` must be the guide's own; otherwise this is not a gap of amortization, and may be negative.
        """
        best, error = self._best(family)
        return best - self.elbo, torch.hypot(error, self.elbo_se)

    def mean(self) -> dict[str, tuple[float, float, float]]:
        """Of each bound and gap: the mean, its standard error over observations, and its Monte Carlo error, in nats.

        The errors are those of :meth:`pyro_vae.Evidence.mean`. Keys: ``log_px``, ``elbo``, ``elbo_mean_field``,
        ``elbo_flow``, ``inference_gap``, and for both families ``approximation_gap_mean_field``,
        ``amortization_gap_mean_field``, ``approximation_gap_flow``, ``amortization_gap_flow``.
        """
        values = {name: (getattr(self, name), getattr(self, f"{name}_se")) for name in self._fields[:4]}
        values["inference_gap"] = self.inference_gap()
        for family in ("mean_field", "flow"):
            values[f"approximation_gap_{family}"] = self.approximation_gap(family)
            values[f"amortization_gap_{family}"] = self.amortization_gap(family)
        return {name: mean_and_errors(value, error) for name, (value, error) in values.items()}

    def _best(self, family: Family) -> tuple[Tensor, Tensor]:
        if family == "mean_field":
            return self.elbo_mean_field, self.elbo_mean_field_se
        if family == "flow":
            return self.elbo_flow, self.elbo_flow_se
        raise ValueError(f"family must be mean_field or flow, got {family}")


def inference_gaps(
    model: Program,
    guide: Program,
    log_px: Tensor | Evidence,
    data: Data,
    mean_field: LocalPosterior | None = None,
    flow: LocalPosterior | None = None,
    num_steps: int = 300,
    num_samples: int = 1000,
    batch_size: int | None = None,
    progress: bool = False,
) -> InferenceGaps:
    """What the guide's family, and what amortizing it, cost on each observation (Cremer, Li & Duvenaud 2018).

    q* is found by :func:`local_mean_field` and, from there, by :func:`local_flow`; the three bounds are then estimated
    from draws of their own. An optimum that is not reached, or log p(x) that is low, moves nats from one gap to
    another: more steps must not change the gaps, and log p(x) must come from an estimator that can be trusted.

    Args:
        model, guide: see :func:`pyro_vae.traces`; the latent variables continuous.
        log_px: log p(x) of the observations, shape ``(N,)``: a tensor, taken to be exact, or evidence.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        mean_field: local mean fields of the observations, if made already, with settings of their own.
        flow: local flows, likewise.
        num_steps: steps of each optimization that is left to do.
        num_samples: samples per observation that estimate each bound, at least 2.
        batch_size: has no effect any more; blocks are of one size, so that numbers do not depend on it.
        progress: show progress bars.

    Raises:
        ValueError: if ``log_px`` has another shape, a setting is out of its range, ``mean_field`` or ``flow`` is of
            other observations, or as :func:`pyro_vae.check_program`.
        ContractError: see :func:`local_mean_field`.
    """
    values, errors = (log_px.log_px, log_px.mc_se) if isinstance(log_px, Evidence) else (log_px, None)
    if values.shape != (data_size(data),):
        raise ValueError(
            f"log_px must have one value for each of {data_size(data)} observations, got {tuple(values.shape)}"
        )
    without_effect(batch_size)
    check_positive(num_steps=num_steps)
    check_draws(num_samples)
    if mean_field is None:
        mean_field = local_mean_field(model, guide, data, num_steps, progress=progress)
    if flow is None:
        flow = local_flow(model, guide, data, mean_field, num_steps, progress=progress)

    def weigh(among: slice) -> Callable[[int], Tensor]:
        return partial(log_weights, model, guide, select(data, among))

    bounds = [
        mean_log_weight(model, guide, data, weigh, num_samples),
        mean_field.elbo(model, guide, data, num_samples),
        flow.elbo(model, guide, data, num_samples),
    ]
    (elbo, elbo_mean_field, elbo_flow), bound_errors = zip(*bounds, strict=True)
    values = values.to(elbo)
    errors = torch.zeros_like(values) if errors is None else errors.to(elbo)
    return InferenceGaps(values, elbo, elbo_mean_field, elbo_flow, errors, *bound_errors)
