"""The contract's checks: parts that break it, each in one way, are caught, and told in one line."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro_vae.likelihoods import Bernoulli, Gaussian, Poisson
from pyro_vae.networks import MLP
from pyro_vae.objectives import ELBO
from torch import nn

from pyro_vae import ContractError, Likelihood, MeanField, Network, Objective, Posterior, Prior, log_weights, testing


class Scaled(dist.Normal):
    """A density that is off by a constant."""

    def log_prob(self, value):
        return super().log_prob(value) + 0.1

    def expand(self, batch_shape, _instance=None):
        return Scaled(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Wide(dist.Normal):
    """Draws that are wider than the density."""

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.loc + 1.3 * (super().rsample(sample_shape) - self.loc)

    def expand(self, batch_shape, _instance=None):
        return Wide(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Stuck(dist.Normal):
    """Draws that say they have gradients, and have none."""

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return super().rsample(sample_shape).detach()

    def expand(self, batch_shape, _instance=None):
        return Stuck(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def sound(self, latent_dim):
    Prior.__init__(self, latent_dim)
    self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)


def prior(forward, **members):
    """A class of priors with this ``forward``."""
    members = {"__init__": sound, **members}
    return type("Mine", (Prior,), {"forward": lambda self, posterior=None: forward(self), **members})


def learned(self, latent_dim):
    Prior.__init__(self, latent_dim)
    self.loc = nn.Parameter(torch.zeros(latent_dim))
    self.unused = nn.Parameter(torch.zeros(latent_dim))


def random_start(self, latent_dim):
    Prior.__init__(self, latent_dim)
    self.register_buffer("loc", torch.randn(latent_dim), persistent=False)


def plain_tensor(self, latent_dim):
    Prior.__init__(self, latent_dim)
    self.loc = torch.zeros(latent_dim)


def single_type(self, latent_dim):
    Prior.__init__(self, latent_dim)
    self.matrix = torch.eye(latent_dim)
    self.loc = nn.Parameter(torch.zeros(latent_dim))


def normal(self, scale=1.0, family=dist.Normal):
    return family(self.loc, scale * torch.ones_like(self.loc)).to_event(1)


PRIORS = {
    "no prior": (lambda d: MeanField(d), "MeanField is no pyro_vae.Prior: make it a subclass"),
    "an instance": (prior(normal)(2), "pass what makes a Prior, such as its class, not an instance of Mine"),
    "fails": (prior(lambda self: 1 / 0), "Mine: forward failed: ZeroDivisionError: division by zero"),
    "no distribution": (prior(lambda self: torch.zeros(2)), "Mine must return a distribution of pyro.distributions"),
    "torch's": (
        prior(lambda self: torch.distributions.Normal(torch.zeros(2), 1.0)),
        "Mine must return a distribution of pyro.distributions",
    ),
    "no event": (
        prior(lambda self: dist.Normal(torch.zeros(self.latent_dim), 1.0)),
        r"event shape \(2,\), it made Normal of \(2,\) and \(\); add .to_event\(1\)",
    ),
    "latent_dim": (
        prior(normal, __init__=lambda self, d: Prior.__init__(self, d + 1)),
        "Mine.latent_dim must be 2, as it was made with, it is 3",
    ),
    "not normalized": (
        prior(lambda self: normal(self, family=Scaled)),
        r"its density must integrate to one, the integral is 1\.2",
    ),
    "draws of another": (prior(lambda self: normal(self, family=Wide)), "its draws must have the distribution of its"),
    "unused parameter": (prior(normal, __init__=learned), "must have a finite gradient, and unused has none"),
    "stays on the device": (
        prior(normal, __init__=plain_tensor),
        r"must follow .to\(device\), and a tensor of it stays: .*; register_buffer",
    ),
    "mixes types": (
        prior(lambda self: dist.Normal(self.matrix @ self.loc, 1.0).to_event(1), __init__=single_type),
        r"must follow .to\(torch.float64\): .*; register_buffer tensors",
    ),
    "state": (prior(normal, __init__=random_start), "with the state_dict of another it must be the same"),
    "random": (
        prior(lambda self: normal(self, scale=1 + torch.rand(()).item())),
        "called twice, it must make the same distribution",
    ),
    "support": (
        prior(normal, support=lambda self, posterior: constraints.unit_interval),
        "Mine.support must be that of its distribution",
    ),
    "initialize": (
        prior(normal, initialize=lambda self, x: x.view(-1, 7)),
        r"Mine: initialize of x of shape \(20, 6\) failed: RuntimeError",
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_broken_prior_is_caught(name):
    make, message = PRIORS[name]
    with pytest.raises(ContractError, match=message) as caught:
        testing.check_prior(make)
    assert "\n" not in str(caught.value)


class Head(Posterior):
    def __init__(self, latent_dim, sizes=None):
        super().__init__(latent_dim)
        self.sizes = sizes or (latent_dim, latent_dim)

    def forward(self, *outputs):
        return self.make(*outputs).to_event(1)


def posterior(make, **members):
    return type("Mine", (Head,), {"make": lambda self, *outputs: make(*outputs), **members})


def mixed(loc, log_scale):
    return dist.Normal(loc - (loc.mean(0) if loc.dim() > 1 else 0), log_scale.exp())


POSTERIORS = {
    "no sizes": (
        lambda d: posterior(lambda a, b: dist.Normal(a, b.exp()))(d, [d, d]),
        "must set self.sizes, a tuple of how many",
    ),
    "sizes": (
        lambda d: posterior(lambda a: dist.Normal(a, 1.0))(d, (d, d)),
        r"Mine: forward of shapes \(2,\), \(2,\) failed: TypeError",
    ),
    "argument without effect": (
        posterior(lambda a, b: dist.Normal(a, 1.0)),
        "sizes has 2 entries, but argument 2 of forward changes nothing",
    ),
    "no gradient": (posterior(lambda a, b: Stuck(a, b.exp())), "draws of Independent.rsample have no gradient"),
    "no rsample": (posterior(lambda a, b: dist.Poisson(a.exp() + b.exp())), r"draws have gradients \(has_rsample\)"),
    "rows mix": (posterior(mixed), "the last of a batch must score as it does alone"),
    "not normalized": (posterior(lambda a, b: Scaled(a, b.exp())), "its density must integrate to one"),
    "draws of another": (posterior(lambda a, b: Wide(a, b.exp())), "its draws must have the distribution of its"),
    "batch": (
        posterior(lambda a, b: dist.Normal(a.flatten(0, -2) if a.dim() > 2 else a, 1.0)),
        r"must return batch shape \(4, 3\) and event shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_broken_posterior_is_caught(name):
    make, message = POSTERIORS[name]
    with pytest.raises(ContractError, match=message) as caught:
        testing.check_posterior(make)
    assert "\n" not in str(caught.value)


class Half(dist.Bernoulli):
    """Masses that sum to 1.1."""

    def log_prob(self, value):
        return super().log_prob(value) + math.log(1.1)

    def expand(self, batch_shape, _instance=None):
        return Half(logits=self.logits.expand(batch_shape))


LIKELIHOODS = {
    "density": (type("Mine", (Gaussian,), {"is_density": False}), "says is_density = False, but its log p"),
    "encoding": (type("Mine", (Bernoulli,), {"encoding": "grey"}), "Mine.encoding must be 'binary'"),
    "data outside": (
        type("Mine", (Bernoulli,), {"encoding": "integers"}),
        "encoding is integers, but such data lie outside of its support",
    ),
    "masses": (
        type("Mine", (Bernoulli,), {"forward": lambda self, logits: Half(logits=logits).to_event(1)}),
        r"its masses must sum to one, they sum to 1\.1",
    ),
    "infinite": (
        type(
            "Mine", (Poisson,), {"forward": lambda self, rate: dist.Poisson(rate.relu(), is_sparse=False).to_event(1)}
        ),
        "(must be finite|failed)",
    ),
    "marginal's shape": (
        type("Mine", (Bernoulli,), {"marginal": lambda self, x: (x,)}),
        r"marginal must return raw outputs of shapes \[\(1,\)\], it made \[\(50, 1\)\]",
    ),
    "marginal's sign": (
        type("Mine", (Bernoulli,), {"marginal": lambda self, x: (10 * (x.mean(0) < 0.5).float(),)}),
        "marginal must describe x well",
    ),
    "event size": (
        type("Mine", (Bernoulli,), {"__init__": lambda self, n: Likelihood.__init__(self, 2 * n)}),
        "Mine.event_size must be 1, as it was made with, it is 2",
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_broken_likelihood_is_caught(name):
    make, message = LIKELIHOODS[name]
    with pytest.raises(ContractError, match=message) as caught:
        testing.check_likelihood(make)
    assert "\n" not in str(caught.value)


class Normalized(MLP):
    """Batch normalization: what it makes of a row depends on the others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(self.in_features)

    def forward(self, features):
        return super().forward(self.norm(features.reshape(-1, self.in_features)).reshape(features.shape))


