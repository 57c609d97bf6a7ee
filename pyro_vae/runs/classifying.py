"""Which class is it? p(class given x) by Bayes' rule, of a finished run that is told the class.

Usage: pyro-vae classify RUN [options]

RUN was trained with --condition label, or another column of classes. log p(x given c) of each class c is estimated by
annealed importance sampling, and p(c) is that of the training data. The accuracy and the log-loss, the mean of
-log p(c given x) of the right class, are printed and written to a directory in RUN/evaluations, as result.json and, for
each datum, posterior.nc; nothing is ever overwritten.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import xarray as xr
from torch import Tensor

from pyro_vae.data.datasets import Column, Data, names_of
from pyro_vae.errors import ContractError, RunError
from pyro_vae.infer.evidence.annealed import annealed_importance_sampling
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.classes import ClassPosterior, class_posterior
from pyro_vae.runs.directory import (
    check_empty,
    choose_device,
    inside,
    make_directory,
    provenance,
    table,
    write_evidence,
    write_json,
    write_text,
    writing,
)
from pyro_vae.runs.evaluating import settings_for
from pyro_vae.runs.given import check_made
from pyro_vae.runs.hub import named
from pyro_vae.runs.loading import Run, load_finished
from pyro_vae.runs.parsing import settings_text
from pyro_vae.runs.scoring import FEW_DOUBTED, some_images
from pyro_vae.runs.settings import check_seed


@dataclass(frozen=True)
class ClassificationSettings:
    """Settings of one classification.

    Args:
        run: directory of a finished run that is told the class, or hf://USER/NAME; may stand first, without --run.
        split: test or training data.
        num_images: how many of them, drawn at random, the same in every classification, at least 2; null: all.
        annealing: settings of annealed importance sampling, which scores each datum once for every class.
        seed: of the estimates, at least 0.
        device: auto takes a CUDA device if there is one; or cpu, cuda, cuda:1.
        run_dir: directory to write, new or empty; null: classes-test or classes-train in the run's evaluations.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
    """

    MAIN: ClassVar[tuple[str, ...]] = ("run", "split", "num_images", "seed", "device", "run_dir")

    run: Path
    split: Literal["test", "train"] = "test"
    num_images: int | None = 200
    annealing: Annealing = field(default_factory=Annealing)
    seed: int = 0
    device: str = "auto"
    run_dir: Path | None = None
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        check_seed(self.seed)


class Classified(NamedTuple):
    """A finished classification: its directory, what is in ``result.json``, and p(c | x) of each datum."""

    path: Path
    result: dict[str, Any]
    posterior: ClassPosterior


def classify(run: Run | Path | str, **settings: Any) -> Classified:
    """p(c | x) of a finished run, or that in a directory; settings are those of :class:`ClassificationSettings`.

    Raises:
        RunError: for a mistake in the settings, or if the run is not told one class.
    """
    try:
        return run_classification(ClassificationSettings(Path(run), **settings_for(run, settings)))
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def run_classification(settings: ClassificationSettings, text: str | None = None) -> Classified:
    """Classify as told by settings; ``text`` is the same as YAML, if the caller has it.

    Raises:
        RunError: if the run is not told one class, or there is anything where it would write.
    """
    text = settings_text(settings) if text is None else text
    device = choose_device(settings.device)
    out = settings.run_dir or inside(settings.run, "evaluations", f"classes-{settings.split}")
    check_empty(out)
    vae, data = load_finished(settings.run, device, trust=settings.trust)
    column = _classes(data, settings.run)
    codes = column.encode(torch.arange(len(column.values))).to(device)
    (x, c), among = some_images(data, settings.split, settings.num_images)
    known = data.observe(torch.arange(data.num_train, device=data.device))[1]
    prior = torch.bincount(_places(known, codes), minlength=len(codes)) / data.num_train
    make_directory(out)
    torch.manual_seed(settings.seed)
    start = time.perf_counter()
    try:
        posterior = class_posterior(
            vae.model,
            vae.guide,
            x,
            codes,
            prior,
            lambda model, guide, repeated: annealed_importance_sampling(
                model, guide, repeated, settings.annealing, progress=True
            ),
        )
    except (ContractError, ValueError) as error:
        raise RunError(f"classes of {settings.run}: {error}") from error
    right = _places(c, codes)
    result = {
        "run": named(settings.run),
        "split": settings.split,
        "noun": data.schema.noun,
        "num_images": len(among),
        "column": column.name,
        "classes": list(column.values),
        "prior": prior.tolist(),
        **summary(posterior, right, prior),
        "annealing": asdict(settings.annealing),
        "seconds": time.perf_counter() - start,
        "seed": settings.seed,
        **provenance(device),
    }
    with writing(out):
        write_text(out / "config.yaml", text, new=True)
        write_evidence(out / "posterior.nc", {"classes": _dataset(posterior, right, among, column.values)})
        write_json(out / "result.json", result)
    return Classified(out, result, posterior)


def summary(posterior: ClassPosterior, right: Tensor, prior: Tensor) -> dict[str, Any]:
    """Accuracy and log-loss, nats, with their errors, of the places ``(B,)`` of the right classes.

    ``log_likelihood`` is log p(x) = log sum_c p(c) p(x | c): that of the run as a model of x which is told nothing.
    ``share_undecided`` is that of data whose two most probable classes differ by less than two Monte Carlo errors, and
    ``log_loss_of_prior`` that of a classifier which knows the training frequencies p(c) alone.
    """
    size, correct = len(right), (posterior.predicted == right).double()
    centre = (correct.sum().item() + 2) / (size + 4)  # Agresti & Coull 1998: not 0 where all are right
    loss = -posterior.log_prob.gather(1, right.unsqueeze(1)).squeeze(1).double()
    error = posterior.mc_se.gather(1, right.unsqueeze(1)).double()
    reliable = posterior.reliable.double().mean().item()
    best = posterior.log_prob.topk(2)
    errors = torch.stack([each.mc_se for each in posterior.evidence], -1).gather(1, best.indices)
    log_px, log_px_error = without_class(posterior, prior)
    undecided = best.values[:, 0] - best.values[:, 1] < 2 * errors.square().sum(-1).sqrt()
    return {
        "accuracy": correct.mean().item(),
        "accuracy_se": math.sqrt(centre * (1 - centre) / (size + 4)),
        "log_loss": loss.mean().item(),
        "log_loss_se": loss.std().item() / math.sqrt(size),
        "mc_se": error.square().sum().sqrt().item() / size,
        "log_loss_of_prior": -prior.to(loss)[right].log().mean().item(),
        "log_likelihood": log_px.mean().item(),
        "log_likelihood_se": log_px.std().item() / math.sqrt(size),
        "log_likelihood_mc_se": log_px_error.square().sum().sqrt().item() / size,
        "share_undecided": undecided.double().mean().item(),
        "share_reliable": reliable,
        "reliable": reliable >= 1 - FEW_DOUBTED,
    }


def without_class(posterior: ClassPosterior, prior: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) = log sum_c p(c) p(x | c), and its standard error, ``(B,)`` each."""
    given, errors = (
        torch.stack([getattr(e, name) for e in posterior.evidence], -1).double() for name in ("log_px", "mc_se")
    )
    share = posterior.log_prob.double().exp()
    return (given + prior.to(given).log()).logsumexp(-1), (share * errors).square().sum(-1).sqrt()


