"""Settings as they are given, in files, on command lines and in Python: refused where they are of another kind.

What a file leaves out has its default; what it gives as null, a number or a list where settings are asked for is a
mistake, and no default stands in for it.
"""

import argparse
import dataclasses
import inspect
import numbers
import re
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pyro_vae.errors import RunError
from pyro_vae.runs.factories import classes_made, imported, parameters
from pyro_vae.runs.hub import home_of, is_on_hub
from pyro_vae.runs.reading import yaml_of

LARGEST = 2**31 - 1
"""No count of anything is larger, but for seeds."""
MOST_ENTRIES, MOST_IN_A_LIST, MOST_DEPTH = 10_000, 1_000, 32
"""Of a file of settings, where each alias stands for what it names; the parser takes minutes for a list of 10,000."""
_OF_A_TRAINING = {"model", "dataset", "prior", "likelihood", "objective", "engine", "lr", "weights", "seed", "evidence"}
"""What is in each ``config.yaml`` of a training since version 0.1.0."""
_RELATIVE = ("run_dir", "run", "runs", "file", "out")


def read_settings(path: Path) -> dict[str, Any]:
    """A file of settings, whatever may be in it.

    Raises:
        RunError: beginning with the path, if it cannot be read, or is no mapping of settings.
    """
    content = yaml_of(path.expanduser())
    if "config" in content:
        raise RunError(f"{path}: a file of settings cannot name another one, by config")
    check_written(content, str(path))
    if content.keys() >= _OF_A_TRAINING:
        content.setdefault("warmup", 0.0)  # of a run that was made before there was a warm-up
    return content


def check_written(content: Any, where: str) -> None:
    """Refuse what no file of settings has: too much, too deep, and classes without a name.

    Raises:
        RunError: beginning with ``where``.
    """
    waiting, number = [(content, 0)], 0
    while waiting:
        each, depth = waiting.pop()
        number += 1
        if number > MOST_ENTRIES or depth > MOST_DEPTH:
            what = f"more than {MOST_ENTRIES:,} entries" if number > MOST_ENTRIES else f"more than {MOST_DEPTH} levels"
            raise RunError(f"{where}: {what} are no settings")
        if isinstance(each, Mapping):
            _check_class(each, where)
            waiting += [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list | tuple | set):
            if len(each) > MOST_IN_A_LIST:
                raise RunError(f"{where}: more than {MOST_IN_A_LIST:,} entries in a list are no settings")
            waiting += [(inner, depth + 1) for inner in each]


def _check_class(content: Mapping[Any, Any], where: str) -> None:
    if "class_path" in content and not (isinstance(path := content["class_path"], str) and path):
        raise RunError(f"{where}: class_path must be an import path such as my_package.MyClass, got {_shown(path)}")
    for name in ("init_args", "dict_kwargs"):
        if name in content and not isinstance(content[name], Mapping):
            raise RunError(f"{where}: {name} must be settings by their names, got {_shown(content[name])}")


def check_name(option: str, name: str) -> None:
    """Refuse a name that could name no file, or would fill more than a line.

    Raises:
        ValueError: naming the option.
    """
    if len(name.encode(errors="replace")) > 100 or not name.isprintable() or not name.strip():
        raise ValueError(f"{option}: a name has 1 to 100 printable characters, got {_shown(name)}")


def check_project(option: str, project: bool | str) -> None:
    """Refuse what is no name of a project, such as a key.

    Raises:
        ValueError: naming the option.
    """
    if isinstance(project, bool):
        return
    if re.fullmatch(r"(?=.*\d)\w{32,}|wandb_\w+", project):
        raise ValueError(f"--{option}: expected the name of a project, got what may be a key: log in with that instead")
    name = r"[\w. -]{1,100}"
    if not re.fullmatch(rf"{name}/{name}|{name}" if option == "wandb" else name, project):
        raise ValueError(f"--{option}: a name has letters, digits, '.', '_' and '-', got {_shown(project)}")


def check_trust(trust: object) -> None:
    """Refuse what is neither true nor false, nor None: text such as "no" would be true.

    Raises:
        RunError: if it is something else.
    """
    if trust is not None and not isinstance(trust, bool):
        raise RunError(f"trust must be True or False, got {_shown(trust)}")


def check_read(values: argparse.Namespace, config: type) -> None:
    """Refuse settings that the parser has read and that are of another kind; expand and complete paths among them.

    Args:
        values: as they were read, before anything is built.
        config: the class of settings.

    Raises:
        RunError: naming the option and what would be right.
    """
    hints = get_type_hints(config)
    for name, value in vars(values).items():
        vars(values)[name] = _checked(value, hints.get(name, Any), f"--{name}")


