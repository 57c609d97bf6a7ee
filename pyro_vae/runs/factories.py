"""Settings that say what is built, by class or function: checked before anything is called, and written as YAML.

A file of settings names what the program calls, and files travel. So only what a setting is annotated to make is built:
a subclass of the class named there, or a function annotated to return one. Modules that are named are imported, as
classes of one's own need; nothing else in them is called.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_vae import _moved
from pyro_vae.errors import RunError


def check_factories(settings: Mapping[str, Any], config: type) -> None:
    """Refuse what would be called and is not what the annotations of ``config`` say; nothing is called to find out.

    Args:
        settings: as they were read, before anything is built: classes as mappings with ``class_path``.
        config: the class of settings.

    Raises:
        RunError: naming the option, what was given, and what would be right.
    """
    hints = get_type_hints(config)
    for name, value in settings.items():
        _check(value, hints.get(name, Any), f"--{name}")


def _check(value: Any, annotation: Any, where: str) -> None:
    value = _plainly(value)
    if isinstance(value, Mapping):
        if "class_path" in value:
            made = imported(value["class_path"], where)
            _refuse_other(made, annotation, where, value["class_path"])
            hints = parameters(made)
            for name, each in dict(_plainly(value.get("init_args")) or {}).items():
                _check(each, hints.get(name, Any), f"{where}.{name}")
            _check(value.get("dict_kwargs"), Any, where)
        else:
            inner = get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
            for name, each in value.items():
                _check(each, inner.get(name, annotation), f"{where}.{name}")
    elif isinstance(value, list | tuple | set):
        for each in value:
            _check(each, annotation, where)
    elif callable(value) and classes_made(annotation) - {nn.Module}:
        _refuse_other(value, annotation, where, getattr(value, "__qualname__", repr(value)))


def check_own(settings: Mapping[str, Any], config: type, file: str) -> None:
    """Refuse settings of a stranger that name classes of others than this library, before anything is imported.

    Losses of Pyro and optimizers of torch are left, which reading a run back does not call.

    Args:
        settings: as a file has them, or as they were parsed.
        config: the class of settings.
        file: for the message.

    Raises:
        RunError: naming the class, and how to trust it.
    """
    hints = get_type_hints(config)
    for name, value in settings.items():
        if name not in hints:
            raise RunError(f"{file}: unknown setting {name}")
        _check_own(value, hints.get(name, Any), f"{file}: --{name}")


def _check_own(value: Any, annotation: Any, where: str) -> None:
    value = _plainly(value)
    if isinstance(value, Mapping):
        if odd := [name for name in value if {"class_path", "init_args"} & set(str(name).split(".")[1:])]:
            raise RunError(f"{where}: unknown setting {odd[0]}")
        hints = get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
        if "class_path" in value:
            hints = parameters(_own(value["class_path"], annotation, where))
            arguments, annotation = _plainly(value.get("init_args")), Any
            _check_own(value.get("dict_kwargs"), Any, where)
            value = arguments if isinstance(arguments, Mapping) else {}
        for name, each in value.items():
            _check_own(each, hints.get(name, annotation), f"{where}.{name}")
    elif isinstance(value, list | tuple | set):
        for each in value:
            _check_own(each, annotation, where)
    elif isinstance(value, str) and "." in value and _asks_for_code(annotation):
        _own(value, annotation, where)


def _plainly(value: Any) -> Any:
    return vars(value) if isinstance(value, argparse.Namespace) else value


def _asks_for_code(annotation: Any) -> bool:
    """Whether text there would be taken for the import path of a class or a function."""
    origin = get_origin(annotation)
    if annotation in (Callable, type) or origin in (Callable, type) or classes_made(annotation):
        return True
    return any(map(_asks_for_code, get_args(annotation)))


def _own(path: Any, annotation: Any, where: str) -> Any:
    """The class or function of this import path, if it is one of this library, and such as the annotation says."""
    roots = ("pyro_vae.", "pyro.infer.", "torch.optim.")
    made = imported(path, where) if isinstance(path, str) and path.startswith(roots) else None
    module = f"{getattr(made, '__module__', '')}."
    named = inspect.isclass(made) and issubclass(made, ELBO | Optimizer) and module.startswith(("pyro.", "torch."))
    if made is None or not (named or module.startswith("pyro_vae.")):
        raise RunError(
            f"{where}: {path} is no class of pyro_vae, so that this file is code; if you trust who wrote it, load it "
            "with trust=True, or by --trust true"
        )
    _refuse_other(made, annotation, where, path)
    return made


def _refuse_other(made: Any, annotation: Any, where: str, path: str) -> None:
    """Refuse ``made`` unless it is a class that the annotation names, or a function annotated to return one."""
    wanted = tuple(classes_made(annotation))
    names = " or ".join(sorted(each.__name__ for each in wanted))
    if inspect.isclass(made):
        if wanted and issubclass(made, wanted):
            return
        refusal = f"is no {names}" if wanted else "is not built there, where no class is asked for"
    else:
        returned = classes_made(_hints(made).get("return", Any)) if inspect.isroutine(made) else set()
        if wanted and returned and all(issubclass(each, wanted) for each in returned):
            return
        refusal = f"is no {names}, nor a function annotated to return one" if wanted else "is not called there"
    raise RunError(f"{where}: {path} {refusal}")


def classes_made(annotation: Any) -> set[type]:
    """The classes whose instances an annotation asks for; of a factory, those that it returns."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Callable or annotation is Callable:
        returned = classes_made(arguments[-1]) if arguments else set()
        return returned if returned - {Tensor} else returned | {nn.Module}  # a function of tensors may be a module
    if origin is type:
        return set()
    if arguments:
        return set().union(*map(classes_made, arguments))
    anything = {Any, object, type(None), bool, int, float, str, bytes, type, Path}
    return {annotation} - anything if inspect.isclass(annotation) else set()


