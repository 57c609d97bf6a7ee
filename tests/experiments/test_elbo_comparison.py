import json

import numpy as np
import pytest
import torch
import yaml

from experiments import elbo_comparison
from experiments.elbo_comparison import CLOSED, CONTENDERS, MEAN_FIELD, SAMPLED, TRACE, TWINS, MeanDifference
from pyro_vae import cli
from pyro_vae.data.fetched import Digits, cache_folder

pytestmark = pytest.mark.slow

TINY = ["--dataset", "Digits", "--seeds", "2", "--epochs", "2", "--gradient_samples", "40", "--timing_steps", "3"]
PARTS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return elbo_comparison.main([*TINY, "--device", "cpu", "--run_dir", str(tmp_path_factory.mktemp("runs") / "tiny")])


@pytest.fixture(scope="module")
def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def data():
    return Digits(cache_folder()).load()


@pytest.fixture(scope="module")
def vae(data):
    return elbo_comparison.initial_vae(data, seed=3).double()


def test_the_run_directory_holds_everything(run_dir, result):
    files = {"config.yaml", "result.json", "table.md", "curves.png", "gradient_variance.png"}
    assert {path.name for path in run_dir.iterdir()} == files
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["seeds"] == 2
    assert {"values", "gradients", "training", "seconds_per_step", "device", "versions", "commit"} <= result.keys()
    table = (run_dir / "table.md").read_text()
    assert table.count("## ") == 6
    assert all(name in table for name in CONTENDERS)
    assert "nan" not in table.lower()


def test_pyro_and_its_twin_give_the_same_value_for_the_same_noise(result):
    for dtype, bound in (("float32", 1e-4), ("float64", 1e-9)):
        values = result["values"][dtype]
        assert values["latents"] == 0
        comparisons = [each for key, each in values.items() if key not in ("elbo", "latents")]
        assert len(comparisons) == 5
        assert max(each["largest"] for each in comparisons) < bound
        assert all(-40 < value < -20 for value in values["elbo"].values())


def test_the_comparison_of_values_sees_another_estimator(vae, data):
    x = data.test[:20].double()
    assert elbo_comparison.image_by_image(vae, x, TRACE, SAMPLED)["largest"] < 1e-9
    assert elbo_comparison.image_by_image(vae, x, TRACE, CLOSED)["mean"] > 0.1


def test_pyro_and_its_twin_follow_the_same_path(result):
    curves = {name: np.array(each) for name, each in result["training"]["validation_elbo_by_seed_and_epoch"].items()}
    for name, twin in TWINS.items():
        assert curves[name].shape == (2, 2)
        np.testing.assert_allclose(curves[name], curves[twin], rtol=1e-4)
        assert result["training"]["largest_distance_of_weights"][name] < 1e-4
    assert np.abs(curves[CLOSED] - curves[SAMPLED]).min() > 0.01
    assert (curves[SAMPLED][:, 1] > curves[SAMPLED][:, 0]).all()
    assert np.ptp(curves[SAMPLED][:, 1]) > 0  # seeds differ


def test_paired_differences_are_those_of_the_test_elbo(result):
    test = {name: np.array(each) for name, each in result["training"]["test_elbo_by_seed"].items()}
    for each in result["training"]["test_difference"]:
        paired = test[each["contender"]] - test[each["minus"]]
        expected = [paired.mean(), abs(paired[0] - paired[1]) / 2]  # of two numbers
        assert each["difference"] == pytest.approx(expected, rel=1e-9)


def test_closed_form_kl_lowers_the_variance_of_the_encoder_gradient_alone(result):
    for each in result["gradients"].values():
        for name in (CLOSED, MEAN_FIELD):
            value, error = each["encoder"]["variance_ratio"][name]
            assert 0 < value < 1 - 5 * error
            assert each["decoder"]["variance_ratio"][name][0] == pytest.approx(1, rel=1e-4)
        for part in PARTS:
            assert max(each[part]["largest_relative_difference"].values()) < 1e-5
        for apart, chance in each["mean_difference"].values():
            assert abs(apart - 1) < 4 * chance


