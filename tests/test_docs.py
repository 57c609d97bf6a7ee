"""Pages for readers: their links lead somewhere, and their commands are understood. The site's build runs tutorials."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pyro_vae import runs

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
PAGES = [*ROOT.glob("*.md"), ROOT / "experiments/README.md", *ROOT.glob("docs/**/*.md"), *TUTORIALS]


def text_of(page: Path) -> str:
    """What a page says; of a notebook, in its cells of text."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(name: str) -> list[str]:
    """The commands that begin with ``name``, in blocks and in lines of text, without their comments."""
    text = "\n".join(text_of(page) for page in PAGES).replace("\\\n", " ")
    found = re.findall(rf"^    ({name} .*)$", text, flags=re.MULTILINE) + re.findall(rf"`({name} .*?)`", text)
    return sorted({" ".join(each.split(" #")[0].split()) for each in found})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = text_of(page)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'<img src="([^":]+)"', text)
    for link in links:
        target = (page.parent / link).resolve()
        assert target.exists() or target.with_suffix(".md").exists(), link


def test_commands_that_train_are_understood(monkeypatch, tmp_path):
    (tmp_path / "my_parts.py").write_text(
        "from pyro_vae import MLP, StandardNormal\n"
        "class Horseshoe(StandardNormal):\n"
        "    def __init__(self, latent_dim: int, scale: float = 1.0):\n"
        "        super().__init__(latent_dim)\n"
        "class Clock(StandardNormal):\n"
        "    def __init__(self, latent_dim: int, radius: float = 3.0):\n"
        "        super().__init__(latent_dim)\n"
        "class Wide(MLP):\n"
        "    def __init__(self, in_features: int, out_features: int, width: int = 300, image_shape=None):\n"
        "        super().__init__(in_features, out_features)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = [each for each in commands("pyro-vae train") if "--help" not in each and ".help" not in each]
    assert len(found) >= 8
    for command in found:
        settings, _ = runs.parse(runs.Settings, shlex.split(command)[2:])
        assert isinstance(settings, runs.Settings), command


def test_commands_that_score_are_understood():
    found = [each for each in commands("pyro-vae evaluate") if "RUN" not in each]
    assert len(found) >= 4
    for command in found:
        settings, _ = runs.parse(runs.EvaluationSettings, shlex.split(command)[2:], first="run")
        assert settings.run, command


def test_experiments_that_are_named_exist():
    found = commands("python -m experiments")
    names = {re.match(r"python -m experiments\.(\w+)", each) for each in found} - {None}
    names |= set(re.finditer(r"experiments\.(\w+)", "".join(text_of(page) for page in PAGES)))
    assert len(names) > 20
    for name in names:
        place = ROOT / "experiments" / name[1]
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name[0]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_kept_without_outputs_and_installs_first(path):
    content = path.read_text()
    notebook = json.loads(content)
    (address,) = re.findall(r'^repository = "(.+?)"', (ROOT / "docs/conf.py").read_text(), flags=re.MULTILINE)
    first, install, *_ = ("".join(cell["source"]) for cell in notebook["cells"])
    page = path.relative_to(ROOT).as_posix()
    assert re.findall(r"\]\((https://colab[^)\s]*/github/[^)\s]+)\)", first) == [
        f"https://colab.research.google.com/github/{address}/blob/main/{page}"
    ]
    assert install == (
        'import importlib.util\n\nif importlib.util.find_spec("pyro_vae") is None:\n'
        f'    %pip install --quiet "pyro-vae[runs] @ git+https://github.com/{address}"'
    )
    assert re.findall(r"github\.?c?o?m?/([\w-]+/[\w-]+)", content) == [address] * 2
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not re.search(r"(?<![\w.:/])/(home|tmp|root|work|usr|mnt|content|Users)/", content)
    assert f"tutorials/{path.stem}\n" in (ROOT / "docs/index.md").read_text()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_valid_notebook(path):
    nbformat = pytest.importorskip("nbformat", exc_type=ImportError)  # of the extra docs
    nbformat.validate(nbformat.read(path, as_version=4))


def test_tutorials_do_not_repeat_other_pages():
    def sentences(page):
        prose = re.sub(r"```.*?```|^    .*?$|^[|#].*?$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        found = (" ".join(each.split()) for each in re.split(r"(?<=[.?!])\s", prose))
        return {each for each in found if len(each) > 40}

    seen: dict[str, Path] = {}
    for page in PAGES:
        for each in sentences(page) if page in TUTORIALS or "docs" in page.parts else ():
            assert seen.setdefault(each, page) == page or page not in TUTORIALS, each
