"""What every part promises, as checks to run on parts of your own, under pytest or anywhere else.

Each check takes what makes a part, a class or a function of its sizes, returns nothing if the part keeps its contract,
and else raises a :class:`pyro_vae.ContractError` of one line: what is wrong, and what was expected. Random numbers are
drawn from a fixed seed, and the global generator stays as it was.

What a check cannot tell, it passes: whether a density of very many dimensions integrates to one, for example. So make
small parts for it.
"""

from pyro_vae.testing.objectives import check_objective
from pyro_vae.testing.parts import check_likelihood, check_network, check_posterior, check_prior

__all__ = ["check_likelihood", "check_network", "check_objective", "check_posterior", "check_prior"]
