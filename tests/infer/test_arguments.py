"""Programs of several arguments: conditions, several observed sites, masks, images; each against a closed form."""

import math
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    Annealing,
    BetaELBO,
    CompiledSVI,
    ContractError,
    DReG,
    PyroSVI,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    check_program,
    estimate_elbo,
    fit,
    importance_sampling,
    inference_gaps,
    log_weights,
    quadrature,
)
from pyro_vae.infer.diagnostics import active_units, kl_divergence, mutual_information
from pyro_vae.infer.evidence.exact import enumeration
from pyro_vae.infer.evidence.importance import CHUNK
from pyro_vae.infer.objectives import CIWAE, MIWAE, PIWAE, STL, TVO, Renyi
from pyro_vae.infer.trees import call, check_same_structure, concatenate, select

F64 = torch.float64


class Gaussian(nn.Module):
    """z ~ N(A c, I); an image x | z, c ~ N(W z + V c, 0.5^2 I) of shape (1, 2, 2); a score y | z ~ N(U z, 0.7^2 I).

    Where a mask of pixels or of scores is given, those that it leaves out were not seen. Everything is normal, so that
    the posterior and log p(x, y | c) are known.
    """

    def __init__(self, shift=0.0):
        super().__init__()
        self.prior = nn.Parameter(0.5 * torch.randn(2, 3, dtype=F64))
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=F64))
        self.direct = nn.Parameter(torch.randn(4, 3, dtype=F64))
        self.scores = nn.Parameter(torch.randn(2, 2, dtype=F64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=F64))  # of the guide, from the exact posterior

    def model(self, x, c, y, pixels=None, rated=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c @ self.prior.mT, 1.0).to_event(1))
            image = (z @ self.weight.mT + c @ self.direct.mT).unflatten(-1, (1, 2, 2))
            each = dist.Normal(image, 0.5)
            pyro.sample("x", (each if pixels is None else each.mask(pixels)).to_event(3), obs=x)
            with poutine.mask(mask=torch.ones(len(x), dtype=torch.bool) if rated is None else rated):
                pyro.sample("y", dist.Normal(z @ self.scores.mT, 0.7).to_event(1), obs=y)

    def guide(self, x, c, y, pixels=None, rated=None):
        with pyro.plate("data", len(x), dim=-1):
            precision, natural = torch.eye(2, dtype=F64).expand(len(x), 2, 2), c @ self.prior.mT
            both = torch.cat([self.weight / 0.5, self.scores / 0.7])
            target = torch.cat([(x.flatten(1) - c @ self.direct.mT) / 0.5, y / 0.7], 1)
            seen = self.seen(x, pixels, rated).to(F64)
            precision = precision + torch.einsum("bi,ij,ik->bjk", seen, both, both)
            natural = natural + (seen * target) @ both
            loc = torch.linalg.solve(precision, natural.unsqueeze(-1)).squeeze(-1)
            pyro.sample("z", dist.MultivariateNormal(loc + self.shift, precision_matrix=precision))

    @staticmethod
    def seen(x, pixels, rated):
        of_x = torch.ones(len(x), 4, dtype=torch.bool) if pixels is None else pixels.flatten(1)
        of_y = torch.ones(len(x), dtype=torch.bool) if rated is None else rated
        return torch.cat([of_x, of_y[:, None].expand(-1, 2)], 1)

    def log_px(self, x, c, y, pixels=None, rated=None):
        """By scipy, datum by datum."""
        both = torch.cat([self.weight, self.scores]).detach().numpy()
        prior, direct = self.prior.detach().numpy(), self.direct.detach().numpy()
        covariance = both @ both.T + np.diag([0.25] * 4 + [0.49] * 2)
        result = []
        for value, given, seen in zip(torch.cat([x.flatten(1), y], 1), c, self.seen(x, pixels, rated), strict=True):
            k, given = seen.numpy(), given.numpy()
            mean = both @ (prior @ given) + np.concatenate([direct @ given, np.zeros(2)])
            result.append(stats.multivariate_normal(mean[k], covariance[np.ix_(k, k)]).logpdf(value.numpy()[k]))
        return torch.tensor(result, dtype=F64)


def data_of(kind, size=7):
    x, c, y = (torch.randn(size, *shape, dtype=F64) for shape in ((1, 2, 2), (3,), (2,)))
    if kind == "tuple":
        return x, c, y
    if kind == "dict":
        return {"c": c, "y": y, "x": x}
    pixels = torch.rand(size, 1, 2, 2) < 0.6
    pixels[:, 0, 0, 0] = True
    return {"x": x, "c": c, "y": y, "pixels": pixels, "rated": torch.arange(size) % 3 > 0}


def log_px_of(program, data):
    return call(program.log_px, data)


