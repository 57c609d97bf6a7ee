"""Imports point one way: a file imports from rooms below it, never up, never in a circle; and infer stays light."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors",
    "files helping",
    "infer",
    "parts",
    "data optimizers callbacks",
    "vae linear handrolled training",
    "semi_supervised hierarchical",
    "testing",
    "runs",
    "cli",
    "__main__ experiments",
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
LEVELS |= {"_moved": 0, "": 0}  # the package itself holds its version and no more; what it lists is elsewhere


@cache
def files():
    """The modules of the library and the experiments, by name."""
    paths = [*ROOT.glob("pyro_vae/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def listed():
    """Where the public names of the package are, by its stub."""
    stub = ast.parse((ROOT / "pyro_vae" / "__init__.pyi").read_text())
    return {
        alias.name: ".".join(filter(None, ["pyro_vae", node.module, alias.name]))
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def module_of(path):
    """The module that a dotted path names, or that holds what it names; None for one of others."""
    while path and path not in files():
        path = path.rpartition(".")[0]
    return path or None


@cache
def imported(name, source=None):
    """The modules of ours that a module imports, at its top or inside a function."""
    tree = ast.parse(files()[name].read_text() if source is None else source)
    paths = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths += [alias.name for alias in node.names if alias.name != "pyro_vae"]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: an import relative to the file"
            paths += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pyro_vae":
            paths.append(f"pyro_vae.{node.attr}")
    resolved = (listed().get(path.removeprefix("pyro_vae."), path) if "pyro_vae." in path else path for path in paths)
    return {module for path in resolved if (module := module_of(path))} - {name}


def level(name):
    package, _, inside = name.partition(".")
    return LEVELS["experiments" if package == "experiments" else inside.partition(".")[0]]


def uphill(name, source=None):
    """The imports of a module that do not point downwards."""
    wrong = []
    for other in sorted(imported(name, source)):
        same_room = name.split(".")[:2] == other.split(".")[:2] and name.count(".") + name.startswith("pyro_vae.") > 1
        if level(other) > level(name) or (level(other) == level(name) > 0 and not same_room and other != "experiments"):
            wrong.append(f"{name} imports {other}")
    return wrong


def arrows():
    """Which module imports which; a package's own list of names is no arrow of the modules in it."""
    return {name: imported(name) for name in files()}


def test_every_module_has_a_place():
    for name in files():
        level(name)  # a KeyError names a room that the order does not know


def test_imports_point_downwards():
    assert not [wrong for name in files() for wrong in uphill(name)]


def test_no_circles():
    # a package imports its modules, which may import each other, but not the package
    list(TopologicalSorter(arrows()).static_order())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("pyro_vae.infer.programs", "from pyro_vae.parts import priors"),
        ("pyro_vae.infer.programs", "def f():\n    from pyro_vae.vae import VAE"),
        ("pyro_vae.infer.programs", "from pyro_vae import VAE"),
        ("pyro_vae.infer.programs", "import pyro_vae\ny = pyro_vae.VAE"),
        ("pyro_vae.parts.priors", "from pyro_vae.data.images import Data"),
        ("pyro_vae.training", "from pyro_vae import runs"),
        ("pyro_vae.training", "from pyro_vae.linear import LinearGaussianVAE"),
        ("pyro_vae.data.images", "import pyro_vae.runs.build"),
        ("pyro_vae.runs.build", "from experiments.benchmark import programs"),
        ("experiments.benchmark.programs", "from experiments.derivation import Config"),
    ],
)
def test_an_upward_import_is_seen(name, source):
    assert uphill(name, source)


def test_a_circle_is_seen():
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert "pyro_vae.infer" in imported("pyro_vae.infer.programs", "import pyro_vae.infer")


def loaded(*programs):
    """The top-level modules, not of the standard library, that one fresh interpreter has loaded after each program."""
    told = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})\n"
    code = "".join(program + told for program in programs)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [set(line.split()) - sys.stdlib_module_names for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_infer_loads_nothing_but_torch_pyro_numpy_and_tqdm_and_leaves_validation_as_it_was():
    asked = "import pyro; from torch.distributions import Distribution; before = Distribution._validate_args"
    # zuko switches validation off for all of torch, which would score grey pixels under a Bernoulli without a word
    left = "import pyro_vae.infer.flows; pyro_vae.infer.flows.import_zuko(); "
    left += "assert before and Distribution._validate_args == before"
    pyros, basis, everything, _ = loaded(asked, "import numpy, tqdm", "import pyro_vae.infer", left)
    assert everything - basis <= {"pyro_vae", "lazy_loader"}
    # what numpy and tqdm bring by themselves must not hide one of these
    heavy = {"zuko", "xarray", "arviz", "matplotlib", "torchvision", "sklearn", "jsonargparse", "scipy"}
    assert not (everything - pyros) & heavy


def test_the_package_alone_loads_no_torch():
    (found,) = loaded("import pyro_vae")
    assert "torch" not in found
