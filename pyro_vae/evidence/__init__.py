"""Estimators of log p(x), each with its error and diagnostics."""

from pyro_vae.evidence.annealed import (
    CREMER_2018,
    WU_2017,
    Annealing,
    Sandwich,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
)
from pyro_vae.evidence.exact import ExactGaps, LinearGaussianVAE, enumeration, quadrature
from pyro_vae.evidence.gaps import InferenceGaps, LocalPosterior, inference_gaps, local_flow, local_mean_field
from pyro_vae.evidence.importance import importance_sampling, reduce_log_weights
from pyro_vae.evidence.laplace import Coordinates, laplace_approximation
from pyro_vae.evidence.latents import Latents
from pyro_vae.evidence.result import Evidence, difference_estimate

__all__ = [
    "CREMER_2018",
    "WU_2017",
    "Annealing",
    "Coordinates",
    "Evidence",
    "ExactGaps",
    "InferenceGaps",
    "Latents",
    "LinearGaussianVAE",
    "LocalPosterior",
    "Sandwich",
    "annealed_importance_sampling",
    "bidirectional_monte_carlo",
    "difference_estimate",
    "enumeration",
    "importance_sampling",
    "inference_gaps",
    "laplace_approximation",
    "local_flow",
    "local_mean_field",
    "quadrature",
    "reduce_log_weights",
]
