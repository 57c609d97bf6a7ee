"""Programs with neural networks: variational autoencoders and their kin, flows, Gaussian processes."""

from functools import partial
from itertools import pairwise

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import (
    affine_autoregressive,
    affine_coupling,
    block_autoregressive,
    conditional_spline,
    spline_autoregressive,
    spline_coupling,
)
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import one_hot, softplus

from pyro_programs import Program, adam, call, linear_data, same


def images(num_images: int, num_pixels: int = 8) -> torch.Tensor:
    return torch.bernoulli(torch.rand(num_images, 1).expand(num_images, num_pixels))


def mlp(*sizes: int, last: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*layers[:-1], *last)


class VAE(nn.Module):
    """The textbook's, with model and guide as methods of one module."""

    def __init__(self, num_pixels=8, num_latent=2):
        super().__init__()
        self.num_latent = num_latent
        self.encoder = mlp(num_pixels, 6, 2 * num_latent)
        self.decoder = mlp(num_latent, 6, num_pixels)

    def prior(self, x):
        return dist.Normal(x.new_zeros(len(x), self.num_latent), x.new_ones(len(x), self.num_latent)).to_event(1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", self.prior(x))
            logits = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)
            return logits

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(loc, scale.exp()).to_event(1))


def vae():
    """Batches of an epoch, the last one smaller."""
    made = VAE()
    return Program(made.model, made.guide, Trace_ELBO, [call(x) for x in images(10).split(4)])


def vae_float32():
    made = VAE()
    return Program(made.model, made.guide, TraceMeanField_ELBO, [call(x) for x in images(8).split(4)])


def vae_flow_prior():
    """A prior that is a flow, whose module is registered by the model."""

    class FlowPrior(VAE):
        def __init__(self):
            super().__init__()
            self.flow = nn.ModuleList([affine_coupling(2, hidden_dims=[4]), affine_coupling(2, hidden_dims=[4])])

        def prior(self, x):
            pyro.module("flow", self.flow)
            swapped = dist.transforms.Permute(torch.tensor([1, 0]))
            return dist.TransformedDistribution(super().prior(x), [self.flow[0], swapped, self.flow[1]])

    made = FlowPrior()
    return Program(made.model, made.guide, Trace_ELBO, same(images(4)))


