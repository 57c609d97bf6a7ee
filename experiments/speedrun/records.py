"""Entries of the speedrun, the rule by which one becomes a record, and the table of records."""

import json
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.speedrun.tracks import BOARDS, CUSTOMARY, LEAST_KL, Board
from pyro_vae import runs
from pyro_vae.runs.directory import several

ROOT = Path(__file__).parents[2]
HOME = ROOT / "experiments/results/speedrun"
"""Where the table of records is kept."""
PAGE = ROOT / "docs/speedrun.md"
"""The page that shows it, between two marks."""
MARKS = "<!-- records -->", "<!-- end of records -->"
GENERATED = ("experiments/results", "docs/speedrun.md")
"""What measurements write: a checkout with changes there alone is as clean as a commit."""


@dataclass(frozen=True)
class Entry:
    """What a recipe reached: means over seeds, in nats per image, and their errors.

    Args:
        recipe: its name.
        fingerprint: of its settings.
        tracks: to which it belongs, one letter each.
        num_seeds: trainings.
        seconds: of training, mean over seeds: steps, compiling, and the validation ELBO after each epoch.
        seconds_error: over seeds; 0 for one seed.
        annealed: log p(x) by annealed importance sampling.
        annealed_error: over seeds and Monte Carlo; for one seed Monte Carlo alone.
        importance: log p(x) by importance sampling.
        importance_error: likewise.
        num_samples: of importance sampling.
        elbo: the plain ELBO of the test images.
        kl: E[KL(q(z given x) || p(z))] of test images, in nats: what the latents carry, at most.
        machine: the processor and its threads, or the GPU.
        date: when the last seed was finished.
        commit: of the code; None if it had changes, or is not known.
        versions: of Python and packages.
        doubts: why this is no record, whatever its numbers.
    """

    recipe: str
    fingerprint: str
    tracks: str
    num_seeds: int
    seconds: float
    seconds_error: float
    annealed: float
    annealed_error: float
    importance: float
    importance_error: float
    num_samples: int
    elbo: float
    kl: float
    machine: str
    date: str
    commit: str | None
    versions: dict[str, str]
    doubts: tuple[str, ...] = ()

    def value(self, board: Board) -> tuple[float, float]:
        """log p(x) by the estimator of a board, and its error."""
        if board.estimator == "annealed":
            return self.annealed, self.annealed_error
        return self.importance, self.importance_error


class Record(NamedTuple):
    """An entry that beat the others on a board when it came."""

    board: str
    entry: Entry


class Verdict(NamedTuple):
    """Whether an entry is a record, and why."""

    board: str
    is_record: bool
    reason: str


def decide(board: Board, entry: Entry, records: Sequence[Record]) -> Verdict:
    """Whether an entry is a new record of a board.

    With a target: it has to be reached by more than the entry's error, and in less time than the record, by more than
    the error of the difference of seconds. With a limit: the training takes no longer, and log p(x) is above that of
    the record by more than the error of the difference, or at least as high in less time, by more than its error.
    Records of other machines are others' records.
    """

    def no(reason: str) -> Verdict:
        return Verdict(board.name, False, reason)

    if reason := reason_against(board, entry):
        return no(reason)
    old = holder(board, entry.machine, records)
    if old is None:
        return Verdict(board.name, True, "the first on this machine")
    value, error = entry.value(board)
    faster, of_seconds = old.seconds - entry.seconds, math.hypot(old.seconds_error, entry.seconds_error)
    time = f"{abs(faster):.1f} +- {of_seconds:.1f} s {'faster' if faster > 0 else 'slower'} than {old.recipe}"
    if board.target is not None:
        return Verdict(board.name, faster > of_seconds, time)
    before, old_error = old.value(board)
    gain, of_gain = value - before, math.hypot(error, old_error)
    better = f"{abs(gain):.2f} +- {of_gain:.2f} nats {'better' if gain > 0 else 'worse'} than {old.recipe}"
    if gain > of_gain:
        return Verdict(board.name, True, better)
    if gain >= 0 and faster > of_seconds:
        return Verdict(board.name, True, f"as good as {old.recipe}, and {time}")
    return no(f"{better}, {time}")


