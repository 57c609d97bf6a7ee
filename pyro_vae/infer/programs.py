"""Traces of a model and its guide, and their log-weights: what every bound and estimator reduces."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from threading import get_ident
from types import CodeType, ModuleType
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.errors import ContractError
from pyro_vae.infer.trees import Data, call, data_size, first_tensor

Program = Callable[..., Any]
"""An amortized Pyro program: called with data, see :mod:`pyro_vae.infer.trees`; all is in one data plate of size B.

What it is passed and does not observe is a condition c: log p is log p(x | c) then. What is masked was not seen.
"""


class Traces(NamedTuple):
    """Traces of K samples of the guide and of the model replayed on them, with every site's ``log_prob`` (K, B)."""

    model: poutine.Trace
    guide: poutine.Trace


def traces(model: Program, guide: Program, data: Data, num_samples: int) -> Traces:
    """Draw z_1..z_K ~ q(z | x_b) for each datum and score them under model and guide.

    The K samples live in a plate of their own at dimension -2, so programs run once, and the encoder sees each
    datum once.

    Args:
        model: p(x, z), with one plate over the data at dimension -1, and one or several observed sites, whose
            log-probabilities are summed. Sites may be masked, by ``poutine.mask``, ``.mask`` or ``obs_mask``. The part
            of an ``obs_mask`` site that was not seen need not be in the guide: it integrates to one.
        guide: q(z | x), likewise.
        data: a tensor, or a tuple or dict of tensors, whose first dimension B is the datum; what the programs are
            called with, and do not observe, is a condition.
        num_samples: K, at least 1.

    Raises:
        ValueError: if K is below 1.
        ContractError: if the programs break the rules above: a site that is not local to the data plate, a plate
            that is subsampled or scaled, no observed site, a latent site of one program that the other lacks; or if
            ``data`` is no such tree.
    """
    return _scored(_draw(guide, data, num_samples), model, data, num_samples)


def leaf_traces(
    model: Program, guide: Program, data: Data, num_samples: int
) -> tuple[Traces, dict[str, Tensor], dict[str, Tensor]]:
    """As :func:`traces`, but with both scored at variables of their own that hold the values drawn.

    Derivatives by these leaves, by the model's parameters and by the guide's are thus separate, each with its own
    weight.
    A guide of several sites is run a second time, at the leaves, and must then be the same function: no dropout in it.

    Returns:
        The traces; the draws of each latent site, with their gradients; the leaves. ``(K, B, *event_shape)`` both.
    """
    guide_trace = _draw(guide, data, num_samples)
    draws = {name: site_of(guide_trace, name)["value"] for name in sample_sites(guide_trace)}
    leaves = {name: draw.detach().requires_grad_(draw.is_floating_point()) for name, draw in draws.items()}
    for name, leaf in leaves.items():
        site_of(guide_trace, name)["value"] = leaf
    if len(draws) > 1:  # later sites' distributions must depend on the leaves of the earlier ones
        guide_trace = particle_trace(poutine.replay(guide, trace=guide_trace), data, num_samples)
    return _scored(guide_trace, model, data, num_samples), draws, leaves


def _draw(guide: Program, data: Data, num_samples: int) -> poutine.Trace:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    data_size(data)
    return particle_trace(guide, data, num_samples)


def _scored(guide_trace: poutine.Trace, model: Program, data: Data, num_samples: int) -> Traces:
    """The traces of the guide and of the model replayed on it, with log-probabilities, checked."""
    result = Traces(particle_trace(poutine.replay(model, trace=guide_trace), data, num_samples), guide_trace)
    for name in unseen_sites(result.model):
        if name not in result.guide.nodes:
            result.model.remove_node(name)
    for each in result:
        each.compute_log_prob()
    _check(result, (num_samples, len(first_tensor(data))))
    return result


def posterior_samples(guide: Program, data: Data, num_samples: int) -> dict[str, Tensor]:
    """Draws z_kb ~ q(z | x_b) of each latent site: shapes ``(K, B, *event_shape)``. The model is not run.

    Args:
        guide, data: see :func:`traces`.
        num_samples: K, at least 1.
    """
    trace = particle_trace(guide, data, num_samples)
    return {name: site_of(trace, name)["value"] for name in sample_sites(trace)}


