"""Every bound and its gradient against quadrature, on a model in which all observations are replicates of one.

Parameters are one per observation, so that one call gives a sample of values and gradients.
"""

import itertools
import math
from functools import partial
from queue import SimpleQueue

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Unrelated, binary, small_vae
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vae import ELBO, IWAE, MLP, BetaELBO, CompiledSVI, Conditional, ContractError, DReG, PyroSVI, fit, log_weights
from pyro_vae.infer.objectives import CIWAE, MIWAE, PIWAE, STL, TVO, Renyi
from pyro_vae.infer.turns import InTurn, WarmUp
from pyro_vae.parts import priors
from pyro_vae.parts.posteriors import FullRank, LowRank
from pyro_vae.training import Checkpoint, OnEpoch

X, NOISE = 1.7, 0.5
WEIGHT, LOC, LOG_SCALE = 0.9, 0.6, -0.9  # the posterior is at 1.43 with scale 0.486: the guide is off in both
NODES, NODE_WEIGHTS = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(80))
NODE_WEIGHTS = NODE_WEIGHTS / math.sqrt(2 * math.pi)


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)


class Replicates:
    """z ~ N(0, 1), x | z ~ N(weight z, NOISE), q(z) = N(loc, scale)."""

    def __init__(self, size: int):
        values = (WEIGHT, LOC, LOG_SCALE)
        self.weight, self.loc, self.log_scale = (
            torch.full((size,), v, dtype=torch.float64, requires_grad=True) for v in values
        )
        self.x = torch.full((size, 1), X, dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.weight[:, None] * z, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc[:, None], self.log_scale.exp()[:, None]).to_event(1))

    def sample(self, objective) -> tuple[float, Tensor]:
        """The bound, and gradients by weight, loc and log_scale: ``(3, size)``."""
        loss = objective(self.model, self.guide, self.x)
        gradients = torch.autograd.grad(loss, (self.weight, self.loc, self.log_scale))
        return -loss.item(), -len(self.x) * torch.stack(gradients)


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (WEIGHT, LOC, LOG_SCALE))


def log_w(z: Tensor, weight: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return log_normal(z, 0.0, 1.0) + log_normal(X, weight * z, NOISE) - log_normal(z, loc, log_scale.exp())


def expected(function, particles: int) -> tuple[float, Tensor]:
    """E[function(log w_1..K)] and its gradient, by Gauss-Hermite quadrature over all K draws."""
    weight, loc, log_scale = given = parameters()
    one = log_w(loc + log_scale.exp() * NODES, weight, loc, log_scale)
    grids = torch.meshgrid(*[one] * particles, indexing="ij")
    weights = torch.meshgrid(*[NODE_WEIGHTS] * particles, indexing="ij")
    value = (torch.stack(weights).prod(0) * function(torch.stack(grids))).sum()
    return value.item(), torch.stack(torch.autograd.grad(value, given))


def elbo(log_w: Tensor) -> Tensor:
    return log_w.mean(0)


def iwae(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))


def renyi(alpha):
    return lambda log_w: iwae((1 - alpha) * log_w) / (1 - alpha)


@pytest.mark.parametrize(
    ("objective", "function", "particles"),
    [
        (ELBO(3), elbo, 1),
        (STL(3), elbo, 1),
        (BetaELBO(num_particles=2), elbo, 1),
        (IWAE(1), elbo, 1),
        (IWAE(2), iwae, 2),
        (IWAE(3), iwae, 3),
        (DReG(1), elbo, 1),
        (DReG(2), iwae, 2),
        (DReG(3), iwae, 3),
        (MIWAE(3, 2), iwae, 2),
        (CIWAE(0.3, 2), lambda w: 0.3 * elbo(w) + 0.7 * iwae(w), 2),
        (Renyi(0.5, 2), renyi(0.5), 2),
        (Renyi(2.0, 2), renyi(2.0), 2),
        (Renyi(-1.0, 3), renyi(-1.0), 3),
        (Renyi(0, 2), iwae, 2),
        (Renyi(1, 2), elbo, 1),
    ],
    ids=lambda each: f"{type(each).__name__}-{each.num_particles}" if hasattr(each, "num_particles") else "",
)
def test_value_and_gradient_are_right_on_average(objective, function, particles):
    value, gradient = expected(function, particles)
    assert_mean_is(*Replicates(100_000).sample(objective), value, gradient)


