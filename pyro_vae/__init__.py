"""A laboratory for variational autoencoders written as Pyro programs."""

import lazy_loader

__version__ = "0.1.0"
# What is public is listed once, in __init__.pyi, for readers, type checkers and this; each name is imported at its
# first use, so that who needs CompiledSVI alone does not wait for data sets and plots.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
