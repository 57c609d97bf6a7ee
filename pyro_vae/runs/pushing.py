"""Push a finished run to the Hugging Face Hub, where it can be loaded by its name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from pyro_vae.errors import RunError, need_extra
from pyro_vae.runs.cards import FILE, card, checked_license, foreign_classes
from pyro_vae.runs.given import check_made
from pyro_vae.runs.hub import FILES, checked_repo, named, on_hub
from pyro_vae.runs.loading import Run, load, load_settings
from pyro_vae.runs.reading import bytes_of, tensors_of, yaml_of
from pyro_vae.runs.seals import sealed

WEIGHTS, CURVE = "model.safetensors", "metrics.csv"
HARMLESS = (".gitattributes",)
"""What the Hub itself puts into a new repository."""


@dataclass(frozen=True)
class PushSettings:
    """Settings of a push.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        repo: name of the repository, USER/NAME or ORGANIZATION/NAME, made if it is not there; may stand second.
        private: only you, or your organization, can read a repository that is made; false: everybody can. One that is
            public already is pushed to only if this says false.
        license: identifier of the licence of the weights for the card, such as apache-2.0; null: the card says that
            nobody is given leave to use them.
        replace: push to a repository that holds files already, as its next revision; the earlier ones stay there.
    """

    DESCRIPTION: ClassVar[str] = (
        "Push a finished run to the Hugging Face Hub: settings, weights, result, log p(x) of each test datum, curve\n"
        "of training, and a model card as README.md; no data, checkpoints or figures, no folders of this machine.\n\n"
        "Usage: pyro-vae push RUN USER/NAME [options]\n\n"
        "It is read back wherever a command takes a RUN, as hf://USER/NAME or hf://USER/NAME@REVISION. Log in before,\n"
        "with 'hf auth login', or set HF_TOKEN. It needs the extra 'hub': pip install -e '.[hub]' in the checkout."
    )

    run: Path
    repo: str
    private: bool = True
    license: str | None = None
    replace: bool = False

    def __post_init__(self):
        check_made(self)
        checked_repo(self.repo, "--repo")
        checked_license(self.license)


def push_to_hub(
    run: Run | Path | str, repo: str, private: bool = True, license: str | None = None, replace: bool = False
) -> str:
    """Push a finished run to the Hugging Face Hub, in one commit; return its name there, ``hf://USER/NAME@COMMIT``.

    What :func:`pyro_vae.runs.load` needs is pushed, with a model card, see :func:`pyro_vae.runs.cards.card`: no data,
    checkpoints or figures. Folders of this machine, where data were read, are left out.

    Args:
        run: a finished run, or its directory.
        repo: the repository, ``USER/NAME``, made if it is not there.
        private: whether one that is made is; False: everybody can read it, and one that is public already is taken.
        license: identifier of the licence of the weights, for the card; None: none is said.
        replace: whether the repository may hold files already, which stay in its earlier revisions.

    Raises:
        RunError: if the run is not finished or is damaged, or the repository is public or holds files and this was not
            said, or the Hub refuses it or cannot be reached.
        MissingExtra: without huggingface_hub.
    """
    need_extra("hub", ["huggingface_hub"])
    from huggingface_hub import (  # pyright: ignore[reportMissingImports]
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
    )

    where = f"hf://{checked_repo(repo, '--repo')}"
    license = checked_license(license)
    run = run if isinstance(run, Run) else load(run)
    files = contents_of(run, repo, license)
    api = HfApi(library_name="pyro_vae")
    with on_hub(where):
        api.create_repo(repo, private=private, exist_ok=True)
        about: Any = api.repo_info(repo)
        if private and not about.private:
            raise RunError(f"{where} is there already and is public: --private false says that this is meant")
        there = {each.rfilename for each in about.siblings or ()}.difference(HARMLESS)
        if there and not replace:
            raise RunError(f"{where} holds files already: --replace true makes a new revision, the earlier one stays")
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(there & {*FILES} - {*files})]
        done = api.create_commit(
            repo, operations, commit_message=f"A run of pyro_vae: {run.path.resolve().name}", parent_commit=about.sha
        )
    return f"{where}@{done.oid}"


def contents_of(run: Run, repo: str, license: str | None) -> dict[str, bytes]:
    """The files that are pushed, by name; the run is checked to be whole.

    Raises:
        RunError: if a file is not there, or damaged, or was changed since the run was finished.
    """
    load_settings(run.path, run.trust)
    found = {name: bytes_of(run.path / name) for name in FILES if name != CURVE or (run.path / name).is_file()}
    found["config.yaml"] = yaml.safe_dump(without_folders(yaml_of(run.path / "config.yaml")), sort_keys=False).encode()
    tensors, metadata = tensors_of(run.path / WEIGHTS)
    if "settings" in metadata:  # which files of earlier versions do not have
        metadata["settings"] = json.dumps(without_folders(json.loads(metadata["settings"])))
        found[WEIGHTS] = sealed(tensors, metadata)
    return found | {FILE: _card(run, repo, license).encode()}


def _card(run: Run, repo: str, license: str | None) -> str:
    """The card, which says how to load the run from where it will be."""
    call = f'runs.load("hf://{repo}"' + (", trust=True)" if foreign_classes(run.path) else ")")
    text = card(run, license)
    for told in ('runs.load("DIRECTORY", trust=False)', 'runs.load("DIRECTORY")'):
        text = text.replace(f"{told}  # the directory of the run; ", f"{call}  # ")
    return text


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the folders of this machine: of a path of a data set its last name is left."""
    content = dict(settings) | {"data_dir": None, "device": "auto"}
    dataset = content.get("dataset")
    if isinstance(dataset, Mapping) and isinstance(given := dataset.get("init_args"), Mapping):
        content["dataset"] = {**dataset, "init_args": {name: _last_name(each) for name, each in given.items()}}
    return content


def _last_name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def told_after(run: Run, at: str) -> str:
    """What to say when a run was pushed: where it is, and how it is loaded."""
    name = at.partition("@")[0]
    foreign = foreign_classes(run.path)
    more = f"\nIt needs classes of others ({', '.join(foreign)}), so loading it takes trust=True." if foreign else ""
    return f"{named(run.path)} is at {at}\nRead it back with: runs.load({name!r}){more}"
