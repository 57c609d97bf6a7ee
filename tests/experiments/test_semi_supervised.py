"""M2 from few labels, beside M1."""

import json
import statistics

import pytest
import torch

from experiments import semi_supervised
from pyro_vae import runs
from pyro_vae.data.fetched import Digits, cache_folder
from pyro_vae.runs.judge import classes


def test_as_many_labels_of_each_class_are_drawn():
    data = Digits(cache_folder()).load()
    first, second = (semi_supervised.drawn(data, 3, 500, seed) for seed in (0, 1))
    assert first.labels.bincount().tolist() == [3] * 10
    assert torch.equal(first.labels, classes(data)[0][first.few])
    assert torch.equal(torch.cat([first.few, first.others]).sort().values, torch.arange(500))
    assert not torch.equal(first.few, second.few)
    x, y = first.batch()
    assert (x.shape, (y == -1).sum(), (y >= 0).sum()) == ((130, 64), 100, 30)


def test_too_few_images_of_a_class_are_refused(tmp_path):
    with pytest.raises(runs.RunError, match="--labels 500: one class has only"):
        semi_supervised.main(["--labels=500", f"--run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    argv = ["--num_draws=2", "--steps=60", "--num_samples=2", f"--run_dir={tmp_path / 'run'}"]
    out = semi_supervised.main(argv)
    result, text = json.loads((out / "result.json").read_text()), (out / "table.md").read_text()
    assert (out / "errors.png").stat().st_size > 1000
    mean = {name: 100 * statistics.fmean(each) for name, each in result["errors"].items()}
    assert len(mean) == 5
    assert mean[semi_supervised.LOGISTIC] < 45
    assert mean[semi_supervised.M2] < 85  # chance is 90
    assert f"{mean[semi_supervised.M2]:.1f} +- " in text
    assert f"{mean[semi_supervised.M2] - mean[semi_supervised.M1]:+.1f} +- " in text
    assert all(-60 < value < -15 for each in result["log_px"].values() for value in each)
