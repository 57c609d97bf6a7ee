"""``python -m pyro_vae`` is the command ``pyro-vae``."""

from pyro_vae import cli

if __name__ == "__main__":
    cli.main()
