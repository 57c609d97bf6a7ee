"""Sequences of equal steps, of any length up to that of the longest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.datasets import Data, Kind, Schema, Source, held_out
from pyro_vae.data.images import MOST, fingerprint
from pyro_vae.data.own import load_arrays
from pyro_vae.errors import DataError
from pyro_vae.parts.likelihoods import Bernoulli, Gaussian, Likelihood, NegativeBinomial
from pyro_vae.parts.mixed import Scaled

KINDS = {"real": "real numbers", "count": "counts", "binary": "zeros and ones"}
ARRAYS = ("train", "test", "train_lengths", "test_lengths")


class Sequences(Source):
    """Your own sequences: a NumPy archive with the arrays ``train`` and ``test``, ``(N, T, F)``, or ``(N, T)``.

    They are of F numbers at each of T steps, F = 1 if there are two dimensions. Real numbers may be of any size; whole
    numbers are counts, binary if there are only 0 and 1, and real if some are negative. The arrays ``train_lengths``
    and ``test_lengths``, ``(N,)``, are optional: what stands behind the end of a sequence was not seen, and counts for
    nothing. So does NaN, wherever it stands.

    Args:
        data_dir: not used.
        path: the ``.npz`` file.
        kind: of all numbers: real, count or binary; null: as said above.
        num_validation: sequences held out from the end of the training set, at least 1; null: a tenth of them.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        kind: Literal["real", "count", "binary"] | None = None,
        num_validation: int | None = None,
    ):
        self.data_dir, self.path = Path(data_dir), Path(path)
        self.kind, self.num_validation = kind, num_validation
        if num_validation is not None and num_validation < 1:
            raise ValueError(f"num_validation must be at least 1, got {num_validation}")

    def load(self, device: torch.device | str = "cpu") -> "SequenceData":
        """Read the sequences, and bring them to ``device``.

        Raises:
            DataError: in one line, naming array and place.
        """
        arrays = load_arrays(self.path, ".npz archive")
        if isinstance(arrays, np.ndarray):
            raise DataError(f"{self.path} is a single array: save numpy.savez(path, train=..., test=...)")
        if missing := {"train", "test"} - arrays.keys():
            raise DataError(f"{self.path} lacks the array '{min(missing)}'; it holds {sorted(arrays) or 'nothing'}")
        if odd := arrays.keys() - set(ARRAYS):
            raise DataError(f"{self.path} holds the array '{min(odd)}'; those that are read are {', '.join(ARRAYS)}")
        parts = {part: sequences_of(arrays, part, self.path) for part in ("train", "test")}
        train, test = parts.values()
        for part, other in (("train", "test"), ("test", "train")):
            if f"{part}_lengths" in arrays and f"{other}_lengths" not in arrays:
                steps = parts[other].shape[1]
                print(f"{self.path} has no {other}_lengths: sequences of {other} are read as of {steps} steps")
        if train.shape[1:] != test.shape[1:]:
            steps = " and ".join(f"{each.shape[1]} steps of {each.shape[2]} in {part}" for part, each in parts.items())
            raise DataError(f"{self.path}: sequences of train and test must be of one shape, they have {steps}")
        if len(test) < 2:
            raise DataError(f"{self.path}: a mean over test sequences with its error needs at least 2, there is 1")
        last = held_out(len(train), self.num_validation, str(self.path))
        unseen = np.argwhere(np.isnan(train[:-last]).all(0))
        if len(unseen):
            raise DataError(
                f"{self.path}: no training sequence was seen at [{_place(unseen[0])}], of which nothing can be learned "
                f"then: cut the arrays there ({last} of train are held out for validation)"
            )
        kind = self.kind or _kind([arrays["train"], arrays["test"]], parts)
        for part, each in parts.items():
            _check_kind(each, kind, f"{self.path}: {part}")
        return SequenceData(train[:-last], train[-last:], test, kind, device)


def sequences_of(arrays: Mapping[str, np.ndarray], part: str, path: Path) -> np.ndarray:
    """The array called ``part``, as ``(N, T, F)``, float32, with NaN where nothing was seen, as behind its lengths.

    Raises:
        DataError: naming array and place.
    """
    x, lengths, what = arrays[part], arrays.get(f"{part}_lengths"), f"{path}: {part}"
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise DataError(f"{what}: expected an array (N, T, F) or (N, T), got shape {x.shape}")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{what}: expected numbers, got {x.dtype}")
    x = x.reshape(*x.shape[:2], -1)
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu":
            raise DataError(
                f"{what}_lengths: expected {len(x)} whole numbers, got {lengths.dtype} of shape {lengths.shape}"
            )
        wrong = np.flatnonzero((lengths < 1) | (lengths > x.shape[1]))
        if len(wrong):
            raise DataError(
                f"{what}_lengths[{wrong[0]}] is {lengths[wrong[0]]}, it must be in 1..{x.shape[1]}, the steps of {part}"
            )
        within = np.arange(x.shape[1]) < lengths[:, None]
        x = np.where(within[:, :, None], x, np.nan if x.dtype.kind == "f" else 0)
        seen = np.broadcast_to(within[:, :, None], x.shape) & ~np.isnan(x)
    else:
        seen = ~np.isnan(x)
    with np.errstate(over="ignore"):
        result = np.where(seen, x, np.nan).astype(np.float32)
    infinite = np.argwhere(np.isinf(result))
    if len(infinite):
        raise DataError(f"{what}[{_place(infinite[0])}] is infinite, or too large for single precision")
    whole = np.argwhere(seen & (np.abs(result) > MOST)) if x.dtype.kind in "iu" else []
    if len(whole):
        raise DataError(f"{what}[{_place(whole[0])}] is above {MOST:,}: save real numbers, or in another unit")
    empty = np.flatnonzero(~seen.any((1, 2)))
    if len(empty):
        raise DataError(f"{what}[{empty[0]}]: nothing of this sequence was seen, all of it is NaN")
    return result


