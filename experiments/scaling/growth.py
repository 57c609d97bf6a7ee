"""Seconds and memory of importance sampling, of annealing and of a training step, against one size at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.scaling.rows import Row, timed
from pyro_vae import ELBO, VAE, Annealing, CompiledSVI, annealed_importance_sampling, importance_sampling, runs
from pyro_vae.parts.conditional import Conditional
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import MeanField
from pyro_vae.parts.priors import StandardNormal

if TYPE_CHECKING:
    from experiments.scaling.__main__ import Settings


@dataclass(frozen=True)
class Sizes:
    """Of data and model; of each line one varies, and the others are these, where they are measured at all."""

    images: int
    samples: int
    latent_dims: int
    pixels: int
    widths: int


NAMES = {"images": "images", "samples": "samples", "latent_dims": "latent dimensions", "pixels": "pixels"}
NAMES |= {"widths": "width"}
CHAINS = 12


def measure(settings: "Settings", run_dir: Path) -> list[Row]:
    """Rows of each line. Images are drawn from the model, whose weights are those it begins with."""
    del run_dir  # nothing is left there
    device, rows = runs.choose_device(settings.device), []
    middle = Sizes(*(sorted(getattr(settings, name))[len(getattr(settings, name)) // 2] for name in NAMES))
    for by, name in NAMES.items():
        for value in getattr(settings, by):
            for what, call, note in _calls(replace(middle, **{by: value}), device):
                seconds, mebibytes = timed(call, settings.tries)
                rows.append(Row(what, name, value, seconds, mebibytes, note))
                print(f"{what}, {name} {value}: {seconds:.3g} s")
    return rows


def _calls(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], object], str]]:
    """What is timed, by name, with what its samples are; but for the step uncompiled, since compiling takes as long."""
    vae = model(sizes).to(device)
    x, num = draws(vae, sizes.images), 10 * sizes.samples
    chains = Annealing(CHAINS, sizes.samples, "guide", num_checked=0)

    def sampling() -> object:
        return importance_sampling(vae.model, vae.guide, x, num, num_checked=0, compiled=False)

    def annealing() -> object:
        return annealed_importance_sampling(vae.model, vae.guide, x, chains, compiled=False)

    yield "importance sampling", sampling, f"{num} samples of each image"
    yield "annealing", annealing, f"{sizes.samples} temperatures, {CHAINS} chains"
    svi = CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=1e-4), ELBO(sizes.samples))
    yield "training step", lambda: svi.step(x), f"{sizes.samples} samples of each image"


def model(sizes: Sizes) -> VAE:
    """A VAE of two hidden layers each way."""
    hidden = [sizes.widths, sizes.widths]
    likelihood, posterior = Bernoulli(sizes.pixels), MeanField(sizes.latent_dims)
    return VAE(
        StandardNormal(sizes.latent_dims),
        Conditional(MLP(sizes.latent_dims, sum(likelihood.sizes), hidden), likelihood),
        Conditional(MLP(sizes.pixels, sum(posterior.sizes), hidden), posterior),
    )


def draws(vae: VAE, number: int) -> Tensor:
    """Images that the model draws, ``(number, pixels)``."""
    with torch.no_grad():
        z = vae.prior(None).sample((number,))
        return vae.likelihood(z).sample()
