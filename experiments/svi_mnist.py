"""The main job: a VAE of MNIST as a Pyro program, trained by SVI, and its test log-likelihood with its error.

``python -m experiments.svi_mnist`` is ``pyro-vae train``.
"""

import warnings
from typing import Any

from pyro_vae import cli


def __getattr__(name: str) -> Any:
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pyro_vae.runs import load_model

    warnings.warn("load_run(directory) is now pyro_vae.runs.load(directory).model", DeprecationWarning, stacklevel=2)
    return load_model


if __name__ == "__main__":
    cli.guarded(cli.train)
