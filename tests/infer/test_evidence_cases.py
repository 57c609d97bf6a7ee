"""Programs on which estimators of log p(x) go wrong without a word, and the pieces that keep them from it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_vae import (
    Annealing,
    ContractError,
    Evidence,
    annealed_importance_sampling,
    importance_sampling,
    quadrature,
)
from pyro_vae.infer.evidence import SMC, difference_estimate, smc
from pyro_vae.infer.evidence.chains import Mixture, bennett, resample
from pyro_vae.infer.evidence.laplace import diagonal
from pyro_vae.infer.evidence.modes import Starts, _outside, find_starts
from pyro_vae.infer.evidence.opinion import contradicts
from pyro_vae.infer.evidence.particles import typical_ladder
from pyro_vae.infer.evidence.result import log_mean_of_groups
from pyro_vae.infer.supports import Latents


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def programs(prior, likelihood, posterior):
    """One latent site; the prior may be a function of x."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", posterior(x))

    return model, guide


def standard(dim):
    return dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1)


def absolute_value(posterior=lambda x: dist.Normal(x, 0.2).to_event(1)):
    """Two modes, at 1 and -1; the guide is on one of them."""

    def density(z):
        return stats.norm.pdf(z) * stats.norm.pdf(1 - z, scale=0.2)

    truth = math.log(2 * integrate.quad(density, 0, 8, points=[1], epsabs=1e-13)[0])
    program = programs(standard(1), lambda z: dist.Normal(z.abs(), 0.2).to_event(1), posterior)
    return *program, double(1.0)[:, None], truth


def squares(dim):
    """2^dim symmetric modes; the guide is the prior."""

    def density(z):
        return stats.norm.pdf(z) * stats.norm.pdf(2 - z**2, scale=0.3)

    truth = dim * math.log(2 * integrate.quad(density, 0, 6, points=[1.4], epsabs=1e-13)[0])
    program = programs(
        standard(dim),
        lambda z: dist.Normal(z.square(), 0.3).to_event(1),
        lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1),
    )
    return *program, torch.full((1, dim), 2.0).double(), truth


def small_gamma():
    """Gamma(0.1): the posterior spans dozens of powers of e."""

    def density(u):  # of log z
        return stats.norm.pdf(0.3 - math.exp(u), scale=0.5) * math.exp(0.1 * u - math.exp(u) - math.lgamma(0.1))

    truth = math.log(integrate.quad(density, -300, 6, points=[-10, 0], limit=500)[0])
    program = programs(
        dist.Gamma(double(0.1), double(1.0)).to_event(1),
        lambda z: dist.Normal(z, 0.5).to_event(1),
        lambda x: dist.Gamma(torch.ones_like(x), 1.0).to_event(1),
    )
    return *program, double(0.3)[:, None], truth


def collapsed(df, dim, scale):
    """Heavy-tailed units that the likelihood ignores."""
    program = programs(
        dist.StudentT(torch.full((dim,), df).double(), 0.0, scale).to_event(1),
        lambda z: dist.Normal(0 * z[..., :3], 1.0).to_event(1),
        lambda x: dist.StudentT(x.new_full((len(x), dim), df), 0.0, scale).to_event(1),
    )
    return *program, torch.zeros(1, 3).double(), -1.5 * math.log(2 * math.pi)


def far_guide():
    """N(4, 0.1), far from a posterior around 0.3."""
    x = double(0.5, -0.3)[None]
    program = programs(
        standard(2),
        lambda z: dist.Normal(z, 0.5).to_event(1),
        lambda x: dist.Normal(torch.full_like(x, 4.0), 0.1).to_event(1),
    )
    return *program, x, stats.norm.logpdf(x.numpy(), scale=math.sqrt(1.25)).sum()


