"""Settings read from a command line, from files, and from Python: one parser, whose options are those of a class."""

import argparse
import difflib
import inspect
import json
import os
import pydoc
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pyro_vae.errors import RunError
from pyro_vae.runs.factories import (
    as_partial,
    check_factories,
    check_own,
    classes_made,
    names_made,
    parameters,
    plain,
    spelled,
    translated,
    translated_option,
)
from pyro_vae.runs.given import check_read, check_trust, check_written, read_settings

T = TypeVar("T")


PLACE = (
    *("run_dir", "resume", "tensorboard", "wandb", "mlflow", "report"),
    *("workers", "ray", "cpus_per_run", "gpus_per_run", "trust"),
)
"""Settings that say where and how a run is written and not what it is; ``config.yaml`` leaves them out."""
MISTAKES = (ArgumentError, ValueError, TypeError, OSError, SyntaxError)
"""What the parser and constructors raise at a user's mistakes."""


def parser(config: type, prog: str | None = None) -> ArgumentParser:
    """A parser whose options are the arguments of the class ``config``; its docstring teaches ``--help``."""
    about = getattr(config, "DESCRIPTION", None) or inspect.getdoc(inspect.getmodule(config))
    result = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=about)
    with _quietly():
        result.add_class_arguments(config, fail_untyped=False)  # a user's class may have no annotations
    result.add_argument("--config", action="config", help="a YAML file of settings, such as a run's config.yaml")
    types = get_type_hints(config)
    for action in result._actions:
        if isinstance(action.default, partial):  # a class with other options than its own defaults
            result.set_defaults({action.dest: plain(action.default, f"--{action.dest}")})
        if bool in (kind := types.get(action.dest), *get_args(kind)):
            action.nargs, action.const = "?", True  # --resume alone means --resume true
    return result


def parse(
    config: type[T],
    argv: Sequence[str] | None = None,
    first: str | None = None,
    prog: str | None = None,
    trust: bool = True,
) -> tuple[T, str]:
    """Read the command line into an instance of ``config``; return it with its YAML text, ready for ``--config``.

    With ``--resume``, settings that the command line does not name come from ``config.yaml`` in ``--run_dir``. What
    stands first, before any option, is the value of the setting ``first``, if there is one: one word, or several for a
    sequence; or, of several names with blanks between them, a word each. Without ``trust`` only classes of this library
    are imported and built.

    Raises:
        RunError: for every mistake, in one line that names the option.
        SystemExit: after ``--help`` and the like.
    """
    check_trust(trust)
    argv = _first_named(list(sys.argv[1:] if argv is None else argv), first, config)
    argv = _of_neighbours(_run_dir_for_out(argv, config), config)
    options = parser(config, prog)
    if "--help.all" in argv or {"-h", "--help"} & set(argv):
        print(options.format_help() if "--help.all" in argv else brief_help(config, options))
        raise SystemExit(0)
    told, files, contents = argv, [], []
    try:
        _refuse_empty(argv)
        argv = told = _joined(argv)
        _check_mappings(argv, config)
        run_dir, resume, files = _preview(argv)
        begins = getattr(config, "BEGINS", False)  # --resume goes on with what is there, or begins
        if resume and not (begins and (run_dir is None or not (Path(run_dir) / "config.yaml").exists())):
            if run_dir is None:
                raise RunError("--resume needs --run_dir, the directory of the run to go on with")
            saved = Path(run_dir) / "config.yaml"
            if not saved.exists():
                raise RunError(f"--resume: {run_dir} holds no run (there is no config.yaml)")
            argv, files = [f"--config={saved}", *argv], [str(saved), *files]
        contents = [_read_settings(file, options) for file in files]
        for content, file in zip(contents if not trust else [], files, strict=False):
            check_own(content, config, file)
        _forget_replaced_defaults(argv, contents, options)
        argv = _in_todays_names(argv, contents)
        with _quietly():
            read = options.parse_args(argv)
        if not trust:
            check_own({k: v for k, v in vars(read).items() if k != "config"}, config, ", ".join(files))
        result, text = _instance(config, options, read)
    except RecursionError as error:
        raise RunError("a setting is nested too deeply") from error
    except MISTAKES as error:
        raise RunError(_with_file(_one_line(str(error), config, options), told, contents, files)) from error
    except RunError as error:
        raise RunError(_with_file(str(error), told, contents, files)) from error
    return result, _kept(text)


