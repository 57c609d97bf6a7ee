"""Command line and run directories, shared by all experiments."""

import csv
import difflib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

import pyro_vae

T = TypeVar("T")
PLACE = ("run_dir", "resume", "tensorboard")
"""Settings that say where a run is written and not what it is; ``config.yaml`` leaves them out."""


class RunError(Exception):
    """A user's mistake, told in one line."""


def parser(config: type) -> ArgumentParser:
    """A parser whose options are the arguments of the class ``config``; its docstring teaches ``--help``."""
    result = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=inspect.getdoc(inspect.getmodule(config))
    )
    result.add_class_arguments(config)
    result.add_argument("--config", action="config", help="a YAML file of settings, such as a run's config.yaml")
    return result


def parse(config: type[T], argv: Sequence[str] | None = None) -> tuple[T, str]:
    """Read the command line into an instance of ``config``; return it with its YAML text, ready for ``--config``.

    With ``--resume``, settings that the command line does not name come from ``config.yaml`` in ``--run_dir``.

    Raises:
        RunError: for every mistake, in one line that names the option.
        SystemExit: after ``--help`` and the like.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser(config)
    try:
        settings = options.parse_args(argv)
        if getattr(settings, "resume", False):
            if settings.run_dir is None:
                raise RunError("--resume needs --run_dir, the directory of the run to go on with")
            saved = Path(settings.run_dir) / "config.yaml"
            if saved.exists():
                settings = options.parse_args([f"--config={saved}", *argv])
        text = options.dump(settings.clone(), skip_none=False)
        instance = options.instantiate(settings)
    except ArgumentError as error:
        raise RunError(_one_line(str(error), options, argv)) from error
    except (ValueError, TypeError, OSError) as error:
        raise RunError(" ".join(str(error).split())) from error
    values = {name: value for name, value in vars(instance).items() if name != "config"}
    text = yaml.safe_dump({k: v for k, v in yaml.safe_load(text).items() if k not in PLACE}, sort_keys=False)
    try:
        return config(**values), text
    except ValueError as error:
        raise RunError(str(error)) from error


def _one_line(message: str, options: ArgumentParser, argv: Sequence[str]) -> str:
    """The parser's complaint, which runs over several lines, as one that names the option and what would be right."""
    message = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        known = [option for action in options._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        return f"unknown option {name}; " + (f"did you mean {close[0]}?" if close else "--help lists the options")
    found = re.match(r'Parser key "([^"]+)": (.*)', message)
    if not found:
        return message
    key, problem = found.groups()
    action = next((a for a in options._actions if a.dest == key), None)
    classes = [name.rsplit(".", 1)[-1] for name in re.findall(r"[\w.]+", _known_subclasses(action))]
    choices = f"one of {', '.join(classes)}, or an import path such as my_package.MyClass"
    if sub := re.search(
        r"(?:Option '([^']+)' is not accepted|No action for key '([^']+)').*class_path='([^']+)'", problem
    ):
        name = sub[3].rsplit(".", 1)[-1]
        return f"--{key}.{sub[1] or sub[2]}: {name} has no such option; --{key}.help {name} lists those it has"
    if sub := re.search(r"Expected a dot import path string: (\S+)", problem):
        return f"--{key}: '{sub[1]}' is no known class; choose {choices}"
    if sub := re.search(
        r"(No module named '[^']+'|module '\S+' has no attribute '\S+'|cannot import name '\S+')", problem
    ):
        return f"--{key}: {sub[1]}; choose {choices}"
    if sub := re.search(r"Expected '([^']+)' to be a subclass of <class '([^']+)'>", problem):
        return f"--{key}: {sub[1]} is no {sub[2].rsplit('.', 1)[-1]}; choose {choices}"
    if sub := re.search(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])\. Got value: (.*)", problem):
        wanted = f"a value of type {sub[1]}" if sub[1] else f"one of {sub[2]}"
        return f"--{key}: expected {wanted}, got {sub[3]!r}"
    return f"--{key}: {problem}"


def _known_subclasses(action: Any) -> str:
    found = re.search(r"known subclasses: (.*?)\)", str(getattr(action, "help", "")))
    return found[1] if found else ""


def cli(main: Callable[[], object]) -> None:
    """Run ``main`` as a program: a user's mistake is one line on stderr and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except (RunError, pyro_vae.NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def device(name: str) -> torch.device:
    """The device called ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        RunError: if ``cuda`` is asked for and there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where a driver is too old: the line below says enough
        available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RunError("--device cuda: torch finds no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def open_run(directory: Path, config: str, resume: bool) -> None:
    """Make ``directory`` the home of the run described by ``config``, or check that it is.

    Raises:
        RunError: if it holds another run, or anything else and ``resume`` is not asked for, or cannot be written.
    """
    saved = directory / "config.yaml"
    try:
        if saved.exists():
            previous = saved.read_text()
            if not resume:
                raise RunError(
                    f"{directory} holds another run, which is never overwritten: choose another --run_dir, or --resume"
                )
            if changed := _difference(yaml.safe_load(previous), yaml.safe_load(config)):
                raise RunError(
                    f"--resume: {directory} was run with another {changed}; leave the option out, or start a new run"
                )
            return
        if resume:
            raise RunError(f"--resume: {directory} holds no run (there is no config.yaml)")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise RunError(f"{directory} exists and is no empty directory: choose another --run_dir")
        directory.mkdir(parents=True, exist_ok=True)
        write_text(saved, config)
    except OSError as error:
        raise RunError(f"--run_dir {directory}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RunError(f"{saved} is damaged: {str(error).splitlines()[0]}") from error


def _difference(old: Any, new: Any, name: str = "") -> str | None:
    """The first setting in which two configurations differ, as ``--option (old, now new)``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = key if not name else name if key in ("class_path", "init_args") else f"{name}.{key}"
            if found := _difference(old.get(key), new.get(key), inner):
                return found
        return None
    return None if old == new else f"--{name} ({old}, now {new})"


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON, with null for NaN."""
    write_text(path, json.dumps({k: None if v != v else v for k, v in content.items()}, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned Markdown table; the first row is the header, columns of numbers are right-aligned."""
    columns = list(zip(*rows, strict=True))
    right = [all(re.match(r"[-+.\d]|$", cell) for cell in column[1:]) for column in columns]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(cells)} |"

    rule = " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(rows[0]), f"| {rule} |", *map(line, rows[1:])])


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, for a result file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
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
