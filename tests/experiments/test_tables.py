"""A mixed table with gaps, by a VAE and by independent columns."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from experiments import tables
from pyro_vae import Annealing, runs
from pyro_vae.data import Table
from pyro_vae.runs import columns


def test_independent_columns_are_scored_as_scipy_does(tmp_path):
    draws = np.random.default_rng(0)
    table = pd.DataFrame({"a": draws.normal(5, 2, 60), "b": draws.choice(["x", "y"], 60, p=[0.3, 0.7])})
    table.loc[::3, "a"] = None
    data = Table(tmp_path, table, columns={"a": "real"}).load()
    found = tables.independent(data)
    known = torch.cat([data.train, data.validation])
    share = known[:, 1].mean().item()
    a, b = data.test.double().numpy().T
    seen = ~np.isnan(a)
    scored = found - stats.bernoulli(share).logpmf(b)
    np.testing.assert_allclose(scored[~seen], 0, atol=1e-5)
    assert 0 < seen.sum() < len(seen)
    values = known[:, 0][~known[:, 0].isnan()].double().numpy()
    scale = values.std(ddof=1) * 1.01  # no scale is below a hundredth
    np.testing.assert_allclose(scored[seen], stats.norm(values.mean(), scale).logpdf(a[seen]), atol=1e-4)


@pytest.mark.slow
def test_the_whole_comparison(tmp_path, monkeypatch):
    drawn = columns.marginals
    monkeypatch.setattr(columns, "marginals", lambda *args: "IWAE_mask" in args[-1].parts and drawn(*args))
    chains = Annealing(2, 2, num_climbs=0, num_checked=0)
    monkeypatch.setattr(runs, "EvidenceSettings", partial(runs.EvidenceSettings, 10, annealing=chains))
    out = tables.main(["--epochs=1", f"--run_dir={tmp_path / 'run'}"])
    result = json.loads((out / "result.json").read_text())
    assert result["unit"] == "nats per row, density"
    assert 0.18 < result["missing"] < 0.22
    assert set(result["contenders"]) == set(tables.CONTENDERS)
    assert (out / "marginals.png").exists()
    assert "independent columns" in (out / "table.md").read_text()
