"""Test data as a page shows them: images, values, lines of sequences; and what a model makes of them."""

import base64
import math
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyro_vae.data.datasets import Column as DataColumn
from pyro_vae.data.datasets import Data, Schema
from pyro_vae.data.images import ImageData
from pyro_vae.infer.trees import first_tensor, select, tensors
from pyro_vae.runs.reporting.page import Item, Strip
from pyro_vae.runs.using import Using

MOST_PIXELS = 64
"""Of a picture's side; larger images are shown smaller."""
MOST_VALUES = 24
"""Entries of a datum that are shown, the first ones."""
MOST_STEPS, MOST_FEATURES = 160, 6
"""Steps, and numbers of a step, of a sequence that are drawn: of more steps every second, third, .."""
WIDTH, HEIGHT = 200, 34
"""Of a line in the chart of a sequence, in pixels."""
PICTURES, VALUES = 800_000, 600_000
"""Characters that pictures, or values, of a sortable table may take."""


class Shown:
    """The test data of a run.

    Args:
        data: of the run.
        vae: the model, on the device of ``data``; None: nothing is reconstructed.
    """

    def __init__(self, data: Data, vae: Any = None):
        self.data, self.schema = data, data.schema
        self.is_sequence = len(data.schema.shape) == 2
        self.using = None if vae is None else Using(vae, data.schema, told=lambda line: None)

    @property
    def notes(self) -> list[str]:
        """Lines on how the data are shown, and which of their entries are not."""
        found = []
        if self.data.origin is not None:
            noun, of, _ = self.data.origin
            counted = {"line": ", the first of which has the names", "row": ", from 0", "place": ", from 0"}
            found.append(f"Each {self.schema.noun} has its {noun} in {of}{counted.get(noun, '')}.")
        if self.is_sequence:
            steps, features = self.schema.shape
            told = (
                "Lines are numbers of a sequence against its steps, each between its least and its greatest value in "
            )
            told += "the test set" + "; dark what was seen, blue what the model makes of it" * bool(self.using) + "."
            if features > MOST_FEATURES:
                told += f" Of {features:,} numbers of a step the first {MOST_FEATURES} are drawn."
            every = -(-steps // MOST_STEPS)
            found.append(told + f" Of {steps:,} steps one in {every} is drawn." * (every > 1))
        elif len(self.schema.shape) == 1 and self.schema.size > MOST_VALUES:
            found.append(f"Of {self.schema.size:,} columns the first {MOST_VALUES} are shown.")
        return found

    def where(self, place: int) -> str:
        """Where a test datum is in what the user gave, in words; empty: it is not known, or in its place."""
        origin = self.data.origin
        return "" if origin is None else f"{origin.noun} {origin.places[place]}"

    def pictures(self, places: Sequence[int], most: int = PICTURES) -> dict[int, str]:
        """The first of these test images, as many as take so many characters, as base64 of PNG by place."""
        found: dict[int, str] = {}
        if not isinstance(self.data, ImageData):
            return found
        for start in range(0, len(places), 256):
            some = [int(place) for place in places[start : start + 256]]
            for place, image in zip(some, first_tensor(self.data.test)[some], strict=True):
                found[place] = self._png(image)
                if (most := most - len(found[place])) < 0:
                    return found
        return found

    def values(self, places: Sequence[int], most: int = VALUES) -> tuple[list[str], dict[int, list[str]]]:
        """Names of entries, and the texts of the first of these test rows or sequences, by place."""
        found: dict[int, list[str]] = {}
        if isinstance(self.data, ImageData):
            if self.data.origin is None or self.data.origin.noun != "file":
                return [], found
            files = self.data.origin.places
            return [""], {place: [str(files[place])] for place in places[: most // 100]}
        if self.is_sequence:
            return [], found
        for start in range(0, len(places), 256):
            some = [int(place) for place in places[start : start + 256]]
            x, c = _parts(select(self.data.test, torch.tensor(some, device=self.data.device)))
            for number, place in enumerate(some):
                found[place] = self._texts(x[number], None if c is None else c[number])
                if (most := most - sum(map(len, found[place])) - 10 * len(found[place])) < 0:
                    return self._names(), found
        return self._names(), found

    def lines(self, places: Sequence[int], most: int = VALUES) -> dict[int, str]:
        """The first of these test sequences as paths of SVG, by place."""
        found: dict[int, str] = {}
        for start in range(0, len(places) if self.is_sequence else 0, 256):
            some = [int(place) for place in places[start : start + 256]]
            x, _ = _parts(select(self.data.test, torch.tensor(some, device=self.data.device)))
            for place, each in zip(some, x, strict=True):
                found[place] = self._path(each)
                if (most := most - len(found[place])) < 0:
                    return found
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the chart of a sequence."""
        return (WIDTH, HEIGHT * min(self.schema.shape[1], MOST_FEATURES)) if self.is_sequence else (0, 0)

    @cached_property
    def _bounds(self) -> np.ndarray:
        """The least and the greatest test value of each number of a step, ``(2, F)``."""
        x = _parts(self.data.test)[0].reshape(-1, self.schema.shape[1]).numpy().astype(float)
        seen = np.isfinite(x)
        low, high = np.where(seen, x, np.inf).min(0), np.where(seen, x, -np.inf).max(0)
        return np.where(seen.any(0), (low, high), 0.0)

    def _path(self, x: Tensor) -> str:
        """A sequence as a path of SVG, a line for each number of its steps, with gaps where nothing was seen."""
        steps, features = self.schema.shape
        values = x.reshape(steps, features).numpy().astype(float)[:: -(-steps // MOST_STEPS), :MOST_FEATURES]
        low, high = self._bounds[:, :MOST_FEATURES]
        heights = ((values - low) / np.maximum(high - low, 1e-30)).clip(-0.1, 1.1)
        ys = HEIGHT * (np.arange(values.shape[1]) + 0.9 - 0.8 * heights)
        xs = np.linspace(2, WIDTH - 2, max(len(values), 2))[: len(values)]
        words: list[str] = []
        for column in ys.T:
            drawn = False
            for across, down in zip(xs, column, strict=True):
                if math.isfinite(down):
                    words.append(f"{' ' if drawn else 'M'}{across:.0f} {down:.0f}" + "h0" * (not drawn))
                    drawn = True
                else:
                    drawn = False
        return "".join(words).replace("h0 ", "L")

    def items(self, places: Sequence[int], about: Sequence[str]) -> list[Item]:
        """Test data with their reconstructions, and a line about each."""
        some = torch.tensor([int(place) for place in places], device=self.data.device)
        chosen = select(self.data.test, some)
        made = None if self.using is None else self._reconstructed(chosen)
        seen, told = _parts(chosen)
        result = []
        for number, (place, line) in enumerate(zip(places, about, strict=True)):
            name, where = f"test {self.schema.noun} {place}", self.where(place)
            line = f"{place}{f' ({where})' if where else ''}: {line}"
            if self.is_sequence:
                path = "" if made is None else self._path(made[number].detach().cpu())
                strip = Strip(self.size, self._path(seen[number]), path, self._alt(name, seen[number], bool(path)))
                result.append(Item(line, strip=strip))
                continue
            if isinstance(self.data, ImageData):
                pictures = [(self._png(seen[number]), name)]
                if made is not None:
                    pictures.append((self._png(made[number]), f"reconstruction of {name}"))
                result.append(Item(line, pictures))
                continue
            c = None if told is None else told[number]
            texts = self._texts(seen[number], c)
            again = [""] * len(texts) if made is None else self._texts(made[number], c)
            rows = list(zip(self._names(), texts, again, strict=True))
            result.append(Item(line, (), rows))
        return result

    def _alt(self, name: str, x: Tensor, has_more: bool) -> str:
        """What the chart of a sequence shows."""
        values = x.reshape(self.schema.shape).numpy()
        seen = np.isfinite(values)
        steps, spans = int(seen.any(1).sum()), []
        for column, known in zip(values.T[:MOST_FEATURES], seen.T, strict=False):
            spans.append(f"from {column[known].min():.3g} to {column[known].max():.3g}" if known.any() else "not seen")
        return f"{name}, {steps} steps seen: {'; '.join(spans)}" + ", and its reconstruction" * has_more

    def _reconstructed(self, chosen: Any) -> Tensor:
        """E[x given z] at the posterior mean, ``(n, X)``, as observations."""
        assert self.using is not None
        made = self.using.decode_data(chosen)
        if not self.schema.columns:
            return made.flatten(1)
        columns = [_stored(column, made[column.name]) for column in self.schema.columns]
        return torch.from_numpy(np.stack(columns, 1))

    def _png(self, x: Tensor) -> str:
        """An observation, or its mean, as a picture: dark where there is one channel, as ink."""
        assert isinstance(self.data, ImageData)
        channels, height, width = self.data.image_shape
        x = self.data.picture(x.detach().cpu().float()).nan_to_num(0.5).clamp(0, 1)
        pixels = x.reshape(channels, height, width).permute(1, 2, 0).numpy()
        pixels = pixels if channels in (1, 3) else pixels.mean(-1, keepdims=True)
        if pixels.shape[-1] == 1:
            pixels = 1 - pixels[..., 0]
        image = Image.fromarray((255 * pixels).round().astype(np.uint8))
        if max(height, width) > MOST_PIXELS:
            image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        elif pixels.ndim == 2 and np.isin(pixels, (0, 1)).all():
            image = image.convert("1")
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=9)
        return base64.b64encode(buffer.getvalue()).decode()

    def _names(self) -> list[str]:
        """Of the texts of a datum."""
        given = [f"given {column.name}" for column in self.schema.condition]
        names = [column.name for column in self.schema.columns] or [f"[{i}]" for i in range(self.schema.size)]
        return [*given, *names[:MOST_VALUES]]

    def _texts(self, x: Tensor, c: Tensor | None) -> list[str]:
        """An observation ``(X,)`` and its condition ``(C,)`` as texts, one for each name."""
        given = [] if c is None else _given(self.schema, c)
        entries = x.tolist()
        if not self.schema.columns:
            return [*given, *(_number(entry) for entry in entries[:MOST_VALUES])]
        columns = zip(self.schema.columns[:MOST_VALUES], entries, strict=False)
        return [*given, *(_text(column, entry) for column, entry in columns)]


def _parts(chosen: Any) -> tuple[Tensor, Tensor | None]:
    """Observations and conditions, on the CPU; booleans tell what was seen of the observations."""
    x, *others = (each.detach().cpu() for each in tensors(chosen))
    for each in others:
        x = torch.where(each, x, torch.nan) if each.dtype == torch.bool and each.shape == x.shape else x
    return x, next((each for each in others if each.dtype != torch.bool), None)


def _stored(column: DataColumn, values: Any) -> np.ndarray:
    """What a table shows of a column, as it is stored: places in its values, where it has some."""
    if not column.values:
        return np.asarray(values, np.float64)
    return np.array([math.nan if value is None else column.values.index(value) for value in values], np.float64)


def _text(column: DataColumn, entry: float) -> str:
    if math.isnan(entry):
        return "missing"
    if column.values and 0 <= round(entry) < len(column.values):
        value = column.values[round(entry)]
        return value if isinstance(value, str) else _number(value)
    return _number(entry)


def _number(value: float) -> str:
    return "missing" if math.isnan(value) else f"{value:.4g}"


def _given(schema: Schema, c: Tensor) -> list[str]:
    """The condition of a datum, as it is in the file."""
    columns = schema.condition
    parts = c.double().split([column.width for column in columns])
    return [_text(column, column.decode(part).item()) for column, part in zip(columns, parts, strict=True)]
