"""Deep hierarchies: VAEs of several levels of latent variables, inferred from below, from above, or both."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import ContractError, check_at_least_one, check_choice, check_widths
from pyro_vae.parts.conditional import Conditional, check_made, num_outputs
from pyro_vae.parts.inputs import Inputs
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.missing import Incomplete, of_seen, without_gaps
from pyro_vae.parts.networks import MLP, Activation, Network
from pyro_vae.parts.posteriors import MeanField, Posterior
from pyro_vae.parts.priors import Prior
from pyro_vae.parts.residual import Residual
from pyro_vae.parts.wiring import beside, encoded, initialize_prior, into_support_of, mean_of, scored

__all__ = ["HierarchicalVAE", "Level", "residual_levels"]

Inference = Literal["top_down", "precision_weighted", "bottom_up"]


class Level(nn.Module):
    """One level of a :class:`HierarchicalVAE`: how z_l is drawn, how it is inferred, and what passes it either way.

    Args:
        posterior: the head of q(z_l | x, ..), and a network that reads d_l, and after it h_l if there is one.
        prior: p(z_l | h_l), a network with a posterior's head; None at the top, whose prior is that of the model.
        up: d_(l-1) -> d_l, where d_0 is x; None: d_l = d_(l-1).
        down: (h_l, z_l), one after the other, -> h_(l-1); None: h_(l-1) = z_l.

    Raises:
        TypeError: if ``up`` or ``down`` is not a ``Network``.
    """

    def __init__(
        self,
        posterior: Conditional[Posterior],
        prior: Conditional[Posterior] | None = None,
        up: Network | None = None,
        down: Network | None = None,
    ):
        super().__init__()
        for way, network in (("up", up), ("down", down)):
            if not (network is None or isinstance(network, Network)):
                raise TypeError(f"{way}: {type(network).__name__} is no pyro_vae.Network: make it a subclass")
        self.posterior, self.prior, self.up, self.down = posterior, prior, up, down
        self.inputs = None if up is None else Inputs(up.in_features)

    @property
    def latent_dim(self) -> int:
        """Dimensions of z_l."""
        return self.posterior.latent_dim

    @property
    def network(self) -> Network:
        """What reads what comes from below."""
        return self.posterior.network if self.up is None else self.up

    def above(self, d: Tensor) -> Tensor:
        """d_l of d_(l-1)."""
        return d if self.up is None else self.up(cast(Inputs, self.inputs)(d))

    def below(self, h: Tensor | None, z: Tensor) -> Tensor:
        """h_(l-1) of h_l and z_l."""
        return z if self.down is None else self.down(z if h is None else beside(h, z))


class HierarchicalVAE(nn.Module):
    """A VAE of L levels, z_L -> .. -> z_1 -> x, with states that pass them: h_l on the way down, d_l on the way up.

        p(x, z) = prior(z_L) prod_(l < L) p(z_l | h_l) likelihood(x | h_0),     h_(l-1) = down_l(h_l, z_l)
        q(z | x) = prod_l q(z_l | ..),                                          d_l = up_l(d_(l-1)),  d_0 = x

    ``model`` and ``guide`` are ordinary Pyro programs over a batch of flat observations, with one plate ``"data"`` and
    the sites ``"z1"`` .. ``"zL"`` and ``"x"``; missing values are those of a :class:`pyro_vae.VAE`. The ways of
    inference differ in what q(z_l | ..) sees:

    - ``top_down``: d_l and h_l, which is that of the model, made by the same networks (Child 2021, "Very deep VAEs",
      arXiv 2011.10650, section 3; without shared states, Maaloe et al. 2019). Each level knows what those above it have
      said already.
    - ``precision_weighted``: d_l alone, whose Gaussian is multiplied by p(z_l | h_l): precisions add up, and means are
      weighed by them (Sonderby et al. 2016, "Ladder variational autoencoders", arXiv 1602.02282, equations 17-19).
    - ``bottom_up``: d_l = up_l(z_(l-1)), drawn from below as the model is from above (Burda et al. 2016, section 5);
      with two levels, and neither ``up`` nor ``down``, it is a :class:`pyro_vae.TwoLayerVAE`.

    A prior that asks for q(z_L | x), as the VampPrior does, is given that of the top level; from below, by way of the
    means E[z_l | ..]. Where the prior's support is not the whole space, the top posterior is mapped into it.

    Args:
        prior: p(z_L).
        levels: from the one next to x up to the top, at least two.
        likelihood: p(x | h_0), the decoder and its head.
        inference: see above.

    Raises:
        ValueError: if there are fewer than two levels, or their sizes disagree.

    >>> from pyro_vae import Bernoulli, StandardNormal
    >>> levels = residual_levels(MLP(784, 64), latent_dims=(16, 8, 4), widths=(64,))
    >>> vae = HierarchicalVAE(StandardNormal(4), levels, Conditional(MLP(64, 784), Bernoulli(784)))
    >>> vae.guide(torch.zeros(3, 784)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        prior: Prior,
        levels: Sequence[Level],
        likelihood: Conditional[Likelihood],
        inference: Inference = "top_down",
    ):
        super().__init__()
        check_choice("inference", inference, get_args(Inference))
        if len(levels) < 2:
            raise ValueError(f"a hierarchy has at least two levels, got {len(levels)}: with one it is a VAE")
        self.prior = prior
        self.levels = nn.ModuleList(levels)
        self.likelihood = likelihood
        self.inference: Inference = inference
        _check_sizes(self)

    @property
    def posterior(self) -> Conditional[Posterior]:
        """That of the lowest level."""
        return self._levels()[0].posterior

    def model(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z1, .., zL) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        x, seen = scored(x, seen, self._reader, self.likelihood)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            h = None
            for number, level in self._downwards():
                prior = self._prior() if h is None else cast(Any, level.prior)(h)
                h = level.below(h, pyro.sample(f"z{number}", prior))
            return pyro.sample("x", of_seen(self.likelihood(h), seen, self.likelihood.head), obs=x)

    def guide(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(z1, .., zL | x) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``; returns z_L."""
        x = encoded(x, seen, self._reader, self.likelihood.head.event_size)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return self._from_below(x) if self.inference == "bottom_up" else self._from_above(x)

    def _from_below(self, x: Tensor) -> Tensor:
        z = x
        for number, level in enumerate(self._levels(), 1):
            posterior = level.posterior(level.above(z))
            if number == len(self.levels):
                posterior = into_support_of(posterior, self.prior, self._prior)
            z = pyro.sample(f"z{number}", posterior)
        return z

    def _from_above(self, x: Tensor) -> Tensor:
        states, h, top = self._states(x), None, x
        for number, level in self._downwards():
            d = states[number - 1]
            if h is None:
                top = z = pyro.sample(f"z{number}", into_support_of(level.posterior(d), self.prior, self._prior))
            elif self.inference == "top_down":
                z = pyro.sample(f"z{number}", level.posterior(beside(d, h)))
            else:
                z = pyro.sample(f"z{number}", _product(level.posterior(d), cast(Any, level.prior)(h)))
            if number > 1:
                h = level.below(h, z)
        return top

    def initialize(self, x: Tensor) -> None:
        """Start every part from training images ``x``, shape ``(N, X)``. Call once, before making the optimizer."""
        bottom = self._levels()[0]
        if bottom.up is None:
            bottom.posterior.initialize(x, self.likelihood.head)
        else:
            inputs = cast(Inputs, bottom.inputs)
            inputs.initialize(without_gaps(x), self.likelihood.head)
            bottom.up.initialize(inputs.first(x) if isinstance(bottom.up, Incomplete) else x)
        self.likelihood.initialize(x)
        initialize_prior(self.prior, x, self._reader)

    def _levels(self) -> list[Level]:
        return cast(list[Level], list(self.levels))

    def _downwards(self) -> Iterator[tuple[int, Level]]:
        """The levels with their numbers, from L to 1."""
        return reversed(list(enumerate(self._levels(), 1)))

    @property
    def _reader(self) -> Any:
        """What reads x: it has a network, and inputs that standardize what that sees."""
        bottom = self._levels()[0]
        return bottom.posterior if bottom.up is None else bottom

    def _states(self, x: Tensor) -> list[Tensor]:
        """d_1 .. d_L."""
        states = [x]
        for level in self._levels():
            states.append(level.above(states[-1]))
        return states[1:]

    def _prior(self) -> dist.TorchDistribution:
        return check_made(self.prior, self.prior(self._top_posterior), (), self.prior.latent_dim)

    def _top_posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z_L | x)."""
        top = self._levels()[-1]
        if self.inference != "bottom_up":
            return top.posterior(self._states(x)[-1])
        for level in self._levels()[:-1]:
            x = mean_of(level.posterior(level.above(x)))
        return top.posterior(top.above(x))


def residual_levels(
    encoder: Network,
    latent_dims: Sequence[int] = (32, 16, 8),
    widths: Sequence[int] = (200,),
    blocks: int = 1,
    inference: Inference = "top_down",
    posterior: Callable[[int], Posterior] = MeanField,
    activation: Activation = "silu",
) -> list[Level]:
    """Levels for :class:`HierarchicalVAE` whose ways up and down are :class:`.Residual` blocks.

    Each block starts 1 / sqrt(blocks in all) as large, and each p(z_l | h_l), Gaussian, as N(0, I) (Child 2021).

    Args:
        encoder: x -> d_1, of as many outputs as the first width.
        latent_dims: dimensions of z_1 .. z_L, at least two of at least 1.
        widths: of the states d_l and h_(l-1) that pass level l, one for each level, or one for all.
        blocks: of each level on either way, at least 1.
        inference: that of the model.
        posterior: makes the head of each q(z_l | ..).
        activation: of all networks but the encoder.

    Raises:
        ValueError: if numbers are out of range or disagree.
    """
    widths = check_levels("latent_dims", latent_dims, "widths", widths)
    check_at_least_one(blocks=blocks)
    depth, levels = blocks * len(widths), []
    for number, (dim, width) in enumerate(zip(latent_dims, widths, strict=True)):
        is_top, from_below = number == len(widths) - 1, inference == "bottom_up"
        state = 0 if is_top else widths[number + 1]
        read = latent_dims[number - 1] if from_below else widths[number - 1]
        up = encoder if number == 0 else Residual(read, width, blocks, depth=depth, activation=activation)
        down = Residual(state + dim, width, blocks, depth=depth, activation=activation)
        head, seen = posterior(dim), width + state if inference == "top_down" else width
        q = Conditional(MLP(seen, num_outputs(head), [width]), head)
        p = None if is_top else Conditional(MLP(state, 2 * dim, [width]), MeanField(dim))
        for each, share in ((q, depth**-0.5), (p, 0.0)):  # log scales that grow with states would make them explode
            if each is not None:
                cast(MLP, each.network).layers[-1].get_parameter("weight").data.mul_(share)
        levels.append(Level(q, p, up, down))
    return levels


def check_levels(dims_name: str, dims: Sequence[int], widths_name: str, widths: Sequence[int]) -> list[int]:
    """A width for each level, from one for each, or one for all.

    Raises:
        ValueError: naming what is wrong.
    """
    check_widths(dims_name, dims)
    check_widths(widths_name, widths)
    if len(dims) < 2:
        raise ValueError(f"{dims_name}: a hierarchy has at least two levels, got {list(dims)}: with one it is a VAE")
    if len(widths) not in (1, len(dims)):
        raise ValueError(
            f"{widths_name} must be one for each of the {len(dims)} levels of {dims_name}, or one for all, got "
            f"{list(widths)}"
        )
    return list(widths) * (len(dims) if len(widths) == 1 else 1)


def _product(first: dist.TorchDistribution, second: dist.TorchDistribution) -> dist.TorchDistribution:
    """The normal proportional to the product of two factorized ones (Sonderby et al. 2016, equations 17-19)."""
    q, p = (made.base_dist if isinstance(made, dist.Independent) else made for made in (first, second))
    if not (isinstance(q, dist.Normal) and isinstance(p, dist.Normal)):
        odd = next(type(each).__name__ for each in (q, p) if not isinstance(each, dist.Normal))
        raise ContractError(
            f"precisions of factorized normals are weighed, of MeanField heads, not of a {odd}: infer top_down"
        )
    log_q, log_p = -2 * q.scale.log(), -2 * p.scale.log()  # of precisions, which may be beyond what floats hold
    share = torch.sigmoid(log_q - log_p)
    loc = share * q.loc + (1 - share) * p.loc
    scale = (-0.5 * torch.logaddexp(log_q, log_p)).exp()
    return cast(dist.TorchDistribution, dist.Normal(loc, scale).to_event(1))


def _check_sizes(vae: HierarchicalVAE) -> None:
    """Refuse levels that do not fit each other, the likelihood or the prior."""
    levels = vae._levels()
    _agree("the top posterior", levels[-1].latent_dim, "the prior", vae.prior.latent_dim, "latent dimensions")
    pixels = vae.likelihood.head.event_size
    below = [pixels, *(level.latent_dim for level in levels)] if vae.inference == "bottom_up" else [pixels]
    above = 0
    states = []  # widths of h_l, from the top
    for number, level in vae._downwards():
        states.append(above)
        if (level.prior is None) != (number == len(levels)):
            told = "the top level has the prior of the model" if level.prior else "p(z | h) must be given"
            raise ValueError(f"level {number}: prior {'given' if level.prior else 'missing'}: {told}")
        if level.prior is not None:
            _agree(f"level {number}: prior", level.prior.network.in_features, "the state above", above, "features read")
            _agree(f"level {number}: prior", level.prior.latent_dim, "posterior", level.latent_dim, "latent dimensions")
        if level.down is not None:
            wanted = above + level.latent_dim
            _agree(f"level {number}: down", level.down.in_features, "state and z", wanted, "features read")
        above = level.latent_dim if level.down is None else level.down.out_features
    _agree("the decoder", vae.likelihood.network.in_features, "level 1 below z", above, "features read")
    d = pixels
    for number, (level, state) in enumerate(zip(levels, reversed(states), strict=True), 1):
        d = below[number - 1] if vae.inference == "bottom_up" else d
        if level.up is not None:
            _agree(f"level {number}: up", level.up.in_features, "what is below", d, "features read")
            d = level.up.out_features
        wanted = d + state if vae.inference == "top_down" else d
        _agree(
            f"level {number}: posterior", level.posterior.network.in_features, vae.inference, wanted, "features read"
        )


def _agree(name: str, found: int, other: str, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(f"the sizes disagree: {name} has {found}, {other} {wanted} {what}")
