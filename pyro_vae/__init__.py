"""A laboratory for variational autoencoders written as Pyro programs."""

import importlib
from pathlib import Path

import lazy_loader

from pyro_vae import _moved

__version__ = "0.2.0.dev0"
# What is public is listed once, in __init__.pyi, for readers, type checkers and this; each name is imported at its
# first use, so that CompiledSVI alone can be had without waiting for data sets and plots.
_listed, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__path__.append(str(Path(__file__).with_name("_moved")))
_moved.register()


def __getattr__(name: str) -> object:
    if name not in __all__:
        return _moved.old("", name, stacklevel=3)
    return importlib.import_module(f"{__name__}.{name}") if name in _moved.SHORT else _listed(name)