def _with_file(message: str, argv: Sequence[str], contents: Sequence[dict[str, Any]], files: Sequence[str]) -> str:
    """A complaint, with the file of settings that has the setting it names, unless that is of the command line."""
    found = re.match(r"--(\w+)", message)
    name = found[1] if found else "config"
    if name == "config" or any(re.match(rf"--{name}\b", word) for word in argv):
        return message
    has = [file for file, each in zip(files, contents, strict=False) if name in {str(k).split(".")[0] for k in each}]
    return f"{has[-1]}: {message}" if has else message


def settings_text(settings: Any) -> str:
    """Settings that were made in Python as YAML text, ready for ``--config``, where they say where to write left out.

    Raises:
        RunError: if one of them cannot be written, or is none that the command line would take.
    """
    config = type(settings)
    options = parser(config)
    values = {each.name: plain(getattr(settings, each.name), f"--{each.name}") for each in fields(settings)}
    try:
        _forget_replaced_defaults([], [values], options)
        with _quietly():
            read = options.parse_object({name: value for name, value in values.items() if name not in PLACE})
        _, text = _instance(config, options, read)
    except MISTAKES as error:
        raise RunError(_one_line(str(error), config, options)) from error
    return _kept(text)


def _kept(text: str) -> str:
    """What ``config.yaml`` has of the settings: not where a run is written, nor an optimizer's own default rate."""
    kept = {name: value for name, value in yaml.safe_load(text).items() if name not in PLACE}
    optimizer = kept.get("optimizer")
    if isinstance(optimizer, dict):
        optimizer.get("init_args", {}).pop("lr", None)
    return yaml.safe_dump(kept, sort_keys=False)


def _instance(config: type[T], options: ArgumentParser, read: Any) -> tuple[T, str]:
    """Settings, and their YAML text, of what was read: checked before anything in it is called."""
    check_read(read, config)
    check_factories(vars(read), config)
    with _quietly():
        text = options.dump(read.clone(), skip_unset=False)
        values = {name: as_partial(value) for name, value in vars(options.instantiate(read)).items()}
    content = {name: spelled(name, value) for name, value in yaml.safe_load(text).items()}
    values.pop("config", None)
    return config(**values), yaml.safe_dump(content, sort_keys=False)


def _quietly() -> warnings.catch_warnings:
    """Context: the parser looks classes up under every name that they have, deprecated ones too."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def _first_named(argv: list[str], first: str | None, config: type) -> list[str]:
    """The command line with the words before any option given to the setting ``first``."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not (first and words):
        return argv
    names = first.split()
    if get_origin(get_type_hints(config)[names[0]]) is Sequence:
        return [f"--{first}={json.dumps(words)}", *argv[len(words) :]]
    named = [f"--{name}={word}" for name, word in zip(names, words, strict=False)]
    return [*named, *argv[len(named) :]]


def _run_dir_for_out(argv: Sequence[str], config: type) -> list[str]:
    """The command line with ``--run_dir`` for ``--out``, as experiments of version 0.1.0 called it."""
    hints = get_type_hints(config)
    old = [place for place, word in enumerate(argv) if word == "--out" or word.startswith("--out=")]
    if not old or "out" in hints or "run_dir" not in hints:
        return list(argv)
    warnings.warn("--out is now --run_dir", DeprecationWarning, stacklevel=3)
    return ["--run_dir" + word[5:] if place in old else word for place, word in enumerate(argv)]


def _of_neighbours(argv: Sequence[str], config: type) -> list[str]:
    """The command line with its own options for those that a neighbouring command calls otherwise, as ``ALSO`` says."""
    also = getattr(config, "ALSO", {})
    theirs = rf"^--({'|'.join(map(re.escape, also)) or '$^'})(?=[.=]|$)"
    return [re.sub(theirs, lambda found: f"--{also[found[1]]}", word) for word in argv]


