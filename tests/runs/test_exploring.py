"""What the page of a run shows, without the page: its numbers are those of the library, and of ``pyro-vae score``."""

import importlib.util
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    Incomplete,
    MeanField,
    StandardNormal,
    cli,
    importance_sampling,
    runs,
)
from pyro_vae.data.datasets import Column, Pixels, Schema
from pyro_vae.data.images import observed
from pyro_vae.data.incoming import conditions
from pyro_vae.data.tables import TableData, heads
from pyro_vae.errors import MissingExtra, RunError
from pyro_vae.infer.diagnostics import active_units
from pyro_vae.infer.evidence.imputation import impute
from pyro_vae.parts import likelihoods
from pyro_vae.runs import figures, new_data
from pyro_vae.runs.exploring import ExploreSettings, explore, markup, serving
from pyro_vae.runs.exploring.explorer import SAMPLES, Datum, Explorer, given_of
from pyro_vae.runs.exploring.page import Page, Visit
from pyro_vae.runs.using import Using
from pyro_vae.vae import ConditionalVAE

OLD = Path(__file__).parent / "data" / "0.1.0"


@pytest.fixture(scope="module")
def explorer():
    """Of a run of Digits, 8 x 8, that version 0.1.0 wrote."""
    return Explorer(runs.load(OLD / "vae"), seed=3)


def a_run(vae, schema, test, known=(-3.0, -2.0, -1.0), **data):
    """What an explorer asks of a run, of a model that was not trained."""
    importance = xr.Dataset({"log_px": ("datum", np.array(known))})
    data = SimpleNamespace(test=test, schema=schema, title="made", **data)
    return SimpleNamespace(
        path=OLD, using=Using(vae.eval(), schema), model=vae, schema=schema, data=data, importance=importance,
        annealed=None, result={"num_samples": 30, "test_log_likelihood": -2.0}, trust=True,
    )  # fmt: skip


def test_the_first_estimate_is_that_of_the_library_and_of_score(explorer, tmp_path):
    datum = explorer.test_datum(5)
    found = explorer.score(datum)
    torch.manual_seed(3)
    vae = explorer.run.model
    evidence = importance_sampling(vae.model, vae.guide, datum.x.flatten(1), SAMPLES, num_checked=0)
    assert found.log_px == evidence.log_px.item()
    assert found.mc_se == evidence.mc_se.item()
    assert found.reliable == bool(evidence.reliable)
    np.save(tmp_path / "x.npy", datum.x.numpy())
    told = {
        "run": OLD / "vae",
        "file": tmp_path / "x.npy",
        "estimator": "importance",
        "num_samples": SAMPLES,
        "seed": 3,
    }
    assert new_data.score_new(new_data.ScoreSettings(**told)).result["log_px"].item() == found.log_px
    values = explorer.run.importance["log_px"].values
    assert found.below == sum(value < found.log_px for value in values.tolist()) / len(values)
    assert (found.among, found.number) == ("importance", 100)
    assert explorer.score(datum) == found  # asked again, it is the same


@pytest.mark.slow
def test_the_annealed_estimate_is_that_of_the_run(explorer):
    datum = explorer.test_datum(5)
    found = explorer.score(datum, "annealed")
    torch.manual_seed(3)
    assert found.log_px == explorer.run.score(datum.x).log_px.item()
    values = explorer.run.annealed["log_px"].values
    assert (found.among, found.number) == ("annealed", 40)
    assert found.below == sum(value < found.log_px for value in values.tolist()) / 40


def test_it_looks_as_the_parts_do(explorer):
    datum = explorer.test_datum(7)
    looked, vae, x = explorer.look(datum), explorer.run.model, explorer.run.data.test[7:8]
    with torch.no_grad():
        q = vae.posterior(x)
        made = vae.likelihood(q.mean).mean
    torch.testing.assert_close(looked.loc["z"], q.mean)
    torch.testing.assert_close(looked.scale["z"], q.stddev)
    torch.testing.assert_close(looked.made.flatten(1), made)
    for place, told in ((99_999, "no 99999"), (-1, "no -1"), (3.5, "no 3.5"), (None, "no such number")):
        with pytest.raises(RunError, match=f"from 0: there is {told}$"):
            explorer.test_datum(place)


def test_units_are_the_active_ones_and_move_alone(explorer):
    vae, test = explorer.run.model, explorer.run.data.test
    active = active_units(vae.guide, test[:500])["z"].nonzero().flatten().tolist()
    assert sorted(unit.place for unit in explorer.units) == active
    assert all(unit.low < unit.high for unit in explorer.units)
    start, unit = explorer.look(explorer.test_datum(0)).loc, explorer.units[-1]
    moved = explorer.moved(start, {unit: 1.5})
    assert moved["z"][0, unit.place] == 1.5
    assert (moved["z"] != start["z"]).sum() == 1
    with torch.no_grad():
        torch.testing.assert_close(explorer.decode(moved).flatten(1), vae.likelihood(moved["z"]).mean)


