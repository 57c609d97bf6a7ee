"""A laboratory for variational autoencoders written as Pyro programs."""

from pyro_vae.diagnostics import active_units, effective_sample_size, estimate_elbo, pareto_k, pareto_k_threshold
from pyro_vae.evidence import Evidence, LinearGaussianVAE, importance_sampling, reduce_log_weights
from pyro_vae.likelihoods import Bernoulli, Likelihood
from pyro_vae.log_weights import Traces, check_program, log_weights, posterior_samples, traces
from pyro_vae.networks import MLP, ContractError, Network
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.posteriors import MeanField, Posterior
from pyro_vae.priors import Prior, StandardNormal
from pyro_vae.svi import NonFiniteError, PyroSVI
from pyro_vae.training import CheckpointError, Epoch, fit
from pyro_vae.vae import VAE, Conditional

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "MLP",
    "VAE",
    "Bernoulli",
    "CheckpointError",
    "Conditional",
    "ContractError",
    "Epoch",
    "Evidence",
    "Likelihood",
    "LinearGaussianVAE",
    "MeanField",
    "Network",
    "NonFiniteError",
    "Objective",
    "Posterior",
    "Prior",
    "PyroSVI",
    "StandardNormal",
    "Traces",
    "active_units",
    "check_program",
    "effective_sample_size",
    "estimate_elbo",
    "fit",
    "importance_sampling",
    "log_weights",
    "pareto_k",
    "pareto_k_threshold",
    "posterior_samples",
    "reduce_log_weights",
    "traces",
]
