"""How fast is it? Every contender is timed side by side in one process, and the tables give ratios of medians.

step: a training step, at several batch sizes (784-400-50 and back, tanh, Bernoulli pixels, float32, K = 1, Adam):
Pyro's SVI with Trace_ELBO as its documentation has it; the same with its validation off and fused Adam, which all that
follow have; Pyro's ELBOModule; the ELBO by hand, the same under torch.compile and, on a GPU, in a CUDA graph;
CompiledSVI in both precisions; and the bare matrix products of forward and backward pass (the floor).

models: a step of other models: the same with 50 particles; convolutional networks; a VampPrior of 100 pseudo-inputs; a
posterior that is an inverse autoregressive flow.

programs: a step of a small Pyro program, one of each kind that people write (programs.py): Pyro's SVI, as its
documentation has it; CompiledSVI in its place, the graph run as it was traced, and compiled by inductor.

epoch: all images once, at a batch of 256, shuffled and binarized anew, their pixels random. This library's batches feed
all but the floor and two contenders of other libraries, timed where these are installed: NumPyro's epoch is one jitted
loop over its SVI; pythae's is that of its BaseTrainer, with a loader of single images and the KL divergence in closed
form.

evidence: importance sampling, in decodes per second (samples x images; a 50-400-784 decoder with Bernoulli pixels): the
bare matrix products of the decoder (the floor), pyro_vae's importance_sampling, and Pyro's own two ways, its Importance
and its vectorized_importance_weights. Both of Pyro's give one weight for a whole batch, so that an image's own log p(x)
takes a call of its own. Pyro's validation is off for all. So long a job compiles itself on its way, which counts.

On a GPU, where a step of Pyro takes as long as fifty of its own, steps of CompiledSVI are timed after the 520th: up to
there ten are Pyro's own, of which it makes sure, and from there on one in a thousand.

The first call of each contender, which makes and compiles it, is timed apart; a graph that inductor finds in its cache
on disk takes less, and an empty TORCHINDUCTOR_CACHE_DIR shows all of it. Memory is, on a GPU, the most that torch
allocates for a contender during that call, and on a CPU the process's peak after each part. Run it while nothing else
uses the machine.
"""

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from pyro.infer import ELBO, SVI, Importance, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from pyro.optim import Adam  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from experiments.benchmark.programs import PROGRAMS, Program
from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    MeanField,
    StandardNormal,
    cli,
    handrolled,
    importance_sampling,
    runs,
)
from pyro_vae.data.images import Dataset, Images
from pyro_vae.parts import posteriors
from pyro_vae.parts.conditional import num_outputs
from pyro_vae.parts.networks import ConvDecoder, ConvEncoder
from pyro_vae.parts.priors import VampPrior
from pyro_vae.runs import figures

REFERENCE = "Pyro SVI, Trace_ELBO"
ANY_LOSS = "Pyro SVI"
"""The reference of part programs, each of which has a loss of its own."""
FLOOR = "bare matrix products"
EPOCH_BATCH = 256
"""Images of a gradient step of an epoch."""
TITLES = {
    "step": "training step",
    "models": "step of another model",
    "programs": "step of a small program",
    "epoch": "epoch",
    "evidence": "importance sampling",
}
LIBRARIES = {"NumPyro": ("numpyro", "jax"), "pythae": ("pythae",)}
"""Packages of the contenders that are no dependencies, their own first."""

Step = Callable[[Tensor], object]
"""Takes one gradient step on observations ``(B, X)``."""
Measured = dict[str, float]
"""Seconds of one step, epoch or decode, ``median``, ``low`` and ``high``; those of the whole first call, ``first``; on
a GPU also ``peak_bytes``, what torch allocated for it."""