KINDS = ["tuple", "dict", "masked"]
OBJECTIVES = [
    ELBO(3), ELBO(2, kl="analytic"), BetaELBO(), IWAE(4), DReG(4), STL(2), Renyi(0.3, 4), MIWAE(2, 3), CIWAE(0.3, 4),
    PIWAE(2, 2), TVO(4),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_log_weights_of_the_exact_posterior_are_log_p(kind):
    program, data = Gaussian(), data_of(kind)
    log_w = log_weights(program.model, program.guide, data, 3)
    torch.testing.assert_close(log_w, log_px_of(program, data).expand(3, 7))
    check_program(program.model, program.guide, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_every_bound_is_tight_at_the_exact_posterior(objective, kind):
    program, data = Gaussian(), data_of(kind)
    bound = -objective(program.model, program.guide, data)
    if isinstance(objective, ELBO) and objective.kl == "analytic":  # the reconstruction is still sampled
        draws = torch.stack([-objective(program.model, program.guide, data).detach() for _ in range(500)])
        assert abs(draws.mean() - log_px_of(program, data).mean()) < 5 * draws.std() / 500**0.5
    else:
        torch.testing.assert_close(bound, log_px_of(program, data).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_estimators_agree_with_the_closed_form(kind):
    program, data = Gaussian(shift=0.4), data_of(kind)
    exact = log_px_of(program, data)
    by_guide = importance_sampling(program.model, program.guide, data, 3000, compiled=False)
    assert ((by_guide.log_px - exact).abs() < 5 * by_guide.mc_se + 1e-9).all()
    assert by_guide.num_samples == 3000
    by_laplace = importance_sampling(program.model, program.guide, data, 100, proposal="laplace", compiled=False)
    torch.testing.assert_close(by_laplace.log_px, exact, rtol=0, atol=1e-6)
    grid = quadrature(program.model, program.guide, data)
    torch.testing.assert_close(grid.log_px, exact, rtol=0, atol=1e-8)
    for start, temperatures in (("laplace", 3), ("guide", 40), ("prior", 80)):
        settings = Annealing(num_temperatures=temperatures, start=start)
        annealed = annealed_importance_sampling(program.model, program.guide, data, settings, compiled=False)
        assert ((annealed.log_px - exact).abs() < 5 * annealed.mc_se + 1e-3).all()
    elbo = estimate_elbo(program.model, program.guide, data, 4000)
    assert (elbo < exact).all()
    assert (elbo > exact - 0.5 * 0.4**2 * 60).all()


@pytest.mark.slow
def test_memory_and_chunks_do_not_change_what_is_estimated(monkeypatch):
    program, data = Gaussian(shift=0.3), data_of("masked", 9)
    exact = log_px_of(program, data)
    for memory in (1, 3000, 10**6):
        monkeypatch.setitem(CHUNK, "cpu", memory)
        found = importance_sampling(program.model, program.guide, data, 70, compiled=False)
        assert found.log_px.shape == (9,)
        assert ((found.log_px - exact).abs() < 6 * found.mc_se + 1e-9).all()


@pytest.mark.slow
def test_compiled_evidence_of_a_tree_is_that_of_the_programs(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 200_000)
    program, data = Gaussian(shift=0.3), data_of("masked", 9)
    found = importance_sampling(program.model, program.guide, data, 9000)
    assert ((found.log_px - log_px_of(program, data)).abs() < 5 * found.mc_se).all()
    settings = Annealing(num_temperatures=60)
    annealed = annealed_importance_sampling(program.model, program.guide, data, settings)
    torch.testing.assert_close(annealed.log_px, log_px_of(program, data), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_data_keep_their_conditions_and_masks(kind):
    program, data = Gaussian(), data_of(kind, 40)
    sandwich = bidirectional_monte_carlo(
        program.model, program.guide, data, Annealing(num_temperatures=4), compiled=False
    )
    check_same_structure(sandwich.data, data, "the data")
    given = dict(zip(("x", "c", "y"), data, strict=True)) if kind == "tuple" else data
    drawn = dict(zip(("x", "c", "y"), sandwich.data, strict=True)) if kind == "tuple" else sandwich.data
    for name in given:
        assert torch.equal(drawn[name], given[name]) == (name not in ("x", "y"))
    exact = log_px_of(program, sandwich.data)
    torch.testing.assert_close(sandwich.lower.log_px, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(sandwich.upper.log_px, exact, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tuple", "masked"])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, lambda: IWAE(3), lambda: DReG(3), lambda: STL(2)])
def test_engines_take_the_same_steps(loss, kind):
    data = data_of(kind)
    found = []
    for make in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
        torch.manual_seed(0)
        program = Gaussian(shift=0.5)
        svi = make(program.model, program.guide, torch.optim.Adam(program.parameters(), lr=0.05), loss())
        losses = [float(call(svi.step, data)) for _ in range(3)]
        found.append(
            (losses, float(call(svi.evaluate_loss, data)) > 0, [p.detach().clone() for p in program.parameters()])
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_pyro_itself_takes_an_objective_of_several_arguments():
    program, data = Gaussian(), data_of("dict")

    def model(x, c, y):
        pyro.module("program", program)
        return program.model(x, c, y)

    with pyro.get_param_store().scope():
        svi = SVI(model, program.guide, pyro.optim.Adam({"lr": 1e-9}), loss=IWAE(3))
        loss = svi.step(data)
    assert loss == pytest.approx(-log_px_of(program, data).mean().item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")])
def test_fit_trains_on_batches_of_trees(engine, kind):
    program, data = Gaussian(shift=2.0), data_of(kind, 60)
    for p in program.parameters():
        p.requires_grad_(p is program.shift)
    batches = [select(data, slice(i, i + 20)) for i in range(0, 60, 20)]
    history = fit(program, batches, select(data, slice(0, 30)), epochs=40, lr=0.2, engine=engine, progress=False)
    assert abs(program.shift.item()) < 0.05
    exact = log_px_of(program, select(data, slice(0, 30))).mean().item()
    assert history[-1].validation_elbo == pytest.approx(exact, abs=0.1)


def test_batches_of_another_structure_are_refused():
    program, data = Gaussian(), data_of("dict", 6)
    with pytest.raises(ContractError, match=r"data\['pixels'\] is new"):
        fit(program, [data, data_of("masked", 6)], epochs=1, progress=False)
    with pytest.raises(ContractError, match=r"data\['y'\] is missing"):
        fit(program, [data], {k: v for k, v in data.items() if k != "y"}, epochs=1, progress=False)


@pytest.mark.slow
def test_diagnostics_of_a_program_with_conditions():
    program, data = Gaussian(), data_of("dict", 200)
    exact_kl = []
    with torch.no_grad():
        for i in range(200):
            one = select(data, slice(i, i + 1))
            q = poutine.trace(program.guide).get_trace(**one).nodes["z"]["fn"]
            p = dist.MultivariateNormal(one["c"] @ program.prior.mT, torch.eye(2, dtype=F64))
            exact_kl.append(torch.distributions.kl_divergence(q, p))
    exact = torch.cat(exact_kl).mean().item()
    found = kl_divergence(program.model, program.guide, data, num_samples=200)["z"].sum().item()
    assert found == pytest.approx(exact, rel=0.02)
    assert active_units(program.guide, data)["z"].all()
    aggregated = mutual_information(program.model, program.guide, data, num_samples=4)
    assert aggregated.kl == pytest.approx(exact, rel=0.1)
    gaps = inference_gaps(
        program.model, program.guide, log_px_of(program, data)[:5], select(data, slice(5)), num_steps=80
    )
    assert gaps.inference_gap()[0].abs().max() < 0.1  # the guide is exact
    assert (gaps.approximation_gap()[0] > -0.05).all()


class Labels:
    """z ~ N(0, 1), x | z ~ N(z, 1), a label y in {0, 1, 2} with logits w z, seen of some data only (obs_mask)."""

    weight = torch.tensor([-1.0, 0.3, 2.0], dtype=F64)

    def model(self, x, y, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Categorical(logits=z.unsqueeze(-1) * self.weight), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, y, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    def log_px(self, x, y, seen):
        def integrand(z, x, y, seen):
            logits = self.weight.numpy() * z
            label = math.exp(logits[y]) / np.exp(logits).sum() if seen else 1.0
            return stats.norm.pdf(z) * stats.norm.pdf(x, z) * label

        rows = zip(x.tolist(), y.tolist(), seen.tolist(), strict=True)
        return torch.tensor([math.log(integrate.quad(integrand, -9, 9, args=row)[0]) for row in rows], dtype=F64)


def test_labels_that_were_not_seen_integrate_to_one():
    program = Labels()
    x, y, seen = torch.randn(6, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    exact = program.log_px(x, y, seen)
    check_program(program.model, program.guide, (x, y, seen))
    found = importance_sampling(program.model, program.guide, (x, y, seen), 5000, compiled=False)
    assert ((found.log_px - exact).abs() < 5 * found.mc_se).all()
    torch.testing.assert_close(quadrature(program.model, program.guide, (x, y, seen)).log_px, exact, rtol=0, atol=1e-8)
    annealed = annealed_importance_sampling(program.model, program.guide, (x, y, seen), Annealing(num_temperatures=5))
    assert ((annealed.log_px - exact).abs() < 5 * annealed.mc_se + 1e-3).all()


def test_what_depends_on_an_unseen_label_is_refused():
    program = Labels()

    def model(x, y, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            label = pyro.sample("y", dist.Categorical(logits=z.unsqueeze(-1) * program.weight), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(z + label, 1.0), obs=x)

    data = torch.randn(6, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    with pytest.raises(ContractError, match="site 'x' depends on y_unobserved"):
        check_program(model, program.guide, data)


def test_a_guide_may_draw_what_was_not_seen():
    """z ~ N(0, 1), x | z ~ N(z, 1), x unseen in some data: log p = 0 there, whoever draws x."""

    def model(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    x, seen = torch.randn(4, dtype=F64), torch.tensor([True, False, True, False])
    exact = torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)
    torch.testing.assert_close(log_weights(model, guide, (x, seen), 3), exact.expand(3, 4))
    annealed = annealed_importance_sampling(model, guide, {"x": x, "seen": seen}, Annealing(num_temperatures=4))
    assert ((annealed.log_px - exact).abs() < 5 * annealed.mc_se + 1e-6).all()


def test_enumeration_given_a_condition():
    """z in {0, 1} with logit c, x | z ~ N(3 z, 1): two terms."""

    def model(x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=c))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=torch.zeros_like(c)))

    x, c = torch.randn(2, 5, dtype=F64)
    p = torch.sigmoid(c)
    exact = (p * torch.exp(-((x - 3) ** 2) / 2) + (1 - p) * torch.exp(-(x**2) / 2)).log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(enumeration(model, guide, {"x": x, "c": c}).log_px, exact)


# ---- a datum's log-probability depends on that datum alone


class Neighbours(nn.Module):
    """A VAE of 5 pixels whose encoder or decoder may look at the other rows of the batch."""

    def __init__(self, inside=None, outside=None):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 2).double(), nn.Linear(2, 5).double()
        self.inside, self.outside = inside or nn.Identity(), outside or nn.Identity()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(self.outside(z)), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(self.inside(x)), 0.5).to_event(1))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def without_running_means(size):
    return nn.BatchNorm1d(size, track_running_stats=False).double()


@pytest.mark.parametrize(
    ("parts", "site"),
    [
        ({"inside": nn.BatchNorm1d(5).double()}, "guide site 'z'"),
        ({"inside": without_running_means(5)}, "guide site 'z'"),
        ({"inside": Lambda(lambda x: x - x.mean(0))}, "guide site 'z'"),
        ({"inside": Lambda(lambda x: torch.softmax(x @ x.mT, -1) @ x)}, "guide site 'z'"),
        ({"inside": Lambda(lambda x: x + x.amax(0))}, "guide site 'z'"),
        ({"inside": Lambda(lambda x: x.roll(1, 0))}, "guide site 'z'"),
        ({"outside": Lambda(lambda z: z / z.std())}, "model site 'x'"),
        ({"outside": Lambda(lambda z: z.cumsum(1) if z.dim() > 2 else z)}, "model site 'x'"),
        ({"outside": Lambda(lambda z: z * z.shape[-2])}, "model site 'x'"),
    ],
)
def test_programs_whose_rows_depend_on_each_other_are_refused(parts, site):
    vae, x = Neighbours(**parts), torch.randn(20, 5, dtype=F64)
    with pytest.raises(ContractError, match=f"{site} change if a datum is scored without the others"):
        check_program(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    "inside", [nn.BatchNorm1d(5).double().eval(), nn.LayerNorm(5).double(), nn.Dropout(0.5), nn.Identity()]
)
def test_rows_on_their_own_are_not_refused(inside):
    vae, x = Neighbours(inside), torch.randn(20, 5, dtype=F64)
    for part in (x, x[:1], x[:2], x[:3]):
        check_program(vae.model, vae.guide, part)


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [nn.BatchNorm1d(5).double(), nn.Dropout(0.5)])
def test_estimators_run_programs_in_evaluation_mode_and_leave_the_mode(noisy):
    vae, x = Neighbours(noisy), torch.randn(30, 5, dtype=F64)
    vae.inside(x)  # running means
    wrapped = poutine.condition(vae.model, data={})
    log_px = []
    for training in (True, False):
        vae.train(training)
        frozen = {name: value.clone() for name, value in vae.state_dict().items()}
        for model in (vae.model, wrapped, lambda x: vae.model(x)):
            torch.manual_seed(0)
            log_px.append(importance_sampling(model, vae.guide, x, 50, compiled=False).log_px)
        torch.manual_seed(0)
        annealed_importance_sampling(vae.model, vae.guide, x, Annealing(num_temperatures=2), compiled=False)
        estimate_elbo(vae.model, vae.guide, x)
        active_units(vae.guide, x)
        mutual_information(vae.model, vae.guide, x)
        assert vae.training == vae.inside.training == vae.encoder.training == training
        for name, value in vae.state_dict().items():
            assert torch.equal(value, frozen[name])
    for each in log_px[1:]:
        torch.testing.assert_close(each, log_px[0], rtol=0, atol=0)


# ---- what is refused


def plain(x, *_, **__):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plain_guide(x, *_, **__):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((), "hold no tensor"),
        ({}, "hold no tensor"),
        ((torch.zeros(3), torch.zeros(4)), r"data\[1\] has 4 rows and data\[0\] has 3"),
        ({"x": torch.zeros(3), "m": {"a": torch.zeros(2)}}, r"data\['m'\]\['a'\] has 2 rows"),
        ((torch.zeros(3), 5), r"data\[1\] is a int"),
        ((torch.zeros(3), None), r"data\[1\] is a NoneType"),
        ((torch.zeros(3), np.zeros(3)), r"data\[1\] is a ndarray"),
        ((torch.zeros(3), torch.tensor(1.0)), r"data\[1\] is a single number"),
        (torch.zeros(0, 3), "no datum"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), r"data\[1\] is on meta"),
        ((torch.zeros(3), torch.tensor([0.0, math.nan, 1.0])), r"1 of 3 observations hold NaN \(data\[1\], row 1\)"),
    ],
)
@pytest.mark.parametrize("estimate", [importance_sampling, check_program, estimate_elbo])
def test_data_that_are_no_tree_of_tensors_are_refused(estimate, data, message):
    settings = (10,) if estimate is importance_sampling else ()
    with pytest.raises(ContractError, match=message):
        estimate(plain, plain_guide, data, *settings)


def observing(function):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            observed = function(x)
            pyro.sample(
                "x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, observed.shape[-1]), 1.0).to_event(1), obs=observed
            )

    return model


def from_vector(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.mean(-1), 1.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / 255,
        lambda x: x + 1,
        lambda x: x.log(),
        lambda x: x.sum(-1, keepdim=True),
        lambda x: x.flip(0),
        lambda x: torch.zeros_like(x),
        lambda x: torch.cat([x[:, :1], x[:, :1]], 1),
        lambda x: x[:, :0],
    ],
)
def test_models_that_observe_something_else_are_refused(function):
    x = torch.rand(8, 3, dtype=F64) + 0.1
    with pytest.raises(ContractError, match=r"site 'x' (.*observes no data|holds something else)"):
        check_program(observing(function), from_vector, x)


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x[:, 1:], lambda x: x.flip(1), lambda x: x[:, [2, 0]]])
def test_models_that_observe_columns_of_the_data_are_not_refused(function):
    check_program(observing(function), from_vector, torch.rand(8, 3, dtype=F64))


