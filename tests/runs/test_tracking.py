"""Runs that are logged elsewhere, too: what is sent, that nothing else changes or is lost."""

import csv
import json
import random
import re
import struct

import pytest
import torch

from pyro_vae import cli
from pyro_vae.errors import MissingExtra
from pyro_vae.runs import tracking, training
from pyro_vae.runs.settings import Settings

TABLE = "a,b\n" + 20 * "1.5,2.0\n1.0,2.2\n2.0,2.3\n"
SHORT = [
    *("--engine=pyro", "--epochs=3", "--encoder.hidden=[4]", "--decoder.hidden=[4]", "--latent_dim=2", "--device=cpu"),
    *("--evidence.num_samples=5", "--evidence.num_images=4", "--evidence.annealed_images=0", "--report=false"),
]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def train(tmp_path):
    (tmp_path / "own.csv").write_text(TABLE)

    def function(name, *more):
        return cli.train([*SHORT, f"--dataset.path={tmp_path}/own.csv", f"--run_dir={tmp_path}/{name}", *more])

    SHORT[:] = [each for each in SHORT if not each.startswith("--dataset=")] + ["--dataset=Table"]
    return function


class StandIn:
    """A service that keeps what it is told, and draws random numbers in between; while it is away it raises."""

    begun, told, away = (), (), False

    def __init__(self, run_dir, project, identity, settings):
        if self.away:
            raise ConnectionError(f"https://me:word@host is away, {KEY}\nfor ever")
        StandIn.begun = (*StandIn.begun, (project, identity, settings["latent_dim"]))
        self.identity, self.place = identity or "run-1", "somewhere"

    def send(self, news):
        torch.rand(3), random.random()
        StandIn.told = (*StandIn.told, news)
        if self.away:
            raise ConnectionError("gone")


@pytest.fixture
def service(monkeypatch):
    for name in ("begun", "told"):
        monkeypatch.setattr(StandIn, name, ())
    monkeypatch.setattr(StandIn, "away", False)
    monkeypatch.setattr(tracking, "SERVICES", {"wandb": ("A service", StandIn)})
    monkeypatch.setattr(tracking, "need_extra", lambda *_: None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return StandIn


def history(run):
    return list(csv.DictReader((run.path / "metrics.csv").read_text().splitlines()))


def sent():
    return [row.epoch for news in StandIn.told for row in news.rows]


@pytest.mark.slow
def test_a_service_is_told_all_and_changes_nothing(service, train, tmp_path):
    plain, run = train("plain"), train("logged", "--wandb", "mine")
    weights = plain.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.state_dict().items())
    assert history(run)[-1]["train_elbo"] == history(plain)[-1]["train_elbo"]
    assert (run.path / "config.yaml").read_text() == (plain.path / "config.yaml").read_text()
    assert service.begun == (("mine", None, 2),)
    assert sent() == [1, 2, 3]
    *_, last = service.told
    assert last.ended == "finished"
    assert last.numbers()["result/test_log_likelihood"] == run.result["test_log_likelihood"]
    assert last.texts()["result/unit"] == run.result["unit"]
    assert [dict(each) for _, each in service.told[1].scalars()] == [
        {name: float(history(run)[0][name]) for name in tracking.SCALARS}
    ]
    count = len(service.told)
    train("logged", "--resume", "--wandb", "mine")  # which is told nothing twice
    assert len(service.told) == count


