"""Runs that torchrun trains in several processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyro_vae import cli
from pyro_vae.errors import RunError
from pyro_vae.runs import launched
from pyro_vae.runs.reading import json_of

SMALL = "--dataset Digits --epochs 60 --batch_size 600 --encoder.hidden [8] --decoder.hidden [8] --latent_dim 2"
SMALL += " --schedule constant --device cpu --evidence.num_samples 10 --evidence.annealed_images 0"


@pytest.mark.parametrize("name", ["mps", "cuda:0"])
def test_processes_need_a_device_each(name, monkeypatch):
    import torch

    monkeypatch.setattr(launched, "choose_device", lambda name, scores: torch.device(name))
    assert launched.device_of(name, 1) == torch.device(name)
    with pytest.raises(RunError, match=f"--device {name}: 2 processes need a device each: use cpu, or leave it out"):
        launched.device_of(name, 2)


def test_there_are_as_many_devices_as_processes(monkeypatch):
    import torch

    chosen = []
    monkeypatch.setattr(launched, "choose_device", lambda name, scores: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched.device_of("auto", 4) == torch.device("cuda", 1)
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match="process 2 of this machine has no CUDA device, there are 2"):
        launched.device_of("auto", 4)


def test_other_commands_are_not_done_twice(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "somewhere"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: torchrun is for train: call evaluate without it\n"


def process_of(run_dir, rank):
    """The number of a process of a run, by what torchrun has told it."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (path / "environ").read_text().split("\0")
            if str(run_dir) in (path / "cmdline").read_text() and f"RANK={rank}" in told:
                return int(path.name)
    raise AssertionError("there is no such process")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_one_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pyro_vae", "train"]
    with subprocess.Popen(
        [*command, *SMALL.split(), f"--run_dir={run_dir}"], stderr=subprocess.PIPE, text=True
    ) as both:
        while not (run_dir / "checkpoint.pt").exists() and both.poll() is None:
            time.sleep(0.02)
        os.kill(process_of(run_dir, 1), signal.SIGKILL)
        start = time.monotonic()
        _, said = both.communicate(timeout=60)
        assert time.monotonic() - start < 60
    assert both.returncode != 0
    hint = f"go on with: torchrun --nproc-per-node 2 -m pyro_vae train --run_dir {run_dir} --resume"
    assert hint in said
    done = len((run_dir / "metrics.csv").read_text().splitlines()) - 1
    assert not (run_dir / "result.json").exists()
    with pytest.warns(UserWarning, match="the training goes on in 1 process, after 2"):
        cli.train(["--run_dir", str(run_dir), "--resume"])
    assert 1 <= done < 60 == json_of(run_dir / "result.json")["epochs"]
