"""Finished runs, read back from their directories."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, cast

import torch
import xarray as xr

from pyro_vae.data.datasets import Data, Schema, Source, names_of
from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.images import Dataset, ImageData
from pyro_vae.errors import RunError
from pyro_vae.hierarchical import HierarchicalVAE
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.runs.bounded import bounded_by
from pyro_vae.runs.build import Model, build, load_dataset, make
from pyro_vae.runs.directory import check_empty, check_unchanged, choose_device, inside
from pyro_vae.runs.given import check_trust
from pyro_vae.runs.hub import home_of, is_downloaded, named, trusted
from pyro_vae.runs.memory import check_same_data, find_again
from pyro_vae.runs.parsing import parse
from pyro_vae.runs.reading import evidence_of, result_of, weights_of
from pyro_vae.runs.settings import Settings
from pyro_vae.runs.using import Filled, Latents, Using
from pyro_vae.vae import VAE, TwoLayerVAE


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run. What is large is read when it is first asked for; nothing but ``data`` needs the data set.

    It stands for its directory where a path is wanted.

    Attributes:
        path: its directory.
        result: what is in ``result.json``.
        evidence: estimates of each datum along the dimension ``datum``, by estimator: ``importance`` and, if there is
            such an estimate, ``annealed``.
        trust: whether classes of anybody are built; see :func:`load`.
    """

    path: Path
    result: dict[str, Any]
    evidence: dict[str, xr.Dataset]
    trust: bool = True

    def __post_init__(self):
        check_trust(self.trust)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """What it is called: its directory, or, if it came from the Hugging Face Hub, ``hf://USER/NAME@COMMIT``."""
        return named(self.path)

    @property
    def importance(self) -> xr.Dataset:
        """log p(x) of each datum by importance sampling."""
        return self.evidence["importance"]

    @property
    def annealed(self) -> xr.Dataset | None:
        """log p(x) by annealed importance sampling of the data that were drawn for it, if there is such an estimate."""
        return self.evidence.get("annealed")

    @cached_property
    def settings(self) -> Settings:
        """The settings, as they are in ``config.yaml``."""
        return load_settings(self.path, self.trust)

    @cached_property
    def model(self) -> Model:
        """The trained model, on the CPU, in evaluation mode."""
        return load_model(self.path, self.trust)

    @cached_property
    def schema(self) -> Schema:
        """What the model knows of its data."""
        return load_schema(self.path, self.trust)

    @cached_property
    def data(self) -> Data:
        """The data set, on the CPU."""
        return load_data(self.path, trust=self.trust)

    @cached_property
    def using(self) -> Using:
        """The model with what it knows of its data; what follows is its."""
        with torch.random.fork_rng([]):  # a model that is made draws its first weights
            return Using(self.model, self.schema)

    def encode(self, x: Any, num_samples: int | None = None, given: Any = None) -> Latents:
        """Posterior means of z for new data, ``(N, D)``, or draws, ``(S, N, D)``; see :meth:`Using.encode`."""
        return self.using.encode(x, num_samples, given)

    def decode(self, z: Any, given: Any = None) -> Any:
        """E[x | z], a tensor ``(N, *shape)``, or a DataFrame of a table; see :meth:`Using.decode`."""
        return self.using.decode(z, given)

    def sample(self, num_samples: int, given: Any = None) -> Any:
        """Draws of x from the model, of the form of :meth:`decode`; see :meth:`Using.sample`."""
        return self.using.sample(num_samples, given)

    def reconstruct(self, x: Any, given: Any = None) -> Any:
        """E[x | z] at the posterior mean of z, for new data; see :meth:`Using.reconstruct`."""
        return self.using.reconstruct(x, given)

    def score(self, x: Any, estimator: str = "annealed", given: Any = None, **settings: Any) -> Evidence:
        """log p(x) of each row of new data, in nats, with errors; see :meth:`Using.score`."""
        return self.using.score(x, estimator, given, **settings)

    def impute(self, x: Any, given: Any = None, **settings: Any) -> Filled:
        """New data with values for what was not seen, which is NaN; see :meth:`Using.impute`."""
        return self.using.impute(x, given, **settings)


def load(directory: Path | str, trust: bool | None = None) -> Run:
    """The finished run in ``directory``, whether version 0.1.0 wrote it or this one; its data set is not needed.

    Args:
        directory: of the run; or ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION``, which is downloaded from the
            Hugging Face Hub.
        trust: its ``config.yaml`` may name classes of anybody, whose modules are then imported and which are built: it
            is code. False: only classes of this library are, and losses of Pyro and optimizers of torch, which are
            named but not called. None: False for a run from the Hub, True for other directories.

    Raises:
        RunError: if ``directory`` does not hold one, or its settings name other classes and are not trusted, or the
            Hub cannot be reached.
        MissingExtra: for a run on the Hub, without huggingface_hub.
    """
    check_trust(trust)
    directory = home_of(directory)
    trust = trusted(directory, trust)
    result = result_of(directory)
    evidence = evidence_of(directory, result)
    if not trust:
        load_settings(directory, trust)
    return Run(directory, result, evidence, trust)


