"""experiments.evidence_benchmark: its references against other computations, its own certificates, and runs of it."""

import csv
import json
import math
import shutil

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, special, stats

from experiments.evidence_benchmark import __main__ as benchmark
from experiments.evidence_benchmark import certified, certify, estimators, exact, frozen, integrals
from experiments.evidence_benchmark.task import Task, double
from experiments.evidence_benchmark.tasks import TASKS, tasks
from pyro_vae import ContractError, cli, importance_sampling, runs
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import call, select

SMALL = ["absolute_value", "gamma_poisson", "squares_2d", "mixture_of_forty_2d", "digits_2d"]
PLANAR = [name for name in TASKS if name.startswith("planar_")]


def log_mean(log_w):
    """log of the mean of weights ``(K, B)``, and its error."""
    mean = log_w.logsumexp(0) - math.log(len(log_w))
    return mean, (log_w - mean).exp().std(0) / len(log_w) ** 0.5


# ---- references


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL + PLANAR)
def test_the_mean_likelihood_of_prior_draws_is_the_reference(name):
    task = TASKS[name]()
    data, size = select(task.data, slice(4)), 40_000
    with torch.no_grad(), pyro.plate("particles", size, dim=-2):
        trace = poutine.trace(task.model).get_trace(data)
    trace.compute_log_prob()
    found, error = log_mean(trace.nodes["x"]["log_prob"].double())
    assert error.max() < 0.5
    assert ((found - task.reference[:4]).abs() < 4.5 * error + task.error[:4]).all()


def test_eight_schools():
    task = exact.eight_schools()
    y, sigma = (each[0].numpy() for each in task.data)

    def density(tau):
        covariance = np.diag(sigma**2 + tau**2) + 25
        return stats.halfcauchy.pdf(tau, scale=5) * stats.multivariate_normal(cov=covariance).pdf(y)

    parts = [integrate.quad(density, low, high)[0] for low, high in ((0, 10), (10, 100), (100, np.inf))]
    assert task.reference.item() == pytest.approx(math.log(sum(parts)), abs=1e-7)


def test_the_funnel():
    task = exact.funnel()
    for x, reference in zip(task.data.numpy(), task.reference.tolist(), strict=True):

        def density(v, x=x):
            return stats.norm.pdf(v, 0, 3) * np.exp(stats.norm.logpdf(x, 0, np.sqrt(np.exp(v) + 0.25)).sum())

        value = integrate.quad(density, -40, 20, points=[-3, 0, 3], limit=200, epsabs=0, epsrel=1e-10)[0]
        assert reference == pytest.approx(math.log(value), abs=1e-6)


def test_separable_and_collapsed_and_normal_programs():
    one = integrate.quad(lambda z: stats.norm.pdf(z) * special.expit(6 * z - 1), -12, 12, epsabs=1e-13)[0]
    task = exact.separable_bernoulli(20)
    expected = (task.data * math.log(one) + (1 - task.data) * math.log1p(-one)).sum(-1)
    torch.testing.assert_close(task.reference, expected, rtol=0, atol=1e-8)
    for dim, task in ((3, exact.collapsed("a", 1.0, 3, 0.5)), (5, exact.collapsed("b", 2.0, 5, 1.0))):
        inside = poutine.trace(poutine.condition(task.model, {"z": torch.zeros(8, dim).double()})).get_trace(task.data)
        inside.compute_log_prob()
        torch.testing.assert_close(inside.nodes["x"]["log_prob"], task.reference)  # no matter which z
    task = exact.far_guide()
    evidence = importance_sampling(task.model, task.guide, task.data, 5000, "laplace", compiled=False)
    torch.testing.assert_close(
        evidence.log_px, task.reference, rtol=0, atol=1e-4
    )  # a normal posterior is found exactly


def kalman(y, seen, step, noise):
    """log p(y) of a walk of 30 steps, of which some are seen, by a Kalman filter; of arrays of scales too."""
    mean, variance, total, values = 0.0, 0.0, 0.0, iter(y)
    for t in range(30):
        variance += step**2
        if t in seen:
            value, spread = next(values), variance + noise**2
            total += stats.norm.logpdf(value, mean, np.sqrt(spread))
            gain = variance / spread
            mean, variance = mean + gain * (value - mean), variance * (1 - gain)
    return total


