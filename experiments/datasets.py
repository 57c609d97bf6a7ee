"""The old name of pyro_vae.data."""

from pyro_vae.data import *  # noqa: F403