def entries_head(schema: Schema) -> Likelihood:
    """The likelihood of sequences: normal, negative binomial or Bernoulli.

    Real numbers are scaled by mean and standard deviation of their feature, which has a learned noise: a step that few
    sequences reach has no scale of its own.
    """
    size, features = schema.size, schema.shape[1]
    if schema.entries == "real":
        return Scaled(Gaussian(size, min_scale=0.01, features=features), features)
    return NegativeBinomial(size) if schema.entries == "count" else Bernoulli(size)


def _place(index: np.ndarray) -> str:
    return ", ".join(map(str, index.tolist()))


def _kind(stored: list[np.ndarray], parts: dict[str, np.ndarray]) -> str:
    """What numbers are taken for."""
    if any(array.dtype.kind == "f" for array in stored):
        return "real"
    least, most = (np.array([bound(each) for each in parts.values()]) for bound in (np.nanmin, np.nanmax))
    if least.min() < 0:
        return "real"
    return "binary" if most.max() <= 1 else "count"


def _check_kind(x: np.ndarray, kind: str, what: str) -> None:
    if kind == "real":
        return
    good = np.isnan(x) | ((x >= 0) & (x == np.floor(x)) & ((x <= 1) | (kind == "count")))
    wrong = np.argwhere(~good)
    if len(wrong):
        value = x[tuple(wrong[0])]
        raise DataError(f"{what}[{_place(wrong[0])}] is {value:g}: --dataset.kind {kind} is for {KINDS[kind]}")


class SequenceData(Data):
    """Sequences on a device, see :class:`Data`.

    Args:
        train, validation, test: float32 ``(N, T, F)``, NaN where nothing was seen.
        kind: of all numbers.
        device: where all tensors live.

    Attributes:
        train, validation, test: the same, flat: ``(N, T * F)``.
    """

    def __init__(
        self, train: np.ndarray, validation: np.ndarray, test: np.ndarray, kind: str, device: torch.device | str = "cpu"
    ):
        parts = [np.where(np.isnan(each), np.float32(np.nan), each) for each in (train, validation, test)]  # one NaN
        steps, width = train.shape[1:]
        missing = any(bool(np.isnan(each).any()) for each in parts)
        self.schema = Schema((steps, width), "sequence", missing=missing, entries=cast(Kind, kind))
        self.train, self.validation, self.test = (torch.from_numpy(each).flatten(1).to(device) for each in parts)
        self.fingerprint = fingerprint(*parts, kind)
        seen = np.concatenate([~np.isnan(each).all(2) for each in parts])
        lengths = steps - seen[:, ::-1].argmax(1)
        known = f"up to {steps} steps, {lengths.min()} at least," if lengths.min() < steps else f"{steps} steps"
        self.title = f"Sequences of {known} of {width} {KINDS[kind]}"
        self.about = {"dataset": "Sequences", "kind": kind, "shape": [steps, width], "shortest": int(lengths.min())}

    @property
    def num_train(self) -> int:
        return len(self.train)

    def observe(self, index: Tensor) -> Tensor:
        """Training sequences ``(len(index), T * F)``."""
        return self.train[index]

    def check(self, head: Likelihood) -> None:
        of, kind = f"--likelihood {type(head).__name__}", self.about["kind"]
        discrete = kind != "real"
        if head.is_density is not None and head.is_density == discrete:
            wrong = "density" if head.is_density else "mass"
            raise DataError(f"{of} is a {wrong}, and these are sequences of {KINDS[kind]}; leave --likelihood away")
        if head.encoding == "binary" and kind != "binary":
            raise DataError(f"{of} scores zeros and ones, and these are {KINDS[kind]}; leave --likelihood away")
        if head.levels is not None:
            most = max(float(each.nan_to_num(0).max()) for each in (self.train, self.validation, self.test))
            if most >= head.levels:
                raise DataError(f"{of} has {head.levels} levels, but there is a {most:g}: add --likelihood.levels")
