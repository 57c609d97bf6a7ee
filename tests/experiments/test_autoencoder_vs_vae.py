"""The autoencoder beside the VAE, and the classifier that judges what they decode."""

import json
import math

import pytest
import scipy.linalg
import torch

from experiments import autoencoder_vs_vae
from experiments.autoencoder_vs_vae import AE_CE, AE_L2, OURS
from pyro_vae import fit, importance_sampling, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.runs import judge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Digits(tmp_path_factory.mktemp("data")).load()


def test_frechet_distance_agrees_with_scipy():
    a, b = torch.randn(500, 4) @ torch.randn(4, 4), 2 + torch.randn(300, 4)
    of_a, of_b = (torch.cov(each.double().mT).numpy() for each in (a, b))
    root = scipy.linalg.sqrtm(of_a @ of_b).real
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected += of_a.trace() + of_b.trace() - 2 * root.trace()
    assert judge.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert judge.frechet_distance(a, a + 3) == pytest.approx(36, rel=1e-4)
    assert judge.frechet_distance(a - a.mean(0), 2 * (a - a.mean(0))) == pytest.approx(of_a.trace(), rel=1e-4)


def test_the_judge_tells_digits_from_noise(data):
    found = judge.Judge(data, num_steps=300)
    images = judge.grey(data)
    assert found.accuracy > 0.85
    noise = torch.rand(500, 64)
    floor = found.floor(500)
    assert found.distance(noise) > 20 * floor
    assert found.distance(images[-500:]) < 3 * floor
    assert found.floor(100) > 1.5 * floor  # few images seem further away
    assert found.confidence(images).mean() > found.confidence(noise).mean() + 0.1
    assert found.classify(noise).sum(-1) == pytest.approx(torch.ones(500), abs=1e-5)


@pytest.mark.parametrize("kind", [AE_L2, AE_CE])
def test_an_autoencoder_is_scored_by_its_reconstruction(kind, data):
    model = autoencoder_vs_vae.build(kind, 3, 64)
    model.initialize(data.test)
    x = data.test[:20]
    means = model.likelihood(model.encoder(x)).mean.detach()
    if kind == AE_CE:
        expected = (x * means.log() + (1 - x) * (1 - means).log()).sum(-1)
    else:
        expected = -(x - means).square().sum(-1) - 32 * math.log(math.pi)
    log_px = importance_sampling(model.model, model.guide, x, 30).log_px
    torch.testing.assert_close(log_px.float(), expected, rtol=1e-4, atol=1e-4)
    assert means.mean(0) == pytest.approx(data.test.mean(0).clamp(1e-3, 1 - 1e-3), abs=0.15)  # starts at the mean image
    before = log_px.mean()
    fit(model, data.batches(100), epochs=20, progress=False)
    assert importance_sampling(model.model, model.guide, x, 30).log_px.mean() > before + 1