def load_settings(directory: Path | str, trust: bool | None = None) -> Settings:
    """The settings of a run; for ``trust``, see :func:`load`.

    Raises:
        RunError: if there are none, or they name classes that are not trusted, or were edited since the run was
            finished.
    """
    check_trust(trust)
    directory = home_of(directory)
    saved = directory / "config.yaml"
    if not os.path.lexists(saved):
        raise RunError(f"{directory} holds no run (there is no config.yaml)")
    try:
        settings = parse(Settings, [f"--config={saved}"], trust=trusted(directory, trust))[0]
    except RunError as error:
        raise error if str(saved) in str(error) else RunError(f"{saved}: {error}") from error
    given = getattr(settings.dataset, "keywords", {})
    check_unchanged(directory, [name for name, value in given.items() if isinstance(value, Path)])
    return settings


def load_model(directory: Path | str, trust: bool | None = None) -> Model:
    """The trained model of a run, on the CPU, in evaluation mode; its data set is not needed. For ``trust``, see
    :func:`load`.

    Raises:
        RunError: if ``directory`` holds no trained model.
    """
    check_trust(trust)
    directory = home_of(directory)
    weights, schema = weights_of(directory)
    settings = load_settings(directory, trust)
    try:
        with nullcontext() if trusted(directory, trust) else bounded_by(weights, directory):
            vae = build(settings, schema)
        vae.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = shorten(str(error), 400)
        raise RunError(f"{directory / 'model.safetensors'} is of another model than config.yaml: {reason}") from error
    return vae.eval()


def load_schema(directory: Path | str, trust: bool | None = None) -> Schema:
    """What the model of a run knows of its data. Only for images of an earlier version are these read for that.

    Raises:
        RunError: if ``directory`` holds no trained model.
    """
    check_trust(trust)
    directory = home_of(directory)
    _, schema = weights_of(directory)
    if schema.pixels is None and isinstance(_source(directory, load_settings(directory, trust)), Dataset):
        try:
            return load_data(directory, trust=trust).schema
        except RunError as error:
            raise RunError(
                f"{directory} is of an earlier version, which did not keep how pixels become observations, and its "
                f"data set is not here: {error}"
            ) from error
    return schema


def _source(directory: Path, settings: Settings) -> Source:
    """The data set of a run; that of a downloaded one is never looked for, or put, where its author had it."""
    folder = None if is_downloaded(directory) else settings.data_dir
    return make("dataset", settings.dataset, folder or cache_folder())


def load_data(directory: Path | str, device: torch.device | str = "cpu", trust: bool | None = None) -> Data:
    """The data set of a run; for ``trust``, see :func:`load`.

    Raises:
        RunError: if it cannot be had, or is another one than the run was trained on.
    """
    directory = home_of(directory)
    settings = load_settings(directory, trust)
    dataset = _source(directory, settings)
    find_again(directory, dataset)
    data = load_dataset(dataset, device, settings.conditions)
    check_same_data(directory, dataset, data)
    return data


class Finished(NamedTuple):
    """A finished run of images, opened to be studied: model, data, their device, and the directory that is written."""

    vae: VAE | TwoLayerVAE
    data: ImageData
    device: torch.device
    run_dir: Path


def open_finished(
    directory: Path,
    run_dir: Path | None,
    name: str,
    device: str,
    seed: int,
    resume: bool = False,
    may_be_deep: bool = True,
) -> Finished:
    """Open the finished run in ``directory``, with torch seeded, to be studied in ``run_dir``, or ``name`` there.

    Raises:
        RunError: if there is no finished run, or one of other data than images, or a hierarchy and may be none, no such
            device, or anything in ``run_dir`` already, unless it is resumed.
    """
    chosen = choose_device(device)
    run_dir = run_dir or inside(directory, name)
    if not resume:
        check_empty(run_dir)
    vae, data = load_finished(directory, chosen, may_be_told=False, may_be_deep=may_be_deep)
    torch.manual_seed(seed)
    return Finished(cast(VAE | TwoLayerVAE, vae), images_of(data), chosen, run_dir)


def images_of(data: Data) -> ImageData:
    """The data, which must be images.

    Raises:
        RunError: if they are not.
    """
    if not isinstance(data, ImageData):
        raise RunError(f"this is made for images, {data.title} holds {data.schema.noun}s")
    return data


def load_finished(
    directory: Path,
    device: torch.device,
    may_be_told: bool = True,
    trust: bool | None = None,
    may_be_deep: bool = True,
) -> tuple[Model, Data]:
    """Model and data of a finished run, on ``device``; for ``trust``, see :func:`load`.

    Raises:
        RunError: if ``directory`` holds none, or the data cannot be had, or it is told a condition and may not be, or
            has the levels of a hierarchy and may not.
    """
    check_trust(trust)
    result_of(directory)
    vae, data = load_model(directory, trust).to(device), load_data(directory, device, trust)
    if data.schema.condition and not may_be_told:
        raise RunError(f"this is made for models of p(x), {directory} is told {names_of(data.schema.condition)}")
    if isinstance(vae, HierarchicalVAE) and not may_be_deep:
        raise RunError(f"this is made for one code of each image, {directory} has {len(vae.levels)} levels of them")
    return vae, data