class Centred(MLP):
    def forward(self, features):
        made = super().forward(features)
        return made - (made.mean(0) if made.dim() > 1 else 0)


class Flat(Network):
    """Takes one leading dimension and no more."""

    def __init__(self, in_features, out_features, image_shape=None):
        super().__init__(in_features, out_features)
        self.layer = nn.Linear(in_features, out_features)

    def forward(self, features):
        return self.layer(features.reshape(-1, self.in_features))


class Dropout(MLP):
    """Allowed: its noise is that of each row."""

    def forward(self, features):
        return super().forward(nn.functional.dropout(features, 0.5, self.training))


NETWORKS = {
    "batch normalization": (Normalized, r"in training mode it depends on the other rows \(batch normalization does"),
    "rows mix": (Centred, "of one row it makes something else than of a batch with"),
    "leading dimensions": (Flat, r"Flat must map \(56,\) to \(112,\), it made \(1, 112\)"),
    "image_shape": (
        lambda n, m: MLP(n, m),
        "a Network of in_features 56, out_features 112 could not be made: TypeError",
    ),
    "width": (lambda n, m, image_shape: MLP(n, m + 1), "MLP.out_features must be 112, as it was made with, it is 113"),
    "start": (
        type("Mine", (MLP,), {"start_at": lambda self, output: self.layers[-1].bias.data.copy_(-output)}),
        "start_at must put the outputs around those given, or do nothing",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_broken_network_is_caught(name):
    make, message = NETWORKS[name]
    with pytest.raises(ContractError, match=message) as caught:
        testing.check_network(make)
    assert "\n" not in str(caught.value)


def test_dropout_is_no_fault():
    testing.check_network(Dropout)


def objective(value):
    return type("Mine", (Objective,), {"__call__": lambda self, model, guide, x: value(model, guide, x)})()


def with_backward(model, guide, x):
    (loss := -log_weights(model, guide, x, 1).mean()).backward(retain_graph=True)
    return loss


OBJECTIVES = {
    "a class": (ELBO, r"takes an instance, such as ELBO\(\)"),
    "sign": (objective(lambda *a: log_weights(*a, 1).mean()), "no lower bound|must be a loss, minus a bound"),
    "sum": (objective(lambda *a: -log_weights(*a, 1).sum()), "must average over the batch"),
    "shape": (
        objective(lambda *a: -log_weights(*a, 1).mean(0)),
        r"a tensor of shape \(\), it returned shape \(2000,\)",
    ),
    "number": (objective(lambda *a: -log_weights(*a, 1).mean().item()), "it returned a float"),
    "no gradient": (objective(lambda *a: -log_weights(*a, 1).mean().detach()), "the loss has no gradient"),
    "not finite": (objective(lambda *a: -log_weights(*a, 1).mean() / 0), "must be finite"),
    "backward": (objective(with_backward), "must leave the gradients of parameters alone"),
    "another gradient": (
        objective(lambda *a: 2 * (loss := -log_weights(*a, 1).mean()).detach() - loss),
        "a small step against its gradient makes the loss larger",
    ),
    "no bound": (
        objective(lambda *a: -log_weights(*a, 1).mean() - 0.5),
        r"is no lower bound: where log p\(x\) is -2\.6.*\(pass bound=False if it is meant\)",
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_broken_objective_is_caught(name):
    broken, message = OBJECTIVES[name]
    with pytest.raises(ContractError, match=message) as caught:
        testing.check_objective(broken)
    assert "\n" not in str(caught.value)


def test_what_is_meant_as_no_bound_passes():
    testing.check_objective(OBJECTIVES["no bound"][0], bound=False)


def test_checks_leave_random_numbers_and_what_they_check_alone():
    state = torch.get_rng_state()
    mine = ELBO()
    testing.check_objective(mine)
    testing.check_posterior(MeanField)
    assert torch.equal(torch.get_rng_state(), state)


class Cauchy(Likelihood):
    is_density, off = True, 0.0

    def forward(self, loc):
        made = dist.Cauchy(loc, torch.full_like(loc, 0.1)).to_event(1)
        return Shifted(made, self.off) if self.off else made


class Shifted(dist.Independent):
    def __init__(self, made, off):
        super().__init__(made.base_dist, 1)
        self.off = off

    def log_prob(self, value):
        return super().log_prob(value) - self.off


class FaultyCauchy(Cauchy):
    off = 0.2


def test_a_density_without_moments_integrates_to_one():
    testing.check_likelihood(Cauchy)
    with pytest.raises(ContractError, match="must integrate to one"):
        testing.check_likelihood(FaultyCauchy)
