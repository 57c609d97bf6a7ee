"""Reports: one file that fetches nothing and executes nothing of data or names, and says what the run's files say."""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from PIL import Image
from scipy import stats

from pyro_vae import cli, runs
from pyro_vae.callbacks import Epoch
from pyro_vae.data.datasets import Column, Schema
from pyro_vae.data.sequences import SequenceData
from pyro_vae.errors import RunError
from pyro_vae.runs import reporting, training
from pyro_vae.runs.comparing import Difference, Gaps
from pyro_vae.runs.reporting import contents, drawing, page, showing, svg, words
from pyro_vae.runs.reporting import searched as searching_page

OLD = Path(__file__).parent / "data" / "0.1.0"
EVIL = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "a\"b'c", "x\u2028y", "$\\frac{a$ & b"]
TINY = [
    *(
        "--dataset=Digits",
        "--latent_dim=3",
        "--encoder.hidden=[8]",
        "--decoder.hidden=[8]",
        "--epochs=2",
        "--device=cpu",
    ),
    *("--evidence.num_samples=50", "--evidence.num_images=60", "--evidence.annealed_images=20"),
    "--evidence.annealing.num_temperatures=3",
]


class Seen(HTMLParser):
    """What a browser would see of a page: elements, scripts, texts and ids."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.words = [], [], [], []
        self._inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = (tag, dict(attrs), [])

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[0]:
            (self.scripts if tag == "script" else self.styles).append((self._inside[1], "".join(self._inside[2])))
            self._inside = None

    def handle_data(self, data):
        (self._inside[2] if self._inside else self.words).append(data)

    @property
    def text(self):
        """What is read, with hyphens for minus signs."""
        return " ".join(" ".join(self.words).split()).replace("\u2212", "-")

    def rows(self, place=0):
        """The content of a sortable table."""
        return [json.loads(text) for attrs, text in self.scripts if attrs.get("type") == "application/json"][place]


def check_safe(text):
    """A page is small, asks for nothing, and its policy names its one script and its one style."""
    seen = Seen(text)
    assert len(text.encode()) < 3_000_000
    assert text.startswith("<!doctype html>")
    (code,) = (script for attrs, script in seen.scripts if "type" not in attrs)
    ((_, style),) = seen.styles
    policy = next(attrs["content"] for tag, attrs in seen.elements if attrs.get("http-equiv"))
    for kind, content in (("script", code), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag, attrs in seen.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        for name in ("src", "href", "xlink:href"):
            link = attrs.get(name) or "#"
            assert link.startswith(("#", "data:image/png;base64,")) or link.endswith("/report.html"), (tag, link)
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs["role"] == "img"
            assert attrs["aria-label"]
        if tag == "th" and "aria-sort" in attrs:
            assert attrs["scope"] == "col"
    ids = Counter(attrs["id"] for _, attrs in seen.elements if "id" in attrs)
    assert not [name for name, count in ids.items() if count > 1]
    referred = {link[1:] for _, attrs in seen.elements for link in (attrs.get("href") or "",) if link.startswith("#")}
    assert referred <= set(ids)
    return seen


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs that differ by their seed, one of which wrote its page at the end."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "report_after", reporting.report_after)
        first = cli.train([*TINY, f"--run_dir={folder / 'a'}"])
    return first, cli.train([*TINY, "--seed=1", f"--run_dir={folder / 'b'}", "--report=false"])


@pytest.fixture(scope="module")
def seen(pair):
    return check_safe((pair[0].path / "report.html").read_text())


def test_training_writes_its_page_unless_it_is_told_not_to(pair, seen):
    assert seen.text.startswith("Run a")
    assert not (pair[1].path / "report.html").exists()
    assert "report" not in (pair[0].path / "config.yaml").read_text()


def test_it_says_what_was_found_and_what_was_set(pair, seen):
    result = pair[0].result
    told = contents.belief(contents.Told("a", pair[0], contents.history_of(pair[0].path)))
    assert f"log p(x) is {result['annealed_log_likelihood']:.2f}" in seen.text
    assert not [word for word in seen.words if re.search(r"(^|\s)-\d+\.\d\d", word)]
    assert told[1].answer in seen.text
    assert "--latent_dim 3 50" in seen.text  # here, and by default
    assert seen.text.index("--latent_dim") < seen.text.index("Settings that are the defaults")
    assert seen.text.index("Settings that are the defaults") < seen.text.index("--batch_size 256")
    assert "2 epochs" in seen.text
    assert "--binarization_seed" not in seen.text[: seen.text.index("Settings that are the defaults")]


def test_the_table_holds_the_evidence(pair, seen):
    content, importance = seen.rows(), pair[0].importance
    by = {column["title"]: column for column in content["columns"]}
    assert by["image"]["values"] == list(range(60))
    for title, name in (("log p(x)", "log_px"), ("error", "mc_se"), ("k", "khat"), ("ESS", "ess")):
        expected = [
            round(v, by[title]["digits"]) if math.isfinite(v) else None for v in importance[name].values.tolist()
        ]
        assert by[title]["values"] == expected
    drawn = [place for place, value in enumerate(by["annealed"]["values"]) if value is not None]
    assert drawn == pair[0].annealed["datum"].values.tolist()
    assert by["class"]["values"] == pair[0].data.test_labels[:60].tolist()


def test_the_data_themselves_are_shown(pair, seen):
    x = pair[0].data.test
    for place, png in seen.rows()["pictures"].items():
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))
        assert np.array_equal(pixels < 128, x[int(place)].reshape(8, 8).numpy() > 0.5)  # as ink on paper
    assert len(seen.rows()["pictures"]) == 60
    log_px, annealed = pair[0].importance["log_px"].values.astype(float), pair[0].annealed
    log_px[annealed["datum"].values] = annealed["log_px"].values
    shown = re.findall(r"(\d+): log p\(x\) (-[\d.]+), (k|annealed)", seen.text)
    worst, drawn = np.argsort(log_px)[:10], set(annealed["datum"].values.tolist())
    expected = [(str(place), f"{log_px[place]:.1f}", "annealed" if place in drawn else "k") for place in worst]
    assert expected == shown[:10]
    assert [str(place) for place in np.argsort(-log_px)[:10]] == [each[0] for each in shown[10:20]]
    made = [attrs["alt"] for tag, attrs in seen.elements if tag == "img" and "reconstruction" in attrs["alt"]]
    assert len(made) == 30
    labels = " ".join(attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg")
    for drawn in ("validation ELBO", "Histogram", "reconstructions", "drawn from the prior", "unit", "Posterior means"):
        assert drawn in labels


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take most of the time of a page: what follows does not look at them."""
    monkeypatch.setattr(drawing, "drawn", lambda *args: None)


