"""Runs on the Hugging Face Hub: their names, where they are once downloaded, and what goes wrong, in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from pyro_vae.errors import RunError, need_extra

FILES = ("config.yaml", "model.safetensors", "result.json", "evidence.nc", "metrics.csv")
"""Of a run, what is pushed and downloaded: all that is needed to load and to report it, and no data."""

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables of the environment whose values are never printed."""

HINT = "log in with 'hf auth login', or set HF_TOKEN"
TOLD = {
    "RepositoryNotFoundError": f"there is no such repository, or it is private: then {HINT}",
    "GatedRepoError": f"its author grants access on its page; then {HINT}",
    "RevisionNotFoundError": "it has no such revision",
    "LocalTokenNotFoundError": f"the Hub wants to know who you are: {HINT}",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and it was not downloaded before",
    **dict.fromkeys(("ConnectError", "ConnectTimeout", "ConnectionError"), "the Hub cannot be reached"),
    "IncompleteSnapshotError": "the Hub cannot be reached, and it was not wholly downloaded before",
}
"""What to say of errors of huggingface_hub, by the names of their classes."""


def is_on_hub(run: os.PathLike[str] | str) -> bool:
    """Whether a run is named by its place on the Hub, also where a path has made one slash of two."""
    return re.match(r"hf:[/\\]", os.fspath(run)) is not None


def checked_repo(name: str, where: str) -> str:
    """The name of a repository, USER/NAME.

    Raises:
        RunError: beginning with ``where``, if it is none.
    """
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    if not isinstance(name, str) or not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.", name):
        raise RunError(f"{where}: expected USER/NAME, of letters, digits, '.', '_' and '-', got {name!r:.80}")
    return name


def home_of(run: os.PathLike[str] | str) -> Path:
    """The directory of a run; one that is named ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION`` is downloaded.

    Only the files of a run are, into the cache of huggingface_hub, where those that are there already are kept.

    Raises:
        RunError: if the name is none, or there is no such run, or the Hub cannot be reached.
        MissingExtra: without huggingface_hub.
    """
    if not is_on_hub(run):
        return Path(run)
    name, at, revision = re.sub(r"^hf:/+", "", os.fspath(run).replace("\\", "/")).partition("@")
    where = f"hf://{name}{at}{revision}"
    checked_repo(name, where)
    if at and not re.fullmatch(r"\w[\w./-]{0,199}", revision, re.ASCII):
        raise RunError(f"{where}: expected a branch, a tag or a commit after @")
    need_extra("hub", ["huggingface_hub"])
    from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]

    with on_hub(where):
        place = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    if not (place / "result.json").is_file():
        raise RunError(f"{where} holds no finished run of pyro_vae: there is no result.json")
    return place


@contextmanager
def on_hub(where: str) -> Iterator[None]:
    """Context: what huggingface_hub and the network raise is a :class:`RunError` that begins with ``where``."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # of whichever client of HTTP
        known = (TOLD[each.__name__] for each in type(error).__mro__ if each.__name__ in TOLD)
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = f"the Hub refuses it ({status}): {HINT}, with a token that may" if status in (401, 403) else ""
        raise RunError(f"{where}: {next(known, refused or reason_without_secrets(error))}") from error


def reason_without_secrets(error: BaseException) -> str:
    """What went wrong, in one line of bounded length; keys, tokens and passwords are left out."""
    text = re.sub(r"://[^/@\s]+@", "://", f"{type(error).__name__}: {error}")
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return shorten(text, 300)


def _place(directory: os.PathLike[str] | str) -> tuple[str, str] | None:
    """Repository and commit of a directory in the cache of huggingface_hub; None of others."""
    parts = Path(os.path.realpath(directory)).parts
    for repo, folder, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if repo.startswith("models--") and folder == "snapshots":
            return repo.removeprefix("models--").replace("--", "/"), commit
    return None


def is_downloaded(directory: os.PathLike[str] | str) -> bool:
    """Whether a directory came from the Hub: it is somebody's, and is read only."""
    return _place(directory) is not None


def named(directory: os.PathLike[str] | str) -> str:
    """What a run is called: its directory, or, of one that came from the Hub, where it is there."""
    place = _place(directory)
    return os.fspath(directory) if place is None else f"hf://{place[0]}@{place[1]}"


def trusted(directory: os.PathLike[str] | str, trust: bool | None) -> bool:
    """Whether classes of anybody are built: as told, or else unless the directory came from the Hub."""
    return not is_downloaded(directory) if trust is None else trust