def assert_mean_is(bound: float, gradients: Tensor, value: float, gradient: Tensor, bias: float = 0.0) -> None:
    error = gradients.std(1) / gradients.shape[1] ** 0.5
    assert (error < 0.03 * gradient.abs().max()).all()  # the next line is worth something
    assert ((gradients.mean(1) - gradient).abs() < 4 * error + bias).all()
    assert bound == pytest.approx(value, abs=0.02)


def test_vr_max_is_the_largest():
    def largest(log_w):
        return log_w.max(0).values

    value, gradient = expected(largest, 2)
    # the integrand has a kink: quadrature is good to two digits
    assert_mean_is(*Replicates(100_000).sample(Renyi(-math.inf, 2)), value, gradient, bias=0.02)


def test_piwae_gives_the_model_the_tighter_bound():
    tight, (by_weight, _, _) = expected(iwae, 3)
    _, (_, by_loc, by_log_scale) = expected(elbo, 1)
    assert_mean_is(*Replicates(100_000).sample(PIWAE(3, 1)), tight, torch.stack([by_weight, by_loc, by_log_scale]))


@pytest.mark.parametrize(("intervals", "smallest"), [(1, 0.5), (4, 0.05)])
def test_tvo_is_a_sum_of_tempered_expectations(intervals, smallest):
    objective = TVO(2000, intervals, smallest)
    weight, loc, log_scale = given = parameters()
    z = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    log_q = log_normal(z, loc, log_scale.exp())
    log_p = log_normal(z, 0.0, 1.0) + log_normal(X, weight * z, NOISE)
    betas = [0.0, *np.geomspace(smallest, 1, intervals)] if intervals > 1 else [0.0, 1.0]
    value = sum(
        (above - beta) * (((1 - beta) * log_q + beta * log_p).softmax(0) * (log_p - log_q)).sum()
        for beta, above in itertools.pairwise(betas)
    )
    gradient = torch.stack(torch.autograd.grad(value, given))
    assert_mean_is(*Replicates(500).sample(objective), value.item(), gradient, bias=0.01)
    assert value.item() < dist.Normal(0.0, math.hypot(WEIGHT, NOISE)).log_prob(torch.tensor(X)).item()


@pytest.mark.slow
def test_bounds_are_ordered():
    log_px = dist.Normal(0.0, math.hypot(WEIGHT, NOISE)).log_prob(torch.tensor(X)).item()
    model = Replicates(100_000)
    bounds = [model.sample(objective)[0] for objective in (ELBO(), IWAE(2), IWAE(4), IWAE(16), IWAE(64))]
    assert all(b > a + 0.01 for a, b in itertools.pairwise(bounds))
    assert bounds[-1] < log_px
    alphas = [model.sample(Renyi(alpha, 16))[0] for alpha in (2.0, 1.0, 0.5, 0.0, -1.0, -math.inf)]
    assert all(b > a + 0.01 for a, b in itertools.pairwise(alphas))
    ciwae = model.sample(CIWAE(0.5, 16))[0]
    assert bounds[0] < ciwae < bounds[3]


@pytest.mark.slow
def test_signal_to_noise_of_the_guides_gradient():
    """IWAE's falls as 1 / sqrt(K), DReG's rises (Rainforth et al. 2018; Tucker et al. 2019)."""
    model = Replicates(20_000)
    with torch.no_grad():  # so near to the posterior that 64 samples are many
        model.loc.fill_(1.3)
        model.log_scale.fill_(-0.7)

    def ratio(objective) -> float:
        _, (_, by_loc, _) = model.sample(objective)
        return (by_loc.mean() / by_loc.std()).abs().item()

    assert ratio(IWAE(2)) > 1.5 * ratio(IWAE(64))
    assert ratio(DReG(64)) > 1.5 * ratio(DReG(2))
    assert ratio(DReG(64)) > 3 * ratio(IWAE(64))