class Contender(NamedTuple):
    """What is timed: ``make`` returns the call, which does ``units`` steps, epochs or decodes; ``unseen`` more calls
    come before those that are timed."""

    make: Callable[[], Callable[[], object]]
    units: int = 1
    unseen: int = 0


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        parts: what is timed, at least one part.
        repeats: timed calls of each contender, at least 3; one more before them warms up.
        steps: training steps in one call, at least 1.
        batch_sizes: observations of a training step in part step, each at least 1.
        models: what part models times.
        model_batch_size: observations of a training step in part models, at least 1.
        programs: what part programs times, names in programs.py; null: all.
        epoch_images: images of an epoch, at least 256 and rounded down to whole batches of as many.
        long_repeats: timed epochs, and calls of part evidence, of each contender, at least 3; one more before them
            warms up.
        num_images: images scored in one call of part evidence, at least 1.
        num_samples: importance samples per image in one call of this library, at least 1; the other contenders take
            1,000.
        device: auto takes a GPU if there is one.
        run_dir: directory to write result.json, benchmark.png and config.yaml to, new or empty; null: print only.
    """

    parts: Sequence[Literal["step", "models", "programs", "epoch", "evidence"]] = (
        "step",
        "models",
        "programs",
        "epoch",
        "evidence",
    )
    repeats: int = 7
    steps: int = 20
    batch_sizes: Sequence[int] = (32, 128, 256, 512)
    models: Sequence[Literal["K=50", "conv", "VampPrior", "flow"]] = ("K=50", "conv", "VampPrior", "flow")
    model_batch_size: int = 128
    programs: Sequence[str] | None = None
    epoch_images: int = 60_000
    long_repeats: int = 3
    num_images: int = 100
    num_samples: int = 50_000
    device: str = "auto"
    run_dir: Path | None = None

    def __post_init__(self):
        least = {"repeats": 3, "steps": 1, "model_batch_size": 1, "epoch_images": EPOCH_BATCH, "long_repeats": 3}
        for name, bound in (least | {"num_images": 1, "num_samples": 1}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("parts", "batch_sizes", "models"):
            if not getattr(self, name):
                raise ValueError(f"--{name} must not be empty")
        unknown = [name for name in self.programs or [] if name not in PROGRAMS]
        if self.programs is not None and (unknown or not self.programs):
            raise ValueError(f"--programs must be some of {', '.join(map(repr, PROGRAMS))}, got {list(self.programs)}")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"--batch_sizes must all be at least 1, got {list(self.batch_sizes)}")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, Measured]]]:
    """Run the benchmark as told by ``argv``; return what was measured, by part, group and contender."""
    settings, text = runs.parse(Settings, argv)
    if settings.run_dir:
        runs.check_run_dir(settings.run_dir, text, resume=None)
    device = runs.choose_device(settings.device)
    torch.manual_seed(0)
    parts = {
        "step": training_steps,
        "models": model_steps,
        "programs": program_steps,
        "epoch": epochs,
        "evidence": importance_throughput,
    }
    measured: dict[str, dict[str, dict[str, Measured]]] = {}
    memory: dict[str, int] = {}
    for part in dict.fromkeys(settings.parts):
        measured[part] = {}
        for group, contenders in parts[part](settings, device):
            measured[part][group] = contenders
            make_table = rate_table if part == "evidence" else time_table
            print(f"\n{make_table(f'{TITLES[part]}, {group}', contenders)}", flush=True)
        if part == "programs":
            print(f"\n{summary_table(measured[part])}", flush=True)
        memory[part] = peak_resident_bytes()
        print(f"\npeak memory of the process after part {part}: {memory[part] / 2**20:,.0f} MiB", flush=True)
    origin = runs.provenance(device)
    timed = {name for groups in measured.values() for contenders in groups.values() for name in contenders}
    packages = (package for name, those in LIBRARIES.items() if name in timed for package in those)
    origin["versions"] |= {package: version(package) for package in packages}
    if settings.run_dir:
        runs.open_run(settings.run_dir, text, resume=None)
        runs.write_json(settings.run_dir / "result.json", measured | {"peak_resident_bytes": memory} | origin)
        plot(measured, settings.run_dir / "benchmark.png")
        print(settings.run_dir)
    else:
        print(json.dumps(origin))
    return measured


# Parts: each yields its groups, and of each what was measured of every contender


def training_steps(settings: Settings, device: torch.device) -> Iterator[tuple[str, dict[str, Measured]]]:
    """A step of one model, by batch size."""
    make_vae, loss = partial(build, "MLP", device), Trace_ELBO()
    for size in settings.batch_sizes:
        x = observations(size, device)
        steps = pyro_steps(make_vae, loss)
        steps["by hand"] = partial(by_hand, make_vae)
        steps["by hand, torch.compile"] = partial(by_hand, make_vae, compiled=True)
        if device.type == "cuda":
            steps["by hand, CUDA graph"] = partial(by_hand_recorded, make_vae, x)
        steps["CompiledSVI"] = partial(compiled_svi, make_vae, loss)
        steps["CompiledSVI, bfloat16"] = partial(compiled_svi, make_vae, loss, precision="bfloat16")
        steps[FLOOR] = partial(bare_products, size, device)
        contenders = {
            name: of_steps(name, over([x] * settings.steps, make), settings, device) for name, make in steps.items()
        }
        yield f"batch of {size}", measure(contenders, settings.repeats, device)


def model_steps(settings: Settings, device: torch.device) -> Iterator[tuple[str, dict[str, Measured]]]:
    """A step at one batch size, by model."""
    x = observations(settings.model_batch_size, device)
    for model in settings.models:
        make_vae, loss = partial(build, model, device), Trace_ELBO()
        if model == "K=50":
            loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
        steps = pyro_steps(make_vae, loss) | {"CompiledSVI": partial(compiled_svi, make_vae, loss)}
        contenders = {
            name: of_steps(name, over([x] * settings.steps, make), settings, device) for name, make in steps.items()
        }
        yield f"{model}, batch of {len(x)}", measure(contenders, settings.repeats, device)


def program_steps(settings: Settings, device: torch.device) -> Iterator[tuple[str, dict[str, Measured]]]:
    """A step of a small program, by program."""
    for name in settings.programs or PROGRAMS:
        engines = {
            ANY_LOSS: plain_program,
            "CompiledSVI, as traced": partial(compiled_program, compiler="none"),
            "CompiledSVI": partial(compiled_program, compiler="inductor"),
        }
        makes = {
            key: partial(in_a_store, PROGRAMS[name], make, settings.steps, device) for key, make in engines.items()
        }
        contenders = {key: of_steps(key, make, settings, device) for key, make in makes.items()}
        yield name, measure(contenders, settings.repeats, device)


def of_steps(
    name: str, make: Callable[[], Callable[[], object]], settings: Settings, device: torch.device
) -> Contender:
    """Training steps; on a GPU those of CompiledSVI after the last of its early spot checks."""
    early = name.startswith("CompiledSVI") and device.type == "cuda"
    return Contender(make, settings.steps, -(-520 // settings.steps) if early else 0)


def epochs(settings: Settings, device: torch.device) -> Iterator[tuple[str, dict[str, Measured]]]:
    """An epoch, with all that feeds it."""
    data = _RandomImages(settings.epoch_images // EPOCH_BATCH * EPOCH_BATCH).load(device)
    batches = data.batches(EPOCH_BATCH)
    make_vae, loss = partial(build, "MLP", device), Trace_ELBO()
    steps = {
        REFERENCE: partial(pyro_svi, make_vae, loss),
        "by hand, torch.compile": partial(by_hand, make_vae, compiled=True),
        "CompiledSVI": partial(compiled_svi, make_vae, loss),
        "CompiledSVI, bfloat16": partial(compiled_svi, make_vae, loss, precision="bfloat16"),
    }
    contenders = {name: Contender(over(batches, make)) for name, make in steps.items()}
    unread = [torch.empty(0)] * len(batches)
    contenders[FLOOR] = Contender(over(unread, partial(bare_products, EPOCH_BATCH, device)))
    pixels = data.train_pixels.cpu()
    for name, library in (("NumPyro", numpyro_epoch), ("pythae", pythae_epoch)):
        if find_spec(LIBRARIES[name][0]):
            try:
                contenders[name] = Contender(library(pixels, device))
            except ImportError as error:
                print(f"{name} is installed, and left out: {' '.join(str(error).split())}")
    measured = measure(contenders, settings.long_repeats, device)
    if "NumPyro" in measured:
        measured["NumPyro"].pop("peak_bytes", None)  # jax allocates its own
    yield f"{len(pixels):,} images", measured


def importance_throughput(settings: Settings, device: torch.device) -> Iterator[tuple[str, dict[str, Measured]]]:
    """A decode, in importance sampling."""
    decoder = MLP(50, 784, hidden=[400])
    vae = VAE(
        StandardNormal(50),
        likelihood=Conditional(decoder, Bernoulli(784)),
        posterior=Conditional(MLP(784, 100, hidden=[400]), MeanField(50)),
    ).to(device)
    x = torch.bernoulli(torch.full((settings.num_images, 784), 0.2, device=device))
    few = 1000
    decodes = settings.num_images * few
    rows = 2000  # of one matrix product: a size at which they are fastest here
    weights = [layer.get_parameter("weight").detach().mT for layer in decoder.layers]
    inputs = [torch.randn(rows, len(weight), device=device) for weight in weights]
    single = 200  # samples of one image for Importance, which runs the whole program once per sample

    def bare_products() -> None:
        for _ in range(-(-decodes // rows)):
            for matrix, weight in zip(inputs, weights, strict=True):
                torch.matmul(matrix, weight)

    def ours() -> None:
        importance_sampling(vae.model, vae.guide, x, settings.num_samples)

    def looped() -> None:
        with torch.no_grad(), pyro.validation_enabled(False):
            Importance(vae.model, vae.guide, num_samples=single).run(x[:1]).get_log_normalizer()

    def vectorized() -> None:
        with torch.no_grad(), pyro.validation_enabled(False):
            for image in x.split(1):
                log_w: Any
                log_w, _, _ = vectorized_importance_weights(
                    vae.model, vae.guide, image, num_samples=few, max_plate_nesting=1
                )
                log_w.logsumexp(0)

    contenders = {
        FLOOR: Contender(lambda: bare_products, -(-decodes // rows) * rows),
        "pyro_vae importance_sampling": Contender(lambda: ours, settings.num_images * settings.num_samples),
        "Pyro vectorized_importance_weights": Contender(lambda: vectorized, decodes),
        "Pyro Importance": Contender(lambda: looped, single),
    }
    yield (
        f"{settings.num_images:,} images, K = {settings.num_samples:,}",
        measure(contenders, settings.long_repeats, device),
    )


# Contenders


def observations(size: int, device: torch.device) -> Tensor:
    """Binary pixels ``(size, 784)``."""
    return torch.bernoulli(torch.full((size, 784), 0.2, device=device))


def build(model: str, device: torch.device) -> VAE:
    """An untrained model of 28x28 images with 50 latents."""
    prior = VampPrior(50) if model == "VampPrior" else StandardNormal(50)
    posterior = posteriors.Flow(50) if model == "flow" else MeanField(50)
    encoder = MLP(784, num_outputs(posterior), hidden=[400])
    decoder = MLP(50, 784, hidden=[400])
    if model == "conv":
        encoder = ConvEncoder(784, num_outputs(posterior), image_shape=(1, 28, 28))
        decoder = ConvDecoder(50, 784, image_shape=(1, 28, 28))
    vae = VAE(prior, Conditional(decoder, Bernoulli(784)), Conditional(encoder, posterior))
    vae.initialize(observations(100, torch.device("cpu")))
    return vae.to(device)


def adam_settings(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Those of torch's Adam; on a GPU a CUDA graph can hold it."""
    return {"lr": 1e-3, "fused": True, "capturable": all(p.is_cuda for p in parameters)}


