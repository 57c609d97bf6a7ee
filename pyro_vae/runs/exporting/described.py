"""What a program says of a distribution: its parameters as tensors, and in words which family they are of."""

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_vae.infer.scales import base_of
from pyro_vae.parts import distributions as own
from pyro_vae.parts.pixels import Autoregressive
from pyro_vae.runs.exporting.noise import NotExportable

Described = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and a tree for JSON: the family, and of each of its parameters the name of the tensor."""

_FAMILIES = {own.WholeNumbers: "Categorical", own.ExactNegativeBinomial: "NegativeBinomial"}
_BESIDE_LOGITS, _BESIDE_TRIL = ("probs",), ("covariance_matrix", "precision_matrix")


def described(made: Any, name: str) -> Described:
    """The parameters of a distribution, whose names begin with ``name``.

    Raises:
        NotExportable: if it has no parameters that say all, as where each entry depends on those before it.
    """
    made = base_of(made)
    if isinstance(made, own.FlowDistribution):
        return _flow(made, name)
    if isinstance(made, own.Scaled):
        return _scaled(made, name)
    if isinstance(made, own.Columns):
        return _columns(made, name)
    if isinstance(made, td.MixtureSameFamily):
        tensors, component = described(made.component_distribution, f"{name}_component")
        tensors = {f"{name}_logits": made.mixture_distribution.logits, **tensors}
        return tensors, {"family": "Mixture", "parameters": {"logits": f"{name}_logits"}, "component": component}
    if isinstance(made, td.TransformedDistribution) and "loc" not in made.arg_constraints:
        tensors, base = described(made.base_dist, name)
        return tensors, {"family": "Transformed", "base": base, "transforms": [_transform(t) for t in made.transforms]}
    return _plain(made, name)


def _plain(made: Any, name: str) -> Described:
    """By what its class says of itself; of several spellings of one parameter one."""
    if isinstance(made, Autoregressive):
        raise NotExportable("each entry depends on those before it, which no parameters say")
    known = list(made.arg_constraints)
    for better, worse in (("logits", _BESIDE_LOGITS), ("scale_tril", _BESIDE_TRIL)):
        known = [each for each in known if better not in known or each not in worse]
    tensors: dict[str, Any] = {f"{name}_{each}": getattr(made, each, None) for each in known}
    if not tensors or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise NotExportable(f"{type(made).__name__} does not say its parameters, by arg_constraints")
    family = _FAMILIES.get(type(made), type(made).__name__)
    tree: dict[str, Any] = {"family": family, "parameters": dict(zip(known, tensors, strict=True))}
    if isinstance(made, own.DiscretizedLogistic):
        tree["levels"] = made.levels
    return tensors, tree


def _flow(made: Any, name: str) -> Described:
    """What the flow is told; the flow itself is inside of the program that draws."""
    known = {each: value for each in ("loc", "log_scale", "context") if (value := getattr(made, each)) is not None}
    tensors = {f"{name}_{each}": value.expand(*made.batch_shape, -1) for each, value in known.items()}
    about = "loc + exp(log_scale) * flow(normal noise; context): the flow is in the draw, its density is not exported"
    return tensors, {"family": "Flow", "parameters": dict(zip(known, tensors, strict=True)), "about": about}


def _scaled(made: Any, name: str) -> Described:
    """In the units of x: those of a location and a scale are told by them, others beside what they are in."""
    base = base_of(made.base)
    if set(base.arg_constraints) == {"loc", "scale"}:
        tensors = {f"{name}_loc": made.loc + made.scale * base.loc, f"{name}_scale": made.scale * base.scale}
        tree = {"loc": f"{name}_loc", "scale": f"{name}_scale"}
        return tensors, {"family": type(base).__name__, "parameters": tree}
    tensors, tree = described(base, f"{name}_unit")
    loc, scale = f"{name}_loc", f"{name}_scale"
    tensors |= {loc: made.loc.expand(base.batch_shape), scale: made.scale.expand(base.batch_shape)}
    return tensors, {"family": "Scaled", "parameters": {"loc": loc, "scale": scale}, "base": tree}


def _columns(made: Any, name: str) -> Described:
    tensors, parts = {}, []
    places = made.order.split(made.widths)
    for number, (part, mine) in enumerate(zip(made.parts, places, strict=True)):
        more, tree = described(part, f"{name}_part{number}")
        tensors |= more
        parts.append({"entries": mine, **tree})
    return tensors, {"family": "Columns", "parts": parts}


def _transform(transform: Any) -> dict[str, Any]:
    """A map of torch.distributions, by its name and its numbers."""
    if isinstance(transform, td.IndependentTransform):
        return _transform(transform.base_transform)
    told: dict[str, Any] = {"name": type(transform).__name__}
    if isinstance(transform, td.ComposeTransform):
        told["parts"] = [_transform(each) for each in transform.parts]
    if isinstance(transform, td.AffineTransform):
        told |= {"loc": transform.loc, "scale": transform.scale}
    return told


def mean_of(made: Any, listed: Tensor | None = None) -> Tensor:
    """E[x], ``(B, X)``; of entries that are ``listed``, booleans ``(X,)``, the place of the most probable value.

    Raises:
        NotExportable: if E[x] has no formula.
    """
    made = base_of(made)
    try:
        mean = made.mean
    except NotImplementedError:
        raise NotExportable(f"the mean of {type(made).__name__} has no formula") from None
    return mean if listed is None else torch.where(listed, _most_probable(made), mean)


def _most_probable(made: Any) -> Tensor:
    """Of each entry; NaN of a distribution of which it is not known."""
    made = base_of(made)
    if isinstance(made, own.Columns):
        return made.join([_most_probable(part) for part in made.parts])
    if isinstance(made, td.Bernoulli):
        return (made.logits > 0).to(made.logits.dtype)
    if isinstance(made, td.Categorical):
        return made.logits.argmax(-1).to(made.logits.dtype)
    return torch.full_like(made.mean, torch.nan)


def tensors_as_lists(tree: Any) -> Any:
    """The tree with what stands in tensors as lists."""
    if isinstance(tree, dict):
        return {name: tensors_as_lists(each) for name, each in tree.items()}
    if isinstance(tree, list):
        return [tensors_as_lists(each) for each in tree]
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree
