"""What processes of a group do in test_parallel.py: a module of its own, which they import."""

import warnings
from datetime import timedelta

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as processes
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import CompiledSVI, PyroSVI
from pyro_vae.callbacks import BestWeights, Callback, Checkpoint, EarlyStopping, OnEpoch
from pyro_vae.infer.objectives import ELBO, IWAE, BetaELBO
from pyro_vae.infer.parallel import DataParallel, Processes
from pyro_vae.training import fit


class Given(dist.Normal):
    """A normal distribution whose noise is a function of ``rows``: the same, whatever other rows are with one."""

    def __init__(self, loc, scale, rows):
        super().__init__(loc, scale)
        self.rows = rows

    def expand(self, shape, _instance=None):
        new = super().expand(shape, _instance=self._get_checked_instance(Given, _instance))
        new.rows = self.rows
        return new

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        first = torch.arange(1.0, 1 + shape[0]).reshape(-1, *[1] * (len(shape) - 1)) if len(shape) > 2 else 1.0
        last = torch.arange(1.0, 1 + shape[-1])
        return self.loc + self.scale * torch.sin(37.0 * self.rows.sum(-1, keepdim=True) + 5.0 * first * last)


class Small(nn.Module):
    """A VAE of three pixels and two latent dimensions."""

    def __init__(self, noise=Given):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        self.noise = noise

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.noise(loc, log_scale.exp(), *([x] if self.noise is Given else [])).to_event(1))


def small(noise=Given):
    torch.manual_seed(3)
    return Small(noise).double()


def data(size=57):
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


BATCHES = [8, 8, 8, 8, 8, 8, 8, 1]  # the last one has no row for a second process
LOSSES = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO, "ELBO": ELBO}
LOSSES |= {"IWAE": lambda: IWAE(3), "beta": lambda: BetaELBO(2.0, warmup=5), "analytic": lambda: ELBO(2, "analytic")}
ENGINES = {
    "PyroSVI": PyroSVI,
    "CompiledSVI": lambda *parts: CompiledSVI(*parts, compiler="none"),
    "clipped": lambda *parts: CompiledSVI(*parts, compiler="none", max_norm=0.5),
}


def trained(engine, loss):
    """The weights and losses of a few steps, in all processes together."""
    module = small()
    optimizer = torch.optim.SGD(module.parameters(), lr=2e-3, momentum=0.5)
    svi = DataParallel(ENGINES[engine](module.model, module.guide, optimizer, LOSSES[loss]()))
    losses = [sum(Processes().gather(float(svi.step(batch)))) for batch in data().split(BATCHES)]
    return torch.cat([p.detach().flatten() for p in module.parameters()]), torch.tensor(losses)


def regression(x):
    """A global latent variable, and a plate of 100 data of which a batch is a part."""
    noise = pyro.param("noise", lambda: torch.rand((), dtype=torch.float64) + 0.5, constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(x[:, :2] @ w[:2] + w[2], noise), obs=x[:, 2])


def regression_guide(x):
    loc = pyro.param("loc", lambda: torch.randn(3, dtype=torch.float64))
    scale = pyro.param("scale", lambda: torch.ones(3, dtype=torch.float64), constraint=dist.constraints.positive)
    pyro.sample("w", Given(loc, scale, torch.ones(1, dtype=torch.float64)).to_event(1))


def made_lazily(engine, optim=None):
    """Parameters of Pyro's store after a few steps, which they came into being at."""
    pyro.clear_param_store()
    torch.manual_seed(5 if Processes().is_first else 6)
    optim = optim or pyro.optim.SGD({"lr": 1e-3})
    svi = engine(regression, regression_guide, optim, Trace_ELBO())
    for batch in data().split(BATCHES):
        svi.step(batch)
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    return store


class Draws(Callback):
    """Draws in one process alone, which does no harm."""

    def epoch(self, training):
        if Processes().is_first:
            torch.rand(7)


def fitted(path, epochs, resume=False, noise=dist.Normal, callbacks=(), **more):
    """Weights and history of a whole training."""
    module = small(noise)
    if not Processes().is_first:
        for p in module.parameters():
            p.data += 1.0  # those of the first process count
    x = data(50)
    batches = torch.utils.data.DataLoader(x, batch_size=16, shuffle=True)
    torch.manual_seed(11 + Processes().rank)
    callbacks = [Checkpoint(path, resume), BestWeights(), EarlyStopping(2), *callbacks]
    settings = {"lr": 0.01, "schedule": "constant", "progress": False} | more
    history = fit(module, batches, x[:9], epochs=epochs, callbacks=callbacks, **settings)
    return torch.cat([p.detach().flatten() for p in module.parameters()]), history


def drawn_noise():
    """What each process draws in three steps, and what all of them draw afterwards."""
    torch.manual_seed(4)
    here, found = Processes(), []
    for _ in range(3):
        with here.noise(torch.device("cpu")):
            found.append(torch.rand(()).item())
    return found, torch.rand(()).item()


def refused(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def entry(rank, size, folder, function):
    """A process of a group: its function's result is written to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    processes.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(function(folder), f"{folder}/{rank}.pt")
    processes.destroy_process_group()


CASES = [("PyroSVI", "Trace_ELBO"), ("clipped", "IWAE"), ("CompiledSVI", "beta"), ("CompiledSVI", "Trace_ELBO")]
CASES += [("PyroSVI", "analytic"), ("clipped", "ELBO"), ("CompiledSVI", "TraceMeanField_ELBO")]


def gradients(folder):
    return {case: trained(*case) for case in CASES}


def compiled(*parts):
    return DataParallel(CompiledSVI(*parts, compiler="none"))


def quick(folder):
    """All that is looked at in two processes."""
    rank = Processes().rank
    found = {case: trained(*case) for case in CASES[:3]}
    found["lazy"] = made_lazily(compiled)
    found["noise"] = drawn_noise()
    logged = []
    found["fit"] = fitted(f"{folder}/checkpoint.pt", 3, callbacks=[Draws(), OnEpoch(logged.append)])
    found["logged"] = len(logged)
    fitted(f"{folder}/again.pt", 2, callbacks=[Draws()])
    found["resumed"] = fitted(f"{folder}/again.pt", 3, resume=True, callbacks=[Draws()])
    plain = CompiledSVI(lambda x: None, lambda x: None, torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1))

    def sometimes():
        if rank:
            raise ValueError("no file")

    module, faults = small(), []

    def broken(x):
        if rank and faults:
            raise KeyError("mine")
        module.guide(x)

    svi = DataParallel(PyroSVI(module.model, broken, torch.optim.SGD(module.parameters(), 1e-4)))
    svi.step(data())
    kept = module.encoder.weight.clone()
    faults.append("one")
    found["refused"] = {
        "failed": refused(lambda: svi.step(data())),
        "rows": refused(lambda: DataParallel(plain).step(data(1))),
        "batch": refused(lambda: DataParallel(plain).step(data(4) + rank)),
        "rate": refused(lambda: fitted(f"{folder}/none.pt", 1, lr=0.01 * (1 + rank))),
        "weights": refused(lambda: Processes().share([torch.zeros(2 + rank)])),
        "drift": refused(lambda: Processes().share([torch.ones(2) * (1 + rank)], near=True)),
        "here": refused(lambda: Processes().all(sometimes)),
        "first": refused(lambda: Processes().from_first(lambda: [][0])),
    }
    found["kept"] = torch.equal(kept, module.encoder.weight)
    return found
