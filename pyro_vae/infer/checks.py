"""check_program: whether the log-weights of a model and guide are those of the data that they are given."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, MaskedDistribution, Unit, constraints
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily

from pyro_vae.errors import ContractError, is_of_no_number, reason_of
from pyro_vae.infer.programs import (
    Program,
    Traces,
    evaluating,
    latent_sites,
    particle_trace,
    sample_sites,
    site_of,
    traces,
    unseen_sites,
)
from pyro_vae.infer.scales import base_of
from pyro_vae.infer.supports import innermost
from pyro_vae.infer.trees import Data, data_size, named_tensors, precise, select, split, tensors

MOST_ALONE = 8
"""Data that are scored without the others, at most: in a small batch the neighbours that are missing count for more."""


def check_program(model: Program, guide: Program, data: Data, neighbours: bool = True) -> None:
    """Run model and guide once on ``data`` and refuse what would give a number that is no log-likelihood.

    Supports are judged by draws: those of the guide must lie in the model's support, and those of the model in the
    guide's, which otherwise misses part of the posterior. Some of the data are scored alone, too: what changes then
    depends on its neighbours in the batch. Programs run in the mode that they are in.

    Args:
        model, guide, data: see :func:`pyro_vae.traces`.
        neighbours: score some of the data alone, which needs to be done but once for each program.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, and if data hold NaN, or an observation lies outside the support
            of its likelihood (grey pixels under a Bernoulli, which no normalized density or mass would score), or an
            observed site holds something else than the data, or model and guide disagree about the support of a
            latent site, or its prior is improper, or p(x | z) or q(z | x) of a datum depends on other data.
    """
    check_part(model, guide, data, neighbours)


def check_part(model: Program, guide: Program, data: Data, neighbours: bool, start: int = 0) -> None:
    """:func:`check_program` of data that are the rows from ``start`` on of others."""
    data_size(data)
    gaps = [(path, leaf) for path, leaf in named_tensors(data) if leaf.isnan().any()]
    with torch.no_grad(), pyro.validation_enabled(False):
        try:
            both = traces(model, guide, data, num_samples=2)
        except (RuntimeError, ValueError, IndexError) as error:  # as of distributions that refuse to draw with a NaN
            if gaps and not isinstance(error, ContractError):
                raise _gaps_error(*gaps[0], start) from error
            if isinstance(error, RuntimeError) and is_of_no_number(error):
                reason = " ".join(str(error).split("Trace Shapes")[0].split())
                raise ContractError(f"the programs draw with a parameter that is NaN or infinite: {reason}") from error
            if "out of bounds" in str(error):  # of Categorical, which looks a probability up
                raise ContractError(f"data lie outside the support of their distribution: {error}") from error
            raise
        for path, leaf in gaps:
            _check_gaps(both, path, leaf, start)
        _check_latent_supports(both)
        check_latent_masks(both)
        observed = [name for name in sample_sites(both.model) if site_of(both.model, name)["is_observed"]]
        for name in observed:
            _check_observed(name, site_of(both.model, name), data, start)
        _check_observed_once(both.model, observed, data)
        _check_unseen(model, both, data)
        if neighbours:
            _check_rows(model, guide, both, data)


def check_data(model: Program, guide: Program, data: Data, neighbours: bool = True, size: int = 1000) -> None:
    """:func:`check_program` of all data, ``size`` at a time, in evaluation mode; no random number is used up.

    ``neighbours`` are looked at in the first part.

    Raises:
        ContractError: as :func:`check_program`.
    """
    devices = sorted({leaf.device for leaf in tensors(data) if isinstance(leaf, Tensor) and leaf.is_cuda}, key=str)
    with torch.random.fork_rng(devices), evaluating(model, guide):
        check_parts(model, guide, data, neighbours, size)


def check_parts(model: Program, guide: Program, data: Data, neighbours: bool = True, size: int = 1000) -> None:
    """:func:`check_data` in the mode that programs are in, which uses up random numbers."""
    for _ in checked_parts(model, guide, data, size, neighbours):
        pass


def checked_parts(model: Program, guide: Program, data: Data, size: int, neighbours: bool = False) -> Iterator[Data]:
    """``size`` rows of data at a time, each part checked when its turn comes, with rows counted from the first."""
    for number, part in enumerate(split(data, size)):
        check_part(model, guide, part, neighbours and number == 0, number * size)
        yield part


def _check_gaps(both: Traces, path: str, leaf: Tensor, start: int) -> None:
    """Refuse data with NaN unless they are those of an observed site, which masks them, and no number is NaN."""
    sites = [site_of(trace, name) for trace in both for name in sample_sites(trace)]
    hidden = not any(site[what].isnan().any() for site in sites for what in ("value", "log_prob"))
    observed = [name for name in sample_sites(both.model) if site_of(both.model, name)["is_observed"]]
    if hidden and any(_masks_gaps(both.model, name, leaf.flatten()) for name in observed):
        return
    raise _gaps_error(path, leaf, start)


def _gaps_error(path: str, leaf: Tensor, start: int) -> ContractError:
    rows = leaf.isnan().reshape(len(leaf), -1).any(1)
    return ContractError(
        f"{rows.sum()} of {len(leaf)} observations hold NaN ({path}, {_first_row(rows, start)}): fill in what was not "
        "seen, and mask it"
    )


def _masks_gaps(trace: poutine.Trace, name: str, leaf: Tensor) -> bool:
    """Whether an observed site holds a tensor of the data, and masks its NaN."""
    value = _flat(trace, name, "value")
    if value.shape != leaf.shape:
        return False
    gaps = leaf.isnan()
    return bool(((value == leaf.to(value)) | gaps).all()) and not (_flat(trace, name, "seen") & gaps).any()


def _check_latent_supports(both: Traces) -> None:
    for name in sample_sites(both.guide):
        guided, modelled = site_of(both.guide, name)["fn"], site_of(both.model, name)["fn"]
        if isinstance(base_of(modelled), ImproperUniform):
            raise ContractError(
                f"site '{name}' has an improper prior, from which nothing can be drawn, so that log p(x) is known but "
                "up to a constant: give it one that can be normalized"
            )
        for drawn, other, whose in ((guided, modelled, "guide"), (modelled, guided, "model")):
            try:
                sample = drawn.sample()
            except RuntimeError as error:  # torch's normal, of a scale that is NaN
                if "expects all elements of std" not in str(error):
                    raise
                raise ContractError(
                    f"at site '{name}' the {whose} has a scale that is NaN: nothing can be drawn"
                ) from error
            if not other.support.check(sample).all():
                raise ContractError(
                    f"at site '{name}' the {whose} draws from {type(drawn).__name__} on {drawn.support}, outside "
                    f"the support of {type(other).__name__}, {other.support}: prior and posterior must have the "
                    "same support, or the posterior be over all reals"
                )


def check_latent_masks(both: Traces) -> None:
    """Refuse latent sites whose masks differ, so that p(z) and q(z | x) are of other variables."""
    for name in sample_sites(both.guide):
        sites = [site_of(trace, name) for trace in both]
        of_model, of_guide = (seen_entries(site).broadcast_to(sites[0]["value"].shape) for site in sites)
        if not torch.equal(of_model, of_guide):
            raise ContractError(
                f"site '{name}' is masked in one program where it is not in the other, so that a log-weight would hold "
                "p(z) without q(z | x) or the other way round: mask it in both alike, or the observed sites alone"
            )


def _check_observed(name: str, site: dict[str, Any], data: Data, start: int) -> None:
    """Refuse an observed site that scores something else than the data, or values outside its support."""
    value, size = site["value"], len(tensors(data)[0])
    if value.numel() == 0:
        raise ContractError(
            f"the observed site '{name}' ({type(site['fn']).__name__}) observes no data, as pyro.factor does, so that "
            "nothing says whether its number is a log-likelihood: write it as a distribution that observes them"
        )
    constraint = site["fn"].support
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    seen = seen_entries(site)
    found = value if value.dim() - site["fn"].event_dim >= 1 else value.unsqueeze(0)
    rows = found.dim() - site["fn"].event_dim - 1
    if found.shape[rows] != size:
        found = found.expand(*found.shape[:rows], size, *found.shape[rows + 1 :])
    if not _holds_data(found.flatten(0, rows)[-size:].reshape(size, -1), _last(seen, found, rows), data):
        raise ContractError(
            f"the observed site '{name}' holds something else than the observations that the model was given, so that "
            "its density is not theirs: observe a tensor of the data, or columns of it, as it is"
        )
    valid, finite = constraint.check(value), value.isfinite()  # torch counts infinity among the reals
    valid = valid & (finite.flatten(-constraint.event_dim).all(-1) if constraint.event_dim else finite)
    invalid = ~valid & _reduced(seen, value, constraint.event_dim)
    if invalid.any():
        outside = _last(invalid.reshape(*valid.shape, *[1] * constraint.event_dim), found, rows).any(1)
        raise ContractError(
            f"{outside.sum()} observations of site '{name}' lie outside the support of {type(site['fn']).__name__}, "
            f"{site['fn'].support}, {_first_row(outside, start)}: its log_prob of them is no log-likelihood; binarize "
            "the data or choose a likelihood for its values"
        )


def _first_row(wrong: Tensor, start: int) -> str:
    """Which row is the first of the wrong ones, ``(B,)``, as an index tells it."""
    return f"{'first ' if wrong.sum() > 1 else ''}row {start + int(wrong.nonzero()[0])}"


def _check_observed_once(trace: poutine.Trace, observed: list[str], data: Data) -> None:
    """Refuse sites that score the same tensor of the data: p(x | z) p(x | z) is no density of x."""
    for name in observed:
        value, seen = (_flat(trace, name, each) for each in ("value", "seen"))
        equal = [
            leaf
            for leaf in tensors(data)
            if leaf.numel() == value.numel() and torch.equal(leaf.flatten().to(value), value)
        ]
        others = [
            n
            for n in observed
            if torch.equal(_flat(trace, n, "value"), value) and (_flat(trace, n, "seen") & seen).any()
        ]
        if equal and len(others) > len(equal):
            raise ContractError(
                f"sites {' and '.join(map(repr, others))} observe the same tensor of the data, so that the product of "
                "their densities is none of the data: observe it once, or mask apart what each of them sees"
            )


def _flat(trace: poutine.Trace, name: str, what: str) -> Tensor:
    """An observed site's value, or which of its entries count, as one row of numbers."""
    site = site_of(trace, name)
    value = site["value"]
    if what == "value":
        return value.flatten()
    return _reduced(seen_entries(site), value, 0).broadcast_to(value.shape).flatten()


