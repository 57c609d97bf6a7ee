"""Run directories: what is written, whole or not at all, and never over anything."""

import csv
import json
import math
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xarray as xr
import yaml
from torch import Tensor

import pyro_vae
from pyro_vae.errors import RunError
from pyro_vae.files import holds_anything, whole
from pyro_vae.runs.hub import is_downloaded, named
from pyro_vae.runs.reading import damaged, text_of, yaml_of
from pyro_vae.runs.seals import sealed, settings_sealed


def choose_device(name: str, scores: bool = True) -> torch.device:
    """The device of this name: ``auto``, a CUDA device if there is one; ``cpu``; ``cuda``, ``cuda:1``; or ``mps``.

    Args:
        name: as torch spells it.
        scores: whether log p(x) is computed there, in double precision, which mps lacks.

    Raises:
        RunError: if it is none of these, or there is no such device here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where a driver is too old: the line below says enough
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise RunError(f"--device: expected auto, cpu, mps, cuda, or one of several such as cuda:1, got {name!r}")
    device, mend = torch.device(name), "use --device cpu, or auto"
    if device.type == "cuda" and count == 0:
        raise RunError(f"--device {name}: torch finds no CUDA device here; {mend}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RunError(f"--device {name}: the last CUDA device here is cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunError(f"--device mps: torch finds no Metal device here; {mend}")
    if device.type == "mps" and scores:
        raise RunError(
            "--device mps: log p(x) is computed in double precision, which mps lacks; use --device cpu; models can be "
            "trained on mps"
        )
    return device


def run_dir_for(name: str, chosen: Path | None) -> Path:
    """The directory that was chosen, or else a new one under runs/, named by what is done and the time."""
    return chosen or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def open_run(directory: Path, config: str, resume: bool | None, reread: Callable[[Path], str] = text_of) -> None:
    """Make ``directory`` the home of the run described by ``config``, or check that it is; see :func:`check_run_dir`.

    Raises:
        RunError: if it holds another run, or anything else and ``resume`` is not asked for, or cannot be written.
    """
    check_run_dir(directory, config, resume, reread)
    with writing(f"--run_dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            if not resume:
                write_text(directory / "config.yaml", config, new=True)
        except FileExistsError as error:
            raise RunError(f"--run_dir: {directory} holds another run, which was begun just now") from error


def check_run_dir(directory: Path, config: str, resume: bool | None, reread: Callable[[Path], str] = text_of) -> None:
    """Check that ``directory`` can become, or with ``resume`` is, the home of the run described by ``config``.

    Nothing is written, so that a wrong directory is found before the data are fetched.

    Args:
        directory: the run's.
        config: its settings as YAML.
        resume: whether it is to be there already; None: it cannot be.
        reread: the settings of the run that is there, as YAML, in the spelling of ``config``.

    Raises:
        RunError: if it holds another run, or anything else and ``resume`` is not asked for, or cannot be read.
    """
    saved = directory / "config.yaml"
    try:
        if not resume:
            if os.path.lexists(saved):
                hint = "choose another directory" + ("" if resume is None else ", or --resume")
                raise RunError(f"--run_dir: {directory} holds another run, which is never overwritten: {hint}")
            if os.path.lexists(directory) and (not directory.is_dir() or holds_anything(directory)):
                raise RunError(f"--run_dir: {directory} exists and is no empty directory: choose another")
            return
        if not os.path.lexists(saved):
            raise RunError(f"--resume: {directory} holds no run (there is no config.yaml)")
        previous = yaml.safe_load(reread(saved))
    except OSError as error:
        raise RunError(f"--run_dir {directory}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{saved} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(previous, dict):
        raise RunError(f"{saved} is damaged: it holds no settings")
    if changed := changed_setting(previous, yaml.safe_load(config)):
        raise RunError(f"--resume: {directory} was run with another {changed}; leave it out, or start a new run")


ELSEWHERE = ("device", "data_dir")
"""Settings that do not change what a finished run is."""


def check_unchanged(directory: Path, paths: Sequence[str] = ()) -> None:
    """Refuse settings of a finished run that were edited since; a run of an earlier version does not know.

    Args:
        directory: of the run.
        paths: arguments of its data set that say where the data are, which may be elsewhere now.

    Raises:
        RunError: naming the first setting that differs.
    """
    known, saved = settings_sealed(directory / "model.safetensors"), directory / "config.yaml"
    if known is None:
        return
    now = json.loads(json.dumps(yaml_of(saved), default=str))
    for settings in (known, now):
        for name in ELSEWHERE:
            settings.pop(name, None)
        dataset = settings.get("dataset")
        arguments = dataset.get("init_args") if isinstance(dataset, dict) else None
        if isinstance(arguments, dict):
            for name in paths:
                arguments.pop(name, None)
    if changed := changed_setting(known, now):
        raise RunError(f"{saved} was edited since the run was finished, with another {changed}: put it back")


def make_directory(out: Path) -> None:
    """Make the directory ``out``, before work is done whose result is written there.

    Raises:
        RunError: if it cannot be made.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)