def test_a_walk_is_a_straight_line_between_posterior_means(explorer):
    start, end = explorer.test_datum(0), explorer.test_datum(1)
    walk = explorer.walk(start, end, 5)
    assert walk.shape == (5, 1, 8, 8)
    torch.testing.assert_close(walk[:1], explorer.look(start).made)
    torch.testing.assert_close(walk[-1:], explorer.look(end).made)
    vae, test = explorer.run.model, explorer.run.data.test
    with torch.no_grad():
        middle = vae.likelihood(vae.posterior(test[:2]).mean.mean(0, keepdim=True)).mean
    torch.testing.assert_close(walk[2:3].flatten(1), middle)


def test_samples_are_means_given_draws_of_the_prior(explorer):
    found = explorer.sample(4, seed=11)
    torch.manual_seed(11)
    expected = figures.decode(explorer.run.model.model, 4, explorer.run.data.test)
    assert torch.equal(found.flatten(1), expected)
    assert not torch.equal(found, explorer.sample(4, seed=12))


def test_what_is_erased_is_filled_in_by_the_library(explorer):
    cells, unseen = explorer.cells(explorer.test_datum(2))
    unseen[:32] = [1] * 32
    datum = explorer.read_cells(cells, unseen)
    assert "missing values" in datum.told[-1]
    found = explorer.impute(datum).imputation
    vae, x = explorer.run.model, explorer.run.data.test[2:3]
    seen = torch.arange(64)[None] >= 32
    torch.manual_seed(3)
    expected = impute(vae.model, vae.guide, (torch.where(seen, x, 0.0), seen), SAMPLES, 100, num_checked=0)
    torch.testing.assert_close(found.mean, expected.mean)
    assert torch.equal(found.draws, expected.draws)
    assert torch.equal(found.mean[:, 32:], x[:, 32:])
    scored = explorer.score(datum)
    assert scored.below is None  # log p of a part is not compared with that of whole images
    error = found.evidence.mc_se.item() + scored.mc_se  # of other draws
    assert scored.log_px == pytest.approx(found.evidence.log_px.item(), abs=4 * error)


@pytest.mark.parametrize(
    ("rule", "largest", "head"),
    [
        ("dynamic", 255, "Bernoulli"),
        ("threshold", 16, "Bernoulli"),
        ("integers", 255, "DiscretizedLogistic"),
        ("dequantized", 255, "ContinuousBernoulli"),
        ("none", 1, "Laplace"),
    ],
)
def test_drawings_are_encoded_as_the_data_are(rule, largest, head):
    schema = Schema((1, 4, 4), pixels=Pixels(rule, 7, largest))
    head = getattr(likelihoods, head)(16)
    decoder = Conditional(MLP(2, sum(head.sizes)), head)
    vae = VAE(StandardNormal(2), decoder, Conditional(MLP(16, 4), MeanField(2)))
    page = Explorer(a_run(vae, schema, torch.zeros(2, 16)))
    cells = np.random.default_rng(0).integers(0, 256, 16)
    pixels = torch.from_numpy(cells) / 255 * largest
    pixels = pixels.round().int() if largest > 1 else pixels.float()
    how = "static" if rule == "dynamic" else rule
    expected = observed(pixels[None], largest, how, torch.Generator().manual_seed(7))
    datum = page.read_cells(cells.tolist(), [0] * 16)
    torch.testing.assert_close(datum.x.flatten(1), expected)
    back, unseen = page.cells(datum)
    torch.testing.assert_close(
        torch.tensor(back) / 255 * (255 if rule == "integers" else 1), expected[0], atol=3e-3, rtol=0
    )
    assert unseen == [0] * 16
    for wrong in (([1] * 15, [0] * 16), ("<script>", [0] * 16), (None, None)):
        with pytest.raises(RunError, match="a drawing has one brightness"):
            page.read_cells(*wrong)


def test_a_condition_is_read_back():
    columns = (
        Column("label", "categorical", ("<script>", "b", "c")),
        Column("sex", "binary", ("f", "m"), 0.4, 0.5),
        Column("age", "real", (), 40.0, 10.0),
    )
    schema = Schema((1, 2, 2), condition=columns)
    given = {"label": "c", "sex": "m", "age": 33.0}
    c = conditions(given, 1, schema)
    assert given_of(columns, c[0]) == {**given, "age": pytest.approx(33, abs=1e-4)}


def test_classes_are_told_and_sampled():
    label = Column("label", "categorical", (3.0, 8.0))
    schema = Schema((1, 2, 2), condition=(label,))
    vae = ConditionalVAE(
        StandardNormal(2), Conditional(MLP(2 + 2, 4), Bernoulli(4)), Conditional(MLP(4 + 2, 4), MeanField(2)), 2
    )
    x, c = torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]]), torch.eye(2)
    page = Explorer(a_run(vae, schema, (x, c)))
    datum = page.test_datum(1)
    assert datum.given == {"label": 8.0}
    with torch.no_grad():
        torch.testing.assert_close(page.look(datum).loc["z"], vae.posterior_given(x[1:], c[1:]).mean)
    torch.manual_seed(5)
    expected = figures.decode(vae.model, 3, x, condition=c[:1].expand(3, -1))
    assert torch.equal(page.sample(3, {"label": 3.0}, seed=5).flatten(1), expected)