def test_codes_and_their_densities(data):
    codes = torch.tensor([[-5.0, 0.0], [5.0, 1.0]]).repeat(500, 1) + 0.1 * torch.randn(1000, 2)
    one, two = (autoencoder_vs_vae.fitted(codes, n, 2000) for n in (1, 2))
    for draws in (one, two):
        assert draws.mean(0) == pytest.approx(codes.mean(0), abs=0.4)
        assert torch.cov(draws.mT) == pytest.approx(torch.cov(codes.mT), rel=0.1, abs=0.3)
    assert (one[:, 0].abs() < 3).double().mean() > 0.3  # a Gaussian fills the hole between the two, a mixture does not
    assert (two[:, 0].abs() < 3).double().mean() == 0
    distance, which = judge.nearest(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    assert (distance.item(), which.item()) == (3.0, 1)
    labelled = data.test_labels.float()[:, None]
    middle = autoencoder_vs_vae.midpoints(labelled, data, 200)
    assert middle.shape == (200, 1)
    assert set((2 * middle).unique().tolist()) <= set(range(1, 18))


def test_the_comparison(tmp_path, capsys):
    argv = [
        "--dataset=Digits",
        "--latent_dims=[2, 10]",
        "--seeds=1",
        "--epochs=10",
        "--num_images=500",
        f"--run_dir={tmp_path / 'run'}",
    ]
    out = autoencoder_vs_vae.main(argv)
    result = json.loads((out / "result.json").read_text())
    measures = {name: each[0] for name, each in result["measures"].items()}
    assert all(len(each) == 1 for each in result["measures"].values())
    assert measures[f"{AE_CE}, 10"]["cross_entropy"] < measures[f"{OURS}, 10"]["cross_entropy"] - 1
    assert measures[f"{AE_CE}, 10"]["cross_entropy"] < measures[f"{AE_CE}, 2"]["cross_entropy"] - 3
    assert 0 < result["judge"]["floor"] < measures[f"{OURS}, 10"]["prior"]
    ours, theirs = measures[f"{OURS}, 10"], measures[f"{AE_CE}, 10"]
    assert abs(ours["holes"] - 1) < 0.15 < abs(theirs["holes"] - 1)
    assert theirs["gaussian"] != theirs["mixture"]
    for name in ("samples.png", "interpolations.png", "codes.png", "distances.png"):
        assert (out / name).stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "the autoencoder reconstructs better" in printed
    with pytest.raises(runs.RunError, match="never overwritten"):
        autoencoder_vs_vae.main(argv)


def test_a_verdict():
    assert autoencoder_vs_vae.verdict([-1.0, -1.1, -0.9]).startswith("holds: -1.000 +- 0.058")
    assert autoencoder_vs_vae.verdict([1.0, 1.1, 0.9]).startswith("does not hold: +1.000 +- 0.058")
    assert autoencoder_vs_vae.verdict([-1.0, 1.1, -0.9]).startswith("undecided")
    assert autoencoder_vs_vae.verdict([-1.0, -1.5]).startswith("undecided")  # t = 5, below 12.7
    assert autoencoder_vs_vae.verdict([-1.0]) == "undecided: -1"
    assert autoencoder_vs_vae.verdict([-131.0, -128.0, -125.0]) == "holds: -128.0 +- 1.7"


def test_claims_say_that_the_first_number_is_smaller():
    claims = autoencoder_vs_vae.CLAIMS
    assert claims["the autoencoder reconstructs better (nats)"] == (AE_CE, "cross_entropy", OURS, "cross_entropy")
    assert claims["the VAE's midpoints are nearer to the data"] == (OURS, "midpoints", AE_CE, "midpoints")
    for claim, (one, _, other, _) in claims.items():
        assert (one, other) == ((AE_CE, OURS) if claim.startswith("the autoencoder") else (OURS, AE_CE))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs=0"], "--epochs must be at least 1"),
        (["--latent_dims=[]"], "--latent_dims must be different numbers of at least 1"),
        (["--latent_dims=[2, 2]"], "--latent_dims must be different numbers"),
        (["--num_images=5"], "--num_images must be at least 100"),
        (["--lr=-1"], "--lr must be positive"),
        (["--dataset=Digits", "--dataset.binarization=none"], "binary pixels drawn from grey ones are needed"),
        (["--dataset=Digits", "--dataset.binarization=threshold"], "choose dynamic"),
    ],
)
def test_bad_settings_are_refused(argv, message):
    with pytest.raises(runs.RunError, match=message):
        autoencoder_vs_vae.main(argv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "no labels"),
        ({"test_labels": None}, "no labels"),
        ({"train_labels": torch.zeros(10, dtype=torch.int64)}, "a single class"),
        ({"train_labels": torch.arange(5).repeat(10)}, "classes that no training image has"),
    ],
)
def test_labels_that_will_not_do_are_refused(change, message):
    other = Digits("unused").load()
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(runs.RunError, match=message):
        judge.classes(other)


def test_classes_are_numbered_from_zero():
    other = Digits("unused").load()
    expected = other.train_labels, other.test_labels
    other.train_labels, other.test_labels = (7 * each - 3 for each in expected)
    for found, usual in zip(judge.classes(other), expected, strict=True):
        assert torch.equal(found, usual)