def test_stl_has_no_variance_where_the_guide_is_exact():
    model = Replicates(1000)
    precision = 1 + WEIGHT**2 / NOISE**2
    with torch.no_grad():
        model.loc.fill_(WEIGHT * X / NOISE**2 / precision)
        model.log_scale.fill_(-0.5 * math.log(precision))
    _, (_, *ours) = model.sample(STL())
    _, (_, *usual) = model.sample(ELBO())
    assert max(each.abs().max().item() for each in ours) < 1e-9
    assert all(each.std() > 0.1 for each in usual)


# Several sites


class Chain:
    """z1 -> z2 -> x, and the guide z1 -> z2, whose draws of z2 depend on z1."""

    def __init__(self, size: int):
        torch.manual_seed(0)
        self.weights = [torch.full((size,), v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.5, 0.8, -0.4)]
        self.x = torch.full((size, 1), 1.2, dtype=torch.float64)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(torch.tanh(self.weights[0][:, None] * z1), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(z1 + z2, 0.6).to_event(1), obs=x)

    def guide(self, x):
        _, a, b, log_scale = (each[:, None] for each in self.weights)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, log_scale.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(b * (x - z1), 0.5).to_event(1))

    def gradients(self, objective):
        loss = objective(self.model, self.guide, self.x)
        return len(self.x) * torch.stack(torch.autograd.grad(loss, self.weights))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("ours", "usual"), [(DReG(3), IWAE(3)), (STL(2), ELBO(2)), (PIWAE(3, 1), ELBO())])
def test_separated_gradients_with_several_sites(ours, usual):
    chain = Chain(200_000)
    a, b = chain.gradients(ours), chain.gradients(usual)
    if isinstance(ours, PIWAE):
        b[0] = chain.gradients(IWAE(3))[0]
    error = (a.var(1) / a.shape[1] + b.var(1) / b.shape[1]).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 4 * error).all()
    assert (error < 0.05 * b.mean(1).abs().max()).all()


def test_analytic_kl_is_pyros_with_several_sites():
    chain = Chain(5)
    for particles in (1, 4):
        torch.manual_seed(1)
        ours = chain.gradients(ELBO(particles, kl="analytic"))
        torch.manual_seed(1)
        pyros = TraceMeanField_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        theirs = torch.autograd.grad(pyros.differentiable_loss(chain.model, chain.guide, chain.x), chain.weights)
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_renyi_is_pyros(alpha):
    model = Replicates(6)
    torch.manual_seed(1)
    ours = Renyi(alpha, 7)(model.model, model.guide, model.x)
    torch.manual_seed(1)
    theirs = RenyiELBO(alpha, 7, vectorize_particles=True, max_plate_nesting=1).loss(model.model, model.guide, model.x)
    assert 6 * ours.item() == pytest.approx(theirs, rel=1e-9)


# beta, free bits, warm-up


class TwoDimensions:
    """A guide whose divergences from the prior are known in each dimension."""

    loc = torch.tensor([1.0, 0.1], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0], dtype=torch.float64)
    divergences = (0.5 * (1 + 0.25 - 1) - math.log(0.5), 0.5 * 0.1**2)

    def __init__(self, factorizes: bool):
        self.factorizes = factorizes

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if self.factorizes:
                pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))
            else:
                pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.scale.diag()))


@pytest.mark.parametrize(("kl", "factorizes"), [("analytic", True), ("sampled", True), ("sampled", False)])
@pytest.mark.parametrize(("beta", "free_bits"), [(1.0, 0.0), (4.0, 0.0), (2.0, 0.3), (2.0, 5.0)])
def test_beta_and_free_bits_by_hand(kl, factorizes, beta, free_bits):
    program, x = TwoDimensions(factorizes), torch.zeros(50_000, 2, dtype=torch.float64)
    parts = program.divergences if factorizes else [sum(program.divergences)]
    divergence = sum(max(each, free_bits) for each in parts)
    objective = BetaELBO(beta, free_bits=free_bits, kl=kl)
    expected = math.log(2 * math.pi) + beta * divergence
    assert objective(program.model, program.guide, x).item() == pytest.approx(expected, abs=0.03 * beta)


def warm_up(objective, step: int) -> float:
    """The formula of Sonderby et al. 2016, begun anew after each period (Fu et al. 2019)."""
    at = step % objective.period if objective.period else step
    return objective.beta * min(1.0, at / objective.warmup) if objective.warmup else objective.beta


