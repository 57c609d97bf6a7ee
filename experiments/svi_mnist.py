"""The main job: a VAE of MNIST as a Pyro program, trained by SVI, and its test log-likelihood with its error."""

from pyro_vae import runs

if __name__ == "__main__":
    runs.cli(runs.main)
