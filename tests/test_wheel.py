"""What `pip install pyro-vae` brings: the wheel, from a folder of its own, without the checkout and without extras."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "pyro-ppl": "pyro"}


def names(requirements):
    """The modules of a list of requirements."""
    found = [re.match(r"[\w-]+", each)[0] for each in requirements]
    return {IMPORTED_AS.get(name, name) for name in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that what a build leaves does not stay in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyro_vae", "experiments", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder, folder / "source"], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder that holds the package and nothing else."""
    target = wheel.parent / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, target, wheel], check=True)
    return target


def run(installed, program, without=()):
    """A program in an interpreter that sees the folder and the packages of this environment, but not the checkout.

    Its site module is off, which would run the hooks of editable installs; modules of ``without`` are not found.
    """
    paths = [str(installed), *dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))]
    program = (
        f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {set(without)} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.path += {paths}
import pyro_vae
assert pyro_vae.__file__.startswith({str(installed)!r}), pyro_vae.__file__
"""
        + program
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=installed, capture_output=True, text=True, check=False
    )


TRAIN = """
import torch
from pyro_vae import MLP, VAE, Bernoulli, CompiledSVI, Conditional, MeanField, StandardNormal, fit, importance_sampling
from pyro_vae.posteriors import Flow

x = torch.bernoulli(torch.full((64, 16), 0.3))
vae = VAE(
    StandardNormal(2),
    likelihood=Conditional(MLP(2, 16, hidden=[8]), Bernoulli(16)),
    posterior=Conditional(MLP(16, 4, hidden=[8]), MeanField(2)),
)
vae.initialize(x)
history = fit(vae, [x] * 5, epochs=2, progress=False)
svi = CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), 1e-3), compiler="none")
losses = [svi.step(x).item() for _ in range(3)]
log_px = importance_sampling(vae.model, vae.guide, x, num_samples=10).log_px
assert log_px.shape == (64,) and log_px.isfinite().all() and len(history) == 2 and all(loss > 0 for loss in losses)
Flow(2)  # zuko is no extra
from pyro_vae import testing
testing.check_posterior(MeanField)
try:
    import experiments
except ModuleNotFoundError:
    pass  # it is the wheel that trained, and they are not installed
else:
    raise AssertionError("experiments are there")
"""


EVIDENCE = "import torch; from pyro_vae import Evidence; Evidence(*[torch.zeros(3)] * 6).to_dataset()"
NEED_AN_EXTRA = "import pyro_vae.data", "from pyro_vae import runs", "import pyro_vae.runs.build", EVIDENCE


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_no_more(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"pyro_vae"}
    files = [path for path in (ROOT / "pyro_vae").rglob("*") if path.suffix in (".py", ".pyi", ".html", ".css", ".js")]
    source = {str(path.relative_to(ROOT)) for path in files} | {"pyro_vae/py.typed"}
    assert {name for name in held if ".dist-info/" not in name} == source


@pytest.mark.slow
def test_it_trains_where_no_extra_is_installed(installed):
    done = run(installed, TRAIN, without=names(EXTRAS["runs"]))
    assert done.returncode == 0, done.stderr


def test_it_needs_what_it_says():
    """What training imports: the rooms that need no extra."""
    rooms = ("infer", "parts", "testing")
    files = [path for path in (ROOT / "pyro_vae").rglob("*.py") if path.parent.name in ("pyro_vae", "evidence", *rooms)]
    imported = {
        name.partition(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names(PROJECT["dependencies"]) <= imported


@pytest.mark.slow
def test_a_missing_extra_is_named(installed):
    program = f"""
from pyro_vae.errors import MissingExtra
for program in {NEED_AN_EXTRA}:
    try:
        exec(program)
    except MissingExtra as error:
        print(error)
"""
    done = run(installed, program, without=names(EXTRAS["runs"]))
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == len(NEED_AN_EXTRA)
    for line in told:
        assert re.fullmatch(r".* pip install -e '\.\[runs\]' in its checkout \(missing: .*\)", line)


@pytest.mark.slow
def test_the_command_is_one_line_without_the_extra(installed):
    (package,) = distributions(path=[str(installed)])
    script = package.entry_points["pyro-vae"].value
    module, _, function = script.partition(":")
    program = f"from {module} import {function}; {function}(['train'])"
    done = run(installed, program, without=names(EXTRAS["runs"]))
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* pip install -e '\.\[runs\]' in its checkout \(missing: .*\)\n", done.stderr)
    everything = "from pyro_vae import data, runs\nfor name in pyro_vae.__all__: getattr(pyro_vae, name)\n"
    with_it = run(installed, everything + f"from {module} import {function}; {function}(['train', '--help'])")
    assert with_it.returncode == 0, with_it.stderr
    assert with_it.stdout.startswith("usage: pyro-vae train")


def test_the_extras_hold_each_other():
    assert "pyro-vae[runs]" in EXTRAS["test"]
    assert "pyro-vae[runs]" in EXTRAS["docs"]
    assert not names(EXTRAS["runs"]) & names(PROJECT["dependencies"])
