"""The README's Python works as written, and it is short."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict = {}
    with pyro.get_param_store().scope():
        for block in blocks:
            exec(compile(block, README.name, "exec"), namespace)
        weight = namespace["svi"].guide.median()["weight"]
    log_px, over_images, monte_carlo = (float(v) for v in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)[:3])
    assert -30 < log_px < -20
    assert 0 < monte_carlo < over_images < 0.5
    assert namespace["history"][-1].train_elbo > namespace["history"][0].train_elbo
    test = namespace["data"].test
    assert namespace["vae"].model(test).shape == test.shape  # under the prior that replaced the first
    assert weight.tolist() == pytest.approx([1.0, -2.0, 0.5], abs=0.1)
    # without its effect, y has variance 1 + 0.25 around 2 x; what was not seen counts nothing
    x, y, seen, evidence = (namespace[name] for name in ("x", "y", "seen", "evidence"))
    truth = torch.where(seen, dist.Normal(2 * x, 1.25**0.5).log_prob(y), 0.0).double()
    assert (evidence.log_px[~seen] == 0).all()
    assert ((evidence.log_px - truth).abs() < 6 * evidence.mc_se + 1e-4).all()
    assert (evidence.khat[seen] < 0.5).all()


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 150
