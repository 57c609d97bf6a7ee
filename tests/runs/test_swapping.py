"""Parts swapped from the command line: what fits runs and can be compared and loaded, what does not is refused."""

import json
import math

import pytest
import torch

from pyro_vae import TwoLayerVAE, cli, log_weights, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.parts.pixels import PixelDecoder
from pyro_vae.parts.priors import VampPrior

pytestmark = pytest.mark.slow

QUICK = [
    "--dataset=Digits",
    "--engine=pyro",
    "--epochs=1",
    "--evidence.num_samples=30",
    "--evidence.annealed_images=9",
    "--evidence.annealing.num_temperatures=2",
    "--evidence.annealing.num_checked=0",
    "--encoder.hidden=[16]",
    "--decoder.hidden=[16]",
]


def run(directory, *argv):
    cli.train([*QUICK, "--latent_dim=3", f"--run_dir={directory}", *argv])
    return json.loads((directory / "result.json").read_text())


def test_dequantized_pixels_are_uniform_in_their_bin_and_redrawn():
    dataset = Digits("unused", binarization="dequantized")
    data = dataset.load()
    index = torch.arange(500)
    draws = torch.stack([data.observe(index) for _ in range(40)])
    bins = torch.floor(17 * draws)
    pixels = data.train_pixels[index].float()
    assert (bins == pixels).all()
    within = 17 * draws - pixels
    assert within.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / within.numel()) + 1e-5)
    assert within.std().item() == pytest.approx(math.sqrt(1 / 12), rel=1e-3)
    assert torch.equal(data.test, dataset.load().test)


def test_integers_are_the_pixels():
    data = Digits("unused", binarization="integers").load()
    assert torch.equal(data.observe(torch.arange(9)), data.train_pixels[:9].float())
    assert data.picture(data.test).max() == 1


@pytest.mark.parametrize(
    ("argv", "unit"),
    [
        (["--likelihood=Gaussian", "--dataset.binarization=dequantized"], "density"),
        (["--likelihood=Categorical", "--likelihood.levels=17", "--dataset.binarization=integers"], "mass"),
    ],
)
def test_bits_per_dimension(tmp_path, argv, unit):
    result = run(tmp_path / "run", *argv)
    bits = -runs.best(result) / 64 / math.log(2) + (math.log2(17) if unit == "density" else 0)
    assert result["bits_per_dim"] == pytest.approx(bits)
    assert result["unit"] == f"nats per image, {unit}"
    assert 0 < bits < 5


def test_binary_images_have_no_bits_per_dimension(tmp_path):
    assert run(tmp_path / "run")["bits_per_dim"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--likelihood=Gaussian"],
            ["Gaussian scores dequantized pixels", "choose --dataset.binarization dequantized"],
        ),
        (["--dataset.binarization=integers"], ["Bernoulli scores binary pixels", "--dataset.binarization dynamic"]),
        (
            ["--likelihood=Categorical", "--dataset.binarization=integers"],
            ["256 levels", "Digits have 17", "add --likelihood.levels 17"],
        ),
        (["--prior=VampPrior", "--prior.components=5000"], ["components is 5000", "only 1200 training images"]),
        (["--prior=StudentT", "--prior.df=-1"], ["--prior: df must be positive", "got -1"]),
        (["--posterior=LowRank", "--posterior.rank=9"], ["--posterior: rank must be from 1 to latent_dim", "3"]),
        (["--model=TwoLayerVAE", "--top.latent_dim=0"], ["--top.latent_dim must be at least 1"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path, argv, words):
    with pytest.raises(runs.RunError) as caught:
        run(tmp_path / "run", *argv)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--model=TwoLayerVAE", "--top.latent_dim=2", "--top.hidden=[8]"],
        ["--model=HierarchicalVAE", "--latent_dim=50", "--levels.latent_dims=[3,2,2]", "--levels.widths=[9]"],
        ["--prior=VampPrior", "--prior.components=7"],
        ["--prior=Flow", "--posterior=Flow"],
    ],
)
def test_a_run_of_other_parts_loads_without_its_data(tmp_path, argv, monkeypatch):
    result = run(tmp_path / "run", *argv)
    x = Digits("unused").load().test[:5]
    if "--model=HierarchicalVAE" in argv:
        with pytest.raises(runs.RunError, match=r"made for one code of each image, .* has 3 levels of them"):
            runs.load_finished(tmp_path / "run", torch.device("cpu"), may_be_deep=False)
    monkeypatch.setattr(Digits, "load", None)
    vae = runs.load_model(tmp_path / "run")
    assert isinstance(vae, TwoLayerVAE) == ("--model=TwoLayerVAE" in argv)
    if isinstance(vae.prior, VampPrior):
        assert vae.prior.pseudo_inputs.shape == (7, 64)
    assert log_weights(vae.model, vae.guide, x, 3).isfinite().all()
    assert -60 < result["test_elbo"] < result["test_log_likelihood"] < -20


