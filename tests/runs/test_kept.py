"""Experiments go on where they were interrupted, with the same numbers."""

import re

import pytest
import torch

from pyro_vae import MLP, VAE, Bernoulli, Conditional, MeanField, StandardNormal, fit, runs
from pyro_vae.callbacks import Callback
from pyro_vae.runs.kept import Kept, at_home, is_concluded

X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).round()


class Stops(Callback):
    """Ctrl-C, or a kill, after an epoch's checkpoint."""

    def __init__(self, after):
        self.after = after

    def save(self, training):
        if len(training.history) == self.after:
            raise KeyboardInterrupt


def train(kept, stops_after=None):
    """A tiny training; its weights, its history, and the random numbers that come after it."""
    torch.manual_seed(0)
    posterior = Conditional(MLP(6, 4, [5]), MeanField(2))
    model = VAE(StandardNormal(2), Conditional(MLP(2, 6, [5]), Bernoulli(6)), posterior)

    def fitted(callbacks):
        stops = [Stops(stops_after)] if stops_after else []
        return fit(model, X.split(20), epochs=3, callbacks=[*callbacks, *stops], progress=False)

    history = kept.train("tiny", model, fitted, {"data": "abc"})
    return model.state_dict(), [row._replace(seconds=0) for row in history], torch.rand(3)


def equal(one, other):
    weights = all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    return weights and repr(one[1]) == repr(other[1]) and torch.equal(one[2], other[2])


def test_an_interrupted_training_goes_on_and_a_finished_one_is_read(tmp_path):
    expected = train(Kept(tmp_path / "whole"))
    kept = Kept(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(kept, stops_after=2)
    assert [each.name for each in kept.folder.iterdir()] == ["tiny.checkpoint.pt"]
    assert equal(train(kept), expected)
    assert [each.name for each in kept.folder.iterdir()] == ["tiny.safetensors"]
    assert equal(train(kept, stops_after=1), expected)  # nothing is trained


def test_weights_of_something_else_or_damaged_are_refused(tmp_path):
    kept = Kept(tmp_path)
    train(kept)
    with pytest.raises(runs.RunError, match=re.escape("tiny.safetensors is of {'data': 'abc'}, not {'data': 'other'}")):
        kept.train("tiny", torch.nn.Linear(1, 1), lambda callbacks: [], {"data": "other"})
    with pytest.raises(runs.RunError, match=r"tiny.safetensors is damaged: .*Missing key"):
        kept.train("tiny", torch.nn.Linear(1, 1), lambda callbacks: [], {"data": "abc"})
    path = tmp_path / "models" / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(runs.RunError, match=r"tiny.safetensors is damaged"):
        train(kept)


def test_what_is_measured_is_measured_once(tmp_path):
    kept, calls = Kept(tmp_path), []
    for _ in range(2):
        assert kept.once("a", lambda: calls.append(1) or {"distance": 2.5}) == {"distance": 2.5}
    assert len(calls) == 1


def test_an_experiment_has_its_directory_for_itself(tmp_path, capsys):
    run_dir = tmp_path / "out"

    def interrupted():
        with at_home(run_dir, "seed: 0\n", resume=False):
            with pytest.raises(runs.RunError, match="another process is at work"), at_home(run_dir, "seed: 0\n", True):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=re.escape(f"go on with: --run_dir {run_dir} --resume")):
        interrupted()
    with pytest.raises(runs.RunError, match="never overwritten"):
        is_concluded(run_dir, "seed: 0\n", resume=False)
    with pytest.raises(runs.RunError, match=r"run with another --seed \(0, now 1\)"):
        is_concluded(run_dir, "seed: 1\n", resume=True)
    assert not is_concluded(run_dir, "seed: 0\n", resume=True)
    runs.conclude(run_dir, "the table", {}, torch.device("cpu"))
    capsys.readouterr()
    assert is_concluded(run_dir, "seed: 0\n", resume=True)
    assert "the table" in capsys.readouterr().out
