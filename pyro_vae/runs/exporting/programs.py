"""The programs of an export: encoder, decoder and sampler of a model, as modules from tensors to tensors.

They run the model's own Pyro programs, in which each latent site is drawn from noise, or passed itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.data.datasets import Column, Schema
from pyro_vae.runs.exporting.described import described, mean_of
from pyro_vae.runs.exporting.noise import KINDS, Noise, NotExportable, drawn


class Program(nn.Module):
    """Tensors in, in the order of ``names``, a dictionary of tensors out; their first dimension is the datum.

    Args:
        vae: has the programs ``model`` and ``guide``, with one observed site; in evaluation mode.
        schema: of its data.
        names: of the inputs, some of those that there are: ``x``, ``c``, latent sites, and kinds of noise.

    Attributes:
        trees: of each site what its distribution is, by names of outputs; of the last call.
    """

    def __init__(self, vae: Any, schema: Schema, names: Sequence[str]):
        super().__init__()
        self.vae, self.schema, self.names = vae, schema, tuple(names)
        self.trees: dict[str, Any] = {}
        filler = torch.as_tensor(getattr(vae.likelihood.head, "filler", 0.0), dtype=torch.float32)
        self.register_buffer("filler", filler.clone().expand(schema.size).clone())
        listed = torch.tensor([bool(column.values) for column in schema.columns])
        self.register_buffer("listed", listed if listed.any() else None)

    filler: Tensor
    listed: Tensor | None

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        given = dict(zip(self.names, inputs, strict=True))
        noise = {name: given.pop(name) for name in KINDS if name in given}
        return self.run(given, Noise(0, **noise), inputs[0].shape[0])

    def run(self, given: Mapping[str, Tensor], noise: Noise, size: Any) -> dict[str, Tensor]:
        """The outputs, of ``size`` data."""
        self.trees = {}
        with pyro.validation_enabled(False):
            return self.outputs(given, noise, size)

    def outputs(self, given: Mapping[str, Tensor], noise: Noise, size: Any) -> dict[str, Tensor]:
        """What the program makes of inputs and noise."""
        raise NotImplementedError

    def observed(self, given: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
        """What the programs are called with: observations and, where there is one, a condition."""
        if not self.schema.condition:
            return [x]
        c = given.get("c")
        size, columns = x.shape[0], self.schema.condition
        return [x, x.new_zeros(size, self.schema.condition_dim) if c is None else encoded(c, columns)]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Context: what cannot be written of p(x | z) is told with the name of the likelihood."""
        try:
            yield
        except NotExportable as error:
            name = type(self.vae.likelihood.head).__name__
            raise (error if name in str(error) else NotExportable(f"{name}: {error}")) from error

    def describe(self, name: str, made: Any) -> dict[str, Tensor]:
        """The parameters of a site's distribution."""
        tensors, self.trees[name] = described(made, name)
        return tensors


class Encoder(Program):
    """x, and noise, to the parameters of q(z | x) and a draw of z. NaN in x was not seen."""

    def outputs(self, given: Mapping[str, Tensor], noise: Noise, size: Any) -> dict[str, Tensor]:
        seen = ~given["x"].isnan()
        x = torch.where(seen, given["x"], self.filler)
        with _Sites(noise, {}) as sites:
            self.vae.guide(*self.observed(given, x), seen)
        found: dict[str, Tensor] = {}
        for name, made in sites.made.items():
            found |= {**self.describe(name, made), name: sites.values[name]}
        return found


class Decoder(Program):
    """All latent sites to the parameters of p(x | z) and its mean."""

    def outputs(self, given: Mapping[str, Tensor], noise: Noise, size: Any) -> dict[str, Tensor]:
        x = self.filler.expand(size, self.schema.size)
        known = {name: each for name, each in given.items() if name != "c"}
        with _Sites(None, known) as sites:
            self.vae.model(*self.observed(given, x))
        name, made = sites.observed
        with self.naming():
            return {**self.describe(name, made), "mean": mean_of(made, self.listed)}


class Sampler(Program):
    """Noise to draws of z from the prior and of x given z, and the mean of x given z."""

    def outputs(self, given: Mapping[str, Tensor], noise: Noise, size: Any) -> dict[str, Tensor]:
        x = self.filler.expand(size, self.schema.size)
        with _Sites(noise, {}) as sites:
            self.vae.model(*self.observed(given, x))
        name, made = sites.observed
        with self.naming():
            return {**sites.values, name: drawn(made, noise), "mean": mean_of(made, self.listed)}


class _Sites(Messenger):
    """Handler of programs: latent sites are what is known of them, or drawn from noise; distributions are kept.

    Without noise, a site that is not known is zero: nothing that is asked for depends on it.
    """

    def __init__(self, noise: Noise | None, known: Mapping[str, Tensor]):
        super().__init__()
        self.noise, self.known = noise, known
        self.made: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        self._observed: dict[str, Any] = {}

    @property
    def observed(self) -> tuple[str, Any]:
        """Name and distribution of the observed site."""
        (found,) = self._observed.items()
        return found

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, made = msg["name"], msg["fn"]
        if msg["is_observed"]:
            self._observed[name] = made
            return
        value = self.known.get(name)
        if value is None and self.noise is None:
            value = torch.zeros(made.batch_shape + made.event_shape)
        elif value is None:
            try:
                value = drawn(made, self.noise)  # pyright: ignore[reportArgumentType]
            except NotExportable as error:
                raise NotExportable(f"{name}: {error}") from error
        self.made[name], self.values[name] = made, value
        msg["value"], msg["done"] = value, True


def encoded(c: Tensor, columns: Sequence[Column]) -> Tensor:
    """A condition ``(B, number of columns)`` as it is stored, as the model is told it, ``(B, C)``.

    A category that there is not is NaN, and so is all that comes of it.
    """
    parts = []
    for place, column in enumerate(columns):
        stored = c[:, place : place + 1]
        if column.kind == "categorical":
            chosen = (stored == torch.arange(column.width, dtype=stored.dtype)).to(stored.dtype)
            parts.append(torch.where(chosen.sum(1, keepdim=True) > 0, chosen, torch.nan))
        else:
            parts.append((stored - column.loc) / column.scale)
    return torch.cat(parts, 1)


def stored(c: Tensor, columns: Sequence[Column]) -> Tensor:
    """The inverse of :func:`encoded`."""
    parts = c.split([column.width for column in columns], 1)
    return torch.stack([column.decode(part) for part, column in zip(parts, columns, strict=True)], 1)


PROGRAMS = {"encoder": Encoder, "decoder": Decoder, "sampler": Sampler}
