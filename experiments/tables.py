"""How much do the columns of a table tell of each other, by a VAE that sees it with a fifth of its entries missing?

The diabetes table of scikit-learn in its own units: 442 patients with counts (age, blood tests, the progression of the
disease), positive numbers and a binary column. A fifth of all entries is hidden at random, and the file that is left
is given to ``pyro-vae train --dataset Table``, once for each way of training. The measure, fixed beforehand: log p of
what was seen of each test row, by annealed importance sampling, and its difference, row by row, to that of independent
columns, whose distributions are of the same kinds and fitted to the same training rows. Decoder, latent dimensions and
learning rate are those, of a few, with the best validation log p(x).
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from sklearn.datasets import load_diabetes

from pyro_vae import IWAE, MLP, cli, runs
from pyro_vae.data import Table, heads
from pyro_vae.data.tables import TableData
from pyro_vae.files import whole

CONTENDERS: dict[str, dict[str, Any]] = {
    "IWAE, mask": {"missing": "mask", "objective": partial(IWAE, num_particles=20)},
    "IWAE, zeros": {"missing": "zeros", "objective": partial(IWAE, num_particles=20)},
    "ELBO, mask": {"missing": "mask", "objective": Trace_ELBO},
}


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        missing: share of the entries that are hidden, in (0, 1).
        epochs: of each training, at least 1.
        seed: of what is hidden and of the trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    missing: float = 0.2
    epochs: int = 200
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        if not 0 < self.missing < 1:
            raise ValueError(f"--missing must be between 0 and 1, got {self.missing}")
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        runs.check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("tables", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    with runs.writing(run_dir):
        write_table(run_dir / "table.csv", settings)
    dataset = partial(Table, path=run_dir / "table.csv", num_test=88)
    data = runs.load_dataset(dataset(Path()), "cpu")
    assert isinstance(data, TableData)
    alone = independent(data)
    trained = {name: runs.train(settings_of(name, settings, run_dir, dataset)) for name in CONTENDERS}
    with runs.writing(run_dir):
        first = next(iter(trained.values()))
        shutil.copy(first.path / "marginals.png", run_dir / "marginals.png")
    result = {
        "unit": first.result["unit"],
        "missing": data.missing,
        "columns": first.result["columns"],
        "independent": alone.mean(),
        "contenders": {name: summary(run, alone) for name, run in trained.items()},
    }
    return runs.conclude(run_dir, report(result), result, torch.device("cpu"))


def write_table(path: Path, settings: Settings) -> None:
    """The table with its gaps, as a file."""
    loaded: Any = load_diabetes(as_frame=True, scaled=False)
    table = loaded.frame
    draws = np.random.default_rng(settings.seed)
    hidden = draws.random(table.shape) < settings.missing
    hidden[hidden.all(1), 0] = False  # a row of which nothing was seen is none
    with whole(path) as partial:
        table.mask(hidden).to_csv(partial, index=False)


def settings_of(name: str, settings: Settings, run_dir: Path, dataset: Any) -> runs.Settings:
    """The run of one contender."""
    return runs.Settings(
        dataset=dataset,
        encoder=partial(MLP, hidden=(32,)),
        decoder=partial(MLP, hidden=()),
        latent_dim=6,
        epochs=settings.epochs,
        batch_size=64,
        lr=2e-2,
        seed=settings.seed,
        device="cpu",
        evidence=runs.EvidenceSettings(annealed_images=None),
        run_dir=run_dir / name.replace(", ", "_"),
        **CONTENDERS[name],
    )


def independent(data: TableData) -> np.ndarray:
    """log p of what was seen of each test row, shape ``(N,)``, if no column told of another."""
    train, total = torch.cat([data.train, data.validation]), torch.zeros(len(data.test))
    for place, column in enumerate(data.columns):
        head = heads([column])
        known, x = (part[~part[:, place].isnan(), place : place + 1] for part in (train, data.test))
        head.initialize(known)
        total[~data.test[:, place].isnan()] += head(*head.marginal(known)).log_prob(x).detach()
    return total.double().numpy()


def summary(run: runs.Run, alone: np.ndarray) -> dict[str, Any]:
    """The numbers of one contender."""
    annealed = run.annealed
    assert annealed is not None
    gain = annealed["log_px"].values - alone
    return {
        "test_elbo": run.result["test_elbo"],
        "importance": run.result["test_log_likelihood"],
        "log_px": run.result["annealed_log_likelihood"],
        "mc_se": run.result["annealed_mc_se"],
        "reliable": run.result["annealed_share_reliable"],
        "gain": float(gain.mean()),
        "gain_se": float(gain.std(ddof=1) / math.sqrt(len(gain))),
        "validation": run.result["validation_log_likelihood"],
        "seconds": run.result["train_seconds"] + run.result["evaluate_seconds"],
    }


def report(result: dict[str, Any]) -> str:
    """The comparison in Markdown."""
    rows = [
        ("", "ELBO", "importance", "log p(x)", "Monte Carlo error", "reliable", "minus independent", "+- rows", "s")
    ]
    rows.append(("independent columns", "", "", f"{result['independent']:.2f}", "", "", "", "", ""))
    for name, found in result["contenders"].items():
        elbo, importance, log_px = (f"{found[key]:.2f}" for key in ("test_elbo", "importance", "log_px"))
        error, reliable, seconds = f"{found['mc_se']:.3f}", f"{found['reliable']:.0%}", f"{found['seconds']:.0f}"
        gain, over_rows = f"{found['gain']:+.2f}", f"{found['gain_se']:.2f}"
        rows.append((name, elbo, importance, log_px, error, reliable, gain, over_rows, seconds))
    kinds = ", ".join(f"{name} {kind}" for name, kind in result["columns"].items())
    return f"{result['unit']}, in the units of the file; {result['missing']:.0%} missing; {kinds}\n{runs.table(rows)}"


if __name__ == "__main__":
    cli.guarded(main)
