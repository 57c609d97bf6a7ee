"""The command pyro-vae: it reads its arguments, calls pyro_vae.runs, and tells a user's mistake in one line."""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.errors import MissingExtra, NonFiniteError, RunError, is_of_no_number
from pyro_vae.helping import ahead_of, workers_asked

if TYPE_CHECKING:
    from pyro_vae.runs import Classified, Comparison, Exported, Run, Scored, Search, Study
    from pyro_vae.runs.new_data import Done

USAGE = """usage: pyro-vae COMMAND [options]

  train      train a VAE, score it and draw it; the directory it writes is a run
  evaluate   score a finished run again: by another estimator, on more data, on training data
  classify   p(label given x) of a run that is told labels: its accuracy and log-loss, with their errors
  score      log p(x) of new data, in a file, with errors; the run's data set is not needed, nor is it for these:
  embed      latents of new data
  reconstruct, impute    E[x given z] of new data, or values for what was not seen of them
  sample     draws of x
  compare    differences of log p(x) between finished runs, paired by datum, with their errors
  export     encoder, decoder and sampler as ONNX files or torch programs that need nothing of pyro_vae; a model card
  report     one page of HTML on a run, several, a study or a search: what to believe, what is worst, which is better
  push       put a finished run on the Hugging Face Hub; every RUN may be named hf://USER/NAME, too
  explore    a page on this machine to play with a run: draw, move latents, walk, fill in what is erased
  study      the same run for several contenders and seeds, and their differences; --search: for settings to be found

pyro-vae COMMAND --help shows the options that matter first, --help.all every one."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``pyro-vae``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "evaluate": evaluate, "classify": classify, "compare": compare, "study": study}
    commands |= {"report": report, "explore": explore, "export": export, "push": push}
    commands |= {name: partial(use, name) for name in ("score", "embed", "sample", "reconstruct", "impute")}

    def run() -> None:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
        elif argv[0] in commands:
            _check_alone(argv[0])
            commands[argv[0]](argv[1:])
        else:
            raise RunError(f"unknown command {argv[0]}: choose {', '.join(commands)}")

    with _working_directory_searched():
        guarded(run)


def _check_alone(command: str) -> None:
    """Refuse to do the same several times."""
    if command != "train" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise RunError(f"torchrun is for train: call {command} without it")


@contextlib.contextmanager
def _working_directory_searched() -> Iterator[None]:
    """Modules of one's own are found where the command is given, as ``python -m`` finds them; the others come first."""
    here = os.getcwd()
    if added := not {"", here} & set(sys.path):
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def train(argv: Sequence[str] | None = None, prog: str = "pyro-vae train") -> "Run":
    """Train the run that ``argv`` asks for, or with ``--resume`` go on with it."""
    runs = _runs()
    settings, text = runs.parse(runs.Settings, argv, prog=prog)
    return runs.train(settings, text)


def evaluate(argv: Sequence[str] | None = None) -> "Scored":
    """Score a finished run as told by ``argv``."""
    argv = sys.argv[1:] if argv is None else argv
    with ahead_of(argv) as helpers:  # they import what they need while this process does the same
        runs = _runs()
        settings, text = runs.parse(runs.EvaluationSettings, argv, first="run", prog="pyro-vae evaluate")
        scored = runs.evaluate(settings, text, helpers)
    print(f"\n{runs.evaluation_table(scored.result)}\n\n{scored.path}")
    return scored


def classify(argv: Sequence[str] | None = None) -> "Classified":
    """Score a finished run as a classifier, as told by ``argv``."""
    runs = _runs()
    settings, text = runs.parse(runs.ClassificationSettings, argv, first="run", prog="pyro-vae classify")
    classified = runs.run_classification(settings, text)
    print(f"\n{runs.classification_table(classified.result)}\n\n{classified.path}")
    return classified


def use(command: str, argv: Sequence[str] | None = None) -> "Done":
    """Use a finished run: ``score``, ``embed``, ``reconstruct`` or ``impute`` new data, or ``sample``."""
    runs = _runs()
    config, function = importlib.import_module("pyro_vae.runs.new_data").COMMANDS[command]
    first = "run" if command == "sample" else "run file"
    settings, _ = runs.parse(config, argv, first=first, prog=f"pyro-vae {command}")
    done = function(settings)
    print(f"\n{done.text}" + (f"\n\n{done.path}" if done.path else ""))
    return done


def compare(argv: Sequence[str] | None = None) -> "Comparison":
    """Compare the finished runs that ``argv`` names."""
    runs = _runs()
    settings, text = runs.parse(runs.ComparisonSettings, argv, first="runs", prog="pyro-vae compare")
    compared = runs.compare(settings.runs, settings.run_dir, text, settings.trust)
    print(compared.table())
    if settings.run_dir:
        print(f"\n{settings.run_dir}")
    return compared


