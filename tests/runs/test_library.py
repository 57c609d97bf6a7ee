"""Runs from Python: train, load, score, compare, study; and the command pyro-vae, which only parses."""

import dataclasses
import functools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from PIL import Image

from pyro_vae import MLP, VAE, cli, priors, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.data.images import ImageData
from pyro_vae.errors import MissingExtra, need_extra
from pyro_vae.runs import summaries as studies

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = runs.Settings(
    dataset=Digits,
    prior=functools.partial(priors.GaussianMixture, components=3),
    encoder=functools.partial(MLP, hidden=(8,)),
    decoder=functools.partial(MLP, hidden=(8,)),
    latent_dim=2,
    epochs=2,
    device="cpu",
    evidence=runs.EvidenceSettings(num_samples=20, num_images=60, annealed_images=0),
)


def tiny(run_dir, **changes):
    settings = {name: getattr(TINY, name) for name in vars(TINY)}
    return runs.Settings(**(settings | {"run_dir": run_dir} | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs, which differ by their seeds."""
    folder = tmp_path_factory.mktemp("runs")
    return [runs.train(tiny(folder / f"run{seed}", seed=seed)) for seed in (0, 1)]


def test_a_run_has_everything_at_hand(trained):
    run = trained[0]
    assert isinstance(run, runs.Run)
    assert isinstance(run.model, VAE)
    assert run.model is run.model  # read once
    assert isinstance(run.model.prior, priors.GaussianMixture)
    assert isinstance(run.data, ImageData)
    assert run.settings.epochs == 2
    assert run.settings.prior(2).state_dict().keys() == TINY.prior(2).state_dict().keys()
    assert run.annealed is None
    assert run.importance["log_px"].sizes == {"datum": 60}
    assert run.result == json.loads((run.path / "result.json").read_text())


def test_a_run_is_loaded_as_it_was(trained):
    run, again = trained[0], runs.load(str(trained[0].path))
    assert again.result == run.result
    assert again.importance.identical(run.importance)
    weights, others = run.model.state_dict(), again.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_settings_of_python_and_of_the_command_line_give_the_same_run(trained, tmp_path):
    argv = "--dataset Digits --prior GaussianMixture --prior.components 3 --encoder.hidden [8] --decoder.hidden [8] "
    argv += "--latent_dim 2 --epochs 2 --device cpu --evidence.num_samples 20 --evidence.num_images 60 "
    argv += "--encoder.activation tanh --decoder.activation tanh "  # what MLP has, where nothing else is said
    run = cli.train([*argv.split(), "--evidence.annealed_images=0", f"--run_dir={tmp_path / 'run'}"])
    assert (run.path / "config.yaml").read_text() == (trained[0].path / "config.yaml").read_text()
    assert run.importance.identical(trained[0].importance)


def test_a_finished_run_is_not_trained_again(trained, capsys):
    run = runs.train(tiny(trained[0].path, resume=True))
    assert "This run is finished" in capsys.readouterr().out
    assert run.result == trained[0].result
    with pytest.raises(runs.RunError, match="holds another run, which is never overwritten"):
        runs.train(tiny(trained[0].path))
    with pytest.raises(runs.RunError, match=r"was run with another --epochs \(2, now 3\)"):
        runs.train(tiny(trained[0].path, resume=True, epochs=3))


def test_a_run_is_scored_by_another_estimator(trained, tmp_path):
    run = trained[0]
    scored = runs.score(run, estimator="importance", num_samples=300, num_images=50, device="cpu", seed=4)
    assert scored.path == run.path / "evaluations" / "importance-test"
    assert {path.name for path in scored.path.iterdir()} == {"config.yaml", "evidence.nc", "result.json"}
    assert scored.result["log_likelihood"] == pytest.approx(scored.evidence["importance"].log_px.mean().item())
    assert json.loads((scored.path / "result.json").read_text())["seed"] == 4
    content = yaml.safe_load((scored.path / "config.yaml").read_text())
    assert (content["run"], content["num_samples"]) == (str(run.path), 300)
    assert runs.Settings(run_dir="a/b").run_dir == Path("a/b")  # text will do
    again = runs.score(
        run.path, estimator="importance", num_samples=300, num_images=50, seed=4, run_dir=str(tmp_path / "b")
    )
    torch.testing.assert_close(again.evidence["importance"].log_px, scored.evidence["importance"].log_px)
    with pytest.raises(runs.RunError, match="never overwritten"):
        runs.score(run, estimator="importance", num_images=50)
    with pytest.raises(runs.RunError, match="--num_images must be at least 2"):
        runs.score(run, num_images=1)
    with pytest.raises(runs.RunError, match="num_sample"):
        runs.score(run, num_sample=3)


def test_runs_are_compared_and_the_comparison_is_written(trained, tmp_path):
    compared = runs.compare(trained, str(tmp_path / "compared"))
    a, b = (run.importance["log_px"].values for run in trained)
    (difference,) = compared.differences
    assert difference.mean == pytest.approx((b - a).mean())
    assert difference.se == pytest.approx((b - a).std(ddof=1) / 60**0.5)
    assert runs.compare([run.path for run in trained]).differences == compared.differences
    written = json.loads((tmp_path / "compared" / "result.json").read_text())
    assert written["reference"] == str(trained[0].path)
    assert written["differences"][str(trained[1].path)]["mean"] == pytest.approx(difference.mean)
    assert (tmp_path / "compared" / "table.md").read_text().strip() == compared.table()
    assert f"{difference.mean:+.3f}" in compared.table()
    with Image.open(tmp_path / "compared" / "differences.png") as image:
        assert np.asarray(image.convert("L")).std() > 5
    for wrong, message in {
        (trained[0],): "at least two",
        (trained[0], str(trained[0].path)): "named twice",
        (trained[0], tmp_path): "holds no finished run",
    }.items():
        with pytest.raises(runs.RunError, match=message):
            runs.compare(wrong)
    with pytest.raises(runs.RunError, match="never overwritten"):
        runs.compare(trained, tmp_path / "compared")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_comparison_with_what_is_not_finite_says_so(value, trained, tmp_path, capsys):
    lost = trained[1].importance.copy(deep=True)
    lost["log_px"][[3, 7]] = value
    run = dataclasses.replace(trained[1], evidence={"importance": lost})
    compared = runs.compare([trained[0], run], tmp_path / "compared")
    (difference,) = compared.differences
    assert (math.isnan(difference.mean), difference.num_not_finite) == (True, 2)
    table = compared.table()
    assert "not reliable, log p(x) of 2 images is NaN or infinite" in table
    assert "nan" not in table
    written = json.loads((tmp_path / "compared" / "result.json").read_text())["differences"][str(run.path)]
    assert {name: written[name] for name in ("mean", "se", "mc_se", "num_not_finite")} == {
        **dict.fromkeys(("mean", "se", "mc_se")),
        "num_not_finite": 2,
    }


def test_a_study_says_which_contender_is_not_finite(trained, tmp_path):
    directories = {"a": [trained[0].path], "b": [tmp_path / "b"], "c": [trained[1].path]}
    shutil.copytree(trained[1].path, tmp_path / "b")
    with xr.open_datatree(trained[1].path / "evidence.nc") as tree:
        tree = tree.load()
    tree["importance"]["log_px"][3] = math.nan
    tree.to_netcdf(tmp_path / "b" / "evidence.nc")
    result = trained[1].result | {"test_log_likelihood": None, "validation_log_likelihood": None}
    (tmp_path / "b" / "result.json").write_text(json.dumps(result))
    summaries = studies.summarize(directories)
    assert studies.best_by_validation(summaries).name != "b"
    (_, told) = studies.choice(summaries)
    assert told.endswith("b: not reliable, it is NaN or infinite.")
    table = studies.summary_table(summaries)
    assert "nan" not in table
    assert "not finite" in next(line for line in table.splitlines() if line.startswith("| b"))
    studies.forest(summaries, tmp_path / "forest.png", "")
    studies.forest(summaries[:2], tmp_path / "lost.png", "")
    assert (tmp_path / "lost.png").exists()


@pytest.mark.parametrize("part", ["test", "annealed"])
def test_results_that_are_not_finite_keep_their_rows(part, trained, tmp_path, capsys):
    lost = {"test_log_likelihood": None, "num_not_finite": 7, "reliable": False} if part == "test" else {
        "annealed_log_likelihood": None, "annealed_mc_se": None, "annealed_images": 9, "annealed_num_not_finite": 2,
        "annealed_reliable": False, "annealed_share_reliable": 0.5,
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(trained[0].result | lost))
    runs.report_run(tmp_path)
    told = capsys.readouterr().out
    assert re.search(rf"\| log p\(x\), {'importance sampling' if part == 'test' else 'annealed'} +\| +- ", told)
    assert "not to be believed: it is no number" in told
    number = "7 importance sampling" if part == "test" else "2 annealed"
    assert re.search(rf"not finite +\| +{number}", told)
    assert math.isnan(runs.best(trained[0].result | lost)) if part == "annealed" else True


def test_the_forest_plot_is_arvizs_of_students_t(tmp_path, monkeypatch):
    """What it is given as draws has the quantiles of the interval."""
    import arviz as az
    from scipy import stats

    seen = {}
    plot = az.plot_forest
    monkeypatch.setattr(az, "plot_forest", lambda data, **more: seen.update(data=data) or plot(data, **more))
    runs.figures.paired_differences(
        {"runs/a": (0.3, 0.1, 3), "runs/b": (1.3, 0.2, 399)}, tmp_path / "forest.png", "title"
    )
    draws = seen["data"]
    draws = (draws if "difference" in draws else draws["posterior"])["difference"]
    for name, mean, error, freedom in (("runs/a", 0.3, 0.1, 3), ("runs/b", 1.3, 0.2, 399)):
        found = np.quantile(draws.sel(run=name).values, (0.025, 0.25, 0.5, 0.975))
        expected = mean + error * stats.t.ppf((0.025, 0.25, 0.5, 0.975), freedom)
        assert found == pytest.approx(expected, abs=2e-3)
    assert (tmp_path / "forest.png").stat().st_size > 1000


def test_a_study_takes_settings_made_in_python(tmp_path, monkeypatch):
    common = "--dataset Digits --encoder.hidden [8] --decoder.hidden [8] --latent_dim 2 --epochs 1 "
    common += "--evidence.num_samples 20 --evidence.num_images 60 --evidence.annealed_images 0"
    contenders = {"Normal": tiny(None, epochs=1, prior=priors.StandardNormal), "by arguments": "--prior Laplace"}
    done = runs.study(contenders, common, seeds=2, run_dir=tmp_path / "study")
    assert [each.name for each in done.summaries] == ["Normal", "by arguments"]
    assert [path.name for path in done.directories["Normal"]] == ["Normal-seed0", "Normal-seed1"]
    each = [runs.load(path) for paths in done.directories.values() for path in paths]
    assert [run.settings.seed for run in each] == [0, 1, 0, 1]
    paired = [
        b.importance["log_px"].values - a.importance["log_px"].values for a, b in zip(each[:2], each[2:], strict=True)
    ]
    assert done.summaries[1].differences == pytest.approx([d.mean() for d in paired])
    assert repr(runs.load_study(tmp_path / "study")) == repr(done.summaries)  # NaN is not equal to itself
    content = yaml.safe_load((tmp_path / "study" / "config.yaml").read_text())
    assert content["contenders"]["Normal"]["prior"]["class_path"] == "pyro_vae.priors.StandardNormal"
    assert content["contenders"]["by arguments"] == "--prior Laplace"
    monkeypatch.setattr("pyro_vae.runs.studies.train", lambda *settings: 1 / 0)
    again = runs.study(contenders, common, seeds=2, run_dir=tmp_path / "study", resume=True)
    assert repr(again.summaries) == repr(done.summaries)
    with pytest.raises(runs.RunError, match="--seeds must be at least 1"):
        runs.study(contenders, seeds=0)
    with pytest.raises(runs.RunError, match=r"^a: --prior: <function .* cannot be written"):
        runs.study({"a": tiny(None, prior=lambda dim: None)}, run_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


# The command


def command(*argv, cwd, code=None):
    start = [sys.executable, "-m", "pyro_vae"] if code is None else [sys.executable, "-c", code]
    return subprocess.run(
        [*start, *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_command_lists_its_commands(capsys):
    known = "train, evaluate, classify, compare, study, report, explore, export, push, "
    known += "score, embed, sample, reconstruct, impute"
    for argv in ([], ["--help"], ["-h"]):
        cli.main(argv)
        text = capsys.readouterr().out
        assert all(re.search(rf" {name}\b", text) for name in known.split(", "))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: unknown command fit: choose {known}\n"


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "study"])
def test_help_of_every_command_is_short(name, capsys):
    lengths = []
    for option in ("--help", "--help.all"):
        with pytest.raises(SystemExit) as caught:
            cli.main([name, option])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "--run_dir" in text
        assert f"pyro-vae {name}" in text
        lengths.append(len(text.splitlines()))
    assert lengths[0] < 60
    assert lengths[0] <= lengths[1]


def test_commands_work_on_runs(trained, tmp_path, capsys):
    scored = cli.evaluate([str(trained[0].path), "--estimator=importance", "--num_images=10", "--name=here"])
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == str(scored.path)
    assert f"{scored.result['log_likelihood']:.3f}" in out
    compared = cli.compare([*(str(run.path) for run in trained), f"--run_dir={tmp_path / 'compared'}"])
    assert compared.table() in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "compared" / "config.yaml").read_text())["runs"] == [str(r.path) for r in trained]


def test_the_command_runs_a_study_of_any_contenders(tmp_path, capsys):
    tiny = "--dataset Digits --encoder.hidden [8] --decoder.hidden [8] --latent_dim 2 --epochs 1 "
    tiny += "--evidence.num_samples 20 --evidence.num_images 60 --evidence.annealed_images 0"
    argv = ["--contenders.one", "--prior StandardNormal", "--contenders.two=--prior Laplace", f"--common={tiny}"]
    done = cli.study([*argv, "--seeds=1", f"--run_dir={tmp_path / 'study'}"])
    assert [each.name for each in done.summaries] == ["one", "two"]
    assert f"{done.summaries[1].difference:+.2f}" in capsys.readouterr().out
    assert (tmp_path / "study" / "result.json").exists()
    with pytest.raises(runs.RunError, match="--contenders"):
        cli.study([f"--run_dir={tmp_path / 'none'}"])


def test_a_mistake_of_the_command_and_an_old_name_are_a_line_each(tmp_path):
    done = command("train", "--prior", "LaplacePrior", "--epochs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "DeprecationWarning: --prior LaplacePrior is now pyro_vae.priors.Laplace",
        "error: --epochs must be at least 1, got 0",
    ]


# What is missing


def test_a_missing_extra_is_one_line(tmp_path):
    hidden = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda name, *a: None if name == 'arviz' "
    hidden += "else f(name, *a); from pyro_vae import cli; cli.main()"
    done = command("train", "--epochs", "1", cwd=tmp_path, code=hidden)
    line = "pyro-vae needs the extra 'runs': pip install -e '.[runs]' in its checkout (missing: arviz)"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
    with pytest.raises(
        MissingExtra, match=r"pip install -e '\.\[runs\]' in its checkout \(missing: no_such, neither\)"
    ):
        need_extra("runs", ["json", "no_such", "neither"])


# Old names of commands


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_old_commands_forward_with_a_line_that_says_the_new_one(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert end.value.code in (0, None)
    told = capsys.readouterr()
    assert told.err == f"DeprecationWarning: python -m experiments.{name} is now pyro-vae {name}\n"
    assert f"pyro-vae {name}" in told.out


def test_old_imports_forward_with_a_warning(trained):
    from experiments import svi_mnist

    with pytest.warns(DeprecationWarning, match=r"load_run\(directory\) is now pyro_vae.runs.load\(directory\).model"):
        load_run = svi_mnist.load_run
    assert isinstance(load_run(trained[0].path), VAE)
    with pytest.warns(DeprecationWarning, match="experiments.datasets is now pyro_vae.data"):
        from experiments import datasets
    assert datasets.Digits is Digits
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        svi_mnist.no_such  # noqa: B018


def test_out_is_run_dir(trained, tmp_path):
    for argv in (["--out", str(tmp_path / "a")], [f"--out={tmp_path / 'a'}"]):
        with pytest.warns(DeprecationWarning, match="--out is now --run_dir"):
            settings, _ = runs.parse(runs.EvaluationSettings, [f"--run={trained[0].path}", *argv])
        assert settings.run_dir == tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs.parse(runs.EvaluationSettings, [f"--run={trained[0].path}", f"--run_dir={tmp_path}"])


def test_parts_of_ones_own_are_found_in_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_parts.py").write_text("from pyro_vae import StandardNormal\nclass Mine(StandardNormal): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = list(sys.path)
    options = "--dataset Digits --epochs 1 --evidence.num_samples 2 --evidence.annealed_images 0 --run_dir run"
    cli.main(["train", "--prior", "my_own_parts.Mine", *options.split()])
    assert sys.path == before
    assert "class_path: my_own_parts.Mine" in Path("run/config.yaml").read_text()
