"""Experiments that outlast their process: what has been trained or measured is kept in the directory, and found again.

A program of several trainings, given again with ``--resume``, does what is missing, with the random numbers that it
would have drawn; and since weights are kept, what is measured of them can be measured again.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.callbacks import Callback, Checkpoint, Epoch
from pyro_vae.errors import CheckpointError, RunError, reason_of
from pyro_vae.runs.directory import check_run_dir, inside, make_directory, open_run, write_json, write_weights, writing
from pyro_vae.runs.reading import damaged, json_of, tensors_of, text_of
from pyro_vae.runs.workers import alone


def is_concluded(run_dir: Path, text: str, resume: bool) -> bool:
    """Whether an experiment is finished already, as ``--resume`` may find it; then its table is printed.

    Args:
        run_dir: its directory.
        text: its settings as YAML.
        resume: whether the directory is to hold it already, finished or not.

    Raises:
        RunError: if the directory holds anything else.
    """
    check_run_dir(run_dir, text, resume)
    if not (resume and (run_dir / "result.json").exists()):
        return False
    print(f"This experiment is finished; its result:\n\n{text_of(run_dir / 'table.md')}\n{run_dir}")
    return True


@contextmanager
def at_home(run_dir: Path, text: str, resume: bool) -> Iterator["Kept"]:
    """Context: an experiment in its directory, made or, with ``resume``, found; nobody else is at work there.

    Raises:
        RunError: if the directory holds anything else, or somebody is at work there.
        KeyboardInterrupt: when Ctrl-C was pressed, with what to do to go on.
    """
    open_run(run_dir, text, resume)
    try:
        with writing(f"--run_dir {run_dir}"), alone(run_dir):
            yield Kept(run_dir)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"go on with: --run_dir {shlex.quote(str(run_dir))} --resume") from interrupt


class Kept:
    """What an experiment has trained and measured so far, in files of the folder ``models`` of its directory.

    Args:
        run_dir: the directory of the experiment.
    """

    def __init__(self, run_dir: Path):
        self.folder = inside(run_dir, "models")

    def train(
        self,
        name: str,
        model: nn.Module,
        fit: Callable[[Sequence[Callback]], Sequence[Epoch]],
        about: Mapping[str, Any] | None = None,
    ) -> list[Epoch]:
        """Train a model, or give it the weights that it was trained to; return its history.

        Args:
            name: of the model, which is that of its file.
            model: untrained.
            fit: trains it, with these callbacks.
            about: what the training is of, such as its data; weights of something else are refused.

        Raises:
            RunError: if a file is damaged, or of something else.
        """
        checkpoint = self.folder / f"{name}.checkpoint.pt"
        found = self.tensors(name, about)
        if found is None:
            make_directory(self.folder)
            try:
                history = fit([Checkpoint(checkpoint, resume=True, about=about)])
            except CheckpointError as error:
                raise RunError(f"--resume: {error}; start anew in another --run_dir") from error
            self.keep(name, model.state_dict(), {"history": history}, about)
            checkpoint.unlink(missing_ok=True)
            return list(history)
        weights, told = found
        try:
            model.load_state_dict(weights)
            return [Epoch(*row) for row in told["history"]]
        except (KeyError, TypeError, RuntimeError) as error:
            raise damaged(self._file(name), reason_of(error)) from error

    def keep(self, name: str, tensors: Mapping[str, Tensor], told: Any, about: Mapping[str, Any] | None = None) -> None:
        """Write tensors, what is told of them, which JSON has, and the state of the random numbers."""
        make_directory(self.folder)
        metadata = {"told": json.dumps(told), "about": json.dumps(dict(about or {})), "random": _random()}
        write_weights(self._file(name), dict(tensors), metadata)

    def tensors(self, name: str, about: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], Any] | None:
        """What :meth:`keep` wrote, with the random numbers put where they were then; None if there is nothing.

        Raises:
            RunError: if the file is damaged, or about something else.
        """
        path = self._file(name)
        if not path.exists():
            return None
        tensors, metadata = tensors_of(path)
        try:
            told, known = json.loads(metadata["told"]), json.loads(metadata["about"])
            if known != json.loads(json.dumps(dict(about or {}))):
                raise RunError(f"--resume: {path} is of {known}, not {dict(about or {})}; start anew elsewhere")
            _set_random(metadata["random"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged(path, reason_of(error)) from error
        return tensors, told

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is measured, measured once: numbers and the like, which JSON has.

        Raises:
            RunError: if the file is damaged.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            make_directory(self.folder)
            write_json(path, measure())
        return json_of(path)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _random() -> str:
    """The state of torch's random numbers, on all devices."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return json.dumps([bytes(state.cpu().tolist()).hex() for state in states])


def _set_random(text: str) -> None:
    first, *others = (torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for state in json.loads(text))
    torch.set_rng_state(first)
    for index, state in enumerate(others[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