def adam(vae: VAE) -> torch.optim.Optimizer:
    return torch.optim.Adam(vae.parameters(), **adam_settings(vae.parameters()))


def pyro_steps(make_vae: Callable[[], VAE], loss: ELBO) -> dict[str, Callable[[], Step]]:
    """Pyro's own ways to train."""
    return {
        REFERENCE: partial(pyro_svi, make_vae, loss),
        "the same, unvalidated, fused Adam": partial(pyro_svi, make_vae, loss, tuned=True),
        "Pyro ELBOModule, torch Adam": partial(elbo_module, make_vae, loss),
    }


def pyro_svi(make_vae: Callable[[], VAE], loss: ELBO, tuned: bool = False) -> Step:
    """Pyro's SVI and Adam, with a parameter store of their own."""
    vae = make_vae()

    def model(x: Tensor) -> Tensor:
        pyro.module("vae", vae)
        return vae.model(x)

    settings = adam_settings(vae.parameters()) if tuned else {"lr": 1e-3}
    svi = SVI(model, vae.guide, Adam(settings), loss)
    store = pyro.get_param_store().get_state()

    def step(x: Tensor) -> None:
        with pyro.get_param_store().scope(store), pyro.validation_enabled(not tuned):
            svi.step(x)

    return step


def elbo_module(make_vae: Callable[[], VAE], loss: ELBO) -> Step:
    """Pyro's loss as a module of torch, without validation."""
    vae = make_vae()
    validated = differentiated(loss(vae.model, vae.guide), adam(vae))  # pyright: ignore[reportArgumentType]

    def step(x: Tensor) -> None:
        with pyro.validation_enabled(False):
            validated(x)

    return step


