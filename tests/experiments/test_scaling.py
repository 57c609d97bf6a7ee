"""Growth with sizes and workers: exponents against lines whose slope is known, and a page made of known numbers."""

import json
import math

import numpy as np
import pytest

from experiments.scaling import __main__ as scaling
from experiments.scaling import costs, evidence
from experiments.scaling.rows import Row, exponents, fit, timed
from pyro_vae import runs


def test_exponents_are_those_of_power_laws():
    rows = [Row("a", "images", n, 3e-4 * n**1.5) for n in (10, 100, 1000)]
    rows += [Row("a", "workers", 1, 4.0), Row("a", "workers", 2, 2.0), Row("b", "images", 10, 1.0)]
    (each,) = exponents(rows)
    assert (each.what, each.by) == ("a", "images")
    assert each.exponent == pytest.approx(1.5)
    assert each.error == pytest.approx(0, abs=1e-6)
    assert each.seconds(1e6) == pytest.approx(3e-4 * 1e9)


def test_errors_of_exponents_are_those_of_least_squares():
    x, noise = np.array([1.0, 2, 4, 8, 16]), np.array([0.1, -0.2, 0.05, 0.1, -0.05])
    found = fit("a", "b", x, 2 * x * np.exp(noise))
    (slope, _), covariance = np.polyfit(np.log(x), np.log(2 * x) + noise, 1, cov="unscaled")
    rest = np.log(2 * x) + noise - np.polyval(np.polyfit(np.log(x), np.log(2 * x) + noise, 1), np.log(x))
    assert found.exponent == pytest.approx(slope)
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0] * (rest**2).sum() / 3))
    assert math.isnan(fit("a", "b", [1, 2], [1, 2]).error)
    with pytest.raises(ValueError, match="at least two values"):
        fit("a", "b", [1, 1], [1, 2])


def test_the_most_memory_is_that_of_the_call():
    _, held = timed(lambda: np.ones(2**22), tries=1)  # 32 MiB
    assert held is None or 30 < held < 60


def test_costs_are_the_largest_measurement_times_powers_of_ratios():
    rows = [Row("annealing", "images", n, 1e-2 * n) for n in (10, 100, 1000)]
    rows += [Row("annealing", "pixels", n, 2e-3 * n**0.5) for n in (100, 400, 1600)]
    rows += [Row("study of 4 runs", "workers", 1, 40.0), Row("study of 4 runs", "workers", 2, 20.0)]
    fitted = exponents(rows)
    seconds, factor = costs.extrapolated("annealing", {"images": 1e6, "pixels": 64 * 64 * 3}, rows, fitted)
    assert seconds == pytest.approx(1e4 * (12288 / 400) ** 0.5)
    assert factor == pytest.approx(1, abs=1e-6)
    result = {"date": "2026-01-01", "device": "cpu, 1 threads", "rows": [row._asdict() for row in rows]}
    text = costs.page(json.loads(json.dumps(result | {"exponents": [vars(each) for each in fitted]})))
    assert "| annealing " in text
    assert "1e+04" in text  # 1,000,000 images, 1,000 runs
    assert "2.00" in text  # two workers
    with pytest.raises(ValueError, match="no exponent of annealing against width"):
        costs.extrapolated("annealing", {"width": 5}, rows, fitted)


def test_a_page_needs_measurements(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    for argv, words in [
        ([str(tmp_path / "result.json")], "holds no measurements of experiments.scaling: 'rows'"),
        ([str(tmp_path / "none.json")], "No such file"),
        ([], "usage: python -m experiments.scaling.costs"),
    ]:
        with pytest.raises(runs.RunError, match=words):
            costs.main(argv)


SMALL = "--images [2,4] --samples [2] --latent_dims [1] --pixels [4,9] --widths [2] --tries 1"


@pytest.mark.slow
def test_growth_is_measured_in_every_direction_and_gone_on_with(tmp_path, monkeypatch):
    argv = [*SMALL.split(), "--parts=[growth]", f"--run_dir={tmp_path}"]
    out = scaling.main(argv)
    found = json.loads((out / "result.json").read_text())
    assert len(found["rows"]) == (2 + 1 + 1 + 2 + 1) * 3
    assert {(row["what"], row["by"]) for row in found["exponents"]} == {
        (what, by) for what in ("importance sampling", "annealing", "training step") for by in ("images", "pixels")
    }
    assert (out / "scaling.png").stat().st_size > 5000
    costs.main([str(out / "result.json"), str(tmp_path / "page.md")])
    assert "1,000,000 images of 64x64x3" in (tmp_path / "page.md").read_text()
    monkeypatch.setattr("experiments.scaling.growth.measure", None)  # what is there is not measured again
    scaling.main([*argv, "--resume"])


def test_bad_settings_are_refused():
    for argv, words in [
        (["--pixels=[10]"], "--pixels must be squares"),
        (["--images=[1]"], "must be at least 2"),
        (["--parts=[]"], "--parts: there is none"),
        (["--parts=[nothing]"], "--parts"),
        (["--workers=[0]"], "--workers"),
    ]:
        with pytest.raises(runs.RunError, match=words):
            scaling.main(argv)


@pytest.mark.slow
def test_evaluations_are_timed_and_their_digits_compared(tmp_path, monkeypatch):
    """In this process: what several do is tested where they are."""

    def evaluated(run, path, workers, settings, cache):
        runs.score(run, run_dir=path, num_images=settings.num_images, workers=1)
        return 8.0 / workers

    monkeypatch.setattr(evidence, "_evaluated", evaluated)
    monkeypatch.setattr(evidence, "seconds_of", lambda command, **environment: 1.0)
    common = "--dataset Digits --epochs 1 --latent_dim 2 --encoder.hidden [8] --decoder.hidden [8] --device cpu"
    common += " --evidence.num_images 20 --evidence.num_samples 5 --evidence.annealed_images 0"
    argv = [f"--common={common}", "--parts=[evidence]", "--num_images=4", f"--run_dir={tmp_path / 'out'}"]
    out = scaling.main(argv)
    found = json.loads((out / "result.json").read_text())
    cold = "annealed evidence, nothing compiled before"
    assert [(row["what"], row["value"]) for row in found["rows"]] == [
        ("imports", 1),
        (cold, 1),
        (f"{cold}, whole command", 1),
        ("annealed evidence", 1),
        ("annealed evidence, whole command", 1),
        ("annealed evidence", 2),
        ("annealed evidence, whole command", 2),
    ]
    whole = [line for line in (out / "table.md").read_text().splitlines() if "evidence, whole command" in line]
    assert "| 2.00 " in "".join(whole).replace("          2.00", " 2.00")
    home = out / "evidence" / "run" / "evaluations"
    other = runs.score(home.parent, num_images=4, seed=1, workers=1)
    with pytest.raises(runs.RunError, match="log_px of annealed differs"):
        evidence.same_digits(home / "workers-1", other.path)
