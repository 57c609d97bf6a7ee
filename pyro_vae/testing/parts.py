"""The contracts of priors, posteriors, likelihoods and networks."""

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.errors import ContractError
from pyro_vae.infer.supports import innermost, is_whole_space
from pyro_vae.parts.conditional import Conditional, check_made, num_outputs
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.networks import MLP, Network
from pyro_vae.parts.posteriors import MeanField, Posterior
from pyro_vae.parts.priors import Prior
from pyro_vae.testing.checks import (
    Shape,
    call,
    check_close,
    check_distribution,
    check_gradients,
    check_moves,
    check_scores,
    check_state,
    double,
    jittered,
    made_by,
    name_of,
    naming,
    raw_outputs,
    seeded,
    support,
)

BATCHES: tuple[Shape, ...] = ((), (3,), (4, 3))
_PIXELS = 6


def check_prior(make: Callable[[int], Prior], latent_dims: Sequence[int] = (2, 3)) -> None:
    """Check a prior: its distribution, density, draws, support, gradients, types, devices and saved state.

    Args:
        make: makes the prior for a number of latent dimensions, as its class does.
        latent_dims: the numbers to try.

    Raises:
        ContractError: naming what is wrong.

    >>> from pyro_vae.priors import GaussianMixture
    >>> check_prior(lambda latent_dim: GaussianMixture(latent_dim, components=3))
    """
    for latent_dim in latent_dims:
        with seeded():
            _check_one_prior(make, latent_dim)


def check_posterior(
    make: Callable[[int], Posterior], latent_dims: Sequence[int] = (2, 3), batch_shapes: Sequence[Shape] = BATCHES
) -> None:
    """Check a posterior's head: its sizes, distribution, density, reparametrized draws, types, devices, saved state.

    Args:
        make: makes the head for a number of latent dimensions, as its class does.
        latent_dims: the numbers to try.
        batch_shapes: shapes of leading dimensions to try.

    Raises:
        ContractError: naming what is wrong.

    >>> from pyro_vae.posteriors import FullRank
    >>> check_posterior(FullRank)
    """
    for latent_dim in latent_dims:
        with seeded():
            _check_one_posterior(make, latent_dim, batch_shapes)


def check_likelihood(
    make: Callable[[int], Likelihood], event_sizes: Sequence[int] = (1, 6), batch_shapes: Sequence[Shape] = BATCHES
) -> None:
    """Check a likelihood's head: its sizes, encoding, kind, mass or density, start, types, devices and saved state.

    Args:
        make: makes the head for a number of entries of one observation, as its class does.
        event_sizes: the numbers to try; only for small ones can it be told whether masses sum to one.
        batch_shapes: shapes of leading dimensions to try.

    Raises:
        ContractError: naming what is wrong.

    >>> from pyro_vae.likelihoods import Poisson
    >>> check_likelihood(Poisson)
    """
    for event_size in event_sizes:
        with seeded():
            _check_one_likelihood(make, event_size, batch_shapes)


def check_network(
    make: Callable[..., Network],
    in_features: int = 56,
    out_features: int = 112,
    image_shape: Sequence[int] = (1, 8, 7),
    batch_shapes: Sequence[Shape] = BATCHES,
) -> None:
    """Check a network: its shapes, independence of the rows of a batch, start, gradients, types, devices, saved state.

    Args:
        make: makes the network, called as ``make(in_features, out_features, image_shape=image_shape)``.
        in_features: features of one input; for an encoder, the entries of an image or a sequence.
        out_features: raw outputs; for a decoder, a multiple of these entries.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence.
        batch_shapes: shapes of leading dimensions to try.

    Raises:
        ContractError: naming what is wrong.

    >>> check_network(lambda n, m, image_shape: MLP(n, m, hidden=[16], image_shape=image_shape))
    """
    with seeded():

        def fresh() -> Network:
            arguments = {"in_features": in_features, "out_features": out_features}
            return made_by(lambda *sizes: make(*sizes, image_shape=image_shape), Network, **arguments)

        network = jittered(fresh())
        for batch in batch_shapes:
            made = call(network, torch.randn(*batch, in_features))
            if made.shape != (*batch, out_features):
                raise ContractError(
                    f"{name_of(network)} must map {(*batch, in_features)} to {(*batch, out_features)}, it made "
                    f"{tuple(made.shape)}"
                )
        features = torch.randn(5, in_features)
        _check_rows(network, features)
        check_gradients(network, lambda: network(features).square())
        check_moves(network, lambda part, to: part(to(features)))
        check_state(network, fresh, lambda part: part(features))
        _check_start(fresh(), torch.randn(50, in_features))


