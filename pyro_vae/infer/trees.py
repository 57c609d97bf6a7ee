"""The data of a program: a tensor, or a tuple or dict of tensors, whose first dimension is the datum."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from pyro_vae.errors import ContractError

Data = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a program is called with: ``program(x)`` for a tensor, ``program(*data)`` for a tuple or list, and
``program(**data)`` for a dict. Tensors may be nested deeper; every one has one row per datum."""


class Arguments(NamedTuple):
    """Data of a program that takes both positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(program: Callable[..., Any], data: Data) -> Any:
    """Call ``program`` with ``data``."""
    if isinstance(data, Arguments):
        return program(*data.args, **data.kwargs)
    if isinstance(data, Mapping):
        return program(**data)
    if isinstance(data, tuple | list):
        return program(*data)
    return program(data)


def as_data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Data:
    """The data with which :func:`call` passes these arguments."""
    if kwargs:
        return Arguments(args, kwargs) if args else kwargs
    return args[0] if len(args) == 1 else args


def with_arguments(data: Data, **more: Tensor) -> Data:
    """The data with which :func:`call` passes arguments of these names as well."""
    if isinstance(data, Mapping):
        return {**data, **more}
    if isinstance(data, Arguments):
        return Arguments(data.args, {**data.kwargs, **more})
    return Arguments(tuple(data) if isinstance(data, tuple | list) else (data,), more)


def tensors(data: Data) -> list[Tensor]:
    """The tensors of the tree, in its order."""
    return tree_flatten(data)[0]


def precise(x: Tensor) -> Tensor:
    """In double precision; what lies on a device that has none is brought to the CPU."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def named_tensors(data: Data) -> list[tuple[str, Tensor]]:
    """The tensors of the tree with their paths: ``data``, ``data[0]``, ``data['x']``."""
    return [("data" + keystr(path), leaf) for path, leaf in tree_flatten_with_path(data)[0]]


def first_tensor(data: Data) -> Tensor:
    """One tensor of the tree: all are on its device."""
    return tensors(data)[0]


def data_size(data: Data) -> int:
    """B, the number of data.

    Raises:
        ContractError: if the tree holds no tensor or something else, or its tensors are not of one device and one first
            dimension of at least 1; the message names the leaf.
    """
    leaves = named_tensors(data)
    if not leaves:
        raise ContractError("the data hold no tensor: give a tensor, or a tuple or dict of tensors")
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ContractError(f"{path} is a {type(leaf).__name__}, every leaf of the data must be a tensor")
        if leaf.dim() == 0:
            raise ContractError(f"{path} is a single number, the first dimension of every tensor must be the datum")
    (first_path, first), *others = leaves
    for path, leaf in others:
        if len(leaf) != len(first):
            raise ContractError(
                f"{path} has {len(leaf)} rows and {first_path} has {len(first)}: the first dimension of every tensor "
                "must be the datum"
            )
        if leaf.device != first.device:
            raise ContractError(f"{path} is on {leaf.device} and {first_path} on {first.device}: move one of them")
    if len(first) == 0:
        raise ContractError(f"there is no datum: {first_path} has shape {tuple(first.shape)}")
    return len(first)


def check_same_structure(data: Data, like: Data, name: str) -> None:
    """Refuse data of another structure, or whose tensors differ in type or in the shape of one datum.

    Raises:
        ContractError: naming the leaf, and ``name``, what ``like`` is.
    """
    (leaves, spec), (others, other_spec) = tree_flatten(data), tree_flatten(like)
    if spec == other_spec and [*map(_datum, leaves)] == [*map(_datum, others)]:  # as a rule; fast, for every step
        return
    if data is like:
        return
    given, wanted = dict(named_tensors(data)), dict(named_tensors(like))
    for path in [*wanted, *given]:
        if path not in given or path not in wanted:
            has = "is missing" if path not in given else "is new"
            raise ContractError(f"{path} {has}: the data must have the structure of {name}")
        ours, theirs = given[path], wanted[path]
        if not isinstance(ours, Tensor):
            raise ContractError(f"{path} is a {type(ours).__name__}, every leaf of the data must be a tensor")
        for what, a, b in (
            ("shape", tuple(ours.shape[1:]), tuple(theirs.shape[1:])),
            ("type", ours.dtype, theirs.dtype),
            ("device", ours.device, theirs.device),
        ):
            if a != b:
                of = " of one datum" if what == "shape" else ""
                raise ContractError(f"{path} has {what}{of} {a}, in {name} it has {b}")


def _datum(leaf: Any) -> tuple[Any, ...]:
    return (leaf.shape[1:], leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (object(),)


def select(data: Data, index: Any) -> Data:
    """Some of the data: a slice, or places ``(n,)``."""
    return tree_map(lambda leaf: leaf[index], data)


def split(data: Data, size: int) -> Iterator[Data]:
    """The data, ``size`` at a time.

    Raises:
        ContractError: as :func:`data_size`.
    """
    for start in range(0, data_size(data), size):
        yield select(data, slice(start, start + size))


def concatenate(parts: Sequence[Data]) -> Data:
    """The data of all parts, one after the other."""
    named = [dict(named_tensors(part)) for part in parts]  # by name, since dicts may have their keys in another order
    return tree_unflatten([torch.cat([each[path] for each in named]) for path in named[0]], tree_flatten(parts[0])[1])


def to(data: Data, device: torch.device | str) -> Data:
    """The data on ``device``."""
    return tree_map(lambda leaf: leaf.to(device), data)