def pyro_svi(program, objective):
    def model(*args):
        pyro.module("unrelated", program)
        program.model(*args)

    return SVI(model, program.guide, pyro.optim.SGD({"lr": 1e-15}), objective)


def engine(make, **settings):
    def made(program, objective):
        optim = torch.optim.SGD(program.parameters(), lr=1e-15)
        return make(program.model, program.guide, optim, objective, **settings)

    return made


ENGINES = {"SVI": pyro_svi, "PyroSVI": engine(PyroSVI), "CompiledSVI": engine(CompiledSVI, compiler="none")}
WARM_UPS = [{}, {"warmup": 4}, {"warmup": 4, "period": 6}, {"warmup": 5, "period": 5}]


@pytest.mark.slow
@pytest.mark.parametrize("settings", WARM_UPS, ids=str)
@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
def test_a_warm_up_advances_by_itself(make, settings):
    program, objective, x = Unrelated(), BetaELBO(beta=2.0, kl="analytic", **settings), torch.zeros(3, 1).double()
    with pyro.get_param_store().scope():
        svi, losses = make(program, objective), []
        for _ in range(14):
            losses.append(svi.step(x))
            svi.evaluate_loss(x)  # none of these is a step
            objective(program.model, program.guide, x)
            with torch.no_grad():
                objective(program.model, program.guide, x)
        expected = [warm_up(objective, step) for step in range(14)]
        assert [Unrelated.weight(loss) for loss in losses] == pytest.approx(expected, abs=1e-6)
        objective.advance(3)  # whoever wants to, sets it; it goes on from there
        losses = [svi.step(x) for _ in range(4)]
    expected = [warm_up(objective, step) for step in (3, 4, 5, 6)]
    assert [Unrelated.weight(loss) for loss in losses] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", WARM_UPS, ids=str)
@pytest.mark.parametrize("make", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["PyroSVI", "CompiledSVI"])
def test_a_warm_up_in_fit_goes_on_where_it_stopped(tmp_path, make, settings):
    losses, batches = [], [torch.zeros(size, 1).double() for size in (2, 2, 1)]  # the last is traced anew

    class Noted:
        def __init__(self, *args):
            self.svi = make(*args)

        def step(self, x):
            losses.append(self.svi.step(x))
            return losses[-1]

    path = tmp_path / "checkpoint.pt"
    for epochs in (1, 2, 5):  # each a new process, as it were
        objective = BetaELBO(beta=2.0, kl="analytic", **settings)
        plain = {"lr": 1e-15, "schedule": "constant", "progress": False, "engine": Noted, "loss": objective}
        fit(Unrelated(), batches, epochs=epochs, callbacks=[Checkpoint(path, resume=True)], **plain)
    expected = [warm_up(objective, step) for step in range(15)]
    assert [Unrelated.weight(loss) for loss in losses] == pytest.approx(expected, abs=1e-6)


def test_a_loss_counts_once_however_often_it_is_differentiated():
    program, objective, x = Unrelated(), BetaELBO(warmup=4, kl="analytic"), torch.zeros(3, 1).double()
    for step in range(3):
        loss = objective(program.model, program.guide, x)
        assert Unrelated.weight(loss) == pytest.approx(step / 4, abs=1e-6)
        gradients = [torch.autograd.grad(loss, program.loc, retain_graph=True)[0] for _ in range(3)]
        assert [float(each) for each in gradients] == pytest.approx([step / 4 * 2] * 3, abs=1e-6)


def test_a_functional_gradient_is_no_step():
    program, objective, x = Unrelated(), BetaELBO(warmup=4, kl="analytic"), torch.zeros(3, 1).double()
    objective.advance(1)

    def loss(loc):
        other = Unrelated()
        other.__dict__["loc"] = loc
        other._parameters.pop("loc")
        return objective(other.model, other.guide, x)

    gradients = [torch.func.grad(loss)(program.loc.detach()).item() for _ in range(3)]
    assert gradients == pytest.approx([0.25 * 2] * 3, abs=1e-6)