def test_rows_of_a_table_are_typed_in():
    columns = (Column("<script>alert(1)</script>", "real"), Column("town", "categorical", ("Bonn", "<b>")))
    rows = np.array([[0.5, 0], [1.5, 1], [-1.0, np.nan]], np.float32)
    data = TableData(columns, rows, rows, rows)
    head = heads(columns)
    decoder = Conditional(MLP(2, sum(head.sizes)), head)
    vae = VAE(StandardNormal(2), decoder, Conditional(Incomplete(MLP(4, 4), event_size=2), MeanField(2)))
    run = a_run(vae, data.schema, data.test)
    page = Explorer(run)
    datum = page.read(pd.DataFrame({columns[0].name: [1.5], "town": ["<b>"]}))
    pd.testing.assert_frame_equal(datum.x, page.test_datum(1).x, check_dtype=False)
    torch.manual_seed(0)
    expected = importance_sampling(vae.model, vae.guide, data.test[1:2], SAMPLES, num_checked=0)
    assert page.score(datum).log_px == expected.log_px.item()
    gap = page.read(pd.DataFrame({columns[0].name: [1.5], "town": [None]}))
    assert page.impute(gap).values["town"].iloc[0] in ("Bonn", "<b>")
    shown = Page.__new__(Page)  # without Gradio
    shown.explorer, shown._computing, visit = page, threading.Lock(), Visit()
    visit.datum = page.read(pd.DataFrame({columns[0].name: [None], "town": ["Bonn"]}))
    filled = page.impute(visit.datum)
    assert f"<td>{filled.imputation.std[0, 0].item():.5g}</td>" in shown.fill(visit)
    assert "1 entry" in shown.fill(visit)
    for text in (markup.frame(page.sample(3), columns[0].name), markup.notes(["<script>"]), markup.frame(datum.x, "")):
        assert "<script" not in text
        assert "<b>" not in text


def test_the_place_is_told_in_words(explorer):
    datum = explorer.test_datum(5)
    first = explorer.score(datum)
    text = markup.scores(explorer, first, None)
    assert f"<td>{first.log_px:.2f}</td>" in text
    assert f"higher than {first.below:.1%} of them" in text
    assert text.count("<rect") == markup.BARS
    assert "on its way" in text
    assert "&lt;script&gt;" in markup.scores(explorer, first, "no: <script>")
    lost = first._replace(log_px=float("nan"), below=None)
    assert "it is no number" in markup.scores(explorer, lost, None)


@pytest.fixture
def gradio(monkeypatch):
    """As if Gradio were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: find("json" if name == "gradio" else name))


def told(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explore", *map(str, argv)])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_explored_is_told_in_one_line(tmp_path, capsys, gradio, monkeypatch):
    assert "holds no finished run" in told([OLD / "interrupted"], capsys)
    assert "there is no result.json" in told([tmp_path], capsys)
    assert "--port must be in 0..65535" in told([OLD / "vae", "--port=70000"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in told([OLD / "vae", f"--port={port}"], capsys)
    monkeypatch.setattr(serving, "browser_of", lambda: None)
    assert "--browser: no browser is found" in told([OLD / "vae", "--port=0", "--browser=true"], capsys)


def test_without_data_or_gradio_it_says_so(monkeypatch, gradio):
    def fail(*args, **kwargs):
        raise RunError("no such files")

    monkeypatch.setattr(runs.Run, "data", property(fail))
    monkeypatch.setattr(runs.Run, "schema", Schema((1, 8, 8)))
    with pytest.raises(RunError, match="explore needs the data of the run: no such files"):
        explore(ExploreSettings(OLD / "vae"))
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[explore\]' in its checkout"):
        explore(ExploreSettings(OLD / "vae"))


def test_sequences_and_odd_images_are_refused(explorer):
    for schema, kind in (
        (Schema((5, 2), "sequence"), "sequences"),
        (Schema((2, 4, 4)), r"images of shape \(2, 4, 4\)"),
    ):
        with pytest.raises(RunError, match=f"is a run of {kind}: explore shows images of 1 or 3 channels and tables"):
            Explorer(a_run(explorer.run.model, schema, torch.zeros(2, 8)))


def test_a_file_is_read_as_score_reads_it(explorer, tmp_path):
    x = explorer.test_datum(4).x.numpy()
    np.save(tmp_path / "x.npy", np.concatenate([x, 1 - x]))
    assert np.array_equal(explorer.read_file(tmp_path / "x.npy").x.numpy(), x)
    np.save(tmp_path / "y.npy", np.zeros((1, 3, 3)))
    with pytest.raises(RunError, match="expected images of shape"):
        explorer.read_file(tmp_path / "y.npy")
    (tmp_path / "z.png").write_text("no picture")
    with pytest.raises(RunError, match=r"^z.png is no readable image"):
        explorer.read_file(tmp_path / "z.png")
    assert isinstance(explorer.read(x[0]), Datum)
