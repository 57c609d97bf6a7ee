"""A laboratory for variational autoencoders written as Pyro programs."""

from pyro_vae.diagnostics import active_units, effective_sample_size, estimate_elbo, pareto_k, pareto_k_threshold
from pyro_vae.evidence import Evidence, LinearGaussianVAE, importance_sampling, reduce_log_weights
from pyro_vae.likelihoods import (
    Bernoulli,
    Beta,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    LaplaceLikelihood,
    Likelihood,
    NegativeBinomial,
    Poisson,
)
from pyro_vae.log_weights import Traces, check_program, log_weights, posterior_samples, traces
from pyro_vae.networks import (
    MLP,
    ContractError,
    ConvDecoder,
    ConvEncoder,
    GatedMLP,
    Network,
    RecurrentDecoder,
    RecurrentEncoder,
)
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.posteriors import FlowPosterior, FullRank, LowRank, MeanField, Posterior
from pyro_vae.priors import (
    DiagonalNormal,
    FlowPrior,
    GaussianMixture,
    LaplacePrior,
    Prior,
    StandardNormal,
    StudentTPrior,
    UniformPrior,
    VampPrior,
)
from pyro_vae.svi import NonFiniteError, PyroSVI
from pyro_vae.training import CheckpointError, Epoch, fit
from pyro_vae.vae import VAE, Conditional, TwoLayerVAE

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "MLP",
    "VAE",
    "Bernoulli",
    "Beta",
    "Categorical",
    "CheckpointError",
    "Conditional",
    "ContinuousBernoulli",
    "ContractError",
    "ConvDecoder",
    "ConvEncoder",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "Epoch",
    "Evidence",
    "FlowPosterior",
    "FlowPrior",
    "FullRank",
    "GatedMLP",
    "Gaussian",
    "GaussianMixture",
    "LaplaceLikelihood",
    "LaplacePrior",
    "Likelihood",
    "LinearGaussianVAE",
    "LowRank",
    "MeanField",
    "NegativeBinomial",
    "Network",
    "NonFiniteError",
    "Objective",
    "Poisson",
    "Posterior",
    "Prior",
    "PyroSVI",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "StandardNormal",
    "StudentTPrior",
    "Traces",
    "TwoLayerVAE",
    "UniformPrior",
    "VampPrior",
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
