"""The lecture's derivation, against closed forms that are written down here."""

import json
import math

import pytest
import torch

from experiments import derivation
from pyro_vae import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    out = derivation.main(
        [
            "--num_draws=20000",
            "--dims=[1, 10]",
            "--steps=300",
            "--heads=30",
            "--tosses=200",
            f"--run_dir={tmp_path_factory.mktemp('lesson') / 'run'}",
        ]
    )
    for name in ("coin.png", "bound.png", "gradients.png"):
        assert (out / name).stat().st_size > 1000
    return json.loads((out / "result.json").read_text()), (out / "table.md").read_text()


def test_the_coin(lesson):
    coin = lesson[0]["coin"]
    assert coin["trained"] == pytest.approx(0.15, abs=1e-9)
    assert coin["peak"] == pytest.approx(0.15, abs=1e-9)
    assert coin["error"] == pytest.approx(math.sqrt(0.15 * 0.85 / 200), rel=1e-6)


def test_the_identity_holds_and_the_bound_touches(lesson):
    for rows in lesson[0]["decomposition"].values():
        assert len(rows) == 4
        for row in rows:
            whole = row["reconstruction"] - row["kl_prior"] + row["kl_posterior"]
            assert whole == pytest.approx(row["log_px"], abs=1e-8)
            assert row["kl_prior"] > -1e-12
            assert row["kl_posterior"] > -1e-12
            if row["sampled"] is not None:
                elbo = row["reconstruction"] - row["kl_prior"]
                assert row["sampled"] == pytest.approx(elbo, abs=5 * row["sampled_error"] + 1e-9)
        assert rows[0]["kl_prior"] == pytest.approx(0, abs=1e-12)  # q is the prior
        assert rows[-1]["kl_posterior"] == pytest.approx(0, abs=1e-9)
        assert min(row["kl_posterior"] for row in rows[:-1]) > 1e-3
    gaussian = next(iter(lesson[0]["decomposition"].values()))
    assert gaussian[-1]["spread"] < 1e-9 < 0.01 < gaussian[0]["spread"]


def test_gradients(lesson):
    one, ten = lesson[0]["gradients"]
    for each in (one, ten):
        assert each["pathwise_off"] < 3
        assert each["score_off"] < 3
        assert not each["drawn"]
        assert each["ratio"] == pytest.approx((each["score"] / each["pathwise"]) ** 2)
    assert ten["ratio"] > one["ratio"] > 2
    gap = lesson[0]["final_gap"]
    assert 0 <= gap["pathwise"] < 0.2 * gap["score function"]
    assert f"{gap['pathwise']:.3g}" in lesson[1]


def test_the_variance_of_both_gradients_in_one_dimension():
    """x = w z + m + s eps with q = N(0, 1): both gradients are polynomials in one normal draw."""
    torch.manual_seed(3)
    found = derivation.noise(1, 200_000)
    torch.manual_seed(3)
    vae, x = derivation.linear_gaussian_vae(1, 1)
    w, residual, s2 = vae.weight.item(), (x - vae.mean).item(), vae.scale**2
    # log w(z) - constant = (w r z - w^2 z^2 / 2) / s^2, since the prior and q cancel
    a, b = w * residual / s2, w**2 / s2
    # pathwise: d/dmu = a - b z - z, d/dlog sigma = (a - b z - z) z + 1, for z ~ N(0, 1)
    c = b + 1
    pathwise = c**2 + (a**2 + 2 * c**2)
    assert found.signal == pytest.approx(math.hypot(a, -c + 1), rel=1e-9)
    assert found.pathwise**2 == pytest.approx(pathwise, rel=0.03)
    # score: l z and l (z^2 - 1), for l = log w(z) with its constant
    constant = -0.5 * residual**2 / s2 - 0.5 * math.log(2 * math.pi * s2)
    z = torch.randn(2_000_000, dtype=torch.float64)
    log_w = constant + a * z - b * z**2 / 2
    score = (log_w * z).var() + (log_w * (z**2 - 1)).var()
    assert found.score**2 == pytest.approx(score.item(), rel=0.05)


def test_a_seed_reaches_the_trainings(tmp_path):
    gaps = []
    for seed in (1, 2):
        argv = f"--seed={seed} --dims=[2] --steps=13 --num_draws=100 --run_dir={tmp_path / str(seed)}"
        gaps.append(json.loads((derivation.main(argv.split()) / "result.json").read_text())["final_gap"]["pathwise"])
    assert gaps[0] != gaps[1]
    with pytest.raises(runs.RunError, match=r"never overwritten: choose another directory$"):  # it has no --resume
        derivation.main(argv.split())


def test_the_bound_touches_only_at_the_posterior():
    shifts, bounds, log_px = derivation.touch()
    own, factorized = bounds.values()
    assert own[shifts.abs().argmin()].item() == pytest.approx(log_px, abs=1e-9)
    assert (own <= log_px + 1e-9).all()
    assert (factorized < log_px - 0.05).all()
    assert own[0] < log_px - 1


def test_what_is_merely_drawn_would_be_seen_to_have_a_gradient(monkeypatch):
    """The column of the table is measured: a draw that has a gradient after all is reported."""
    monkeypatch.setattr(derivation.dist.Normal, "sample", derivation.dist.Normal.rsample)
    assert derivation.noise(2, 100).drawn


def test_a_training_is_recorded_at_its_steps():
    vae, x = derivation.linear_gaussian_vae(2, 2)
    curve = derivation.train(vae, x, derivation.dist.Normal, 25)
    assert list(curve) == [0, 10, 20, 25]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--heads=0"], "--heads must be from 1 % to 99 % of --tosses, got 0 of 1000"),
        (["--heads=1000"], "--heads must be from 1 % to 99 %"),
        (["--num_draws=5"], "--num_draws must be at least 100"),
        (["--dims=[0]"], "--dims must be different numbers of at least 1"),
        (["--dims=[2, 2]"], "--dims must be different numbers"),
        (["--steps=0"], "--steps must be at least 1"),
    ],
)
def test_bad_settings_are_refused(argv, message):
    with pytest.raises(runs.RunError, match=message):
        derivation.main(argv)
