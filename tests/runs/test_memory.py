"""A run remembers what it was trained on, and by what it is chosen."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae import cli, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.data.images import fingerprint
from pyro_vae.data.own import Npz
from pyro_vae.errors import RunError
from pyro_vae.runs import memory
from pyro_vae.runs.studies import Summary, best_by_validation, choice, summary_table

QUICK = [
    *("--encoder.hidden=[4]", "--decoder.hidden=[4]", "--latent_dim=2", "--epochs=2", "--device=cpu"),
    *("--evidence.num_samples=30", "--evidence.annealed_images=0"),
]
OLD = Path(__file__).parent / "data" / "0.1.0"


def save(path, seed=0, change=0):
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(0, 256, (size, 4, 4), dtype=np.uint8) for size in (40, 20))
    test[3, 1, 1] += change
    np.savez(path, train=train, test=test)


def dataset(path):
    return Npz(Path("unused"), path)


def load(path):
    return dataset(path).load()


def test_a_fingerprint_is_of_the_content(tmp_path):
    for name in ("one", "two", "three", "four"):
        save(tmp_path / f"{name}.npz", seed=name == "three", change=name == "four")
    first, same, other, changed = (load(tmp_path / f"{n}.npz").fingerprint for n in ("one", "two", "three", "four"))
    assert first == same
    assert len({first, other, changed}) == 3
    content = dict(np.load(tmp_path / "one.npz"))
    np.savez(
        tmp_path / "wide.npz", **{name: np.asfortranarray(each.astype(np.int64)) for name, each in content.items()}
    )
    assert load(tmp_path / "wide.npz").fingerprint == first
    np.savez(tmp_path / "labels.npz", **content, train_labels=np.zeros(40, int), test_labels=np.zeros(20, int))
    assert load(tmp_path / "labels.npz").fingerprint != first


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros(2), None),
        (np.arange(3), torch.arange(4)),
    ],
)
def test_fingerprints_differ(first, second):
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(first.copy())


def test_fingerprints_do_not_depend_on_the_machine():
    assert Digits(Path("unused")).load().fingerprint == "c5f6c48255e292f5"


def test_other_data_are_refused(tmp_path):
    path, run_dir = tmp_path / "x.npz", tmp_path / "run"
    run_dir.mkdir()
    save(path)
    memory.remember(run_dir, dataset(path), load(path))
    memory.check_same_data(run_dir, dataset(path), load(path))
    save(path, change=1)
    with pytest.raises(
        RunError, match=rf"^--resume: {run_dir} was trained on other data than {path} holds now"
    ) as caught:
        memory.check_same_data(run_dir, dataset(path), load(path), "--resume: ")
    assert "\n" not in str(caught.value)


def test_a_relative_path_is_kept_absolute(tmp_path, monkeypatch):
    home, run_dir = tmp_path / "home", tmp_path / "run"
    for folder in (home, run_dir, tmp_path / "elsewhere"):
        folder.mkdir()
    save(home / "x.npz")
    monkeypatch.chdir(home)
    memory.remember(run_dir, dataset("x.npz"), load("x.npz"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = dataset("x.npz")
    memory.find_again(run_dir, again)
    assert again.path == home / "x.npz"
    shutil.move(home / "x.npz", tmp_path / "elsewhere" / "x.npz")  # taken along
    again = dataset("x.npz")
    memory.find_again(run_dir, again)
    assert again.path == Path("x.npz")
    memory.check_same_data(run_dir, again, again.load())
    absolute = dataset(tmp_path / "elsewhere" / "x.npz")
    memory.find_again(run_dir, absolute)
    assert absolute.path == tmp_path / "elsewhere" / "x.npz"


def test_runs_of_earlier_versions_do_not_know(tmp_path):
    for name in ("vae", "interrupted"):
        memory.find_again(OLD / name, Digits(Path("unused")))
        memory.check_same_data(OLD / name, Digits(Path("unused")), Digits(Path("unused")).load())


@pytest.mark.slow
def test_a_run_refuses_other_data_everywhere(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    save("x.npz")
    argv = ["--dataset=Npz", "--dataset.path=x.npz", *QUICK, f"--run_dir={tmp_path / 'run'}"]
    run = cli.train(argv)
    assert run.result["data"] == json.loads((tmp_path / "run" / "data.json").read_text())["fingerprint"]
    assert math.isfinite(run.result["validation_elbo"])
    assert run.result["validation_log_likelihood"] > run.result["validation_elbo"]
    assert run.result["num_validation_images"] == 4
    monkeypatch.chdir(elsewhere)
    assert len(runs.load(tmp_path / "run").data.test) == 20
    scored = runs.score(tmp_path / "run", estimator="importance", num_samples=30, device="cpu")
    assert scored.result["num_images"] == 20
    (tmp_path / "run" / "result.json").rename(tmp_path / "result.json")
    save(home / "x.npz", change=1)
    words = "was trained on other data than .*x.npz holds now"
    with pytest.raises(RunError, match=f"^--resume: .*{words}"):
        cli.train([f"--run_dir={tmp_path / 'run'}", "--resume"])
    (tmp_path / "result.json").rename(tmp_path / "run" / "result.json")
    with pytest.raises(RunError, match=words):
        runs.score(tmp_path / "run", name="again", device="cpu")
    assert not (tmp_path / "run" / "evaluations" / "again").exists()
    again = runs.load(tmp_path / "run")
    assert again.model.likelihood.head.event_size == 16  # needs no data
    with pytest.raises(RunError, match=words):
        print(again.data)
    os.remove(tmp_path / "run" / "data.json")
    monkeypatch.chdir(home)
    with pytest.raises(RunError, match=words):  # result.json knows it too
        print(runs.load(tmp_path / "run").data)


def summary(name, validation, test=0.0, reference="first"):
    fixed = {"unit": "nats", "elbo": 0.0, "estimator": "importance", "importance_sampled": 0.0, "seed_error": 0.1}
    more = {"differences": [0.0], "difference": 0.0, "difference_seed_error": 0.1, "difference_image_error": 0.1}
    rest = {"share_khat": 0.0, "active_units": 1.0, "seconds": 1.0, "bits_per_dim": None, "validation": validation}
    return Summary(name=name, reference=reference, log_likelihood=test, **fixed, **more, **rest)


def test_contenders_are_chosen_by_validation_data():
    known = [summary("first", -3.0, test=9.0), summary("second", -2.0, test=-9.0), summary("other", 5.0, 0.0, "other")]
    assert best_by_validation(known).name == "second"
    assert "validation" in summary_table(known[:2]).splitlines()[0]
    of_three = {"differences": [0.0] * 3, "validation_seed_error": 0.1, "validation_error": 0.0}
    three = [each._replace(**of_three) for each in known[:2]]  # the t quantile of two degrees of freedom is 4.303
    assert "first is 1.00 nats lower, +- 0.61 (95 %)." in choice(three)[1]
    near = [three[0], three[1]._replace(validation=-2.5)]
    assert "first is 0.50 nats lower, +- 0.61 (95 %): that is within its error." in choice(near)[1]
    assert "was not kept" in choice(known[:2])[1]
    assert three[0].margin() == pytest.approx(math.hypot(0.4303, 0.196), abs=1e-3)
    old = [summary("first", math.nan)]
    assert "validation" not in summary_table(old)
    with pytest.raises(RunError, match="no run of this study has validation numbers"):
        best_by_validation(old)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 0", "seed: 1", "--seed 0, not 1"),
        ("batch_size: 256", "batch_size: 20", "--batch_size 256, not 20"),
        ("StandardNormal", "GaussianMixture", "--prior"),
        ("pyro.infer.Trace_ELBO", "pyro_vae.objectives.IWAE", "--objective"),
        ("binarization_seed: 777", "binarization_seed: 778", "--dataset.binarization_seed 777, not 778"),
    ],
)
def test_a_run_whose_settings_were_edited_is_not_gone_on_with(tmp_path, monkeypatch, old, new, words):
    run_dir = tmp_path / "run"
    monkeypatch.setattr("pyro_vae.runs.training.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    argv = ["train", "--dataset=Digits", *QUICK, "--epochs=1", f"--run_dir={run_dir}"]
    with pytest.raises(SystemExit):
        cli.main(argv)
    config = run_dir / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    before = (run_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError, match=words):
        runs.train(*runs.parse(runs.Settings, [f"--run_dir={run_dir}", "--resume"]))
    assert (run_dir / "checkpoint.pt").read_bytes() == before
