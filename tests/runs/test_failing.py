"""What fails leaves nothing in the way, and what is interrupted is put in order once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_vae import cli, runs
from pyro_vae.errors import NonFiniteError

TINY = (
    *("--dataset", "Digits", "--epochs", "1", "--latent_dim", "2", "--encoder.hidden", "[4]"),
    *("--decoder.hidden", "[4]", "--engine", "pyro", "--evidence.num_samples", "10"),
    *("--evidence.num_images", "4", "--evidence.annealed_images", "0"),
)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    for name in ("training_curve", "evidence", "pictures"):
        monkeypatch.setattr(f"pyro_vae.runs.training.figures.{name}", lambda *_: None)


def test_a_training_that_fails_at_once_leaves_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(NonFiniteError):
        cli.train([*TINY, "--lr=1e18", f"--run_dir={run_dir}", "--tensorboard"])
    assert not run_dir.exists()
    run_dir.mkdir()
    for objective in ("ReweightedWakeSleep", "Trace_ELBO --objective.num_particles 0"):
        with pytest.raises((runs.RunError, ValueError)):
            cli.train([*TINY, f"--run_dir={run_dir}", *f"--objective pyro.infer.{objective}".split()])
        assert not list(run_dir.iterdir())


@pytest.mark.slow
def test_a_finished_run_that_was_changed_says_what_helps(tmp_path):
    run_dir = tmp_path / "run"
    finished = cli.train([*TINY, f"--run_dir={run_dir}"])
    weights = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "model.safetensors").unlink()
    for command in (cli.train, cli.evaluate):
        with pytest.raises(runs.RunError, match=r"no .*model.safetensors.*: checkpoint.pt is there, so delete its res"):
            command([f"--run_dir={run_dir}", "--resume"] if command is cli.train else [str(run_dir)])
    (run_dir / "result.json").unlink()
    again = cli.train([f"--run_dir={run_dir}", "--resume"])
    assert (run_dir / "model.safetensors").stat().st_size == len(weights)
    assert again.result["test_log_likelihood"] == finished.result["test_log_likelihood"]

    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    for command in (cli.train, cli.evaluate):
        with pytest.raises(runs.RunError, match=r"was edited since the run was finished, with another --"):
            command([f"--run_dir={run_dir}", "--resume"] if command is cli.train else [str(run_dir)])


def test_a_failure_after_a_checkpoint_leaves_it(tmp_path, monkeypatch):
    def fail(*_):
        raise runs.RunError("no")

    monkeypatch.setattr("pyro_vae.runs.training.Log._write", fail)
    with pytest.raises(runs.RunError, match="no"):
        cli.train([*TINY, f"--run_dir={tmp_path}"])
    assert {"config.yaml", "data.json", "checkpoint.pt"} <= {path.name for path in tmp_path.iterdir()}


SCRIPT = """
import atexit, os, signal, time
from pyro_vae import cli

if signal.getsignal(signal.{name}) == signal.SIG_IGN:  # of the process of the tests
    signal.signal(signal.{name}, signal.SIG_DFL)

def again():
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        os.kill(os.getpid(), each)

def command():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    finally:
        again()

atexit.register(again)
cli.guarded(command)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_second_request_to_end_changes_nothing(name):
    if not hasattr(signal, name):
        pytest.skip("there is no such signal")
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(name=name)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")
