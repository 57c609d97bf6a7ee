"""Command line and run directories, shared by all experiments."""

import argparse
import difflib
import inspect
import pydoc
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

import pyro_vae
from pyro_vae.errors import RunError

T = TypeVar("T")


PLACE = ("run_dir", "resume", "tensorboard")
"""Settings that say where a run is written and not what it is; ``config.yaml`` leaves them out."""


def parser(config: type) -> ArgumentParser:
    """A parser whose options are the arguments of the class ``config``; its docstring teaches ``--help``."""
    result = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=inspect.getdoc(inspect.getmodule(config))
    )
    result.add_class_arguments(config, fail_untyped=False)  # a user's class may have no annotations
    result.add_argument("--config", action="config", help="a YAML file of settings, such as a run's config.yaml")
    types = get_type_hints(config)
    for action in result._actions:
        if bool in (kind := types.get(action.dest), *get_args(kind)):
            action.nargs, action.const = "?", True  # --resume alone means --resume true
    return result


def parse(config: type[T], argv: Sequence[str] | None = None, first: str | None = None) -> tuple[T, str]:
    """Read the command line into an instance of ``config``; return it with its YAML text, ready for ``--config``.

    With ``--resume``, settings that the command line does not name come from ``config.yaml`` in ``--run_dir``. A value
    that stands first, before any option, is that of the setting ``first``, if there is one.

    Raises:
        RunError: for every mistake, in one line that names the option.
        SystemExit: after ``--help`` and the like.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if first and argv and not argv[0].startswith("-"):
        argv[0] = f"--{first}={argv[0]}"
    options = parser(config)
    try:
        _refuse_empty(argv)
        argv = _joined(argv)
        run_dir, resume, files = _preview(argv)
        if resume:
            if run_dir is None:
                raise RunError("--resume needs --run_dir, the directory of the run to go on with")
            saved = Path(run_dir) / "config.yaml"
            if not saved.exists():
                raise RunError(f"--resume: {run_dir} holds no run (there is no config.yaml)")
            argv, files = [f"--config={saved}", *argv], [str(saved), *files]
        _forget_replaced_defaults(argv, files, options)
        settings = options.parse_args(argv)
        text = options.dump(settings.clone(), skip_unset=False)
        instance = options.instantiate(settings)
        values = {name: value for name, value in vars(instance).items() if name != "config"}
        result = config(**values)
    except (ArgumentError, ValueError, TypeError, OSError, SyntaxError) as error:
        raise RunError(_one_line(str(error), config, options)) from error
    kept = {name: value for name, value in yaml.safe_load(text).items() if name not in PLACE}
    return result, yaml.safe_dump(kept, sort_keys=False)


def _forget_replaced_defaults(argv: Sequence[str], files: Sequence[str], options: ArgumentParser) -> None:
    """Drop the default class of each part for which one is chosen.

    Its options would otherwise stand in for the defaults of the class that is chosen.
    """
    first: dict[str, str] = {}
    for file in files:
        for name, value in _read_settings(file, options).items():
            chosen = isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)
            first.setdefault(name, name if chosen else "")
    for argument in argv:
        name = argument.split("=")[0].removeprefix("--")
        first.setdefault(name.split(".")[0], name)
    defaults = {action.dest: action.default for action in options._actions}
    replaced = (name for name, seen in first.items() if seen == name)
    options.set_defaults({name: None for name in replaced if isinstance(defaults.get(name), dict)})


def _refuse_empty(argv: Sequence[str]) -> None:
    """An empty value, as an unset shell variable leaves it, would be read as the current directory or worse."""
    for option, value in pairwise([*argv, None]):
        name, equals, given = option.partition("=")
        if re.fullmatch(r"--[\w.]+", name) and "" in ((given,) if equals else (value,)):
            raise RunError(f"{name}: the value is empty")


def _joined(argv: Sequence[str]) -> list[str]:
    """Arguments in which values such as -.inf and -1e3, which look like options, are joined to their option by =."""
    result: list[str] = []
    for argument in argv:
        after_option = result and re.fullmatch(r"--[\w.]+", result[-1])
        if after_option and re.fullmatch(r"-(\d*\.?\d+(e[-+]?\d+)?|\.?inf)", argument, re.IGNORECASE):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result


def _preview(argv: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """The run directory, whether to resume and the files of settings: needed before the rest can be understood."""
    preview = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    preview.add_argument("--run_dir")
    preview.add_argument("--resume", nargs="?", const="true", default="false")
    preview.add_argument("--config", action="append", default=[])
    known, _ = preview.parse_known_args(argv)
    return known.run_dir, known.resume.lower() == "true", known.config


def _read_settings(file: str, options: ArgumentParser) -> dict[str, Any]:
    """Refuse a file of settings that cannot be read; the parser's own complaints do not name it."""
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise RunError(f"--config {file}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"--config {file} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RunError(f"--config {file}: expected lines such as 'epochs: 10', a setting and its value")
    known = [action.dest for action in options._actions]
    for name in content:
        if not any(option.split(".")[0] == str(name).split(".")[0] for option in known):
            raise RunError(f"--config {file}: unknown setting {name}{_near(str(name), known)}")
    return content


VALUES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Path": "a path",
    "Sequence": "a list, such as '[200, 200]'",
    "NoneType": "null",
}


