"""The main job: a VAE of MNIST as a Pyro program, trained by SVI, and its test log-likelihood with its error."""

from pyro_vae import cli, runs

if __name__ == "__main__":
    cli.guarded(runs.main)
