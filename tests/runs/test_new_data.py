"""A finished run used on data that it has not seen."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats
from sklearn.datasets import load_digits

from pyro_vae import (
    MLP,
    Conditional,
    ConditionalVAE,
    Gaussian,
    LinearGaussianVAE,
    MeanField,
    StandardNormal,
    TwoLayerVAE,
    cli,
    runs,
)
from pyro_vae.data import Digits
from pyro_vae.data.datasets import Column, Pixels, Schema
from pyro_vae.data.files import read_new
from pyro_vae.data.incoming import observations
from pyro_vae.errors import RunError
from pyro_vae.runs.using import Using

DIGITS = load_digits().images.astype(np.uint8)[1400:]
WHITE = (DIGITS * (255 / 16)).round().astype(np.uint8)
"""As pictures, where white is 255."""
MINUTE = [
    *("--dataset=Digits", "--encoder.hidden=[4]", "--decoder.hidden=[4]", "--latent_dim=2", "--epochs=1"),
    *("--device=cpu", "--evidence.num_samples=5", "--evidence.num_images=2", "--evidence.annealed_images=0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a small run, and its scores."""
    path = tmp_path_factory.mktemp("new") / "run"
    cli.train([*MINUTE, f"--run_dir={path}", "--encoder.activation=tanh"])  # bounded: see overflowing
    settings = {"num_samples": 20, "num_images": None, "device": "cpu"}
    return path, runs.score(path, estimator="importance", **settings).evidence["importance"]


