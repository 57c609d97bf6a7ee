"""What every estimator of log p(x) returns."""

from typing import NamedTuple

import xarray as xr
from torch import Tensor


class Evidence(NamedTuple):
    """Estimates of log p(x) with errors and diagnostics, one entry per observation; NaN where an estimator has none.

    Attributes:
        log_px: log p(x), nats, shape ``(B,)``.
        mc_se: its Monte Carlo standard error, nats.
        ess: effective sample size of the weights.
        khat: Pareto shape of the largest weights; above :func:`pyro_vae.pareto_k_threshold` neither ``log_px`` nor
            ``mc_se`` can be trusted.
        num_invalid: how many log-weights were NaN or infinite. A weight of zero (log-weight ``-inf``) counts in the
            average as zero; a NaN makes ``log_px`` NaN.
        acceptance: acceptance rate of the estimator's Markov transitions.
    """

    log_px: Tensor
    mc_se: Tensor
    ess: Tensor
    khat: Tensor
    num_invalid: Tensor
    acceptance: Tensor

    def mean(self) -> tuple[float, float, float]:
        """Mean of ``log_px``, its standard error over observations, and its Monte Carlo error alone, in nats.

        The first error is std(log_px) / sqrt(B): how far another test set of this size would differ. The second is
        sqrt(sum mc_se^2) / B: how far another run of the estimator on the same observations would.
        """
        size = self.log_px.numel()
        over_data = self.log_px.std(correction=1).item() / size**0.5 if size > 1 else float("nan")
        return self.log_px.mean().item(), over_data, self.mc_se.square().sum().sqrt().item() / size

    def to_datatree(self, group: str = "importance", **attributes) -> xr.DataTree:
        """One variable per field along the dimension ``image``, in ``group``; ``attributes`` describe the estimate."""
        data = {name: ("image", value.detach().cpu().numpy()) for name, value in self._asdict().items()}
        return xr.DataTree.from_dict({group: xr.Dataset(data, attrs=attributes)})
