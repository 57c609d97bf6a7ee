"""The benchmark runs, and its ratios are those of its seconds. What it measures is not tested."""

import json

import pytest

from experiments import benchmark, runs


def test_every_contender_is_timed(tmp_path, capsys):
    argv = "--repeats 3 --steps 1 --batch_sizes [4] --num_images 2 --num_samples 20 --device cpu"
    benchmark.main([*argv.split(), f"--run_dir={tmp_path / 'run'}"])
    found = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    (training,) = found["training"].values()
    assert {"Pyro SVI, Trace_ELBO", "by hand, torch.compile", "CompiledSVI", "bare matrix products"} <= training.keys()
    for each in [*training.values(), *found["importance_sampling"].values()]:
        assert 0 < each["low"] <= each["median"] <= each["high"]
    ratio = training["CompiledSVI"]["median"] / training["Pyro SVI, Trace_ELBO"]["median"]
    assert f"{ratio:.3g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats=2"], "--repeats must be at least 3"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--batch_sizes=[0]"], "--batch_sizes must all be at least 1"),
    ],
)
def test_bad_settings_are_refused(argv, message):
    with pytest.raises(runs.RunError, match=message):
        benchmark.main(argv)