# Nothing is executed


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run of a table whose columns, categories and directory are named like code."""
    folder = tmp_path_factory.mktemp("evil")
    generator = np.random.default_rng(0)
    words = np.array(EVIL)[generator.integers(5, size=80)]
    content = {name: generator.standard_normal(80) for name in EVIL[:4]} | {EVIL[4]: words}
    pd.DataFrame(content).to_csv(folder / "evil.csv", index=False)
    argv = ["--dataset=Table", f"--dataset.path={folder / 'evil.csv'}", *TINY[1:]]
    run_dir = folder / "<img src=x onerror=alert(3)>"
    return cli.train([*argv, f"--run_dir={run_dir}", "--evidence.num_images=8", "--evidence.annealed_images=0"])


def test_names_are_text_and_never_code(evil):
    text = runs.report(evil).read_text()
    seen = check_safe(text)
    assert "<img src=x" not in text
    assert [tag for tag, _ in seen.elements].count("script") == 2  # the data of the table, and the page's own
    content = seen.rows()
    assert content["names"] == EVIL
    raw = next(script for attrs, script in seen.scripts if "type" in attrs)
    assert "<" not in raw
    assert "\u2028" not in raw
    assert {row[4] for row in content["values"].values()} <= set(EVIL)
    (line,) = (column["values"] for column in content["columns"] if column["title"] == "line")
    file = io.StringIO((evil.path.parent / "evil.csv").read_text(encoding="utf-8"))
    rows = list(csv.reader(file))  # as a user finds them
    assert [rows[each - 1][4] for each in line] == [content["values"][str(i)][4] for i in range(8)]
    assert [float(rows[each - 1][0]) for each in line] == pytest.approx(evil.data.test[:8, 0].tolist(), rel=1e-5)
    assert f"0 (line {line[0]}): log p(x)" in seen.text
    for name in EVIL:
        assert " ".join(name.split()) in seen.text, name
    assert seen.text.startswith("Run <img src=x onerror=alert(3)>")


def test_figures_show_names_as_they_are():
    def draw(out):
        with runs.figures.figure(out, 3, 2) as axes:
            axes.plot([1, 100], [1, 2], label=runs.figures.plain(EVIL[4]))
            axes.set(xscale="log", title=EVIL[0] + "\x07")
            axes.legend()

    drawn = svg.drawn("one", draw, EVIL[1])
    seen = Seen(drawn.svg)
    assert EVIL[0] in seen.text
    assert EVIL[4].replace("\\f", "\\f") in seen.text
    assert not [tag for tag, _ in seen.elements if tag in ("script", "style", "metadata")]
    assert not [attrs for _, attrs in seen.elements if "style" in attrs or "class" in attrs]
    assert all(attrs["id"].startswith("one-") for _, attrs in seen.elements if "id" in attrs)
    assert "currentColor" in drawn.svg
    assert html.escape(EVIL[1], quote=False) in drawn.svg or "&lt;/script&gt;" in drawn.svg


def test_sequences_are_lines_through_what_was_seen():
    some, n = np.zeros((4, 5, 2), np.float32), math.nan
    seen = [[[0, 5], [1, n], [4, 5], [n, n], [2, 9]], [[4, 9], [n, 7], [0, n], [0, n], [n, n]]]
    shown = showing.Shown(SequenceData(some, some, np.array(seen, np.float32), "real"))
    assert (shown.size, shown.values([0, 1])) == ((200, 68), ([], {}))
    height = {value: round(34 * (0.9 - 0.8 * value / 4)) for value in (0, 1, 2, 4)}
    other = {value: round(34 * (1.9 - 0.8 * (value - 5) / 4)) for value in (5, 7, 9)}
    path = f"M2 {height[0]}L51 {height[1]} 100 {height[4]}M198 {height[2]}h0"  # a gap, and a step alone
    path += f"M2 {other[5]}h0M100 {other[5]}h0M198 {other[9]}h0"
    assert shown.lines([1, 0])[0] == path
    assert shown.lines([1, 0])[1].startswith(f"M2 {height[4]}h0M100 {height[0]}L149 {height[0]}M2 {other[9]}L51")
    (item,) = shown.items([1], ["log p(x) -1"])
    assert item.strip.seen == shown.lines([1])[1]
    assert item.strip.alt == "test sequence 1, 4 steps seen: from 0 to 4; from 7 to 9"
    rows = page.Rows("rows", [page.Column("sequence", [0, 1])], "sequence", lines=shown.lines([0]), size=shown.size)
    html = page.render(page.Page("t", "", [page.Section("s", [rows, page.Gallery("g", [item])])]))
    assert check_safe(html).rows()["lines"] == {"0": path}
    assert f'<path d="{item.strip.seen}"/>' in html


def test_conditions_are_those_of_the_data():
    told = (Column("job", "categorical", ("<b>", "smith")), Column("age", "real", loc=40.0, scale=10.0))
    schema = Schema((2,), "row", (Column("x", "real"), Column("y", "binary", ("no", "yes"))), condition=told)
    shown = showing.Shown(SimpleNamespace(schema=schema, origin=None))
    x, c = torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0, -0.5])
    assert shown._names() == ["given job", "given age", "x", "y"]
    assert shown._texts(x, c) == ["smith", "35", "missing", "yes"]


# Whether to believe it


def result(**others):
    known = {"unit": "nats per image, mass", "num_samples": 1000, "num_images": 400, "khat_threshold": 0.67}
    known |= {"test_elbo": -90.0, "test_log_likelihood": -85.0, "test_log_likelihood_se": 0.3, "mc_se": 0.02}
    known |= {"share_khat_above_threshold": 0.02, "reliable": True, "num_invalid": 0, "active_units": 5}
    return known | {"train_seconds": 1.0, "evaluate_seconds": 1.0} | others


ANNEALED = {
    "annealed_images": 100,
    "annealed_log_likelihood": -84.5,
    "annealed_mc_se": 0.01,
    "annealed_share_reliable": 1.0,
    "annealed_reliable": True,
}


def evidence(size, **fields):
    usual = {"log_px": np.linspace(-120, -60, size), "mc_se": 0.02, "khat": 0.4, "ess": 100.0} | fields
    full = {name: ("datum", np.broadcast_to(values, size).copy()) for name, values in usual.items()}
    return xr.Dataset(full, coords={"datum": np.arange(size)})


@pytest.mark.parametrize(
    ("changed", "believed", "said"),
    [
        ({}, True, "few enough for the mean of all"),
        ({"reliable": False, "share_khat_above_threshold": 0.4}, False, "above 0.67 for 40.0% of the images"),
        ({"reliable": False}, False, "chains from the prior find more"),
        ({"reliable": None, "share_khat_above_threshold": None}, None, "too few samples"),
        ({"reliable": False, "num_not_finite": 3}, False, "3 images is NaN or infinite"),
        ({**ANNEALED, "reliable": False, "share_khat_above_threshold": 0.4}, True, "100 of 400 images were annealed"),
        (
            {**ANNEALED, "num_images": 100, "reliable": False, "share_khat_above_threshold": 0.4},
            True,
            "does not rest on it",
        ),
        ({**ANNEALED, "annealed_reliable": False, "annealed_share_reliable": 0.9}, False, "10.0% of the images failed"),
        ({**ANNEALED, "annealed_reliable": False}, False, "its error is too large"),
        ({**ANNEALED, "annealed_reliable": None}, None, "did not check it"),
        ({**ANNEALED, "annealed_log_likelihood": None, "annealed_reliable": False}, False, "made no number"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_it_says_whether_to_believe_it_and_why(changed, believed, said):
    found = words.verdict(result(**changed), {"importance": evidence(400)})
    assert found.believed is believed
    assert found.answer.split(":")[0] == {True: "Yes", False: "No", None: "Not known"}[believed]
    assert said in " ".join(claim.text for claim in found.claims)
    if believed is False:
        assert any(claim.good is False for claim in found.claims)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"annealed_images": 10, "annealed_mc_se": 7.3},
            "Only within its error of \u00b1 7.300: 10 of 400 images were",
        ),
        ({"annealed_images": 10}, "Only within its error of \u00b1 0.010: 10 of 400 images were annealed."),
        ({"annealed_mc_se": 1.5}, "100 of 400 images were annealed, and their correction is that uncertain."),
        ({"annealed_images": 10, "num_images": 10}, "Yes: it may be believed"),
        ({"annealed_images": 10, "annealed_reliable": False}, "No: do not believe"),
    ],
)
def test_where_few_are_annealed_it_is_believed_only_within_its_error(changed, said):
    found = words.verdict(result(**ANNEALED | {"share_khat_above_threshold": 1.0, "reliable": False} | changed), {})
    assert said in found.answer
    assert found.guarded == said.startswith(("Only", "100 of"))
    (against,) = (claim for claim in found.claims if claim.of == "importance sampling")
    assert (against.good, "100.0% of the images" in against.text) == (False, True)


def test_the_table_of_a_page_warns_as_the_terminal_does(pair, seen, capsys):
    runs.report_run(pair[0].path)
    told = capsys.readouterr().out.split("\n\n")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told][2:]
    assert {"low by about", "KL divergence"} <= {row[0] for row in rows}
    assert any(row[0].startswith("images with k >") for row in rows)
    for row in rows:
        assert " ".join(" ".join(row).split()) in seen.text


@pytest.mark.parametrize(
    ("above", "said"), [(1.0, "1.00 nats lower"), (0.0, "agrees"), (-1.0, "contradict each other")]
)
def test_the_two_estimators_are_held_against_each_other(above, said):
    importance = evidence(400)
    annealed = importance.isel(datum=slice(100))
    annealed["log_px"] = annealed["log_px"] + above
    found = words.verdict(result(**ANNEALED), {"importance": importance, "annealed": annealed})
    assert said in " ".join(claim.text for claim in found.claims)
    assert ("reservation" in found.answer) == (above < 0)


@pytest.mark.parametrize(
    ("d", "said"),
    [
        (
            Difference(1.0, 0.1, 0.01),
            "b minus a: +1.000 nats per image (95 % interval +0.804 to +1.196): b is better.",
        ),
        (Difference(-1.0, 0.1, 0.01), "(95 % interval -1.196 to -0.804): a is better."),
        (
            Difference(-1.0, 0.1, 0.01, 0, 60, 3, 2),
            "(95 % interval -1.430 to -0.570; n = 60 images, 3 of them annealed)",
        ),
        (Difference(0.1, 0.1, 0.01), "no difference can be told"),
        (Difference(1.0, 0.1, 0.01, 0, 2, 2, 1), "interval -0.271 to +2.271; n = 2 images): no difference can be told"),
        (Difference(1.0, math.nan, 0.01, 0, 1, 0, 0), "interval unknown; n = 1 image): no difference can be told"),
        (Difference(math.nan, math.nan, math.nan, 3), "cannot be told apart"),
    ],
)
def test_it_says_which_is_better_and_how_sure_that_is(d, said):
    assert said in words.better("b", "a", d, "image", []).text
    doubted = words.better("b", "a", d, "image", ["a"])
    assert doubted.good is None


# Several runs


def test_intervals_of_three_data_cover():
    generator, held = np.random.default_rng(0), 0
    for values in generator.normal(0.5, 2.0, size=(4000, 3)):
        d = Gaps(values, np.zeros(3), values[:0], values[:0], np.arange(0)).difference()
        held += abs(d.mean - 0.5) < d.margin()
    assert abs(held / 4000 - 0.95) < 4 * (0.05 * 0.95 / 4000) ** 0.5


@pytest.mark.parametrize(("num", "low"), [(2, 0.94), (4, 0.94), (30, 0.93)])
def test_importance_sampling_of_all_is_corrected_by_the_annealed(num, low):
    """A known difference of -1, of which importance sampling of one run misses 3 nats."""
    generator, found = np.random.default_rng(num), []
    for _ in range(1000):
        true = generator.normal(-1.0, 1.5, size=60)
        rough = true + generator.normal(3.0, 0.8, size=60)
        among = np.sort(generator.choice(60, num, replace=False))
        fine = true[among] + generator.normal(0, 0.05, size=num)
        gaps = Gaps(rough, np.full(60, 0.1), fine, np.full(num, 0.05), among)
        d = gaps.difference()
        assert (d.size, d.annealed, d.freedom) == (60, num, num - 1)
        found.append((d.mean, abs(d.mean + 1.0) < d.margin()))
    mean, covered = np.mean(found, axis=0)
    assert abs(mean + 1.0) < 0.1
    assert low < covered <= 1


def test_hopeless_importance_sampling_is_left_out():
    generator = np.random.default_rng(0)
    fine = generator.normal(2.0, 1.0, size=12)
    rough = generator.normal(-500.0, 300.0, size=60)
    d = Gaps(rough, np.full(60, 9.0), fine, np.full(12, 0.1), np.arange(0, 60, 5)).difference()
    assert d.mean == pytest.approx(fine.mean())
    assert d.se == pytest.approx(fine.std(ddof=1) / 12**0.5, rel=0.02)


def test_two_runs_are_compared_as_compare_does(pair, tmp_path):
    seen = check_safe(runs.report(pair, tmp_path / "ab.html").read_text())
    compared = runs.compare([run.path for run in pair])
    (d,) = compared.differences
    assert f"{d.mean:+.3f}" in seen.text
    half = stats.t.ppf(0.975, 19) * d.se
    assert (
        f"95 % interval {d.mean - half:+.3f} to {d.mean + half:+.3f}; n = 60 images, 20 of them annealed" in seen.text
    )
    for run in pair:  # what the leaderboard says is what is said of the run itself
        assert seen.text.count(f" {run.result['annealed_log_likelihood']:.3f} ") >= 1
    told = "b is better" if d.mean > 0 else "a is better"
    assert f"b minus a: {d.mean:+.3f} nats per image" in seen.text
    assert (told in seen.text) == d.is_told
    answer = "Better than a: b." if d.mean > 0 else "Worse than a: b."
    assert (answer if d.is_told else "No difference can be told to a: b.") in seen.text
    assert "log p(x) of each minus that of a, nats per image" in seen.text
    assert "thick bars are 50 % intervals" in seen.text
    assert "difference[" not in seen.text
    text = compared.table()
    assert d.sentence(str(pair[1].path), str(pair[0].path), "image") in text
    assert f"{pair[1].result['annealed_log_likelihood']:.3f}" in text
    ranked = "ab" if d.mean < 0 else "ba"
    assert re.search(rf" 1 {ranked[0]} .* 2 {ranked[1]} ", seen.text)
    assert "--seed 0 1" in seen.text
    known = [run.importance["log_px"].values.copy() for run in pair]
    among = pair[0].annealed["datum"].values
    for each, run in zip(known, pair, strict=True):
        each[among] = run.annealed["log_px"].values
    *_, gap, by = (column["values"] for column in seen.rows()["columns"])
    assert gap == [round(each, 2) for each in (known[1] - known[0]).tolist()]
    assert {place for place, word in enumerate(by) if word.startswith("annealed")} == set(among.tolist())
    assert "but for the 20 that are annealed in both" in seen.text


def test_a_datum_that_one_run_alone_has_annealed_is_compared_by_importance_sampling(pair, tmp_path, without_figures):
    other = pair[1]
    fewer = runs.Run(other.path, other.result, other.evidence | {"annealed": other.annealed.isel(datum=slice(5))})
    seen = check_safe(runs.report([pair[0], fewer], tmp_path / "ab.html", data=False).read_text())
    *_, gap, by = (column["values"] for column in seen.rows()["columns"])
    among = other.annealed["datum"].values[:5].tolist()
    assert [place for place, word in enumerate(by) if word.startswith("annealed")] == among
    left = pair[0].annealed["datum"].values[5]
    rough = [run.importance["log_px"].values[left] for run in pair]
    assert gap[left] == round(float(rough[1] - rough[0]), 2)


def test_unlike_numbers_are_not_ranked(pair, evil, tmp_path, without_figures):
    seen = check_safe(runs.report([pair[0], evil, pair[1]], tmp_path / "all.html").read_text())
    assert "not ranked against each other" in seen.text
    assert seen.text.count("Leaderboard:") == 2
    assert "nats per row" in seen.text


def test_a_study_has_a_page(pair, tmp_path, without_figures):
    folder = tmp_path / "study"
    folder.mkdir()
    directories = {name: folder / f"{name}-seed0" for name in ("one", "two")}
    for run, directory in zip(pair, directories.values(), strict=True):
        shutil.copytree(run.path, directory)
    summaries = runs.summarize({name: [directory] for name, directory in directories.items()})
    with pytest.raises(RunError, match="not finished"):
        runs.report(folder_of(tmp_path, "contenders: {a: ''}"))
    runs.write_study(folder, "", summaries, {name: [path] for name, path in directories.items()})
    cli.main(["report", str(folder)])
    seen = check_safe((folder / "report.html").read_text())
    (_, second) = summaries
    order = sorted(summaries, key=lambda each: -each.log_likelihood)
    assert re.search(rf" 1 {order[0].name} {order[0].log_likelihood:.2f} .* 2 {order[1].name} ", seen.text)
    assert "The validation data choose" in seen.text
    assert "nats lower, +-" in seen.text
    assert f"{second.difference:+.3f}" in seen.text
    assert "one-seed0/report.html" in {attrs.get("href") for _, attrs in seen.elements}
    assert "one seed alone" in seen.text


@pytest.fixture
def searched(tmp_path):
    """A search of twelve trials that was never run: log p(x) falls with the rate, and the schedule says nothing."""
    trials = []
    for i in range(12):
        name, values = f"trial-{i:04}", {"lr": repr(10.0 ** (-i / 4)), "schedule": EVIL[i % 2]}
        found = result(test_log_likelihood=-85.0 - i, validation_log_likelihood=None if i == 3 else -90.0 + i)
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(found | {"num_validation_images": 100}))
        (tmp_path / name / "metrics.csv").write_text(
            ",".join(["epoch", *Epoch._fields[1:]]) + "\n1,0,-100,-101,1,2\n2,0,-95,-96,1,2\n"
        )
        value = found["validation_log_likelihood"]
        numbers = {"validation": value, "validation_se": value and 0.5, "seconds": 1.0}
        trials.append({"name": name, "values": values, **numbers, "reason": "" if value else "<b>it failed</b>"})
    content = {"search": "grid", "by": "validation_log_likelihood", "unit": "nats per image, mass"}
    (tmp_path / "result.json").write_text(json.dumps(content | {"best": {"name": "trial-0011"}, "trials": trials}))
    (tmp_path / "config.yaml").write_text(f"search: grid\nspace: {{lr: '{EVIL[0]}'}}\n")
    return tmp_path


def test_a_search_has_a_page(searched):
    cli.main(["report", str(searched)])
    text = (searched / "report.html").read_text()
    seen = check_safe(text)
    assert "The validation data choose trial-0011, of 12 trials: lr 0.001778, schedule </script>" in seen.text
    assert "is 1.00 lower" in seen.text
    assert "Its test log p(x), by importance sampling, is -96.00; it was chosen without it" in seen.text
    assert "-95.00" not in seen.text  # of no other
    assert "1 trial of 12 have no validation value" in seen.text
    assert "<b>it failed</b>" in seen.text
    assert "<b>it" not in text
    assert "lr 100% schedule 0%" in seen.text
    labels = " ".join(attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg")
    assert "Validation ELBO of each run against epochs; at the end: trial-0011 -96.00" in labels
    assert "Validation log p(x), nats per image of 11 trials against lr; the best, -79.00, has 0.001778" in labels


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"unit": "nats per row, density"}, "trial-0011 cannot be ranked together"),
        ({"best": {"name": "trial-0003"}}, "'best' is none of its trials"),
        ({"best": {"name": "../elsewhere"}}, "'best' is none of its trials"),
        ({"best": 3}, "'best' cannot be 3"),
        ({"trials": [{"name": "../x"}]}, "'name' cannot be '../x'"),
        ({"trials": [{"name": "x", "values": {}}]}, "'validation' is missing"),
    ],
)
def test_a_search_that_is_damaged_is_refused(searched, changed, said):
    path = searched / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(RunError, match=re.escape(said)):
        runs.report(searched)


def test_trials_of_other_units_are_refused(searched):
    path = searched / "trial-0005" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unit": "nats per row, density"}))
    with pytest.raises(RunError, match=r"trial-0005 and trial-0011 cannot be ranked together: unit is 'nats per row"):
        runs.report(searched)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_log_likelihood": -1.0}))
    with pytest.raises(RunError, match=r"validation_log_likelihood of trial-0005 is -1.0 in its own"):
        runs.report(searched)


def test_what_a_setting_explains_is_that_of_least_squares_on_ranks():
    generator = np.random.default_rng(0)
    numbers, words_ = generator.random(40), generator.integers(0, 3, 40)
    found = (numbers + generator.random(40)).tolist()
    rho = stats.spearmanr(numbers, found).statistic
    assert searching_page.explained([str(each) for each in numbers], found) == pytest.approx(1 - (1 - rho**2) * 39 / 38)
    f = stats.f_oneway(*(stats.rankdata(found)[words_ == each] for each in range(3))).statistic
    expected = max(0, (f - 1) * 2 / (f * 2 + 37))  # Kelley's epsilon^2 of a one-way analysis of variance
    assert searching_page.explained([EVIL[each] for each in words_], found) == pytest.approx(expected)
    assert searching_page.explained(list("aabb"), [1, 1, 2, 2]) == pytest.approx(1)
    by_chance = [searching_page.explained([EVIL[each] for each in words_], generator.random(40)) for _ in range(200)]
    assert np.mean(by_chance) < 0.03
    assert math.isnan(searching_page.explained(["a"] * 4, [1, 2, 3, 4]))
    assert math.isnan(searching_page.explained(list("abcd"), [1, 2, 3, 4]))


def folder_of(path, settings):
    (path / "other").mkdir()
    (path / "other" / "config.yaml").write_text(settings)
    return path / "other"


# Honest pages, and refusals


@pytest.mark.parametrize("name", ["vae", "two_layers"])
def test_runs_of_the_first_version_have_a_page(name, tmp_path, without_figures):
    seen = check_safe(runs.report(OLD / name, tmp_path / "old.html", data=name == "vae").read_text())
    assert "pyro_vae 0.1.0" in seen.text
    assert "not asked for" in seen.text or name == "vae"


def test_an_unfinished_run_has_a_page_without_a_number(tmp_path, without_figures):
    seen = check_safe(runs.report(OLD / "interrupted", tmp_path / "page.html").read_text())
    assert "not finished: it has no log-likelihood" in seen.text
    assert "log p(x) is" not in seen.text


@pytest.mark.parametrize("damage", ["", "epoch\n1", "\0" * 50, "epoch,train_elbo\n" + "9" * 200_000, '"'])
def test_without_what_training_recorded_there_are_no_curves(damage, tmp_path):
    (tmp_path / "metrics.csv").write_text(damage)
    assert contents.history_of(tmp_path) == []


def test_without_its_data_it_has_numbers_alone(evil, tmp_path, without_figures):
    folder = shutil.copytree(evil.path, tmp_path / "moved")
    memory = json.loads((folder / "data.json").read_text())
    memory["paths"] = {name: str(tmp_path / "nowhere.csv") for name in memory["paths"]}
    (folder / "data.json").write_text(json.dumps(memory))
    config = (folder / "config.yaml").read_text()
    missing = re.sub(r"path: .*evil.csv", f"path: {tmp_path / 'nowhere.csv'}", config)
    (folder / "config.yaml").write_text(missing)
    seen = check_safe(runs.report(folder).read_text())
    assert "nowhere.csv" in seen.text
    assert not seen.rows()["values"]


def test_of_numbers_that_are_none_it_says_so(pair, tmp_path):
    importance = pair[0].importance.copy(deep=True).drop_vars("ess")
    importance["log_px"].values[[3, 7]] = math.nan, -math.inf
    none = dict.fromkeys(("test_log_likelihood", "test_log_likelihood_se", "mc_se", "test_elbo"))
    result = (
        pair[0].result
        | none
        | {"num_not_finite": 2, "reliable": False, "annealed_images": 0, "annealed_log_likelihood": None}
    )
    run = runs.Run(pair[0].path, result, {"importance": importance})
    seen = check_safe(runs.report(run, tmp_path / "page.html", data=False).read_text())
    assert "log p(x) is no number" in seen.text
    assert "No: do not believe this number" in seen.text
    assert "2 images is NaN or infinite" in seen.text
    columns = {column["title"]: column["values"] for column in seen.rows()["columns"]}
    assert [place for place, value in enumerate(columns["log p(x)"]) if value is None] == [3, 7]
    assert set(columns["ESS"]) == {None}


def test_estimates_are_shown_against_their_budget(pair, tmp_path):
    folder = shutil.copytree(pair[0].path, tmp_path / "run")
    scored = runs.score(folder, estimator="importance", num_samples=20, num_images=20, device="cpu", workers=1).result
    seen = check_safe(runs.report(folder, tmp_path / "page.html", data=False).read_text())
    assert f"importance-test, 20 of 60 {scored['log_likelihood']:.3f} {scored['mc_se']:.3f}" in seen.text
    assert any("log p(x) against" in attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg")


def test_of_very_many_data_an_excerpt_says_what_is_left_out():
    generator = np.random.default_rng(0)
    importance = evidence(200_000, log_px=generator.standard_normal(200_000), khat=generator.random(200_000))
    kept, text = contents.excerpt(importance, "row")
    assert len(kept) == len(set(kept.tolist())) == 10_000
    assert text.startswith("190,000 of 200,000 rows are left out")
    log_px = importance["log_px"].values
    assert set(np.argsort(log_px)[:2000].tolist()) | set(np.argsort(-log_px)[:2000].tolist()) <= set(kept.tolist())
    assert set(np.argsort(-importance["khat"].values)[:2000].tolist()) <= set(kept.tolist())
    assert contents.excerpt(evidence(10_000), "row")[1] == ""


def test_the_annealed_are_ranked_by_what_annealing_found_and_stay():
    importance, places = evidence(11_000, khat=2.0), np.arange(5000, 5100)
    annealed = importance.isel(datum=places).assign(reliable=("datum", np.arange(100) > 0))
    annealed["log_px"] = annealed["log_px"] - 50.0
    known = contents.best_known(SimpleNamespace(importance=importance, annealed=annealed))
    ranks = contents.ranked(known)
    assert ranks["worst"][:3].tolist() == [5000, 5001, 5002]
    assert ranks["least sure"][0] == 5000  # which failed a check; the others are the surest
    assert set(ranks["least sure"][-99:].tolist()) == set(range(5001, 5100))
    middle = importance.isel(datum=places)
    same = contents.best_known(SimpleNamespace(importance=importance, annealed=middle))
    kept, text = contents.excerpt(same, "row")
    assert len(kept) == contents.MOST_ROWS
    assert set(places.tolist()) <= set(kept.tolist())
    assert "the 100 annealed" in text
    assert contents._warning(same, np.arange(4995, 5005), 0.67).startswith("5 of these 10 have a Pareto k above 0.67")
    assert contents._warning(same, places, 0.67) == ""
    rows = page.Rows("rows", [page.Column("row", list(range(1000)))], keep=frozenset(range(1, 100, 2)))
    assert page._halved(rows).columns[0].values == [i for i in range(1000) if i % 2 == 0 or i < 100]


def test_a_page_that_would_be_too_large_leaves_out_what_is_heaviest():
    values = np.linspace(0, 1, 10_000).tolist()
    pictures = dict.fromkeys(range(10_000), "A" * 400)
    rows = page.Rows("rows", [page.Column(f"c{i}", values, 17) for i in range(3)], "image", pictures)
    kept = page.Page("title", "", [page.Section("s", [page.Text("kept"), rows])])
    seen = check_safe(page.render(kept))
    assert "Left out here" in seen.text
    assert "kept" in seen.text
    assert not seen.rows()["pictures"]
    assert len(seen.rows()["columns"][0]["values"]) == 10_000


def test_only_an_earlier_report_is_overwritten(pair, tmp_path, without_figures):
    other = tmp_path / "mine.html"
    other.write_text("my own page")
    with pytest.raises(RunError, match="no report of this command"):
        runs.report(pair[0], other, data=False)
    assert other.read_text() == "my own page"
    own = tmp_path / "own.html"
    runs.report(OLD / "interrupted", own)
    (tmp_path / "link.html").symlink_to(own)
    with pytest.raises(RunError, match="no report of this command"):
        runs.report(pair[0], tmp_path / "link.html", data=False)
    runs.report(OLD / "vae", own, data=False)
    assert "Run vae" in own.read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_a_page_of_somebody_else_in_a_run_is_named_by_its_path(tmp_path):
    folder = shutil.copytree(OLD / "interrupted", tmp_path / "run")
    (folder / "report.html").write_text("mine")
    with pytest.raises(RunError, match=rf"^{re.escape(str(folder))}/report.html exists, and is no report .* by --out"):
        runs.report(folder)


def test_settings_of_parts_are_held_against_their_own_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "report: true\nlr: null\nprior: {class_path: pyro_vae.priors.GaussianMixture, init_args: {components: 3}}\n"
        "decoder: {class_path: os.system, init_args: {command: ls}}\n"
        "encoder: {class_path: pyro_vae.networks.ConvNet, init_args: {channels: [8], image_shape: null}}\n"
    )
    changed, _ = contents.settings_of(tmp_path)
    rows = {row[0]: row[1:] for row in changed.rows}
    assert rows["--prior"] == ("GaussianMixture", "StandardNormal")
    assert rows["--prior.components"][0] == "3"
    assert rows["--prior.components"][1].isdigit()
    assert rows["--decoder.command"] == ("ls", "\u2013")  # of others nothing is imported
    assert contents._setting(None) == "null"
    assert contents._setting(True) == "true"
    assert contents._setting((8, 16)) == "[8, 16]"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--runs must be given"),
        (["nowhere"], "nowhere holds no run"),
        ([str(OLD / "vae"), str(OLD / "vae")], "named twice"),
        ([str(OLD / "vae"), str(OLD / "interrupted")], "is not finished: to compare runs, all must be finished"),
        ([str(OLD / "vae"), "--out=page.txt"], "named .html"),
        ([str(OLD / "vae"), "--out=no/where/page.html"], "there is no directory"),
        ([str(OLD / "vae"), "--out=a.html", "--run_dir=b"], "give one of them"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *argv])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(told) == 1
    assert said in told[0]
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_loses_nothing(pair, tmp_path, monkeypatch, capsys, without_figures):
    folder = shutil.copytree(pair[1].path, tmp_path / "run")
    monkeypatch.setattr(reporting, "write_page", lambda *args: 1 / 0)
    reporting.report_after(folder, pair[1].model, pair[1].data)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "no report (ZeroDivisionError" in told
    assert not (folder / "report.html").exists()
    assert runs.load(folder).result == pair[1].result


def test_drawing_a_page_leaves_random_numbers_alone(pair, tmp_path, without_figures):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs.report(runs.load(pair[0].path), tmp_path / "page.html")  # which makes the model, and draws from it
    assert torch.equal(torch.get_rng_state(), state)


def test_data_are_shown_as_they_are_and_numbers_of_ours_with_minus_signs():
    item = page.Item("line 71, -3.25 nats", values=[("code", "-3x", "-3"), ("-2", "a -1.50", "b-2")])
    shown = [page.Text("-7.25 (-0.02 to -0.01), of a-3, -3x and 2024-05-01"), page.Gallery("g", [item])]
    html = page.render(page.Page("-1", "", [page.Section("s", shown)]))
    for text in (">-3x<", ">-3<", ">-2<", ">a -1.50<", ">b-2<", "<h1>-1<", "a-3, -3x and 2024-05-01"):
        assert text in html
    for text in ("line 71, \u22123.25 nats", "\u22127.25 (\u22120.02 to \u22120.01)"):
        assert text in html
