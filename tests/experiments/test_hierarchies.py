"""Hierarchies whose log p(x) is known: a small comparison, and what is refused."""

import json

import pytest

from experiments import hierarchies
from pyro_vae import runs


@pytest.mark.slow
def test_a_small_comparison(tmp_path):
    argv = ["--sizes=[2x2]", "--num_data=4", "--num_samples=200", f"--run_dir={tmp_path / 'run'}"]
    short = ["--annealing.num_temperatures=6", "--annealing.num_checked=0", "--annealing.num_climbs=0"]
    run_dir = hierarchies.main([*argv, *short])
    rows = json.loads((run_dir / "result.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["linear", "curved"]
    for row in rows:
        assert row["annealed"]["rms"] < 5 * row["annealed"]["stated"] < 1.5
        assert row["annealed"]["reliable"] > 0.5
        assert abs(row["importance"]["bias"]) < 0.5
    text = (run_dir / "table.md").read_text()
    assert text.count("\n") == 4
    assert f"| linear, 2 x 2 | 4 | {rows[0]['annealed']['rms']:.3f} |" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sizes=[1x4]"], "at least 2 levels, such as 4x16, got 1x4"),
        (["--sizes=[4by4]"], "got 4by4"),
        (["--kinds=[]"], "name at least one"),
        (["--num_data=1"], "--num_data must be at least 2"),
    ],
)
def test_bad_settings_are_refused(argv, words):
    with pytest.raises(runs.RunError, match=words):
        hierarchies.main(argv)