def compiled_svi(
    make_vae: Callable[[], VAE], loss: ELBO, precision: Literal["float32", "bfloat16"] = "float32"
) -> Step:
    """This library's."""
    vae = make_vae()
    return CompiledSVI(vae.model, vae.guide, adam(vae), loss, precision=precision, compiler="inductor").step


def plain_program(program: Program) -> Callable[..., object]:
    """A step of a program by Pyro's SVI and Adam."""
    return SVI(program.model, program.guide, Adam({"lr": 1e-3}), program.loss).step


def compiled_program(program: Program, compiler: Literal["inductor", "none"]) -> Callable[..., object]:
    """The same by this library."""
    optim = Adam({"lr": 1e-3})
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in program.args)  # where some may go through Pyro
    return CompiledSVI(program.model, program.guide, optim, program.loss, compiler=compiler, fallback=on_gpu).step


def in_a_store(
    make_program: Callable[[torch.device], Program],
    engine: Callable[[Program], Callable[..., object]],
    steps: int,
    device: torch.device,
) -> Callable[[], object]:
    """A call of so many steps of a program, with a parameter store of its own."""
    store = pyro.get_param_store()
    with store.scope() as state:
        program = make_program(device)
        step = engine(program)

    def call() -> None:
        with store.scope(state):
            for _ in range(steps):
                step(*program.args)

    return call


