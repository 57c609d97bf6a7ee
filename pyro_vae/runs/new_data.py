"""Commands that use a finished run on new data: score, embed, sample, reconstruct, impute."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.data.datasets import names_of
from pyro_vae.data.files import NewData, read_new
from pyro_vae.data.incoming import restored
from pyro_vae.errors import DataError, RunError
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.runs.directory import choose_device, table
from pyro_vae.runs.given import check_made
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.output import check_out, write_result
from pyro_vae.runs.scoring import number, unit_of
from pyro_vae.runs.settings import check_seed
from pyro_vae.runs.using import Using

Given = dict[str, str | float] | float | str | None
"""A condition for all rows: the value of its one column, or values by name."""

FILES = """
FILE is a .npy or .npz file of arrays, a .csv, .tsv or .parquet file, a picture, or a folder of pictures. Tables are
read by the names of their columns, in any order. Pixels that are 0 and 1 are taken as a binary model's observations as
they are; others are binarized or dequantized as those of the run were, with its seed, which is printed. NaN was not
seen. The run's data set is not needed. Nothing is ever overwritten."""

Arrays = dict[str, tuple[tuple[str, ...], Tensor]]
"""Arrays with the names of their first dimensions."""


@dataclass(frozen=True)
class _Settings:
    """Settings that all commands on a file have.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        file: new data; may stand second, without --file.
        out: file to write, whose ending says how: see above.
        array: name of the array of an .npz file; null: the only one, or that called test.
        given: of a run with a condition: its value for all rows, such as 3, or values by name, such as '{label: 3}';
            null: columns, or arrays, of the file that are called as it is.
        seed: of random draws, at least 0.
        device: auto takes a GPU if there is one.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
    """

    MAIN: ClassVar[tuple[str, ...]] = ("run", "file", "out", "array", "given", "seed", "device")

    run: Path
    file: Path
    out: Path | None = None
    array: str | None = None
    given: Given = None
    seed: int = 0
    device: str = "auto"
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        check_seed(self.seed)


@dataclass(frozen=True)
class ScoreSettings(_Settings):
    """Settings of scores of new data.

    Args:
        estimator: annealed: annealed importance sampling, as pyro-vae evaluate; importance, smc, bridge, thermodynamic.
        num_samples: importance samples per row, at least 1.
        annealing: settings of annealed importance sampling.
    """

    DESCRIPTION: ClassVar[str] = (
        "log p(x) of each row of new data, in nats, with its error.\n\nUsage: pyro-vae score RUN FILE [options]\n"
        + FILES
        + "\n\n--out scores.csv, .nc or .npz has, for each row, log_px, mc_se (its Monte Carlo error), ess and khat"
        "\nwhere the estimator has them, and whether log_px is reliable. Without --out a table is printed."
    )
    MAIN: ClassVar[tuple[str, ...]] = (*_Settings.MAIN[:3], "estimator", "num_samples", *_Settings.MAIN[3:])

    estimator: Literal["annealed", "importance", "smc", "bridge", "thermodynamic"] = "annealed"
    num_samples: int = 5000
    annealing: Annealing = field(default_factory=Annealing)

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")
        if self.estimator != "importance" and self.num_samples != ScoreSettings.num_samples:
            raise ValueError(f"--num_samples is for --estimator importance, not {self.estimator}")
        if self.estimator != "annealed" and self.annealing != Annealing():
            raise ValueError(f"--annealing is for --estimator annealed, not {self.estimator}")


@dataclass(frozen=True)
class EmbedSettings(_Settings):
    """Settings of embeddings of new data.

    Args:
        num_samples: draws of q(z given x) of each row, at least 1; null: the posterior means.
    """

    DESCRIPTION: ClassVar[str] = (
        "Latents of new data: posterior means of z given x, or draws.\n\nUsage: pyro-vae embed RUN FILE [options]\n"
        + FILES
        + "\n\n--out embedding.csv (the default), .npy, .npz or .nc; draws (S, N, D) need one of the last three."
    )
    MAIN: ClassVar[tuple[str, ...]] = (*_Settings.MAIN[:3], "num_samples", *_Settings.MAIN[3:])

    num_samples: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")


