"""How fast is it? Every contender is timed side by side in one process, and the table gives ratios of medians.

A training step, in milliseconds (784-400-50 and back, Bernoulli pixels, Adam): Pyro's SVI with Trace_ELBO as it is,
with its validation off, Pyro's ELBOModule with torch's Adam, the ELBO by hand, the same under torch.compile,
CompiledSVI, and the bare matrix products of forward and backward pass (the floor). First calls, which compile, are
timed apart.

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
from pyro.infer import SVI, Importance, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from experiments import runs
from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    MeanField,
    StandardNormal,
    handrolled,
    importance_sampling,
)


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Args:
        repeats: timed calls of each contender, at least 3; one more before them warms up.
        steps: training steps in one call, at least 1.
        batch_sizes: observations of a training step, each at least 1.
        num_images: images scored in one call, at least 1.
        num_samples: importance samples per image in one call, at least 1.
        device: auto takes a GPU if there is one.
        run_dir: directory to write benchmark.json and config.yaml to, new or empty; null: print only.
    """

    repeats: int = 7
    steps: int = 20
    batch_sizes: Sequence[int] = (32, 128, 256, 512)
    num_images: int = 100
    num_samples: int = 1000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: Path | None = None

    def __post_init__(self):
        for name, least in (("repeats", 3), ("steps", 1), ("num_images", 1), ("num_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"--batch_sizes must all be at least 1, got {list(self.batch_sizes)}")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the benchmark as told by ``argv``; return its table."""
    config, text = runs.parse(Config, argv)
    device = runs.device(config.device)
    torch.manual_seed(0)
    training = {}
    for size in config.batch_sizes:
        training[size] = training_steps(config, size, device)
        floor, reference = training[size]["bare matrix products"]["median"], training[size][REFERENCE]["median"]
        rows = [
            (f"training step, batch of {size}", "milliseconds", f"of {REFERENCE}", "of the products", "first call, s")
        ]
        for name, each in training[size].items():
            ratios = f"{each['median'] / reference:.3g}", f"{each['median'] / floor:.3g}"
            rows.append((name, f"{1e3 * each['median']:.2f}", *ratios, f"{each['first']:.1f}"))
        print(f"\n{runs.table(rows)}")
    rates = importance_throughput(config, device)
    floor = rates["bare matrix products"]["median"]
    rows = [("importance sampling", "decodes per second", "of the bare products", "spread")]
    for name, rate in rates.items():
        spread = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
        rows.append((name, f"{rate['median']:,.0f}", f"{rate['median'] / floor:.3g}", spread))
    print(f"\n{runs.table(rows)}")
    if config.run_dir:
        runs.open_run(config.run_dir, text, resume=False)
        result = {"training": training, "importance_sampling": rates, **runs.provenance(device)}
        runs.write_json(config.run_dir / "benchmark.json", result)
        print(config.run_dir / "benchmark.json")
    else:
        print(json.dumps(runs.provenance(device)))
    return rates


REFERENCE = "Pyro SVI, Trace_ELBO"


def training_steps(config: Config, batch_size: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of one step of each contender: median, lowest and highest, and those of its first call, all steps."""
    x = torch.bernoulli(torch.full((batch_size, 784), 0.2, device=device))

    def make() -> tuple[VAE, torch.optim.Optimizer]:
        vae = VAE(
            StandardNormal(50),
            likelihood=Conditional(MLP(50, 784, hidden=[400]), Bernoulli(784)),
            posterior=Conditional(MLP(784, 100, hidden=[400]), MeanField(50)),
        ).to(device)
        return vae, torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)

    def pyro_svi(validated: bool) -> Callable[[], object]:
        vae, _ = make()

        def model(x: Tensor) -> Tensor:
            pyro.module("vae", vae)
            return vae.model(x)

        svi = SVI(model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        store = pyro.get_param_store().get_state()

        def step() -> None:
            with pyro.get_param_store().scope(store), pyro.validation_enabled(validated):
                svi.step(x)

        return step

    def differentiated(loss: Callable[[], Tensor], optim: torch.optim.Optimizer) -> Callable[[], object]:
        def step() -> None:
            optim.zero_grad()
            loss().backward()
            optim.step()

        return step

    def elbo_module() -> Callable[[], object]:
        vae, optim = make()
        loss = Trace_ELBO()(vae.model, vae.guide)
        step = differentiated(lambda: loss(x), optim)

        def without_validation() -> None:
            with pyro.validation_enabled(False):
                step()

        return without_validation

    def by_hand(compiled: bool) -> Callable[[], object]:
        vae, optim = make()

        def loss(x: Tensor) -> Tensor:
            return -handrolled.elbo(vae.posterior.network, vae.likelihood.network, x, sampled_kl=True).mean()

        run = torch.compile(loss, dynamic=False) if compiled else loss
        return differentiated(lambda: run(x), optim)

    def compiled_svi() -> Callable[[], object]:
        vae, optim = make()
        svi = CompiledSVI(vae.model, vae.guide, optim, Trace_ELBO())
        return lambda: svi.step(x)

    def bare_products() -> Callable[[], object]:
        widths = [(784, 400), (400, 100), (50, 400), (400, 784)]
        inputs = [torch.randn(batch_size, m, device=device) for m, _ in widths]
        outputs = [torch.randn(batch_size, n, device=device) for _, n in widths]
        weights = [torch.randn(m, n, device=device) for m, n in widths]

        def step() -> None:
            for i, (a, b, w) in enumerate(zip(inputs, outputs, weights, strict=True)):
                a @ w
                a.mT @ b  # the weight's gradient
                if i:
                    b @ w.mT  # the input's, which pixels do not need

        return step

    validation = Distribution._validate_args
    contenders = {
        REFERENCE: pyro_svi(validated=True),
        "the same, without validation": pyro_svi(validated=False),
        "Pyro ELBOModule, torch Adam": elbo_module(),
        "by hand": by_hand(compiled=False),
        "by hand, torch.compile": by_hand(compiled=True),
        "CompiledSVI": compiled_svi(),
        "bare matrix products": bare_products(),
    }

    def repeated(step: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            for _ in range(config.steps):
                step()

        return call

    first = {}
    for name, step in contenders.items():
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
    Distribution._validate_args = validation  # torch.compile switches it off
    result = {}
    calls = {name: repeated(step) for name, step in contenders.items()}
    for name, seconds in interleave(calls, config.repeats, device).items():
        each = [s / config.steps for s in seconds]
        result[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "first": first[name]}
    return result


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