def classification_table(result: dict[str, Any]) -> str:
    """The result of a classification as a short table."""
    what = f"{result['num_images']:,} {result['split']} {result['noun']}s, {len(result['classes'])} classes"
    guess = f"{result['log_loss_of_prior']:.3f} by the frequencies of the classes alone"
    believe = f"not to be believed: {1 - result['share_reliable']:.1%} of the {result['noun']}s failed a check"
    return table(
        [
            (f"p({result['column']} given x)", "", what),
            (
                "accuracy",
                f"{result['accuracy']:.3f}",
                f"{result['share_undecided']:.1%} within two errors of a tie",
            ),
            ("  error", f"{result['accuracy_se']:.3f}", f"other {result['noun']}s would differ by this"),
            ("log-loss, nats", f"{result['log_loss']:.3f}", guess),
            ("  error", f"{result['log_loss_se']:.3f}", f"other {result['noun']}s would differ by this"),
            ("  Monte Carlo error", f"{result['mc_se']:.3f}", "" if result["reliable"] else believe),
            (
                "log p(x), nats",
                f"{result['log_likelihood']:.3f}",
                f"of x alone: log sum p({result['column']}) p(x given it)",
            ),
            ("  Monte Carlo error", f"{result['log_likelihood_mc_se']:.3f}", ""),
            ("seconds", f"{result['seconds']:.0f}", ""),
        ]
    )


def _classes(data: Data, run: Path) -> Column:
    """The one column that the run is told, which must be of classes."""
    columns = data.schema.condition
    if len(columns) != 1 or not columns[0].values:
        told = f"is told {names_of(columns)}" if columns else "is told nothing"
        raise RunError(f"{run} {told}: p(c given x) needs a run with one column of classes, as of --condition label")
    return columns[0]


def _places(c: Tensor, codes: Tensor) -> Tensor:
    """Which of the classes, ``(L, C)``, each condition ``(N, C)`` is."""
    return torch.cat([torch.cdist(part, codes).argmin(-1) for part in c.split(10_000)])


def _dataset(posterior: ClassPosterior, right: Tensor, among: Tensor, classes: Sequence[str | float]) -> xr.Dataset:
    dims = "datum", "class"
    values = {name: (dims, getattr(posterior, name).cpu().numpy()) for name in ("log_prob", "mc_se")}
    values |= {"right": ("datum", right.cpu().numpy()), "reliable": ("datum", posterior.reliable.cpu().numpy())}
    return xr.Dataset(cast(Any, values), coords={"datum": among.cpu().numpy(), "class": list(classes)})
