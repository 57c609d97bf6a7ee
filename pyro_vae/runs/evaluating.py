"""Evaluations: finished runs scored again, by another estimator or on other data, by one process or several."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from torch import Tensor

from pyro_vae.data.datasets import Data
from pyro_vae.errors import ContractError, RunError
from pyro_vae.helping import NOBODY, Helpers, of_evaluations
from pyro_vae.infer.diagnostics import pareto_k_threshold
from pyro_vae.infer.evidence.annealed import annealed_importance_sampling, bidirectional_monte_carlo
from pyro_vae.infer.evidence.annealing import CREMER_2018, WU_2017
from pyro_vae.infer.evidence.blocks import BLOCK, Work
from pyro_vae.infer.evidence.importance import importance_sampling
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.evidence.reverse import sandwich as sandwich_of
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import to
from pyro_vae.runs.blockwise import (
    Files,
    Overtaken,
    check_home,
    code,
    fingerprint,
    forget_parts,
    is_finished,
    one_thread,
)
from pyro_vae.runs.build import Model
from pyro_vae.runs.directory import (
    choose_device,
    inside,
    noun_of,
    provenance,
    table,
    write_evidence,
    write_json,
    write_text,
    writing,
)
from pyro_vae.runs.hub import named, trusted
from pyro_vae.runs.loading import Run, load_finished
from pyro_vae.runs.parsing import parse, settings_text
from pyro_vae.runs.ray_blocks import on_cluster
from pyro_vae.runs.ray_cluster import Cluster
from pyro_vae.runs.reading import evaluation_of
from pyro_vae.runs.scoring import (
    BY_ROUNDING,
    MANY,
    MORE_ELSEWHERE,
    believable,
    lost_rows,
    num_not_finite,
    number,
    reliable_share,
    some_images,
    unit_of,
    unreliable,
)
from pyro_vae.runs.settings import EvaluationSettings
from pyro_vae.runs.using import ESTIMATORS

PUBLISHED = {"wu_2017": WU_2017, "cremer_2018": CREMER_2018}


class Scored(NamedTuple):
    """A finished evaluation: its directory, what is in ``result.json``, and estimates of each datum, by estimator.

    Of bidirectional Monte Carlo the two estimates are ``lower`` and ``upper``.
    """

    path: Path
    result: dict[str, Any]
    evidence: dict[str, Evidence]


def score(run: Run | Path | str, **settings: Any) -> Scored:
    """Score a finished run, or that in a directory; settings are those of :class:`EvaluationSettings`, by name.

    Raises:
        RunError: for a mistake in the settings, or if the estimator cannot serve the model.
    """
    try:
        return evaluate(EvaluationSettings(Path(run), **settings_for(run, settings)))
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def settings_for(run: Run | Path | str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name: a run that was loaded without trust is scored without."""
    return ({"trust": run.trust} if isinstance(run, Run) else {}) | settings


def evaluate(settings: EvaluationSettings, text: str | None = None, ahead: Helpers = NOBODY) -> Scored:
    """Score a finished run as told by settings; ``text`` is the same as YAML, if the caller has it.

    ``ahead`` are helpers that were started before; others are, if that is not enough.

    An evaluation that was interrupted is gone on with, and one that is on its way elsewhere is shared.

    Raises:
        RunError: if the estimator cannot serve the model, or there is anything else where it would write.
        KeyboardInterrupt: when Ctrl-C was pressed, with what to do to go on.
    """
    text = settings_text(settings) if text is None else text
    device = choose_device(settings.device)
    name = settings.name or ("bdmc" if settings.estimator == "bdmc" else f"{settings.estimator}-{settings.split}")
    run_dir = settings.run_dir or inside(settings.run, "evaluations", name)
    if settings.resume and is_finished(run_dir, text):
        forget_parts(run_dir)
        print("This evaluation is finished; its result:")
        return _read_back(run_dir)
    check_home(run_dir, text)
    number = 1 if settings.ray else settings.workers or (torch.get_num_threads() if device.type == "cpu" else 1)
    if settings.num_images is not None:
        number = min(number, math.ceil(settings.num_images / BLOCK))
    with of_evaluations(max(0, number - 1 - ahead.number)) as more:
        vae, data = load_finished(settings.run, device, trust=settings.trust)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                write_text(run_dir / "config.yaml", text, new=True)
        check_home(run_dir, text, joining=True)  # another one may have been begun there meanwhile
        work = _work(settings, text, run_dir, data, device)
        work.begin()
        for helpers in (ahead, more) if number > 1 else ():
            helpers.go({"run_dir": str(run_dir), "trust": trusted(settings.run, settings.trust)})
        try:
            with _workers(settings, vae, data, work) as shared:
                return _evaluated(settings, vae, data, run_dir, work, shared)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"the same command goes on with {run_dir}") from interrupt
        except RunError:
            if not work.holds_any():  # it was refused: nothing of it shall stand in the way
                work.forget()
                (run_dir / "config.yaml").unlink(missing_ok=True)
            raise