def names_made(annotation: Any, refused: Sequence[type] = ()) -> list[str]:
    """The names of the classes that an annotation asks for, itself or as what a factory makes; some are refused."""
    made = get_args(annotation)[-1] if get_origin(annotation) is Callable else annotation
    waiting = list(get_args(made) or [made])
    names = []
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if not (inspect.isabstract(cls) or cls in refused or re.search(r"\b_|<locals>", cls.__qualname__)):
            names.append(cls.__name__)
    return sorted(set(names))


def parameters(made: Any) -> dict[str, Any]:
    """Annotations of the arguments of a function, or of a class, those of its bases included."""
    if not inspect.isclass(made):
        return _hints(made)
    hints: dict[str, Any] = {}
    for base in reversed(made.__mro__):
        if "__init__" in vars(base):
            hints |= _hints(base.__init__)
    return hints


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only, or nothing annotated
        return {}


def imported(path: Any, where: str) -> Any:
    """What an import path names; modules on the way are imported, nothing is called.

    Raises:
        RunError: if there is no such thing.
    """
    if not isinstance(path, str) or "." not in path or not all(each.isidentifier() for each in path.split(".")):
        raise RunError(f"{where}: {path!r} is no import path such as my_package.MyClass")
    names = path.split(".")
    for split in range(len(names) - 1, 0, -1):
        module = ".".join(names[:split])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")) and split > 1:
                continue
            raise RunError(f"{where}: {error}") from error
        try:
            for name in names[split:]:
                found = getattr(found, name)
        except AttributeError as error:
            raise RunError(f"{where}: {error}") from error
        return found
    raise RunError(f"{where}: there is no {path}")


# Classes that were renamed

MODULES = {
    "dataset": "pyro_vae.data",
    "prior": "pyro_vae.priors",
    "likelihood": "pyro_vae.likelihoods",
    "posterior": "pyro_vae.posteriors",
    "encoder": "pyro_vae.networks",
    "decoder": "pyro_vae.networks",
    "objective": "pyro_vae.objectives",
}
"""Where the classes of a setting are, by the path that is public."""


def present_path(setting: str, path: str) -> str:
    """The import path of a class that version 0.1.0 called ``path``, or a name without one; others are left alone."""
    module, _, name = path.rpartition(".")
    if setting not in MODULES:
        return path
    if module == "experiments.datasets":
        return f"pyro_vae.data.{name}"
    now = _moved.current(path if module else f"pyro_vae.{path}")
    return now if module or (now.startswith(f"{MODULES[setting]}.") and not now.endswith(f".{name}")) else path


def translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as read from a file, with the class paths of version 0.1.0 replaced by those of today."""
    return {str(name): _translated(str(name), value) for name, value in content.items()}


def _translated(setting: str, value: Any) -> Any:
    if isinstance(value, str):
        return present_path(setting, value)
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return value | {"class_path": present_path(setting, value["class_path"])}
    return value


def spelled(setting: str, value: Any) -> Any:
    """A setting with a class of this library under its public path, whatever path it was found by."""
    path = str(value.get("class_path")) if isinstance(value, dict) else ""
    if path.startswith("pyro_vae.") and setting in MODULES:
        made = imported(path, f"--{setting}")
        if getattr(importlib.import_module(MODULES[setting]), made.__name__, None) is made:
            return value | {"class_path": f"{MODULES[setting]}.{made.__name__}"}
    return value


def translated_option(argument: str, value: str) -> str:
    """The value of an option ``--setting``, in which a class may be called by an old name: then there is a warning."""
    setting = argument.removeprefix("--").removesuffix(".class_path")
    if setting not in MODULES:
        return value
    if value.lstrip().startswith("{"):
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        given = content.get("class_path") if isinstance(content, dict) else None
        if not isinstance(given, str) or (now := _now(argument, setting, given)) == given:
            return value
        return yaml.safe_dump(content | {"class_path": now}, default_flow_style=True, width=10**9).strip()
    return _now(argument, setting, value)


def _now(argument: str, setting: str, given: str) -> str:
    if (now := present_path(setting, given)) != given:
        warnings.warn(f"{argument} {given} is now {now}", DeprecationWarning, stacklevel=2)
    return now


# Settings that were made in Python


def plain(value: Any, where: str) -> Any:
    """A setting as YAML has it: a class, a function or a ``functools.partial`` as class_path and init_args.

    Raises:
        RunError: if it cannot be written, as a lambda cannot.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {name: plain(each, f"{where}.{name}") for name, each in fields}
    if isinstance(value, Mapping):
        return {str(name): plain(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where) for each in value]
    if isinstance(value, partial) and not value.args:
        made = plain(value.func, where)
        path = made["class_path"] if isinstance(made, dict) else made
        return {
            "class_path": path,
            "init_args": {name: plain(v, f"{where}.{name}") for name, v in value.keywords.items()},
        }
    path = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if all(each.isidentifier() for each in path.split(".")) and imported(path, where) is value:
        return {"class_path": path} if isinstance(value, type) else path
    raise RunError(
        f"{where}: {value!r} cannot be written to config.yaml: give a class, a function of a module, or "
        "functools.partial of one with named arguments"
    )


def as_partial(value: Any) -> Any:
    """A factory made by jsonargparse as a ``functools.partial`` of the class itself; anything else as it is."""
    classes = [each for each in value.args if isinstance(each, type)] if isinstance(value, partial) else []
    return partial(classes[0], **value.keywords) if classes and classes[0] is value.args[-1] else value
