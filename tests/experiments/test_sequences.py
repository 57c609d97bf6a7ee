"""The process of the sequences' experiment has the density that its filter says, and the comparison runs."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments import sequences
from experiments.sequences import FEATURES, SHORTEST, STEPS, Process
from pyro_vae import Annealing
from pyro_vae.errors import RunError


def test_the_filter_has_the_density_of_all_steps_together():
    process = Process()
    x = process.draw(6, np.random.default_rng(0))
    steps = ~np.isnan(x).any(2)
    assert ((steps.sum(1) >= SHORTEST) & (steps.sum(1) <= STEPS)).all()
    covariances = [np.eye(2)]
    for _ in range(STEPS - 1):
        covariances.append(process.move @ covariances[-1] @ process.move.T + process.step**2 * np.eye(2))
    blocks = [
        [process.show @ np.linalg.matrix_power(process.move, t - s) @ covariances[s] @ process.show.T for s in range(t)]
        for t in range(STEPS + 1)
    ]
    whole = np.zeros((STEPS, FEATURES, STEPS, FEATURES))
    for t in range(STEPS):
        whole[t, :, t] = process.show @ covariances[t] @ process.show.T + np.diag(process.noise**2)
        for s in range(t):
            whole[t, :, s], whole[s, :, t] = blocks[t][s], blocks[t][s].T
    for each, known, log_p in zip(x, steps, process.log_px(x), strict=True):
        size = known.sum() * FEATURES
        cov = whole[known][:, :, known].reshape(size, size)
        mean = np.tile(process.loc, known.sum())
        assert log_p == pytest.approx(stats.multivariate_normal(mean, cov).logpdf(each[known].ravel()), abs=1e-6)


@pytest.mark.slow
def test_networks_are_compared(tmp_path, monkeypatch):
    few = ["--num_train=100", "--num_test=2", "--epochs=1", "--latent_dim=1"]
    monkeypatch.setattr(sequences, "CHAINS", Annealing(2, 2, num_climbs=0, num_checked=0))
    found = sequences.main([f"--run_dir={tmp_path / 'run'}", *few])
    result = json.loads((found / "result.json").read_text())
    assert set(result["networks"]) == set(sequences.NETWORKS)
    for each in result["networks"].values():
        assert math.isclose(each["log_px"], result["exact"] + each["difference"], abs_tol=1e-4)
    assert "the process itself" in (found / "table.md").read_text()
    assert (found / "differences.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_train=10"], "--num_train must be at least 100, got 10"),
        (["--lr=0"], "--lr must be positive and finite, got 0"),
        (["--seed=-1"], "--seed must be at least 0"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(RunError, match=message):
        sequences.main(options)
