"""The old name of a command."""

from pyro_vae import runs

if __name__ == "__main__":
    runs.cli(runs.evaluate_main)
