"""Signal-to-noise ratios: of gradients whose law is known, and of a trained run."""

import json
import math

import pytest
import torch
from torch import nn

from experiments import gradient_snr
from pyro_vae import MLP, Bernoulli, Conditional, MeanField, TwoLayerVAE, cli, runs
from pyro_vae.parts.priors import VampPrior

pytestmark = pytest.mark.slow


class KnownGradient:
    """A loss whose gradient is ``mean`` plus normal noise of standard deviation ``scale`` in every entry."""

    def __init__(self, module, mean, scale):
        self.module, self.mean, self.scale = module, mean, scale

    def __call__(self, model, guide, x):
        return sum((p * (self.mean + self.scale * torch.randn_like(p))).sum() for p in self.module.parameters())


@pytest.mark.parametrize(("mean", "scale"), [(0.3, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_a_ratio_that_is_known(mean, scale):
    torch.manual_seed(0)
    module = nn.Linear(40, 10)
    module.model = module.guide = None
    parameters = {"guide": [module.weight], "model": [module.bias]}
    found = gradient_snr.measure(module, KnownGradient(module, mean, scale), None, parameters, 400)
    for part, n in (("guide", 400), ("model", 10)):
        assert found[part].ratio == pytest.approx(mean / scale, abs=5 * found[part].error + 0.02)
        assert found[part].error < 0.1
        assert found[part].noise == pytest.approx(scale * math.sqrt(n), rel=0.1)
        assert found[part].signal == pytest.approx(mean * math.sqrt(n), abs=0.1 * math.sqrt(n))


def test_a_slope():
    ratios = {k: {"guide": gradient_snr.Ratio(3 / math.sqrt(k), 0, 0, 0)} for k in (1, 4, 16)}
    assert gradient_snr.slope(ratios, "guide") == pytest.approx(-0.5)
    assert math.isnan(gradient_snr.slope({1: ratios[1]}, "guide"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("snr") / "run"
    argv = "--dataset Digits --epochs 5 --latent_dim 3 --encoder.hidden [16] --decoder.hidden [16] "
    cli.train([*(argv + "--evidence.num_samples 30 --evidence.annealed_images 0").split(), f"--run_dir={run_dir}"])
    return run_dir


def test_a_trained_run(finished, capsys):
    out = gradient_snr.main([str(finished), "--num_particles=[1, 64]", "--num_draws=100"])
    result = json.loads((out / "result.json").read_text())
    ratios = {name: {k: r["guide"]["ratio"] for k, r in each.items()} for name, each in result["ratios"].items()}
    assert ratios["DReG"]["64"] > 1.05 * ratios["IWAE"]["64"]
    assert ratios["STL"]["64"] > 1.05 * ratios["ELBO"]["64"]
    assert ratios["MIWAE"].keys() == {"64"}
    assert result["slopes"]["ELBO"]["model"] == pytest.approx(0.5, abs=0.15)  # of the mean of K draws
    printed = capsys.readouterr().out
    assert f"{ratios['DReG']['64']:.3g}" in printed
    assert (out / "gradient_snr.png").stat().st_size > 1000
    with pytest.raises(runs.RunError, match="never overwritten"):
        gradient_snr.main([str(finished)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_particles=[0]"], "--num_particles must be different numbers of at least 1"),
        (["--num_draws=25"], "--num_draws must be a multiple of 10"),
        (["--num_images=0"], "--num_images must be at least 1"),
    ],
)
def test_bad_settings_are_refused(tmp_path, argv, message):
    with pytest.raises(runs.RunError, match=message):
        gradient_snr.main([str(tmp_path), *argv])


def test_parameters_belong_to_the_guide_or_to_the_model():
    vae = TwoLayerVAE(
        VampPrior(2, components=3),
        latent=Conditional(MLP(2, 6, hidden=[4]), MeanField(3)),
        likelihood=Conditional(MLP(3, 8, hidden=[4]), Bernoulli(8)),
        posterior=Conditional(MLP(8, 6, hidden=[4]), MeanField(3)),
        top_posterior=Conditional(MLP(3, 4, hidden=[4]), MeanField(2)),
    )
    vae.initialize(torch.bernoulli(torch.full((20, 8), 0.5)))
    parts = gradient_snr.split(vae)
    count = {name: sum(p.numel() for p in each) for name, each in parts.items()}
    encoders = (8 * 4 + 4 + 4 * 6 + 6) + (3 * 4 + 4 + 4 * 4 + 4)
    assert count == {"guide": encoders, "model": sum(p.numel() for p in vae.parameters()) - encoders}


def test_estimators_are_those_of_their_names():
    made = {name: make(9) for name, make in gradient_snr.ESTIMATORS.items()}
    assert {name: type(each).__name__ for name, each in made.items()} == {name: name for name in made}
    assert made["PIWAE"].groups == (3, 3)
    assert (made["MIWAE"].num_groups, made["MIWAE"].num_particles) == (3, 3)
    assert {made[name].num_particles for name in ("ELBO", "STL", "IWAE", "DReG")} == {9}


def test_more_images_than_there_are(finished, tmp_path):
    argv = ["--num_images=5000", "--num_particles=[1]", "--num_draws=20", f"--run_dir={tmp_path / 'out'}"]
    text = (gradient_snr.main([str(finished), *argv]) / "table.md").read_text()
    assert "1200 training images" in text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(runs.RunError, match="holds no finished run"):
        gradient_snr.main([str(tmp_path)])
