"""From settings to data and model, with everything that does not fit refused in one line."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyro_vae.data.datasets import Data, Schema, Source
from pyro_vae.data.sequences import entries_head
from pyro_vae.data.tables import heads
from pyro_vae.errors import ContractError, DataError, RunError
from pyro_vae.hierarchical import HierarchicalVAE, residual_levels
from pyro_vae.infer.checks import check_part
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.programs import evaluating
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import first_tensor, select, split
from pyro_vae.parts.conditional import Conditional, num_outputs
from pyro_vae.parts.likelihoods import Bernoulli, Likelihood
from pyro_vae.parts.missing import Incomplete
from pyro_vae.parts.networks import MLP, Network, Told
from pyro_vae.parts.posteriors import MeanField
from pyro_vae.runs.settings import Settings
from pyro_vae.vae import VAE, ConditionalVAE, TwoLayerVAE

T = TypeVar("T")
Model = VAE | ConditionalVAE | TwoLayerVAE | HierarchicalVAE


OTHERS_ERRORS = (ValueError, TypeError, AssertionError, AttributeError, LookupError, RuntimeError)
"""What the classes of a user, and of libraries, raise at what they cannot do; Pyro's losses assert."""


def make(option: str, factory: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What ``factory`` makes; what it refuses is a user's mistake in ``option``."""
    try:
        return factory(*args, **kwargs)
    except OTHERS_ERRORS as error:
        raise RunError(refusal(error, f"--{option}: ")) from error


def refusal(error: Exception, prefix: str = "") -> str:
    """An error in one line; one that was not raised on purpose says where it was, outside of the libraries."""
    message = as_options(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
        raise error
    if isinstance(error, ContractError):  # names the class itself
        return message
    if prefix and isinstance(error, ValueError | AssertionError):
        return prefix + message
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
    return f"{prefix}{type(error).__name__}: {message} ({Path(last.filename).name}, line {last.lineno})"


def load_dataset(dataset: Source, device: torch.device | str, condition: Sequence[str] = ()) -> Data:
    """The data, given the condition of these names, or a RunError that says why they cannot be had."""
    try:
        data = dataset.load(device)
        return data.given(condition) if condition else data
    except DataError as error:
        raise RunError(" ".join(str(error).split())) from error


def build(settings: Settings, schema: Schema) -> Model:
    """The untrained model of ``settings`` for data of this schema."""
    if settings.model == "HierarchicalVAE":
        return hierarchical(settings, schema)
    told = dict.fromkeys(settings.condition_in, schema.condition_dim)
    likelihood = head_of(settings, schema)
    posterior = make("posterior", settings.posterior, settings.latent_dim)
    read = settings.latent_dim + told.get("decoder", 0)
    decoder = make("decoder", settings.decoder, read, num_outputs(likelihood), image_shape=schema.shape)
    encoder = encoder_of(settings, schema, num_outputs(posterior), told.get("encoder", 0))
    below = make("decoder", Conditional, decoder, likelihood), make("encoder", Conditional, encoder, posterior)
    if schema.condition_dim:
        return conditional(settings, *below, schema.condition_dim)
    return MODELS[settings.model](settings, *below)


def head_of(settings: Settings, schema: Schema) -> Likelihood:
    """The likelihood of the settings or, of a table or sequences for which none was chosen, that of what they hold."""
    chosen = settings.likelihood
    usual = (chosen.func, chosen.keywords) == (Bernoulli, {}) if isinstance(chosen, partial) else chosen is Bernoulli
    if usual and schema.entries:
        return entries_head(schema)
    if schema.columns and usual:
        return heads(schema.columns)
    told = {"image_shape": schema.shape} if "image_shape" in inspect.signature(chosen).parameters else {}
    return make("likelihood", chosen, schema.size, **told)


def encoder_of(settings: Settings, schema: Schema, out_features: int, told: int = 0) -> Network:
    """The encoder, which sees what is missing where data have gaps, and a condition of ``told`` numbers."""
    mask = schema.missing and settings.missing == "mask"
    inputs = 2 * schema.size if mask else schema.size
    network = _told(settings, inputs, told, out_features, schema.shape)
    features = schema.shape[1] if schema.entries else None
    return Incomplete(network, schema.size, mask, features) if schema.missing else network


def _told(settings: Settings, size: int, told: int, out_features: int, shape: tuple[int, ...]) -> Network:
    """A network that reads x and c; of those that refuse so many features, one of x that is told c."""
    if told:
        try:
            network = make("encoder", settings.encoder, size + told, out_features, image_shape=shape)
            with torch.no_grad(), evaluating(network):
                network(torch.zeros(1, size + told))
            return network
        except (RunError, *OTHERS_ERRORS):
            return Told(make("encoder", settings.encoder, size, out_features, image_shape=shape), told)
    return make("encoder", settings.encoder, size, out_features, image_shape=shape)


def conditional(
    settings: Settings, likelihood: Conditional, posterior: Conditional, condition_dim: int
) -> ConditionalVAE:
    """z, c -> x."""
    if "prior" in settings.condition_in:
        head = MeanField(settings.latent_dim)
        network = MLP(condition_dim, num_outputs(head), settings.condition_hidden)
        return ConditionalVAE(Conditional(network, head), likelihood, posterior, condition_dim)
    prior = make("prior", settings.prior, settings.latent_dim)
    return make("condition_in", ConditionalVAE, prior, likelihood, posterior, condition_dim)


def one_layer(settings: Settings, likelihood: Conditional, posterior: Conditional) -> VAE:
    """z -> x."""
    return VAE(make("prior", settings.prior, settings.latent_dim), likelihood, posterior)


def two_layers(settings: Settings, likelihood: Conditional, posterior: Conditional) -> TwoLayerVAE:
    """z2 -> z1 -> x."""
    bottom, top = settings.latent_dim, settings.top.latent_dim
    latent, top_posterior = MeanField(bottom), make("posterior", settings.posterior, top)
    return TwoLayerVAE(
        make("prior", settings.prior, top),
        latent=Conditional(MLP(top, num_outputs(latent), settings.top.hidden), latent),
        likelihood=likelihood,
        posterior=posterior,
        top_posterior=Conditional(MLP(bottom, num_outputs(top_posterior), settings.top.hidden), top_posterior),
    )


def hierarchical(settings: Settings, schema: Schema) -> HierarchicalVAE:
    """zL -> .. -> z1 -> x."""
    chosen, head = settings.levels, head_of(settings, schema)
    width, top = chosen.widths[0], chosen.latent_dims[-1]
    decoder = make("decoder", settings.decoder, width, num_outputs(head), image_shape=schema.shape)
    levels = make(
        "levels",
        residual_levels,
        encoder_of(settings, schema, width),
        **vars(chosen),
        posterior=partial(make, "posterior", settings.posterior),
    )
    likelihood = make("decoder", Conditional, decoder, head)
    prior = make("prior", settings.prior, top)
    return make("levels", HierarchicalVAE, prior, levels, likelihood, chosen.inference)


MODELS = {"VAE": one_layer, "TwoLayerVAE": two_layers}


def check_pairing(head: Likelihood, data: Data) -> None:
    """Refuse a likelihood that does not score such data.

    Raises:
        RunError: with the option that would help.
    """
    try:
        data.check(head)
    except DataError as error:
        raise RunError(str(error)) from error


def check_observations(vae: Model, observations: Sequence[Tree], data: Data) -> None:
    """Refuse parts that break their contract, and observations that the likelihood cannot score.

    Binary observations are alike, so that a few stand for all.
    """
    size = 1000 if data.encoding == "binary" else None
    try:
        with evaluating(vae.model, vae.guide):
            for x in observations:
                for number, part in enumerate(split(select(x, slice(size)), 1000)):
                    check_part(vae.model, vae.guide, part, True, 1000 * number)
    except OTHERS_ERRORS as error:
        problem = refusal(error)
        parts = {"prior": vae.prior, "likelihood": vae.likelihood.head, "posterior": vae.posterior.head}
        chosen = " ".join(f"--{option} {type(part).__name__}" for option, part in parts.items())
        raise RunError(f"{problem} ({chosen}{data.options})") from error


def check_objective(objective: Objective, vae: Model, x: Tree) -> None:
    """Refuse an objective that cannot serve the model, before anything is written; nothing is left changed.

    Raises:
        RunError: with the option that would help.
    """
    device = first_tensor(x).device
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus), evaluating(vae.model, vae.guide):
            objective(vae.model, vae.guide, x)
    except ContractError as error:
        raise RunError(f"--objective {type(objective).__name__}: {as_options(error)}") from error


def as_options(error: Exception) -> str:
    """An error of the library in one line, with its settings named as options of the command line."""
    message = " ".join(str(error).split("Trace Shapes")[0].split())  # Pyro appends a table of shapes
    return (
        message.replace("PyroSVI", "--engine pyro")
        .replace("a smaller lr", "a smaller --lr")
        .replace('kl="sampled"', "--objective.kl sampled")
    )
