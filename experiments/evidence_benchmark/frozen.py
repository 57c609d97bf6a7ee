"""VAEs of 8x8 digits, trained once and frozen, with 50 test images each.

``python -m experiments.evidence_benchmark.frozen`` trained them, and prints the hashes of the files that it writes.
Other versions of torch would train others, to which the stored references do not belong.
"""

import hashlib
from pathlib import Path

import pyro
import torch
from safetensors.torch import load, save
from torch import Tensor

from experiments.evidence_benchmark.exact import integral
from experiments.evidence_benchmark.integrals import log_integral, over_reals, panels
from experiments.evidence_benchmark.planar import log_likelihood
from experiments.evidence_benchmark.task import Task
from pyro_vae import MLP, VAE, Bernoulli, Conditional, MeanField, StandardNormal, fit
from pyro_vae.data import Digits
from pyro_vae.errors import RunError
from pyro_vae.infer.programs import Program

HERE = Path(__file__).parent
HASHES = {
    2: "2226a428ee3c2fdfccd838937d298c3e3de651329eae9683d810e5613c62d5dd",
    10: "e5387f2284f4258f71c566bb2043efc56c59451bb108baae9aa70cd3376c061d",
}
"""SHA-256 of each file, by latent dimensions."""


def frozen(latent_dim: int, directory: Path = HERE) -> tuple[VAE, Tensor]:
    """The frozen VAE of so many latent dimensions, and its data ``(50, 64)``.

    Raises:
        RunError: if its file is missing, or is not the one of ``HASHES``.
    """
    path = directory / f"digits_{latent_dim}d.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != HASHES[latent_dim]:
        raise RunError(
            f"{path} is not the VAE whose log p(x) is known: its SHA-256 is {found[:12]}.., not "
            f"{HASHES[latent_dim][:12]}..; restore it from version control"
        )
    tensors = load(content)
    x = tensors.pop("data").float()
    vae = _vae(latent_dim)
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False), x


def digits_2d() -> Task:
    """The VAE of two latent dimensions, by quadrature in float64: its posteriors often have two modes."""
    vae, x = frozen(2)
    decoder, pixels = _vae(2).double(), x.double()
    decoder.load_state_dict(vae.state_dict())

    def log_density(z: Tensor) -> Tensor:
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1, keepdim=True)
        with torch.no_grad():
            return prior + log_likelihood(decoder.likelihood.network(z), pixels)

    edges = panels(-2.8, 2.8, 24)
    result = log_integral(over_reals(log_density), edges, edges, nodes=14)
    return integral("digits_2d", (vae.model, vae.guide), x, result, "quadrature over z")


def digits_10d() -> tuple[tuple[Program, Program], Tensor]:
    """Programs and data of the VAE of ten latent dimensions, whose log p(x) is stored."""
    vae, x = frozen(10)
    return (vae.model, vae.guide), x


def train(latent_dim: int) -> dict[str, Tensor]:
    """Train the VAE of so many dimensions; return its weights and data as they are kept."""
    torch.manual_seed(latent_dim)
    data = Digits(Path("unused")).load()
    vae = _vae(latent_dim)
    vae.initialize(data.observe(torch.arange(1000)))
    with pyro.get_param_store().scope():
        fit(vae, data.batches(100), epochs=100, progress=False)
    return {**vae.state_dict(), "data": data.test[:50].to(torch.uint8)}


def _vae(latent_dim: int) -> VAE:
    hidden = [64]
    return VAE(
        StandardNormal(latent_dim),
        likelihood=Conditional(MLP(latent_dim, 64, hidden=hidden), Bernoulli(64)),
        posterior=Conditional(MLP(64, 2 * latent_dim, hidden=hidden), MeanField(latent_dim)),
    )


if __name__ == "__main__":
    for dim in HASHES:
        content = save(train(dim))
        HERE.joinpath(f"digits_{dim}d.safetensors").write_bytes(content)
        print(dim, hashlib.sha256(content).hexdigest())
