"""Finished runs scored again, and estimators of log p(x) compared."""

import json
import math

import numpy as np
import pytest
import torch
import xarray as xr

from experiments import evidence_comparison
from pyro_vae import cli, importance_sampling, runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a single latent dimension, so that its log p(x) is known by quadrature."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    argv = "--dataset Digits --epochs 5 --latent_dim 1 --encoder.hidden [16] --decoder.hidden [16] --device cpu"
    argv = [*argv.split(), "--evidence.num_samples=30", "--evidence.annealed_images=0", f"--run_dir={directory}"]
    return cli.train(argv).path


def exact(run, split, among):
    """log p(x) of some images by the trapezoidal rule over z, by hand."""
    vae, data = runs.load_model(run).double(), runs.load_data(run)
    x = data.test[among] if split == "test" else None
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        log_likelihood = vae.likelihood(z.unsqueeze(1)).log_prob(x.double())
    log_prior = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(log_likelihood + log_prior, 0) + math.log(20 / 4000)


def written(path):
    return json.loads((path / "result.json").read_text())


def evaluated(argv):
    return cli.evaluate(argv).path


@pytest.mark.parametrize(
    "argv",
    [
        ["--estimator=annealed"],
        ["--estimator=annealed", "--published=wu_2017", "--annealing.num_temperatures=50"],
        ["--estimator=importance", "--num_samples=2000"],
        ["--estimator=importance", "--proposal=laplace", "--widening=1.2", "--num_samples=500"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_every_estimator_agrees_with_quadrature(run, argv, capsys):
    name = "".join(c for c in " ".join(argv) if c.isalnum())
    path = evaluated([str(run), *argv, "--num_images=40", f"--name={name}"])
    found = written(path)
    with xr.open_datatree(path / "evidence.nc") as tree:
        group = tree[found["estimator"]]
        among = torch.tensor(group["datum"].values)
        truth = exact(run, "test", among).numpy()
        assert len(set(among.tolist())) == 40 == found["num_images"]
        assert abs(group["log_px"].values.mean() - truth.mean()) < 4 * found["mc_se"] + 0.03
        assert found["log_likelihood"] == pytest.approx(group["log_px"].values.mean())
    assert found["unit"] == "nats per image, mass"
    assert f"{found['log_likelihood']:.3f}" in capsys.readouterr().out
    if "--published=wu_2017" in argv:
        assert (found["annealing"]["start"], found["annealing"]["num_leapfrogs"]) == ("prior", 10)
        assert found["annealing"]["num_temperatures"] == 50


def test_bidirectional_monte_carlo_is_narrow_around_the_truth(run, capsys):
    path = evaluated([str(run), "--estimator=bdmc", "--num_images=60", "--annealing.num_temperatures=20"])
    found = written(path)
    assert found["width"] == pytest.approx(found["upper"] - found["lower"])
    assert abs(found["width"]) < 4 * found["width_se"] + 0.02
    assert "simulated images" in capsys.readouterr().out


def test_training_images_are_the_same_each_time_and_others_than_the_test_images(run):
    data = runs.load_data(run)
    torch.manual_seed(5)
    x, among = runs.some_images(data, "train", 30)
    after = torch.rand(1)
    again, _ = runs.some_images(data, "train", 30)
    assert torch.equal(x, again)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the noise of the estimate does not depend on the choice of images
    assert among.max() < len(data.train_pixels)
    whole, places = runs.some_images(data, "test", None)
    assert torch.equal(whole, data.test)
    assert places.tolist() == list(range(len(data.test)))
    path = evaluated([str(run), "--estimator=importance", "--split=train", "--num_images=30", "--num_samples=50"])
    vae = runs.load_model(run)
    torch.manual_seed(0)
    log_px = importance_sampling(vae.model, vae.guide, x, 50).log_px
    assert written(path)["log_likelihood"] == pytest.approx(log_px.mean().item(), abs=1e-6)


def test_unreliable_weights_are_called_so(run, capsys, monkeypatch):
    for module in ("result", "weights"):
        monkeypatch.setattr(f"pyro_vae.infer.evidence.{module}.pareto_k_threshold", lambda num: -9.0)
    path = evaluated([str(run), "--estimator=importance", "--num_images=10", "--num_samples=100", "--name=bad"])
    assert written(path)["reliable"] is False
    assert "not to be believed: 100% of the images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_images=1"], "--num_images must be at least 2"),
        (["--num_samples=0"], "--num_samples must be at least 1"),
        (["--widening=0"], "--widening must be positive"),
        (["--widening=2"], "--widening is for --proposal laplace"),
        (["--annealing.num_chains=1"], "num_chains must be at least 2, got 1"),
        (["--annealing.start=nowhere"], "--annealing.start"),
        (["--name=a/b"], "--name must be a plain file name"),
        (["--name=.."], "--name must be a plain file name"),
        (["--proposal=laplace"], "--num_samples and --proposal are for --estimator importance, not annealed"),
        (["--estimator=bdmc", "--num_samples=7"], "--num_samples and --proposal are for --estimator importance"),
        (
            ["--estimator=importance", "--published=wu_2017"],
            "--published are for --estimator annealed, bdmc or",
        ),
        (["--published=wu_2017", "--annealing.num_chains=3"], "--published leaves only --annealing.num_temperatures"),
        (["--estimator=bdmc", "--split=train"], "--split train: --estimator bdmc scores images that the model draws"),
        (["--estimator=guess"], "--estimator: expected one of"),
    ],
)
def test_bad_settings_are_refused(run, argv, message):
    with pytest.raises(runs.RunError, match=message):
        cli.evaluate([str(run), *argv])