def report(argv: Sequence[str] | None = None) -> Path:
    """Write the page on the runs, or the study, that ``argv`` names."""
    runs = _runs()
    settings, _ = runs.parse(runs.ReportSettings, argv, first="runs", prog="pyro-vae report")
    place = settings.out
    if settings.run_dir is not None:
        runs.make_directory(settings.run_dir)
        place = settings.run_dir / "report.html"
    page = runs.report(settings.runs, place, settings.data, settings.trust)
    print(page)
    return page


def export(argv: Sequence[str] | None = None) -> "Exported":
    """Write the run that ``argv`` names as programs that need nothing of this library."""
    runs = _runs()
    settings, _ = runs.parse(runs.ExportSettings, argv, first="run", prog="pyro-vae export")
    done = runs.export(**vars(settings))
    print(f"\n{done.text}\n\n{done.path}")
    return done


def push(argv: Sequence[str] | None = None) -> str:
    """Push the finished run that ``argv`` names to the Hugging Face Hub."""
    runs = _runs()
    settings, _ = runs.parse(runs.PushSettings, argv, first="run repo", prog="pyro-vae push")
    run = runs.load(settings.run)
    place = runs.push_to_hub(run, settings.repo, settings.private, settings.license, settings.replace)
    print(importlib.import_module("pyro_vae.runs.pushing").told_after(run, place))
    return place


def explore(argv: Sequence[str] | None = None) -> None:
    """Serve the page of the run that ``argv`` names, until it is interrupted."""
    runs = _runs()
    settings, _ = runs.parse(runs.ExploreSettings, argv, first="run", prog="pyro-vae explore")
    runs.explore(settings)


def study(argv: Sequence[str] | None = None) -> "Study | Search":
    """Run the study of the contenders that ``argv`` names, or with ``--search`` the search."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _import_ahead(argv)
    runs = _runs()
    if any(word.partition("=")[0] == "--search" for word in argv):
        return runs.run_search(argv, prog="pyro-vae study")
    done = runs.run_study(runs.StudySettings, argv, "study", prog="pyro-vae study")
    runs.report_study(done, "log p(x) of each contender, minus that of the first")
    return done


def _runs() -> Any:
    """The package ``pyro_vae.runs`` with all that its commands need, which takes seconds."""
    leave_when_interrupted()
    for name in ("training", "scoring", "parsing"):
        importlib.import_module(f"pyro_vae.runs.{name}")
    _listen_again()
    return importlib.import_module("pyro_vae.runs")


def leave_when_interrupted() -> None:
    """Until a program begins, Ctrl-C ends the process at once, in one line and with status 130.

    An exception in the middle of an import may end in C++, which aborts, or as another one.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def _listen_again() -> None:
    if getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "_leave":  # ours, or that of the experiments
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_ahead(argv: Sequence[str]) -> None:
    """Let the process of which several workers will be copies import what they need, while this one does the same."""
    if workers_asked(argv) < 2 or "forkserver" not in multiprocessing.get_all_start_methods():
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(["pyro_vae.runs.studies"])
    forkserver.ensure_running()


ENDS = [each for each in ("SIGTERM", "SIGHUP") if hasattr(signal, each)]
"""Requests to end: by the first a scheduler announces its limit, by the other a terminal that it closes."""


def _end(*_: object) -> None:
    _ignore(*ENDS)  # a second one would interrupt what is put in order after the first
    raise KeyboardInterrupt


def _ignore(*names: str) -> None:
    for name in names:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def guarded(command: Callable[[], object]) -> None:
    """Run a program: a user's mistake is one line on stderr and status 2; Ctrl-C, and a request to end, are 130."""
    _listen_again()
    ours = threading.current_thread() is threading.main_thread()
    for each in (getattr(signal, name) for name in ENDS if ours):
        if signal.getsignal(each) == signal.SIG_DFL:  # not where nohup, or a program around this one, says what to do
            signal.signal(each, _end)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=DeprecationWarning, module="pyro_vae|experiments|__main__")
            warnings.showwarning = _one_line
            command()
    except (RunError, NonFiniteError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends the others when one has ended: not before they say why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if ours:
            _ignore(*(name for name in ENDS if signal.getsignal(getattr(signal, name)) == _end))
            atexit.register(_ignore, "SIGINT", *ENDS)  # the last that is registered is the first that is called
        print(f"\ninterrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except (MemoryError, RuntimeError, ValueError) as error:
        import torch

        lost = is_of_no_number(error)
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not (lost or memory):
            raise
        reason = textwrap.shorten(str(error), 200)
        told = f"a number of the model is NaN or infinite ({reason})" if lost else f"out of memory ({reason})"
        print(f"error: {told}{'' if lost else '; try smaller sizes'}", file=sys.stderr)
        sys.exit(2)


def _one_line(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)