def mean_of(made: Any, num_draws: int = 100, at_once: int = 2000) -> Tensor:
    """E[x] of a distribution, ``(*batch_shape, *event_shape)``; where it has no formula, the mean of draws, of which
    about ``at_once`` are made together."""
    try:
        return made.mean.clone()
    except NotImplementedError:
        each = max(1, min(num_draws, at_once // max(1, made.batch_shape.numel())))
        numbers = [min(each, num_draws - start) for start in range(0, num_draws, each)]
        return torch.stack([made.sample((number,)).sum(0) for number in numbers]).sum(0) / num_draws


def particle_trace(program: Program, data: Data, num_samples: int) -> poutine.Trace:
    """The trace of one run of a program inside a plate of K particles at dimension -2."""

    def with_particles() -> None:
        device: Any = first_tensor(data).device
        with pyro.plate("particles", num_samples, dim=-2, device=device):
            call(program, data)

    return prune_subsample_sites(poutine.trace(with_particles).get_trace())


def log_weights(model: Program, guide: Program, data: Data, num_samples: int) -> Tensor:
    """log w_kb = log p(x_b, z_kb) - log q(z_kb | x_b), with z_kb ~ q(z | x_b), in nats; shape ``(K, B)``.

    Their mean over K estimates the ELBO; the log of the mean of their exponentials is the importance-weighted bound
    and estimates log p(x_b) (Burda, Grosse & Salakhutdinov 2016, equation 8).

    Args:
        model, guide, data: see :func:`traces`.
        num_samples: K, at least 1.

    Raises:
        ValueError: see :func:`traces`.
        ContractError: as :func:`traces`, and if the log-weights are to be differentiated and draws have no gradient.
    """
    both = traces(model, guide, data, num_samples)
    log_w = log_weights_of(both)
    if log_w.requires_grad:
        check_pathwise(both.guide)
    return log_w


def log_weights_of(traces: Traces) -> Tensor:
    """The log-weights ``(K, B)`` of given traces."""
    return sum_log_prob(traces.model) - sum_log_prob(traces.guide)


def check_pathwise(guide_trace: poutine.Trace) -> None:
    """Refuse a guide whose draws carry no gradient: a pathwise bound would train it with a wrong one.

    Raises:
        ContractError: naming the site and its distribution.
    """
    for name in sample_sites(guide_trace):
        if not (made := site_of(guide_trace, name)["fn"]).has_rsample:
            while isinstance(made, Independent):
                made = made.base_dist
            raise ContractError(
                f"guide site '{name}' draws from {type(made).__name__}, whose draws have no gradient (has_rsample is "
                "False), as this bound needs: choose another posterior, TVO, or pyro.infer.Trace_ELBO with PyroSVI"
            )


def sum_log_prob(trace: poutine.Trace) -> Tensor:
    """The sum over all sites of a trace whose log-probabilities are computed, ``(K, B)``."""
    return added(site_of(trace, name)["log_prob"] for name in sample_sites(trace))


def unvalidated(trace: poutine.Trace) -> poutine.Trace:
    """The trace, whose distributions judge no value: outside their support log-densities are NaN or -inf, as elsewhere.

    ``pyro.validation_enabled(False)`` does not reach distributions that were made before, and expanded.
    """
    for name in sample_sites(trace):
        site = site_of(trace, name)
        site["fn"] = _unvalidated(site["fn"])
    return trace


def _unvalidated(fn: Any) -> Any:
    inner = {name: each for name in _INSIDE if hasattr(each := fn.__dict__.get(name), "log_prob")}
    quiet = {name: _unvalidated(each) for name, each in inner.items()}
    if not fn.__dict__.get("_validate_args") and all(quiet[name] is inner[name] for name in inner):
        return fn
    fn = copy.copy(fn)
    fn.__dict__.update(quiet, _validate_args=False)
    return fn


_INSIDE = ("base_dist", "_component_distribution", "_mixture_distribution")
"""Where distributions keep those that they are made of."""


def site_of(trace: poutine.Trace, name: str) -> Any:
    """A site of a trace. Pyro's own annotation says that each entry may be missing, which is true of none used here."""
    return trace.nodes[name]


def added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, at least one."""
    return cast(Tensor, sum(parts))


def sample_sites(trace: poutine.Trace) -> list[str]:
    """The names of all sample sites, observed ones too, in the order of the program, but for pyro.deterministic."""
    sites = ((name, site_of(trace, name)) for name in trace.nodes)
    return [n for n, site in sites if site["type"] == "sample" and not site["infer"].get("_deterministic")]


def latent_sites(model_trace: poutine.Trace) -> list[str]:
    """The names of the sites that are not observed, in the order of the program."""
    return [name for name in sample_sites(model_trace) if not site_of(model_trace, name)["is_observed"]]


def unseen_sites(model_trace: poutine.Trace) -> list[str]:
    """The sites that Pyro makes for the part of a site with an ``obs_mask`` that was not observed."""
    names = latent_sites(model_trace)
    seen = (name.removesuffix("_unobserved") + "_observed" for name in names)
    return [n for n, other in zip(names, seen, strict=True) if n.endswith("_unobserved") and other in model_trace.nodes]


def _check(traces: Traces, shape: tuple[int, int]) -> None:
    """Refuse programs for which a sum of log-probabilities over sites is not a log-weight per datum."""
    latents = set(latent_sites(traces.model))
    if len(latents) == len(sample_sites(traces.model)):
        raise ContractError("the model must have an observed site, it has none: pass obs= to pyro.sample")
    if latents != (in_guide := set(sample_sites(traces.guide))):
        if auxiliary := [
            name for name in in_guide - latents if site_of(traces.guide, name)["infer"].get("is_auxiliary")
        ]:
            raise ContractError(
                f"guide site '{min(auxiliary)}' is auxiliary, as those of Pyro's AutoGuides are, which keep parameters "
                "for each datum: write a guide that computes q(z | x) from the data"
            )
        raise ContractError(
            f"model and guide must have the same latent sites, got {sorted(latents)} and {sorted(in_guide)}: add "
            f"{sorted(latents ^ in_guide)} to the other program, or take them out"
        )
    for program, trace in zip(("model", "guide"), traces, strict=True):
        for name in sample_sites(trace):
            site = site_of(trace, name)
            if isinstance(site["scale"], Tensor) or site["scale"] != 1:
                raise ContractError(
                    f"{program} site '{name}' is scaled, by a subsampled plate or poutine.scale, which biases every "
                    "estimate of log p(x): pass the observations themselves, in an unscaled plate"
                )
            plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            if -1 not in plates:
                raise ContractError(
                    f"{program} site '{name}' is outside the data plate at dim=-1, and so one for all data, whose "
                    "log p(x) cannot be told apart by datum: put it inside the plate, or make it a parameter "
                    "(pyro.param, or one of a module)"
                )
            if plates != {-2, -1} or site["log_prob"].shape != shape:
                raise ContractError(
                    f"{program} site '{name}' is in plates at dimensions {sorted(plates)}, its log-probabilities have "
                    f"shape {tuple(site['log_prob'].shape)} for {shape[0]} samples (dim -2) of {shape[1]} data "
                    "(dim -1): put every site in one data plate at dim=-1, and other dimensions in .to_event()"
                )


@contextlib.contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Programs are in evaluation mode inside, as after ``module.eval()``: no dropout, running means of batches.

    Their modules are those reached from bound methods, closures, globals, partials and handlers, and all that run
    inside. At the end each is in the mode that it had.
    """
    switched: dict[int, nn.Module] = {}
    thread = get_ident()

    def switch(module: nn.Module, *_: object) -> None:
        if module.training and get_ident() == thread:  # another one may be training
            switched[id(module)] = module
            module.training = False

    for module in modules_of(*programs):
        switch(module)
    hook = nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in switched.values():
            module.training = True


@contextlib.contextmanager
def scoring(*programs: Program) -> Iterator[None]:
    """What numbers are computed in: evaluation mode, without gradients and without Pyro's validation."""
    with evaluating(*programs), torch.no_grad(), pyro.validation_enabled(False):
        yield


def modules_of(*programs: Program) -> list[nn.Module]:
    """The modules that programs hold: their own, and those in closures, partials, handlers, attributes and globals."""
    found: dict[int, nn.Module] = {}
    waiting: list[tuple[object, int]] = [(program, 0) for program in programs]
    seen: set[int] = set()
    while waiting:
        each, depth = waiting.pop()
        if id(each) in seen or depth > 6 or isinstance(each, Tensor | ModuleType | type):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found |= {id(module): module for module in each.modules()}
        elif isinstance(each, partial):
            inside = [each.func, *each.args, *each.keywords.values()]
            waiting += [(other, depth + 1) for other in inside]
        elif isinstance(each, list | tuple | dict):
            values = each.values() if isinstance(each, dict) else each
            waiting += [(other, depth + 1) for other in islice(values, 1000)]  # data are no programs
        elif callable(each) or hasattr(each, "__dict__"):
            inside = [getattr(each, name, None) for name in ("__self__", "__func__", "__wrapped__")]
            inside += [cell.cell_contents for cell in getattr(each, "__closure__", None) or () if _is_filled(cell)]
            inside += [*getattr(each, "__dict__", {}).values(), *_named_globals(each)]
            waiting += [(other, depth + 1) for other in inside if other is not None]
    return list(found.values())


def _named_globals(function: Any) -> Iterator[Any]:
    """What a function of the user's, and those inside it, take from their module: modules, and functions there."""
    waiting = [code] if isinstance(code := getattr(function, "__code__", None), CodeType) else []
    while waiting:
        code = waiting.pop()
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, nn.Module | partial) or getattr(value, "__globals__", None) is function.__globals__:
                yield value


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def find_non_finite(model: Program, guide: Program, data: Data, num_samples: int = 16) -> str | None:
    """Name the first site whose value or log-probability is NaN or infinite, guide first; None if all are finite."""
    found = non_finite(model, guide, data, num_samples)
    return found and found[0]


def non_finite(model: Program, guide: Program, data: Data, num_samples: int = 16) -> tuple[str, int | None] | None:
    """As :func:`find_non_finite`, with the first row of the data where it is so; None if it is so in all or of none."""
    with torch.no_grad(), pyro.validation_enabled(False):
        model_trace, guide_trace = traces(model, guide, data, num_samples)
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for name in sample_sites(trace):
            site = site_of(trace, name)
            for what in ("value", "log_prob"):
                bad = ~site[what].isfinite()
                if bad.any():
                    shape = bad.shape[: bad.ndim - site["fn"].event_dim] if what == "value" else bad.shape
                    bad = bad.reshape(*shape, -1).any(-1)
                    rows = bad.reshape(-1, bad.shape[-1]).any(0) if bad.ndim else bad[None]
                    one = len(rows) == data_size(data) and not rows.all()
                    row = int(rows.nonzero()[0].item()) if one else None
                    return f"{what.replace('_prob', '-probability')} of {program} site '{name}'", row
    return None