def test_a_factor_is_refused():
    def model(x):
        plain(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.factor("penalty", -(x**2))

    with pytest.raises(ContractError, match=r"'penalty' .*observes no data"):
        check_program(model, plain_guide, torch.randn(4))


def test_deterministic_sites_do_not_count():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.deterministic("mean", 2 * z)
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    x = torch.randn(5, dtype=F64)
    found = importance_sampling(model, plain_guide, x, 20_000, compiled=False)
    exact = dist.Normal(0.0, 5**0.5).log_prob(x)
    assert ((found.log_px - exact).abs() < 5 * found.mc_se).all()
    settings = Annealing(num_temperatures=3)
    annealed = annealed_importance_sampling(model, plain_guide, x, settings, compiled=False)
    torch.testing.assert_close(annealed.log_px, exact, rtol=0, atol=1e-6)


# ---- the compiled step knows its arguments apart


def test_one_tensor_given_twice_is_two_arguments():
    x = torch.randn(6, 3, dtype=F64)
    weight = nn.Parameter(torch.ones(3, dtype=F64))

    def model(a, b):
        with pyro.plate("data", len(a), dim=-1):
            pyro.sample("y", dist.Normal(a @ weight, 1.0), obs=b[:, 0])

    for again in ((x, x + 1), (x + 1, x)):
        losses = []
        for make in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
            svi = make(model, lambda a, b: None, torch.optim.SGD([weight], lr=0.0))
            losses.append([float(svi.step(x, x)), float(svi.step(*again))])
        assert losses[0] == pytest.approx(losses[1])


def test_a_tensor_closed_over_is_no_argument():
    x = torch.randn(6, 3, dtype=F64)
    weight = nn.Parameter(torch.ones(3, dtype=F64))

    def model(a):
        with pyro.plate("data", len(a), dim=-1):
            pyro.sample("y", dist.Normal((a - x) @ weight, 1.0), obs=x[:, 0])

    losses = []
    for make in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
        svi = make(model, lambda a: None, torch.optim.SGD([weight], lr=0.0))
        losses.append([float(svi.step(x)), float(svi.step(x + 1))])
    assert losses[0] == pytest.approx(losses[1])


def test_parts_of_a_tree_are_put_together_again():
    data = data_of("masked", 7)
    parts = [select(data, slice(0, 3)), select(data, slice(3, 7))]
    again = concatenate(parts)
    assert all(torch.equal(again[name], data[name]) for name in data)


# ---- an image with its label, and a regression with a latent variable of each datum


class Labelled(nn.Module):
    """z ~ N(0, 1); five binary pixels and a label of three, both observed, given z: log p(x, y) by quadrature."""

    def __init__(self):
        super().__init__()
        self.pixels = nn.Parameter(torch.randn(5, dtype=F64))
        self.labels = nn.Parameter(torch.randn(3, dtype=F64))
        self.encoder = nn.Linear(8, 2).double()

    def model(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z * self.pixels).to_event(1), obs=x)
            pyro.sample("y", dist.Categorical(logits=z * self.labels), obs=y)

    def guide(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            both = torch.cat([x, nn.functional.one_hot(y, 3).to(x)], 1)
            loc, log_scale = self.encoder(both).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def log_px(self, x, y):
        pixels, labels = self.pixels.detach().numpy(), self.labels.detach().numpy()

        def integrand(z, x, y):
            p = 1 / (1 + np.exp(-z * pixels))
            return (
                stats.norm.pdf(z)
                * np.prod(np.where(x == 1, p, 1 - p))
                * np.exp(z * labels)[y]
                / np.exp(z * labels).sum()
            )

        rows = zip(x.numpy(), y.numpy(), strict=True)
        return torch.tensor([math.log(integrate.quad(integrand, -9, 9, args=row)[0]) for row in rows], dtype=F64)


class Regression(nn.Module):
    """A regression whose data have an effect u each: y | v, u ~ N(v w + u, 0.5), u ~ N(0, s^2)."""

    def __init__(self):
        super().__init__()
        self.weight, self.log_scale = nn.Parameter(torch.randn(3, dtype=F64)), nn.Parameter(torch.zeros((), dtype=F64))
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def model(self, v, y):
        with pyro.plate("data", len(v), dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, self.log_scale.exp()))
            pyro.sample("y", dist.Normal(v @ self.weight + u, 0.5), obs=y)

    def guide(self, v, y):
        with pyro.plate("data", len(v), dim=-1):
            pyro.sample("u", dist.Normal(self.gain * (y - v @ self.weight), 0.6))

    def log_px(self, v, y):
        spread = (0.25 + (2 * self.log_scale).exp()).sqrt()
        return dist.Normal(v @ self.weight, spread).log_prob(y).detach()


