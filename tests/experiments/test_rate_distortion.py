"""experiments.rate_distortion on two tiny runs."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from experiments import rate_distortion
from pyro_vae import cli, quadrature, runs
from pyro_vae.infer.evidence import RateDistortion
from pyro_vae.runs import figures

pytestmark = pytest.mark.slow

SETTINGS = ["--num_images=6", "--betas=[0.03, 0.1, 0.3, 1, 3]", "--tempering.num_temperatures=30", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs, of 2 and of 4 latent variables."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("training_curve", "evidence", "pictures"):
            patch.setattr(figures, name, lambda *args: None)
        for dim in ("2", "4"):
            run_dir = tmp_path_factory.mktemp("runs") / f"of_{dim}"
            sizes = ("--encoder.hidden", "[32]", "--decoder.hidden", "[32]", "--latent_dim", dim)
            short = ("--epochs", "6", "--evidence.num_samples", "10", "--device", "cpu", "--run_dir", str(run_dir))
            cli.train(["--dataset", "Digits", *sizes, *short])
            found.append(run_dir)
    return found


@pytest.fixture(scope="module")
def written(trained):
    return rate_distortion.main([*map(str, trained), *SETTINGS])


def test_files_hold_what_the_table_says(trained, written):
    assert written == trained[0] / "rate_distortion"
    assert {path.name for path in written.iterdir()} == {"table.md", "result.json", "curves.nc", "rate_distortion.png"}
    result = json.loads((written / "result.json").read_text())
    assert list(result["runs"]) == [str(path) for path in trained]
    table = (written / "table.md").read_text()
    with xr.open_datatree(written / "curves.nc", engine="h5netcdf") as tree:
        for i, run in enumerate(result["runs"].values()):
            values = tree[f"run_{i}"].to_dataset()
            assert values["rate"].dims == ("beta", "datum")
            for point, rate in zip(run["points"], values["rate"].values, strict=True):
                assert point["rate"] == pytest.approx(rate.mean())
                assert point["rate_se"] == pytest.approx(rate.std(ddof=1) / 6**0.5)
                assert f"{point['rate']:.3f}" in table
                assert f"{point['distortion']:.3f}" in table
            rates, errors = ([point[name] for point in run["points"]] for name in ("rate", "rate_se"))
            assert (np.diff(rates) > -3 * np.hypot(errors[1:], errors[:-1])).all()
            assert rates[-1] > rates[0]
    assert result["runs"][str(trained[1])]["from_first"]
    assert "--betas '[0.03, 0.1, 0.3, 1.0, 3.0]'" in table


def test_at_beta_one_rate_and_distortion_are_the_runs_own_log_px(trained, written):
    point = json.loads((written / "result.json").read_text())["runs"][str(trained[0])]["points"][3]
    vae, data = runs.load_finished(trained[0], torch.device("cpu"))
    x, _ = runs.some_images(data, "test", 6)
    truth = quadrature(vae.model, vae.guide, x).mean()[0]
    assert abs(point["rate"] + point["distortion"] + truth) < 4 * point["log_z_mc_se"] + 0.02


def test_one_run_again_is_the_same_to_the_digit(trained, written):
    alone = rate_distortion.main([str(trained[0]), *SETTINGS, f"--run_dir={trained[0].parent / 'alone'}"])
    both, one = (json.loads((each / "result.json").read_text())["runs"][str(trained[0])] for each in (written, alone))
    assert both["points"] == one["points"]


def curve(betas, rate, distortion) -> rate_distortion.Curve:
    rate, distortion = (torch.tensor(each, dtype=torch.float64) for each in (rate, distortion))
    se, flags = torch.full_like(rate, 0.1), torch.ones_like(rate, dtype=torch.bool)
    row = torch.ones(rate.shape[1], dtype=torch.float64)
    fields = torch.tensor(betas), rate, distortion, -rate, se, se, se, se, flags, row, row
    return rate_distortion.Curve(RateDistortion(*fields), torch.arange(rate.shape[1]), "nats", 1.0)


def test_rates_at_equal_distortion():
    first = curve([0.5, 1.5], [[1.0, 2.0], [3.0, 5.0]], [[9.0, 11.0], [5.0, 7.0]])
    assert first.rate_at(10.0) is None  # at the end, nothing lies above
    assert first.rate_at(5.0) is None
    at = first.rate_at(8.0)
    assert at is not None
    assert at.tolist() == pytest.approx([2.0 + 1.0 * (7 - 8), 3.5 + 1.0 * (9 - 8)])
    assert first.error_at(6.5) == pytest.approx((0.1**2 + (1.5 * 0.1) ** 2) ** 0.5 / 2**0.5)
    other = curve([0.5, 1.5], [[2.0, 2.5], [5.0, 5.0]], [[9.0, 11.0], [5.0, 7.0]])
    (line,) = rate_distortion.differences(first, other)
    assert line["distortion"] == 6.0
    assert line["mean"] == pytest.approx(1.0)
    assert line["se"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--num_images=1"], "--num_images must be at least 2"),
        (["--betas=[1, 0.5]"], "--betas must be positive and ascending"),
        (["--seed=-1"], "seed"),
        (["nowhere"], "nowhere holds no finished run"),
    ],
)
def test_mistakes_are_told_in_one_line(trained, options, complaint):
    with pytest.raises(runs.RunError) as caught:
        rate_distortion.main([str(trained[0]), *options, f"--run_dir={trained[0].parent / 'none'}"])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
