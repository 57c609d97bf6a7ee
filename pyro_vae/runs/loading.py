"""Finished runs, read back from their directories."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.images import Data
from pyro_vae.errors import RunError
from pyro_vae.runs.build import build, load_dataset, make
from pyro_vae.runs.directory import check_empty, choose_device
from pyro_vae.runs.parsing import parse
from pyro_vae.runs.settings import Config
from pyro_vae.vae import VAE, TwoLayerVAE


class Run(NamedTuple):
    """A finished run: its result, and its evidence per image, by importance sampling and, or None, annealed."""

    path: Path
    result: dict[str, Any]
    importance: xr.Dataset
    annealed: xr.Dataset | None


def read(directory: Path) -> Run:
    """A finished run.

    Raises:
        RunError: if ``directory`` does not hold one.
    """
    try:
        result = json.loads((directory / "result.json").read_text())
        with xr.open_datatree(directory / "evidence.nc", engine="h5netcdf") as tree:
            groups = {name: tree[name].to_dataset().load() for name in tree.children}
            return Run(directory, result, groups["importance"], groups.get("annealed"))
    except FileNotFoundError as error:
        raise RunError(f"{directory} holds no finished run: there is no {Path(error.filename).name}") from error
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{directory} holds a damaged run: {' '.join(str(error).split())}") from error


def load_config(directory: Path | str) -> Config:
    """The settings of a run.

    Raises:
        RunError: if there are none.
    """
    config, _ = parse(Config, [f"--config={Path(directory) / 'config.yaml'}"])
    return config


def load_run(directory: Path | str) -> VAE | TwoLayerVAE:
    """The trained model of a finished run, on the CPU, ready for use; its data set is not needed.

    Raises:
        RunError: if ``directory`` holds no trained model.
    """
    directory = Path(directory)
    weights = directory / "model.safetensors"
    if not weights.exists():
        raise RunError(f"{directory} holds no trained model (there is no model.safetensors)")
    config = load_config(directory)
    try:
        with safe_open(weights, "pt") as file:
            vae = build(config, json.loads((file.metadata() or {})["image_shape"]))
        vae.load_state_dict(load_file(weights))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"{weights} is damaged, or of another model: {' '.join(str(error).split())}") from error
    return vae.eval()


class Finished(NamedTuple):
    """A finished run, opened to be studied: model, data, their device, and the directory that the study writes."""

    vae: VAE | TwoLayerVAE
    data: Data
    device: torch.device
    out: Path


def open_finished(directory: Path, out: Path | None, name: str, device: str, seed: int) -> Finished:
    """Open the finished run in ``directory``, with torch seeded; the study is written to ``out``, or to ``name`` there.

    Raises:
        RunError: if there is no finished run, no such device, or anything in ``out`` already.
    """
    chosen = choose_device(device)
    out = out or directory / name
    check_empty(out)
    vae, data = load_finished(directory, chosen)
    torch.manual_seed(seed)
    return Finished(vae, data, chosen, out)


def load_finished(directory: Path, device: torch.device) -> tuple[VAE | TwoLayerVAE, Data]:
    """Model and data of a finished run, on ``device``.

    Raises:
        RunError: if ``directory`` holds none, or the data cannot be had.
    """
    if not (directory / "result.json").exists():
        raise RunError(f"{directory} holds no finished run (there is no result.json)")
    return load_run(directory).to(device), load_data(directory, device)


def load_data(directory: Path | str, device: torch.device | str = "cpu") -> Data:
    """The data set of a run.

    Raises:
        RunError: if it cannot be had.
    """
    config = load_config(directory)
    return load_dataset(make("dataset", config.dataset, config.data_dir or cache_folder()), device)
