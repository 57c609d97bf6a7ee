"""Studies on a Ray cluster: nodes that die, that do not see the study's directory, or run other code."""

import os
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import pyro_vae
from pyro_vae import Annealing, runs
from pyro_vae.errors import ContractError, MissingExtra
from pyro_vae.runs import ray_cluster, ray_tasks
from pyro_vae.runs.blockwise import Files
from pyro_vae.runs.ray_blocks import on_cluster
from pyro_vae.runs.ray_cluster import Cluster
from pyro_vae.runs.workers import CLAIMS, Shared, claim

COMMON = (
    "--dataset Digits --latent_dim 2 --encoder.hidden [16] --decoder.hidden [16] --device cpu --evidence.num_samples 2 "
    "--evidence.annealed_images 0 --epochs "
)


def test_what_is_sent_home_arrives_whole(tmp_path):
    there, home = tmp_path / "there", tmp_path / "home"
    (there / "a" / "deep").mkdir(parents=True)
    home.mkdir()
    for name in ("result.json", "deep/b.txt", "model.partial"):
        (there / "a" / name).write_text(name)
    (there / "a" / "link").symlink_to("/etc/passwd")
    (there / "a.log").write_text("printed")
    packed = ray_tasks.pack(there, ["a", "a.log", "missing"])
    (home / "a").mkdir()
    (home / "a" / "result.json").mkdir()  # in its way: the last file, so that nothing else is missing
    with pytest.raises(OSError, match=r"result\.json"):
        ray_tasks.unpack(packed, home, "a")
    assert (home / "a" / "deep" / "b.txt").read_text() == "deep/b.txt"
    (home / "a" / "result.json").rmdir()
    ray_tasks.unpack(packed, home, "a")
    arrived = {str(path.relative_to(home)): path.read_text() for path in home.rglob("*") if path.is_file()}
    assert arrived == {"a/result.json": "result.json", "a/deep/b.txt": "deep/b.txt", "a.log": "printed"}
    assert not list((home / CLAIMS).iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ray", "--workers=2"], "--workers are processes on this machine, --ray is a cluster: choose one of them"),
        (["--ray", "--cpus_per_run=0"], "--cpus_per_run must be at least 1, got 0"),
        (["--ray", "--gpus_per_run=-1"], "--gpus_per_run must be at least 0 and finite, got -1"),
        (["--ray", "--gpus_per_run=1.5"], "--gpus_per_run above 1 must be a whole number, got 1.5"),
        (["--cpus_per_run=2"], "--cpus_per_run and --gpus_per_run are for --ray"),
        (["--ray=head"], "--ray: expected auto, host:port or ray://host:port, got 'head'"),
        (["--ray=127.0.0.1:1"], "--ray: nothing answers at 127.0.0.1:1 .*start one with 'ray start --head'"),
        (["--ray=ray://no.such.host.invalid:10001"], "--ray: nothing answers at ray://no.such.host.invalid:10001"),
        (["--ray=127.0.0.1:99999999"], "--ray: nothing answers at 127.0.0.1:99999999"),
    ],
)
def test_mistakes_are_named(tmp_path, argv, message, monkeypatch):
    monkeypatch.setattr(ray_cluster, "need_extra", lambda *_: None)  # they are found without Ray, too
    argv = [f"--run_dir={tmp_path / 'study'}", "--contenders.a=--latent_dim 2", f"--common={COMMON} 1", *argv]
    with pytest.raises(runs.RunError, match=message):
        runs.run_study(runs.StudySettings, argv, "study")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    with (
        pytest.raises(MissingExtra, match=r"pip install -e '\.\[ray\]' in its checkout"),
        ray_cluster.connected(Cluster()),
    ):
        pass


def trial(directory):
    """Parts that write where they were done; one fails and one dies with its worker, the first time."""
    names = ["fails", "dies", "c", "d"]

    def do(name):
        (directory / name).mkdir(exist_ok=True)
        (directory / name / "where.txt").write_text(str(directory))
        print(f"{name} is printed")
        if name == "fails":
            raise runs.RunError("of no use")
        died = elsewhere / "died"
        if name == "dies" and not died.exists():
            died.touch()
            os._exit(1)
        (directory / name / "result.json").write_text(name)

    elsewhere = Path(os.environ["PYRO_VAE_ELSEWHERE"])
    return Shared(directory, names, do, lambda name: (directory / name / "result.json").exists())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two nodes, each of one CPU; it lives as long as the tests of this module."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves files and sockets open
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYRO_VAE_ELSEWHERE", str(tmp_path_factory.mktemp("elsewhere")))
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        ray.init(nodes.address, log_to_driver=False, logging_level="error")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("sees", [True, False], ids=["shared", "sent home"])
def test_each_part_is_done_once_wherever(cluster, tmp_path, monkeypatch, sees):
    found = ray_cluster.nodes(sys.modules["ray"], tmp_path)
    assert [node["sees"] for node in found] == [True, True]  # of the marker
    monkeypatch.setattr(ray_tasks, "nodes", lambda *_: [node | {"sees": sees} for node in found])
    (Path(os.environ["PYRO_VAE_ELSEWHERE"]) / "died").unlink(missing_ok=True)
    ray_tasks.in_cluster(trial, tmp_path, Cluster())
    work = trial(tmp_path)
    assert not work.open()
    (reason,) = work.failures().values()
    assert reason.endswith("of no use")
    for name in ("dies", "c", "d"):
        assert (tmp_path / name / "result.json").read_text() == name
        assert ((tmp_path / name / "where.txt").read_text() == str(tmp_path)) == sees
    printed = {name: (tmp_path / f"{name}.log").read_text().count("is printed") for name in work.names}
    assert printed == {"fails": 1, "dies": 1 + sees, "c": 1, "d": 1}  # what is printed on a node that dies is lost
    with claim(tmp_path, "dies"):
        pass
    assert not list((tmp_path / CLAIMS).glob("*.arriving"))