@contextmanager
def _workers(settings: EvaluationSettings, vae: Model, data: Data, work: Files) -> Iterator[Work]:
    """Context: who computes the parts: this process and its helpers, or a cluster."""
    if not settings.ray:
        yield work
        return
    x, _ = some_images(data, settings.split, settings.num_images)
    gpus = float(work.device.type == "cuda")
    estimator = partial(_on_node, replace(settings, run_dir=None), copy.deepcopy(vae).cpu(), to(x, "cpu"), work.device)
    with on_cluster(Cluster(settings.ray, 1, gpus), work, estimator) as shared:
        yield shared


def _on_node(settings: EvaluationSettings, vae: Model, x: Tree, device: torch.device, work: Work) -> None:
    """The whole estimate, on a node, for what parts it is handed."""
    vae = vae.to(device)
    torch.manual_seed(settings.seed)
    estimate(settings, vae.model, vae.guide, to(x, device), work, progress=False)


def help_in(place: dict[str, Any]) -> None:
    """Share the evaluation that is on its way in a directory, whose run is trusted or not."""
    run_dir, config = Path(place["run_dir"]), EvaluationSettings
    argv = [f"--config={run_dir / 'config.yaml'}", f"--run_dir={run_dir}", f"--trust={place['trust']}"]
    settings, text = parse(config, argv, trust=place["trust"])
    device = choose_device(settings.device)
    vae, data = load_finished(settings.run, device, trust=settings.trust)
    _evaluated(settings, vae, data, run_dir, _work(settings, text, run_dir, data, device), progress=False)


def _work(settings: EvaluationSettings, text: str, run_dir: Path, data: Data, device: torch.device) -> Files:
    """Where the parts of an evaluation are, and what they belong to."""
    weights = fingerprint(settings.run / "model.safetensors")
    what = {name: value for name, value in yaml.safe_load(text).items() if name not in ("run", "name", "device")}
    about = {"settings": what, "weights": weights, "data": data.fingerprint, "device": device.type, "code": code()}
    return Files(run_dir, about, device)


def _evaluated(
    settings: EvaluationSettings,
    vae: Model,
    data: Data,
    run_dir: Path,
    work: Files,
    shared: Work | None = None,
    progress: bool = True,
) -> Scored:
    """Estimate what others do not, and write the result, or read what somebody else has written."""
    device, start = work.device, time.perf_counter()
    x, among = some_images(data, settings.split, settings.num_images)
    with one_thread(device):
        torch.manual_seed(settings.seed)
        try:
            result, evidence = estimate(settings, vae.model, vae.guide, x, shared or work, progress)
        except (ContractError, ValueError) as error:
            raise RunError(f"--estimator {settings.estimator}: {error}") from error
        except Overtaken:
            work.forget()
            return _read_back(run_dir)
    result |= {
        "run": named(settings.run),
        "estimator": settings.estimator,
        "split": "simulated" if settings.estimator == "bdmc" else settings.split,
        "num_images": len(among),
        "unit": unit_of(vae, data.schema),
        "seconds": time.perf_counter() - start,
        "seed": settings.seed,
        **provenance(device),
    }

    def write() -> None:
        with writing(run_dir):
            groups = {group: each.to_dataset(among) for group, each in evidence.items()}
            write_evidence(run_dir / "evidence.nc", groups)
            write_json(run_dir / "result.json", result)

    return Scored(run_dir, result, evidence) if work.finish(write) else _read_back(run_dir)


def _read_back(run_dir: Path) -> Scored:
    """An evaluation that somebody else has finished.

    Raises:
        RunError: if it cannot be read.
    """
    result, groups = evaluation_of(run_dir)
    fields = {
        group: {str(name): torch.from_numpy(each.values) for name, each in content.items()}
        for group, content in groups.items()
    }
    evidence = {
        group: Evidence(**each, num_samples=int(groups[group].attrs["num_samples"])) for group, each in fields.items()
    }
    return Scored(run_dir, result, evidence)


