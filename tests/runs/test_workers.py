"""Work that several processes share: each part is done once, and what a dead process had claimed is free again."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver

import pytest

from pyro_vae import cli, runs
from pyro_vae.runs import studies
from pyro_vae.runs.workers import CLAIMS, Shared, Taken, alone, claim


@pytest.fixture
def child():
    """Forks a process that does something and then sleeps; it is killed at the end, if it has not been."""
    pids = []

    def start(enter):
        told, tell = os.pipe()
        if (pid := os.fork()) == 0:
            with enter():
                os.write(tell, b"x")
                time.sleep(60)
            os._exit(0)
        pids.append(pid)
        os.read(told, 1)
        return pid

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def test_a_claim_is_for_one_and_free_when_its_owner_is_killed(tmp_path, child):
    pid = child(lambda: claim(tmp_path, "a"))
    with claim(tmp_path, "b"), pytest.raises(Taken, match=f"process {pid} on .* is at work on a"), claim(tmp_path, "a"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with claim(tmp_path, "a"):
        pass


def test_a_run_is_trained_by_one_process(tmp_path, child):
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    child(lambda: alone(tmp_path))
    with pytest.raises(Taken, match=f"another process is at work on {tmp_path}"), alone(tmp_path):
        pass
    assert (tmp_path / "config.yaml").read_text() == "epochs: 1\n"


def shared(directory, names, done):
    def do(name):
        time.sleep(0.01)
        done.append(name)
        if name == "bad":
            raise runs.RunError("of no use")
        if name == "worse":
            raise ZeroDivisionError("a mistake in somebody's class")
        (directory / name).touch()

    return Shared(directory, names, do, lambda name: (directory / name).exists())


def test_each_part_is_done_once_and_a_failure_does_not_stop_the_rest(tmp_path, capsys):
    names, done = [*"abcdef", "bad", "worse"], []
    workers = [threading.Thread(target=shared(tmp_path, names, done).work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(done) == sorted(names)
    work = shared(tmp_path, names, done)
    assert work.failures() == {"bad": "of no use", "worse": "ZeroDivisionError: a mistake in somebody's class"}
    assert "Traceback" in capsys.readouterr().err  # of what nobody foresaw
    work.forget_failures()
    assert work.open() == ["bad", "worse"]


def test_what_a_dead_process_had_begun_is_done_by_another(tmp_path, child):
    pid = child(lambda: claim(tmp_path, "a"))
    done = []
    worker = threading.Thread(target=shared(tmp_path, ["a", "b"], done).work)
    worker.start()
    time.sleep(0.3)
    assert done == ["b"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    worker.join(20)
    assert done == ["b", "a"]


SMALL = "--dataset Digits --encoder.hidden [16] --decoder.hidden [16] --evidence.num_samples 20"
COMMON = f"{SMALL} --evidence.annealed_images 0 --epochs 20"


@pytest.mark.slow
def test_a_study_outlives_a_worker_and_gives_the_numbers_of_one(tmp_path):
    """Of two workers one is killed in the middle of a run: the other goes on with that, as if nothing had happened."""
    contenders = {"small": "--latent_dim 2", "large": "--latent_dim 3", "wrong": "--likelihood Gaussian"}
    argv = [*(f"--contenders.{name}={each}" for name, each in contenders.items()), f"--common={COMMON}", "--seeds=1"]
    command = [sys.executable, "-m", "pyro_vae", "study", *argv, f"--run_dir={tmp_path / 'two'}", "--workers=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics, killed = tmp_path / "two" / "small-seed0" / "metrics.csv", False
    while process.poll() is None and not killed:
        time.sleep(0.01)
        if killed := metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            pid = int((tmp_path / "two" / CLAIMS / "small-seed0").read_text().split()[1])
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert killed
    assert process.returncode == 2
    assert "error: wrong-seed0: wrong: --likelihood Gaussian scores dequantized pixels" in said
    assert (tmp_path / "two" / "large-seed0" / "result.json").exists()
    again = runs.train(*runs.parse(runs.Settings, f"{COMMON} --latent_dim 2 --run_dir {tmp_path / 'one'}".split()))
    result = json.loads((tmp_path / "two" / "small-seed0" / "result.json").read_text())
    for key in ("test_elbo", "test_log_likelihood", "mc_se", "validation_log_likelihood"):
        assert result[key] == pytest.approx(again.result[key], rel=1e-6), key


def test_the_same_command_joins_a_study_on_its_way(tmp_path, monkeypatch):
    contenders, ran = {"a": f"{SMALL} --latent_dim 2", "b": f"{SMALL} --latent_dim 3"}, []

    def interrupted(settings, text):
        raise KeyboardInterrupt

    def finish(settings, text):
        ran.append(settings.latent_dim)
        settings.run_dir.mkdir()
        (settings.run_dir / "result.json").touch()

    monkeypatch.setattr(studies, "summarize", lambda directories: [])
    monkeypatch.setattr(studies, "report_study", lambda *_: None)
    monkeypatch.setattr(studies, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="go on with the same command"):
        runs.study(contenders, seeds=1, run_dir=tmp_path)
    monkeypatch.setattr(studies, "train", finish)
    with pytest.raises(runs.RunError, match="holds another run"):
        runs.study(contenders | {"b": "--latent_dim 4"}, seeds=1, run_dir=tmp_path)
    runs.study(contenders, seeds=1, run_dir=tmp_path)
    assert ran == [2, 3]
    (tmp_path / "result.json").touch()
    runs.study(contenders, seeds=1, run_dir=tmp_path)  # the last task of an array, after all is finished
    assert ran == [2, 3]


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no forkserver here")
@pytest.mark.parametrize(("argv", "ahead"), [(["--workers=2"], True), (["--workers", "1"], False), ([], False)])
def test_what_workers_are_copies_of_imports_while_the_command_does(argv, ahead, monkeypatch):
    """It is begun before the command imports anything large."""
    begun = []
    monkeypatch.setattr(forkserver, "set_forkserver_preload", begun.append)
    monkeypatch.setattr(forkserver, "ensure_running", lambda: begun.append("workers"))
    monkeypatch.setattr(cli, "_runs", lambda: begun.append("command") or runs)
    with pytest.raises(runs.RunError):
        cli.study([*argv, "--no_such_option"])
    assert begun == [["pyro_vae.runs.studies"], "workers"] * ahead + ["command"]