def inside(directory: Path, *names: str, option: str = "--run_dir") -> Path:
    """The path of these names in a directory, none of which is a link there: what is written stays in the directory.

    Raises:
        RunError: if one is, or the directory came from the Hugging Face Hub, whose cache is read only.
    """
    if is_downloaded(directory):
        raise RunError(f"{named(directory)} was downloaded, and nothing is written there: say where by {option}")
    path = directory
    for name in names:
        path = path / name
        if path.is_symlink():
            raise RunError(f"{path} is a link, which is not followed: choose another directory by {option}")
    return path


def check_empty(out: Path, options: str = "--run_dir") -> None:
    """Refuse to write where anything is already.

    Raises:
        RunError: if ``out`` is not a directory, or not empty.
    """
    with writing(out):
        if os.path.lexists(out) and (not out.is_dir() or holds_anything(out)):
            raise RunError(f"{out} exists and is never overwritten: choose another directory by {options}")


def changed_setting(old: Any, new: Any, name: str = "") -> str | None:
    """The first setting in which two configurations differ, as ``--option (old, now new)``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = key if not name else name if key in ("class_path", "init_args") else f"{name}.{key}"
            if found := changed_setting(old.get(key), new.get(key), inner):
                return found
        return None
    return None if old == new else f"--{name} ({old}, now {new})"


def flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Settings by the options that make them, those of classes and of their arguments too."""
    for name, value in settings.items():
        if name in ("class_path", "init_args"):
            inner = value if isinstance(value, dict) else {"": value}
            yield from flat(inner, f"{prefix}." if name == "init_args" else prefix)
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}" + "." * ("class_path" not in value))
        else:
            yield f"{prefix}{name}", value


@contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Context: what the system refuses inside is a :class:`RunError` that says where, and which file."""
    try:
        yield
    except OSError as error:
        file = f" ({Path(error.filename).name})" if error.filename and Path(error.filename) != Path(where) else ""
        raise RunError(f"{where}: {error.strerror or error}{file}") from error


def conclude(out: Path, text: str, result: dict[str, Any], device: torch.device) -> Path:
    """Write the text of an experiment as table.md, its numbers as result.json; print text and directory; return it.

    Raises:
        RunError: if they cannot be written.
    """
    with writing(out):
        write_text(out / "table.md", text + "\n")
        write_json(out / "result.json", result | provenance(device))
    print(f"\n{text}\n\n{out}")
    return out


def write_text(path: Path, text: str, new: bool = False) -> None:
    """Write a whole file or none of it; with ``new``, only where there is none."""
    with whole(path, new) as partial:
        partial.write_text(text, encoding="utf-8")


def write_evidence(path: Path, groups: dict[str, xr.Dataset]) -> None:
    """Write evidence per datum as netCDF, one group an estimator."""
    write_netcdf(path, xr.DataTree.from_dict(groups))


def write_netcdf(path: Path, content: xr.DataTree | xr.Dataset) -> None:
    """Write netCDF, made in memory: HDF5 itself does not survive a full disk."""
    with whole(path) as partial:
        try:
            made: Any = content.to_netcdf(engine="h5netcdf")  # pyright: ignore[reportCallIssue]
        except (TypeError, ValueError):  # xarray before 2025.8 writes files alone
            content.to_netcdf(partial, engine="h5netcdf")
        else:
            partial.write_bytes(made)


def write_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights as safetensors, with a checksum; its own writer leaves a file that nobody else may read."""
    with whole(path) as partial:
        own = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}  # some may be shared
        partial.write_bytes(sealed(own, metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON, with null for NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    with whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that :func:`write_csv` wrote, as text.

    Raises:
        RunError: if there is no such file, or it is no CSV.
    """
    try:
        return list(csv.DictReader(text_of(path).splitlines()))
    except csv.Error as error:
        raise damaged(path, error) from error


def noun_of(result: dict[str, Any]) -> str:
    """What a datum of a result is called, which its unit says."""
    found = re.match(r"nats per (\w+)", str(result.get("unit")))
    return found[1] if found else "image"


def several(count: int, noun: str) -> str:
    """So many of a noun, in words."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned Markdown table; the first row is the header, columns of numbers are right-aligned."""
    columns = list(zip(*rows, strict=True))
    right = [all(re.fullmatch(r"[-+.,%\de ]*|nan|-?inf", cell) for cell in column[1:]) for column in columns]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(cells)} |"

    rule = " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(rows[0]), f"| {rule} |", *map(line, rows[1:])])


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, for a result file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"cpu, {several(torch.get_num_threads(), 'thread')}" if name == "cpu" else name
    packages = ("torch", "pyro-ppl", "numpy")
    versions = {
        "python": platform.python_version(),
        "pyro_vae": pyro_vae.__version__,
        **{p: version(p) for p in packages},
    }
    return {"device": name, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """The commit of the source tree, marked if it has changes; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")
