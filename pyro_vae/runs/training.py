"""Training runs: from a command line to a directory with a trained and scored model."""

import json
import shlex
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import xarray as xr
import yaml
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.images import Data
from pyro_vae.errors import CheckpointError, ContractError, RunError
from pyro_vae.infer.compiled import CompiledSVI
from pyro_vae.infer.engines import PyroSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.runs import figures
from pyro_vae.runs.build import (
    as_options,
    build,
    check_objective,
    check_observations,
    check_pairing,
    load_dataset,
    make,
)
from pyro_vae.runs.directory import check_run_dir, choose_device, open_run, provenance, write_csv, write_json
from pyro_vae.runs.parsing import parse
from pyro_vae.runs.scoring import best, bits_per_dim, report_run, score_test
from pyro_vae.runs.settings import Config
from pyro_vae.training import BestWeights, Checkpoint, EarlyStopping, Epoch, OnEpoch, fit
from pyro_vae.vae import VAE, TwoLayerVAE

WORTH_COMPILING = 5000
"""Gradient steps above which the seconds of compiling pay; below, the compiled engine runs the graph as it is."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the experiment as told by ``argv``; return the run directory.

    Raises:
        RunError: for a mistake in ``argv`` or in what it points to.
    """
    config, text = parse(Config, argv)
    settings = yaml.safe_load(text)
    for part in ("encoder", "decoder"):
        if settings[part].get("init_args", {}).get("image_shape") is not None:
            raise RunError(f"--{part}.image_shape cannot be given: it is that of the data set's images")
    dataset = make("dataset", config.dataset, config.data_dir or cache_folder())
    objective = make("objective", config.objective)
    name = type(dataset).__name__
    run_dir = config.run_dir or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    check_run_dir(run_dir, text, config.resume)
    if (run_dir / "result.json").exists():
        print("This run is finished; its result:")
        report_run(run_dir)
        return run_dir

    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    data = load_dataset(dataset, device)
    vae = make("model", build, config, data.image_shape).to(device)
    x = data.observe(torch.arange(len(data.train_pixels), device=device))
    check_pairing(vae.likelihood.head, data, dataset)
    make("prior", vae.initialize, x)
    check_observations(vae, [data.test, data.validation, x], dataset.binarization)
    if isinstance(objective, Objective):
        check_objective(objective, vae, x[:2])
    open_run(run_dir, text, config.resume)
    num_parameters = sum(p.numel() for p in vae.parameters())
    print(
        f"{name}, {dataset.binarization} binarization: {len(data.train_pixels):,} training, "
        f"{len(data.validation):,} validation, {len(data.test):,} test images on {device}\n"
        f"VAE with {num_parameters:,} parameters, run directory {run_dir}"
    )

    try:
        history = fit_run(config, vae, data, objective, run_dir)
        vae.eval()
        save_file(
            vae.state_dict(),
            run_dir / "model.safetensors",
            metadata={"image_shape": json.dumps(data.image_shape)},
        )
        result, evidence, annealed = score_test(config, vae, data)
        result |= {
            "bits_per_dim": bits_per_dim(best(result), data, vae.likelihood.head),
            "dataset": name,
            "binarization": dataset.binarization,
            "train_seconds": sum(e.seconds for e in history),
            "epochs": len(history),
            "weights": config.weights,
            "seed": config.seed,
            "binarization_seed": dataset.binarization_seed,
            **provenance(device),
        }
        importance = evidence.to_dataset(unit=result["unit"])
        groups = {"importance": importance} | ({} if annealed is None else {"annealed": annealed})
        xr.DataTree.from_dict(groups).to_netcdf(run_dir / "evidence.nc", engine="h5netcdf")
        figures.training_curve(history, run_dir / "training.png")
        figures.evidence(evidence, result["khat_threshold"], run_dir)
        figures.pictures(vae.model, vae.guide, data, run_dir)
        write_json(run_dir / "result.json", result)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(resume_hint(run_dir)) from interrupt
    except OSError as error:
        raise RunError(f"--run_dir {run_dir}: {error.strerror or error}") from error
    report_run(run_dir)
    return run_dir


def fit_run(
    config: Config, vae: VAE | TwoLayerVAE, data: Data, objective: Objective | pyro.infer.ELBO, run_dir: Path
) -> list[Epoch]:
    """Fit the VAE, writing metrics.csv and checkpoint.pt after every epoch."""
    writer = SummaryWriter(str(run_dir)) if config.tensorboard else None
    logged = 0

    def on_epoch(history: list[Epoch]) -> None:
        nonlocal logged
        write_csv(run_dir / "metrics.csv", [row._asdict() for row in history])
        if writer:
            for row in history[logged:]:
                for name in ("objective", "train_elbo", "validation_elbo", "learning_rate"):
                    writer.add_scalar(name, getattr(row, name), row.epoch)
            writer.flush()
        logged = len(history)

    callbacks = [Checkpoint(run_dir / "checkpoint.pt", config.resume), OnEpoch(on_epoch)]
    callbacks += [BestWeights()] if config.weights == "best" else []
    callbacks += [EarlyStopping(config.patience)] if config.patience is not None else []
    batches = data.batches(config.batch_size)
    compiled = compiled_engine(config.epochs * len(batches), max_norm=config.max_norm, precision=config.precision)
    engine = PyroSVI if config.engine == "pyro" else compiled
    try:
        return fit(
            vae,
            batches,
            data.validation,
            epochs=config.epochs,
            lr=config.lr,
            schedule=config.schedule,
            loss=objective,
            engine=engine,
            callbacks=callbacks,
        )
    except CheckpointError as error:
        raise RunError(f"--resume: {error}; start a new run in another --run_dir") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        if not isinstance(error, ContractError) and not _raised_by_a_library(error):
            raise  # an error in somebody's own class: its traceback says where
        reason = as_options(error)
        refused = config.engine == "compiled" and "--engine pyro" in reason
        option = "--engine compiled" if refused else f"--objective {type(objective).__name__}"
        raise RunError(f"{option}: {reason}") from error
    finally:
        if writer:
            writer.close()


def compiled_engine(num_steps: int, **settings: Any) -> Callable[..., CompiledSVI]:
    """The compiled engine for a training of so many steps, with other settings of its own."""
    return partial(CompiledSVI, compiler="inductor" if num_steps > WORTH_COMPILING else "none", **settings)


def _raised_by_a_library(error: BaseException) -> bool:
    """Whether Pyro or pyro_vae itself refused what it was given, as losses do with settings they cannot serve."""
    while error.__cause__ is not None:
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] in ("pyro", "pyro_vae")


def resume_hint(run_dir: Path) -> str:
    """What to tell someone who pressed Ctrl-C."""
    if (run_dir / "checkpoint.pt").exists():
        return f"go on with: python -m experiments.svi_mnist --run_dir {shlex.quote(str(run_dir))} --resume"
    return f"no epoch was finished; {run_dir} can be deleted"
