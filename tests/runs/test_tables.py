"""Runs of tables: from a file to a model, its scores and figures; with gaps, and in any unit."""

import csv
import json
import math
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro_vae.diagnostics import kl_divergence
from pyro_vae.priors import VampPrior
from scipy import stats

from pyro_vae import MLP, Incomplete, cli, log_weights, runs
from pyro_vae.data import Table
from pyro_vae.errors import RunError
from pyro_vae.infer.diagnostics import mean_log_weights
from pyro_vae.parts.mixed import Mixed
from pyro_vae.runs import training
from pyro_vae.runs.columns import column_parts

ROWS = 80
SMALL = [
    *("--encoder.hidden=[8]", "--decoder.hidden=[8]", "--latent_dim=2", "--epochs=2", "--batch_size=32"),
    *("--evidence.num_samples=30", "--evidence.annealed_images=0", "--device=cpu"),
]
KINDS = {"height": "positive", "change": "real", "grade": "ordinal"}
ANNEALED = [
    *("--evidence.annealed_images=4", "--evidence.annealing.num_temperatures=4"),
    *("--evidence.annealing.num_checked=0", "--objective=IWAE", "--objective.num_particles=3"),
]


def a_table(path, seed=0, unit=1.0):
    """Columns of every kind that one hidden number tells of, a fifth of them lost."""
    draws = np.random.default_rng(seed)
    z = draws.normal(size=ROWS)
    table = pd.DataFrame(
        {
            "height": unit * (3 * z + draws.normal(size=ROWS) + 10).round(2),
            "change": unit * (z + draws.normal(size=ROWS)).round(2),
            "visits": draws.poisson(np.exp(1 + 0.5 * z)),
            "treated": np.where(z + draws.normal(size=ROWS) > 0, "yes", "no"),
            "town": draws.choice(["Aachen", "Bonn", "Cork"], ROWS),
            "grade": (z + 2 + draws.normal(size=ROWS)).clip(0, 3).round().astype(int),
        }
    )
    lost = draws.random(table.shape) < 0.2
    lost[:, 5] = False
    table.astype(object).mask(lost).to_csv(path, index=False)
    return path


