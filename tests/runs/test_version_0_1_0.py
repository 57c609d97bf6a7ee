"""What version 0.1.0 wrote still loads: three run directories of its own, a study and a file of settings.

``data/0.1.0`` holds what its command wrote: ``vae`` and ``two_layers`` are finished, ``interrupted`` is the run of
``vae`` stopped in its fourth epoch of six. Figures are left out, and checkpoints of finished runs.
"""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from pyro_vae import TwoLayerVAE, cli, importance_sampling, priors, runs
from pyro_vae.data.images import Dataset
from pyro_vae.parts import likelihoods

OLD = Path(__file__).parent / "data" / "0.1.0"


@pytest.fixture(params=["vae", "two_layers"])
def old(request):
    return OLD / request.param


def test_the_files_are_old_ones():
    for name in ("vae", "two_layers"):
        assert json.loads((OLD / name / "result.json").read_text())["versions"]["pyro_vae"] == "0.1.0"
        with xr.open_datatree(OLD / name / "evidence.nc", engine="h5netcdf") as tree:
            assert tree["importance"].sizes["image"] == 100
    paths = {yaml.safe_load((OLD / name / "config.yaml").read_text())["dataset"]["class_path"] for name in ("vae",)}
    assert paths == {"experiments.datasets.Digits"}
    assert sum(path.stat().st_size for path in OLD.rglob("*") if path.is_file()) < 300_000


def test_a_run_of_before_there_was_a_warm_up_has_none(old):
    assert runs.parse(runs.Settings, [f"--config={old / 'config.yaml'}"])[0].warmup == 0.0
    assert runs.parse(runs.Settings, [])[0].warmup is None


def test_a_run_loads_without_data(old, monkeypatch):
    def fail(*args):
        raise AssertionError("data were read")

    monkeypatch.setattr(Dataset, "load", fail)
    run = runs.load(old)
    assert run.path == old
    assert run.importance.sizes == {"datum": 100}
    assert run.annealed.sizes == {"datum": 40}
    assert run.result["test_log_likelihood"] == pytest.approx(run.importance["log_px"].values.mean(), rel=1e-9)
    assert (run.settings.latent_dim, run.settings.model) == (3, {"vae": "VAE"}.get(old.name, "TwoLayerVAE"))
    model = run.model
    if old.name == "vae":
        assert isinstance(model.prior, priors.GaussianMixture)
    else:
        assert isinstance(model, TwoLayerVAE)
        assert isinstance(model.prior, priors.VampPrior)
        assert isinstance(model.likelihood.head, likelihoods.Laplace)
    assert not model.training


def test_its_log_likelihood_is_found_again(old):
    run = runs.load(old)
    x = run.data.test[:100]
    torch.manual_seed(7)
    evidence = importance_sampling(run.model.model, run.model.guide, x, run.result["num_samples"])
    _, _, error = evidence.mean()
    fresh, stored = evidence.log_px.mean().item(), run.result["test_log_likelihood"]
    assert abs(fresh - stored) < 4 * math.hypot(error, run.result["mc_se"])
    # datum by datum too: another order of them would not pass
    assert np.corrcoef(evidence.log_px.numpy(), run.importance["log_px"].values)[0, 1] > 0.9


@pytest.mark.slow
def test_a_run_is_scored_again(tmp_path):
    scored = runs.score(OLD / "vae", estimator="annealed", num_images=100, device="cpu", run_dir=tmp_path / "again")
    result = runs.load(OLD / "vae").result
    error = math.hypot(scored.result["mc_se"], result["annealed_mc_se"])
    images = result["test_log_likelihood_se"]  # others of the test set
    assert abs(scored.result["log_likelihood"] - result["annealed_log_likelihood"]) < 4 * math.hypot(error, images)
    assert not (OLD / "vae" / "evaluations").exists()