def test_nothing_is_overwritten_and_no_run_is_refused(run, tmp_path):
    argv = [str(run), "--estimator=importance", "--num_images=5", "--num_samples=5", "--name=once"]
    before = (evaluated(argv) / "result.json").read_bytes()
    with pytest.raises(runs.RunError, match="never overwritten: choose another directory by --name or --run_dir"):
        cli.evaluate(argv)
    assert (run / "evaluations" / "once" / "result.json").read_bytes() == before
    (run / "evaluations" / "half").mkdir()
    (run / "evaluations" / "half" / "evidence.nc").write_text("precious")
    for place in ("--name=half", f"--run_dir={run / 'evaluations' / 'half'}"):
        with pytest.raises(runs.RunError, match=r"half exists and is never overwritten"):
            cli.evaluate([*argv[:-1], place])
    assert (run / "evaluations" / "half" / "evidence.nc").read_text() == "precious"
    with pytest.raises(runs.RunError, match="holds no finished run"):
        cli.evaluate([str(tmp_path)])
    with pytest.raises(runs.RunError, match="--run must be given"):
        cli.evaluate([])


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    argv = "--num_images 12 --guide_samples [1,200] --laplace_samples [50] --guide_temperatures [30,3]"
    evidence_comparison.main([str(run), *argv.split(), "--laplace_temperatures=[4]", f"--run_dir={out}"])
    return out


def test_comparison_of_estimators(run, compared):
    content = written(compared)
    names = [(row["split"], row["estimator"], row["setting"]) for row in content["rows"]]
    assert names[:7] == [
        ("test", "ELBO", 100),
        ("test", "importance, guide", 1),
        ("test", "importance, guide", 200),
        ("test", "importance, Laplace", 50),
        ("test", "annealed, Laplace", 4),
        ("test", "annealed, guide", 3),
        ("test", "annealed, guide", 30),
    ]
    assert [name[1:] for name in names[7:]] == [name[1:] for name in names[:7]]
    truth = exact(run, "test", runs.some(397, 12)).mean().item()
    elbo, _, sampled, *others = content["rows"][:7]
    assert elbo["log_px"] < truth - 0.01
    for row in (sampled, *others):
        assert abs(row["log_px"] - truth) < 4 * row["mc_se"] + 0.01
        assert row["difference"] == pytest.approx(row["log_px"] - others[-1]["log_px"])
    for each in content["sandwiches"]:
        assert each["width"] == pytest.approx(each["upper"] - each["lower"])
    text = (compared / "table.md").read_text()
    assert f"{sampled['log_px']:.3f}" in text
    assert "nan" not in text
    assert (compared / "evidence.png").stat().st_size > 5000


def test_evaluations_are_counted(compared):
    rows = {(row["estimator"], row["setting"]): row for row in written(compared)["rows"][:7]}
    # besides the samples asked for: two checks of the programs, of a batch and of half of it alone, under one sample
    # and under several; and how much memory a sample takes, over 12 images
    overhead = 10 + (64 + 128) / 12
    assert rows["importance, guide", 200]["evaluations"] == pytest.approx(200 + overhead, abs=2)
    # 12 chains and 4 of the warm-up, at the start and for each of 10 leapfrogs of 29 transitions, gradients twice
    chains = 2 * (12 + 4) * (1 + 10 * 29)
    chains += 128  # draws of guide and prior, of which the density must be finite somewhere
    assert rows["annealed, guide", 30]["evaluations"] == pytest.approx(chains, rel=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_images=1"], "--num_images must be at least 2"),
        (["--guide_samples=[0]"], "--guide_samples must all be at least 1"),
        (["--guide_temperatures=[]"], "there must be one, the reference"),
    ],
)
def test_bad_settings_of_the_comparison_are_refused(run, argv, message):
    with pytest.raises(runs.RunError, match=message):
        evidence_comparison.main([str(run), *argv])


def test_the_comparison_is_never_overwritten(run, compared):
    with pytest.raises(runs.RunError, match="never overwritten"):
        evidence_comparison.main([str(run), f"--run_dir={compared}"])
    assert np.isfinite(written(compared)["rows"][0]["log_px"])