def by_hand(make_vae: Callable[[], VAE], compiled: bool = False) -> Step:
    """The ELBO without Pyro."""
    vae = make_vae()

    def loss(x: Tensor) -> Tensor:
        return -handrolled.elbo(vae.posterior.network, vae.likelihood.network, x, sampled_kl=True).mean()

    if compiled:
        torch.compiler.reset()  # it compiles a function only so many times, and this is one whatever its vae
        loss = torch.compile(loss, dynamic=False)
    return differentiated(loss, adam(vae))


def by_hand_recorded(make_vae: Callable[[], VAE], x: Tensor) -> Step:
    """The whole step in a CUDA graph, for observations like ``x``: warmed up on a side stream, then captured."""
    step, held = by_hand(make_vae), x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(held)

    def replay(x: Tensor, _keep: Step = step) -> None:  # parameters and the optimizer's state: the graph holds none
        held.copy_(x)
        graph.replay()

    return replay


def differentiated(loss: Callable[[Tensor], Tensor], optim: torch.optim.Optimizer) -> Step:
    """An ordinary step of torch."""

    def step(x: Tensor) -> None:
        optim.zero_grad()
        loss(x).backward()
        optim.step()

    return step


def bare_products(batch_size: int, device: torch.device) -> Step:
    """The matrix products of a step of the MLPs, whatever it is given."""
    widths = [(784, 400), (400, 100), (50, 400), (400, 784)]
    inputs = [torch.randn(batch_size, m, device=device) for m, _ in widths]
    outputs = [torch.randn(batch_size, n, device=device) for _, n in widths]
    weights = [torch.randn(m, n, device=device) for m, n in widths]

    def step(_: Tensor) -> None:
        for i, (a, b, w) in enumerate(zip(inputs, outputs, weights, strict=True)):
            torch.matmul(a, w)
            torch.matmul(a.mT, b)  # the weight's gradient
            if i:
                torch.matmul(b, w.mT)  # the input's, which pixels do not need

    return step


