"""The old name of a command."""

from pyro_vae import cli, runs

if __name__ == "__main__":
    cli.guarded(runs.evaluate_main)