@dataclass(frozen=True)
class ReconstructSettings(_Settings):
    """Settings of reconstructions of new data."""

    DESCRIPTION: ClassVar[str] = (
        "E[x given z] at the posterior mean of z, for each row of new data.\n\n"
        "Usage: pyro-vae reconstruct RUN FILE [options]\n"
        + FILES
        + "\n\n--out reconstruction.png, originals on top (the default of images), .csv (of others), .npy, .npz or .nc."
        "\nColumns with a list of values have the most probable one."
    )


@dataclass(frozen=True)
class ImputeSettings(_Settings):
    """Settings of imputations.

    Args:
        num_samples: draws of z of each row, by whose weights values are averaged, at least 1.
        num_draws: draws of what was not seen of each row, at least 1.
        draws: write the draws (S, N, X) too, to .npz or .nc.
    """

    DESCRIPTION: ClassVar[str] = (
        "Values for what was not seen, which is NaN or, in a table, empty: its mean given what was seen.\n\n"
        "Usage: pyro-vae impute RUN FILE [options]\n"
        + FILES
        + "\n\n--out imputed.csv (the default of tables), .npy (of "
        "others), .npz or .nc. Columns with a list of\nvalues get the most frequent draw. .npz and .nc have standard "
        "deviations, and log p(x_seen), too."
    )
    MAIN: ClassVar[tuple[str, ...]] = (*_Settings.MAIN[:3], "num_samples", "num_draws", "draws", *_Settings.MAIN[3:])

    num_samples: int = 1000
    num_draws: int = 100
    draws: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_samples", "num_draws"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.draws and self.out is not None and self.out.suffix not in (".npz", ".nc"):
            raise ValueError(f"--draws needs --out of .npz or .nc, got {self.out}")


@dataclass(frozen=True)
class SampleSettings:
    """Settings of draws from a model.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        num_samples: how many, at least 1.
        given: of a run with a condition: its value, such as 3, or values by name, such as '{label: 3, age: 40}'.
        out: file to write.
        seed: of the draws, at least 0.
        device: auto takes a GPU if there is one.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
    """

    DESCRIPTION: ClassVar[str] = (
        "Draws of x from the model of a finished run, whose data set is not needed.\n\n"
        "Usage: pyro-vae sample RUN [options]\n\n--out samples.png (the default of images), .csv (of others), .npy, "
        ".npz or .nc; nothing is ever overwritten."
    )

    run: Path
    num_samples: int = 100
    given: Given = None
    out: Path | None = None
    seed: int = 0
    device: str = "auto"
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        check_seed(self.seed)
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")


class Done(NamedTuple):
    """What a command made: the file it wrote, if it did; what is in it; and a text to show."""

    path: Path | None
    result: xr.Dataset
    text: str


def score_new(settings: ScoreSettings) -> Done:
    """log p(x) of each row of new data."""
    check_out(settings.out, (".csv", ".nc", ".npz"))
    using, new, run = _opened(settings)
    how: dict[str, Any] = {"annealed": {"settings": settings.annealing}, "importance": {}}.get(settings.estimator, {})
    if settings.estimator == "importance":
        how = {"num_samples": settings.num_samples}
    torch.manual_seed(settings.seed)
    evidence = using.score(new.x, settings.estimator, _given(settings, new), progress=True, **how)
    unit = unit_of(run.model, using.schema)
    result = evidence.to_dataset(unit=unit, run=run.name, estimator=settings.estimator, seed=settings.seed)
    result = _numbered(result, new.rows)
    if settings.out is not None:
        write_result(result, settings.out, "log_px")
    text = score_table(evidence, result, unit, settings.estimator) + _lost(result[["log_px"]])
    return Done(settings.out, result, text)


MOST_NAMED = 10


