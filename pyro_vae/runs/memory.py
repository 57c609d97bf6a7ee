"""What a run remembers of its data: what they were, and where."""

from pathlib import Path

from pyro_vae.data.datasets import Data, Source
from pyro_vae.errors import RunError
from pyro_vae.runs.directory import write_json
from pyro_vae.runs.reading import memory_of

FILE = "data.json"


def remember(run_dir: Path, dataset: Source, data: Data) -> None:
    """Write the fingerprint of the data to the run's directory, and its relative paths as absolute ones."""
    write_json(run_dir / FILE, {"fingerprint": data.fingerprint, "paths": _absolute(dataset)})


def find_again(run_dir: Path, dataset: Source) -> None:
    """Let the relative paths of a data set be those of the run, from whatever directory it was started.

    What is not there any more is looked for where the command is given.
    """
    for name, value in memory_of(run_dir).get("paths", {}).items():
        given = getattr(dataset, name, None)
        if isinstance(given, Path) and not given.is_absolute() and Path(value).exists():
            setattr(dataset, name, Path(value))


def check_same_data(run_dir: Path, dataset: Source, data: Data, option: str = "") -> None:
    """Refuse data that are not those of the run; a run of an earlier version does not know.

    Raises:
        RunError: beginning with ``option``.
    """
    known = memory_of(run_dir).get("fingerprint")
    if known is not None and known != data.fingerprint:
        path = getattr(dataset, "path", None)
        where = type(dataset).__name__ if path is None else str(path)
        raise RunError(
            f"{option}{run_dir} was trained on other data than {where} holds now (fingerprint {known}, now "
            f"{data.fingerprint}): put back what it read, or train anew"
        )


def _absolute(dataset: Source) -> dict[str, str]:
    paths = {name: value for name, value in vars(dataset).items() if isinstance(value, Path)}
    return {name: str(value.absolute()) for name, value in paths.items() if not value.is_absolute()}
