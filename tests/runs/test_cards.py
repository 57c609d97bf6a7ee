"""Model cards: what they say is what the run says, and what strangers wrote stays text."""

import re
from pathlib import Path

import pytest
import yaml

from pyro_vae import cli, runs
from pyro_vae.errors import RunError
from pyro_vae.runs.cards import card, foreign_classes, plain

TABLE = """<script>alert(1)</script>,b|c,kind
1.0,2.5,x
2.0,3.5,y
2.5,1.5,"**y**"
"""
NASTY = "<script>alert(1)</script> [a](http://b.c) | `x` $y$ @z\n---\n# h"
MINUTE = [
    *("--engine=pyro", "--epochs=1", "--encoder.hidden=[4]", "--decoder.hidden=[4]", "--latent_dim=2", "--device=cpu"),
    *("--evidence.num_samples=5", "--evidence.num_images=2", "--evidence.annealed_images=0", "--report=false"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a table whose names are not kind."""
    place = tmp_path_factory.mktemp("cards")
    (place / "own.csv").write_text(TABLE + 20 * "1.5,2.0,x\n1.0,2.2,y\n2.0,2.2,**y**\n")
    cli.train([*MINUTE, "--dataset=Table", f"--dataset.path={place}/own.csv", f"--run_dir={place}/run"])
    return runs.load(place / "run")


def parts(text):
    """The metadata, and the Markdown after them."""
    _, head, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), body


def test_a_card_says_what_the_run_says(run):
    metadata, body = parts(card(run, "MIT"))
    (index,) = metadata["model-index"]
    (metric,) = index["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(run.result["test_log_likelihood"], abs=1e-4)
    assert run.result["unit"] in metric["name"]
    assert metadata["license"] == "mit"
    assert f"**{run.result['test_log_likelihood']:.2f}**" in body
    assert "| \\--latent\\_dim | 2 | 50 |" in body
    assert "| \\--dataset.path | own.csv |" in body  # and not the folder that it was in
    assert str(run.path) not in card(run)


def test_without_a_licence_none_is_invented(run):
    metadata, body = parts(card(run))
    assert "license" not in metadata
    assert "No licence was said" in body
    for wrong in ("my own licence", "a: b", "", 3):
        with pytest.raises(RunError, match="--license: expected an identifier such as apache"):
            card(run, wrong)


def test_what_strangers_wrote_stays_text(run):
    text = card(run)
    assert "<script" not in text
    assert "b\\|c" in text
    assert "\\*\\*y\\*\\*" in text
    shown = plain(NASTY)
    assert "\n" not in shown
    assert not re.search(r"[<>$@]|://|(?<!\\)[\[\]`|]", shown)
    assert plain("- a") == "\\- a"
    assert plain("1. a") == "1\\. a"
    assert plain("-1.5") == "\\-1.5"


def test_a_number_that_is_none_is_not_in_the_metadata(run):
    lost = runs.Run(run.path, {**run.result, "test_log_likelihood": None, "num_not_finite": 2}, run.evidence)
    metadata, body = parts(card(lost))
    assert "model-index" not in metadata
    assert "log p(x) is no number" in body


def test_classes_of_others_are_named(tmp_path):
    text = "prior: {class_path: my_own.Prior, init_args: {inner: [{class_path: other.Part}]}}\nlikelihood: pyro_vae.X\n"
    Path(tmp_path / "config.yaml").write_text(text)
    assert set(foreign_classes(tmp_path)) == {"my_own.Prior", "other.Part"}


def test_hugging_face_reads_it(run):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card(run, "apache-2.0")).data
    assert data.license == "apache-2.0"
    assert data.library_name == "pyro_vae"
    assert data.eval_results[0].metric_value == pytest.approx(run.result["test_log_likelihood"], abs=1e-4)
