"""Files of a run, read back: what each must hold is said here, once, and what is wrong with one is told in one line.

Directories travel, and what is in them may be anybody's: a file is read only if it is one, and is checked for kinds,
shapes and finite numbers before anything is done with it.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xarray as xr
import yaml
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from pyro_vae.data.datasets import Kind, Schema
from pyro_vae.errors import RunError, reason_of
from pyro_vae.files import bytes_in
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.runs.seals import check_hdf5, checksum, metadata_in, without_weights

Is = Callable[[Any], bool]
"""Whether a value read from a file is what it must be."""

MOST_SETTINGS = 2**20
"""Bytes of a file of settings."""


def bytes_of(path: Path) -> bytes:
    """What a file holds.

    Args:
        path: of the file.

    Raises:
        RunError: if there is none, or it is a folder, a pipe or a device, or cannot be read.
    """
    try:
        return bytes_in(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {reason_of(error)}") from error


def text_of(path: Path) -> str:
    """The text in a file, in UTF-8.

    Raises:
        RunError: as :func:`bytes_of`, and if it is no text.
    """
    try:
        return bytes_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def damaged(path: Path, reason: object) -> RunError:
    """The one line about a file that is not what it must be."""
    return RunError(f"{path} is damaged: {' '.join(str(reason).split())}")


def json_of(path: Path) -> dict[str, Any]:
    """The content of a JSON file, which must be finite numbers and the like, by name.

    Raises:
        RunError: as :func:`text_of`, and if it is something else.
    """
    try:
        content = json.loads(text_of(path), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, f"expected an object {{...}}, got {_short(content)}")
    return content


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


class _Once(yaml.SafeLoader):
    """YAML in which no mapping names a key twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ValueError(f"{key.value} is given twice, the second time in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def yaml_of(path: Path) -> dict[str, Any]:
    """The content of a YAML file: settings by name.

    Raises:
        RunError: as :func:`text_of`, and if it is something else.
    """
    content = bytes_of(path)
    if len(content) > MOST_SETTINGS:
        raise RunError(f"{path}: more than {MOST_SETTINGS:,} bytes are no settings")
    try:
        settings = yaml.load(content.decode("utf-8"), _Once)
    except RecursionError as error:
        raise RunError(f"{path}: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path}: expected lines such as 'epochs: 10', a setting and its value, got {_short(settings)}")
    return settings


# What the entries of files are


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_size(value: Any) -> bool:
    return is_count(value) and value > 0


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_error(value: Any) -> bool:
    return is_number(value) and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def or_null(check: Is) -> Is:
    """What may be unknown, or is not finite: JSON has null for it."""
    return lambda value: value is None or check(value)


def list_of(check: Is) -> Is:
    return lambda value: isinstance(value, list) and all(map(check, value))


def dict_of(check: Is) -> Is:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


RESULT: dict[str, Is] = {
    **dict.fromkeys(("test_elbo", "test_log_likelihood"), or_null(is_number)),
    **dict.fromkeys(("test_log_likelihood_se", "mc_se"), or_null(is_error)),
    **dict.fromkeys(("num_samples", "num_images"), is_size),
    "unit": is_text,
    "share_khat_above_threshold": or_null(is_share),
    "khat_threshold": or_null(is_number),
    **dict.fromkeys(("active_units", "num_invalid"), is_count),
    **dict.fromkeys(("train_seconds", "evaluate_seconds"), is_error),
}
"""What ``result.json`` of every run holds, whatever version wrote it."""

LATER: dict[str, Is] = {
    **dict.fromkeys(("bits_per_dim", "annealed_log_likelihood", "median_ess", "kl"), or_null(is_number)),
    **dict.fromkeys(("validation_elbo", "validation_log_likelihood"), or_null(is_number)),
    **dict.fromkeys(("annealed_mc_se", "annealed_shortfall", "annealed_seconds", "kl_se"), or_null(is_error)),
    **dict.fromkeys(("validation_log_likelihood_se", "validation_mc_se"), or_null(is_error)),
    **dict.fromkeys(("annealed_share_reliable", "annealed_acceptance", "share_khat_above_0_7"), or_null(is_share)),
    **dict.fromkeys(("reliable", "annealed_reliable", "validation_reliable"), or_null(is_flag)),
    **dict.fromkeys(("annealed_images", "seed", "epochs", "num_validation_images"), or_null(is_count)),
    **dict.fromkeys(("binarization_seed", "active_units_first_500"), or_null(is_count)),
    **dict.fromkeys(("num_not_finite", "annealed_num_not_finite", "validation_num_not_finite"), or_null(is_count)),
    **dict.fromkeys(("dataset", "data", "test_set", "binarization", "commit", "device", "weights"), or_null(is_text)),
    "versions": dict_of(is_text),
    "densities": or_null(list_of(lambda value: isinstance(value, str))),  # names of columns, whatever is in them
    "active_units_by_site": dict_of(is_count),
    "kl_by_site": dict_of(or_null(is_number)),
}
"""What it may hold beside that."""

TOGETHER = {
    "share_khat_above_threshold": ("khat_threshold",),
    "annealed_log_likelihood": ("annealed_images", "annealed_mc_se"),
    "annealed_reliable": ("annealed_share_reliable",),
    "validation_log_likelihood": ("num_validation_images",),
}
"""Entries that never come alone."""

SUMMARY: dict[str, Is] = {
    **dict.fromkeys(("name", "reference", "unit"), is_text),
    **dict.fromkeys(("elbo", "log_likelihood", "difference", "bits_per_dim"), or_null(is_number)),
    **dict.fromkeys(("share_khat", "active_units", "seconds"), or_null(is_number)),
    **dict.fromkeys(("seed_error", "difference_seed_error", "difference_image_error"), or_null(is_error)),
    "differences": list_of(or_null(is_number)),
}
"""What ``result.json`` of a study holds of each contender, whatever version wrote it."""

LATER_SUMMARY: dict[str, Is] = {
    **dict.fromkeys(("importance_sampled", "validation"), or_null(is_number)),
    **dict.fromkeys(("validation_seed_error", "validation_error"), or_null(is_error)),
    "estimator": lambda value: value in ("annealed", "importance"),
}


def check_entries(path: Path, content: Mapping[str, Any], needed: Mapping[str, Is], known: Mapping[str, Is]) -> None:
    """Refuse a file in which an entry is missing, or is not what it must be; unknown ones are left alone.

    Raises:
        RunError: naming file and entry.
    """
    for name, is_right in {**needed, **known}.items():
        if name not in content:
            if name in needed:
                raise damaged(path, f"'{name}' is missing")
        elif not is_right(content[name]):
            raise damaged(path, f"'{name}' cannot be {_short(content[name])}")


def _short(value: Any) -> str:
    return text if len(text := repr(value)) < 60 else f"{text[:57]}..."


# The files of a run


def result_of(directory: Path) -> dict[str, Any]:
    """What is in ``result.json`` of a finished run.

    Raises:
        RunError: if there is none, or it is damaged.
    """
    path = directory / "result.json"
    if not os.path.lexists(path):
        raise RunError(f"{directory} holds no finished run: there is no result.json")
    content = json_of(path)
    check_entries(path, content, RESULT, LATER)
    if content.get("annealed_images") and "annealed_log_likelihood" not in content:  # null, if it is not finite
        raise damaged(path, "'annealed_log_likelihood' is missing, beside 'annealed_images'")
    for name, others in TOGETHER.items():
        if content.get(name) is not None and (missing := [each for each in others if content.get(each) is None]):
            raise damaged(path, f"'{missing[0]}' is missing, beside '{name}'")
    return content


def evidence_of(directory: Path, result: Mapping[str, Any]) -> dict[str, xr.Dataset]:
    """Estimates of each datum of a finished run, by estimator, in memory; ``result`` is that of the same directory.

    Raises:
        RunError: if there is no such file, or it is damaged, or of another run.
    """
    path = directory / "evidence.nc"
    groups = {name: _by_datum(group) for name, group in groups_of(path).items()}
    if "importance" not in groups:
        raise damaged(path, "it has no group 'importance'")
    sizes = {"importance": result["num_images"], "annealed": result.get("annealed_images")}
    for name, group in groups.items():
        check_evidence(path, name, group)
        if name in sizes and sizes[name] != group.sizes["datum"]:
            raise damaged(path, f"'{name}' has {group.sizes['datum']} data, result.json {sizes[name]}")
    mean, told = float(groups["importance"]["log_px"].mean(skipna=False)), result["test_log_likelihood"]
    if told is not None and not math.isclose(mean, told, rel_tol=1e-4, abs_tol=1e-4):
        raise damaged(path, f"its mean log p(x) is {mean:.6g}, that of result.json {told:.6g}")
    return groups


def groups_of(path: Path) -> dict[str, xr.Dataset]:
    """The groups of a netCDF file, in memory.

    Raises:
        RunError: if there is no such file, or it is none.
    """
    if not path.is_file():
        bytes_of(path)
    try:
        check_hdf5(path)
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return {name: tree[name].to_dataset().load() for name in tree.children}
    except Exception as error:  # of whichever of the libraries, at the bytes of a stranger
        raise damaged(path, f"no readable netCDF ({reason_of(error)})") from error


def _by_datum(evidence: xr.Dataset) -> xr.Dataset:
    """Evidence along ``datum``, which version 0.1.0 called ``image``."""
    return evidence.rename(image="datum") if "image" in evidence.dims else evidence


def check_evidence(path: Path, name: str, group: xr.Dataset) -> None:
    """Refuse what is no evidence by datum: numbers along one dimension, with whole numbers that count it.

    Raises:
        RunError: naming file, group and variable.
    """
    places = group.coords.get("datum")
    if places is None or places.ndim != 1 or places.dtype.kind not in "iu" or len(set(places.values)) < len(places):
        raise damaged(path, f"'{name}' has no places of data, which are different whole numbers")
    for variable in {"log_px", "mc_se", *map(str, group)}:
        found = group.get(variable)
        if found is None:
            raise damaged(path, f"'{name}' has no '{variable}'")
        if found.dims != ("datum",) or found.dtype.kind not in "fiub" or not found.size:
            raise damaged(path, f"'{variable}' of '{name}' is not one number for each datum")
    if (group["mc_se"] < 0).any():
        raise damaged(path, f"'mc_se' of '{name}' is negative")


EVALUATION: dict[str, Is] = {
    "num_images": is_size,
    **dict.fromkeys(("split", "unit", "estimator"), is_text),
    "seconds": is_error,
    "reliable": or_null(is_flag),
}
ESTIMATE: dict[str, Is] = {
    "log_likelihood": or_null(is_number),
    **dict.fromkeys(("log_likelihood_se", "mc_se", "shortfall"), or_null(is_error)),
}
BOUNDS: dict[str, Is] = {
    **dict.fromkeys(("lower", "upper", "width"), or_null(is_number)),
    "width_se": or_null(is_error),
    "share_reliable": is_share,
}


def evaluation_of(directory: Path) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    """What is in ``result.json`` of an evaluation, and its estimates of each datum, by group.

    Raises:
        RunError: if a file is not there, or damaged.
    """
    path = directory / "result.json"
    result = json_of(path)
    check_entries(path, result, EVALUATION | (BOUNDS if "width" in result else ESTIMATE), {})
    if "share_reliable" not in result:
        named: dict[str, Is] = dict.fromkeys(("share_khat_above_threshold", "khat_threshold"), or_null(is_number))
        check_entries(path, result, named, {})
    groups = groups_of(path := directory / "evidence.nc")
    if set(groups) != ({"lower", "upper"} if "width" in result else {result["estimator"]}):
        raise damaged(path, f"it has the groups {', '.join(groups) or 'of nothing'}")
    for name, group in groups.items():
        check_evidence(path, name, group)
        number = group.attrs.get("num_samples")
        if not (isinstance(number, int | np.integer) and number >= 0):
            raise damaged(path, f"'num_samples' of '{name}' cannot be {_short(number)}")
        if unknown := {str(each) for each in group} - set(Evidence._fields):
            raise damaged(path, f"'{name}' has an unknown '{min(unknown)}'")
    return result, groups


MEMORY: dict[str, Is] = {"fingerprint": or_null(is_text), "paths": dict_of(is_text)}


def memory_of(directory: Path) -> dict[str, Any]:
    """What a run remembers of its data; what it has in ``result.json`` alone was written by a program of its own.

    Raises:
        RunError: if a file is damaged.
    """
    path = directory / "data.json"
    if os.path.lexists(path):
        content = json_of(path)
        check_entries(path, content, {}, MEMORY)
        return content
    path = directory / "result.json"
    if not os.path.lexists(path):
        return {}
    check_entries(path, content := json_of(path), {}, {"data": or_null(is_text)})
    return {"fingerprint": content.get("data")}


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, none of which holds NaN, and its metadata.

    Raises:
        RunError: if there is no such file, or it is damaged.
    """
    content = bytes_of(path)
    try:
        tensors = safetensors.load(content)
        metadata = metadata_in(content)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, reason_of(error)) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise damaged(path, f"'{name}' holds NaN")
    if "checksum" in metadata and metadata["checksum"] != checksum(tensors, metadata):  # earlier versions wrote none
        raise damaged(path, "its checksum is another")
    return tensors, metadata


def weights_of(directory: Path) -> tuple[dict[str, Tensor], Schema]:
    """Weights of a trained model, on the CPU, and what it knows of its data.

    Raises:
        RunError: if there is no such file, or it is damaged.
    """
    path = directory / "model.safetensors"
    if not os.path.lexists(path):
        raise RunError(
            f"{directory} holds no trained model (there is no model.safetensors){without_weights(directory)}"
        )
    weights, metadata = tensors_of(path)
    try:
        return weights, schema_of(metadata)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, reason_of(error)) from error


def schema_of(metadata: Mapping[str, str]) -> Schema:
    """What a model must know of its data; before version 0.2.0 all were images.

    Raises:
        ValueError, KeyError or TypeError: if it is something else.
    """
    if "schema" not in metadata:
        schema = Schema(tuple(json.loads(metadata["image_shape"])))
    else:
        schema = Schema.loads(metadata["schema"])
    if not (1 <= len(schema.shape) <= 3 and all(map(is_size, schema.shape))):
        raise ValueError(f"the shape of an observation cannot be {_short(schema.shape)}")
    if not is_text(schema.noun) or not is_flag(schema.missing):
        raise ValueError("the schema is none")
    for column in (*schema.columns, *schema.condition):
        numbers = is_number(column.loc) and is_number(column.scale) and column.scale > 0
        values = all(isinstance(value, str) or is_number(value) for value in column.values)
        if not (isinstance(column.name, str) and column.kind in get_args(Kind) and numbers and values):
            raise ValueError(f"a column cannot be {_short(column)}")
    if schema.columns and len(schema.columns) != schema.size:
        raise ValueError(f"{len(schema.columns)} columns are not {schema.size} entries")
    if schema.entries not in (None, *get_args(Kind)):
        raise ValueError(f"entries of a sequence cannot be {_short(schema.entries)}")
    pixels = schema.pixels
    if pixels and not (isinstance(pixels.binarization, str) and is_count(pixels.seed) and is_size(pixels.max_value)):
        raise ValueError(f"pixels cannot be {_short(pixels)}")
    return schema
