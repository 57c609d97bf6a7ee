"""experiments.inference_gaps on a tiny run, of two latent variables, so that quadrature knows log p(x)."""

import json
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from oracles import BinaryLatents

from experiments import inference_gaps
from pyro_vae import Evidence, cli, estimate_elbo, quadrature, runs
from pyro_vae.runs import figures, loading

pytestmark = pytest.mark.slow

SETTINGS = ["--num_images=12", "--num_samples=200", "--num_steps=60", "--device=cpu"]
SHORT = [*SETTINGS, "--num_images=2", "--num_samples=20", "--num_steps=2"]
SHORT += ["--annealing.num_temperatures=2", "--annealing.num_climbs=0", "--annealing.num_checked=0"]
ROWS = {
    "log p(x)": "log_px",
    "L[q*], flow": "elbo_flow",
    "L[q*], mean field": "elbo_mean_field",
    "L[q], encoder": "elbo",
    "approximation gap": "approximation_gap_mean_field",
    "amortization gap": "amortization_gap_mean_field",
    "total gap": "inference_gap",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("training_curve", "evidence", "pictures"):
            patch.setattr(figures, name, lambda *args: None)
        cli.train(
            [
                *("--dataset", "Digits", "--encoder.hidden", "[32]", "--decoder.hidden", "[32]", "--latent_dim", "2"),
                *("--epochs", "10", "--device", "cpu", "--run_dir", str(run_dir)),
                *("--evidence.num_samples=10", "--evidence.num_images=2", "--evidence.annealed_images=0"),
            ]
        )
    return run_dir


@pytest.fixture(scope="module")
def written(trained):
    """The gaps of its encoder, with the settings of ``SETTINGS``."""
    return inference_gaps.main([str(trained), *SETTINGS])


@pytest.fixture(params=inference_gaps.SPLITS)
def split(request):
    return request.param


def result(out):
    return json.loads((out / "result.json").read_text())


def per_image(out, split):
    with xr.open_datatree(out / "gaps.nc", engine="h5netcdf") as tree:
        return tree[split].to_dataset().load()


def complaint(*argv):
    with pytest.raises(runs.RunError) as caught:
        inference_gaps.main([str(each) for each in argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


def without_place_and_time(out):
    found = result(out)
    for each in (found, *found["splits"].values()):
        del each["seconds"]
    return {name: value for name, value in found.items() if name != "commit"}


def test_all_files_are_written_and_the_table_is_printed(trained, written, capsys):
    assert written == trained / "inference_gaps"
    assert {path.name for path in written.iterdir()} == {"table.md", "result.json", "gaps.nc", "gaps.png"}
    assert (written / "gaps.png").stat().st_size > 1000
    again = inference_gaps.main([str(trained), *SHORT, f"--run_dir={trained.parent / 'short'}"])
    printed = capsys.readouterr().out
    assert (again / "table.md").read_text() in printed
    assert printed.endswith(f"{again}\n")


def test_provenance_and_settings(trained, written):
    found = result(written)
    assert (found["run"], found["family"], found["unit"]) == (str(trained), "mean_field", "nats per image, mass")
    assert found["settings"]["annealing"]["num_chains"] == 12
    kept = {name: found["settings"][name] for name in ("num_images", "num_samples", "num_steps", "seed", "widening")}
    assert kept == {"num_images": 12, "num_samples": 200, "num_steps": 60, "seed": 0, "widening": 1.1}
    assert found["seconds"] == pytest.approx(sum(sum(each["seconds"].values()) for each in found["splits"].values()))
    assert found["versions"]["torch"] in torch.__version__
    assert "commit" in found
    assert (
        f"inference_gaps {trained} --family mean_field --num_images 12 --num_samples 200 --num_steps 60 --seed 0`"
        in (written / "table.md").read_text()
    )


def test_the_table_holds_the_numbers_of_the_result(written):
    lines = [line for line in (written / "table.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[1::3] == ["12 test images", "12 train images"]
    assert [row[0] for row in rows] == list(ROWS)
    splits = result(written)["splits"]
    for label, *cells in rows:
        expected = [splits[name]["gaps"][ROWS[label]] for name in ("test", "train")]
        flat = [each[key] for each in expected for key in ("mean", "se", "mc_se")]
        found = [float(re.sub(r"\+- ", "", cell)) for cell in cells]
        assert found == pytest.approx(flat, abs=5.01e-4)


def test_gaps_add_up(written, split):
    gaps = {name: each["mean"] for name, each in result(written)["splits"][split]["gaps"].items()}
    assert gaps["inference_gap"] == pytest.approx(gaps["log_px"] - gaps["elbo"], abs=1e-6)
    for family in ("mean_field", "flow"):
        approximation, amortization = (gaps[f"{gap}_gap_{family}"] for gap in ("approximation", "amortization"))
        assert approximation == pytest.approx(gaps["log_px"] - gaps[f"elbo_{family}"], abs=1e-6)
        assert approximation + amortization == pytest.approx(gaps["inference_gap"], abs=1e-6)


def test_bounds_are_in_order(written, split):
    gaps = result(written)["splits"][split]["gaps"]
    order = ("elbo", "elbo_mean_field", "elbo_flow", "log_px")
    for low, high in pairwise(order):
        error = 4 * np.hypot(gaps[low]["mc_se"], gaps[high]["mc_se"])
        assert gaps[low]["mean"] <= gaps[high]["mean"] + error, (low, high)
    # a tiny encoder cannot be best for each image
    assert gaps["amortization_gap_mean_field"]["mean"] > 4 * gaps["amortization_gap_mean_field"]["mc_se"]


def test_errors_are_those_of_the_images(written, split):
    gaps, values = result(written)["splits"][split]["gaps"], per_image(written, split)
    size = values.sizes["datum"]
    assert size == result(written)["splits"][split]["num_images"] == 12
    difference = (values["elbo_mean_field"] - values["elbo"]).values
    spread = np.hypot(values["elbo_mean_field_se"], values["elbo_se"]).values
    found = gaps["amortization_gap_mean_field"]
    assert found["mean"] == pytest.approx(difference.mean(), rel=1e-9)
    assert found["se"] == pytest.approx(difference.std(ddof=1) / size**0.5, rel=1e-9)
    assert found["mc_se"] == pytest.approx(np.sqrt((spread**2).sum()) / size, rel=1e-9)
    assert min(each["mc_se"] for each in gaps.values()) > 0
    assert min(each["se"] for each in gaps.values()) > 0


def test_values_are_those_of_the_images_named(trained, written, split):
    """log p(x) against quadrature, the encoder's ELBO against its mean over other draws."""
    values = per_image(written, split)
    vae, data = runs.load_model(trained), runs.load_data(trained)
    x, among = runs.some_images(data, split, 12)
    assert values["datum"].values.tolist() == among.tolist()
    truth = quadrature(vae.model, vae.guide, x).log_px.numpy()
    for name in ("annealed", "importance"):
        error = (values[f"{name}_log_px"] - truth).values
        assert (np.abs(error) < 6 * values[f"{name}_mc_se"].values + 1e-3).all(), name
        assert abs(error.mean()) < 0.1
    elbo = estimate_elbo(vae.model, vae.guide, x, 1000).double().numpy()
    assert (np.abs(values["elbo"].values - elbo) < 6 * values["elbo_se"].values).all()


def test_log_px_is_the_higher_estimate(written, split):
    found, values = result(written)["splits"][split], per_image(written, split)
    means = {name: values[f"{name}_log_px"].values.mean() for name in ("annealed", "importance")}
    chosen = max(means, key=means.get)
    assert found["log_px_from"] == values.attrs["log_px_from"] == chosen
    assert found["gaps"]["log_px"]["mean"] == pytest.approx(means[chosen], rel=1e-9)
    for name, mean in means.items():
        assert found["log_px"][name]["mean"] == pytest.approx(mean, rel=1e-9)
    np.testing.assert_array_equal(values["log_px"].values, values[f"{chosen}_log_px"].values)
    np.testing.assert_array_equal(values["log_px_se"].values, values[f"{chosen}_mc_se"].values)
    stated = re.search(f"log p\\(x\\), {split}: the higher, of (.*?), -", (written / "table.md").read_text())[1]
    assert stated == inference_gaps.ESTIMATORS[chosen]


def test_no_estimate_is_the_lowest():
    nan, low = (Evidence(torch.tensor([value, -1.0]), *[torch.zeros(2)] * 5) for value in (torch.nan, -90.0))
    assert inference_gaps.higher({"annealed": nan, "importance": low}) == "importance"
    assert inference_gaps.higher({"annealed": low, "importance": nan}) == "annealed"


def test_a_seed_repeats_itself(trained, tmp_path):
    first, same, other = (
        inference_gaps.main([str(trained), *SHORT, f"--seed={seed}", f"--run_dir={tmp_path / name}"])
        for name, seed in (("first", 3), ("same", 3), ("other", 4))
    )
    assert without_place_and_time(first) == without_place_and_time(same)
    for split in inference_gaps.SPLITS:
        assert per_image(first, split).identical(per_image(same, split))
        assert (per_image(first, split)["elbo"] != per_image(other, split)["elbo"]).all()


def test_the_family_is_the_one_asked_for(trained, tmp_path):
    out = inference_gaps.main([str(trained), *SHORT, "--family=flow", f"--run_dir={tmp_path / 'flow'}"])
    gaps, text = result(out)["splits"]["train"]["gaps"], (out / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| approximation gap"))
    assert f"{gaps['approximation_gap_flow']['mean']:.3f}" in row
    assert "approximation gap = log p(x) - L[q*], flow;" in text


def test_impossible_gaps_are_pointed_out(written):
    found = result(written)
    assert "below zero" not in inference_gaps.report(found)
    found["splits"]["train"]["gaps"]["amortization_gap_mean_field"] |= {"mean": -0.5, "mc_se": 0.1}
    found["splits"]["test"]["gaps"]["approximation_gap_mean_field"] |= {"mean": -0.1, "mc_se": 0.2}
    text = inference_gaps.report(found)
    assert "the amortization gap, train, is below zero" in text
    assert text.count("below zero") == 1


def test_nothing_is_overwritten(trained, written, tmp_path):
    before = {path: path.read_bytes() for path in written.iterdir()}
    assert f"{written} exists and is never overwritten" in complaint(trained, *SHORT)
    assert {path: path.read_bytes() for path in written.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        assert "choose another directory by --run_dir" in complaint(trained, *SHORT, "--run_dir", taken)
    assert "Not a directory" in complaint(trained, *SHORT, "--run_dir", tmp_path / "file" / "gaps")
    (tmp_path / "empty").mkdir()
    assert inference_gaps.main([str(trained), *SHORT, f"--run_dir={tmp_path / 'empty'}"]) == tmp_path / "empty"


def test_an_unfinished_run_is_refused(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    assert "holds no finished run" in complaint(tmp_path, *SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_images=1", "--num_images must be at least 2, got 1"),
        ("--num_samples=0", "--num_samples must be at least 2, got 0"),
        ("--num_steps=0", "--num_steps must be at least 1, got 0"),
        ("--seed=-1", "--seed must be at least 0"),
        ("--family=full_rank", "--family: expected one of"),
        ("--annealing.num_chains=1", "num_chains must be at least 2, got 1"),
    ],
)
def test_bad_settings_are_named(trained, tmp_path, option, message):
    assert message in complaint(trained, f"--run_dir={tmp_path / 'out'}", option)
    assert not (tmp_path / "out").exists()


def test_discrete_latent_variables_are_refused(trained, tmp_path, monkeypatch):
    programs = BinaryLatents(pixels=64)
    for name in ("prior", "weight", "proposal"):
        setattr(programs, name, getattr(programs, name).float())
    vae = SimpleNamespace(model=programs.model, guide=programs.guide, to=lambda device: vae)
    monkeypatch.setattr(loading, "load_model", lambda directory, trust: vae)
    message = complaint(trained, *SHORT, f"--run_dir={tmp_path / 'out'}")
    assert message.startswith(f"{trained}: ")
    assert "discrete" in message
