"""What Python code names: the globals that it reads, the attributes that it reads and sets."""

import dis
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

_LIBRARIES = frozenset(
    ("torch", "pyro", "numpy", "pandas", "scipy", "zuko", "opt_einsum", "pyro_vae", *sys.stdlib_module_names)
) - {"__main__"}
_OF_ALL_ATTRIBUTES = frozenset(("__dict__", "__getattribute__", "asdict", "astuple", "attrgetter", "getattr", "vars"))
"""Ways to read attributes that code does not name."""


def is_library(name: object) -> bool:
    """Whether a module of this name is the library's own, torch's or Pyro's, whose code holds no settings."""
    return isinstance(name, str) and name.split(".", 1)[0] in _LIBRARIES and not name.startswith("pyro_vae.parts")


class Read(NamedTuple):
    """The names in some code, also within the functions that it makes.

    Attributes:
        read: of globals and attributes.
        of_globals: those of globals alone.
        written: of attributes that it sets, or may ask for by a string.
        imported: of modules that it imports.
    """

    read: frozenset[str]
    of_globals: frozenset[str]
    written: frozenset[str]
    imported: frozenset[str]


class Names:
    """All names in the code that was reached.

    Attributes:
        read, written: as in :class:`Read`.
    """

    def __init__(self):
        self.read: set[str] = set()
        self.written: set[str] = set()

    def add(self, code: Read) -> None:
        self.read |= code.read
        self.written |= code.written

    @property
    def is_dynamic(self) -> bool:
        """Whether any attribute may be read."""
        return not self.read.isdisjoint(_OF_ALL_ATTRIBUTES)


@lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> Read:
    """The names in code."""
    read: set[str] = set(code.co_names)
    of_globals: set[str] = set()
    written: set[str] = set()
    imported: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            of_globals.add(instruction.argval)
        elif instruction.opname == "STORE_ATTR":
            written.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imported.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_in(constant)
            read |= inner.read
            of_globals |= inner.of_globals
            written |= inner.written
            imported |= inner.imported
        elif isinstance(constant, str) and constant.isidentifier():
            written.add(constant)
    return Read(frozenset(read), frozenset(of_globals), frozenset(written), frozenset(imported))


@lru_cache(maxsize=1024)
def names_of_libraries(kind: type) -> frozenset[str]:
    """What a class has of libraries' classes, and what their code names: methods that they call, and so on."""

    def found() -> Iterator[str]:
        for base in kind.__mro__:
            if is_library(base.__module__) and base is not object:
                yield from vars(base)
                for value in vars(base).values():
                    each = getattr(value, "__func__", getattr(value, "fget", value))
                    if isinstance(each, types.FunctionType):
                        yield from names_in(each.__code__).read

    return frozenset(found())
