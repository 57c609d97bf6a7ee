"""Differences of log p(x) between finished runs: the old name of ``pyro-vae compare``."""

import warnings

from pyro_vae import cli


def main() -> None:
    """``pyro-vae compare``, with a warning."""
    warnings.warn("python -m experiments.compare is now pyro-vae compare", DeprecationWarning, stacklevel=2)
    cli.compare()


if __name__ == "__main__":
    cli.guarded(main)
