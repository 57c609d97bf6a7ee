"""The old name of ``pyro_vae.data``."""

import warnings

from pyro_vae.data import *  # noqa: F403

warnings.warn("experiments.datasets is now pyro_vae.data", DeprecationWarning, stacklevel=2)