def labelled():
    return Labelled(), (torch.bernoulli(torch.full((6, 5), 0.5, dtype=F64)), torch.randint(3, (6,)))


def regression():
    return Regression(), {"y": torch.randn(6, dtype=F64), "v": torch.randn(6, 3, dtype=F64)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [labelled, regression])
def test_other_programs_by_every_estimator(make):
    program, data = make()
    exact = log_px_of(program, data)
    check_program(program.model, program.guide, data)
    torch.testing.assert_close(quadrature(program.model, program.guide, data).log_px, exact, rtol=0, atol=1e-7)
    for found in (
        importance_sampling(program.model, program.guide, data, 4000, compiled=False),
        importance_sampling(program.model, program.guide, data, 1000, proposal="laplace", compiled=False),
        annealed_importance_sampling(
            program.model, program.guide, data, Annealing(num_temperatures=10), compiled=False
        ),
    ):
        assert ((found.log_px - exact).abs() < 5 * found.mc_se + 1e-6).all()
    sandwich = bidirectional_monte_carlo(program.model, program.guide, data, Annealing(num_temperatures=20))
    simulated = log_px_of(program, sandwich.data)
    assert ((sandwich.lower.log_px - simulated).abs() < 5 * sandwich.lower.mc_se + 1e-3).all()
    assert ((sandwich.upper.log_px - simulated).abs() < 5 * sandwich.upper.mc_se + 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", [labelled, regression])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_other_programs_by_every_objective_and_engine(objective, make):
    torch.manual_seed(1)
    program, data = make()
    draws = torch.stack([-objective(program.model, program.guide, data).detach() for _ in range(100)])
    assert draws.mean() < log_px_of(program, data).mean() + 5 * draws.std() / 10
    losses = []
    for engine in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
        torch.manual_seed(1)
        program, _ = make()
        svi = engine(program.model, program.guide, torch.optim.Adam(program.parameters(), lr=0.01), objective)
        losses.append([float(call(svi.step, data)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_a_datum_masked_in_both_programs_adds_nothing(kl):
    program, (x, y) = labelled()
    keep = torch.tensor([True, False, True, True, False, True])

    def masked(program):
        def run(x, y):
            with poutine.mask(mask=keep[: len(x)]):
                program(x, y)

        return run

    torch.manual_seed(0)
    found = ELBO(40_000, kl=kl)(masked(program.model), masked(program.guide), (x, y))
    torch.manual_seed(0)
    expected = ELBO(40_000, kl=kl)(program.model, program.guide, (x[keep], y[keep]))
    assert found.item() == pytest.approx(expected.item() * 4 / 6, abs=0.02)


def test_a_distribution_masked_altogether_costs_mean_field_nothing():
    y = torch.randn(8)
    loc = nn.Parameter(torch.tensor(0.0))

    def model(y):
        pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(y):
        pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("m", dist.Normal(loc, 1.0))

    losses = []
    for make in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
        torch.manual_seed(0)
        losses.append(float(make(model, guide, torch.optim.SGD([loc], lr=0.0), TraceMeanField_ELBO()).step(y)))
    assert losses[0] == pytest.approx(losses[1])


# ---- masks of latent sites, and what was not seen


def masked_rows(program, seen_at=-1):
    def run(*data):
        with poutine.mask(mask=data[seen_at]):
            program(*data)

    return run


def masked_elements(x, seen):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).mask(seen))
        pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)


def masked_elements_guide(x, seen):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x / 2, 0.8).mask(seen))