def eight_schools():
    """Centred, and all of it one datum; the truth by quadrature over mu and tau."""
    y = double(28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
    sigma = double(15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            mu = pyro.sample("mu", dist.Normal(double(0.0)[0], 5.0))
            tau = pyro.sample("tau", dist.HalfCauchy(double(5.0)[0]))
            theta = pyro.sample("theta", dist.Normal(mu[..., None], tau[..., None]).expand([*tau.shape, 8]).to_event(1))
            pyro.sample("x", dist.Normal(theta, sigma).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            mu = pyro.sample("mu", dist.Normal(double(4.0)[0], 3.0))
            tau = pyro.sample("tau", dist.LogNormal(double(1.0)[0], 0.8))
            pyro.sample("theta", dist.Normal(mu[..., None], tau[..., None]).expand([*tau.shape, 8]).to_event(1))

    def given_tau(angle):  # mu integrates out: y ~ N(0, diag(sigma^2 + tau^2) + 25); tau = 5 tan(angle), uniform
        covariance = torch.diag(sigma.square() + (5 * math.tan(angle)) ** 2) + 25
        return 2 / math.pi * MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).exp().item()

    return model, guide, y[None], math.log(integrate.quad(given_tau, 0, math.pi / 2, epsabs=0)[0])


def right(evidence, truth):
    return bool(((evidence.log_px - truth).abs() < 4 * evidence.mc_se).all())


MUST_BE_RIGHT = {
    "absolute value": absolute_value,
    "squares, 2": lambda: squares(2),
    "Gamma(0.1)": small_gamma,
    "horseshoe, collapsed": lambda: collapsed(1.0, 10, 0.5),
    "Student-t, collapsed": lambda: collapsed(2.0, 50, 1.0),
    "far guide": far_guide,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", MUST_BE_RIGHT)
def test_annealing_is_right_and_knows_it(name):
    model, guide, x, truth = MUST_BE_RIGHT[name]()
    evidence = annealed_importance_sampling(model, guide, x, compiled=False)
    assert evidence.reliable.all()
    assert right(evidence, truth)
    assert (evidence.mc_se < 0.25).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [lambda: squares(10), eight_schools])
def test_annealing_is_right_or_says_that_it_is_not(case):
    model, guide, x, truth = case()
    evidence = annealed_importance_sampling(model, guide, x, compiled=False)
    assert right(evidence, truth) or not evidence.reliable.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUST_BE_RIGHT)
def test_annealing_of_the_same_datum_forty_times(name):
    """Under Gamma(0.1) a few of a hundred are off by more than four errors: 12 chains may all miss a cliff."""
    model, guide, x, truth = MUST_BE_RIGHT[name]()
    evidence = annealed_importance_sampling(model, guide, x.expand(40, -1), compiled=False)
    known = evidence.reliable
    error = (evidence.log_px - truth)[known]
    off = error.abs() / evidence.mc_se[known]
    assert known.double().mean() > 0.8
    assert (off < 1.96).double().mean() > 0.8
    assert (off < 4).double().mean() > 0.9
    assert (error.abs() < 4 * evidence.mc_se[known] + 0.03).all()
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5 + 0.005


def test_few_temperatures_from_a_far_guide_are_not_believed():
    model, guide, x, truth = far_guide()
    settings = Annealing(num_temperatures=21, start="guide")
    evidence = annealed_importance_sampling(model, guide, x, settings, compiled=False)
    assert right(evidence, truth) or not evidence.reliable.any()


@pytest.mark.parametrize("settings", [Annealing(num_climbs=0), Annealing(num_climbs=0, num_temperatures=10)])
def test_a_second_opinion_tells_of_a_mode_that_the_start_has_missed(settings):
    model, guide, x, truth = absolute_value()
    evidence = annealed_importance_sampling(model, guide, x, settings, compiled=False)
    assert right(evidence, truth) or not evidence.reliable.any()


@pytest.mark.slow
def test_particles_tell_of_modes_that_the_start_has_missed():
    """In three dimensions, where quadrature does not: of eight modes the start has one."""
    model, _, x, truth = squares(3)
    _, guide = programs(standard(3), None, lambda x: dist.Normal(x.sqrt(), 0.1).to_event(1))
    blind = annealed_importance_sampling(model, guide, x, Annealing(num_climbs=0, num_checked=0), compiled=False)
    assert blind.log_px.item() == pytest.approx(truth - 3 * math.log(2), abs=0.1)
    evidence = annealed_importance_sampling(model, guide, x, Annealing(num_climbs=0), compiled=False)
    assert right(evidence, truth) or not evidence.reliable.any()


def test_without_climbs_and_second_opinion_half_of_two_modes_is_missed():
    """What the two are for: chains agree on the mode that they start on."""
    model, guide, x, truth = absolute_value()
    settings = Annealing(num_climbs=0, num_checked=0)
    evidence = annealed_importance_sampling(model, guide, x, settings, compiled=False)
    assert evidence.log_px.item() == pytest.approx(truth - math.log(2), abs=0.02)
    assert evidence.mc_se.item() < 0.02


@pytest.mark.slow
def test_a_second_opinion_on_some_casts_doubt_on_all():
    model, guide, x, truth = absolute_value()
    settings = Annealing(num_climbs=0, num_temperatures=5, num_checked=1)
    evidence = annealed_importance_sampling(model, guide, x.expand(3, 1), settings, compiled=False)
    wrong = (evidence.log_px - truth).abs() > 0.3
    assert not (evidence.reliable & wrong).any()


def both_modes(x):
    two = dist.Normal(torch.stack([x, -x], -1).squeeze(-2), 0.25)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(two.loc)), two).expand([len(x)])