@pytest.mark.slow
def test_old_and_new_runs_are_compared(tmp_path):
    """The same settings today: as good a model, on the same test set."""
    argv = [f"--config={OLD / 'vae' / 'config.yaml'}", "--seed=3", f"--run_dir={tmp_path / 'new'}"]
    new = cli.train(argv)
    assert new.result["test_set"] == runs.load(OLD / "vae").result["test_set"]
    compared = runs.compare([OLD / "vae", new])
    (difference,) = compared.differences
    assert compared.estimator == "annealed"
    assert difference.mc_se < difference.se
    assert abs(difference.mean) < 0.5
    with pytest.raises(runs.RunError, match="cannot be compared: unit is"):
        runs.compare([OLD / "two_layers", new])


def metrics(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(tmp_path):
    run_dir = shutil.copytree(OLD / "interrupted", tmp_path / "run")
    run = cli.train([f"--run_dir={run_dir}", "--resume"])
    assert run.result["epochs"] == 6
    rows, whole = metrics(run_dir), metrics(OLD / "vae")
    assert rows[:3] == metrics(OLD / "interrupted")
    for row, other in zip(rows, whole, strict=True):  # that of the run that was not interrupted, but for rounding
        assert float(row["validation_elbo"]) == pytest.approx(float(other["validation_elbo"]), abs=1e-3)
    uninterrupted = runs.load(OLD / "vae").result
    assert run.result["test_log_likelihood"] == pytest.approx(uninterrupted["test_log_likelihood"], abs=0.1)
    assert run.result["annealed_log_likelihood"] == pytest.approx(uninterrupted["annealed_log_likelihood"], abs=0.1)


def test_a_finished_one_is_only_reported(tmp_path, capsys):
    run_dir = shutil.copytree(OLD / "vae", tmp_path / "run")
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    run = cli.train([f"--run_dir={run_dir}", "--resume"])
    assert "This run is finished" in capsys.readouterr().out
    assert run.result == runs.load(OLD / "vae").result
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    with pytest.raises(runs.RunError, match=r"was run with another --latent_dim \(3, now 4\)"):
        cli.train([f"--run_dir={run_dir}", "--resume", "--latent_dim=4"])


@pytest.mark.parametrize("old_path", ["pyro_vae.LaplacePrior", "pyro_vae.priors.LaplacePrior", "LaplacePrior"])
def test_a_file_of_settings_is_read(tmp_path, old_path):
    content = {
        "dataset": {"class_path": "experiments.datasets.Digits", "init_args": {"binarization": "none"}},
        "prior": {"class_path": old_path},
        "likelihood": {"class_path": "pyro_vae.likelihoods.LaplaceLikelihood", "init_args": {"scale": "per_pixel"}},
        "posterior": "pyro_vae.FlowPosterior",
        "objective": {"class_path": "pyro_vae.objectives.IWAE", "init_args": {"num_particles": 7}},
        "epochs": 3,
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    settings, text = runs.parse(runs.Settings, [f"--config={tmp_path / 'old.yaml'}", "--epochs=4"])
    assert settings.prior.func is priors.Laplace
    assert settings.objective().num_particles == 7
    assert settings.epochs == 4
    written = yaml.safe_load(text)
    assert written["dataset"]["class_path"] == "pyro_vae.data.Digits"
    assert written["likelihood"]["class_path"] == "pyro_vae.likelihoods.Laplace"
    assert written["likelihood"]["init_args"]["scale"] == "per_pixel"
    assert written["posterior"]["class_path"] == "pyro_vae.posteriors.Flow"


RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.mark.parametrize("study", ["prior_study", "bound_study", "engine_study", "likelihood_study"])
def test_a_study_is_read(study):
    assert (RESULTS / study / "summary.json").exists()
    summaries = runs.load_study(RESULTS / study)
    assert len(summaries) > 2
    assert summaries[0].name == summaries[0].reference
    assert summaries[0].difference == 0
    text = (RESULTS / study / "table.md").read_text()
    for each in summaries:
        assert f"{each.log_likelihood:.2f}" in text
        assert each.estimator == ("annealed" if study in ("bound_study", "engine_study") else "importance")


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(runs.RunError, match="holds no finished study"):
        runs.load_study(tmp_path)
    (tmp_path / "result.json").write_text('{"summaries": [{"name": 3}]}')
    with pytest.raises(runs.RunError, match=r"result.json is damaged: .*'name' cannot be 3"):
        runs.load_study(tmp_path)
