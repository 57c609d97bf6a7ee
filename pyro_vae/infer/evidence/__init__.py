"""Estimators of log p(x), each with its error and diagnostics."""

from pyro_vae.infer.evidence.annealed import (
    Sandwich,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
)
from pyro_vae.infer.evidence.annealing import CREMER_2018, WU_2017, Annealing
from pyro_vae.infer.evidence.bridge import bridge_sampling
from pyro_vae.infer.evidence.classes import ClassPosterior, class_posterior
from pyro_vae.infer.evidence.conditional import log_conditional
from pyro_vae.infer.evidence.distortion import RateDistortion, Tempering, rate_distortion
from pyro_vae.infer.evidence.exact import enumeration, quadrature
from pyro_vae.infer.evidence.gaps import InferenceGaps, inference_gaps
from pyro_vae.infer.evidence.importance import importance_sampling
from pyro_vae.infer.evidence.imputation import Imputation, impute
from pyro_vae.infer.evidence.laplace import Coordinates, laplace_approximation
from pyro_vae.infer.evidence.local import LocalPosterior, local_flow, local_mean_field
from pyro_vae.infer.evidence.particles import SMC
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.result import Evidence, difference_estimate
from pyro_vae.infer.evidence.reverse import sandwich
from pyro_vae.infer.evidence.smc import smc
from pyro_vae.infer.evidence.thermodynamic import Thermodynamic, thermodynamic_integration
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.evidence.whole import BayesFactor, bayes_factor, model_evidence

__all__ = [
    "CREMER_2018",
    "SMC",
    "WU_2017",
    "Annealing",
    "BayesFactor",
    "ClassPosterior",
    "Coordinates",
    "Evidence",
    "Imputation",
    "InferenceGaps",
    "LocalPosterior",
    "PosteriorChains",
    "RateDistortion",
    "Sandwich",
    "Tempering",
    "Thermodynamic",
    "annealed_importance_sampling",
    "bayes_factor",
    "bidirectional_monte_carlo",
    "bridge_sampling",
    "class_posterior",
    "difference_estimate",
    "enumeration",
    "importance_sampling",
    "impute",
    "inference_gaps",
    "laplace_approximation",
    "local_flow",
    "local_mean_field",
    "log_conditional",
    "model_evidence",
    "quadrature",
    "rate_distortion",
    "reduce_log_weights",
    "sandwich",
    "smc",
    "thermodynamic_integration",
]
