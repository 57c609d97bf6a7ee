"""The parts of a VAE: networks, and the priors, likelihoods and posteriors that are made of distributions."""

from pyro_vae.parts import distributions, likelihoods, missing, mixed, networks, pixels, posteriors, priors

__all__ = ["distributions", "likelihoods", "missing", "mixed", "networks", "pixels", "posteriors", "priors"]
