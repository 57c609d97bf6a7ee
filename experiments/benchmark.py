"""How fast is it? Every contender is timed side by side in one process, and the table gives ratios of medians.

Importance sampling, in decodes per second (samples x images; a 50-400-784 decoder with Bernoulli pixels):
the bare matrix products of the decoder (the floor), pyro_vae's importance_sampling, and Pyro's own two ways, its
Importance and its vectorized_importance_weights. Both of Pyro's give one weight for a whole batch, so that an image's
own log p(x) takes a call of its own. Pyro's validation is off for all. Run it while nothing else uses the machine.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyro
import torch
from pyro.infer import Importance
from pyro.infer.importance import vectorized_importance_weights
from tqdm import tqdm

from experiments import runs
from pyro_vae import MLP, VAE, Bernoulli, Conditional, MeanField, StandardNormal, importance_sampling


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        repeats: timed calls of each contender, at least 3; one more before them warms up.
        num_images: images scored in one call, at least 1.
        num_samples: importance samples per image in one call, at least 1.
        device: auto takes a GPU if there is one.
        run_dir: directory to write benchmark.json and config.yaml to, new or empty; null: print only.
    """

    repeats: int = 7
    num_images: int = 100
    num_samples: int = 1000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: Path | None = None

    def __post_init__(self):
        for name, least in (("repeats", 3), ("num_images", 1), ("num_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the benchmark as told by ``argv``; return its table."""
    config, text = runs.parse(Config, argv)
    device = runs.device(config.device)
    torch.manual_seed(0)
    rates = importance_throughput(config, device)
    floor = rates["bare matrix products"]["median"]
    rows = [("importance sampling", "decodes per second", "of the bare products", "spread")]
    for name, rate in rates.items():
        spread = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
        rows.append((name, f"{rate['median']:,.0f}", f"{rate['median'] / floor:.3g}", spread))
    print(f"\n{runs.table(rows)}")
    if config.run_dir:
        runs.open_run(config.run_dir, text, resume=False)
        result = {"importance_sampling": rates, **runs.provenance(device)}
        runs.write_json(config.run_dir / "benchmark.json", result)
        print(config.run_dir / "benchmark.json")
    else:
        print(json.dumps(runs.provenance(device)))
    return rates


def importance_throughput(config: Config, device: torch.device) -> dict[str, dict[str, float]]:
    """Decodes per second of each contender: median, and the lowest and highest of its calls."""
    decoder = MLP(50, 784, hidden=[400])
    vae = VAE(
        StandardNormal(50),
        likelihood=Conditional(decoder, Bernoulli(784)),
        posterior=Conditional(MLP(784, 100, hidden=[400]), MeanField(50)),
    ).to(device)
    x = torch.bernoulli(torch.full((config.num_images, 784), 0.2, device=device))
    decodes = config.num_images * config.num_samples
    rows = 2000  # of one matrix product: a size at which they are fastest here
    inputs = [torch.randn(rows, layer.in_features, device=device) for layer in decoder.layers]
    weights = [layer.weight.detach().mT for layer in decoder.layers]
    single = 200  # samples of one image for Importance, which runs the whole program once per sample

    def bare_products() -> None:
        for _ in range(-(-decodes // rows)):
            for matrix, weight in zip(inputs, weights, strict=True):
                matrix @ weight

    def ours() -> None:
        importance_sampling(vae.model, vae.guide, x, config.num_samples)

    def looped() -> None:
        with torch.no_grad(), pyro.validation_enabled(False):
            Importance(vae.model, vae.guide, num_samples=single).run(x[:1]).get_log_normalizer()

    def vectorized() -> None:
        with torch.no_grad(), pyro.validation_enabled(False):
            for image in x.split(1):
                log_w, _, _ = vectorized_importance_weights(
                    vae.model, vae.guide, image, num_samples=config.num_samples, max_plate_nesting=1
                )
                log_w.logsumexp(0)

    contenders = {
        "bare matrix products": (bare_products, -(-decodes // rows) * rows),
        "pyro_vae importance_sampling": (ours, decodes),
        "Pyro vectorized_importance_weights": (vectorized, decodes),
        "Pyro Importance": (looped, single),
    }
    calls = {name: call for name, (call, _) in contenders.items()}
    result = {}
    for name, seconds in interleave(calls, config.repeats, device).items():
        rates = [contenders[name][1] / s for s in seconds]
        result[name] = {"median": statistics.median(rates), "low": min(rates), "high": max(rates)}
    return result


def interleave(
    contenders: dict[str, Callable[[], object]], repeats: int, device: torch.device, progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of each contender's calls, after one to warm up, the contenders taking turns.

    Taking turns spreads whatever else the machine does over all of them; on a GPU each call is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for turn in tqdm(range(repeats + 1), disable=not progress, desc="timing", unit="turn"):
        for name, call in contenders.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    runs.cli(main)
