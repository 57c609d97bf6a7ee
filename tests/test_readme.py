"""The README's Python works as written."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of ArviZ
def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    with pyro.get_param_store().scope():
        for block in blocks:
            exec(compile(block, README.name, "exec"), namespace)
        weight = namespace["guide"].median()["weight"]
    log_px, over_images, monte_carlo = (float(v) for v in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)[:3])
    assert -30 < log_px < -20
    assert 0 < monte_carlo < over_images < 0.5
    assert namespace["history"][-1].train_elbo > namespace["history"][0].train_elbo
    width, error = namespace["width"], namespace["error"]
    assert abs(width) < 5 * error
    assert weight.tolist() == pytest.approx([1.0, -2.0, 0.5], abs=0.1)
    assert len(plt.get_fignums()) == 2  # ArviZ's figures
    plt.close("all")
    assert namespace["loss"] / len(namespace["batch"]) == pytest.approx(-log_px, abs=10)
