from pyro_vae._moved import shorten

shorten("priors")
