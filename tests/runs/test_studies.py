"""Studies: contenders x seeds, paired differences, resumption, and what the likelihood study says about scores."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from experiments import bound_study, engine_study, likelihood_study, prior_study
from experiments.likelihood_study import CrossEntropy
from pyro_vae import Bernoulli, Gaussian, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.parts.likelihoods import Categorical
from pyro_vae.runs import studies, summaries

pytestmark = pytest.mark.slow

COMMON = (
    "--common=--dataset Digits --epochs 1 --evidence.num_samples 30 --latent_dim 3 --encoder.hidden [8] "
    "--decoder.hidden [8] --evidence.annealed_images 20 --evidence.annealing.num_temperatures 2 "
    "--evidence.annealing.num_checked 0"
)
PYROS = COMMON + " --engine pyro"  # which traces no graph
TWO = json.dumps({"Normal": "--prior StandardNormal", "Mixture, of 3": "--prior GaussianMixture --prior.components 3"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished prior study of two contenders and two seeds."""
    run_dir = tmp_path_factory.mktemp("study") / "study"
    prior_study.main([f"--run_dir={run_dir}", "--seeds=2", f"--contenders={TWO}", PYROS])
    return run_dir


def test_differences_are_paired_by_seed_and_image(finished):
    read = {
        name: [runs.load(finished / f"{name}-seed{seed}") for seed in range(2)] for name in ("Normal", "Mixture-of-3")
    }
    first, second = json.loads((finished / "result.json").read_text())["summaries"]
    pairs = list(zip(read["Mixture-of-3"], read["Normal"], strict=True))
    paired = np.array([runs.difference_of(*pair, "annealed").mean for pair in pairs])
    assert (first["name"], second["name"], second["reference"]) == ("Normal", "Mixture, of 3", "Normal")
    annealed = [run.result["annealed_log_likelihood"] for run in read["Normal"]]
    assert first["estimator"] == "annealed"
    assert first["log_likelihood"] == pytest.approx(np.mean(annealed), abs=1e-5)
    sampled = [run.importance["log_px"].values.mean() for run in read["Normal"]]
    assert first["importance_sampled"] == pytest.approx(np.mean(sampled), abs=1e-5)
    assert second["differences"] == pytest.approx(paired, abs=1e-5)
    assert second["difference"] == pytest.approx(paired.mean(), abs=1e-5)
    # of two numbers, the standard error of the mean is half their distance
    assert second["difference_seed_error"] == pytest.approx(abs(np.diff(paired)[0]) / 2, abs=1e-5)
    fine = np.mean([each.annealed["log_px"].values - other.annealed["log_px"].values for each, other in pairs], 0)
    assert 0 < second["difference_image_error"] < 2 * fine.std(ddof=1) / math.sqrt(20)
    text = (finished / "table.md").read_text()
    assert f"{second['difference']:+.2f}" in text
    assert "minus Normal" in text
    assert (finished / "differences.png").stat().st_size > 1000


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    done = finished / "Mixture-of-3-seed1" / "result.json"
    kept = {path: path.stat().st_mtime_ns for path in finished.glob("*/result.json") if path != done}
    before = (finished / "result.json").read_text()
    done.unlink()
    ran = []
    monkeypatch.setattr(studies, "train", lambda settings, text: (ran.append(settings), runs.train(settings, text)))
    argv = [f"--run_dir={finished}", "--resume"]
    prior_study.main(argv)
    assert len(ran) == 1
    assert ran[0].seed == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    previous, now = json.loads(before), json.loads((finished / "result.json").read_text())
    for old, new in zip(previous["summaries"], now["summaries"], strict=True):
        assert old | {"seconds": 0} == new | {"seconds": 0}
    prior_study.main(argv)
    assert len(ran) == 1