def over(batches: Iterable[Tensor], make: Callable[[], Step]) -> Callable[[], Callable[[], object]]:
    """Makes a call that takes one step on each of the batches."""

    def made() -> Callable[[], object]:
        step = make()

        def call() -> None:
            for x in batches:
                step(x)

        return call

    return made


class _RandomImages(Dataset):
    """Images of 28x28 random pixels, which cost as much as any others and need no download.

    Args:
        num_images: training images.
    """

    def __init__(self, num_images: int):
        super().__init__(Path(), num_validation=1)
        self.num_images = num_images

    def read(self) -> Images:
        train = np.random.default_rng(0).integers(0, 256, (self.num_images + 1, 28, 28), dtype=np.uint8)
        return Images(train, train[:2], max_value=255)


def numpyro_epoch(pixels: Tensor, device: torch.device) -> Callable[[], Callable[[], object]]:
    """The epoch of NumPyro: one jitted loop over its SVI, for ``pixels`` of 0 to 255, shape ``(N, 784)``.

    Raises:
        ImportError: if it cannot be imported, or its jax does not know the GPU.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else jax takes most of a GPU away from torch
    import jax  # pyright: ignore[reportMissingImports]
    import numpyro  # pyright: ignore[reportMissingImports]
    import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
    from jax.example_libraries import stax  # pyright: ignore[reportMissingImports]

    if device.type == "cuda" and jax.default_backend() != "gpu":
        raise ImportError("its jax has no GPU backend")
    place = jax.devices("gpu" if device.type == "cuda" else "cpu")[0]

    def network(out_features: int):
        return stax.serial(stax.Dense(400), stax.Tanh, stax.Dense(out_features))

    def model(x):
        decode = numpyro.module("decoder", network(784), (EPOCH_BATCH, 50))
        with numpyro.plate("data", EPOCH_BATCH):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([50]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = numpyro.module("encoder", network(100), (EPOCH_BATCH, 784))
        loc, log_scale = jax.numpy.split(encode(x), 2, axis=-1)
        with numpyro.plate("data", EPOCH_BATCH):
            numpyro.sample("z", dist.Normal(loc, jax.numpy.exp(log_scale)).to_event(1))

    def make() -> Callable[[], object]:
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())

        @jax.jit
        def epoch(state, pixels, key):
            order = jax.random.permutation(key, len(pixels))

            def step(i, state):
                batch = pixels[jax.lax.dynamic_slice(order, (i * EPOCH_BATCH,), (EPOCH_BATCH,))]
                x = jax.random.bernoulli(jax.random.fold_in(key, i), batch / 255)
                return svi.update(state, x.astype(jax.numpy.float32))[0]

            return jax.lax.fori_loop(0, len(pixels) // EPOCH_BATCH, step, state)

        here, float32 = partial(jax.default_device, place), partial(jax.default_matmul_precision, "float32")
        with here():
            images = jax.numpy.asarray(pixels.numpy())
            key = jax.random.PRNGKey(0)
            state = svi.init(key, jax.numpy.zeros((EPOCH_BATCH, 784)))

        def call() -> None:
            nonlocal key, state
            with here(), float32():  # on a GPU jax would else round to tensorfloat32, which torch does not
                key, now = jax.random.split(key)
                state = jax.block_until_ready(epoch(state, images, now))

        return call

    return make


def pythae_epoch(pixels: Tensor, device: torch.device) -> Callable[[], Callable[[], object]]:
    """The epoch of pythae's BaseTrainer without its progress bars, for ``pixels`` of 0 to 255, shape ``(N, 784)``.

    Its data set holds the intensities, and a batch is binarized as it reaches the model, which costs least.

    Raises:
        ImportError: if it, or something it needs, cannot be imported.
    """
    from pythae.data.datasets import BaseDataset  # pyright: ignore[reportMissingImports]
    from pythae.models import VAE as PythaeVAE  # pyright: ignore[reportMissingImports]
    from pythae.models import VAEConfig  # pyright: ignore[reportMissingImports]
    from pythae.models.base.base_utils import ModelOutput  # pyright: ignore[reportMissingImports]
    from pythae.models.nn import BaseDecoder, BaseEncoder  # pyright: ignore[reportMissingImports]
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # pyright: ignore[reportMissingImports]
    from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback  # pyright: ignore[reportMissingImports]

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network = MLP(784, 100, hidden=[400])

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_variance = self.network(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = MLP(50, 784, hidden=[400])

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    class BinarizingVAE(PythaeVAE):
        def forward(self, inputs: dict[str, Tensor], **kwargs) -> ModelOutput:
            return super().forward({"data": torch.bernoulli(inputs["data"])}, **kwargs)

    def make() -> Callable[[], object]:
        settings = VAEConfig(input_dim=(784,), latent_dim=50, reconstruction_loss="bce")
        vae = BinarizingVAE(settings, Encoder(), Decoder()).to(device)
        optimizer = adam_settings(vae.parameters())
        training = BaseTrainerConfig(
            per_device_train_batch_size=EPOCH_BATCH,
            learning_rate=optimizer.pop("lr"),
            optimizer_params=optimizer,
            no_cuda=device.type == "cpu",
        )
        images = BaseDataset(pixels / 255, torch.zeros(len(pixels)))
        trainer = BaseTrainer(vae, images, training_config=training)
        trainer.set_optimizer()
        trainer.callback_handler = CallbackHandler([TrainingCallback()], trainer.model)
        return lambda: trainer.train_step(1)

    return make


# Measuring


def measure(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Make each contender and call it once, and then time their calls in turns."""
    validation = Distribution._validate_args
    gc.collect()  # what others left
    calls, result = {}, {}
    for name, contender in tqdm(contenders.items(), desc="first calls", leave=False):
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        calls[name] = contender.make()
        calls[name]()
        synchronize(device)
        result[name] = {"first": time.perf_counter() - start}
        if device.type == "cuda":
            result[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    Distribution._validate_args = validation  # torch.compile switches it off
    for name, contender in contenders.items():
        for _ in range(contender.unseen):
            calls[name]()
    for name, seconds in interleave(calls, repeats, device).items():
        each = [s / contenders[name].units for s in seconds]
        result[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), **result[name]}
    return result