@pytest.fixture(scope="module")
def run(trained):
    """The run, whose data set cannot be had any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "read", None)
        yield runs.load(trained[0])


@pytest.fixture(scope="module")
def linear():
    """A model of which everything is known, used on tables of reals."""
    torch.manual_seed(1)
    vae = LinearGaussianVAE(torch.randn(4, 2), torch.randn(4), 0.5)
    return vae, Using(vae, Schema((4,), "row"), lambda line: None)


def test_the_pixels_of_the_test_set_have_the_numbers_of_evaluate(run, trained, capsys):
    torch.manual_seed(0)
    evidence = run.score(DIGITS, "importance", num_samples=20)
    assert torch.equal(evidence.log_px, trained[1].log_px)
    assert torch.equal(evidence.mc_se, trained[1].mc_se)
    assert "1 with probability pixel / 16, drawn with seed 777" in capsys.readouterr().out


def test_embeddings_are_the_means_of_the_guide(run):
    x = run.using.data(DIGITS[:20])
    torch.testing.assert_close(run.encode(DIGITS[:20]), run.model.posterior(x).mean)
    draws = run.encode(DIGITS[:20], num_samples=3000)
    made = run.model.posterior(x)
    assert draws.shape == (3000, 20, 2)
    assert ((draws.mean(0) - made.mean) / made.stddev * 3000**0.5).abs().max() < 5


def test_reconstructions_are_those_of_the_embeddings(run):
    found = run.reconstruct(DIGITS[:5])
    assert found.shape == (5, 1, 8, 8)
    torch.testing.assert_close(found.flatten(1), run.model.likelihood(run.encode(DIGITS[:5])).mean)
    torch.testing.assert_close(run.decode(run.encode(DIGITS[:5]).numpy()), found)


def test_samples_are_of_the_shape_and_support(run):
    x = run.sample(7)
    assert x.shape == (7, 1, 8, 8)
    assert set(x.unique().tolist()) <= {0.0, 1.0}


def test_samples_have_the_distribution_of_the_model(linear):
    vae, using = linear
    x = using.sample(4000)
    covariance = vae.weight @ vae.weight.mT + 0.25 * torch.eye(4)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - vae.mean).mT, upper=False)
    assert stats.kstest(white.flatten().numpy(), "norm").pvalue > 1e-3
    assert (white @ white.mT / 4000 - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "bool"])
def test_latents_and_log_px_of_rows_are_exact(linear, kind):
    vae, using = linear
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(kind)
    exact = torch.from_numpy(x.astype(np.float32))
    torch.testing.assert_close(using.encode(x), vae.posterior(exact).mean)
    torch.testing.assert_close(
        using.score(x, "importance", num_samples=2, num_checked=0).log_px.float(), vae.log_px(exact)
    )
    torch.testing.assert_close(using.decode(using.encode(x)), vae.posterior(exact).mean @ vae.weight.mT + vae.mean)


def test_what_was_not_seen_is_filled_in(linear):
    vae, using = linear
    x = torch.randn(5, 4)
    x[0, 1], x[3, :2] = np.nan, np.nan
    seen = ~x.isnan()
    filled = using.impute(x, num_samples=4000, num_checked=0)
    mean = vae.posterior(x, seen).mean @ vae.weight.mT + vae.mean
    assert torch.equal(filled.values[seen], x[seen])
    torch.testing.assert_close(filled.values, torch.where(seen, x, mean), rtol=0, atol=0.06)
    torch.testing.assert_close(filled.imputation.evidence.log_px.float(), vae.log_px(x, seen))
    torch.testing.assert_close(
        using.score(x, "importance", num_samples=2, num_checked=0).log_px.float(), vae.log_px(x, seen)
    )
    with pytest.raises(RunError, match="nothing is missing"):
        using.impute(torch.zeros(2, 4))


def test_images_with_gaps_are_scored_and_filled_by_an_encoder_that_knows_none(run):
    x = DIGITS[:6].astype(float)
    x[:3, 4:] = np.nan
    filled = run.impute(x, num_samples=50, num_draws=10, num_checked=0)
    assert not filled.values.isnan().any()
    assert ((filled.values[:3, 0, 4:] > 0) & (filled.values[:3, 0, 4:] < 1)).all()
    torch.manual_seed(0)
    some = run.score(x, "importance", num_samples=200, num_checked=0)
    whole = run.score(DIGITS[:6], "importance", num_samples=200, num_checked=0)
    assert (some.log_px[:3] > whole.log_px[:3] + 3).all()
    x[2] = np.nan
    with pytest.raises(RunError, match="row 2: all of its values are missing"):
        run.score(x)


def test_two_layers_have_two_latent_sites():
    torch.manual_seed(0)
    vae = TwoLayerVAE(
        StandardNormal(2),
        Conditional(MLP(2, 6, [4]), MeanField(3)),
        Conditional(MLP(3, 5, [4]), Gaussian(5)),
        Conditional(MLP(5, 6, [4]), MeanField(3)),
        Conditional(MLP(3, 4, [4]), MeanField(2)),
    ).eval()
    using = Using(vae, Schema((5,), "row"))
    x = torch.rand(3, 5)
    z = using.encode(x)
    torch.testing.assert_close(z["z1"], vae.posterior(x).mean, rtol=0, atol=0.3)
    assert z["z2"].shape == (3, 2)
    assert torch.equal(using.encode(x)["z2"], z["z2"])
    torch.testing.assert_close(using.decode(z), vae.likelihood(z["z1"]).mean)
    with pytest.raises(RunError, match=r"z must be z1 of shape \(N, 3\) and z2 of shape \(N, 2\)"):
        using.decode(z["z1"])


def test_a_model_that_is_told_a_condition():
    torch.manual_seed(0)
    vae = ConditionalVAE(
        StandardNormal(2),
        Conditional(MLP(2 + 3, 6, [4]), Gaussian(6)),
        Conditional(MLP(6 + 3, 4, [4]), MeanField(2)),
        condition_dim=3,
    ).eval()
    label = Column("label", "categorical", ("a", "b", "c"))
    using = Using(vae, Schema((2, 3), "sequence", condition=(label,)), lambda line: None)
    x, codes = torch.randn(4, 2, 3), torch.eye(3)[[2, 0, 0, 1]]
    given = np.array(["c", "a", "a", "b"])
    z = using.encode(x, given=given)
    torch.testing.assert_close(z, vae.posterior(torch.cat([x.flatten(1), codes], 1)).mean)
    means = vae.likelihood(torch.cat([z, codes], 1)).mean.reshape(4, 2, 3)
    torch.testing.assert_close(using.decode(z, given), means)
    torch.testing.assert_close(using.reconstruct(x, {"label": given}), means)
    assert using.sample(5, given="b").shape == (5, 2, 3)
    with pytest.raises(RunError, match="give label"):
        using.sample(5)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda run: run.score(DIGITS[:, :4]), "expected images of shape"),
        (lambda run: run.score([1, 2]), "got list"),
        (lambda run: run.encode(DIGITS + 5), "pixels must be in 0..16"),
        (lambda run: run.score(DIGITS[:3], "guess"), "must be one of annealed"),
        (lambda run: run.score(DIGITS[:3], "importance", num_samples=0), "num_samples must be at least 1"),
        (lambda run: run.score(DIGITS[:3], "smc", samples=4), "estimator smc: .*samples"),
        (lambda run: run.score(DIGITS[:3], given=3), "has no condition"),
        (lambda run: run.sample(0), "num_samples must be a whole number of at least 1, got 0"),
        (lambda run: run.sample(2.5), "num_samples must be a whole number of at least 1, got 2.5"),
        (lambda run: run.encode(DIGITS[:3], num_samples=0), "num_samples must be a whole number of at least 1, got 0"),
        (lambda run: run.decode(torch.tensor([[0.0, 1.0], [0.0, torch.nan]])), "z must be finite numbers, row 1 has"),
        (lambda run: run.decode(torch.zeros(2, 5)), r"z must be z of shape \(N, 2\), got \(2, 5\)"),
        (lambda run: run.decode(torch.tensor(2.0)), "one row for each"),
    ],
)
def test_bad_input_is_one_line(run, use, message):
    with pytest.raises(RunError, match=message) as refused:
        use(run)
    assert "\n" not in str(refused.value)


def test_data_outside_the_support_are_named_by_row(linear):
    vae = linear[0]
    from pyro_vae import VAE, Bernoulli

    binary = VAE(
        StandardNormal(2), Conditional(MLP(2, 4, [3]), Bernoulli(4)), Conditional(MLP(4, 4, [3]), MeanField(2))
    )
    x = torch.ones(3, 4)
    x[1, 2] = 0.4
    with pytest.raises(RunError, match="row 1"):
        Using(binary.eval(), Schema((4,), "row")).score(x)
    assert vae.weight.shape == (4, 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Files of digits, in all forms."""
    folder = tmp_path_factory.mktemp("files")
    np.save(folder / "x.npy", DIGITS)
    np.savez(folder / "x.npz", train=DIGITS[:2], test=DIGITS)
    flat = pd.DataFrame(DIGITS.reshape(len(DIGITS), -1))
    flat.to_csv(folder / "bare.csv", header=False, index=False)
    flat.to_csv(folder / "named.csv", index=False)
    (folder / "pictures").mkdir()
    for place, picture in enumerate(WHITE[:3]):
        Image.fromarray(picture).save(folder / "pictures" / f"{place}.png")
    gaps = DIGITS[:4].astype(float)
    gaps[:, :3] = np.nan
    np.save(folder / "gaps.npy", gaps)
    np.save(folder / "text.npy", np.array([["a"]]))
    return folder