def train(path, run_dir, *options):
    columns = f"--dataset.columns={json.dumps(KINDS)}"
    return cli.train(["--dataset=Table", f"--dataset.path={path}", columns, f"--run_dir={run_dir}", *SMALL, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, drawing):
    folder = tmp_path_factory.mktemp("tables")
    with drawing():
        return train(a_table(folder / "a.csv"), folder / "run", *ANNEALED)


def test_a_table_is_trained_on_and_scored(finished, capsys):
    runs.report_run(finished.path)
    text = capsys.readouterr().out
    assert "image" not in text
    assert "8 test rows" in text
    result = finished.result
    assert result["unit"] == "nats per row, density"
    assert result["densities"] == ["height", "change"]
    kinds = ["positive", "real", "count", "binary", "categorical", "ordinal"]
    assert list(result["columns"].values()) == kinds
    assert result["bits_per_dim"] is None
    assert result["num_images"] == len(finished.importance["datum"]) == 8
    for name in ("marginals", "latent_space", "log_px", "training"):
        assert (finished.path / f"{name}.png").stat().st_size > 5000
    with (finished.path / "columns.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == kinds
    gaps = [float(row["test_missing"]) for row in rows]
    assert gaps == finished.data.test.isnan().double().mean(0).tolist()
    assert gaps[5] == 0 < sum(gaps)


def test_it_loads_without_its_file(finished, tmp_path):
    moved = shutil.copytree(finished.path, tmp_path / "run")
    model = runs.load_model(moved)
    assert isinstance(model.likelihood.head, Mixed)
    assert isinstance(model.posterior.network, Incomplete)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, finished.model.state_dict()[name], equal_nan=True)


def test_log_px_of_a_run_is_that_of_scipy_in_the_units_of_the_file(finished):
    """p(x, z) at the drawn z of rows with gaps, entry by entry."""
    vae, data = finished.model, finished.data
    torch.manual_seed(0)
    z = torch.randn(len(data.test), 2)
    x = data.test.double().numpy()
    outputs = vae.likelihood.network(z).detach().split(vae.likelihood.head.sizes, -1)
    found = vae.likelihood.head(*outputs).base_dist
    safe = torch.where(data.test.isnan(), vae.likelihood.head.filler, data.test)
    entries = found.log_prob(safe).detach().double().numpy()

    def softplus(value):
        return torch.nn.functional.softplus(value).double().numpy()[:, 0]

    def plain(value):
        return value.double().numpy()[:, 0]

    height, spread, change, width, mean, dispersion, logit, logits, score = outputs
    head = {type(part).__name__: part for part in vae.likelihood.head.heads}
    loc, scale = head["LogNormal"].log_loc.item(), head["LogNormal"].log_scale.item()
    height = stats.lognorm(scale * (0.01 + softplus(spread)), scale=np.exp(loc + scale * plain(height)))
    expected = [height.logpdf(x[:, 0])]
    loc, scale = head["Scaled"].loc.item(), head["Scaled"].scale.item()
    expected.append(stats.norm(loc + scale * plain(change), scale * (0.01 + softplus(width))).logpdf(x[:, 1]))
    m, r = (np.exp(plain(value)) for value in (mean, dispersion))
    expected.append(stats.nbinom(r, r / (r + m)).logpmf(x[:, 2]))
    expected.append(stats.bernoulli(torch.sigmoid(logit).double().numpy()[:, 0]).logpmf(x[:, 3]))
    chances = logits.double().log_softmax(-1).numpy()
    expected.append([math.nan if math.isnan(k) else row[int(k)] for row, k in zip(chances, x[:, 4], strict=True)])
    ends = head["Ordinal"].thresholds().detach().double().numpy()
    below = np.concatenate(
        [np.zeros((len(x), 1)), 1 / (1 + np.exp(score.double().numpy() - ends)), np.ones((len(x), 1))], 1
    )
    expected.append(np.log(np.diff(below, axis=1)[np.arange(len(x)), x[:, 5].astype(int)]))
    expected = np.stack(expected, 1)
    seen = ~np.isnan(x)
    assert seen.any(0).all()
    assert not seen.all(0).all()
    np.testing.assert_allclose(entries[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_parts_of_columns_and_the_divergence_are_the_bound(finished):
    vae, x = finished.model, finished.data.test

    def of_the_same_draws(estimate):
        torch.manual_seed(0)
        return estimate(vae.model, vae.guide, x, 200)

    parts = of_the_same_draws(column_parts)
    assert torch.equal(parts.isnan(), x.isnan())
    bound = of_the_same_draws(mean_log_weights).double().mean()
    divergence = of_the_same_draws(kl_divergence)["z"].sum()
    torch.testing.assert_close(parts.double().nansum(1).mean() - divergence, bound, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_run_is_compared_scored_again_and_resumed(finished, tmp_path):
    path = a_table(tmp_path / "a.csv")
    other = train(path, tmp_path / "other", "--missing=zeros", *ANNEALED)
    assert not other.model.posterior.network.mask
    assert finished.model.posterior.network.mask
    assert "corrected by the 4 annealed ones" in runs.compare([finished, other]).table()
    changed = finished.result | {"densities": ["height", "change", "visits"]}
    shutil.copytree(finished.path, tmp_path / "changed")
    (tmp_path / "changed" / "result.json").write_text(json.dumps(changed))
    with pytest.raises(RunError, match="cannot be compared: densities is"):
        runs.compare([finished, tmp_path / "changed"])
    scored = runs.score(other, estimator="importance", num_images=4, num_samples=20)
    assert math.isfinite(scored.result["log_likelihood"])
    assert "4 test rows" in runs.evaluation_table(scored.result)
    again = cli.train([f"--run_dir={other.path}", "--resume"])
    assert again.result["test_log_likelihood"] == other.result["test_log_likelihood"]
    a_table(path, seed=1)
    (other.path / "result.json").unlink()
    with pytest.raises(RunError, match=r"was trained on other data than .*a\.csv holds now"):
        cli.train([f"--run_dir={other.path}", "--resume"])


def prepared(table, **settings):
    """The model of a run before its first step, and the data."""
    network = partial(MLP, hidden=[8])
    torch.manual_seed(0)
    data = Table("unused", table, columns=KINDS if "height" in table else None).load()
    chosen = runs.Settings(**{"encoder": network, "decoder": network, "latent_dim": 2} | settings)
    return training.prepare(chosen, data, Trace_ELBO()), data


def test_another_unit_changes_the_density_alone(tmp_path):
    """Two columns in thousandths: log p(x) is less by log 1000 for each that was seen."""
    log_w, seen = [], torch.empty(0)
    for unit in (1.0, 1000.0):
        vae, data = prepared(pd.read_csv(a_table(tmp_path / "a.csv", unit=unit)))
        torch.manual_seed(0)
        log_w.append(log_weights(vae.model, vae.guide, data.train, 5).detach())
        seen = (~data.train[:, :2].isnan()).sum(1)
    assert set(seen.tolist()) >= {1, 2}
    torch.testing.assert_close(log_w[0] - log_w[1], (seen * math.log(1000)).expand(5, -1), atol=1e-3, rtol=0)


def test_tables_without_gaps_have_a_plain_encoder():
    vae, _ = prepared(pd.DataFrame({"a": np.arange(40) % 7, "b": np.arange(40) % 2}))
    assert not isinstance(vae.posterior.network, Incomplete)
    assert vae.likelihood.head.unit("row") == "nats per row, mass"


def test_pseudo_inputs_have_no_gaps(tmp_path):
    vae, data = prepared(pd.read_csv(a_table(tmp_path / "a.csv")), prior=partial(VampPrior, components=5))
    assert data.schema.missing
    assert vae.prior.pseudo_inputs.isfinite().all()


def test_the_encoder_sees_counts_as_logarithms_where_there_are_gaps():
    counts = np.array([0.0, 3.0, 1000.0, np.nan] * 20)
    vae, data = prepared(pd.DataFrame({"a": counts, "b": np.arange(80) + 0.5}))
    shown = []
    vae.posterior.network.network.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    vae.guide(data.train)
    a, seen = shown[0][:, 0], shown[0][:, 2]
    known = data.train[:, 0].nan_to_num().log1p()[seen == 1]
    torch.testing.assert_close(a[seen == 1], (known - known.mean()) / known.std(correction=0), atol=1e-4, rtol=1e-4)
    assert (a[seen == 0] == 0).all()
    assert 0 < seen.mean() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--likelihood=Gaussian"], "--likelihood Gaussian is a density, of which the count column 'visits' has none"),
        (["--likelihood=Poisson"], "Poisson is a mass, of which the positive column 'height' has none"),
        (["--encoder=ConvEncoder"], "needs image_shape"),
        (["--dataset.columns={visits: integer}"], "--dataset.columns"),
        (["--dataset.columns={visit: real}"], r"has no column 'visit' \(did you mean 'visits'\?\)"),
        (["--dataset.path=none.csv"], r"none\.csv is no readable table"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, options, message):
    path = a_table(tmp_path / "a.csv")
    with pytest.raises(RunError, match=message) as refused:
        cli.train(["--dataset=Table", f"--dataset.path={path}", f"--run_dir={tmp_path / 'run'}", *SMALL, *options])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_help_teaches_tables(capsys):
    with pytest.raises(SystemExit):
        cli.train(["--help"])
    assert "Table" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.train(["--dataset.help=Table"])
    text = capsys.readouterr().out
    assert "split_seed" in text
    assert "small, medium" in text