def test_brownian_motion():
    task = exact.brownian_motion()
    seen = {*range(10), *range(20, 30)}
    expected = [kalman(y, seen, 0.1, 0.15) for y in task.data.tolist()]
    np.testing.assert_allclose(task.reference, expected, rtol=0, atol=1e-8)
    trace = poutine.trace(poutine.condition(task.model, {"z": torch.zeros(8, 30).double()})).get_trace(task.data)
    trace.compute_log_prob()
    density = stats.norm.logpdf(0, 0, 0.1) * 30 + stats.norm.logpdf(task.data.numpy(), 0, 0.15).sum(-1)
    np.testing.assert_allclose(
        trace.nodes["z"]["log_prob"] + trace.nodes["x" if "x" in trace else "y"]["log_prob"], density
    )


@pytest.mark.slow
def test_brownian_motion_of_unknown_scales():
    task = exact.brownian_motion_of_unknown_scales()
    y, seen = task.data[0].tolist(), {*range(10), *range(20, 30)}
    grid = np.linspace(-8, 1, 37)  # a trapezoidal rule of smooth functions that decay
    step, noise = np.meshgrid(grid, grid)
    terms = (
        kalman(y, seen, np.exp(step), np.exp(noise)) + stats.norm.logpdf(step, 0, 2) + stats.norm.logpdf(noise, 0, 2)
    )
    assert task.reference[0].item() == pytest.approx(special.logsumexp(terms) + 2 * math.log(0.25), abs=2e-3)


