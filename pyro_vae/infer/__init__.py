"""Stochastic variational inference and evidence for any amortized Pyro program; knows no VAE, no image, no file."""

from pyro_vae.infer import diagnostics, evidence, objectives
from pyro_vae.infer.checks import check_program
from pyro_vae.infer.compiled import CompiledSVI
from pyro_vae.infer.diagnostics import active_units, estimate_elbo
from pyro_vae.infer.engines import PyroSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.programs import log_weights, posterior_samples, traces
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.whole import WholeProgram

__all__ = [
    "CompiledSVI",
    "Latents",
    "Objective",
    "PyroSVI",
    "WholeProgram",
    "active_units",
    "check_program",
    "diagnostics",
    "estimate_elbo",
    "evidence",
    "log_weights",
    "objectives",
    "posterior_samples",
    "traces",
]
