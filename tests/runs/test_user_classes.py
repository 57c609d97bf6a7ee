"""A user's own classes: any that keeps the contract works by its import path, one that breaks it is refused by name."""

import json

import pyro.distributions as dist
import pytest
import torch
import yaml
from torch.distributions import Normal

from pyro_vae import (
    ELBO,
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    ContractError,
    Likelihood,
    Network,
    Posterior,
    Prior,
    StandardNormal,
    check_program,
    cli,
    log_weights,
    runs,
)
from pyro_vae.data.fetched import Digits

pytestmark = pytest.mark.slow

QUICK = [
    "--dataset=Digits",
    "--epochs=1",
    "--evidence.num_samples=25",
    "--latent_dim=3",
    "--evidence.annealed_images=4",
    "--evidence.annealing.num_temperatures=4",
    "--evidence.annealing.num_checked=0",
]


class Horseshoe(Prior):
    def __init__(self, latent_dim: int, scale: float = 1.0):
        """A user's prior.

        Args:
            latent_dim: number of latent dimensions.
            scale: of the tails, positive.
        """
        super().__init__(latent_dim)
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)
        self.scale = scale

    def forward(self, posterior=None):
        return dist.StudentT(self.zero + 1.0, self.zero, self.zero + self.scale).to_event(1)


class Halves(Likelihood):
    """Binary pixels, with a temperature."""

    encoding = "binary"

    def __init__(self, event_size: int, temperature: float = 1.0):
        super().__init__(event_size)
        self.temperature = temperature

    def forward(self, logits):
        return dist.Bernoulli(logits=logits / self.temperature).to_event(1)


class Shifted(Posterior):
    """A Laplace posterior."""

    def __init__(self, latent_dim: int, least: float = 0.01):
        super().__init__(latent_dim)
        self.sizes = (latent_dim, latent_dim)
        self.least = least

    def forward(self, loc, log_scale):
        return dist.Laplace(loc, log_scale.exp() + self.least).to_event(1)


class Narrow(Network):
    """One hidden layer."""

    def __init__(self, in_features: int, out_features: int, width: int = 5, image_shape=None):
        super().__init__(in_features, out_features)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(in_features, width), torch.nn.ReLU(), torch.nn.Linear(width, out_features)
        )

    def forward(self, features):
        return self.layers(features)


class FewDigits(Digits):
    """The first digits only."""

    def __init__(self, data_dir, size: int = 300, **kwargs):
        super().__init__(data_dir, **kwargs)
        self.size = size

    def read(self):
        images = super().read()
        return images._replace(train=images.train[: self.size], train_labels=images.train_labels[: self.size])


OWN = {
    "prior": ("Horseshoe", "scale", 0.1),
    "likelihood": ("Halves", "temperature", 2.0),
    "posterior": ("Shifted", "least", 0.2),
    "encoder": ("Narrow", "width", 7),
    "decoder": ("Narrow", "width", 6),
    "dataset": ("FewDigits", "size", 400),
}
ARGV = [
    argument
    for option, (name, setting, value) in OWN.items()
    for argument in (f"--{option}={__name__}.{name}", f"--{option}.{setting}={value}")
]