def reason_against(board: Board, entry: Entry) -> str | None:
    """Why an entry does not stand on a board, whatever the record is; None if it does."""
    value, error = entry.value(board)
    if board.track not in entry.tracks:
        return f"not of track {board.track}"
    if entry.doubts:
        return "; ".join(entry.doubts)
    if entry.num_seeds < board.least_seeds:
        return f"{entry.num_seeds} seeds, {board.least_seeds} are needed"
    if not all(map(math.isfinite, (value, error, entry.seconds, entry.kl))):
        return "a number is NaN or infinite"
    if board.estimator == "importance" and entry.num_samples != CUSTOMARY:
        return f"{entry.num_samples:,} importance samples, {CUSTOMARY:,} are meant"
    if board.track == "C" and entry.kl < LEAST_KL:
        return f"the latents carry {entry.kl:.2f} nats, {LEAST_KL:g} are needed to be a VAE"
    if board.target is not None and not value - error >= board.target:
        return f"{value:.2f} +- {error:.2f} does not reach {board.target:.2f} by more than its error"
    if board.limit is not None and entry.seconds > board.limit:
        return f"{entry.seconds:.0f} s, at most {board.limit:.0f} are allowed"
    return None


def holder(board: Board, machine: str, records: Sequence[Record]) -> Entry | None:
    """The entry that holds a board on a machine: the last record."""
    found = [record.entry for record in records if (record.board, record.entry.machine) == (board.name, machine)]
    return found[-1] if found else None


def enter(entries: Sequence[Entry], records: Sequence[Record]) -> tuple[list[Verdict], list[Record]]:
    """What becomes of entries, one after the other, on every board of their tracks: verdicts, and all records then."""
    verdicts, kept = [], list(records)
    for entry in entries:
        for board in (each for each in BOARDS if each.track in entry.tracks):
            verdict = decide(board, entry, kept)
            verdicts.append(verdict._replace(reason=f"{entry.recipe}: {verdict.reason}"))
            kept += [Record(board.name, entry)] if verdict.is_record else []
    return verdicts, kept


# From finished runs to an entry


def entry_of(
    name: str, fingerprint: str, tracks: str, finished: Sequence[dict[str, Any]], marks: Sequence[dict[str, Any]]
) -> Entry:
    """The entry of a recipe.

    Args:
        name: of the recipe.
        fingerprint: of its settings.
        tracks: to which it belongs.
        finished: ``result.json`` of each seed.
        marks: what was written beside each: ``commit``, ``machine``, ``date``, ``doubts``.
    """

    def over_seeds(key: str) -> tuple[float, float]:
        values = [_number(result[key]) for result in finished]
        return sum(values) / len(values), runs.standard_error(values) or 0.0

    def with_monte_carlo(key: str, error: str) -> tuple[float, float]:
        # not divided by the number of seeds: all score the same images, which are most of it
        value, spread = over_seeds(key)
        return value, math.hypot(spread, over_seeds(error)[0])

    doubts = [doubt for mark in marks for doubt in mark["doubts"]]
    if len({mark["machine"] for mark in marks}) > 1:
        doubts.append("seeds were trained on different machines")
    commits = {mark["commit"] for mark in marks}
    if commits == {None} or None in commits:
        doubts.append("the code has changes, or is no git checkout: commit them first")
    elif len(commits) > 1:
        doubts.append("seeds were trained at different commits")
    if any(not result.get("annealed_reliable") for result in finished):
        doubts.append("the annealed estimate is not reliable")
    if any(result["num_images"] != 10_000 for result in finished):
        doubts.append("not all test images are scored")
    seconds, seconds_error = over_seeds("train_seconds")
    annealed, annealed_error = with_monte_carlo("annealed_log_likelihood", "annealed_mc_se")
    importance, importance_error = with_monte_carlo("test_log_likelihood", "mc_se")
    return Entry(
        recipe=name,
        fingerprint=fingerprint,
        tracks=tracks,
        num_seeds=len(finished),
        seconds=seconds,
        seconds_error=seconds_error,
        annealed=annealed,
        annealed_error=annealed_error,
        importance=importance,
        importance_error=importance_error,
        num_samples=finished[0]["num_samples"],
        elbo=over_seeds("test_elbo")[0],
        kl=over_seeds("kl")[0],
        machine=marks[0]["machine"],
        date=max(mark["date"] for mark in marks),
        commit=commits.pop() if len(commits) == 1 else None,
        versions=finished[0]["versions"],
        doubts=tuple(dict.fromkeys(doubts)),
    )