@pytest.mark.slow
def test_nodes_that_do_not_fit_are_refused(cluster, tmp_path, monkeypatch):
    with pytest.raises(runs.RunError, match="--cpus_per_run 64: none has more than 1 CPUs; ask for less"):
        ray_tasks.in_cluster(trial, tmp_path, Cluster(cpus=64))
    with pytest.raises(runs.RunError, match=r"--gpus_per_run 0\.5: none has more than 1 CPUs and 0 GPUs"):
        ray_tasks.in_cluster(trial, tmp_path, Cluster(gpus=0.5))
    monkeypatch.setattr(pyro_vae, "__version__", "0.0.1")
    with pytest.raises(runs.RunError, match=r"the node .* has pyro_vae .*, this process has 0.0.1: install the same"):
        ray_tasks.in_cluster(trial, tmp_path, Cluster())
    with pytest.raises(runs.RunError, match=r"the node .* has pyro_vae none"):
        ray_cluster.check_same({"pyro_vae": None, "node": "far"}, {"pyro_vae": "1", "node": "here"})


@pytest.mark.slow
def test_an_evaluation_on_a_cluster_has_the_digits_of_one_worker(cluster, tmp_path):
    """A worker is killed while it has a block in hand, and the command is interrupted once."""
    run = runs.train(*runs.parse(runs.Settings, f"{COMMON} 1 --run_dir {tmp_path / 'run'}".split()))
    settings = {"num_images": 300, "annealing": Annealing(num_temperatures=4, num_chains=4)}
    one = runs.score(run, name="one", workers=1, **settings)
    killed = []

    def kill():
        while not killed:
            time.sleep(0.02)
            killed.extend(each for each in _workers() if not os.kill(each, signal.SIGKILL))

    threading.Thread(target=kill, daemon=True).start()
    other = runs.score(run, name="ray", ray=cluster.address, **settings)
    assert killed
    assert other.evidence["annealed"].log_px.equal(one.evidence["annealed"].log_px)
    assert other.evidence["annealed"].ess.equal(one.evidence["annealed"].ess)
    assert sorted(path.name for path in other.path.iterdir()) == ["config.yaml", "evidence.nc", "result.json"]
    with on_cluster(Cluster(), Files(tmp_path, {}, torch.device("cpu")), refuses) as work:
        assert next(work("a", no_part, 2))["number"] == 0
        with pytest.raises(ContractError, match="1 is of no use"):
            list(work("b", no_part, 2))


def no_part(number):
    raise ContractError(f"{number} is computed by the process that asked")


def refuses(work):
    """An estimator whose second stage cannot be."""

    def refuse(number):
        if number:
            raise ContractError(f"{number} is of no use")
        return {"number": torch.tensor(0)}

    list(work("a", lambda number: {"number": torch.tensor(number)}, 2))
    list(work("b", refuse, 2))


def _workers():
    """Processes of workers that compute blocks."""
    names = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [int(pid) for pid, name in names.items() if name.startswith(b"ray::_help")]


def _halt(node):
    """Stop a node as a machine that loses its power: its raylet and its workers, at the same time.

    A worker whose raylet alone has died goes on for a second or so, in which it may finish what it does.
    """
    raylet = node.all_processes["raylet"][0].process.pid
    pids = [raylet]
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(raylet):
                pids.append(int(path.parent.name))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


@pytest.mark.slow
def test_a_study_outlives_a_node(cluster, tmp_path):
    """The last test of this module: it kills one of the two nodes when both are in the middle of a run."""
    study, killed = tmp_path / "study", []

    def on_their_way():
        return [path.parent for path in study.glob("*/metrics.csv") if not (path.parent / "result.json").exists()]

    def kill():
        while not killed:
            time.sleep(0.05)
            if len(on_their_way()) != 2:
                continue
            node = cluster.list_all_nodes()[1]
            stopped = _halt(node)
            if len(killing := on_their_way()) == 2:  # neither was finished in between
                killed.extend(killing)
                cluster.remove_node(node, allow_graceful=False)
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)

    threading.Thread(target=kill, daemon=True).start()
    done = runs.study({"a": "", "b": "--lr 0.01"}, f"{COMMON} 100", 2, study, ray=cluster.address)
    assert killed
    starts = {path.stem: path.read_text().count("run directory") for path in study.glob("*.log")}
    assert sorted(starts.values()) == [1, 1, 1, 2]
    assert {name for name, count in starts.items() if count == 2} < {path.name for path in killed}
    epochs = [runs.load(path).result["epochs"] for paths in done.directories.values() for path in paths]
    assert epochs == [100] * 4
    assert (study / "table.md").exists()