def seen_entries(site: dict[str, Any]) -> Tensor:
    """Which entries of a site's value count, a shape that broadcasts to the value's: what is masked does not."""
    fn, mask = site["fn"], site["mask"]
    seen = torch.ones((), dtype=torch.bool, device=site["value"].device)
    if mask is not None:
        mask = torch.as_tensor(mask, device=seen.device).bool()
        seen = seen & mask.reshape((*mask.shape, *[1] * fn.event_dim))
    return seen & _unmasked(fn).to(seen.device)


def _unmasked(fn: Any) -> Tensor:
    """Which entries a distribution itself does not mask; of a mixture, those that count in one of its parts."""
    seen = torch.ones((), dtype=torch.bool)
    while isinstance(fn, Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            mask = torch.as_tensor(fn._mask).bool()
            seen = seen.to(mask.device) & mask.reshape((*mask.shape, *[1] * fn.event_dim))
        fn = fn.base_dist
    if isinstance(fn, MixtureSameFamily):
        parts, place = _unmasked(fn.component_distribution), -1 - len(fn.event_shape)
        return seen.to(parts.device) & (parts.any(place) if parts.dim() >= -place else parts)
    return seen


def _last(entries: Tensor, like: Tensor, rows: int) -> Tensor:
    """Booleans that broadcast to ``like``, whose dimension ``rows`` is the datum, as ``(B, n)``: of its last sample."""
    size = like.shape[rows]
    entries = entries.broadcast_to(torch.broadcast_shapes(entries.shape, like.shape))
    while entries.dim() > like.dim():
        entries = entries[-1]
    return entries.flatten(0, rows)[-size:].reshape(size, -1)


def _reduced(seen: Tensor, value: Tensor, event_dim: int) -> Tensor:
    """``seen`` for events of a constraint: one is judged if all of its entries count."""
    seen = seen.broadcast_to(torch.broadcast_shapes(seen.shape, value.shape))
    while seen.dim() > value.dim():
        seen = seen.any(0)
    return seen.flatten(-event_dim).all(-1) if event_dim else seen


def _holds_data(value: Tensor, seen: Tensor, data: Data) -> bool:
    """Whether what was seen of ``value``, ``(B, n)``, is a tensor of the data, or different columns of them."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in tensors(data)]
    if any(leaf.shape == value.shape and ((leaf.to(value) == value) | ~seen).all() for leaf in leaves):
        return True
    columns = torch.cat([precise(leaf) for leaf in [*leaves, value]], 1)
    kinds, kind = columns.unique(dim=1, return_inverse=True)
    known, asked = kind[: -value.shape[1]], kind[-value.shape[1] :]
    count = kinds.shape[1]
    return bool((asked.bincount(minlength=count) <= known.bincount(minlength=count)).all())


def _check_unseen(model: Program, both: Traces, data: Data) -> None:
    """Refuse sites that depend on the unseen part of another, if the guide lacks it: drawn anew, nothing may change."""
    again = _score(model, both.model, data, slice(None))
    missing = [name for name in unseen_sites(again) if name not in both.guide.nodes]
    if not missing:
        return
    for name in sample_sites(both.model):
        if not _alike(site_of(again, name)["log_prob"], site_of(both.model, name)["log_prob"]):
            raise ContractError(
                f"site '{name}' depends on {' or '.join(missing)}, the part of a site with an obs_mask that was not "
                "observed, which the guide lacks: let the guide draw it, or sum it out"
            )


def _check_rows(model: Program, guide: Program, both: Traces, data: Data) -> None:
    """Refuse programs in which a datum's log-probability depends on its neighbours in the batch."""
    size = len(tensors(data)[0])
    if size < 2:
        return
    step = max(2, -(-size // MOST_ALONE))  # without those beside them, and from all over the batch
    for some in (slice(1, None, step), slice(0, None, step)):
        for what, program, trace in (("guide", guide, both.guide), ("model", model, both.model)):
            _check_alone(what, program, trace, data, some)


def _check_alone(what: str, program: Program, trace: poutine.Trace, data: Data, some: slice) -> None:
    """Refuse a program whose log-probabilities of some of the data change if these are scored without the others."""
    try:
        alone = _score(program, trace, select(data, some), some)
    except (RuntimeError, ValueError) as error:
        raise ContractError(
            f"the {what} runs with all data that it was given and fails with some of them alone ({reason_of(error)}): "
            "what it knows of a datum must be computed from the data that it is called with, not kept for each datum"
        ) from error
    for name in sample_sites(trace):
        if _alike(site_of(alone, name)["log_prob"], site_of(trace, name)["log_prob"][:, some]):
            continue
        first, second = (_score(program, trace, data, slice(None)).nodes[name]["log_prob"] for _ in range(2))
        noisy = not _alike(first, second)  # dropout in training mode, for example
        if noisy or _alike(site_of(alone, name)["log_prob"], first[:, some]):
            continue
        if _alike(site_of(alone, name)["log_prob"], first[:, some], _moved_by_rounding(site_of(trace, name))[:, some]):
            continue  # a row far from all that networks were trained on, whose distribution is too narrow for its place
        raise ContractError(
            f"log-probabilities of {what} site '{name}' change if a datum is scored without the others of its "
            "batch, so that they are of no datum: batch normalization in training mode is the usual cause, "
            "module.eval() helps; otherwise let each row depend on itself alone"
        )


def _score(program: Program, trace: poutine.Trace, data: Data, some: slice) -> poutine.Trace:
    """The program run again on some of the data, with the values that it had in ``trace``."""
    values = {name: site_of(trace, name)["value"][:, some] for name in latent_sites(trace)}
    again = particle_trace(poutine.condition(program, data=values), data, 2)
    again.compute_log_prob()
    return again


def _alike(a: Tensor, b: Tensor, more: Tensor | float = 0.0) -> bool:
    """Whether log-probabilities are the same up to rounding, in batches of other sizes, and ``more``."""
    relative = 1e-9 if b.dtype == torch.float64 else 1e-4
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool(((a - b).abs() <= relative + relative * b.abs() + more).all())


def _moved_by_rounding(site: dict[str, Any]) -> Tensor:
    """How far log-probabilities ``(K, B)`` move as a site's value does in its last digits."""
    fn, value = site["fn"], site["value"]
    if not value.is_floating_point():
        return torch.zeros_like(site["log_prob"])
    step = 16 * torch.finfo(value.dtype).eps
    there, up, down = (fn.log_prob(each) for each in (value, value * (1 + step), value * (1 - step)))
    moved = torch.maximum((up - there).abs(), (down - there).abs())
    return torch.where(moved.isfinite(), moved, 0.0).expand(site["log_prob"].shape)


def check_whole(runs: list[poutine.Trace], pinned: Mapping[str, Tensor]) -> list[str]:
    """The observed sites of a program without a data plate, of which several runs are given.

    Args:
        runs: its traces.
        pinned: latent sites on which nothing depends.

    Raises:
        ContractError: if its sites change from run to run, are discrete, scaled, or wrongly observed, or none is there
            to integrate over or to observe.
    """
    kinds = [{name: site_of(run, name)["is_observed"] for name in sample_sites(run)} for run in runs]
    changing = {name for kind in kinds for name in {*kinds[0], *kind} if kind.get(name) != kinds[0].get(name)}
    shapes = [{name: site_of(run, name)["value"].shape for name in sample_sites(run)} for run in runs]
    changing |= {name for shape in shapes for name in shape if shape[name] != shapes[0].get(name)}
    if changing:
        raise ContractError(unsteady(changing))
    for name in sample_sites(run := runs[0]):
        site = site_of(run, name)
        if isinstance(site["scale"], Tensor) or site["scale"] != 1:
            raise ContractError(
                f"site '{name}' is scaled, by a subsampled plate or poutine.scale, which makes log p(x) that of no "
                "data set: give all data, in a plate of their number"
            )
        if site["is_observed"]:
            _check_possible(name, site)
        elif name not in pinned and innermost(site["fn"].support).is_discrete:
            raise ContractError(
                f"site '{name}' is discrete, on {site['fn'].support}, so that its log-density has no gradient to "
                "follow: sum it out of the program, by a mixture distribution or pyro.ops"
            )
    observed = [name for name in sample_sites(run) if site_of(run, name)["is_observed"]]
    if not observed:
        raise ContractError(
            "the model must have an observed site or a pyro.factor, it has none: pass obs= to pyro.sample"
        )
    if not set(latent_sites(run)) - set(pinned):
        raise ContractError("the model has no latent site, so that its trace's log_prob_sum() is log Z")
    return observed


def _check_possible(name: str, site: Any) -> None:
    """Refuse what is observed and impossible, or scored against the data of others."""
    fn, value = site["fn"], site["value"]
    if isinstance(fn, Unit):
        return
    seen = seen_entries(site)
    if (value.isnan() & seen).any():
        raise ContractError(f"the observed site '{name}' holds NaN: fill in what was not seen, and mask it")
    possible = fn.support.check(value)
    counts = seen.flatten(seen.dim() - fn.event_dim).all(-1) if fn.event_dim and seen.dim() else seen
    if (~possible & counts).any():
        raise ContractError(
            f"the observed site '{name}' holds values outside the support of {type(fn).__name__}, {fn.support}: its "
            "log_prob of them is no log-likelihood"
        )
    one_each, scored = value.shape[: value.dim() - fn.event_dim].numel(), fn.log_prob(value).numel()
    if scored > one_each > 1:
        raise ContractError(
            f"the observed site '{name}' has {one_each} values of shape {tuple(value.shape)} and {scored} "
            f"log-probabilities, of batch shape {tuple(fn.batch_shape)}: let the shapes agree"
        )


def unsteady(names: set[str]) -> str:
    return (
        f"sites {', '.join(sorted(names))} change from run to run of the program, in being there, in being observed "
        "or in their shape: log Z needs the same latent variables in every run"
    )
