"""What a manifest says of inputs, outputs and observations, in words and numbers that need nothing of this library."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vae.data.datasets import Column, Pixels, Schema, names_of
from pyro_vae.runs.exporting.noise import KINDS


def ports(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Names, types and shapes of inputs or outputs, in their order."""
    return [
        {"name": name, "dtype": str(each.dtype).removeprefix("torch."), "shape": ["batch", *each.shape[1:]]}
        for name, each in tensors.items()
    ]


def meaning(name: str, part: str, schema: Schema, trees: Mapping[str, Any]) -> str:
    """What an input or output of a program is."""
    noun, given = schema.noun, f", {names_of(schema.condition)}" * bool(schema.condition)
    if name in KINDS:
        return f"noise: {KINDS[name]} numbers"
    if name == "c":
        return f"what the model is told, as stored, see condition: {names_of(schema.condition)}"
    if name == "mean":
        listed = ", and of columns whose values are listed the place of the most probable one"
        return f"E[x given z{given}]" + listed * any(column.values for column in schema.columns)
    if name == "x":
        return {
            "encoder": f"{noun}s, flat, see observations; NaN was not seen",
            "sampler": f"draws of {noun}s, flat, see observations",
        }[part]
    for site in sorted(trees, key=len, reverse=True):
        if name.startswith(f"{site}_"):
            return f"parameter {name.removeprefix(site + '_')} of {site}, see distributions"
    return {
        "encoder": f"a draw of q({name} given x{given})",
        "decoder": "latent variables",
        "sampler": f"a draw of {name} from the prior",
    }[part]


def observations_told(vae: Any, schema: Schema) -> dict[str, Any]:
    """How observations, and what the model is told, become tensors."""
    head = vae.likelihood.head
    told: dict[str, Any] = {"noun": schema.noun, "shape": list(schema.shape), "entries": schema.size}
    told["layout"] = "flat, the last dimension of shape runs fastest"
    told["encoding"] = _encoding(head, schema)
    if schema.pixels is not None:
        told["pixels"] = {"max_value": schema.pixels.max_value, "binarization": schema.pixels.binarization}
    if schema.columns:
        told["columns"] = [_column(column) for column in schema.columns]
    told["missing"] = "NaN was not seen" + "; nothing was missing in training" * (not schema.missing)
    found = {"observations": told}
    if schema.condition:
        found["condition"] = [_column(column) for column in schema.condition]  # pyright: ignore[reportArgumentType]
    return found


def _column(column: Column) -> dict[str, Any]:
    stored = "place in values" if column.values else "the number itself, in the unit of its file"
    return {"name": column.name, "kind": column.kind, "values": list(column.values), "stored": stored}


def _encoding(head: Any, schema: Schema) -> str:
    if schema.columns:
        return "one number a column, in the order of columns"
    if schema.pixels is not None:
        return _of_pixels(schema.pixels)
    kinds = {"binary": "0 or 1", "dequantized": "real numbers between 0 and 1", "integers": "whole numbers"}
    return kinds.get(head.encoding, "numbers as they were stored")


def _of_pixels(pixels: Pixels) -> str:
    """What is made of a pixel p before a program sees it."""
    largest = pixels.max_value
    return {
        "dynamic": f"0 or 1: 1 with probability p / {largest}",
        "static": f"0 or 1: 1 with probability p / {largest}",
        "threshold": f"0 or 1: 1 where p / {largest} is above 0.5",
        "dequantized": f"(p + u) / {largest + 1}, with u uniform in [0, 1)",
        "none": f"p / {largest}",
        "integers": f"whole numbers, p itself, in 0..{largest}",
    }.get(pixels.binarization, pixels.binarization)
