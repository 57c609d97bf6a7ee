"""Imputation beside scikit-learn's."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from experiments import missing
from pyro_vae import Annealing


def test_errors_are_in_units_of_each_column():
    x = torch.zeros(3, 2)
    filled = torch.tensor([[1.0, 10.0], [5.0, 0.0], [0.0, 30.0]])
    among = torch.tensor([[True, False], [False, False], [False, True]])
    assert missing.error(filled, x, torch.tensor([1.0, 10.0]), among) == pytest.approx(math.sqrt((1 + 9) / 2))


@pytest.mark.slow
def test_a_vae_fills_in_what_one_factor_tells():
    torch.manual_seed(0)
    factor = torch.randn(300, 1)
    x = 50 + 10 * factor @ torch.ones(1, 6) + torch.randn(300, 6)
    hidden = torch.rand(x.shape) < 0.2
    vae = missing.train(x.masked_fill(hidden, math.nan), missing.Shape(2, ()), 300)
    found = missing.impute(vae.model, vae.guide, x.masked_fill(hidden, math.nan), 200, num_checked=0)
    assert missing.error(found.mean, x, x.std(0), hidden) < 0.25  # the best is about 0.11, of means 1


@pytest.mark.slow
def test_the_whole_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(missing, "CHAINS", Annealing(2, 2, num_climbs=0))
    monkeypatch.setattr(missing, "SHAPES", (missing.Shape(2, ()), missing.Shape(2, (8,))))
    for name, every in {"breast cancer": 3, "diabetes": 3}.items():
        some = SimpleNamespace(data=missing.TABLES[name]().data[::every, :10])
        monkeypatch.setitem(missing.TABLES, name, lambda some=some: some)
    out = missing.main(["--num_draws=2", "--steps=4", f"--run_dir={tmp_path / 'run'}"])
    result = json.loads((out / "result.json").read_text())
    assert (out / "imputation.png").stat().st_size > 1000
    for by in result["errors"].values():
        assert set(by) == {"mean", "nearest neighbours", "iterative", "VAE"}
        assert 0.9 < by["mean"][0] < 1.1
        assert by["iterative"][0] < 0.95
    assert "breast cancer" in (out / "table.md").read_text()
