"""A finished run scored again: the old name of ``pyro-vae evaluate``."""

import warnings

from pyro_vae import cli


def main() -> None:
    """``pyro-vae evaluate``, with a warning."""
    warnings.warn("python -m experiments.evaluate is now pyro-vae evaluate", DeprecationWarning, stacklevel=2)
    cli.evaluate()


if __name__ == "__main__":
    cli.guarded(main)