def _in_todays_names(argv: Sequence[str], contents: Sequence[dict[str, Any]]) -> list[str]:
    """The command line with the content of each file of settings in its place, and old names of classes replaced."""
    result: list[str] = []
    given = iter(contents)
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or (value := next(arguments, ""))):
            result.append(f"--config={yaml.safe_dump(next(given), sort_keys=False)}")
        elif re.fullmatch(r"--[\w.]+", name) and equals:
            result.append(f"{name}={translated_option(name, value)}")
        elif result and argv and re.fullmatch(r"--[\w.]+", result[-1]):
            result.append(translated_option(result[-1], argument))
        else:
            result.append(argument)
    return result


# Help


def brief_help(config: type, options: ArgumentParser) -> str:
    """What ``--help`` prints: the options that matter, which are those in ``config.MAIN`` if it says."""
    hints = get_type_hints(config)
    main = getattr(config, "MAIN", tuple(hints))
    actions = {action.dest: action for action in options._actions}
    about = str(options.description)
    usage = [] if "Usage: " in about else [f"usage: {options.prog} [options]", ""]
    lines = [*usage, *about.splitlines(), "", "options:"]
    for name in main:
        if (action := actions.get(name)) is None or action.help == argparse.SUPPRESS:
            continue
        shown = action.default
        if isinstance(shown, dict):  # a class
            shown = str(shown.get("class_path")).rsplit(".", 1)[-1]
        text = str(action.help or "").rstrip(". ")
        if _is_factory(hints[name]):
            text += f": {', '.join(_classes(config, name))}, or an import path"
        elif get_origin(hints[name]) is Literal:
            text += f": {', '.join(map(str, get_args(hints[name])))}"
        required = isinstance(action.default, str) and "SUPPRESS" in action.default
        text += "" if required or shown in (None, "") else f" (default {shown})"
        lines += textwrap.wrap(text, 116, initial_indent=f"  --{name:<14} ", subsequent_indent=" " * 19)
    nested = [f"--{name}.help {_classes(config, name)[-1]}" for name in main if _is_factory(hints.get(name))][:1]
    lines += ["", "--help.all lists every option" + "".join(f"; {each} those of one class" for each in nested) + "."]
    return "\n".join(lines)


def _is_factory(annotation: Any) -> bool:
    return get_origin(annotation) is Callable


# The command line before it is parsed


def _forget_replaced_defaults(argv: Sequence[str], contents: Sequence[dict[str, Any]], options: ArgumentParser) -> None:
    """Drop the default class of each part for which one is chosen.

    Its options would otherwise stand in for the defaults of the class that is chosen.
    """
    first: dict[str, str] = {}
    for content in contents:
        for name, value in content.items():
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
        name, equals, given = str(option).partition("=")
        if re.fullmatch(r"--[\w.]+", name) and "" in ((given,) if equals else (value,)):
            raise RunError(f"{name}: the value is empty")


def _check_mappings(argv: Sequence[str], config: type) -> None:
    """Values such as ``{class_path: null}``, and pipes for files of settings, of which the parser says less."""
    for option, after in pairwise([*argv, ""]):
        name, equals, value = option.partition("=")
        value = value if equals else after
        if not re.fullmatch(r"--[\w.]+", name):
            continue
        if value.lstrip().startswith("{"):
            try:
                content = yaml.safe_load(value)
            except (ValueError, yaml.YAMLError):
                continue  # the parser says what is wrong with it
            check_written(content, name)
            continue
        setting = name.removeprefix("--").split(".")[0]
        if setting in _with_settings(config) and os.path.exists(value) and not os.path.isfile(value):
            raise RunError(f"{name}: {value} is no file of settings")


def _with_settings(config: type) -> set[str]:
    """The settings that have settings of their own, which the parser reads from a file too."""
    return {name for name, kind in get_type_hints(config).items() if is_dataclass(kind)}


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
    """Settings in a file, by the names of today; the parser's own complaints would not name the file."""
    try:
        content = read_settings(Path(file))
    except RunError as error:
        raise RunError(f"--config {error}") from error
    known = [action.dest for action in options._actions]
    for name in content:
        if not any(option.split(".")[0] == str(name).split(".")[0] for option in known):
            raise RunError(f"--config {file}: unknown setting {name}{_near(str(name), known)}")
    return translated(content)