@pytest.mark.parametrize(
    "programs",
    [(masked_rows(plain), masked_rows(plain_guide)), (masked_elements, masked_elements_guide)],
    ids=["poutine.mask", "dist.mask"],
)
def test_a_latent_that_is_masked_in_both_programs_integrates_to_one(programs):
    x, seen = torch.randn(6, dtype=F64), torch.arange(6) % 2 == 0
    exact = torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)
    torch.testing.assert_close(quadrature(*programs, (x, seen)).log_px, exact, rtol=0, atol=1e-7)
    for found in (
        importance_sampling(*programs, (x, seen), 4000, compiled=False),
        importance_sampling(*programs, (x, seen), 1000, proposal="laplace", compiled=False),
        annealed_importance_sampling(*programs, (x, seen), Annealing(num_temperatures=5), compiled=False),
    ):
        assert ((found.log_px - exact).abs() < 5 * found.mc_se + 1e-6).all()
    with pytest.raises(ContractError, match="site 'z' is masked"):
        mutual_information(*programs, (x, seen))


@pytest.mark.parametrize(
    "programs",
    [
        (masked_rows(plain), plain_guide),
        (plain, masked_rows(plain_guide)),
        (masked_elements, plain_guide),
        (plain, masked_elements_guide),
    ],
)
@pytest.mark.parametrize("estimate", [check_program, quadrature, kl_divergence, mutual_information])
def test_a_latent_that_is_masked_in_one_program_alone_is_refused(programs, estimate):
    data = torch.randn(6, dtype=F64), torch.arange(6) % 2 == 0
    with pytest.raises(ContractError, match="'z' is masked in one program"):
        estimate(*programs, data)