def test_importance_sampling_from_a_guide_on_one_of_two_modes_is_not_reliable():
    model, guide, x, truth = absolute_value()
    evidence = importance_sampling(model, guide, x, 1000, compiled=False)
    assert evidence.log_px.item() == pytest.approx(truth - math.log(2), abs=0.05)
    assert (evidence.khat < 0.67).all()  # which alone would let it be believed
    assert not evidence.reliable.any()


def test_importance_sampling_from_a_guide_on_both_modes_is_reliable():
    _, _, x, truth = absolute_value()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(double(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z.abs().unsqueeze(-1), 0.2).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", both_modes(x))

    evidence = importance_sampling(model, guide, x, 1000, compiled=False)
    assert evidence.reliable.all()
    assert right(evidence, truth)


@pytest.mark.parametrize(
    ("case", "num_particles"), [(far_guide, 256), (absolute_value, 256), (lambda: squares(2), 2048)]
)
def test_smc(case, num_particles):
    model, guide, x, truth = case()
    evidence = smc(model, guide, x, SMC(num_particles), compiled=False)
    assert evidence.reliable.all()
    assert right(evidence, truth)
    assert (evidence.mc_se < 0.3).all()
    assert (evidence.evaluations >= 2 * num_particles).all()


@pytest.mark.slow
def test_smc_is_unbiased_and_its_error_is_its_spread():
    model, guide, x, truth = absolute_value()
    evidence = smc(model, guide, x.expand(400, 1), SMC(64), compiled=False)
    weight = (evidence.log_px - truth).exp()
    assert abs(weight.mean() - 1) < 4 * weight.std() / 20
    assert (evidence.log_px - truth).std().item() == pytest.approx(
        evidence.mc_se.square().mean().sqrt().item() / 1.21, rel=0.2
    )  # 1.21 is Student's t of 7 degrees


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_groups": 1}, "num_groups must be at least 2"),
        ({"num_particles": 100, "num_groups": 8}, "num_particles must be a multiple"),
        ({"ess": 1.0}, "ess must be between"),
        ({"start": "laplace"}, "start must be prior or guide"),
    ],
)
def test_smc_refuses_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        SMC(**setting)


@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_bennetts_ratio_of_gaussian_work(spread):
    """Crooks: the log-weights of chains back are those of chains there, reweighted."""
    exact, chains, times = -90.0, 200, 2000
    noise = spread * torch.randn(2, chains, times, dtype=torch.float64)
    forward, backward = exact - spread**2 / 2 + noise[0], -(exact + spread**2 / 2 + noise[1])
    log_z, error = bennett(forward, backward, torch.full((times,), float(chains)))
    assert abs(log_z.mean() - exact) < 4 * log_z.std() / times**0.5 + 1e-3
    assert log_z.std().item() == pytest.approx(error.square().mean().sqrt().item(), rel=0.08)
    one_way = (forward.logsumexp(0) - math.log(chains) - exact).std()
    assert log_z.std() < one_way  # which has half as many chains


def test_bennetts_ratio_where_there_is_no_answer():
    weights = torch.zeros(4, 2).double()
    weights[1, 1] = math.nan
    log_z, error = bennett(weights, torch.zeros(4, 2).double(), double(4.0, 4.0))
    assert log_z[0].abs() < 1e-9
    assert error[0] == 0
    assert log_z[1].isnan()
    assert error[1].isnan()


def test_resampling_is_unbiased_and_systematic():
    log_w = (3 * torch.randn(7, 1, dtype=torch.float64)).expand(7, 20_000)
    chosen = resample(log_w)
    counts = torch.stack([(chosen == chain).sum(0) for chain in range(7)]).double()
    expected = 7 * log_w.softmax(0)
    assert (counts >= expected.floor() - 1e-9).all()
    assert (counts <= expected.ceil() + 1e-9).all()
    error = counts.std(1) / 20_000**0.5
    assert ((counts - expected).mean(1).abs() <= 4 * error + 1e-9).all()


def test_resampling_of_weights_that_are_all_lost_keeps_every_chain():
    assert resample(torch.full((5, 3), -math.inf)).equal(torch.arange(5).unsqueeze(1).expand(5, 3))


