"""What is drawn and measured of a latent space."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import ndimage

from experiments import latent_space
from experiments.latent_space import Space, blur, copying, sharpness, spherical, straight
from pyro_vae import cli, runs

pytestmark = pytest.mark.slow

BASE = "--dataset Digits --epochs 20 --encoder.hidden [32] --decoder.hidden [32] --evidence.num_samples 2"
PICTURES = ("traversals.png", "interpolations.png", "nearest.png")


def train(folder, *argv):
    return cli.train([*BASE.split(), "--evidence.annealed_images=0", f"--run_dir={folder}", *argv]).path


@pytest.fixture(scope="module")
def planar(tmp_path_factory):
    """A finished run with two latent dimensions."""
    return train(tmp_path_factory.mktemp("latent") / "planar", "--latent_dim=2")


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """A finished run on grey images with five latent dimensions."""
    argv = "--latent_dim=5 --dataset.binarization dequantized --likelihood Gaussian"
    return train(tmp_path_factory.mktemp("latent") / "gaussian", *argv.split())


@pytest.fixture(scope="module")
def space(planar):
    vae, data = runs.load_model(planar), runs.load_data(planar)
    return Space(vae.model, vae.guide, data)


def test_pictures_and_numbers(planar, gaussian, capsys):
    out = latent_space.main([str(planar), f"--others=[{gaussian}]", "--num_images=100"])
    for name in (*PICTURES, "manifold.png"):
        assert (out / name).stat().st_size > 1000
    result = json.loads((out / "result.json").read_text())
    assert result["active_units"] in ([0, 1], [1, 0])
    halfway = {name: each["value"] for name, each in result["halfway"].items()}
    assert halfway["spherical minus straight"] == pytest.approx(halfway["spherical"] - halfway["straight"], abs=1e-6)
    assert 0.1 < halfway["straight"] < 1
    assert set(result["blur"]) == {str(planar), str(gaussian)}
    assert f"{halfway['straight']:.3f}" in capsys.readouterr().out


def test_a_manifold_needs_two_dimensions(gaussian, planar, tmp_path):
    with pytest.raises(runs.RunError, match="has 5 latent dimensions, the manifold needs 2"):
        latent_space.main([str(gaussian), "--manifold", f"--run_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    out = latent_space.main([str(gaussian), "--num_images=50", f"--run_dir={tmp_path / 'out'}"])
    assert not (out / "manifold.png").exists()
    assert (out / "nearest.png").exists()


def test_other_images_are_refused(planar, tmp_path):
    other = train(tmp_path / "other", "--latent_dim=2", "--dataset.num_validation=300", "--epochs=1")
    with pytest.raises(runs.RunError, match=r"--others: .*other was trained on other images"):
        latent_space.main([str(planar), f"--others=[{other}]", f"--run_dir={tmp_path / 'out'}"])
    (other / "result.json").unlink()
    with pytest.raises(runs.RunError, match="holds no finished run"):
        latent_space.main([str(planar), f"--others=[{other}]", f"--run_dir={tmp_path / 'out'}"])
    with pytest.raises(runs.RunError, match="--num_images must be at least 20"):
        latent_space.main([str(planar), "--num_images=2"])


def test_quantiles_are_those_of_the_prior(space):
    levels = torch.tensor([0.05, 0.5, 0.9])
    expected = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    torch.testing.assert_close(space.quantiles(levels), expected[:, None].expand(3, 2), atol=0.05, rtol=0)


def test_codes_are_decoded_by_the_decoder(space, planar):
    vae = runs.load_model(planar)
    z = torch.randn(7, 2)
    with torch.no_grad():
        torch.testing.assert_close(space.decode(z), vae.likelihood(z).mean)
        means = vae.posterior(space.data.test).mean
    assert (space.codes - means).abs().max() < 0.5  # of 64 draws
    assert set(space.decode(z, draw=True).unique().tolist()) <= {0.0, 1.0}


def test_what_is_drawn(space, tmp_path, monkeypatch):
    """Traversals start from the code of the first test image; each row of interpolations follows its own line."""
    drawn = {}
    monkeypatch.setattr(Space, "picture", lambda self, x, rows, path, title, labels=None: drawn.update({path.stem: x}))
    units = latent_space.traversals(space, tmp_path / "traversals.png", columns=5)
    z = space.codes[0].repeat(len(units), 5, 1)
    torch.manual_seed(0)
    for row, unit in enumerate(units):
        z[row, :, unit] = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.01, 0.99, 5))
    expected = space.decode(z.flatten(0, 1))
    torch.testing.assert_close(drawn["traversals"], expected, atol=0.05, rtol=0)
    latent_space.interpolations(space, tmp_path / "interpolations.png", pairs=2, columns=3)
    rows = drawn["interpolations"].unflatten(0, (4, 3))
    half = torch.tensor(0.5)
    for row, (pair, line) in enumerate([(0, straight), (0, spherical), (1, straight), (1, spherical)]):
        middle = space.decode(line(space.codes[[pair]], space.codes[[pair + 2]], half))
        torch.testing.assert_close(rows[row, 1], middle[0])


def test_other_runs_leave_the_numbers_of_the_first_alone(planar, gaussian, tmp_path):
    results = []
    for name, others in (("alone", "[]"), ("beside", f"[{gaussian}]")):
        argv = [str(planar), f"--others={others}", "--num_images=50", f"--run_dir={tmp_path / name}"]
        results.append(json.loads((latent_space.main(argv) / "result.json").read_text()))
    for name in ("halfway", "copying", "active_units"):
        assert results[0][name] == results[1][name]
    assert results[0]["blur"][str(planar)] == results[1]["blur"][str(planar)]


def test_lines():
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    half = torch.tensor(0.5)
    torch.testing.assert_close(straight(start, end, half), torch.tensor([[0.5, 1.0]]))
    expected = math.sin(math.pi / 4) * torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(spherical(start, end, half), expected)
    for line in (straight, spherical):
        torch.testing.assert_close(line(start, end, torch.tensor(0.0)), start)
        torch.testing.assert_close(line(start, end, torch.tensor(1.0)), end)
        torch.testing.assert_close(line(start, 2 * start, half), 1.5 * start)  # no angle between them
    z = torch.randn(1000, 50)
    norm = spherical(z[:500], z[500:], half).norm(dim=-1).mean().item()
    assert norm == pytest.approx(math.sqrt(50), rel=0.05)  # stays where the prior's mass is
    assert straight(z[:500], z[500:], half).norm(dim=-1).mean().item() == pytest.approx(5, rel=0.05)


def test_sharpness_agrees_with_scipy():
    images = torch.rand(5, 48)
    for shape in ((1, 6, 8), (3, 4, 4)):
        ours = sharpness(images, shape)
        theirs = []
        for image in images.reshape(5, *shape).double().numpy():
            inner = [ndimage.laplace(channel)[1:-1, 1:-1].var(ddof=1) for channel in image]
            theirs.append(np.mean(inner))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_blur_is_one_for_the_data_and_less_for_what_is_smoothed(space, monkeypatch):
    found = blur(space, 500)
    assert found["samples, mean"].value < 0.9 < found["samples, draw"].value
    with torch.no_grad():
        truth = sharpness(space.data.train_pixels.float() / space.data.max_value, space.data.image_shape).mean()
        decoded = sharpness(space.decode(space.codes[:500]), space.data.image_shape).mean()
    reconstructed = found["reconstructions, mean"]
    assert abs(reconstructed.value - (decoded / truth).item()) < 4 * reconstructed.error
    stored = space.data.train_pixels.float() / space.data.max_value
    monkeypatch.setattr(space.data, "observe", lambda index: stored[index])
    same = blur(space, 500)["training observations"]
    assert same.value == pytest.approx(1)
    assert 0 < same.error < 0.1


def test_copies_are_found(space):
    """A model that repeats training images is nearer to them than test images are; noise is further away."""
    data = space.data
    known = latent_space.training_observations(space)

    class Fixed:
        def __init__(self, x):
            self.x = x

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                mean = self.x[torch.randint(len(self.x), (len(x),))]
                pyro.sample("x", dist.Bernoulli(mean).to_event(1), obs=x)

    share = "share of draws nearer than 1 % of test images"
    copies = Fixed(known)
    found = copying(Space(copies.model, copies.guide, data), 100)
    assert found["draws"] == 0
    assert found[share] == 1
    noise = Fixed(torch.full((1, 64), 0.5))
    found = copying(Space(noise.model, noise.guide, data), 100)
    assert found["draws"] > found["test images"]
    assert found[share] == 0
    by_hand = torch.cdist(data.test[:100], known).amin(-1).median().item()
    assert found["test images"] == pytest.approx(by_hand, rel=1e-5)