def test_own_classes_of_every_kind_run_and_load_and_round_trip(tmp_path, capsys):
    argv = [*ARGV, *QUICK[1:]]
    cli.train([*argv, f"--run_dir={tmp_path / 'a'}"])
    saved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    for option, (name, setting, value) in OWN.items():
        assert saved[option]["class_path"] == f"{__name__}.{name}"
        assert saved[option]["init_args"][setting] == value
    vae = runs.load_model(tmp_path / "a")
    parts = {
        "prior": vae.prior,
        "likelihood": vae.likelihood.head,
        "posterior": vae.posterior.head,
        "encoder": vae.posterior.network,
        "decoder": vae.likelihood.network,
    }
    for option, part in parts.items():
        assert type(part).__name__ == OWN[option][0]
    assert (vae.prior.scale, vae.likelihood.head.temperature, vae.posterior.head.least) == (0.1, 2.0, 0.2)
    assert vae.posterior.network.layers[0].out_features == 7

    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.train([*argv, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    for name, file in {"b": tmp_path / "a" / "config.yaml", "c": tmp_path / "printed.yaml"}.items():
        cli.train([f"--config={file}", f"--run_dir={tmp_path / name}"])
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "abc"]
    assert results[0]["test_elbo"] == results[1]["test_elbo"] == results[2]["test_elbo"]
    assert results[0]["dataset"] == "FewDigits"
    assert results[0]["unit"] == "nats per image, mass"


def test_help_of_an_own_class_explains_its_arguments(capsys):
    with pytest.raises(SystemExit):
        cli.train([f"--prior.help={__name__}.Horseshoe"])
    assert "of the tails, positive." in capsys.readouterr().out


def test_what_an_own_class_refuses_is_one_line(tmp_path):
    with pytest.raises(runs.RunError, match=r"^--prior: scale must be positive, got -1.0$"):
        cli.train([*QUICK, f"--prior={__name__}.Horseshoe", "--prior.scale=-1", f"--run_dir={tmp_path / 'a'}"])


class ReturnsTensor(Prior):
    def forward(self, posterior=None):
        return torch.zeros(self.latent_dim)


class ReturnsTorch(Prior):
    def forward(self, posterior=None):
        return Normal(torch.zeros(self.latent_dim), 1.0)


class ForgetsEvent(Prior):
    def forward(self, posterior=None):
        return dist.Normal(torch.zeros(self.latent_dim), 1.0)


class WrongSize(Prior):
    def forward(self, posterior=None):
        return dist.Normal(torch.zeros(self.latent_dim + 1), 1.0).to_event(1)


class Bits(Prior):
    def forward(self, posterior=None):
        return dist.Bernoulli(torch.full((self.latent_dim,), 0.5)).to_event(1)


class Positive(Posterior):
    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim, latent_dim)

    def forward(self, loc, log_scale):
        return dist.LogNormal(loc, log_scale.exp()).to_event(1)


class NoSizes(Posterior):
    def forward(self, loc):
        return dist.Normal(loc, 1.0).to_event(1)


class Counts(Posterior):
    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim,)

    def forward(self, log_rate):
        return dist.Poisson(log_rate.exp()).to_event(1)


class CountsPrior(Prior):
    def forward(self, posterior=None):
        return dist.Poisson(torch.ones(self.latent_dim)).to_event(1)


class MixesImages(Likelihood):
    def forward(self, logits):
        return dist.Bernoulli(logits=logits.mean(0)).to_event(1)


class WrongSupport(Likelihood):
    encoding = "binary"

    def forward(self, raw):
        return dist.LogNormal(raw, 1.0).to_event(1)


class NoUnit(Likelihood):
    def forward(self, raw):
        return dist.Normal(raw, 1.0).to_event(1)


class Ones(Likelihood):
    """A density of positive pixels; the data have zeros."""

    is_density = True

    def forward(self, raw):
        return dist.LogNormal(raw, 1.0).to_event(1)


class NoArgument(Prior):
    def forward(self):
        return dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)


class NoSuper(Prior):
    def __init__(self, latent_dim: int):
        torch.nn.Module.__init__(self)

    def forward(self, posterior=None):
        return dist.Normal(torch.zeros(3), 1.0).to_event(1)


class WrongInside(Network):
    def __init__(self, in_features: int, out_features: int, image_shape=None):
        super().__init__(in_features, out_features)
        self.layer = torch.nn.Linear(in_features + 1, out_features)

    def forward(self, features):
        return self.layer(features)


class Tuple(Digits):
    def read(self):
        return tuple(super().read()[:3])


class Flattens(Network):
    def forward(self, features):
        return features.flatten().new_zeros(self.out_features)


