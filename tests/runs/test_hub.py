"""Runs on the Hugging Face Hub, which a directory stands in for: what is pushed, what is read back, what is refused."""

import hashlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from pyro_vae import cli, runs
from pyro_vae.runs import hub
from pyro_vae.runs.hub import FILES, home_of, is_downloaded, named, reason_without_secrets

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
HfApi, snapshot_download = huggingface_hub.HfApi, huggingface_hub.snapshot_download

TABLE = "a,b,kind\n" + 20 * "1.5,2.0,x\n1.0,2.2,y\n2.0,2.3,z\n"
MINUTE = [
    *("--engine=pyro", "--epochs=1", "--encoder.hidden=[4]", "--decoder.hidden=[4]", "--latent_dim=2", "--device=cpu"),
    *("--evidence.num_samples=5", "--evidence.num_images=4", "--evidence.annealed_images=0", "--report=false"),
]


class StandIn:
    """The Hub as a folder, with the commits of each repository in folders as in the cache of huggingface_hub.

    What it is called with must be what the real one takes.
    """

    def __init__(self, root):
        self.root, self.repos, self.asked = root, {}, []

    def heard(self, function, *args, **kwargs):
        inspect.signature(function).bind(*args, **kwargs)

    def api(self, **kwargs):
        self.heard(HfApi, **kwargs)
        return self

    def create_repo(self, repo, **kwargs):
        self.heard(HfApi.create_repo, None, repo, **kwargs)
        self.repos.setdefault(repo, SimpleNamespace(private=kwargs["private"], commits=[]))

    def repo_info(self, repo):
        found = self.repos[repo]
        names = [each.name for each in self.folder(repo, found.commits[-1]).iterdir()] if found.commits else []
        siblings = [SimpleNamespace(rfilename=name) for name in [".gitattributes", *names]]
        return SimpleNamespace(private=found.private, siblings=siblings, sha=found.commits[-1] if names else "0" * 40)

    def create_commit(self, repo, operations, **kwargs):
        self.heard(HfApi.create_commit, None, repo, operations, **kwargs)
        before = self.repo_info(repo)
        assert kwargs["parent_commit"] == before.sha
        content = {each.rfilename: None for each in before.siblings}
        files = {p.name: p.read_bytes() for p in self.folder(repo, before.sha).glob("*") if p.name in content}
        for each in operations:
            if isinstance(each, huggingface_hub.CommitOperationAdd):
                files[each.path_in_repo] = each.path_or_fileobj
            else:
                del files[each.path_in_repo]
        oid = hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
        self.folder(repo, oid).mkdir(parents=True)
        for name, each in files.items():
            (self.folder(repo, oid) / name).write_bytes(each)
        self.repos[repo].commits.append(oid)
        return SimpleNamespace(oid=oid)

    def folder(self, repo, commit):
        return self.root / f"models--{repo.replace('/', '--')}" / "snapshots" / commit

    def snapshot_download(self, repo, **kwargs):
        self.heard(snapshot_download, repo, **kwargs)
        assert kwargs["allow_patterns"] == list(FILES)
        self.asked.append((repo, kwargs["revision"]))
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        if repo not in self.repos:
            raise errors.RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found for url", response=response)
        commits = self.repos[repo].commits
        if kwargs["revision"] not in (None, *commits):
            raise errors.RevisionNotFoundError("404 Client Error.", response=response)
        return str(self.folder(repo, kwargs["revision"] or commits[-1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on a table."""
    place = tmp_path_factory.mktemp("hub")
    (place / "own.csv").write_text(TABLE)
    argv = ["--dataset=Table", f"--dataset.path={place}/own.csv", f"--data_dir={place}", f"--run_dir={place}/run"]
    return cli.train([*MINUTE, *argv])


@pytest.fixture
def there(tmp_path, monkeypatch):
    there = StandIn(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", there.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", there.snapshot_download)
    return there


def refused(function, *args, **kwargs):
    with pytest.raises(runs.RunError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_comes_back_as_it_was_without_its_data_and_folders(made, there):
    place = runs.push_to_hub(made, "me/tables", license="MIT")
    (commit,) = there.repos["me/tables"].commits
    assert place == f"hf://me/tables@{commit}"
    assert there.repos["me/tables"].private
    folder = there.folder("me/tables", commit)
    assert {each.name for each in folder.iterdir()} == {*FILES, "README.md"}
    for each in folder.iterdir():
        assert str(made.path.parent).encode() not in each.read_bytes(), each.name
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert 'run = runs.load("hf://me/tables")  # ' in card
    run = runs.load("hf://me/tables")
    assert (run.trust, run.name) == (False, place)
    assert run.result == made.result
    weights = made.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.state_dict().items())
    rows = pd.DataFrame({"a": [1.5, 1.0], "b": [2.0, 2.1], "kind": ["x", "z"]})
    assert torch.equal(run.encode(rows), made.encode(rows))
    assert not runs.difference_of(run, made).mean
    assert runs.load(place).path == Path(folder)
    assert there.asked == [("me/tables", None), ("me/tables", commit)]


@pytest.mark.slow
def test_nothing_is_pushed_over_or_made_public_unless_that_was_said(made, there):
    runs.push_to_hub(made, "me/a", private=False)
    assert "is public: --private false" in refused(runs.push_to_hub, made, "me/a")
    assert "holds files already: --replace true" in refused(runs.push_to_hub, made, "me/a", private=False)
    first = there.repos["me/a"].commits[0]
    (there.folder("me/a", first) / "notes.txt").write_text("mine")
    runs.push_to_hub(made, "me/a", private=False, license="mit", replace=True)
    assert (there.folder("me/a", there.repos["me/a"].commits[1]) / "notes.txt").read_text() == "mine"
    assert "expected an identifier" in refused(runs.push_to_hub, made, "me/b", license="do what you like")
    assert set(there.repos) == {"me/a"}


@pytest.mark.slow
def test_commands_take_names_and_write_nothing_into_the_cache(made, there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["push", str(made.path), "me/a", "--license", "mit"])
    assert "Read it back with: runs.load('hf://me/a')" in capsys.readouterr().out
    before = sorted(there.root.rglob("*"))
    (tmp_path / "own.csv").write_text(TABLE)
    cli.main(["score", "hf://me/a", "own.csv", "--estimator", "importance", "--num_samples", "5", "--out", "scores.nc"])
    cli.main(["report", "hf://me/a", "--out", "page.html"])
    assert "hf://me/a@" in (tmp_path / "page.html").read_text()
    cli.main(["compare", "hf://me/a", str(made.path)])
    assert f"hf://me/a@{there.repos['me/a'].commits[0]}" in capsys.readouterr().out
    for argv in (["evaluate", "hf://me/a"], ["report", "hf://me/a"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "was downloaded, and nothing is written there" in capsys.readouterr().err
    scoring = ["--estimator", "importance", "--num_samples", "5", "--num_images", "4", "--workers", "1"]
    cli.main(["evaluate", "hf://me/a", *scoring, "--run_dir", "scored"])
    assert json.loads((tmp_path / "scored" / "result.json").read_text())["run"].startswith("hf://me/a@")
    assert sorted(there.root.rglob("*")) == before


def test_code_of_others_is_not_run_unless_that_is_said(made, there, tmp_path, monkeypatch):
    runs.push_to_hub(made, "me/a")
    folder = there.folder("me/a", there.repos["me/a"].commits[0])
    (tmp_path / "strange.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"encoder": {"class_path": "strange.Net"}}))
    assert "strange.Net is no class of pyro_vae" in refused(runs.load, "hf://me/a")
    assert "strange.Net is no class of pyro_vae" in refused(runs.load, folder)  # the cache is named
    assert "strange.Net is no class of pyro_vae" in refused(runs.load_settings, folder)
    assert "strange.Net is no class of pyro_vae" in refused(runs.score, "hf://me/a", run_dir=tmp_path / "new")
    run = runs.load("hf://me/a", trust=True)
    with pytest.raises(SystemError, match="imported"):
        _ = run.settings


def test_every_command_on_a_run_trusts_as_its_place_says():
    settings = [each for each in vars(runs).values() if inspect.isclass(each) and each.__name__.endswith("Settings")]
    settings += [each for each, _ in __import__("pyro_vae.runs.new_data").runs.new_data.COMMANDS.values()]
    taking = [each for each in settings if {"run", "runs"} & set(inspect.signature(each).parameters)]
    assert len(taking) >= 9
    for each in taking:
        trust = inspect.signature(each).parameters.get("trust")
        assert trust is None or trust.default is None, each


WRONG = [
    ("hf://me", "hf://me: expected USER/NAME"),
    ("hf://me/a/b", "hf://me/a/b: expected USER/NAME"),
    ("hf://me/..", "expected USER/NAME"),
    ("hf://me/a@", "hf://me/a@: expected a branch, a tag or a commit after @"),
    ("hf://me/none", "hf://me/none: there is no such repository, or it is private: then log in with 'hf auth login'"),
    ("hf://me/a@" + 40 * "1", "it has no such revision"),
]


@pytest.mark.parametrize(("name", "words"), WRONG)
def test_names_of_nothing(there, name, words):
    there.create_repo("me/a", private=True)
    for load in (runs.load, runs.load_model, lambda run: runs.score(run, run_dir="new")):
        assert words in refused(load, name)


def test_only_runs_are_read_from_the_hub(made, there):
    with pytest.raises(SystemExit):
        cli.main(["train", "--run_dir", "hf://me/a"])
    with pytest.raises(runs.RunError, match="--data_dir: only runs are read from the Hugging Face Hub"):
        cli.train(["--data_dir", "hf://me/a"])


def test_what_the_network_does_is_one_line(made, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    away = SimpleNamespace(create_repo=lambda *a, **k: (_ for _ in ()).throw(OSError("no route, hf_secret\nat all")))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **kwargs: away)
    assert refused(runs.push_to_hub, made, "me/a") == "hf://me/a: OSError: no route, *** at all"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "cannot be reached, and it was not downloaded before" in refused(runs.load, "hf://me/a")
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    for argv in (["push", str(made.path), "me/a"], ["sample", "hf://me/a"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "pip install -e '.[hub]' in its checkout (missing: huggingface_hub)" in capsys.readouterr().err


def fail(*args, **kwargs):
    raise errors.LocalEntryNotFoundError("Got: ConnectError\nPlease check")


def test_secrets_are_not_told(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc123")
    error = ValueError("https://me:word@host/x?key=abc123\n" + "long " * 100)
    told = reason_without_secrets(error)
    assert told.startswith("ValueError: https://host/x?key=*** long")
    assert len(told) <= 300


def test_places_in_the_cache_have_names(tmp_path):
    folder = tmp_path / "models--me--a--b" / "snapshots" / ("1" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert (is_downloaded(folder), is_downloaded(tmp_path / "link"), is_downloaded(tmp_path)) == (True, True, False)
    assert named(tmp_path) == str(tmp_path)
    assert home_of(tmp_path) == tmp_path
    assert not hub.is_on_hub("hf/a")
