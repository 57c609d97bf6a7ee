"""A VAE that is told the label, beside one that is not."""

import json
from functools import partial

import pytest
import torch

from experiments import conditions
from pyro_vae import Annealing, annealed_importance_sampling, runs


def test_means_have_both_errors():
    found = conditions.mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.3, 0.0, 0.4]))
    assert found == pytest.approx((3.0, 0.5 / 3, 7**0.5 / 3**0.5))


@pytest.mark.slow
def test_the_whole_comparison(tmp_path, monkeypatch):
    chains = Annealing(8, 8, num_climbs=0, num_checked=0)
    scored = partial(annealed_importance_sampling, settings=chains)
    monkeypatch.setattr(conditions, "annealed_importance_sampling", scored)
    monkeypatch.setattr(runs, "classify", partial(runs.classify, annealing=chains))
    monkeypatch.setattr(runs, "EvidenceSettings", partial(runs.EvidenceSettings, num_images=2))
    argv = ["--epochs=4", "--latent_dim=1", "--num_images=8", f"--run_dir={tmp_path / 'run'}"]
    result = json.loads((conditions.main(argv) / "result.json").read_text())
    found = {name: row[0] for name, row in result["log_likelihood"].items()}
    assert found["told"] > found["summed"]  # c tells x more than its frequency does, here
    assert found["told"] > found["shuffled"]
    assert found["difference"] == pytest.approx(found["summed"] - found["plain"])
    # log p(x | c) - log p(x) = log p(c | x) - log p(c), and there are about as many of each digit
    loss = result["classifiers"]["VAE told the label"]["log_loss"]
    assert found["told"] - found["summed"] == pytest.approx(2.303 - loss, abs=0.1)
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000
    assert "another quantity" in (tmp_path / "run" / "table.md").read_text()