def conditional_vae():
    """Parts of an image given others: what is masked is -1, and only that is scored."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.baseline = mlp(8, 6, 8)
            self.prior = mlp(16, 6, 4)
            self.recognition = mlp(16, 6, 4)
            self.generation = mlp(2, 6, 8)

        def model(self, xs, ys=None):
            pyro.module("generation", self)
            with pyro.plate("data", len(xs)):
                with torch.no_grad():
                    guess = self.baseline(xs).sigmoid()
                loc, scale = self.prior(torch.cat([xs, guess], -1)).chunk(2, -1)
                zs = pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))
                logits = self.generation(zs)
                if ys is None:
                    pyro.deterministic("y", logits.sigmoid().detach())
                else:
                    hidden = xs == -1
                    pixels = dist.Bernoulli(logits=logits[hidden], validate_args=False)
                    pyro.sample("y", pixels.to_event(1), obs=ys[hidden])
                return logits

        def guide(self, xs, ys=None):
            with pyro.plate("data", len(xs)):
                if ys is None:
                    loc, scale = self.prior(torch.cat([xs, self.baseline(xs).sigmoid()], -1)).chunk(2, -1)
                else:
                    loc, scale = self.recognition(torch.cat([xs, ys], -1)).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    made = Conditional()
    ys = images(4)
    xs = ys.clone()
    xs[:, 4:] = -1
    return Program(made.model, made.guide, Trace_ELBO, same(xs, ys), predict=False)


class SemiSupervised(nn.Module):
    """A digit's class is observed or enumerated."""

    def __init__(self):
        super().__init__()
        self.classify = mlp(8, 6, 3, last=(nn.Softmax(dim=-1),))
        self.encode = mlp(8 + 3, 6, 4)
        self.decode = mlp(2 + 3, 6, 8, last=(nn.Sigmoid(),))

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", xs.size(0)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(xs.size(0), 2), 1.0).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(xs.size(0), 3) / 3.0), obs=ys)
            zs = zs.expand(*ys.shape[:-1], -1)
            loc = self.decode(torch.cat([zs, ys], -1))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)
            return loc

    def guide(self, xs, ys=None):
        with pyro.plate("data", xs.size(0)):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.classify(xs)))
            xs = xs.expand(*ys.shape[:-1], -1)
            loc, scale = self.encode(torch.cat([xs, ys], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def model_classify(self, xs, ys=None):
        """An auxiliary loss, by which the classifier learns from what is labelled."""
        pyro.module("ss_vae", self)
        with pyro.plate("data", xs.size(0)):
            if ys is not None:
                with poutine.scale(scale=46.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(self.classify(xs)), obs=ys)

    def guide_classify(self, xs, ys=None):
        pass


def semi_supervised_vae():
    """Labelled and unlabelled batches in turns; the class is enumerated in parallel where it is not given."""
    made = SemiSupervised()
    guide = config_enumerate(made.guide, "parallel", expand=True)
    labels = one_hot(torch.arange(4) % 3, 3).to(torch.get_default_dtype())
    calls = [call(images(4), labels), call(images(4)), call(images(4))]
    loss = partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False)
    return Program(made.model, guide, loss, calls, predict=False)


def auxiliary_classifier():
    """No latent site: a guide that does nothing."""
    made = SemiSupervised()
    labels = one_hot(torch.arange(4) % 3, 3).to(torch.get_default_dtype())
    return Program(made.model_classify, made.guide_classify, Trace_ELBO, same(images(4), labels))


def topics():
    """Topics by a network with batch normalization and dropout; counts, of which the largest total is read."""

    class Topics(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Softplus(), nn.Dropout(0.3))
            self.loc = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False))
            self.scale = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False))
            self.beta = nn.Linear(3, 8, bias=False)
            self.normal = nn.BatchNorm1d(8, affine=False)
            self.drop = nn.Dropout(0.2)

        def model(self, docs):
            pyro.module("decoder", self)
            with pyro.plate("documents", docs.shape[0]):
                logtheta = pyro.sample("logtheta", dist.Normal(docs.new_zeros((len(docs), 3)), 1.0).to_event(1))
                theta = nn.functional.softmax(logtheta, -1)
                words = nn.functional.softmax(self.normal(self.beta(self.drop(theta))), dim=1)
                total = int(docs.sum(-1).max())
                pyro.sample("obs", dist.Multinomial(total, words), obs=docs)

        def guide(self, docs):
            pyro.module("encoder", self)
            with pyro.plate("documents", docs.shape[0]):
                hidden = self.encoder(docs)
                loc, scale = self.loc(hidden), (0.5 * self.scale(hidden)).exp()
                pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))

    made = Topics().train()
    docs = torch.poisson(torch.full((8, 8), 2.0))
    return Program(made.model, made.guide, TraceMeanField_ELBO, [call(docs[:4]), call(docs[4:])])


def auto_delta_network():
    """A classifier's weights at the maximum of their posterior, after ``one_hot`` of an integer argument."""

    def model(x, y, group):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        shift = one_hot(torch.tensor(group), 4).to(x.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w + shift), obs=y)

    x, _ = linear_data()
    return Program(model, AutoDelta(model), Trace_ELBO, [call(x, torch.arange(16) % 4, g) for g in (0, 1)])