def test_a_run_whose_pixels_see_their_neighbours(tmp_path):
    argv = [
        "--likelihood=PixelDecoder",
        "--likelihood.receptive_field=2",
        "--likelihood.channels=2",
        "--likelihood.layers=1",
    ]
    pixel = ["--likelihood.pixel=Categorical", "--likelihood.pixel.levels=17", "--dataset.binarization=integers"]
    result = run(tmp_path / "run", *argv, *pixel, "--evidence.annealed_images=0", "--evidence.num_images=20")
    assert result["kl"] == pytest.approx(sum(result["kl_by_site"].values()))
    assert 0 < result["kl_se"] < 1
    assert 0 < result["bits_per_dim"] < 5
    found = runs.load(tmp_path / "run")
    assert isinstance(found.model.likelihood.head, PixelDecoder)
    x = found.data.test[:3].reshape(3, 1, 8, 8)
    images = found.sample(3)
    assert images.shape == found.reconstruct(x).shape == found.decode(torch.zeros(3, 3)).shape
    gaps = torch.where(torch.rand(x.shape) < 0.3, math.nan, x)
    with pytest.raises(runs.RunError, match="PixelDecoder: log p of some entries has no formula") as caught:
        found.impute(gaps)
    assert "\n" not in str(caught.value)
    for options, words in (
        (["--likelihood.receptive_field=7"], "receptive_field 7 covers the image of 8 x 8 pixels"),
        (["--likelihood.image_shape=[1, 8, 8]"], "--likelihood.image_shape cannot be given"),
        (["--likelihood.layers=0"], "layers must be"),
    ):
        with pytest.raises(runs.RunError, match=words):
            run(tmp_path / "other", "--likelihood=PixelDecoder", *options)
    assert not (tmp_path / "other").exists()


def test_compare_pairs_runs_image_by_image(tmp_path, capsys):
    for name, argv in {"a": [], "b": ["--prior=GaussianMixture"]}.items():
        run(tmp_path / name, *argv)
    a, b = (runs.load(tmp_path / name) for name in "ab")
    (difference,) = cli.compare([str(tmp_path / "a"), str(tmp_path / "b")]).differences
    among = a.annealed["datum"].values
    rough = (b.importance["log_px"] - a.importance["log_px"]).values.astype(float)
    fine = (b.annealed["log_px"] - a.annealed["log_px"]).values.astype(float)
    corrected = rough.mean() + (fine - rough[among]).mean()
    assert difference.mean == pytest.approx(corrected) or difference.mean == pytest.approx(fine.mean())
    assert (difference.size, difference.annealed, difference.freedom) == (397, 9, 8)
    assert difference.se > difference.mc_se > 0
    assert f"{difference.mean:+.3f}" in capsys.readouterr().out
    run(tmp_path / "c", "--evidence.annealed_images=0")  # then importance sampling is what both have
    (difference,) = cli.compare([str(tmp_path / "c"), str(tmp_path / "b")]).differences
    c = runs.load(tmp_path / "c")
    assert difference.mean == pytest.approx((b.importance["log_px"] - c.importance["log_px"]).values.mean())
    assert "397 test images, 30 importance samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--likelihood=Poisson", "--dataset.binarization=integers"], "binarization"),
        (["--dataset.binarization_seed=1"], "binarization_seed"),
        (["--evidence.num_samples=40", "--evidence.annealed_images=0"], "num_samples"),
        (["--likelihood=Gaussian", "--dataset.binarization=dequantized"], "unit"),
    ],
)
def test_compare_refuses_numbers_that_mean_different_things(tmp_path, argv, word):
    run(tmp_path / "a")
    run(tmp_path / "b", *argv)
    with pytest.raises(runs.RunError, match=f"cannot be compared: {word} is"):
        cli.compare([str(tmp_path / "a"), str(tmp_path / "b")])


def test_compare_refuses_what_is_no_run(tmp_path):
    with pytest.raises(runs.RunError, match="holds no finished run"):
        cli.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(runs.RunError, match="named twice"):
        cli.compare([str(tmp_path / "a"), str(tmp_path / "b" / ".." / "a")])
    with pytest.raises(runs.RunError, match="at least two"):
        cli.compare([str(tmp_path)])
    with pytest.raises(runs.RunError, match="--runs must be given"):
        cli.compare([])