def command(name, run, *arguments):
    """What a command makes, in a process of its own for all that matters."""
    return cli.use(name, [str(run.path), *map(str, arguments), "--device=cpu"])


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "bare.csv", "named.csv"])
def test_every_file_is_read_alike(run, files, name):
    done = command("embed", run, files / name, f"--out={files / name}.npy")
    assert np.array_equal(np.load(done.path), run.encode(DIGITS).numpy())


def test_pictures_are_named(run, files):
    done = command("embed", run, files / "pictures", f"--out={files / 'z.csv'}")
    table = pd.read_csv(done.path)
    assert table["row"].tolist() == ["0.png", "1.png", "2.png"]
    np.testing.assert_allclose(table[["z0", "z1"]], run.encode(WHITE[:3] / 255), rtol=1e-5)


def test_white_of_a_picture_is_the_models_and_dark_stays_dark(tmp_path):
    grey = np.array([[0, 16], [128, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    for largest, rule, expected in (
        (16, "dynamic", grey / 255),
        (1, "none", grey / 255),
        (16, "integers", [[0, 1], [8, 16]]),
        (16, "dequantized", [[0, 1], [8, 16]]),
        (255, "integers", grey),
        (65535, "integers", grey * np.int64(257)),
    ):
        x = read_new(tmp_path / "a.png", Schema((1, 2, 2), pixels=Pixels(rule, 0, largest))).x
        np.testing.assert_array_equal(x[0], expected)
    Image.fromarray(np.full((8, 8), 16, np.uint8)).save(tmp_path / "dark.png")  # which are bright digits as numbers
    schema = Schema((1, 8, 8), pixels=Pixels("dynamic", 0, 16))
    assert observations(read_new(tmp_path / "dark.png", schema).x, schema).mean() < 0.2


def test_scores_are_written(run, files, trained, capsys):
    done = command(
        "score", run, files / "x.npy", "--estimator=importance", "--num_samples=20", f"--out={files / 's.nc'}"
    )
    expected = trained[1].log_px.numpy()
    with xr.open_dataset(done.path) as found:
        assert np.array_equal(found["log_px"], expected)
        assert found.attrs["unit"] == "nats per image, mass"
    assert f"{expected.mean():.3f}" in capsys.readouterr().out
    table = command("score", run, files / "pictures", "--estimator=importance", f"--out={files / 's.csv'}").path
    assert list(pd.read_csv(table)["row"]) == ["0.png", "1.png", "2.png"]


def test_samples_and_reconstructions_are_drawn(run, files):
    for name in ("sample", "reconstruct"):
        first = [] if name == "sample" else [files / "x.npy"]
        picture = command(name, run, *first, f"--out={files / name}.png").path
        with Image.open(picture) as image:
            assert min(image.size) > 50
    twice = [command("sample", run, "--num_samples=5", f"--out={files / name}.npy").path for name in ("one", "two")]
    one, two = map(np.load, twice)
    assert one.shape == (5, 1, 8, 8)
    assert np.array_equal(one, two)


def test_imputed_images_keep_what_was_seen(run, files):
    out = files / "filled.npz"
    command("impute", run, files / "gaps.npy", f"--out={out}", "--num_samples=30", "--num_draws=7", "--draws")
    filled = np.load(out)
    assert filled["x"].shape == (4, 1, 8, 8)
    assert not np.isnan(filled["x"]).any()
    assert filled["draws"].shape == (7, 4, 64)
    assert (filled["std"][:, :24] > 0).all()
    assert (filled["std"][:, 24:] == 0).all()


def test_doubts_are_of_the_images_that_have_gaps(run, files):
    x = np.load(files / "gaps.npy")
    np.save(files / "two_of_six.npy", np.concatenate([np.where(np.isnan(x), 0.0, x), x[:2]]))
    done = command("impute", run, files / "two_of_six.npy", f"--out={files / 'six.npy'}", "--num_samples=5")
    assert done.text.startswith("48 entries of 2 images filled in; not to be believed in 2 of these images: more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "RUN"], "--file must be given"),
        (["score", "FILES", "FILES/x.npy"], "holds no finished run"),
        (["score", "RUN", "FILES/nothing.npy"], "there is no such file"),
        (["score", "RUN", "FILES/text.npy"], "array of <U1"),
        (["score", "RUN", "FILES/x.npz", "--array=other"], "Name one by --array: train, test"),
        (["score", "RUN", "FILES/x.npy", "--array=other"], "is no .npz file"),
        (["score", "RUN", "FILES/x.npy", "--out=x.npy"], "expected a file named .csv, .nc or .npz"),
        (["score", "RUN", "FILES/x.npy", "--num_samples=3"], "--num_samples is for --estimator importance"),
        (["score", "RUN", "FILES/x.npy", "--device=gpu"], "--device"),
        (["embed", "RUN", "FILES/x.npy", "--out=FILES/x.npy"], "exists and is never overwritten"),
        (["embed", "RUN", "FILES/x.npy", "--out=FILES/no/z.npy"], "there is no directory"),
        (["embed", "RUN", "FILES/x.npy", "--num_samples=2", "--out=FILES/d.csv"], "draws are no table"),
        (["impute", "RUN", "FILES/x.npy", "--out=FILES/i.npy"], "nothing is missing"),
        (["sample", "RUN", "--given=3", "--out=FILES/g.png"], "has no condition"),
        (["sample", "RUN", "--num_samples=0"], "--num_samples must be at least 1"),
    ],
)
def test_a_bad_command_is_one_line_and_status_2(run, files, arguments, message, capsys):
    words = [each.replace("RUN", str(run.path)).replace("FILES", str(files)) for each in arguments]
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2
    assert message in error
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("name", ["score", "embed", "sample", "reconstruct", "impute"])
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert f"Usage: pyro-vae {name} RUN" in capsys.readouterr().out


def overflowing(path, tmp_path, value):
    """The run with an encoder whose last outputs overflow, where it has finite weights."""
    shutil.copytree(path, tmp_path / "run")
    with safe_open(path / "model.safetensors", "pt") as file:
        weights, about = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    last = max(each for each in weights if each.startswith("posterior") and each.endswith("weight"))
    weights[last][:2] = value  # of the means of z
    about = {name: value for name, value in about.items() if name != "checksum"}  # of weights that it made otherwise
    save_file(weights, tmp_path / "run" / "model.safetensors", about)
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["embed", "score"])
def test_what_is_not_finite_is_counted_and_said(command, trained, tmp_path, capsys):
    """An encoder whose outputs overflow: its weights are finite."""
    path = overflowing(trained[0], tmp_path, 3e38 if command == "embed" else 1e38)
    np.save(tmp_path / "few.npy", DIGITS[:9])
    out = tmp_path / {"embed": "z.npy", "score": "scores.npz"}[command]
    more = ["--estimator=importance", "--num_samples=20"] if command == "score" else []
    done = cli.use(command, [str(path), str(tmp_path / "few.npy"), f"--out={out}", *more])
    told = capsys.readouterr().out
    values = done.result["log_px" if command == "score" else "z"].values
    assert not np.isfinite(values).all()
    assert f"{(~np.isfinite(values)).sum():,} of {values.size:,} numbers are NaN or infinite" in told
    assert " nan" not in told