def test_a_run_outlives_its_server_which_is_told_later(service, train, monkeypatch, capsys):
    service.away = True
    run = train("run", "--wandb")
    line = [each for each in capsys.readouterr().err.splitlines() if each.startswith("A service: ")]
    assert len(line) == 1
    assert re.search(
        r"ConnectionError: https://host is away, \*\*\* for ever; the run goes on.* --resume --wandb$", *line
    )
    assert run.result["epochs"] == 3
    assert sent() == []
    service.away = False
    train("run", "--resume", "--wandb")
    assert sent() == [1, 2, 3]
    assert service.told[-1].ended == "finished"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_the_same_one(service, train, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "score_test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("run", "--wandb")
    assert service.told[-1].ended == "interrupted"
    train("run", "--resume", "--wandb")
    assert [identity for _, identity, _ in service.begun] == [None, "run-1"]
    assert sent() == [1, 2, 3]
    assert service.told[-1].ended == "finished"


def test_a_training_that_fails_at_once_leaves_nothing(service, train, tmp_path):
    with pytest.raises(ArithmeticError):
        train("run", "--wandb", "--lr=1e30", "--schedule=constant")
    assert not (tmp_path / "run").exists()
    assert [news.ended for news in service.told] == [None, "failed"]


def test_keys_and_other_names_are_refused(monkeypatch, train):
    for name, words in ((KEY, "what may be a key"), ("a/b/c", "a name has letters"), ("", "a name has letters")):
        with pytest.raises(ValueError, match=f"--wandb: .*{words}"):
            Settings(wandb=name)
    with pytest.raises(ValueError, match="--mlflow: a name has letters"):
        Settings(mlflow="a/b")
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[mlflow\]' in its checkout \(missing: mlflow\)"):
        train("run", "--mlflow")


def records(content, block=2**15, header=7):
    """The records of a file of W&B: a header, and blocks as in the log of LevelDB, of checksum, length, kind, bytes."""
    found, place = b"", header
    while place + header <= len(content):
        if block - place % block < header:  # too little is left of the block
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + header])
        found += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield found
            found = b""


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True], ids=["offline", "without a server"])
def test_weights_and_biases_offline(train, tmp_path, monkeypatch, drawing, capsys, away):
    """The package itself: its file has what metrics.csv has, and no key."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if away:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
    with drawing():
        run = train("run", "--wandb", "mine")
    said = capsys.readouterr()
    assert f"Weights & Biases: offline: wandb sync {run.path}/wandb/offline-run-" in said.out
    assert ("; the run is logged offline" in said.err) == away
    (log,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    rows, summary = {}, {}
    for content in records(log.read_bytes()):
        record = proto.Record.FromString(content)
        if record.HasField("history"):
            found = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(record.history.step.num, {}).update(found)
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if record.HasField("run"):
            assert record.run.project == "mine"
            assert record.run.run_id == json.loads((run.path / "tracking.json").read_text())["wandb"]["run"]
    for row in history(run):
        assert rows[int(row["epoch"])]["train_elbo"] == float(row["train_elbo"])
    assert summary["result/test_log_likelihood"] == run.result["test_log_likelihood"]
    assert list(log.parent.glob("files/media/images/figures/training_*.png"))
    assert not [each for each in run.path.rglob("*") if each.is_file() and KEY.encode() in each.read_bytes()]


@pytest.mark.slow
def test_mlflow(train, tmp_path, monkeypatch, drawing, capsys):
    """The package itself, first with a server that is away, and then with a store of files."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with drawing():
        run = train("run", "--mlflow")
    told = capsys.readouterr()
    assert "MLflow: MlflowException: " in told.err
    assert "word" not in told.err + told.out
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    train("run", "--resume", "--mlflow")
    client = mlflow.MlflowClient()
    identity = json.loads((run.path / "tracking.json").read_text())["mlflow"]["run"]
    found = client.get_run(identity)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["result/test_log_likelihood"] == run.result["test_log_likelihood"]
    assert found.data.params["latent_dim"] == "2"
    assert found.data.tags["result/unit"] == run.result["unit"]
    curve = [(each.step, each.value) for each in client.get_metric_history(identity, "train_elbo")]
    assert curve == [(int(row["epoch"]), float(row["train_elbo"])) for row in history(run)]
    assert "figures/training.png" in [each.path for each in client.list_artifacts(identity, "figures")]