def _number(value: float | None) -> float:
    """JSON has null for NaN."""
    return math.nan if value is None else value


def machine(device: torch.device, threads: int) -> str:
    """The processor and its threads, or the GPU: on others, seconds are others."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {several(threads, 'thread')}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def clean_commit() -> str | None:
    """The commit of this checkout; None if anything has changed since but what measurements write."""
    git = ["git", "-C", str(ROOT)]
    without = [f":(exclude){path}" for path in GENERATED]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", *without], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if changed else head


# The table


def load(home: Path) -> list[Record]:
    """The records that are kept there, the oldest first; none if there is no table.

    Raises:
        RunError: if the table is damaged.
    """
    path = home / "records.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["records"]
        return [_record(row) for row in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runs.RunError(f"--records: {path} is no table of records: {error}") from error


def _record(row: dict[str, Any]) -> Record:
    known = {each.name for each in fields(Entry)}
    kept: dict[str, Any] = {name: value for name, value in row.items() if name in known}
    kept["doubts"] = tuple(kept["doubts"])
    return Record(row["board"], Entry(**kept))


def save(home: Path, records: Sequence[Record]) -> None:
    """Write the table as JSON and as Markdown, and into the page of the documentation if it is that of the project.

    Raises:
        RunError: if it cannot be written.
    """
    with runs.writing(home):
        home.mkdir(parents=True, exist_ok=True)
        content = [{"board": record.board} | asdict(record.entry) for record in records]
        runs.write_json(home / "records.json", {"records": content})
        runs.write_text(home / "table.md", table(records) + "\n")
        if home.resolve() == HOME and PAGE.exists():
            runs.write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), records))


def with_table(page: str, records: Sequence[Record]) -> str:
    """A page with the table between its marks."""
    begin, end = MARKS
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{table(records)}\n\n{end}{rest.split(end)[1]}"


def table(records: Sequence[Record]) -> str:
    """All records as a Markdown table: board by board and machine by machine, the one that holds first."""
    if not records:
        return "There is no record yet."
    header = ["board", "recipe", "seconds", "log p(x)", "IS", "samples", "ELBO", "KL", "seeds", "machine", "date"]
    rows: list[Sequence[str]] = [[*header, "commit", "torch"]]
    for board in BOARDS:
        mine = [record.entry for record in records if record.board == board.name]
        for each in dict.fromkeys(entry.machine for entry in mine):
            standing = [entry for entry in reversed(mine) if entry.machine == each]
            rows += [_row(board, entry, holds=entry is standing[0]) for entry in standing]
    return runs.table(rows)


def _row(board: Board, entry: Entry, holds: bool) -> list[str]:
    return [
        board.name if holds else f"{board.name}, before",
        entry.recipe,
        pair(entry.seconds, entry.seconds_error, 0),
        pair(entry.annealed, entry.annealed_error),
        pair(entry.importance, entry.importance_error),
        f"{entry.num_samples:,}",
        f"{entry.elbo:.2f}",
        f"{entry.kl:.1f}",
        f"{entry.num_seeds}",
        entry.machine,
        entry.date,
        str(entry.commit)[:7],
        entry.versions.get("torch", "-"),
    ]


def pair(value: float, error: float, digits: int = 2) -> str:
    """A number with its error."""
    return f"{value:,.{digits}f} +- {error:.{digits}f}"