def test_shares_of_a_mixture_against_torch():
    dim, modes = 3, 4
    factor = torch.randn(modes, dim, dim, dtype=torch.float64).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.3)
    loc, weight = torch.randn(modes, dim, dtype=torch.float64), torch.rand(modes, dtype=torch.float64)
    normals = MultivariateNormal(loc, scale_tril=factor)
    u = torch.randn(10, modes, dim, dtype=torch.float64)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    mixture = Mixture(
        loc.expand(modes, modes, dim),
        torch.linalg.inv(factor).expand(modes, modes, dim, dim),
        (weight.log() - log_det).expand(modes, modes),
        torch.arange(modes),
    )
    whole = MixtureSameFamily(Categorical(weight), normals).log_prob(u)
    expected = (weight / weight.sum()).log() + normals.log_prob(u) - whole
    torch.testing.assert_close(mixture.log_share(u), expected, rtol=1e-9, atol=1e-9)


def latents_of(model, guide, x):
    return Latents(model, guide, x, gaussian=True)


def test_modes_are_found_where_there_are_several():
    """x > 0 has two, at the roots; x < 0 has one, at zero."""
    model, guide, _, _ = squares(1)
    x = double(2.0, -1.0, 1.5)[:, None]
    starts = find_starts(latents_of(model, guide, x), 4, 1.0)
    assert starts.rows.tolist() == [0, 0, 1, 2, 2]
    peaks = starts.coordinates.loc.squeeze(1)
    roots = (double(2.0, 1.5) - 0.09 / 2).sqrt()  # where -z^2 / 2 - (x - z^2)^2 / 0.18 is stationary
    for rows, root in ((peaks[:2], roots[0]), (peaks[3:], roots[1])):
        torch.testing.assert_close(rows.sort().values, torch.stack([-root, root]), atol=0.05, rtol=0)
    assert peaks[2].abs() < 0.1
    assert starts.mixture is not None
    assert (starts.evaluations > 0).all()


@pytest.mark.parametrize(("dim", "modes"), [(1, 2), (2, 4), (3, 8)])
def test_all_symmetric_modes_are_found(dim, modes):
    model, guide, x, _ = squares(dim)
    starts = find_starts(latents_of(model, guide, x), 4, 1.0)
    signs = {tuple(row) for row in starts.coordinates.loc.sign().int().tolist()}
    assert len(signs) == len(starts.rows) == modes
    assert (starts.unseen < 0.05).all()


def test_one_mode_is_found_once():
    model, guide, x, _ = far_guide()
    starts = find_starts(latents_of(model, guide, x.expand(5, 2)), 4, 1.0)
    assert starts.rows.tolist() == [0, 1, 2, 3, 4]
    assert starts.mixture is None
    torch.testing.assert_close(starts.coordinates.loc, (x / 1.25).expand(5, 2), atol=1e-3, rtol=0)


def test_the_share_outside_of_all_normals():
    """A normal on one of two modes; the other lies outside of it."""
    model, guide, x, truth = absolute_value()
    size, radius = 400, math.sqrt(1 + 4 * math.sqrt(2))
    latents = latents_of(model, guide, x.expand(size, 1))
    coordinates = diagonal(torch.ones(size, 1).double(), torch.full((size, 1), 0.2).double())
    local = torch.full((size,), truth - math.log(2)).double()
    nothing = torch.zeros(size).double()
    starts = Starts(torch.arange(size), coordinates, None, nothing, nothing)
    share, _, log_w = _outside(latents, starts, local)

    def density(z):
        return stats.norm.pdf(z) * stats.norm.pdf(1 - abs(z), scale=0.2)

    inside = integrate.quad(density, 1 - 0.2 * radius, 1 + 0.2 * radius)[0]
    outside = log_w.logsumexp(0).exp()  # of mean p(x), less what is inside
    assert abs(outside.mean() - (math.exp(truth) - inside)) < 4 * outside.std() / size**0.5
    exact = 1 - math.exp(truth) / 2 / (1.5 * math.exp(truth) - inside)
    assert share.mean().item() == pytest.approx(exact, abs=0.02)


def test_a_typical_ladder_is_that_of_one_observation():
    ladder = torch.expm1(torch.linspace(0, 5, 9).double()) / math.expm1(5)
    curve = typical_ladder(ladder.unsqueeze(1), 9)
    torch.testing.assert_close(curve, ladder, atol=1e-8, rtol=1e-6)
    late = torch.cat([ladder, ladder.new_ones(4)])  # it waits for others
    torch.testing.assert_close(typical_ladder(late.unsqueeze(1), 9), ladder, atol=1e-8, rtol=1e-6)


