"""Searches: what is tried, that it depends on seed and trial alone, that validation chooses, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import yaml

from pyro_vae import cli, runs
from pyro_vae.errors import MissingExtra
from pyro_vae.runs import searching, trials
from pyro_vae.runs.spaces import grid, options, read_space

COMMON = "--dataset Digits --encoder.hidden [4] --decoder.hidden [4] --latent_dim 2 --epochs 1 --device cpu"
SPACE = {"lr": "loguniform(1e-4, 1e-2)", "latent_dim": "int(2, 5)", "schedule": "[one_cycle, constant]"}


def settings(search="random", space=SPACE, **more):
    more = {"trials": 5} | more if search != "grid" else more
    return runs.SearchSettings(search, space, COMMON, **more)


def test_a_grid_has_all_combinations_parts_before_their_options():
    space = {"prior.components": "[5, 10]", "lr": "[1e-3, 0.01, .1]", "encoder.hidden": "[[8], [8, 8]]"}
    made = grid(read_space(space))
    assert len(made) == 12
    assert len({json.dumps(each, sort_keys=True) for each in made}) == 12
    assert list(made[0]) == ["lr", "prior.components", "encoder.hidden"]
    assert {each["encoder.hidden"] for each in made} == {"[8]", "[8, 8]"}
    assert {each["lr"] for each in made} == {"1e-3", "0.01", "0.1"}
    run, _ = runs.parse(runs.Settings, ["--prior=GaussianMixture", *options(made[0])])
    assert (run.lr, run.prior.keywords["components"], run.encoder.keywords["hidden"]) == (1e-3, 5, [8])


def test_a_value_may_bring_options_of_its_own():
    argv = options({"prior": "GaussianMixture --prior.components 7", "dataset.path": "my file.csv"})
    assert argv == ["--prior=GaussianMixture", "--prior.components", "7", "--dataset.path=my file.csv"]


def test_draws_depend_on_seed_trial_and_name_alone():
    few, many = settings(), settings(trials=400)
    drawn = [trials.chosen(many, None, i) for i in range(400)]
    assert [trials.chosen(few, None, i) for i in (3, 1)] == [drawn[3], drawn[1]]
    alone = settings(space={"lr": SPACE["lr"]})
    assert trials.chosen(alone, None, 2)["lr"] == drawn[2]["lr"]
    assert trials.chosen(settings(seed=1), None, 2) != drawn[2]
    lr = np.log10([float(each["lr"]) for each in drawn])
    assert lr.min() > -4
    assert lr.max() < -2
    assert abs(lr.mean() + 3) < 4 * 2 / math.sqrt(12 * 400)  # uniform in the logarithm
    counts = [sum(each["latent_dim"] == str(k) for each in drawn) for k in range(2, 6)]
    assert sum(counts) == 400
    assert max(abs(count - 100) for count in counts) < 4 * math.sqrt(75)
    assert {each["schedule"] for each in drawn} == {"one_cycle", "constant"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--search=grid"], "--search needs a space: --space.NAME"),
        (["--search=random", "--space.lr=uniform(1e-4, 1e-2)"], "--search random needs --trials"),
        (
            ["--search=random", "--space.lr=uniform(1e-4, 1e-2)", "--trials=0"],
            "--trials must be from 1 to 10,000, got 0",
        ),
        (["--search=grid", "--space.lr=[1e-3]", "--trials=3"], "--trials is for --search random and optuna"),
        (["--search=grid", "--space.lr=[]"], "--space.lr: the list is empty"),
        (["--search=grid", "--space.lr="], "--space.lr: the value is empty"),
        (["--search=grid", "--space.lr=[1e-3, 1e-3]"], "--space.lr: a value is listed twice"),
        (["--search=grid", "--space.lr=1e-3"], "--space.lr: expected a list such as"),
        (["--search=grid", "--space.lr=[1e-3"], "--space.lr: while parsing"),
        (["--search=grid", "--space.lr=uniform(0, 1)"], "--space.lr: a grid needs a list of values, not uniform"),
        (["--search=random", "--space.lr=uniform(1e-2, 1e-4)", "--trials=2"], "must go from a lower to a higher"),
        (["--search=random", "--space.lr=uniform(1, .nan)", "--trials=2"], "must go from a lower to a higher"),
        (["--search=random", "--space.lr=loguniform(0, 1)", "--trials=2"], "loguniform needs positive numbers, got 0"),
        (["--search=random", "--space.lr=uniform(1)", "--trials=2"], "--space.lr: uniform takes two numbers"),
        (["--search=random", "--space.lr=uniform(a, b)", "--trials=2"], "--space.lr: uniform takes two numbers"),
        (["--search=random", "--space.epochs=int(1, 2.5)", "--trials=2"], "--space.epochs: int takes whole numbers"),
        (["--search=random", "--space.lr=normal(0, 1)", "--trials=2"], r"one of uniform, .*, got 'normal\(...\)'"),
        (["--search=grid", "--space.run_dir=[a]"], "--space.run_dir: a search is over what a run is"),
        (["--search=grid", "--space.evidence.num_samples=[1, 2]"], "--space.evidence.num_samples: a search is over"),
        (["--search=grid", f"--space.lr={list(range(1, 200))}", f"--space.seed={list(range(99))}"], "19,701 trials"),
        (["--search=grid", "--space.lrr=[1, 2]"], r"unknown option --lrr \(did you mean --lr\?\)"),
        (["--search=grid", "--space.lr=[1e-3, -1]"], "--space: lr -1: --lr must be positive and finite"),
        (["--search=grid", "--space.prior=[StandardNormal, Nope]"], "--space: prior Nope: --prior: 'Nope' is no known"),
        (
            ["--search=grid", "--space.prior=[StandardNormal, GaussianMixture --prior.components 0]"],
            "--space: prior GaussianMixture --prior.components 0: --prior: components must be at least 1, got 0",
        ),
        (
            ["--search=grid", "--space.dataset.binarization=[dynamic, threshold]"],
            "are scored in other units, or on other data",
        ),
        (["--search=random", "--space.epochs=int(0, 5)", "--trials=300"], "epochs 0: --epochs must be at least 1"),
        (["--search=genetic", "--space.lr=[1e-3]"], "--search: expected one of"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(searching, "do_all", lambda *_: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", f"--run_dir={tmp_path / 'search'}", f"--common={COMMON}", *argv])
    assert ended.value.code == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: ")
    assert re.search(message, said), said
    assert not (tmp_path / "search").exists()


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[search\]' in its checkout"):
        runs.search("optuna", {"lr": [1e-3]}, COMMON, trials=1, run_dir=tmp_path / "search")
    assert not (tmp_path / "search").exists()


@pytest.fixture
def played(monkeypatch):
    """Runs that are not trained: their validation value is best at ``lr`` 1e-3, their test value where it is worst."""
    ran = []

    def play(run, text):
        ran.append(run)
        distance = abs(math.log10(run.lr) + 3)
        if run.seed == 13:
            raise runs.RunError("bad luck")
        run.run_dir.mkdir()
        (run.run_dir / "config.yaml").write_text(text)
        values = {"validation_elbo": -distance, "validation_log_likelihood": -distance, "test_log_likelihood": distance}
        values |= {"validation_log_likelihood_se": 0.1, "train_seconds": 1.0, "unit": "nats per image"}
        values |= {"device": "cpu", "versions": {}, "commit": None, "validation_reliable": True}
        if run.seed == 14:
            values["validation_log_likelihood"] = None
        (run.run_dir / "result.json").write_text(json.dumps(values))

    class Played:
        def __init__(self, directory):
            self.result = json.loads((directory / "result.json").read_text())

    monkeypatch.setattr(searching, "train", play)
    for module in (searching, trials):
        monkeypatch.setattr(module, "load", Played)
    return ran


@pytest.mark.slow
def test_validation_chooses_and_the_test_value_is_that_of_the_chosen_alone(tmp_path, played, capsys):
    space = {"seed": ["0 --lr 0.1", "1 --lr 1e-3", 13, 14]}
    done = runs.search("grid", space, COMMON, run_dir=tmp_path / "search")
    assert done.best.values == {"seed": "1 --lr 1e-3"}
    assert [each.name for each in done.trials] == [f"trial-000{i}" for i in (1, 0, 2, 3)]
    assert done.trials[2].reason == "bad luck"
    content = json.loads((tmp_path / "search" / "result.json").read_text())
    assert content["best"]["test_log_likelihood"] == 0
    assert all(not any("test" in name for name in each) for each in content["trials"])
    table = (tmp_path / "search" / "table.md").read_text()
    assert "2 have no validation value" in table
    assert "validation_log_likelihood is not finite" in table
    # what is finished is not run again, what failed is; more trials are not of a grid
    played.clear()
    runs.search("grid", space, COMMON, run_dir=tmp_path / "search", resume=True)
    assert [run.seed for run in played] == [13]
    with pytest.raises(runs.RunError, match="was run with another --space"):
        runs.search("grid", {"seed": [0]}, COMMON, run_dir=tmp_path / "search", resume=True)


def test_a_search_without_any_value_fails(tmp_path, played):
    with pytest.raises(runs.RunError, match=r"all 1 trials failed; trial-0000: bad luck"):
        runs.search("grid", {"lr": [0.1]}, COMMON + " --seed 13", run_dir=tmp_path / "search")


def test_optuna_looks_where_validation_is_good(tmp_path, played):
    """Of twenty trials the best are at 1e-3; the next six are nearer to it than draws are."""
    pytest.importorskip("optuna", reason="needs the extra search")
    more = settings("optuna", {"lr": "loguniform(1e-6, 1)", "schedule": SPACE["schedule"]}, trials=26)
    for number, name in enumerate(more.names()[:20]):
        log_lr = -6 + 6 * number / 19
        runs.write_json(tmp_path / f"{name}.json", {"lr": 10**log_lr, "schedule": number % 2})
        (tmp_path / name).mkdir()
        runs.write_json(tmp_path / name / "result.json", {"validation_log_likelihood": -abs(log_lr + 3)})
    (tmp_path / "trials").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "trials" / path.name)
    asked = [trials.chosen(more, tmp_path, number) for number in range(20, 26)]
    assert np.mean([abs(math.log10(float(each["lr"])) + 3) for each in asked]) < 0.8  # of draws: 1.5
    assert trials.chosen(more, tmp_path, 21) == asked[1]  # what was asked for stays
    (tmp_path / "trials" / "trial-0003.json").write_text('{"lr": 7, "schedule": 0}')
    with pytest.raises(runs.RunError, match=r"trial-0003.json is damaged: lr 7 is not in the space; delete it"):
        trials.chosen(more, tmp_path, 3)


def test_more_trials_go_on_with_a_search(tmp_path, played):
    pytest.importorskip("optuna", reason="needs the extra search")
    first = runs.search("optuna", {"lr": SPACE["lr"]}, COMMON, trials=1, run_dir=tmp_path / "search")
    again = runs.search("optuna", {"lr": SPACE["lr"]}, COMMON, trials=3, run_dir=tmp_path / "search", resume=True)
    assert len(played) == 3
    assert yaml.safe_load((tmp_path / "search" / "config.yaml").read_text())["trials"] == 3
    assert {each.name: each.values for each in again.trials}["trial-0000"] == first.best.values


@pytest.mark.slow
def test_a_search_of_two_workers_is_that_of_one(tmp_path):
    more = {"trials": 3, "seed": 4, "by": "validation_elbo"}
    common = COMMON + " --evidence.num_samples 2 --evidence.annealed_images 0"
    two = runs.search("random", SPACE, common, workers=2, run_dir=tmp_path / "two", **more)
    one = runs.search("random", SPACE, common, run_dir=tmp_path / "one", **more)
    assert [each.name for each in two.trials] == [each.name for each in one.trials]
    assert two.best.validation == pytest.approx(one.best.validation, abs=1e-4)
    assert runs.load(tmp_path / "one" / one.best.name).result["validation_elbo"] == one.best.validation