def interleave(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender's calls, the contenders taking turns.

    Taking turns spreads whatever else the machine does over all of them; on a GPU each call is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(repeats), desc="timing", unit="turn", leave=False):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_resident_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Tables and figure


def time_table(title: str, measured: dict[str, Measured]) -> str:
    """Times, their ratios to the reference's and to the floor's if there is one."""
    slowest = max(each["high"] for each in measured.values())
    unit, scale = ("milliseconds", 1e3) if slowest < 1 else ("seconds", 1)
    references = (REFERENCE, ANY_LOSS, FLOOR)
    bases = {f"of {name}": measured[name]["median"] for name in references if name in measured}
    memory = ["peak MiB"] * any("peak_bytes" in each for each in measured.values())
    rows = [(title, unit, "spread", *bases, "first call, s", *memory)]
    for name, each in measured.items():
        median, low, high = (f"{scale * each[key]:.3g}" for key in ("median", "low", "high"))
        ratios = (f"{each['median'] / base:.3g}" for base in bases.values())
        peak = [f"{each['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in each else ""] if memory else []
        rows.append((name, median, f"{low} to {high}", *ratios, f"{each['first']:.1f}", *peak))
    return runs.table(rows)


def summary_table(groups: dict[str, dict[str, Measured]]) -> str:
    """Over all programs, how much of the reference's time a step of the other contenders takes."""
    rows = [(f"of {ANY_LOSS}, {len(groups)} programs", "median", "spread", "longest first call, s")]
    for name in list(next(iter(groups.values())))[1:]:
        ratios = [contenders[name]["median"] / contenders[ANY_LOSS]["median"] for contenders in groups.values()]
        first = max(contenders[name]["first"] for contenders in groups.values())
        spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
        rows.append((name, f"{statistics.median(ratios):.3g}", spread, f"{first:.1f}"))
    return runs.table(rows)


def rate_table(title: str, measured: dict[str, Measured]) -> str:
    """Speeds, and their ratios to the floor's."""
    memory = ["peak MiB"] * any("peak_bytes" in each for each in measured.values())
    rows = [(title, "decodes per second", "spread", f"of {FLOOR}", *memory)]
    for name, each in measured.items():
        median, low, high = (f"{1 / each[key]:,.0f}" for key in ("median", "high", "low"))
        peak = [f"{each['peak_bytes'] / 2**20:,.0f}"] if memory else []
        rows.append((name, median, f"{low} to {high}", f"{measured[FLOOR]['median'] / each['median']:.3g}", *peak))
    return runs.table(rows)


def relative(part: str, groups: dict[str, dict[str, Measured]]) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """The reference; and low, median and high relative to its median, by group and contender, or contender and program.

    What has most names comes last: those are the rows of a panel.
    """
    present = next(iter(groups.values()))
    reference = next(name for name in (REFERENCE, ANY_LOSS, FLOOR) if name in present)
    ratios = {
        group: {
            name: np.array([each[key] for key in ("low", "median", "high")]) / contenders[reference]["median"]
            for name, each in contenders.items()
        }
        for group, contenders in groups.items()
    }
    if part == "programs":
        ratios = {name: {group: those[name] for group, those in ratios.items()} for name in present}
    return reference, ratios


def plot(measured: dict[str, dict[str, dict[str, Measured]]], path: Path) -> None:
    """Times relative to the reference's median, a panel for each part: medians, and lines from lowest to highest."""
    panels = {part: relative(part, groups) for part, groups in measured.items()}
    heights = [len(next(iter(ratios.values()))) for _, ratios in panels.values()]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9, 0.4 * sum(heights) + 0.9 * len(heights)), layout="constrained")
        places = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (part, (reference, ratios)) in zip(places, panels.items(), strict=True):
            shifts = np.linspace(-0.3, 0.3, len(ratios)) if len(ratios) > 1 else [0.0]
            rows = list(next(iter(ratios.values())))
            for shift, (label, each) in zip(shifts, ratios.items(), strict=True):
                low, median, high = np.array(list(each.values())).T
                place = np.arange(len(median)) + shift
                axes.errorbar(median, place, xerr=(median - low, high - median), fmt="o", markersize=4, label=label)
            axes.axvline(1, color="0.5", linewidth=0.8, zorder=0)
            axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6), title=TITLES[part])
            axes.set(xlabel=f"time, relative to {reference}")
            axes.set_yticks(range(len(rows)), rows)
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figures.save_figure(figure, path)


if __name__ == "__main__":
    cli.guarded(main)