def test_gradient_statistics_against_textbook_formulas(vae, data):
    x, num_samples = data.test[:30].double(), 60
    result = elbo_comparison.compare_gradients(vae, x, num_samples, "in a test")
    parts = {"encoder": list(vae.posterior.parameters()), "decoder": list(vae.likelihood.parameters())}
    draws = [elbo_comparison.gradient(CONTENDERS[SAMPLED], vae, x, parts, i) for i in range(num_samples)]
    for part in PARTS:
        grads = torch.stack([draw[part] for draw in draws])
        variance, mean = grads.var(0).sum().item(), grads.mean(0)
        norm = (mean.square().sum().item() - variance / num_samples) ** 0.5
        assert result[part]["norm"][SAMPLED] == pytest.approx(norm, rel=0.1)
        value, error = result[part]["noise_to_signal"][SAMPLED]
        assert abs(value - variance / norm**2) < 3 * error


def test_the_gradient_is_that_of_the_mean_elbo(vae, data):
    x = data.test[:4].double()
    parts = {"decoder": [vae.likelihood.network.layers[-1].bias]}
    for contender in CONTENDERS.values():
        grad = elbo_comparison.gradient(contender, vae, x, parts, 0)["decoder"][0].item()
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad(), elbo_comparison.noise(elbo_comparison.GRADIENT_NOISE, x.device):
                parts["decoder"][0][0] += step
                losses.append(contender.loss(vae, x).item() / 4)
                parts["decoder"][0][0] -= step
        assert grad == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_mean_difference_is_one_standard_error_by_chance():
    statistics = []
    for _ in range(300):
        difference = MeanDifference()
        for pair in torch.randn(20, 2, 50):
            difference.add(*pair)
        statistics.append(difference.in_standard_errors())
    apart, chance = np.array(statistics).T
    assert apart.mean() == pytest.approx(1, abs=0.02)
    assert chance.mean() == pytest.approx(apart.std(), rel=0.15)
    assert chance.mean() == pytest.approx(0.5 * (2 / 50) ** 0.5, rel=0.15)


def test_mean_difference_sees_a_shift():
    difference = MeanDifference()
    for pair in torch.randn(100, 2, 50) + 0.5:
        difference.add(*pair)
    apart, chance = difference.in_standard_errors()
    assert apart == pytest.approx((1 + 200 * 0.25) ** 0.5, rel=0.1)
    assert apart > 1 + 10 * chance


def test_ratio_has_the_error_of_repeated_experiments():
    rng = np.random.default_rng(0)
    below = rng.normal(5, 1, (2000, 100))
    above = 0.5 * below + rng.normal(0, 1, below.shape)
    values, errors = np.array([elbo_comparison.ratio(a, b) for a, b in zip(above, below, strict=True)]).T
    assert values.mean() == pytest.approx(0.5, abs=0.005)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_noise_leaves_the_outer_random_numbers_alone():
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with elbo_comparison.noise(1, cpu):
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    with elbo_comparison.noise(1, cpu):
        assert torch.equal(torch.rand(3), first)


def test_times_are_positive_and_relative_to_the_sampled_kl_by_hand(result):
    times = result["seconds_per_step"]
    assert len(times) == 6
    assert times[SAMPLED]["ratio"] == 1
    for each in times.values():
        assert 0 < each["lower_quartile"] <= each["median"] <= each["upper_quartile"]
        assert each["ratio"] == pytest.approx(each["median"] / times[SAMPLED]["median"])


def test_one_seed_has_no_error(tmp_path):
    options = ["--seeds", "1", "--epochs", "1", "--gradient_samples", "4", "--timing_steps", "2"]
    run_dir = elbo_comparison.main(["--dataset", "Digits", *options, "--run_dir", str(tmp_path / "one")])
    result = json.loads((run_dir / "result.json").read_text())
    assert result["training"]["test_elbo"][SAMPLED][1] is None
    assert "nan" not in (run_dir / "table.md").read_text().lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--gradient_samples", "5"], "--gradient_samples must be even, got 5"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--dataset.binarization", "none"], "binarize the data"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(options, message, tmp_path, capsys):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.guarded(lambda: elbo_comparison.main(["--dataset", "Digits", *options, "--run_dir", str(run_dir)]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not run_dir.exists()


def test_divergence_stops_with_the_contender_and_the_cure(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.guarded(lambda: elbo_comparison.main([*TINY, "--lr", "1e6", "--run_dir", str(tmp_path / "run")]))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {TRACE}: ")
    assert "a smaller --lr may help" in last