def _check_one_prior(make: Callable[[int], Prior], latent_dim: int) -> None:
    x = torch.rand(20, _PIXELS)
    posterior = Conditional(MLP(_PIXELS, 2 * latent_dim, hidden=[8]), MeanField(latent_dim))

    def started() -> Prior:
        prior = made_by(make, Prior, latent_dim=latent_dim)
        with naming(prior, f"initialize of x of shape {tuple(x.shape)}"):
            prior.initialize(x)
        return prior

    prior = jittered(started())
    made = check_made(prior, call(prior, posterior), (), latent_dim)
    check_scores(prior, made, made.sample((4, 3)), (4, 3))
    _check_support(prior, made, prior.support(posterior(x)))
    z = made.sample((8,)).detach()
    check_close(
        f"{name_of(prior)}: called twice, it must make the same distribution",
        made.log_prob(z),
        prior(posterior).log_prob(z),
    )
    check_gradients(prior, lambda: prior(posterior).log_prob(z))
    check_moves(prior, lambda part, to: part(to(posterior)).log_prob(to(z)))
    check_distribution(name_of(prior), double(prior)(double(posterior)))
    check_state(prior, started, lambda part: part(posterior).log_prob(z))


def _check_one_posterior(make: Callable[[int], Posterior], latent_dim: int, batch_shapes: Sequence[Shape]) -> None:
    head = jittered(made_by(make, Posterior, latent_dim=latent_dim))
    _check_head(head, latent_dim, batch_shapes)
    outputs = raw_outputs(head, (8,))
    made = call(head, *outputs)
    if not made.has_rsample:
        raise ContractError(
            f"{name_of(head)} must make a distribution whose draws have gradients (has_rsample), it made "
            f"{type(made).__name__}"
        )
    z = made.rsample()
    if not z.requires_grad:
        raise ContractError(
            f"{name_of(head)}: draws of {type(made).__name__}.rsample have no gradient by the raw outputs; expected "
            "reparametrized draws"
        )
    check_close(
        f"{name_of(head)}: log q of its own draw must be that of the same numbers",
        made.log_prob(z),
        made.log_prob(z.detach().clone()),
    )
    _check_used(head, outputs, head(*outputs).log_prob(z.detach()).sum() + z.sum())
    z = z.detach()
    check_gradients(head, lambda: head(*outputs).log_prob(z))
    check_moves(head, lambda part, to: part(*to(outputs)).log_prob(to(z)))
    check_distribution(name_of(head), double(head)(*double(raw_outputs(head, ()))))
    check_state(head, lambda: made_by(make, Posterior, latent_dim=latent_dim), lambda part: part(*outputs).log_prob(z))


def _check_one_likelihood(make: Callable[[int], Likelihood], event_size: int, batch_shapes: Sequence[Shape]) -> None:
    def fresh() -> Likelihood:
        return made_by(make, Likelihood, event_size=event_size)

    head = jittered(fresh())
    if head.encoding not in (None, "binary", "dequantized", "integers"):
        raise ContractError(
            f"{name_of(head)}.encoding must be 'binary', 'dequantized', 'integers' or None, it is {head.encoding}"
        )
    _check_head(head, event_size, batch_shapes)
    x = _observations(head, 50)
    _check_data(head, x)
    _check_marginal(head, x)
    outputs = raw_outputs(head, (50,))
    _check_used(head, outputs, head(*outputs).log_prob(x).sum())
    check_gradients(head, lambda: head(*outputs).log_prob(x))
    check_moves(head, lambda part, to: part(*to(outputs)).log_prob(to(x)))
    if head.is_density is not None:
        check_distribution(name_of(head), double(head)(*double(raw_outputs(head, ()))))
    check_state(head, fresh, lambda part: part(*outputs).log_prob(x))


def _check_support(prior: Prior, made: TorchDistribution, said: constraints.Constraint | None) -> None:
    if said is None:
        return
    same = is_whole_space(said) == is_whole_space(made.support)
    if not same or not innermost(said).check(made.sample((100,))).all():
        raise ContractError(
            f"{name_of(prior)}.support must be that of its distribution, {made.support}, or None; it is {said}"
        )


def _check_rows(network: Network, features: Tensor) -> None:
    """What a network makes of a row depends on that row alone, in training mode too."""
    whole = network.eval()(features)
    expected = f"{name_of(network)}: an output must depend on its own input alone"
    check_close(
        f"{expected}; of one row it makes something else than of a batch with that row",
        whole[:1],
        network(features[:1]),
    )
    network.train()
    others = torch.cat([features[:1], -3 * features[1:]])
    results = []
    for x in (features, others):
        torch.manual_seed(3)  # a dropout of its own is the same for both
        results.append(network(x)[:1])
    check_close(f"{expected}; in training mode it depends on the other rows (batch normalization does that)", *results)
    network.eval()