def _one_line(message: str, config: type, options: ArgumentParser) -> str:
    """The parser's complaint, which runs over several lines, as one that names the option and what would be right."""
    message = re.sub(r"NestedArg\(key='(\w+)', val='?(.*?)'?\)", r"\1 \2", " ".join(message.split()))
    try:
        return _explain(message, config, options)
    except Exception:  # the parser's wording varies between versions: what is not understood stays as it is
        return message


def _explain(message: str, config: type, options: ArgumentParser) -> str:
    if found := re.match(r"the following arguments are required: (\S+)", message):
        return f"--{found[1]} must be given"
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        known = [option for action in options._actions for option in action.option_strings]
        inside = [option for option in known if option.startswith(name.split(".")[0] + ".")]
        return f"unknown option {name}{_near(name, inside or known)}; --help lists the options"
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    problem = re.split(r'Parser key "[^"]+": ', message)[-1]
    if found := re.match(r"--(\w+)\.help: (.*)", message):
        keys, problem = [found[1]], found[2]
    if not keys:
        return message
    option = "--" + ".".join(keys)
    found = re.search(r"class_path='([^']+)'", problem)
    path = found[1] if found else ""
    name = path.rsplit(".", 1)[-1]
    problem = re.sub(r"^Type .*? expects a function or a callable class: ", "", problem)
    problem = re.sub(r"\.* Got value: Namespace\(.*", "", problem)

    if found := re.search(r"Option '([^']+)' is not accepted", problem):
        option = f"{option}.{found[1]}"
        accepted = inspect.signature(pydoc.locate(path)).parameters
        if found[1] in accepted:
            return f"{option} cannot be given: the program sets it"
        near = _near(found[1], accepted)
        return f"{option}: {name} has no such option{near}; --{keys[0]}.help {name} lists those it has"
    if found := re.search(r"the following arguments are required: (\w+)", problem):
        return f"{option}.{found[1]} must be given: {name} has no default for it"
    if re.search(r"import path|No module named|has no attribute|cannot import name|subclass of", problem):
        classes = _classes(config, option.removeprefix("--"))
        problem = re.sub(r"\.* Got value: .*", "", problem)
        if found := re.match(r"Expected a dot import path string: (\S+)", problem):
            problem = f"'{found[1]}' is no known class{_near(found[1], classes)}"
        elif found := re.match(r"Expected '(\S+)' to be a subclass of (?:<class ')?([\w |]+)", problem):
            problem = f"{found[1]} is no {found[2]}"
        return f"{option}: {problem}; choose one of {', '.join(classes)}, or an import path such as my_package.MyClass"
    if found := re.search(r"(?:Got|Given) value: ?(.*)", problem):
        types = re.findall(r"<class '(?:\w+\.)*(\w+)'>", problem.split("Given value type")[0])
        wanted = " or ".join(VALUES.get(name, name) for name in dict.fromkeys(types))
        if choices := re.search(r"Literal\[(.+?)\]", problem):
            wanted = f"one of {choices[1]}"
        if wanted:
            return f"{option}: expected {wanted}, got '{found[1]}'"
    return f"{option}: {problem}"


def _near(name: str, known: Iterable[str]) -> str:
    """A question that suggests the known name nearest to a misspelt one, if there is any."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def _classes(config: type, setting: str) -> list[str]:
    """The names of the classes that can be chosen for a setting that is annotated as a factory of them."""
    made = get_args(get_type_hints(config)[setting])[-1]
    waiting = list(get_args(made) or [made])
    names = []
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if not inspect.isabstract(cls) and not re.search(r"\b_|<locals>", cls.__qualname__):
            names.append(cls.__name__)
    return sorted(set(names))


def cli(main: Callable[[], object]) -> None:
    """Run ``main`` as a program: a user's mistake is one line on stderr and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except (RunError, pyro_vae.NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: out of memory ({textwrap.shorten(str(error), 200)}); try smaller sizes", file=sys.stderr)
        sys.exit(2)