def flow_likelihood():
    """Maximum likelihood of spline flows, one of them given a context; there is no latent site."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    marginal = spline_coupling(2, count_bins=3, hidden_dims=[4])
    given = conditional_spline(1, context_dim=2, hidden_dims=[4], count_bins=3)

    def model(x, y):
        pyro.module("marginal", marginal)
        pyro.module("given", given)
        flow = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), [given])
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [marginal]), obs=x)
            pyro.sample("y", flow.condition(x), obs=y)

    def guide(x, y):
        pass

    x = torch.randn(6, 2)
    calls = same(x, x.sum(-1, keepdim=True))
    told = "inductor cannot compile"  # splines choose by masks
    return Program(
        model, guide, Trace_ELBO, calls, before=lambda step: marginal.clear_cache(), told=told, predict=False
    )


def flow_guide():
    """A guide by hand that is a chain of flows: affine, block and spline autoregressive, with their caches."""
    flows = [
        affine_autoregressive(2, hidden_dims=[4]),
        block_autoregressive(2, hidden_factors=[2]),
        spline_autoregressive(2, hidden_dims=[4], count_bins=3),
    ]

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z[0] * z[1].exp(), 1.0), obs=x)

    def guide(x):
        pyro.module("flows", nn.ModuleList(flows))
        base = dist.Normal(torch.zeros(2), pyro.param("width", torch.ones(2), constraint=constraints.positive))
        pyro.sample("z", dist.TransformedDistribution(base.to_event(1), flows))

    return Program(model, guide, Trace_ELBO, same(torch.randn(5)))


def sparse_gamma():
    """A deep exponential family: gammas in the guide, whose constrained parameters are one a site."""

    def model(x):
        data = pyro.plate("data", len(x))
        with data:
            top = pyro.sample("top", dist.Gamma(torch.full((2,), 0.5), 0.3).to_event(1))
        weights = pyro.sample("weights", dist.Gamma(torch.full((2, 8), 0.5), 0.5).to_event(2))
        with data:
            pyro.sample("x", dist.Poisson(top @ weights + 1e-3).to_event(1), obs=x)

    def gamma(name, *shape):
        alpha = softplus(pyro.param(f"alpha_{name}", lambda: torch.rand(shape) + 0.5))
        mean = softplus(pyro.param(f"mean_{name}", lambda: torch.rand(shape)))
        return dist.Gamma(alpha, alpha / mean)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("top", gamma("top", len(x), 2).to_event(1))
        pyro.sample("weights", gamma("weights", 2, 8).to_event(2))

    optim = partial(pyro.optim.AdagradRMSProp, {"eta": 0.5, "t": 0.1})
    return Program(model, guide, Trace_ELBO, same(torch.poisson(torch.full((4, 8), 2.0))), optim)


def sparse_gaussian_process():
    """SVGP in mini-batches, which are given by ``set_data`` before each step."""
    x = torch.rand(12)
    y = (6 * x).sin() + 0.1 * torch.randn(12)
    kernel = gp.kernels.RBF(input_dim=1)
    made = gp.models.VariationalSparseGP(x, y, kernel, torch.linspace(0, 1, 4), gp.likelihoods.Gaussian(), whiten=True)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]

    def before(step):
        made.set_data(*batches[step % 2])

    return Program(made.model, made.guide, TraceMeanField_ELBO, same(), predict=False, before=before)


def gaussian_process_regression():
    """An exact process with priors over the kernel's parameters and a guide that is a point."""
    x = torch.rand(8)
    y = (6 * x).sin() + 0.1 * torch.randn(8)
    made = gp.models.GPRegression(x, y, gp.kernels.RBF(input_dim=1), noise=torch.tensor(0.1))
    made.kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    made.kernel.variance = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    made.kernel.autoguide("lengthscale", dist.Delta)
    return Program(made.model, made.guide, Trace_ELBO, same(), predict=False)


def latent_process():
    """GPLVM: the inputs of the process are latent."""
    y = torch.randn(2, 6)
    kernel = gp.kernels.Matern32(input_dim=1, lengthscale=torch.ones(1))
    made = gp.models.SparseGPRegression(torch.zeros(6, 1), y, kernel, torch.randn(3, 1), jitter=1e-4)
    made.X = pyro.nn.PyroSample(dist.Normal(torch.zeros(6, 1), 0.1).to_event())
    made.autoguide("X", dist.Normal)
    return Program(made.model, made.guide, TraceMeanField_ELBO, same(), adam(lr=0.01), predict=False)


def amortized_regression():
    """A guide that calls the very network of the model, frozen in part."""
    network = mlp(3, 4, 2)
    network[0].bias.requires_grad_(False)

    def model(x, y):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(network(x)[:, 0], 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(x, y):
        pyro.module("network", network)
        scale = pyro.param("scale", torch.tensor(0.3), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y + network(x)[:, 1], scale))

    return Program(model, guide, Trace_ELBO, same(*linear_data(6)))


PROGRAMS = (
    vae,
    vae_float32,
    vae_flow_prior,
    conditional_vae,
    semi_supervised_vae,
    auxiliary_classifier,
    topics,
    auto_delta_network,
    flow_likelihood,
    flow_guide,
    sparse_gamma,
    sparse_gaussian_process,
    gaussian_process_regression,
    latent_process,
    amortized_regression,
)