def test_enumeration_leaves_out_what_was_not_seen():
    """A class of two, x and a label of three given it; the label was not seen, or neither of them."""
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=F64)

    def model(x, y, labelled, there):
        with poutine.mask(mask=there), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("y", dist.Categorical(logits=z.unsqueeze(-1) * weight), obs=y, obs_mask=labelled)
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x, y, labelled, there):
        with poutine.mask(mask=there), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))

    x, y = torch.randn(4, dtype=F64), torch.tensor([0, 1, 2, 0])
    labelled, there = torch.tensor([True, True, False, True]), torch.tensor([True, True, True, False])
    terms = [
        math.log(p) + dist.Normal(2.0 * z, 1.0).log_prob(x) + torch.where(labelled, (z * weight).log_softmax(0)[y], 0.0)
        for z, p in ((0, 0.7), (1, 0.3))
    ]
    exact = torch.where(there, torch.stack(terms).logsumexp(0), 0.0)
    torch.testing.assert_close(enumeration(model, guide, (x, y, labelled, there)).log_px, exact)


# ---- draws from the model


def test_a_latent_after_an_observed_site_has_the_prior_that_the_data_give_it():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            seen = pyro.sample("x", dist.Normal(torch.zeros_like(x), 2.0), obs=x)
            z = pyro.sample("z", dist.Normal(seen, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.2 * x + 0.8 * y, 0.5))

    x = torch.tensor([-4.0, 0.0, 4.0], dtype=F64)
    y = x + 1
    settings = Annealing(num_chains=64, num_temperatures=40, start="prior")
    found = annealed_importance_sampling(model, guide, (x, y), settings, compiled=False)
    exact = dist.Normal(0.0, 2.0).log_prob(x) + dist.Normal(x, 1.25**0.5).log_prob(y)
    assert (found.mc_se < 0.4).all()
    assert ((found.log_px - exact).abs() < 5 * found.mc_se).all()
    simulated = bidirectional_monte_carlo(model, guide, (x, y), settings, compiled=False)
    x, y = simulated.data
    exact = dist.Normal(0.0, 2.0).log_prob(x) + dist.Normal(x, 1.25**0.5).log_prob(y)
    assert ((simulated.lower.log_px - exact).abs() < 5 * simulated.lower.mc_se).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start", ["laplace", "prior"])