def test_a_typical_ladder_is_between_those_of_all():
    fast = torch.tensor([0.0, 0.25, 1.0, 1.0, 1.0], dtype=torch.float64)
    slow = torch.tensor([0.0, 0.01, 0.04, 0.16, 1.0], dtype=torch.float64)
    curve = typical_ladder(torch.stack([fast, slow], 1), 5)
    assert curve[0] == 0
    assert curve[-1] == 1
    assert (curve.diff() >= 0).all()
    torch.testing.assert_close(curve[2], double(0.25 * 0.04).sqrt()[0], atol=1e-6, rtol=1e-6)  # half of both ways


def test_the_mean_of_groups_and_its_error():
    p = 1 + 0.1 * torch.randn(8, 4000, dtype=torch.float64)
    log_px, error = log_mean_of_groups(p.log() - 700)  # which exp alone would lose
    torch.testing.assert_close(log_px, p.mean(0).log() - 700)
    covered = ((log_px + 700).abs() < 1.96 * error).double().mean().item()
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


def test_what_contradicts():
    zero = double(0.0, 0.0, 0.0, 0.0)
    other, other_error = double(1.0, -1.0, 1.0, 5.0), double(0.1, 0.1, 0.5, 1.5)
    assert contradicts(zero, zero + 0.05, other, other_error).tolist() == [True, False, False, False]


class Impossible(dist.Normal):
    def log_prob(self, value):
        return torch.full_like(value + self.loc, -math.inf)


def test_no_finite_density_is_named_by_site():
    model, guide = programs(
        standard(1), lambda z: Impossible(z, 1.0).to_event(1), lambda x: dist.Normal(x, 1.0).to_event(1)
    )
    with pytest.raises(ContractError, match="of 'x' is finite at none"):
        annealed_importance_sampling(model, guide, torch.zeros(2, 1).double(), compiled=False)


def test_difference_estimate_from_diagnostics_by_brute_force():
    """Differences that diagnostics foretell in part: unbiased but for order 1/n, and by as much off as it says."""
    size, tried = 400, 120
    truth = 5 * torch.randn(size, dtype=torch.float64) - 90
    khat, mc_se = torch.rand(size, dtype=torch.float64), 0.1 + torch.rand(size, dtype=torch.float64)
    ess = 1 + 50 * torch.rand(size, dtype=torch.float64)
    below = 0.3 + khat + 2 * mc_se + 0.2 * torch.randn(size, dtype=torch.float64)
    nothing = torch.zeros(size).double()
    rough = Evidence(truth - below, mc_se, ess, khat, nothing, nothing, 100)
    found, stated, plain = [], [], []
    for _ in range(1000):
        among = torch.randperm(size)[:tried]
        noise = torch.full((tried,), 0.1).double()
        fine = Evidence(truth[among] + noise * torch.randn(tried).double(), noise, *[noise] * 4)
        estimate, error = difference_estimate(rough, fine, among)
        found.append(estimate)
        stated.append(error)
        plain.append(difference_estimate(rough.log_px, fine, among)[0])
    found, stated, plain = torch.tensor(found), torch.tensor(stated), torch.tensor(plain)
    assert abs(found.mean() - truth.mean()) < 4 * found.std() / len(found) ** 0.5 + 1e-3
    assert found.std().item() == pytest.approx(stated.square().mean().sqrt().item(), rel=0.12)
    assert found.std() < 0.6 * plain.std()


def planar(scale):
    """A decoder of two latent variables with bends, and 120 data of it."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(*shape, generator=generator).double() for shape in ((2, 8), (8, 20)))

    def likelihood(z):
        return dist.Bernoulli(logits=scale * (z @ first).tanh() @ second).to_event(1)

    z = torch.randn(120, 2, generator=generator).double()
    x = torch.bernoulli(likelihood(z).base_dist.probs, generator=generator)
    return *programs(standard(2), likelihood, lambda x: dist.Normal(0 * x[..., :2], 1.0).to_event(1)), x


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.7, 2.0])
def test_intervals_cover(scale):
    model, guide, x = planar(scale)
    exact = quadrature(model, guide, x)
    evidence = annealed_importance_sampling(model, guide, x, compiled=False)
    known = evidence.reliable & exact.reliable
    assert known.double().mean() > 0.9
    error = (evidence.log_px - exact.log_px)[known]
    covered = (error.abs() < 1.96 * torch.hypot(evidence.mc_se, exact.mc_se)[known]).double().mean().item()
    assert 0.9 <= covered <= 1
    assert (error.abs() < 5 * torch.hypot(evidence.mc_se, exact.mc_se)[known]).all()
    assert abs(error.mean()) < 0.02 + 3 * error.std() / len(error) ** 0.5
