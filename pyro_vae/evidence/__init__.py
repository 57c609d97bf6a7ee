"""Estimators of log p(x), each with its error and diagnostics."""

from pyro_vae.evidence.exact import LinearGaussianVAE
from pyro_vae.evidence.importance import importance_sampling, reduce_log_weights
from pyro_vae.evidence.result import Evidence

__all__ = ["Evidence", "LinearGaussianVAE", "importance_sampling", "reduce_log_weights"]