def test_deterministic_sites_between_latents_do_not_disturb_draws(start):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
            b = pyro.sample("b", dist.Normal(pyro.deterministic("twice", 2 * a), 1.0))
            pyro.sample("x", dist.Normal(pyro.deterministic("mean", b), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.3 * x, 0.5))
            pyro.sample("b", dist.Normal(0.5 * x + a, 0.8))

    x, settings = torch.randn(4, dtype=F64), Annealing(num_chains=64, num_temperatures=40, start=start)
    sandwich = bidirectional_monte_carlo(model, guide, x, settings, compiled=False)
    exact = dist.Normal(0.0, 6**0.5).log_prob(sandwich.data)
    for found in (sandwich.lower, sandwich.upper):
        assert ((found.log_px - exact).abs() < 5 * found.mc_se + 0.1).all()


def test_simulated_data_take_the_place_of_what_is_observed_and_not_of_its_equal():
    """An input that equals the target, and two sites whose data are equal."""

    def model(c, x, first, second):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("second", dist.Bernoulli(logits=3 + 0 * z), obs=second)
            pyro.sample("first", dist.Bernoulli(logits=-3 + 0 * z), obs=first)

    def guide(c, x, first, second):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(c / 2, 0.7))

    x, zeros = 5 + torch.randn(400, dtype=F64), torch.zeros(400, dtype=F64)
    settings = Annealing(num_temperatures=2)
    simulated = bidirectional_monte_carlo(model, guide, (x, x, zeros, zeros), settings, compiled=False).data
    assert torch.equal(simulated[0], x)
    assert abs(simulated[1].mean()) < 5 * (2 / 400) ** 0.5
    assert simulated[2].mean() < 0.2
    assert simulated[3].mean() > 0.8


