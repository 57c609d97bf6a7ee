"""Published tables: the recipes are the papers', the arithmetic of a difference, and a small table from end to end."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import bound_study
from experiments.published import __main__ as published
from experiments.published.parts import AdamNormGrad, ClippedBernoulli, ClippedGaussian
from experiments.published.plan import Budget, Plan, in_turn, plan_table
from experiments.published.report import against, check_common, check_is_of
from experiments.published.rows import IWAE, TABLES, VAMPPRIOR, Row, Schedule, Table
from pyro_vae import runs

ROWS = {row.name: row for table in TABLES.values() for row in table.rows}


def settings_of(name, schedule, epochs):
    table = IWAE if ROWS[name] in IWAE.rows else VAMPPRIOR
    argv = ROWS[name].arguments(table.schedules[schedule], epochs).split()
    return runs.parse(runs.Settings, argv)[0]


def test_rows_are_those_of_the_tables():
    assert len(IWAE.rows) == 20
    assert len(VAMPPRIOR.rows) == 4
    assert len(ROWS) == 24
    for name, each in bound_study.PUBLISHED.items():  # an independent copy
        layers, bound, k = name.split(", ")
        row = ROWS[f"mnist-{layers[0]}-{bound.lower()}-k{k[2:]}"]
        assert (row.published, row.units) == (each.log_likelihood, each.active_units)
    assert ROWS["omniglot-2-iwae-k50"].published == -103.38
    assert ROWS["vamp-dynamic-vamp"].published == -82.38


def test_iwae_recipe_is_the_papers():
    paper = IWAE.schedules["paper"]
    run = settings_of("mnist-2-iwae-k50", "paper", paper.epochs)
    assert (run.model, run.latent_dim, run.top.latent_dim, run.top.hidden) == ("TwoLayerVAE", 100, 50, (100, 100))
    for network in (run.encoder, run.decoder):
        assert network.keywords == {"hidden": [200, 200], "activation": "tanh", "image_shape": None}
    assert run.objective().num_particles == 50
    assert type(run.objective()).__name__ == "IWAE"
    assert (run.batch_size, run.schedule, run.lr, run.epochs) == (20, "stages", 1e-3, 3280)
    assert sum(3**i for i in range(8)) == paper.epochs
    made = run.optimizer([torch.zeros(1, requires_grad=True)], lr=run.lr)
    assert made.defaults["betas"] == (0.9, 0.999)
    assert made.defaults["eps"] == pytest.approx(1e-4 / 20)  # of means over the batch; theirs are sums
    assert ROWS["mnist-1-vae-k1"].steps(paper) * paper.epochs == 9_774_400  # the code's 59,600 images
    assert ROWS["omniglot-1-vae-k1"].num_train == 24_345 - 1345
    assert settings_of("mnist-1-vae-k5", "short", 7).latent_dim == 50
    short = settings_of("mnist-1-vae-k5", "short", 20).objective()
    assert (type(short).__name__, short.num_particles, short.beta, short.warmup) == ("BetaELBO", 5, 1.0, 2 * 239)
    bound = settings_of("mnist-1-iwae-k5", "short", 20).objective()  # which has no KL divergence to be warmed up
    assert (type(bound.first).__name__, bound.first.warmup, bound.steps) == ("BetaELBO", 2 * 239, 2 * 239)
    assert (type(bound.then).__name__, bound.then.num_particles) == ("IWAE", 5)
    for row in IWAE.rows[1:6:2]:
        check_common(row, IWAE.schedules["short"])


def test_vampprior_recipe_is_the_papers():
    paper = VAMPPRIOR.schedules["paper"]
    run = settings_of("vamp-static-vamp", "paper", 2000)
    assert (run.latent_dim, run.batch_size, run.lr, run.schedule, run.weights) == (40, 100, 5e-4, "constant", "best")
    assert [part.func.__name__ for part in (run.encoder, run.decoder)] == ["GatedMLP"] * 2
    assert run.prior.keywords["components"] == 500
    objective = run.objective()
    assert (objective.beta, objective.warmup) == (1.0, 100 * ROWS["vamp-static-vamp"].steps(paper))
    assert ROWS["vamp-static-vamp"].steps(paper) == 500
    assert isinstance(run.optimizer([torch.zeros(1, requires_grad=True)]), AdamNormGrad)
    assert isinstance(run.posterior(3), ClippedGaussian)
    assert isinstance(run.likelihood(3), ClippedBernoulli)
    short = settings_of("vamp-dynamic-normal", "short", 40).objective()
    assert short.warmup == 4 * 500


def test_numbers_are_limited_as_in_the_authors_code():
    far = ClippedBernoulli(2)(torch.tensor([-99.0, 99.0]))
    assert far.log_prob(torch.ones(2)).item() == pytest.approx(math.log(1e-5) + math.log(1 - 1e-5), abs=1e-3)
    near = ClippedBernoulli(1)(torch.tensor([0.3])).log_prob(torch.ones(1)).exp()
    assert near.item() == pytest.approx(1 / (1 + math.exp(-0.3)))
    scale = ClippedGaussian(3)(torch.zeros(3), torch.tensor([-20.0, 0.5, 20.0])).stddev
    torch.testing.assert_close(scale, torch.tensor([-3.0, 0.25, 1.0]).exp())


def test_adam_on_normalized_gradients():
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    first, second = AdamNormGrad([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for gradient in (torch.tensor([3.0, 4.0]), torch.tensor([-500.0, 1200.0])):
        ours.grad, theirs.grad = gradient.clone(), gradient / gradient.norm()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_the_interval_covers_one_more_run():
    one = against(-86.76, [-87.0], mc_se=0.03, redraw_se=0.04)
    assert one.difference == pytest.approx(-0.24)
    assert not one.seeds
    assert one.half_width == pytest.approx(1.959964 * math.sqrt(2 * 0.03**2 + 2 * 0.04**2))
    some = against(-86.76, [-87.0], mc_se=0.03, redraw_se=0.04, others_se=0.5)
    assert some.half_width == pytest.approx(1.959964 * math.sqrt(2 * 0.03**2 + 2 * 0.04**2 + 0.5**2))
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(1000):  # seeds differ by 0.1, draws of the test images by 0.05
        ours = rng.normal(-87, 0.1, 3) + rng.normal(0, 0.05)
        there = rng.normal(-87, 0.1) + rng.normal(0, 0.05)
        found = against(there, list(ours), 0.0, 0.05)
        inside.append(abs(found.difference) < found.half_width)
    assert 0.93 < np.mean(inside) < 0.98


def test_budgets_and_plans():
    assert Budget(None, 0.2, None).allows(7.2) == 100
    assert Budget(None, 0.2, 40).allows(7.2) == 40
    assert Budget(None, 0.001, None).allows(7.2) == 1
    assert Budget(13, None, 3280).allows(7.2) == 13
    assert Budget(None, None, 3280).allows(7.2) == 3280
    plan = Plan(epochs=90, steps=596, step=0.01, epoch=20.0, scoring=1800.0)
    text = plan_table({"a": plan, "b": plan}, seeds=3, workers=2)
    assert "| a   |     10.00 |            596 |     90 |              0.50 |              0.50 |" in text
    assert "about 3.00 hours" in text  # 3 seeds of two rows of an hour, two at a time


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tables=[vamp]"], r"--tables: expected some of iwae, vampprior, got \['vamp'\]"),
        (["--rows=[mnist-3-*]"], "--rows mnist-3-.: there is no such row, only mnist-1-vae-k1"),
        (["--epochs=3", "--hours=1"], "--epochs and --hours are two budgets"),
        (["--finished.caltech=/nowhere"], "--finished.caltech: there is no such row"),
        (["--hours=0"], "--hours must be positive"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(argv, message, tmp_path):
    with pytest.raises(runs.RunError, match=message):
        published.main([*argv, f"--run_dir={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()


SMALL = "--latent_dim 3 --encoder.hidden [8] --decoder.hidden [8]"
DIGITS = Table(
    "A table of digits",
    [
        Row("digits", -20.0, "3", "Digits", "dynamic", None, 1200, 397, "--dataset Digits", SMALL, "--objective IWAE"),
    ],
    ("digits",),
    {"short": Schedule(200, "--schedule one_cycle --lr 1e-2", None, 0.0, ("Nobody has published it.",))},
    ("Digits are small.",),
)
EVIDENCE = [
    *("--evidence.num_samples=30", "--evidence.annealed_images=20", "--evidence.annealing.num_temperatures=2"),
    "--evidence.annealing.num_checked=0",
]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"binarization": "static"}, "was scored on data whose binarization is static, not dynamic: its log p"),
        ({"data": "0123"}, "was scored on images whose fingerprint is 0123, not"),
        ({"dataset": "Omniglot"}, "was scored on data whose dataset is Omniglot, not MNIST"),
    ],
)
def test_runs_of_other_data_are_refused(other, message):
    row = ROWS["mnist-1-vae-k1"]
    result = {"dataset": "MNIST", "binarization": "dynamic", "data": row.fingerprint} | other
    with pytest.raises(runs.RunError, match=message):
        check_is_of(row, runs.Run(Path("somewhere"), result, {}))


@pytest.mark.parametrize("more", ["--dataset.binarization static", "--objective IWAE"])
def test_what_makes_a_row_is_not_to_be_changed(more, tmp_path):
    with pytest.raises(runs.RunError, match=f"--common: {more.split()[0]}"):
        published.main(["--rows=[mnist-1-vae-k5]", f"--common={more}", f"--run_dir={tmp_path / 'none'}"])


def test_the_rest_may_be_changed():
    settings = published.Settings(common="--batch_size 250 --precision bfloat16 --lr 1e-2")
    schedule = published._schedule(settings, VAMPPRIOR)
    row = ROWS["vamp-dynamic-normal"]
    check_common(row, schedule)
    run = runs.parse(runs.Settings, row.arguments(schedule, 40).split())[0]
    assert (run.batch_size, run.precision, run.lr) == (250, "bfloat16", 1e-2)
    assert run.objective().warmup == 4 * 200


def test_bounds_take_turns():
    schedule = IWAE.schedules["turns"]
    run = settings_of("mnist-1-iwae-k50", "turns", 20)
    objective = run.objective()
    assert [type(each).__name__ for each in (objective.first, objective.then)] == ["BetaELBO", "IWAE"]
    assert (objective.first.warmup, objective.then.num_particles) == (2 * 239, 50)
    assert objective.steps == 16 * 239
    check_common(ROWS["mnist-1-iwae-k50"], schedule)  # the bound of the row is the last one
    assert "InTurn" not in ROWS["mnist-1-vae-k1"].arguments(schedule, 20)
    cheap, dear = (Plan(1, 596, step, 600 * step, 60.0) for step in (0.01, 0.1))
    found = in_turn(cheap, dear, 0.8, Budget(None, 1.0, None))
    assert found.epoch == pytest.approx(0.8 * 6 + 0.2 * 60)
    assert found.epochs == int(3600 / 16.8)


@pytest.mark.slow
def test_a_small_table_from_end_to_end(tmp_path, capsys):
    main, run_dir = partial(published.main, tables={"digits": DIGITS}), tmp_path / "table"
    argv = ["--tables=[digits]", *EVIDENCE, "--device=cpu"]
    assert main([*argv, "--epochs=2", f"--run_dir={run_dir}"]) == run_dir
    (line,) = json.loads((run_dir / "result.json").read_text())["rows"]
    found = runs.load(run_dir / "digits-seed0").result
    assert line["ours"] == found["test_log_likelihood"]
    assert line["difference"] == pytest.approx(line["ours"] + 20)
    assert line["redraw_se"] > 0
    assert line["epochs"] == 2
    text = (run_dir / "table.md").read_text()
    assert "Nobody has published it." in text
    assert f" {line['difference']:+.2f} |" in text
    assert (run_dir / "published.png").exists()
    capsys.readouterr()

    again = [*argv, f"--finished.digits={run_dir / 'digits-seed0'}", f"--run_dir={tmp_path / 'again'}"]
    assert json.loads((main(again) / "result.json").read_text())["rows"][0]["ours"] == line["ours"]
    assert "timing" not in capsys.readouterr().out
    deep = [Row(**{**vars(DIGITS.rows[0]), "model": SMALL.replace("dim 3", "dim 4")})]
    with pytest.raises(runs.RunError, match=r"was run with another --latent_dim \(4, now 3\)"):
        published.main([*again[:-1], f"--run_dir={tmp_path / 'no'}"], {"digits": DIGITS._replace(rows=deep)})
    assert not (tmp_path / "no").exists()
