"""Counts and colour images: what the encoder sees."""

import json
import math

import pytest
import torch
from scipy import stats

from experiments import colour, counts
from pyro_vae import importance_sampling, quadrature


def test_the_process_makes_what_it_scores():
    """Its density by scipy, summed over draws of z, against quadrature."""
    process = counts.Process(3)
    process.weight.mul_(0.3)
    z = torch.randn(20_000, counts.LATENTS)
    with torch.no_grad():
        x = process.counts(z[:3]).sample()
    mean = (process.level + z @ process.weight).exp().numpy()[:, None]
    r = process.dispersion
    log_px = stats.nbinom.logpmf(x.double().numpy(), r, r / (r + mean.astype(float))).sum(-1)
    exact = quadrature(process.model, process.guide, x, num_points=1024)
    torch.testing.assert_close(exact.log_px, torch.tensor(log_px).logsumexp(0) - math.log(len(z)), rtol=0, atol=0.05)
    drawn = importance_sampling(process.model, process.guide, x, 500, "laplace", df=5.0, compiled=False, num_checked=0)
    torch.testing.assert_close(drawn.log_px, exact.log_px, rtol=0, atol=0.1)


@pytest.mark.parametrize(("seen", "wanted"), [(counts.SEEN[1], 0.25), (counts.SEEN[2], 1.0)])
def test_what_the_encoder_sees_of_counts(seen, wanted):
    x = torch.tensor([[4.0, 1.0], [0.0, 1.0]])
    vae = counts.vae_of(counts.NegativeBinomial(2), seen, x)
    assert vae.posterior.inputs is not None
    assert torch.equal(vae.posterior.inputs(x), wanted * x)


@pytest.mark.parametrize(("seen", "wanted"), [(colour.SEEN[0], 1 / 255), (colour.SEEN[1], 1.0)])
def test_what_the_encoder_sees_of_colours(seen, wanted):
    x = torch.randint(256, (3, colour.SIZE)).float()
    vae = colour.vae_of("MLP", seen, 2, x)
    assert vae.posterior.inputs is not None
    torch.testing.assert_close(vae.posterior.inputs(x), wanted * x)


def test_patches_are_of_the_photographs():
    photo = torch.arange(3 * 40 * 50.0).view(3, 40, 50)
    patches = colour.cut([photo, photo + 1e6], 6).view(6, *colour.SHAPE)
    for i, patch in enumerate(patches):
        corner = int(patch[0, 0, 0] - 1e6 * (i % 2))
        top, left = corner // 50, corner % 50
        assert torch.equal(patch - 1e6 * (i % 2), photo[:, top : top + 32, left : left + 32])
    train, test = colour.patches(colour.Settings(num_train=4, num_test=4))
    assert (train.shape, test.shape) == ((4, 3072), (4, 3072))
    assert 1 < train.max() <= 255


def test_bits_of_a_uniform_pixel():
    assert colour.bits(torch.full((4,), -colour.SIZE * math.log(256))) == pytest.approx(8)


@pytest.mark.slow
def test_the_whole_comparison_of_counts(tmp_path):
    out = counts.main(["--num_data=200", "--num_columns=8", "--epochs=3", f"--run_dir={tmp_path / 'run'}"])
    result = json.loads((out / "result.json").read_text())
    assert (out / "counts.png").stat().st_size > 1000
    assert len(result["models"]) == len(counts.MODELS)
    for model in result["models"]:
        assert model["mean"] < result["process"]["log_px"]
        assert model["mean"] == pytest.approx(result["process"]["log_px"] - model["below_the_process"], abs=1e-3)
    assert "the process itself" in (out / "table.md").read_text()


@pytest.mark.slow
def test_the_whole_comparison_of_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(colour, "NETWORKS", {"MLP": colour.NETWORKS["MLP"]})
    out = colour.main(["--num_train=100", "--num_test=4", "--epochs=1", f"--run_dir={tmp_path / 'run'}"])
    result = json.loads((out / "result.json").read_text())
    assert (out / "reconstructions.png").stat().st_size > 1000
    assert [model["encoder_sees"] for model in result["models"]] == list(colour.SEEN)
    assert result["models"][0]["mean"] < 9
