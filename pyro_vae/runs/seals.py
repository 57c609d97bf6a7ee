"""What a file of weights says of itself and of its run: by it, what was changed since is noticed."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import torch
from safetensors.torch import save
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of what is told of them, but for a checksum."""
    told = {name: value for name, value in metadata.items() if name != "checksum"}
    result = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        result.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def sealed(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a checksum of its content, of which it has the same bytes whenever it is written."""
    content = save(tensors, {**metadata, "checksum": checksum(tensors, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # which are in no order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def metadata_in(content: bytes) -> dict[str, str]:
    """What a safetensors file, of which the beginning is enough, says beside its tensors.

    Raises:
        ValueError, TypeError or AttributeError: if it is none.
    """
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}


def settings_sealed(weights: Path) -> dict[str, Any] | None:
    """The settings that a file of weights was trained with, as ``config.yaml`` had them.

    None if it is of an earlier version, or is none, or is damaged, which is told where weights are read.
    """
    try:
        with weights.open("rb") as file:
            size = file.read(8)
            settings = json.loads(metadata_in(size + file.read(min(int.from_bytes(size, "little"), 10**8)))["settings"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def without_weights(directory: Path) -> str:
    """What helps a run without weights, as the end of a line about it."""
    if not (directory / "checkpoint.pt").is_file():
        return ""
    first = "delete its result.json; then " if (directory / "result.json").exists() else ""
    return (
        f": checkpoint.pt is there, so {first}pyro-vae train --run_dir {shlex.quote(str(directory))} --resume writes it"
    )


def check_hdf5(path: Path) -> None:
    """Open each object of an HDF5 file; h5netcdf, which cannot open one, leaves a traceback on stderr beside its error.

    Raises:
        OSError, KeyError, RuntimeError: whatever HDF5 makes of damaged bytes.
    """
    names: list[str] = []
    with h5py.File(path) as file:
        file.visit(names.append)
        for name in ["/", *names]:
            dict(file[name].attrs)