VALUES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Path": "a path",
    "Sequence": "a list, such as '[200, 200]'",
    "NoneType": "null",
    "dict": "values by their names",
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
    if found := re.match(r"argument (--[\w.]+): expected one argument", message):
        return f"{found[1]}: expected one argument; one that begins with a minus is joined to it, as in {found[1]}=-1"
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return f"--{found[1]}.{found[2]}: there is no such option"
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    problem = re.split(r'Parser key "[^"]+": ', message)[-1]
    if found := re.match(r"--(\w+)\.help: (.*)", message):
        keys, problem = [found[1]], found[2]
    if not keys:
        return message
    option = "--" + ".".join(keys)
    if found := re.match(r"Unable to load config [\"'](.*)[\"']", problem):
        return f"{option}: expected settings by their names, as in {option}.NAME VALUE, got '{found[1]}'"
    if "Union subtypes" in problem and (told := _explain_union(option, problem, config)):
        return told
    found = re.search(r"class_path='([^']+)'", problem)
    path = found[1] if found else ""
    name = path.rsplit(".", 1)[-1]
    problem = re.sub(r"^Type .*? expects a function or a callable class: ", "", problem)
    problem = re.sub(r"\.* Got value: Namespace\(.*", "", problem)

    if found := re.search(r"Option '([^']+)' is not accepted", problem):
        option = f"{option}.{found[1]}"
        accepted = inspect.signature(cast(type, pydoc.locate(path))).parameters
        if found[1] in accepted:
            return f"{option} cannot be given: the program sets it"
        near = _near(found[1], accepted)
        return f"{option}: {name} has no such option{near}; --{keys[0]}.help {name} lists those it has"
    if found := re.search(r"the following arguments are required: (\w+)", problem):
        return f"{option}.{found[1]} must be given: {name} has no default for it"
    if re.search(
        r"import path|No module named|has no attribute|No \S+ attribute|cannot import name|subclass of", problem
    ):
        wanted = get_type_hints(config)[keys[0]] if len(keys) == 1 else parameters(pydoc.locate(path))[keys[-1]]
        classes = names_made(wanted, getattr(config, "REFUSED", ()))
        problem = re.sub(r"\.* Got value: .*", "", problem)
        if found := re.match(r"Expected a dot import path string: (\S+)", problem):
            problem = f"'{found[1]}' is no known class{_near(found[1], classes)}"
        elif found := re.match(r"(?:Import path|Expected) '?([\w.]+)'? .*?subclass of (?:<class ')?([\w |]+)", problem):
            problem = f"{found[1]} is no {found[2]}"
        return f"{option}: {problem}; choose one of {', '.join(classes)}, or an import path such as my_package.MyClass"
    if found := re.search(r"(?:Got|Given) value: ?(.*?)(?: - Expected .*|$)", problem):
        types = re.findall(r"<class '(?:\w+\.)*(\w+)'>", problem.split("Given value type")[0])
        wanted = " or ".join(str(VALUES.get(name, name)) for name in dict.fromkeys(types))
        if choices := re.search(r"Literal\[(.+?)\]", problem):
            wanted = f"one of {choices[1]}"
        if wanted:
            return f"{option}: expected {wanted}, got '{found[1]}'"
    return f"{option}: {problem}"


def _explain_union(option: str, problem: str, config: type) -> str | None:
    """Of a setting that is one of a few words, or the import path of a factory; None of others."""
    words = re.search(r"Literal\[(.+?)\]", problem)
    annotation = get_type_hints(config).get(option.removeprefix("--"))
    made = sorted(each.__name__ for each in classes_made(annotation))
    given = re.search(r"Given value: (?:Namespace\(class_path=')?([^',]*)", problem)
    if not words or not made or not given:
        return None
    if inside := re.search(r"Option '([^']+)' is not accepted.*class_path='([^']+)'", problem):
        return f"{option}.{inside[1]}: {inside[2]} has no such option"
    return f"{option}: expected {words[1]} or the import path of an {' or '.join(made)}, got '{given[1]}'"


def _near(name: str, known: Iterable[str]) -> str:
    """A question that suggests the known name nearest to a misspelt one, if there is any."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def _classes(config: type, setting: str) -> list[str]:
    """The names of the classes that can be chosen for a setting that is annotated as a factory of them."""
    return names_made(get_type_hints(config)[setting], getattr(config, "REFUSED", ()))