def test_what_is_finished_is_told_when_others_failed(finished, tmp_path, monkeypatch, capsys):
    study = shutil.copytree(finished, tmp_path / "study")
    (study / "result.json").unlink()
    settings = runs.StudySettings(json.loads(TWO) | {"Third": ""}, seeds=2)
    monkeypatch.setattr(studies, "do_all", lambda *_: {"Third-seed0": "Third: no", "Mixture-of-3-seed1": "gone"})
    wholes = {name: [study / f"{runs.slug(name)}-seed{seed}" for seed in (0, 1)] for name in json.loads(TWO)}
    (study / "Mixture-of-3-seed1" / "result.json").rename(tmp_path / "kept.json")

    def printed():
        with pytest.raises(runs.RunError, match=r"^Third-seed0: Third: no; 1 more failed"):
            studies.run_all(settings, study)
        return capsys.readouterr().out

    out = printed()
    first = runs.summarize({name: paths[:1] for name, paths in wholes.items()})
    assert f"Of seeds 0, without what failed:\n\n{runs.summary_table(first)}\n" in out
    assert "failed: Third-seed0: Third: no\nfailed: Mixture-of-3-seed1: gone\n" in out
    (tmp_path / "kept.json").rename(study / "Mixture-of-3-seed1" / "result.json")
    assert f"Of seeds 0, 1, without what failed:\n\n{runs.summary_table(runs.summarize(wholes))}\n" in printed()
    for path in wholes["Mixture, of 3"]:
        (path / "result.json").unlink()
    assert runs.summary_table(runs.summarize({"Normal": wholes["Normal"]})) in printed()
    for path in wholes["Normal"]:
        (path / "result.json").unlink()
    assert printed().startswith("\nfailed: ")
    assert not (study / "result.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (['--contenders={"a b": "", "a-b": ""}'], "names must differ in their letters and digits"),
        (["--contenders={}"], "--contenders: there is none"),
        (["--common=--epochs 0"], "StandardNormal: --epochs must be at least 1"),
        (["--common=--dataset Digits", '--contenders={"a": "--prior Nope"}'], "a: --prior: 'Nope' is no known class"),
        (["--contenders.Own=--epochs 0", "--common=--epochs 0"], "--epochs must be at least 1"),
        (
            ["--contenders.Own=--objective IWAE --objective.num_particles 0", "--common=--dataset Digits"],
            "Own: --objective: num_particles must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, argv, message):
    with pytest.raises(runs.RunError, match=message):
        prior_study.main([f"--run_dir={tmp_path / 'study'}", *argv])
    assert not list(tmp_path.glob("study/*/"))  # nothing was trained before the mistake was found


def test_a_study_says_how_log_likelihoods_were_estimated(finished):
    summaries = runs.summarize({name: [finished / f"{runs.slug(name)}-seed0"] for name in json.loads(TWO)})
    assert runs.estimators(summaries) == "annealed"
    other = summaries[1]._replace(estimator="importance")
    assert runs.estimators([summaries[0], other]) == "annealed for Normal and by importance sampling for Mixture, of 3"
    assert runs.estimators([other]) == "by importance sampling"


def test_one_run_without_a_number_leaves_none_for_the_mean():
    values = summaries._values([{"a": 1.0}, {"a": None}], "a")  # JSON has no NaN
    assert math.isnan(values[1])
    assert math.isnan(runs.standard_error(values))
    assert runs.standard_error([1.0, 3.0]) == pytest.approx(1)
    assert runs.standard_error([1.0]) is None


def test_another_study_is_not_overwritten(finished):
    with pytest.raises(runs.RunError, match="holds another run, which is never overwritten"):
        prior_study.main([f"--run_dir={finished}"])
    with pytest.raises(runs.RunError, match=r"was run with another --seeds \(2, now 3\)"):
        prior_study.main([f"--run_dir={finished}", "--resume", "--seeds=3"])


def test_masses_densities_and_scores_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood_study, "without_latent", partial(likelihood_study.without_latent, steps=3))
    density, mass = likelihood_study.DENSITY, likelihood_study.MASS
    contenders = {
        "Gaussian": f"{density} Gaussian",
        "Beta": f"{density} Beta",
        "Categorical": f"{mass} Categorical --likelihood.levels 17",
        "score": f"{density} experiments.likelihood_study.CrossEntropy",
    }
    run_dir = tmp_path / "study"
    argv = [f"--run_dir={run_dir}", "--seeds=1", f"--contenders={json.dumps(contenders)}", PYROS]
    likelihood_study.main(argv)
    content = json.loads((run_dir / "result.json").read_text())
    references = {s["name"]: s["reference"] for s in content["summaries"]}
    assert references == {"Gaussian": "Gaussian", "Beta": "Gaussian", "Categorical": "Categorical", "score": "score"}
    bits = {s["name"]: s["bits_per_dim"] for s in content["summaries"]}
    assert bits["score"] is None
    assert min(bits[name] for name in ("Gaussian", "Beta", "Categorical")) > 0
    sections = (run_dir / "table.md").read_text().split("## ")[1:4]
    assert [name in section for name, section in zip(["Beta", "Categorical", "score"], sections, strict=True)] == [
        True
    ] * 3
    assert "Beta" not in sections[1] + sections[2]
    assert (run_dir / "samples.png").stat().st_size > 1000
    (each,) = content["scores"].values()
    assert each["score"] == pytest.approx(content["summaries"][3]["importance_sampled"])
    assert each["log_integral"] < -10
    # dividing by the integral raises the score by about as much
    assert each["log_likelihood"] - each["score"] == pytest.approx(-each["log_integral"], rel=0.05)


def test_the_score_integrates_to_what_the_study_says():
    logits = torch.tensor([-3.0, -0.01, 0.0, 2.0, 9.0], dtype=torch.float64)
    x = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    p = torch.sigmoid(logits)
    cross_entropy = x * p.log() + (1 - x) * torch.log1p(-p)
    by_hand = cross_entropy.exp().mean(0)
    score = CrossEntropy(1)
    each = torch.stack([score(logits[i : i + 1]).log_prob(x) for i in range(5)], dim=1)
    torch.testing.assert_close(each, cross_entropy)
    normalizer = likelihood_study.distributions.ContinuousBernoulli(logits).log_normalizer()
    torch.testing.assert_close(torch.exp(normalizer - torch.nn.functional.softplus(logits)), by_hand, rtol=1e-6, atol=0)
    assert (by_hand < 1).all()


@pytest.mark.parametrize(
    ("make", "binarization"),
    [
        (Bernoulli, "threshold"),
        (lambda x: Categorical(x, 17), "integers"),
        (lambda x: Gaussian(x, "per_pixel"), "none"),
    ],
    ids=["Bernoulli", "Categorical", "Gaussian"],
)
def test_without_latent_reaches_the_closed_form_of_maximum_likelihood(make, binarization):
    """Frequencies, for Bernoulli and Categorical; mean and standard deviation, for a Gaussian."""
    data = Digits("unused", binarization=binarization).load()
    data.test = train = data.observe(torch.arange(1200))  # the maximum is of the training images
    if binarization == "none":
        varies = train.std(0) > 0.02
        train = train.double()
        best = -(train.std(0, correction=0)[varies].log() + 0.5 * math.log(2 * math.pi) + 0.5).sum().item()
        data.test, data._train = data.test[:, varies], data._train[:, varies]
        head = make(int(varies.sum()))
    else:
        values = torch.arange(17 if binarization == "integers" else 2)[:, None, None]
        frequency = (train == values).double().mean(1)
        best = torch.xlogy(frequency, frequency).sum().item()
        head = make(64)
    found = likelihood_study.without_latent(head, data, steps=400)
    assert best - 0.02 * abs(best) - 0.1 < found < best + 1e-3


def test_a_single_seed_has_no_error_over_seeds():
    assert runs.standard_error([3.0]) is None
    assert runs.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


THREE = {f"2 layers, {bound}, K=5" for bound in ("VAE", "IWAE", "DReG")}


def test_bounds_are_compared_within_layers_and_number_of_samples(tmp_path):
    run_dir = tmp_path / "study"
    small = "--model TwoLayerVAE --latent_dim 3 --top.latent_dim 2 --top.hidden [8]"
    every = bound_study.contenders().items()
    given = {name: argv.replace(bound_study.TWO, small) for name, argv in every if name in THREE}
    common = PYROS.replace("--epochs 1 ", "").replace("--latent_dim 3 ", "") + " --batch_size 200"
    bound_study.main([f"--run_dir={run_dir}", "--stages=2", f"--contenders={json.dumps(given)}", common])
    text = (run_dir / "table.md").read_text()
    runs_of = {name: runs.load(run_dir / f"{runs.slug(name)}-seed0") for name in given}
    d = runs.difference_of(*(runs_of[f"2 layers, {each}, K=5"] for each in ("DReG", "IWAE")), "annealed")
    assert f"2 layers, K=5: DReG minus IWAE | {d.mean:+.2f}" in text
    assert all(run.result["epochs"] == 4 for run in runs_of.values())  # 1 + 3
    assert "-83.89" not in text  # that is MNIST's
    with pytest.raises(runs.RunError, match="--stages must be from 1 to 8"):
        bound_study.main(["--stages=9"])


def test_published_figures_belong_to_contenders():
    assert set(bound_study.PUBLISHED) < set(bound_study.contenders())
    contenders = bound_study.contenders()
    assert len(contenders) == 14
    objectives = {"VAE": "ELBO", "IWAE": "IWAE", "DReG": "DReG"}
    for name, argv in contenders.items():
        layers, bound, k = name.split(", ")
        assert ("TwoLayerVAE" in argv) == (layers == "2 layers")
        assert argv.endswith(f"--objective {objectives[bound]} --objective.num_particles {k[2:]}")


def test_a_study_of_bounds_has_the_papers_settings():
    config, _ = runs.parse(runs.Settings, bound_study.Settings(stages=3).arguments())
    assert (config.schedule, config.epochs, config.lr, config.batch_size) == ("stages", 13, 1e-3, 20)
    assert config.evidence.num_samples == 5000
    with pytest.raises(ValueError, match="--common: --epochs is that of the study, which --stages sets"):
        bound_study.Settings(common="--epochs 7")


def test_engines_train_the_same_model(tmp_path):
    """Uncompiled, as in a run so short, they differ by rounding alone."""
    engine_study.main([f"--run_dir={tmp_path / 'study'}", "--seeds=1", COMMON])
    pyros, ours, rounded = json.loads((tmp_path / "study" / "result.json").read_text())["summaries"]
    assert ours["log_likelihood"] == pytest.approx(pyros["log_likelihood"], abs=1e-3)
    assert rounded["log_likelihood"] == pytest.approx(pyros["log_likelihood"], abs=0.3)
    assert rounded["log_likelihood"] != pyros["log_likelihood"]


def test_tables_with_densities_are_studied(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i % 7}.5,{-i % 11}.25\n" for i in range(40)))
    common = f"--dataset Table --dataset.path {tmp_path / 'table.csv'} --epochs 1 --evidence.num_samples 2"
    common += " --evidence.annealed_images 0 --encoder.hidden [4] --decoder.hidden [4] --device cpu"
    argv = ["--contenders.one=--latent_dim 1", "--contenders.two=--latent_dim 2", "--seeds=1", f"--common={common}"]
    study = runs.run_study(runs.StudySettings, [*argv, f"--run_dir={tmp_path / 'study'}"], "study")
    assert [each.reference for each in study.summaries] == ["one", "one"]