BROKEN = {
    ("prior", "ReturnsTensor"): "ReturnsTensor must return a distribution of pyro.distributions, it made Tensor",
    ("prior", "ReturnsTorch"): "ReturnsTorch must return a distribution of pyro.distributions, it made Normal",
    ("prior", "ForgetsEvent"): (
        "ForgetsEvent must return batch shape () and event shape (3,), it made Normal of (3,) and (); add .to_event(1)"
    ),
    (
        "prior",
        "WrongSize",
    ): "WrongSize must return batch shape () and event shape (3,), it made Independent of () and (4,)",
    ("prior", "Bits"): "a posterior over the reals, Independent, cannot serve a prior with the discrete support",
    ("posterior", "Positive"): "at site 'z' the model draws from Independent",
    ("posterior", "NoSizes"): "NoSizes must set self.sizes",
    ("likelihood", "MixesImages"): "MixesImages must return batch shape (2, ",
    ("likelihood", "WrongSupport"): "WrongSupport says is_density = False, but its log p(x) is a density, on ",
    ("likelihood", "NoUnit"): "NoUnit says is_density = False, but its log p(x) is a density",
    ("likelihood", "Ones"): "observations of site 'x' lie outside the support of Independent",
    ("prior", "NoArgument"): "TypeError: NoArgument.forward() takes 1 positional argument but 2 were given (",
    ("prior", "NoSuper"): "AttributeError: 'NoSuper' object has no attribute",
    ("decoder", "WrongInside"): "mat1 and mat2 shapes cannot be multiplied",
    ("dataset", "Tuple"): "Tuple.read must return Images(...), it made tuple",
    ("encoder", "Flattens"): "Flattens must map (",
}


@pytest.mark.parametrize(("option", "name"), list(BROKEN))
def test_a_class_that_breaks_the_contract_is_refused_in_one_line(tmp_path, option, name):
    with pytest.raises(runs.RunError) as caught:
        cli.train([*QUICK, f"--{option}={__name__}.{name}", f"--run_dir={tmp_path / 'run'}"])
    assert BROKEN[option, name] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def vae_of(prior, posterior):
    head = posterior(2)
    return VAE(prior, Conditional(MLP(2, 6), Bernoulli(6)), Conditional(MLP(6, sum(head.sizes)), head))


def test_a_pathwise_bound_refuses_draws_without_gradient():
    vae, x = vae_of(CountsPrior(2), Counts), torch.ones(4, 6)
    check_program(vae.model, vae.guide, x)
    with torch.no_grad():
        assert log_weights(vae.model, vae.guide, x, 3).isfinite().all()  # it can be scored
    with pytest.raises(ContractError, match="guide site 'z' draws from Poisson, whose draws have no gradient"):
        ELBO()(vae.model, vae.guide, x)


@pytest.mark.parametrize("engine", ["pyro", "compiled"])
def test_such_a_bound_is_refused_before_anything_is_written(tmp_path, engine):
    argv = f"--dataset Digits --objective DReG --prior {__name__}.CountsPrior --posterior {__name__}.Counts"
    with pytest.raises(runs.RunError, match=r"^--objective DReG: guide site 'z' draws from Poisson, .*TVO") as caught:
        cli.train([*argv.split(), f"--engine={engine}", f"--run_dir={tmp_path / 'run'}"])
    assert "--engine compiled" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    argv = "--dataset Digits --objective ELBO --objective.kl analytic --prior StudentT"
    with pytest.raises(runs.RunError, match=r"from Normal to StudentT at site 'z': take --objective.kl sampled"):
        cli.train([*argv.split(), f"--run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_vamp_prior_needs_the_mean_that_a_flow_has_not(tmp_path):
    argv = "--dataset Digits --model TwoLayerVAE --prior VampPrior --prior.components 5 --posterior Flow"
    with pytest.raises(runs.RunError, match=r"takes the mean of q\(z1 \| x\), which FlowDistribution has not: choose"):
        cli.train([*argv.split(), f"--run_dir={tmp_path / 'run'}"])


def test_a_posterior_with_the_priors_own_support_is_left_alone():
    class PositivePrior(Prior):
        def forward(self, posterior=None):
            return dist.Exponential(torch.ones(self.latent_dim)).to_event(1)

    vae, x = vae_of(PositivePrior(2), Positive), torch.ones(4, 6)
    check_program(vae.model, vae.guide, x)
    torch.manual_seed(0)
    log_w = log_weights(vae.model, vae.guide, x, 3)
    torch.manual_seed(0)
    q = vae.posterior(x).expand((3, 4))
    z = q.rsample()
    by_hand = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - q.log_prob(z)
    torch.testing.assert_close(log_w, by_hand)


def test_a_posterior_narrower_than_the_prior_is_refused():
    vae = vae_of(StandardNormal(2), Positive)
    torch.manual_seed(0)
    with pytest.raises(ContractError, match=r"the model draws from \w+ on .*, outside the support of Independent"):
        check_program(vae.model, vae.guide, torch.ones(50, 6))