def estimate(
    settings: EvaluationSettings,
    model: Program,
    guide: Program,
    x: Tree,
    work: Work | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Entries of the JSON file, and evidence by group of the netCDF file."""
    annealing = PUBLISHED[settings.published] if settings.published else settings.annealing
    if settings.published and settings.annealing.num_temperatures:
        annealing = replace(annealing, num_temperatures=settings.annealing.num_temperatures)
    if settings.estimator in ("bdmc", "sandwich"):
        enclose = bidirectional_monte_carlo if settings.estimator == "bdmc" else sandwich_of
        sandwich = enclose(model, guide, x, annealing, progress=progress, work=work)
        width, error = sandwich.width()
        lower, upper = (each.log_px.mean().item() for each in (sandwich.lower, sandwich.upper))
        result = {"lower": lower, "upper": upper, "width": width, "width_se": error, "annealing": asdict(annealing)}
        both = cast(Tensor, sandwich.lower.reliable) & cast(Tensor, sandwich.upper.reliable)
        result |= reliable_share(sandwich.lower._replace(reliable=both & sandwich.upper.log_px.isfinite()))
        lost = ~(sandwich.lower.log_px.isfinite() & sandwich.upper.log_px.isfinite())
        result |= {"num_not_finite": int(lost.sum())}
        return result, {"lower": sandwich.lower, "upper": sandwich.upper}
    if settings.estimator == "annealed":
        evidence = annealed_importance_sampling(model, guide, x, annealing, progress=progress, work=work)
        how: dict[str, Any] = {"annealing": asdict(annealing), "acceptance": evidence.acceptance.mean().item()}
        how |= reliable_share(evidence)
    elif settings.estimator != "importance":
        evidence = ESTIMATORS[settings.estimator](model, guide, x, progress=progress, work=work)
        how = reliable_share(evidence)
    else:
        evidence = importance_sampling(
            *(model, guide, x, settings.num_samples, settings.proposal, settings.widening),
            progress=progress,
            work=work,
        )
        bad = evidence.share_bad_k()
        how = {"num_samples": settings.num_samples, "proposal": settings.proposal, "widening": settings.widening}
        how |= {"khat_threshold": pareto_k_threshold(settings.num_samples), "share_khat_above_threshold": bad}
        how |= {"reliable": believable(evidence)}
    log_likelihood, over_images, monte_carlo = evidence.mean()
    result = {"log_likelihood": log_likelihood, "log_likelihood_se": over_images, "mc_se": monte_carlo}
    result |= {"shortfall": evidence.shortfall()}
    how |= {"num_not_finite": num_not_finite(evidence)}
    return result | {"num_invalid": int(evidence.num_invalid.sum())} | how, {settings.estimator: evidence}


def evaluation_table(result: dict[str, Any]) -> str:
    """The result of an evaluation as a short table."""
    images = f"{noun_of(result)}s"
    rows = [(f"{result['num_images']:,} {result['split']} {images}", result["unit"], "")]
    if "width" in result:
        whose = "the exact posterior" if result["split"] == "simulated" else "long posterior chains"
        # bounds in expectation: a lower one above the upper one is chance, within its error
        crossed = ": by more than chance, the bounds are crossed" if result["width"] < -2 * result["width_se"] else ""
        rows = [
            *rows,
            ("lower", number(result["lower"]), "annealed from the start to the posterior: low in expectation"),
            ("upper", number(result["upper"]), f"annealed back from {whose}: high in expectation"),
            ("width", number(result["width"]), f"+- {number(result['width_se'])} over {images}{crossed}"),
        ]
        if not result["reliable"]:
            rows.append(("  reliable", f"{result['share_reliable']:.0%}", unreliable(result["share_reliable"], images)))
    else:
        believe = "another run would differ by this"
        if "reliable" in result and result["reliable"] is None:
            believe = "too few samples to tell whether it may be believed"
        if result.get("reliable") is False and "share_reliable" in result:
            believe = f"not to be believed: {unreliable(result['share_reliable'], images)}"
        elif result.get("reliable") is False:
            share, threshold = result["share_khat_above_threshold"] or 0.0, result["khat_threshold"]
            believe = f"not to be believed: {share:.0%} of the {images} have a Pareto k above {threshold:.2f}"
            believe = believe if share > MANY else MORE_ELSEWHERE
            believe = BY_ROUNDING if result["share_khat_above_threshold"] is None else believe
        believe = "not to be believed: it is no number" if result.get("num_not_finite") else believe
        rows += [
            (f"log p(x), {result['estimator']}", number(result["log_likelihood"]), ""),
            ("  Monte Carlo error", number(result["mc_se"]), believe),
            ("  low by about", number(result["shortfall"]), "in expectation, if that error may be believed"),
            (f"  error over {images}", number(result["log_likelihood_se"]), f"other {images} would differ by this"),
        ]
    rows += [(name, count.split()[0], told) for name, count, told in lost_rows(result)]
    rows.append(("seconds", f"{result['seconds']:.0f}", ""))
    return table(rows)