def test_simulated_data_that_depend_on_the_data_given_are_refused():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z + 3 * x, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(ContractError, match="'y' depends on what the model observes through the data"):
        bidirectional_monte_carlo(model, guide, torch.randn(2, 9, dtype=F64).unbind())


def test_latents_of_another_type_than_the_data():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))  # float32
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.float() / 2, 0.7))

    x, settings = torch.randn(3, dtype=F64), Annealing(num_temperatures=3)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    by_laplace = importance_sampling(model, guide, x, 100, proposal="laplace", compiled=False)
    torch.testing.assert_close(by_laplace.log_px, exact, rtol=0, atol=1e-3)
    sandwich = bidirectional_monte_carlo(model, guide, x, settings, compiled=False)
    exact = dist.Normal(0.0, 2**0.5).log_prob(sandwich.data)
    torch.testing.assert_close(sandwich.lower.log_px, exact, rtol=0, atol=1e-3)


# ---- more of what check_program refuses


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (lambda x: x + x[-1:], 16),
        (lambda x: x + x[-1:], 2),
        (lambda x: torch.cat([x[1:], x[:1]]), 2),
        (lambda x: torch.cat([x[:20], x[20:] - x[20:].mean(0)]) if len(x) > 20 else x, 60),
    ],
    ids=["last", "last of two", "next", "late rows alone"],
)
def test_neighbours_anywhere_in_the_batch_are_noticed(function, size):
    vae = Neighbours(Lambda(function))
    with pytest.raises(ContractError, match="guide site 'z' change if a datum is scored without the others"):
        check_program(vae.model, vae.guide, torch.randn(size, 5, dtype=F64))


def test_what_is_kept_for_each_datum_is_refused_with_a_reason():
    loc = torch.zeros(9, dtype=F64)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(ContractError, match=r"the guide runs with all data .* fails with some of them alone"):
        check_program(plain, guide, torch.randn(9, dtype=F64))


class InMethod(Neighbours):
    """Dropout of a function, in a method that is not ``forward``."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            mean = nn.functional.dropout(self.decoder(z), 0.5, self.training)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(1), obs=x)


ELSEWHERE = InMethod()


def elsewhere_guide(x):
    return ELSEWHERE.guide(x)


def test_modules_that_are_global_are_evaluated_too():
    x, found = torch.randn(5, 5, dtype=F64), []
    for programs in (
        (ELSEWHERE.model, ELSEWHERE.guide),
        (lambda x: ELSEWHERE.model(x), lambda x: ELSEWHERE.guide(x)),
        (lambda x: [ELSEWHERE.model(each) for each in (x,)], lambda x: elsewhere_guide(x)),
    ):
        torch.manual_seed(0)
        found.append(importance_sampling(*programs, x, 50).log_px)
    assert ELSEWHERE.training
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_tensor_that_two_sites_observe_is_refused():
    """p(x | z)^2 is no density of x; two halves that are masked apart are."""
    x, half = torch.randn(6, dtype=F64), torch.arange(6) % 2 == 0

    def model(x, half, apart):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(half if apart else torch.ones_like(half)), obs=x)
            pyro.sample("again", dist.Normal(z, 1.0).mask(~half if apart else torch.ones_like(half)), obs=x)

    with pytest.raises(ContractError, match="'x' and 'again' observe the same tensor"):
        check_program(lambda x, half: model(x, half, False), plain_guide, (x, half))
    check_program(lambda x, half: model(x, half, True), plain_guide, (x, half))
    found = importance_sampling(lambda x, half: model(x, half, True), plain_guide, (x, half), 4000, compiled=False)
    assert ((found.log_px - dist.Normal(0.0, 2**0.5).log_prob(x)).abs() < 5 * found.mc_se).all()
    twins = (x, x.clone())  # two tensors that happen to be equal, each observed once

    def two(a, b):
        with pyro.plate("data", len(a), dim=-1):
            z = pyro.sample("z", dist.Normal(a.new_zeros(()), 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    check_program(two, plain_guide, twins)


def test_an_automatic_guide_is_told_from_a_missing_site():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4, dtype=F64)
    with pyro.get_param_store().scope(), pytest.raises(ContractError, match="'z_unconstrained' is auxiliary"):
        log_weights(model, AutoNormal(model), x, 3)


def test_scoring_leaves_the_mode_of_other_threads_alone():
    vae, other, x = Neighbours(nn.Dropout(0.5)), nn.Dropout(0.5), torch.randn(30, 5, dtype=F64)
    modes, done = [], threading.Event()

    def train():
        while not done.is_set():
            other(x)
            modes.append(other.training)

    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(20):
        estimate_elbo(vae.model, vae.guide, x)
    done.set()
    thread.join()
    assert modes
    assert all(modes)
