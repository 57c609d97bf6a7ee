"""Pages for readers: their links lead somewhere, and their commands are understood. The site's build runs tutorials."""

import re
import shlex
from pathlib import Path

import pytest

from pyro_vae import runs

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "experiments/README.md", *ROOT.glob("docs/**/*.md")]


def commands(name: str) -> list[str]:
    """The commands that begin with ``name``, in blocks and in lines of text, without their comments."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(rf"^    ({name} .*)$", text, flags=re.MULTILINE) + re.findall(rf"`({name} .*?)`", text)
    return sorted({" ".join(each.split(" #")[0].split()) for each in found})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text()
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
    names |= set(re.finditer(r"experiments\.(\w+)", "".join(page.read_text() for page in PAGES)))
    assert len(names) > 20
    for name in names:
        place = ROOT / "experiments" / name[1]
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name[0]