def check_made(settings: Any) -> None:
    """Refuse settings made in Python that are of another kind, and expand paths among them.

    Raises:
        ValueError: naming the option and what would be right.
    """
    hints = get_type_hints(type(settings))
    for each in dataclasses.fields(settings):
        value, kind = getattr(settings, each.name), hints[each.name]
        try:
            value = _checked(value, kind, f"--{each.name}")
        except RunError as error:
            raise ValueError(str(error)) from error
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        asked = dataclasses.is_dataclass(kind) and not isinstance(value, cast(type, kind))
        words = [each for each in kinds if get_origin(each) is Literal and _fits(value, each)]
        factory = any(get_origin(each) is Callable for each in kinds)
        if asked or (factory and not words and not callable(value)):
            raise ValueError(f"--{each.name}: expected {_wanted(kinds)}, got {_shown(value)}")
        object.__setattr__(settings, each.name, value)


def _checked(value: Any, annotation: Any, where: str, default: Any = inspect.Parameter.empty) -> Any:
    """A setting, with paths in it expanded; anything may stand where nothing is annotated."""
    union = get_origin(annotation) in (Union, types.UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if value is None and default is not None and not {type(None), Any, object} & {*filter(_is_hashable, kinds)}:
        raise RunError(f"{where}: expected {_wanted(kinds)}, got null")
    name = where.rpartition(".")[-1].removeprefix("--")
    if isinstance(value, bool | numbers.Number | str | list | tuple) and not any(_fits(value, kind) for kind in kinds):
        raise RunError(f"{where}: expected {_wanted(kinds)}, got {_shown(value)}")
    whole = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, int)]
    if whole and max(whole) > LARGEST and "seed" not in name:
        raise RunError(f"{where} must be at most {LARGEST:,}, got {_shown(max(whole))}")
    if isinstance(value, str | Path) and Path in kinds and not (str in kinds and isinstance(value, str)):
        return _expanded(value, where, name)
    if isinstance(value, list | tuple) and Sequence[Path] in kinds:
        return type(value)(_expanded(each, where, name) for each in value)
    if isinstance(value, argparse.Namespace):
        _check_inside(value, kinds, where)
    return value


def _check_inside(value: argparse.Namespace, kinds: tuple[Any, ...], where: str) -> None:
    """The settings of settings, and the arguments of a class."""
    content = vars(value)
    if "class_path" not in content:
        made = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        hints = get_type_hints(made) if made else {}
        for name, each in content.items():
            content[name] = _checked(each, hints.get(name, Any), f"{where}.{name}")
        return
    made = imported(content["class_path"], where)
    hints, arguments = parameters(made), content.get("init_args")
    if isinstance(arguments, argparse.Namespace):
        usual = _defaults(made)
        for name, each in vars(arguments).items():
            empty = inspect.Parameter.empty
            vars(arguments)[name] = _checked(each, hints.get(name, Any), f"{where}.{name}", usual.get(name, empty))


def _defaults(made: Any) -> dict[str, Any]:
    try:
        return {name: each.default for name, each in inspect.signature(made).parameters.items()}
    except (ValueError, TypeError):
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value, which is not null, may stand for this kind; of others the parser knows more."""
    origin = get_origin(kind)
    if origin is Literal:
        return isinstance(value, str | int) and value in get_args(kind)
    if dataclasses.is_dataclass(kind):
        return False
    if origin is Callable or kind is Callable:
        return isinstance(value, str)
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if kind in (str, Path):
        return isinstance(value, str)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple)
    return kind is not type(None)


def _expanded(path: str | Path, where: str, name: str) -> Path:
    """A path as it is meant; a run on the Hub is downloaded."""
    if odd := next((letter for letter in str(path) if ord(letter) < 32 or ord(letter) == 127), None):
        raise RunError(f"{where}: a path has no character {odd!r}")
    if is_on_hub(path):
        if name not in ("run", "runs"):
            raise RunError(f"{where}: only runs are read from the Hugging Face Hub; expected a path, got {path}")
        return home_of(path)
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise RunError(f"{where} {path}: {error}") from error
    return expanded if name in _RELATIVE else expanded.absolute()


def _wanted(kinds: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    found = []
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Literal:
            found.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif origin is Callable:
            made = " or ".join(sorted(each.__name__ for each in classes_made(kind)))
            found.append(f"the name or import path of a class, {made}")
        elif dataclasses.is_dataclass(kind):
            found.append(f"settings by their names, such as {dataclasses.fields(kind)[0].name}: ...")
        elif origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
            found.append("values by their names")
        elif origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
            found.append("a list, such as '[200, 200]'")
        else:
            found.append("null" if kind is type(None) else words.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(found)


def _shown(value: Any) -> str:
    text = "null" if value is None else reprlib.repr(value)  # aliases in YAML may make more of it than fits anywhere
    return text if len(text) <= 60 else f"{text[:50]}..."


def _is_hashable(kind: Any) -> bool:
    return getattr(kind, "__hash__", None) is not None
