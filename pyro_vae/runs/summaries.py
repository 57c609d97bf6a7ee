"""What the runs of a study say: a summary of each contender, differences to the first, their table and figure."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from pyro_vae.errors import RunError
from pyro_vae.runs import figures
from pyro_vae.runs.comparing import MUST_AGREE, Gaps, annealed_alike, gaps_of
from pyro_vae.runs.directory import table, write_json, write_text, writing
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.reading import LATER_SUMMARY, SUMMARY, check_entries, json_of
from pyro_vae.runs.scoring import number


class Summary(NamedTuple):
    """What the seeds of one contender say; every error is a standard error, None if there is only one seed.

    Attributes:
        name: of the contender.
        reference: the contender that it is compared with.
        unit: of all log-likelihoods.
        elbo: mean over seeds.
        estimator: of ``log_likelihood`` and the differences: ``annealed`` if these runs and those of the reference have
            that, of the same images, else ``importance``.
        log_likelihood: mean over seeds.
        importance_sampled: the same by importance sampling from the guide.
        seed_error: of ``log_likelihood``, over seeds.
        differences: log-likelihood minus that of the reference, for each seed.
        difference: their mean.
        difference_seed_error: of ``difference``, over seeds: other seeds would differ by this.
        difference_image_error: of ``difference``, over images: another test set would differ by this.
        share_khat: of images whose Pareto k is above its threshold for so many samples; there the importance-sampled
            log-likelihood is too low by an unknown amount.
        active_units: mean over seeds.
        seconds: of training, mean over seeds.
        bits_per_dim: mean over seeds; None where it makes no sense.
        validation: log-likelihood of validation data by importance sampling, mean over seeds: what to choose by. NaN in
            studies of earlier versions.
        validation_seed_error: of ``validation``, over seeds.
        validation_error: of ``validation`` minus that of the reference, over validation data, foretold from the test
            data, and of its Monte Carlo error. NaN in studies of earlier versions.
    """

    name: str
    reference: str
    unit: str
    elbo: float
    estimator: str
    log_likelihood: float
    importance_sampled: float
    seed_error: float | None
    differences: list[float]
    difference: float
    difference_seed_error: float | None
    difference_image_error: float
    share_khat: float
    active_units: float
    seconds: float
    bits_per_dim: float | None
    validation: float = math.nan
    validation_seed_error: float | None = None
    validation_error: float = math.nan

    def margin(self) -> float:
        """Half the width of the 95 % interval of ``difference``, over seeds (by Student's t) and images."""
        return math.hypot(
            _of_seeds(self.difference_seed_error, len(self.differences)), 1.96 * self.difference_image_error
        )


def _of_seeds(error: float | None, seeds: int) -> float:
    """Half the width of a 95 % interval by Student's t; 0 of a single seed, of which nothing is known."""
    return 0.0 if error is None or seeds < 2 else float(stdtrit(seeds - 1, 0.975)) * error


def summarize(directories: dict[str, list[Path]]) -> list[Summary]:
    """A summary of each contender, compared with the first one that it can be compared with at all."""
    references: dict[str, tuple[str, list[Run]]] = {}
    summaries = []
    for name, paths in directories.items():
        finished = [load(path) for path in paths]
        results = [run.result for run in finished]
        meaning = repr([results[0].get(each) for each in MUST_AGREE])  # with lists in it
        reference, others = references.setdefault(meaning, (name, finished))
        estimator = "annealed" if annealed_alike([*finished, *others]) else "importance"
        pairs = list(zip(finished, others, strict=True))
        paired = difference(pairs, estimator)
        key = "annealed_log_likelihood" if estimator == "annealed" else "test_log_likelihood"
        likelihoods = _values(results, key)
        chosen = _values([{"v": each.get("validation_log_likelihood")} for each in results], "v")
        summaries.append(
            Summary(
                name=name,
                reference=reference,
                unit=results[0]["unit"],
                elbo=_mean(results, "test_elbo"),
                estimator=estimator,
                log_likelihood=statistics.fmean(likelihoods),
                importance_sampled=_mean(results, "test_log_likelihood"),
                seed_error=standard_error(likelihoods),
                **paired._asdict(),
                share_khat=_mean(results, "share_khat_above_threshold"),
                active_units=_mean(results, "active_units"),
                seconds=_mean(results, "train_seconds"),
                bits_per_dim=None if results[0]["bits_per_dim"] is None else _mean(results, "bits_per_dim"),
                validation=statistics.fmean(chosen),
                validation_seed_error=standard_error(chosen),
                validation_error=_validation_error(results, paired.difference_image_error),
            )
        )
    return summaries


def _validation_error(results: Sequence[dict[str, Any]], over_images: float) -> float:
    """The error of a validation log-likelihood, against the reference: of as many data as there are, and Monte Carlo's.

    What each validation datum has is not kept: differences vary over them as over the test data.
    """
    size = results[0].get("num_validation_images")
    errors = [error for each in results if (error := each.get("validation_mc_se")) is not None]
    if not size or len(errors) < len(results):
        return math.nan
    return math.hypot(over_images * math.sqrt(results[0]["num_images"] / size), *(e / len(errors) for e in errors))


def best_by_validation(summaries: Sequence[Summary]) -> Summary:
    """The summary of the highest validation log-likelihood among those with the reference of the first one.

    Raises:
        RunError: if a study of an earlier version knows none.
    """
    known = [s for s in summaries if s.reference == summaries[0].reference and math.isfinite(s.validation)]
    if not known:
        raise RunError("no run of this study has validation numbers, which earlier versions did not write")
    return max(known, key=lambda s: s.validation)


def choice(summaries: Sequence[Summary]) -> list[str]:
    """The line that says which contender the validation data choose, if they are known."""
    lost = [s.name for s in summaries if not math.isfinite(s.validation)]
    if len(summaries) < 2 or len(lost) == len(summaries):
        return []
    best = best_by_validation(summaries)
    told = f" {', '.join(lost)}: not reliable, it is NaN or infinite." if lost else ""
    spread = "" if best.validation_seed_error is None else f" +- {best.validation_seed_error:.2f} over seeds"
    how = f"log p(x) {best.validation:.2f}{spread}, by importance sampling"
    return ["", f"The validation data choose {best.name}: {how}.{_lead(best, summaries)}{told}"]


def _lead(best: Summary, summaries: Sequence[Summary]) -> str:
    """By how much the chosen one leads, and whether that is more than its error."""
    others = [s for s in summaries if s.reference == best.reference and s is not best and math.isfinite(s.validation)]
    if not others:
        return ""
    second = max(others, key=lambda s: s.validation)
    gap, both = best.validation - second.validation, (best, second)
    over_data = math.hypot(*(1.96 * s.validation_error for s in both))
    over_seeds = math.hypot(*(_of_seeds(s.validation_seed_error, len(s.differences)) for s in both))
    if not math.isfinite(over_data):
        over_data = 0.0 if over_seeds else math.nan  # an earlier version's
    margin = math.hypot(over_data, over_seeds)
    told = f" {second.name} is {gap:.2f} nats lower"
    if not math.isfinite(margin):
        return f"{told}; how sure that is was not kept."
    return f"{told}, +- {margin:.2f} (95 %)" + (": that is within its error." if gap <= margin else ".")


def estimators(summaries: Sequence[Summary]) -> str:
    """How log p(x) was estimated: of all alike, or of each contender."""
    titles = {"annealed": "annealed", "importance": "by importance sampling"}
    names = {each: [s.name for s in summaries if s.estimator == each] for each in titles}
    found = [each for each in titles if names[each]]
    return " and ".join(titles[each] + f" for {', '.join(names[each])}" * (len(found) > 1) for each in found)


class PairedDifference(NamedTuple):
    """Differences of log p(x), paired by seed and image; see :class:`Summary`."""

    differences: list[float]
    difference: float
    difference_seed_error: float | None
    difference_image_error: float


def difference(pairs: Sequence[tuple[Run, Run]], estimator: str) -> PairedDifference:
    """How much better the first runs are than the second, which have the same seeds."""
    gaps = [gaps_of(run, other, estimator) for run, other in pairs]
    differences = [each.difference().mean for each in gaps]
    with np.errstate(invalid="ignore"):  # of infinities there is no mean, which is NaN
        values = [np.mean(each, axis=0) for each in ([g.rough for g in gaps], [g.fine for g in gaps])]
        errors = [
            np.linalg.norm(each, axis=0) / len(gaps)
            for each in ([g.rough_error for g in gaps], [g.fine_error for g in gaps])
        ]
    over_images = Gaps(values[0], errors[0], values[1], errors[1], gaps[0].among).difference().se
    return PairedDifference(differences, statistics.fmean(differences), standard_error(differences), over_images)


def summary_table(summaries: Sequence[Summary], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """Summaries with the same reference as a Markdown table, with ``more`` columns by their headers."""
    reference = summaries[0].reference
    header = ["", "ELBO", "importance", "log p(x)", "+- seeds", f"minus {reference}", "+- seeds", "+- images"]
    header += ["bad k", "active units", "train s"]
    validated = any(math.isfinite(s.validation) for s in summaries)
    header += ["validation"] * validated
    bits = any(s.bits_per_dim is not None for s in summaries)
    rows = [header + ["bits/dim"] * bits]
    for s in summaries:
        row = [s.name, *(number(value, 2) for value in (s.elbo, s.importance_sampled, s.log_likelihood))]
        row.append(number(s.seed_error, 2))
        if s.name == reference:
            row += ["", "", ""]
        else:
            told = f"{s.difference:+.2f}" if math.isfinite(s.difference) else "not finite"
            row += [told, number(s.difference_seed_error, 2), number(s.difference_image_error, 2)]
        share = f"{s.share_khat:.0%}" if math.isfinite(s.share_khat) else "-"
        row += [share, number(s.active_units, 1), number(s.seconds, 0)]
        row += [number(s.validation, 2)] * validated
        rows.append(row + [number(s.bits_per_dim)] * bits)
    for name, cells in (more or {}).items():
        rows = [[*row, cell] for row, cell in zip(rows, [name, *cells], strict=True)]
    return table(rows)


def forest(summaries: Sequence[Summary], path: figures.Place, title: str) -> None:
    """Differences of log p(x) to the reference: each seed, their mean and its 95 % interval over seeds and data."""
    others = [s for s in summaries if s.name != s.reference]
    others = [s for s in others if math.isfinite(s.difference)] or others  # what is not finite is in the table
    with figures.figure(path, 6.4, 1.2 + 0.4 * len(others)) as axes:
        for row, s in enumerate(others):
            axes.scatter(s.differences, [row] * len(s.differences), s=12, color="0.6", zorder=2)
            axes.errorbar(s.difference, row, xerr=s.margin(), fmt="o", color="C0", capsize=3, zorder=3)
        axes.axvline(0, color="C3", lw=1)
        axes.set_yticks(range(len(others)), [figures.plain(s.name) for s in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        reference = figures.plain(others[0].reference)
        axes.set(xlabel=f"minus {reference}, nats per datum; bars: 95 %", title=title)


def write_study(
    run_dir: Path, text: str, summaries: Sequence[Summary], directories: dict[str, list[Path]], **more: Any
) -> None:
    """Print ``text`` and write it to table.md; write result.json, with devices, versions and commits of the runs."""
    results = [load(path).result for paths in directories.values() for path in paths]
    origins = {}
    for name in ("device", "versions", "commit"):
        origins[name] = [each for i, r in enumerate(results) if (each := r[name]) not in [s[name] for s in results[:i]]]
    with writing(run_dir):
        write_text(run_dir / "table.md", text + "\n")
        write_json(run_dir / "result.json", {"summaries": [s._asdict() for s in summaries], **more, **origins})
    print(f"\n{text}\n\n{run_dir}")


def load_study(directory: Path | str) -> list[Summary]:
    """What a finished study says of each contender; version 0.1.0 wrote it to summary.json.

    Raises:
        RunError: if ``directory`` holds no finished study.
    """
    files = [file for name in ("result.json", "summary.json") if os.path.lexists(file := Path(directory) / name)]
    if not files:
        raise RunError(f"{directory} holds no finished study: there is no result.json")
    summaries = json_of(files[0]).get("summaries")
    if not (isinstance(summaries, list) and summaries and all(isinstance(each, dict) for each in summaries)):
        raise RunError(f"{files[0]} is no summary of a study: there are no 'summaries' in it")
    for each in summaries:
        check_entries(files[0], each, SUMMARY, LATER_SUMMARY)
    return [_summary(each) for each in summaries]


def _summary(content: dict[str, Any]) -> Summary:
    """A summary as it was written; before there were annealed estimates, there was one log-likelihood alone."""
    estimator = "annealed" if "importance_sampled" in content else "importance"
    content = {"estimator": estimator, "importance_sampled": content["log_likelihood"]} | content
    # these may be None; for others JSON has null for NaN
    absent = ("seed_error", "difference_seed_error", "bits_per_dim", "validation_seed_error")
    content = Summary._field_defaults | content
    values = {name: content[name] for name in Summary._fields}
    known: dict[str, Any] = {n: math.nan if v is None and n not in absent else v for n, v in values.items()}
    return Summary(**known)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of ``values``; None for a single one, NaN if one of them is."""
    if len(values) > 1 and not all(map(math.isfinite, values)):  # which the standard library cannot
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(_values(results, name))


def _values(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One number of each result; JSON has null for NaN."""
    return [math.nan if r[name] is None else r[name] for r in results]