def score_table(evidence: Evidence, result: xr.Dataset, unit: str, estimator: str) -> str:
    """Scores of new data as a short table: the first rows, their mean, and which ones are not reliable."""
    names = [str(name) for name in result["datum"].values]
    good = None if evidence.reliable is None else evidence.reliable.tolist()
    rows = [("row", f"log p(x), {unit}", "error", "reliable")]
    for place in range(min(MOST_NAMED, len(names))):
        value, error = evidence.log_px[place].item(), evidence.mc_se[place].item()
        rows.append(
            (names[place], number(value), number(error), "" if good is None else "yes" if good[place] else "no")
        )
    if len(names) > MOST_NAMED:
        rows.append(("...", "", "", ""))
    mean, over_rows, monte_carlo = evidence.mean()
    rows.append((f"mean of {len(names):,}", number(mean), number(monte_carlo), ""))
    text = table(rows) + f"\n\n{estimator}; other rows would change the mean by {number(over_rows)}"
    odd = [] if good is None else [name for name, each in zip(names, good, strict=True) if not each]
    if odd:
        more = f" and {len(odd) - MOST_NAMED:,} more" if len(odd) > MOST_NAMED else ""
        text += "\nnot to be believed, far from the training data or hard to score: "
        text += f"row {', '.join(odd[:MOST_NAMED])}{more}"
    return text


def _lost(result: xr.Dataset, padded: bool = False) -> str:
    """What is said of numbers that are NaN or infinite, where there are any; NaN is what a sequence ends with."""
    found = {name: each for name, each in result.items() if each.dtype.kind == "f"}
    bad = {name: np.isinf(each.values) if padded else ~np.isfinite(each.values) for name, each in found.items()}
    count, whole = sum(int(each.sum()) for each in bad.values()), sum(each.size for each in bad.values())
    if not count:
        return ""
    rows = [np.argwhere(each)[0][found[name].dims.index("datum")] for name, each in bad.items() if each.any()]
    first = result["datum"].values[int(min(rows))]
    return f"\n{count:,} of {whole:,} numbers are NaN or infinite, the first in row {first}: not to be believed"


def embed_new(settings: EmbedSettings) -> Done:
    """Latents of new data."""
    out = settings.out or Path("embedding.csv" if settings.num_samples is None else "embedding.npy")
    check_out(out, (".csv", ".npy", ".npz", ".nc"))
    using, new, run = _opened(settings)
    torch.manual_seed(settings.seed)
    found = using.encode(new.x, settings.num_samples, _given(settings, new))
    latents = found if isinstance(found, dict) else {"z": found}
    before = ("datum",) if settings.num_samples is None else ("draw", "datum")
    arrays: Arrays = {name: (before, each) for name, each in latents.items()}
    result = _numbered(_dataset(arrays, run, settings.seed), new.rows)
    write_result(result, out, next(iter(latents)))
    text = f"{result.sizes['datum']:,} {using.schema.noun}s, " + _latents_told(latents)
    return Done(out, result, text + _lost(result))


def _latents_told(latents: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} of {each.shape[-1]} dimensions" for name, each in latents.items())


def sample_new(settings: SampleSettings) -> Done:
    """Draws of x."""
    run = load(settings.run, settings.trust)
    using = Using(run.using.vae.to(choose_device(settings.device)), run.schema)
    out = settings.out or Path("samples.png" if _is_image(using) else "samples.csv")
    check_out(out, _endings(using))
    torch.manual_seed(settings.seed)
    x = using.sample(settings.num_samples, settings.given)
    result = _observations(x, "x", run, settings.seed)
    write_result(result, out, "x", [x] if _is_image(using) else [], using.schema)
    told = f" given {names_of(run.schema.condition)}" if run.schema.condition else ""
    lost = _lost(result, bool(using.schema.entries))
    return Done(out, result, f"{settings.num_samples:,} draws of p(x{told}){lost}")


def reconstruct_new(settings: ReconstructSettings) -> Done:
    """Reconstructions of new data."""
    using, new, run = _opened(settings)
    out = settings.out or Path("reconstruction.png" if _is_image(using) else "reconstruction.csv")
    check_out(out, _endings(using))
    data = using.data(new.x, _given(settings, new))
    found = using.decode_data(data)
    result = _numbered(_observations(found, "x", run, settings.seed), new.rows)
    pictures = [restored(using.observed_of(data), using.schema), found] if _is_image(using) else []
    write_result(result, out, "x", pictures, using.schema)
    lost = _lost(result, bool(using.schema.entries))
    return Done(out, result, f"reconstructions of {result.sizes['datum']:,} {using.schema.noun}s{lost}")


