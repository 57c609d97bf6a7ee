"""Autoregressive models: normalized, causal, exact; and the comparison with a VAE."""

import itertools
import json

import numpy as np
import pytest
import torch

from experiments import pixelcnn
from experiments.pixelcnn import MADE, AutoregressiveModel, PixelCNN
from pyro_vae import cli, importance_sampling, runs
from pyro_vae.runs.kept import Kept

pytestmark = pytest.mark.slow

NETWORKS = {
    "PixelCNN": lambda side: PixelCNN((1, side, side), channels=4, layers=4),
    "MADE": lambda side: MADE(side**2, hidden=[3 * side**2]),
}


def random(name, *args):
    """A network with large weights, in float64."""
    torch.manual_seed(0)
    network = NETWORKS[name](*args).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return network


def every_image(pixels):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=pixels)), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [2, 3])
def test_probabilities_of_all_images_sum_to_one(name, side):
    log_px = AutoregressiveModel(random(name, side)).log_px(every_image(side**2))
    assert log_px.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_px.std() > 0.1  # not merely uniform


@pytest.mark.parametrize("name", NETWORKS)
def test_each_pixel_sees_all_before_it_and_none_after(name):
    network = random(name, 9)

    def logits(x):
        return network.layers(x) if name == "MADE" else network.head.neighbours(x.unflatten(0, (9, 9)), None).flatten()

    points = torch.randn(20, 81, dtype=torch.float64)  # several, since a unit may be off at one
    jacobian = torch.stack([torch.autograd.functional.jacobian(logits, x) for x in points]).abs().sum(0)
    before = torch.ones(81, 81).tril(-1).bool()
    assert (jacobian[~before] == 0).all()
    assert (jacobian[before] != 0).all()  # a PixelCNN of one stack would have a blind spot


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_have_the_probabilities_that_are_stated(name):
    network = random(name, 2)
    images = every_image(4)
    expected = AutoregressiveModel(network).log_px(images).exp()
    draws = network().sample((40_000,))
    assert draws.shape == (40_000, 4)
    found = (draws[:, None] == images).all(-1).double().mean(0)
    assert (found - expected).abs().max() < 4 * 0.5 / 200


def test_the_program_has_no_latent_and_an_exact_log_likelihood():
    model = AutoregressiveModel(random("PixelCNN", 3))
    x = every_image(9)[::37]
    evidence = importance_sampling(model.model, model.guide, x, 30)
    torch.testing.assert_close(evidence.log_px.double(), model.log_px(x))
    assert evidence.mc_se.abs().max() < 1e-7


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("pixelcnn") / "run"
    argv = "--dataset Digits --epochs 5 --latent_dim 3 --encoder.hidden [16] --decoder.hidden [16] "
    argv += "--evidence.num_samples 30 --evidence.annealed_images 50 --evidence.annealing.num_temperatures 3"
    return cli.train([*argv.split(), f"--run_dir={run_dir}"]).path


def test_the_comparison(finished, capsys, monkeypatch):
    argv = "--channels 4 --layers 2 --epochs 4 --hidden [128] --made_epochs 10 --lr 1e-2"
    fit, trained = pixelcnn.fit, []

    def stops(model, *args, **settings):
        if trained:
            raise KeyboardInterrupt
        trained.append(model)
        return fit(model, *args, **settings)

    monkeypatch.setattr(pixelcnn, "fit", stops)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        pixelcnn.main([str(finished), *argv.split()])
    monkeypatch.setattr(pixelcnn, "fit", fit)
    out = pixelcnn.main([f"--run_dir={finished / 'pixelcnn'}", "--resume"])
    assert {path.name for path in (out / "models").iterdir()} == {"MADE.safetensors", "PixelCNN.safetensors"}
    kept, _ = Kept(out).tensors("MADE", {"data": runs.load(finished).result["data"]})
    assert all(torch.equal(value, kept[name]) for name, value in trained[0].state_dict().items())
    result = json.loads((out / "result.json").read_text())
    vae, made, ours = result["models"]
    assert [each["name"] for each in (vae, made, ours)] == ["VAE", "MADE", "PixelCNN"]
    run = runs.load(finished)
    assert vae["log_likelihood"] == pytest.approx(run.result["test_log_likelihood"], abs=1e-4)
    for each in (made, ours):
        assert -35 < each["log_likelihood"] < -20  # with free pixels: -27
        assert each["draw_seconds"] > 3 * vae["draw_seconds"]
    assert set(result["differences"]) == {"MADE", "PixelCNN"}
    printed = capsys.readouterr().out
    assert f"{made['log_likelihood']:.2f}" in printed
    assert "VAE, annealed" in printed
    assert "-81.30" not in printed  # MNIST's
    for name in ("samples.png", "likelihood_and_speed.png"):
        assert (out / name).stat().st_size > 1000
    with pytest.raises(runs.RunError, match="never overwritten"):
        pixelcnn.main([str(finished)])


def test_seconds_are_those_of_one_image(monkeypatch):
    ticks = iter([0.0, 8.0, 10.0, 34.0, 40.0, 56.0])
    monkeypatch.setattr(pixelcnn.time, "perf_counter", lambda: next(ticks))
    seconds, drawn = pixelcnn.clock(lambda: torch.zeros(8, 3), repetitions=3)
    assert seconds == 2.0  # the median of 1, 3 and 2
    assert drawn.shape == (8, 3)


def test_masked_weights_are_not_counted():
    # from the first pixels to hidden units that see 1, 2 and 3 of four, and on to the pixels after them
    made = MADE(4, hidden=[3])
    assert pixelcnn.num_parameters(made) == (1 + 2 + 3) + 3 + (0 + 1 + 2 + 3) + 4
    plain = PixelCNN((1, 2, 2), channels=2, layers=1)
    assert pixelcnn.num_parameters(plain) == sum(p.numel() for p in plain.parameters())


def test_differences_are_paired_by_image(finished):
    run = runs.load(finished)
    log_px = np.random.default_rng(0).normal(size=run.result["num_images"])
    row = pixelcnn.Row("exact", 1, log_px, 1.0, 1.0, torch.zeros(16, 64))
    found, how = pixelcnn.against(row, run)
    annealed = run.annealed["log_px"].values
    expected = log_px[run.annealed["datum"].values] - annealed
    assert len(annealed) == 50
    assert found.mean == pytest.approx(expected.mean())
    assert found.se == pytest.approx(expected.std(ddof=1) / 50**0.5)
    assert how == "annealed, 50 images"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--channels=0"], "--channels must be at least 1"),
        (["--hidden=[]"], "--hidden must name at least one layer"),
        (["--hidden=[0]"], "--hidden: every width must be at least 1"),
        (["--lr=0"], "--lr must be positive"),
        ([], "holds no finished run"),
    ],
)
def test_bad_settings_are_refused(tmp_path, argv, message):
    with pytest.raises(runs.RunError, match=message):
        pixelcnn.main([str(tmp_path), *argv])


def test_other_images_are_refused(tmp_path):
    argv = "--dataset Digits --dataset.binarization dequantized --likelihood Gaussian --epochs 1 --latent_dim 2 "
    argv += "--evidence.num_samples 2 --evidence.annealed_images 0 --encoder.hidden [4] --decoder.hidden [4]"
    cli.train([*argv.split(), f"--run_dir={tmp_path / 'run'}"])
    with pytest.raises(runs.RunError, match="its images must be binary and of one channel"):
        pixelcnn.main([str(tmp_path / "run")])
    with pytest.raises(ValueError, match="images of one channel"):
        PixelCNN((3, 2, 2))