def test_an_objective_of_ones_own_advances_by_itself():
    class Tempered(ELBO):
        """The ELBO, times the number of steps."""

        def __init__(self):
            super().__init__(kl="analytic")
            self.factor = torch.tensor(0.0)

        def advance(self, step):
            super().advance(step)
            self.factor.fill_(step)

        def __call__(self, model, guide, *args):
            return self.counted(self.factor.clone() * super().__call__(model, guide, *args))

    for make in ENGINES.values():
        program, x = Unrelated(), torch.zeros(3, 1).double()
        with pyro.get_param_store().scope():
            svi = make(program, Tempered())
            losses = [float(svi.step(x)) for _ in range(3)]
        assert losses == pytest.approx([step * (math.log(2 * math.pi) / 2 + 2) for step in range(3)], rel=1e-9)


def test_advance_sets_the_weight_of_any_step():
    objective = BetaELBO(beta=3.0, warmup=2)
    objective.advance(100)
    assert objective._weight.item() == 3


def test_a_compiled_step_sees_the_warm_up():
    losses = []
    for engine, settings in ((PyroSVI, {}), (CompiledSVI, {"compiler": "none"})):
        torch.manual_seed(0)
        vae, x, objective = small_vae(), binary(5), BetaELBO(beta=2.0, warmup=7)
        calls = SimpleQueue()

        def model(x, vae=vae, calls=calls):
            calls.put(None)
            return vae.model(x)

        svi = engine(model, vae.guide, torch.optim.Adam(vae.parameters(), lr=0.01), objective, **settings)
        torch.manual_seed(1)
        losses.append([float(svi.step(x)) for _ in range(9)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert calls.qsize() == 6  # three at first, and spot checks at uses 1, 2, 4: the weight makes no new graph


def test_fit_counts_the_steps(tmp_path):
    class Counting(ELBO):
        def advance(self, step):
            steps.append(step)

    batches = [binary(4), binary(4), binary(2)]
    steps, path = [], tmp_path / "checkpoint.pt"
    for epochs in (1, 2):
        checkpoint = Checkpoint(path, resume=True)
        settings = {"loss": Counting(), "schedule": "constant", "progress": False, "callbacks": [checkpoint]}
        fit(small_vae(), batches, epochs=epochs, **settings)
    assert steps == [0, 1, 2, 3, 4, 5]


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELBO(0), "num_particles must be a whole number of at least 1, got 0"),
        (lambda: ELBO(kl="exact"), "kl must be sampled or analytic, got exact"),
        (lambda: IWAE(0), "num_particles must be a whole number of at least 1"),
        (lambda: IWAE(2.5), "num_particles must be a whole number of at least 1, got 2.5"),
        (lambda: DReG(0), "num_particles must be a whole number of at least 1"),
        (lambda: MIWAE(0, 5), "num_groups must be a whole number of at least 1"),
        (lambda: PIWAE(5, 0), "num_particles must be a whole number of at least 1"),
        (lambda: CIWAE(1.5), "beta must be between 0, which is IWAE, and 1, the ELBO, got 1.5"),
        (lambda: Renyi(math.nan), "alpha must be -inf or from -1e6 to 1e6, got nan; 0 is IWAE, 1 the ELBO"),
        (lambda: Renyi(math.inf), "alpha must be -inf or from -1e6 to 1e6"),
        (lambda: TVO(1), "num_particles must be at least 2"),
        (lambda: TVO(smallest=1.0), "smallest must be between 0 and 1"),
        (lambda: TVO(num_intervals=0), "num_intervals must be a whole number of at least 1"),
        (lambda: BetaELBO(-1), "beta must be at least 0 and finite, got -1"),
        (lambda: BetaELBO(free_bits=math.inf), "free_bits must be at least 0 and finite"),
        (lambda: BetaELBO(period=5), "period repeats the warm-up: give warmup too"),
        (lambda: BetaELBO(warmup=5, period=4), "period must be at least warmup, 5, got 4"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("objective", [ELBO(kl="analytic"), BetaELBO(kl="analytic", free_bits=1.0)])
def test_a_divergence_without_closed_form_is_refused(objective):
    vae = small_vae()
    vae.prior = priors.Flow(3, hidden=[8]).double()
    with pytest.raises(ContractError, match=r"no closed form .* from Normal to FlowDistribution .* take kl=.sampled"):
        objective(vae.model, vae.guide, binary(3))


@pytest.mark.parametrize("head", [FullRank(3), LowRank(3, rank=2)], ids=lambda head: type(head).__name__)
def test_analytic_kl_of_a_posterior_with_covariances(head):
    vae, x = small_vae(), binary(4)
    vae.posterior = Conditional(MLP(x.shape[1], sum(head.sizes)), head).double()
    with torch.no_grad():
        q = vae.posterior(x)
        covariance, loc = q.covariance_matrix, q.mean
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        divergence = 0.5 * (trace + loc.square().sum(-1) - 3 - covariance.logdet())
        beta = [BetaELBO(b, kl="analytic") for b in (0.0, 1.0)]
        values = []
        for objective in beta:
            torch.manual_seed(0)
            values.append(objective(vae.model, vae.guide, x).item())
    assert values[1] - values[0] == pytest.approx(divergence.mean().item(), rel=1e-9)


@pytest.mark.parametrize("alpha", [1 - 1e-9, 1 + 1e-7, 0.999])
def test_renyi_near_the_elbo_keeps_its_digits(alpha):
    vae, x = small_vae().float(), binary(20).float()
    torch.manual_seed(0)
    log_w = log_weights(vae.model, vae.guide, x, 50).detach().double()
    expected = (renyi(alpha)(log_w) if alpha == 0.999 else log_w.mean(0)).mean().item()
    torch.manual_seed(0)
    assert -Renyi(alpha, 50)(vae.model, vae.guide, x).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("ours", "usual"), [(STL(200), ELBO(200)), (DReG(200), IWAE(200)), (PIWAE(1, 200), IWAE(200))])
def test_an_encoder_with_dropout_is_run_once(ours, usual):
    """Both must score z under the distribution that it was drawn from: another mask would be another one."""
    torch.manual_seed(0)
    vae, x = small_vae(), binary(200)
    vae.posterior.network.layers.insert(1, torch.nn.Dropout(0.5))
    vae.posterior.network.layers[0].weight.data.mul_(5)
    values = []
    for objective in (ours, usual):
        torch.manual_seed(1)
        values.append(objective(vae.model, vae.guide, x).item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_tvo_corrects_its_covariance():
    """With one interval the expected gradient is the ELBO's, however few the samples."""
    value, gradient = expected(elbo, 1)
    assert_mean_is(*Replicates(400_000).sample(TVO(2, 1)), value, gradient)


def test_ones_own_bound_refuses_draws_without_gradient():
    model = Replicates(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", NonreparameterizedNormal(model.loc[:, None], model.log_scale.exp()[:, None]).to_event(1))

    with pytest.raises(ContractError, match="draws from NonreparameterizedNormal, whose draws have no gradient"):
        log_weights(model.model, guide, model.x, 3)
    with torch.no_grad():  # an estimate needs none
        assert log_weights(model.model, guide, model.x, 3).shape == (3, 3)


def test_a_class_is_no_loss():
    with pytest.raises(TypeError, match=r"loss is the class IWAE: pass an object, such as IWAE\(\)"):
        fit(small_vae(), [binary(4)], loss=IWAE)


PATHWISE = [ELBO(2), BetaELBO(), IWAE(3), Renyi(0.5, 3), MIWAE(2, 2), CIWAE(0.5, 3), PIWAE(2, 2), STL(), DReG(3)]


@pytest.mark.parametrize("objective", PATHWISE, ids=lambda each: type(each).__name__)
def test_draws_without_gradient_are_refused_but_for_tvo(objective):
    model = Replicates(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", NonreparameterizedNormal(model.loc[:, None], model.log_scale.exp()[:, None]).to_event(1))

    with pytest.raises(ContractError, match=r"guide site 'z' draws from .*: choose another posterior"):
        objective(model.model, guide, model.x)
    (gradient,) = torch.autograd.grad(TVO(5)(model.model, guide, model.x), model.loc)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_free_bits_of_a_latent_that_is_a_matrix_are_those_of_its_numbers(kl):
    def program(x, observed=False):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2, 3, dtype=x.dtype), 1.0).to_event(1).to_event(1))
            if observed:
                pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    x = torch.zeros(5, dtype=torch.float64)
    loss = BetaELBO(free_bits=0.5, kl=kl)(partial(program, observed=True), program, x)
    assert loss.item() == pytest.approx(6 * 0.5 + 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["PyroSVI", "CompiledSVI"])
def test_objectives_in_turn_are_one_and_then_the_other(engine):
    """As two engines that share an optimizer are, for the same noise."""
    x, found = binary(20), []
    for both in (True, False):
        torch.manual_seed(3)
        vae, last = small_vae(), BetaELBO(warmup=4)
        optim = torch.optim.Adam(vae.parameters(), lr=0.01)
        if both:
            loss, losses = InTurn(IWAE(3), last, 5), []
            svi = engine(vae.model, vae.guide, optim, loss)
            for step in range(11):
                loss.advance(step)
                losses.append(float(svi.step(x)))
        else:
            losses = []
            for loss, steps in ((IWAE(3), 5), (last, 6)):
                svi = engine(vae.model, vae.guide, optim, loss)
                losses += [float(svi.step(x)) for _ in range(steps)]
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    with pytest.raises(ValueError, match="one object"):
        InTurn(last, last, 3)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        InTurn(IWAE(2), last, 0)
    with pytest.raises(TypeError, match="then: Trace_ELBO is no objective of pyro_vae"):
        InTurn(last, pyro.infer.Trace_ELBO(), 3)


@pytest.mark.parametrize("pyros", [pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()])
def test_a_loss_of_pyro_that_is_warmed_up_is_the_elbo_with_part_of_its_divergence(pyros):
    """Value and gradient by quadrature; from the last step of the warm-up on, those of the loss itself."""
    replicates, loss = Replicates(100_000), WarmUp(3, pyros)

    def mean(model, guide, x):
        return loss.differentiable_loss(model, guide, x) / len(x)

    def partly(weight, *given):
        z = given[1] + given[2].exp() * NODES
        rest = log_normal(z, 0.0, 1.0) - log_normal(z, given[1], given[2].exp())
        return (NODE_WEIGHTS * (log_normal(X, given[0] * z, NOISE) + weight * rest)).sum()

    for step, weight in ((0, 0.25), (2, 0.75), (3, 1.0), (10, 1.0)):
        loss.advance(step)
        torch.manual_seed(1)
        value, gradient = replicates.sample(mean)
        true = partly(weight, *(given := parameters()))
        assert value == pytest.approx(true.item(), abs=0.03)
        expected = torch.stack(torch.autograd.grad(true, given))
        torch.testing.assert_close(gradient.mean(1), expected, atol=0.05, rtol=0)
    for ours, theirs in ((loss.loss, pyros.loss), (loss.loss_and_grads, pyros.loss_and_grads)):
        both = []
        for each in (ours, theirs):
            torch.manual_seed(1)
            both.append(each(replicates.model, replicates.guide, replicates.x))
        assert both[0] == pytest.approx(both[1], rel=1e-12)


@pytest.mark.parametrize("make", [pyro.infer.Trace_ELBO, pyro.infer.RenyiELBO])
def test_fit_warms_up_a_loss_of_pyro_alike_under_both_engines_in_its_own_scale(make):
    x, found = binary(20), []
    for engine in (PyroSVI, partial(CompiledSVI, compiler="none")):
        torch.manual_seed(3)
        vae, loss, weights = small_vae(), WarmUp(4, make()), []
        see = OnEpoch(lambda _, loss=loss, weights=weights: weights.append(loss._weight.item()))
        optimizer = partial(torch.optim.SGD, momentum=0.5)
        rows = fit(
            vae, [x], epochs=7, lr=1e-3, optimizer=optimizer, loss=loss, engine=engine, callbacks=[see], progress=False
        )
        assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
        found.append([row.objective for row in rows])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_cannot_be_warmed_up():
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        WarmUp(0)
    for wrong in (IWAE(2), WarmUp(2), pyro.infer.Trace_ELBO):
        with pytest.raises(TypeError, match=r"warmed: .* is no loss of Pyro to be warmed up"):
            WarmUp(3, wrong)