def impute_new(settings: ImputeSettings) -> Done:
    """New data, with values for what was not seen."""
    using, new, run = _opened(settings)
    usual = Path("imputed.csv" if using.schema.columns else "imputed.npy")
    out = settings.out or (usual.with_suffix(".npz") if settings.draws else usual)
    check_out(out, tuple(ending for ending in _endings(using) if ending != ".png"))
    torch.manual_seed(settings.seed)
    filled = using.impute(new.x, _given(settings, new), num_samples=settings.num_samples, num_draws=settings.num_draws)
    result = _observations(filled.values, "x", run, settings.seed)
    lost = _lost(result, bool(using.schema.entries))
    if out.suffix in (".npz", ".nc"):
        found = filled.imputation
        extra = {"std": (("datum", "entry"), found.std), "seen": (("datum", "entry"), found.seen)}
        extra |= {"draws": (("draw", "datum", "entry"), found.draws)} if settings.draws else {}
        result = result.assign({name: (dims, each.cpu().numpy()) for name, (dims, each) in extra.items()})
        result = result.merge(found.evidence.to_dataset(), combine_attrs="drop_conflicts")
    write_result(_numbered(result, new.rows), out, "x")
    gaps = ~filled.imputation.seen
    with_gaps = gaps.flatten(1).any(1)
    text = f"{int(gaps.sum()):,} entries of {int(with_gaps.sum()):,} {using.schema.noun}s filled in"
    good = filled.imputation.evidence.reliable
    if good is not None and (doubted := int((with_gaps & ~good).sum())):
        text += f"; not to be believed in {doubted:,} of these {using.schema.noun}s: more --num_samples may help"
    return Done(out, result, text + lost)


def _opened(settings: _Settings) -> tuple[Using, NewData, Run]:
    """The model on its device, and the new data.

    Raises:
        RunError: if there is no finished run, no such device, or no such data.
    """
    device = choose_device(settings.device)
    run = load(settings.run, settings.trust)
    try:
        new = read_new(settings.file, run.schema, settings.array)
    except DataError as error:
        raise RunError(str(error)) from error
    return Using(run.using.vae.to(device), run.schema), new, run


def _given(settings: _Settings, new: NewData) -> Any:
    return new.given if settings.given is None else settings.given


def _is_image(using: Using) -> bool:
    return len(using.schema.shape) == 3


def _endings(using: Using) -> tuple[str, ...]:
    if using.schema.columns:
        return (".csv", ".parquet", ".npz", ".nc")
    return (".csv", ".npy", ".npz", ".nc", *([".png"] if _is_image(using) else []))


def _observations(x: Any, name: str, run: Run, seed: int) -> xr.Dataset:
    """Observations as a data set: of a table a variable for each column, of others one."""
    if isinstance(x, Tensor):
        return _dataset({name: (("datum",), x)}, run, seed)
    variables = {column: ("datum", x[column].to_numpy()) for column in x}
    return xr.Dataset(variables, {"datum": np.arange(len(x))}, {"run": run.name, "seed": seed})


def _dataset(arrays: Arrays, run: Run, seed: int) -> xr.Dataset:
    """Arrays with the names of their first dimensions."""
    variables = {}
    for name, (dims, each) in arrays.items():
        others = tuple(f"{name}_{place}" for place in range(each.dim() - len(dims)))
        variables[name] = ((*dims, *others), each.cpu().numpy())
    size = next(iter(arrays.values()))
    number = size[1].shape[size[0].index("datum")]
    return xr.Dataset(variables, {"datum": np.arange(number)}, {"run": run.name, "seed": seed})


def _numbered(result: xr.Dataset, rows: list[str] | None) -> xr.Dataset:
    """Rows with their names, if they have some."""
    return result if rows is None else result.assign_coords(datum=np.array(rows))


COMMANDS: dict[str, tuple[type, Any]] = {
    "score": (ScoreSettings, score_new),
    "embed": (EmbedSettings, embed_new),
    "sample": (SampleSettings, sample_new),
    "reconstruct": (ReconstructSettings, reconstruct_new),
    "impute": (ImputeSettings, impute_new),
}
"""Settings and function of each command."""