def _check_start(network: Network, features: Tensor) -> None:
    before = network(features).detach()
    start = 10 * torch.randn(network.out_features)
    with naming(network, f"start_at of an output of shape {tuple(start.shape)}"):
        network.start_at(start)
    after = network(features).detach()
    far, near = ((made.mean(0) - start).norm() for made in (before, after))
    if not torch.equal(before, after) and not near < 0.5 * far:
        raise ContractError(
            f"{name_of(network)}.start_at must put the outputs around those given, or do nothing: their distance was "
            f"{far:.4g} before and is {near:.4g} after"
        )


def _check_data(head: Likelihood, x: Tensor) -> None:
    """Scores of data of the head's encoding are finite, with finite gradients, whatever the network says."""
    for scale in (0.0, 1.0, 30.0):
        outputs = [scale * v for v in raw_outputs(head, (len(x),))]
        made = call(head, *outputs)
        if head.encoding and not innermost(support(head, made)).check(x).all():
            raise ContractError(
                f"{name_of(head)}.encoding is {head.encoding}, but such data lie outside of its support, {made.support}"
            )
        log_prob = made.log_prob(x)
        gradients = torch.autograd.grad(log_prob.sum(), outputs, allow_unused=True)
        if not all(v.isfinite().all() for v in (log_prob, *gradients) if v is not None):
            raise ContractError(
                f"{name_of(head)}: log p(x) and its gradients must be finite for raw outputs of size {scale:g}, and "
                "some are not"
            )


def _check_marginal(head: Likelihood, x: Tensor) -> None:
    with naming(head, f"marginal of x of shape {tuple(x.shape)}"):
        start = head.marginal(x)
    if start is None:
        return
    shapes = [tuple(v.shape) for v in start]
    if shapes != (expected := [(n,) for n in head.sizes]):
        raise ContractError(f"{name_of(head)}.marginal must return raw outputs of shapes {expected}, it made {shapes}")
    scores = [
        call(head, *outputs).log_prob(x).mean().item() / head.event_size
        for outputs in (start, [torch.zeros_like(v) for v in start])
    ]
    if not scores[0] > scores[1] - 0.25:
        raise ContractError(
            f"{name_of(head)}.marginal must describe x well: log p(x) of an entry is {scores[0]:.4g} there and "
            f"{scores[1]:.4g} where all raw outputs are zero"
        )


def _check_head(head: Likelihood | Posterior, size: int, batch_shapes: Sequence[Shape]) -> None:
    """Its sizes, and its distributions for raw outputs of several batch shapes; rows do not mix."""
    conditional = Conditional(MLP(2, num_outputs(head), hidden=[]), head)
    for batch in batch_shapes:
        outputs = raw_outputs(head, batch)
        made = check_made(head, call(head, *outputs), batch, size)
        with naming(head, "its distribution in a VAE"):
            conditional(torch.randn(*batch, 2))
        value = made.sample()
        check_scores(head, made, value, batch)
        if not batch:
            continue
        alone = call(head, *(v[-1:] for v in outputs)).log_prob(value[-1:])
        check_close(
            f"{name_of(head)}: the last of a batch must score as it does alone", made.log_prob(value)[-1:], alone
        )


def _check_used(head: nn.Module, outputs: Sequence[Tensor], value: Tensor) -> None:
    for i, gradient in enumerate(torch.autograd.grad(value, list(outputs), allow_unused=True, retain_graph=True)):
        if gradient is None or not gradient.any():
            raise ContractError(
                f"{name_of(head)}.sizes has {len(outputs)} entries, but argument {i + 1} of forward changes nothing"
            )


def _observations(head: Likelihood, size: int) -> Tensor:
    """Data ``(size, X)`` of the kind that the head scores; the first rows hold nothing but its extremes."""
    shape = (size, head.event_size)
    levels = head.levels or 17
    if head.encoding == "binary":
        x, extremes = torch.bernoulli(torch.full(shape, 0.4)), (0.0, 1.0)
    elif head.encoding == "integers":
        x, extremes = torch.randint(levels, shape).float(), (0.0, levels - 1.0)
    elif head.encoding == "dequantized":
        x, extremes = torch.rand(shape).clamp(0.01, 0.99), (1e-6, 1 - 1e-6)
    else:
        return call(head, *raw_outputs(head, (size,))).sample()
    x[: len(extremes)] = torch.tensor(extremes)[:, None]
    return x