def test_mixture_of_forty_in_ten_dimensions():
    task = exact.mixture_of_forty(10)
    z = torch.randn(3, 1, 10).double()
    centres = np.random.RandomState(40).uniform(-40, 40, (40, 10))
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(poutine.condition(task.model, {"z": z.expand(3, 8, 10)})).get_trace(task.data)
    trace.compute_log_prob()
    each = stats.norm.logpdf(task.data.numpy()[None, :, None], z.numpy()[:, :, None] + centres).sum(-1)
    np.testing.assert_allclose(trace.nodes["x"]["log_prob"], special.logsumexp(each, -1) - math.log(40))
    each = stats.norm.logpdf(task.data.numpy()[:, None], centres, math.sqrt(401)).sum(-1)
    np.testing.assert_allclose(task.reference, special.logsumexp(each, -1) - math.log(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic_wine", "logistic_breast_cancer", "cox_process_8x8", "cox_process_10x10"])
def test_stored_references_agree_with_a_laplace_proposal(name):
    task = TASKS[name]()
    assert task.error.max() < 0.03
    found = importance_sampling(task.model, task.guide, task.data, 3000, "laplace", 1.1, df=10, compiled=False)
    assert found.mc_se.item() < 0.1
    assert abs(found.log_px - task.reference).item() < 4 * found.mc_se.item() + task.error.item()


@pytest.mark.slow
def test_the_frozen_vae_of_ten_dimensions():
    task = TASKS["digits_10d"]()
    assert task.error.max() < 0.05
    data = select(task.data, slice(10))
    found = importance_sampling(task.model, task.guide, data, 2000, "laplace", 1.1, df=10, compiled=False)
    difference = (found.log_px - task.reference[:10]).abs()
    assert (difference < 4.5 * found.mc_se + task.error[:10] + 1e-3)[found.khat < 0.7].all()
    assert (found.khat < 0.7).double().mean() > 0.5


@pytest.mark.slow
def test_stochastic_volatility():
    task = TASKS["stochastic_volatility"]()
    assert task.error.max() < 0.02
    again, error = log_mean(torch.stack([certified.log_px_by_particles(task.data, 2000) for _ in range(20)]))
    assert ((again - task.reference).abs() < 4.5 * error + task.error).all()
    h = torch.randn(8, 30).double()
    trace = poutine.trace(poutine.condition(task.model, {"h": h})).get_trace(task.data)
    trace.compute_log_prob()
    prior = stats.norm.logpdf(h[:, 0], 0, 0.3 / math.sqrt(1 - 0.95**2))
    prior = prior + stats.norm.logpdf(h[:, 1:], 0.95 * h[:, :-1], 0.3).sum(-1)
    np.testing.assert_allclose(trace.nodes["h"]["log_prob"], prior)
    density = stats.norm.logpdf(task.data.numpy(), 0, np.exp(h.numpy() / 2)).sum(-1)
    np.testing.assert_allclose(trace.nodes["x"]["log_prob"], density)


@pytest.mark.slow
def test_every_task_has_its_name_and_can_be_scored():
    for name in TASKS:
        (task,) = tasks([name])
        assert task.name == name
        assert task.error.max() < 0.05, name
        latents = Latents(task.model, task.guide, task.data)
        for draws in (latents.sample_prior(2), latents.sample_guide(2)):
            assert draws.isfinite().all(), name
        call(task.guide, task.data)


def test_a_task_without_a_number_is_refused():
    task = exact.absolute_value()
    for reference in (task.reference[:2], task.reference * math.nan):
        with pytest.raises(ValueError, match="task absolute_value: reference must be 6 finite numbers"):
            Task(task.name, task.model, task.guide, task.data, reference, task.error, task.source)


# ---- integrals and certificates


def test_integrals():
    edges = integrals.panels(-3.2, 3.2, 16)

    def normals(z):
        loc = double([0.0, 1.5])
        return torch.distributions.Normal(loc, 0.4).log_prob(z.unsqueeze(-1)).sum(-2)

    for dim in (1, 2):
        found, error = integrals.log_integral(integrals.over_reals(normals), *[edges] * dim)
        assert found.abs().max() < 1e-9
        assert error.max() < 1e-6
    cauchy = integrals.over_reals(lambda z: torch.distributions.Cauchy(0.0, 1.0).log_prob(z))
    assert integrals.log_integral(cauchy, integrals.panels(-20, 20, 40))[0].item() == pytest.approx(0, abs=1e-7)
    _, error = integrals.log_integral(lambda z: -0.5 * (50 * z).square(), [-1.0, 1.0], nodes=6)
    assert error > 0.1  # told where nodes are too few


def test_kernels_are_densities():
    draws = torch.randn(500, 2, 3).double() @ torch.tensor([[1.0, 0, 0], [0.5, 2.0, 0], [0, 0, 0.3]]).double()
    at = torch.randn(7, 2, 3).double()
    for df, density in ((None, stats.multivariate_normal), (10.0, stats.multivariate_t)):
        kernels = certify.Kernels(draws, 1, 1.1, df)
        for b in range(2):
            shape = 1.1**2 * np.cov(draws[:, b].T.numpy())
            scipy_kernel = density(draws[:, b].mean(0).numpy(), shape, **({"df": df} if df else {}))
            np.testing.assert_allclose(kernels.log_prob(at)[:, b], scipy_kernel.logpdf(at[:, b].numpy()))
    mixture = certify.Kernels(draws, 20, 0.7, 10.0)
    sample = mixture.sample(20_000)
    wide = certify.Kernels(draws, 1, 1.5, 5.0)
    mean, error = log_mean(wide.log_prob(sample) - mixture.log_prob(sample))
    assert (mean.abs() < 5 * error).all()
    torch.testing.assert_close(sample.std(0) / draws.std(0), torch.ones(2, 3).double() * 1.05, rtol=0.15, atol=0)


@pytest.mark.slow
def test_a_sandwich_encloses_what_is_known():
    task = exact.squares(2)
    among = select(task.data, slice(3))
    plan = certify.Plan(
        lambda: ((task.model, task.guide), among),
        num_kernels=40,
        width=0.5,
        num_particles=400,
        num_rounds=10,
    )
    low, high, low_error, high_error = certify.sandwich(plan, num_more=4)
    assert ((low - task.reference[:3]).abs() < 4.5 * low_error).all()
    assert ((high - task.reference[:3]).abs() < 4.5 * high_error).all()
    assert low_error.max() < 0.05


def test_another_vae_is_refused_in_one_line(tmp_path):
    with pytest.raises(runs.RunError, match="No such file") as caught:
        frozen.frozen(2, tmp_path)
    path = tmp_path / "digits_2d.safetensors"
    shutil.copy(frozen.HERE / path.name, path)
    assert frozen.frozen(2, tmp_path)[1].shape == (50, 64)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(runs.RunError, match="is not the VAE whose log p") as caught:
        frozen.frozen(2, tmp_path)
    assert "\n" not in str(caught.value)


# ---- the experiment


def test_the_numbers_of_a_row():
    rows = [
        {
            "reference": -1.0,
            "reference_error": 0.0,
            "log_px": -1.5,
            "mc_se": 0.1,
            "reliable": True,
            "evaluations": 10.0,
        },
        {
            "reference": -1.0,
            "reference_error": 0.0,
            "log_px": -1.5,
            "mc_se": 0.1,
            "reliable": False,
            "evaluations": 30.0,
        },
        {
            "reference": -1.0,
            "reference_error": 0.2,
            "log_px": -1.5,
            "mc_se": 0.2,
            "reliable": True,
            "evaluations": 20.0,
        },
        {
            "reference": -1.0,
            "reference_error": 0.0,
            "log_px": math.nan,
            "mc_se": 0.2,
            "reliable": True,
            "evaluations": 20.0,
        },
    ]
    found = benchmark.summary(rows[:3])
    assert found["evaluations"] == 20
    assert found["bias"] == pytest.approx(-0.5)
    assert found["error"] == pytest.approx(0.5)
    assert found["stated_error"] == pytest.approx(math.sqrt(0.02))
    assert found["covered"] == pytest.approx(1 / 3)
    assert found["unreliable"] == pytest.approx(1 / 3)
    assert found["silently_wrong"] == pytest.approx(1 / 3)
    assert benchmark.summary(rows[3:])["silently_wrong"] == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    argv = (
        "--tasks [absolute_value,eight_schools] --estimators [importance_guide,quadrature,ais_wu] --budgets [200,2000]"
    )
    out = tmp_path_factory.mktemp("benchmark") / "run"
    return benchmark.main([*argv.split(), "--num_estimates=5", "--max_runs=2", f"--run_dir={out}"])


@pytest.mark.slow
def test_a_run_of_two_tasks(written):
    names = {"benchmark.csv", "benchmark.png", "config.yaml", "estimates.csv", "result.json", "table.md"}
    assert {path.name for path in written.iterdir()} == names
    result = json.loads((written / "result.json").read_text())
    assert len(result["rows"]) == 12
    rows = {(row["task"], row["estimator"], row["budget"]): row for row in result["rows"]}
    wrong = rows["absolute_value", "importance_guide", 2000]
    assert wrong["silently_wrong"] > 0 or wrong["unreliable"] > 0  # one of two modes, in four of five data
    assert wrong["error"] > 0.3
    assert wrong["num_estimates"] == 5
    assert rows["eight_schools", "importance_guide", 200]["num_estimates"] == 2
    assert rows["absolute_value", "quadrature", 2000]["error"] < 1e-3
    assert rows["absolute_value", "quadrature", 2000]["silently_wrong"] == 0
    assert "latent dimensions" in rows["eight_schools", "quadrature", 200]["refusal"]
    with (written / "estimates.csv").open() as file:
        estimates = list(csv.DictReader(file))
    assert len(estimates) == 5 * 5 + 2 * 3
    assert "at least 640 evaluations" in rows["eight_schools", "ais_wu", 200]["refusal"]
    chosen = [each for each in estimates if (each["task"], each["estimator"]) == ("absolute_value", "ais_wu")][-5:]
    bias = np.mean([float(each["log_px"]) - float(each["reference"]) for each in chosen])
    assert rows["absolute_value", "ais_wu", 2000]["bias"] == pytest.approx(bias)
    text = (written / "table.md").read_text()
    assert "## A budget of 2,000 evaluations" in text
    assert f"{wrong['error']:.3f}" in text
    assert [task["source"] for task in result["tasks"]] == ["closed form", "quadrature over tau"]


@pytest.mark.slow
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_every_estimator_says_what_it_cost_and_whether_to_believe_it(name):
    task = benchmark.some(exact.squares(2), 2)
    first, again = (estimators.run(task, name, 12_000, seed=3) for _ in range(2))
    assert first.log_px.shape == first.reliable.shape == first.evaluations.shape == (2,)
    assert first.reliable.dtype == torch.bool
    assert (first.evaluations >= 1000).all()
    torch.testing.assert_close(first.log_px, again.log_px)


def test_a_budget_that_is_too_small_is_refused():
    task = exact.absolute_value()
    for name, least in {"ais_cremer": "4,000", "bridge": "4,000", "thermodynamic": "12,000"}.items():
        with pytest.raises(ContractError, match=f"at least {least} evaluations, and the budget is 1,000"):
            estimators.run(task, name, 1000)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=[none]"], "--tasks: there is no none; choose from absolute_value, "),
        (["--tasks=[]"], "--tasks must name at least one"),
        (["--estimators=[bridges]"], "--estimators: there is no bridges; choose from "),
        (["--budgets=[10]"], "--budgets must all be at least 100, got [10]"),
        (["--budgets=[]"], "--budgets must all be at least 100"),
        (["--num_estimates=0"], "--num_estimates must be at least 1"),
        (["--max_runs=0"], "--max_runs must be at least 1"),
        (["--seed=-1"], "--seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.guarded(lambda: benchmark.main([*argv, f"--run_dir={tmp_path / 'out'}"]))
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_is_overwritten(written):
    with pytest.raises(runs.RunError, match="never overwritten"):
        benchmark.main(["--tasks=[absolute_value]", f"--run_dir={written}"])
