"""Parts of an estimate in files: whoever computes them, they are the same, and none is of something else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from experiments.scaling import evidence, growth
from pyro_vae import Annealing, annealed_importance_sampling, cli, importance_sampling, runs
from pyro_vae.errors import ContractError, RunError
from pyro_vae.helping import helpers
from pyro_vae.runs import evaluating, training
from pyro_vae.runs.blockwise import FOLDER, Files, Overtaken, check_home
from pyro_vae.runs.workers import claim

CPU = torch.device("cpu")
ABOUT = {"settings": {"seed": 0}, "weights": "a"}


def part(number):
    """What a part of the toy estimate is: of every kind that estimators keep."""
    values = torch.arange(3.0).double() / 3 + number
    return {
        "log_px": values,
        "reliable": values > 1,
        "count": torch.tensor(number),
        "strided": torch.ones(2).expand(3, 2),
    }


def run(directory, done=None, stages=("a", "b"), about=ABOUT, do=part):
    files = Files(directory, about, CPU)

    def noted(stage):
        def compute(number):
            if done is not None:
                done.append((stage, number))
            return do(number)

        return compute

    return [list(files(stage, noted(stage), 5)) for stage in stages]


def same(found):
    for stage in found:
        for number, each in enumerate(stage):
            assert each.keys() == part(number).keys()
            assert all(torch.equal(each[name], value) for name, value in part(number).items())


def test_each_part_is_computed_once_by_whoever_takes_it_and_read_by_all(tmp_path):
    done, found = [], []

    def slow(number):
        time.sleep(0.01)
        return part(number)

    workers = [threading.Thread(target=lambda: found.append(run(tmp_path, done, do=slow))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(done) == [(stage, number) for stage in "ab" for number in range(5)]
    assert len(found) == 3
    for each in found:
        same(each)


def spoil(path, how, directory):
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif how == "short":
        path.write_bytes(content[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another part":
        path.write_bytes((directory / FOLDER / "a-1.part").read_bytes())
    elif how == "link":
        path.unlink()
        (directory / "elsewhere").write_bytes(b"precious")
        path.symlink_to(directory / "elsewhere")


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "another part", "link"])
def test_a_damaged_part_is_computed_again(tmp_path, how):
    run(tmp_path)
    spoil(tmp_path / FOLDER / "a-3.part", how, tmp_path)
    done = []
    same(run(tmp_path, done))
    assert done == [("a", 3)]
    if how == "link":
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_parts_of_something_else_are_refused(tmp_path):
    run(tmp_path)
    for about, words in [
        (ABOUT | {"weights": "b"}, "holds parts of another estimate: weights a, now b; choose another"),
        (ABOUT | {"settings": {"seed": 1}}, r"another estimate: settings {'seed': 0}, now {'seed': 1}"),
        (ABOUT | {"code": "later"}, "another estimate: code None, now later"),
    ]:
        with pytest.raises(RunError, match=words):
            run(tmp_path, about=about)
    (tmp_path / FOLDER / "about.json").write_text("{")
    with pytest.raises(RunError, match="of an estimate that cannot be told"):
        run(tmp_path)


def test_a_folder_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / FOLDER).symlink_to(tmp_path / "other")
    with pytest.raises(RunError, match="is a link, which is not followed"):
        run(tmp_path)


def test_what_a_dead_process_was_at_is_taken_over(tmp_path):
    Files(tmp_path, ABOUT, CPU)
    told, tell = os.pipe()
    if (pid := os.fork()) == 0:
        with claim(tmp_path / FOLDER, "a-0"):
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(told, 1)
    done, found = [], []
    worker = threading.Thread(target=lambda: found.append(run(tmp_path, done, ["a"])))
    worker.start()
    time.sleep(0.2)
    assert sorted(done) == [("a", number) for number in range(1, 5)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    worker.join(20)
    assert done[-1] == ("a", 0)
    same(found[0])


def test_an_error_ends_all_with_its_line_and_is_forgotten_by_the_next_attempt(tmp_path):
    def bad(number):
        if number == 1:
            raise ContractError("the programs\nare of no use")
        return part(number)

    for do in (bad, part):  # the one who meets it, and another one
        with pytest.raises(ContractError, match=r"the programs\s*are of no use"):
            run(tmp_path, do=do)
    files = Files(tmp_path, ABOUT, CPU)
    files.begin()
    same(run(tmp_path))

    def broken(number):
        raise ZeroDivisionError("somewhere")

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, stages="c", do=broken)
    with pytest.raises(RunError, match="ZeroDivisionError: somewhere"):
        run(tmp_path, stages="c")


def test_who_comes_when_all_is_done_ends_in_peace(tmp_path):
    run(tmp_path)
    written = []

    def write():
        written.append(1)
        (tmp_path / "result.json").write_text(json.dumps({}))

    late = Files(tmp_path, ABOUT, CPU)
    assert Files(tmp_path, ABOUT, CPU).finish(write)
    assert not (tmp_path / FOLDER).exists()
    assert not late.finish(write)
    assert written == [1]
    with pytest.raises(Overtaken):
        list(late("a", part, 2))
    late.forget()
    assert not (tmp_path / FOLDER).exists()


@pytest.fixture(scope="module")
def programs():
    """A tiny VAE, with images that it draws."""
    sizes = growth.Sizes(images=140, samples=1, latent_dims=2, pixels=4, widths=4)
    torch.manual_seed(0)
    vae = growth.model(sizes)
    return vae, growth.draws(vae, 140)


ESTIMATES = {
    "importance": lambda *args, **more: importance_sampling(*args, 30, num_checked=0, **more),
    "annealed": lambda *args, **more: annealed_importance_sampling(*args, Annealing(4, 3, num_checked=1), **more),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_no_digit_depends_on_who_computed_what_or_on_memory(programs, tmp_path, name):
    vae, x = programs
    estimate = ESTIMATES[name]
    torch.manual_seed(1)
    alone = estimate(vae.model, vae.guide, x)
    for memory in (2**14, 2**20):
        files = Files(tmp_path, ABOUT, CPU)
        for each in list(files.folder.glob("*.part"))[::2]:  # half of the work was done by another, with other memory
            each.unlink()
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of memory that does not suffice
            shared = estimate(vae.model, vae.guide, x, memory=memory, work=files)
        for field, value in alone._asdict().items():
            found = getattr(shared, field)
            assert torch.equal(value.nan_to_num(7), found.nan_to_num(7)) if torch.is_tensor(value) else value == found


TINY = "--dataset Digits --epochs 1 --latent_dim 2 --encoder.hidden [8] --decoder.hidden [8] --device cpu"
TINY += " --evidence.num_samples 8 --evidence.num_images 20 --evidence.annealed_images 3"
TINY += " --evidence.annealing.num_temperatures 3 --evidence.annealing.num_checked 0"


@pytest.mark.slow
def test_scoring_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    argv = [*TINY.split(), "--run_dir"]
    whole = cli.train([*argv, str(tmp_path / "whole")])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "score_validation", interrupted)
        with pytest.raises(KeyboardInterrupt, match="go on with"):
            cli.train([*argv, str(tmp_path / "cut")])
    written, write = [], Files.write
    monkeypatch.setattr(Files, "write", lambda self, stage, *more: written.append(self) or write(self, stage, *more))
    cut = cli.train([*argv, str(tmp_path / "cut"), "--resume"])
    assert written
    assert {each._prefix for each in written} == {"validation-"}
    timed = {"train_seconds", "evaluate_seconds", "annealed_seconds"}
    results = [{name: each.result[name] for name in each.result.keys() - timed} for each in (cut, whole)]
    assert results[0] == results[1]
    assert not (tmp_path / "cut" / FOLDER).exists()


def wait(until, process, seconds=120):
    """Wait until something is so, while a process lives."""
    end = time.time() + seconds
    while not (found := until()):
        assert process.poll() is None, process.stderr.read()
        assert time.time() < end
        time.sleep(0.01)
    return found


@pytest.mark.slow
def test_an_evaluation_outlives_a_worker_and_all_of_them_with_the_digits_of_one(tmp_path, monkeypatch, capsys):
    """The same command in two shells: one process is killed, then the other; given again it goes on with what is there.

    The digits are those of one that was never interrupted.
    """
    run = cli.train([*TINY.split(), f"--run_dir={tmp_path / 'run'}"]).path
    argv = [str(run), "--split=train", "--num_images=1024", "--annealing.num_checked=0", "--annealing.start=guide"]
    argv += ["--annealing.num_temperatures=10", "--annealing.num_leapfrogs=1"]  # so little is not compiled
    _, text = runs.parse(runs.EvaluationSettings, argv, first="run")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text(text)
    evaluating.help_in({"run_dir": str(tmp_path / "alone"), "trust": True})

    home = run / "evaluations" / "annealed-train"
    command = [sys.executable, "-m", "pyro_vae", "evaluate", *argv, "--workers=1"]
    shells = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]

    def claimed(process):
        told = [path.read_text().split() for path in (home / FOLDER).glob(".claims/annealed-*")]
        return [words for words in told if words[1:2] == [str(process.pid)]]

    def parts():
        return len(list((home / FOLDER).glob("annealed-*.part")))

    for process, least in zip(shells, (0, 1), strict=True):
        wait(lambda process=process, least=least: claimed(process) and parts() >= least, process)
        process.kill()
        process.communicate(timeout=60)
    assert not (home / "result.json").exists()
    with pytest.raises(runs.RunError, match="never overwritten"):
        cli.evaluate([*argv, "--seed=1"])
    written, write = [], Files.write
    monkeypatch.setattr(Files, "write", lambda self, *given: written.append(given[0]) or write(self, *given))
    shared = cli.evaluate([*argv, "--workers=2"])
    assert written.count("annealed") < 8
    evidence.same_digits(tmp_path / "alone", shared.path)
    assert sorted(path.name for path in home.iterdir()) == ["config.yaml", "evidence.nc", "result.json"]
    with pytest.raises(runs.RunError, match="never overwritten"):
        cli.evaluate(argv)
    assert cli.evaluate([*argv, "--resume"]).result == json.loads((home / "result.json").read_text())
    said = capsys.readouterr()
    assert "This evaluation is finished" in said.out
    assert "a helper ended" not in said.err


@pytest.mark.slow
def test_a_helper_does_what_it_is_told_and_ends_with_who_it_helps(tmp_path, capsys):
    with helpers(1, "os.makedirs", "os.getpid") as (_, go):
        go(str(tmp_path / "made"))
        end = time.time() + 60
        while not (tmp_path / "made").exists() and time.time() < end:
            time.sleep(0.01)
    assert (tmp_path / "made").exists()
    assert time.time() < end


def test_without_an_evaluation_nothing_is_refused_that_was_not(tmp_path):
    """A directory with the settings of another evaluation, or with anything else, is nobody's home."""
    check_home(tmp_path / "new", "run: a\n")
    check_home(tmp_path, "run: a\n")
    (tmp_path / "config.yaml").write_text("run: a\nseed: 1\n")
    check_home(tmp_path, f"run: {Path('a').resolve()}\nseed: 1\n")
    for text in ("run: a\nseed: 2\n", "run: b\nseed: 1\n"):
        with pytest.raises(RunError, match="never overwritten"):
            check_home(tmp_path, text)
    (tmp_path / "config.yaml").write_bytes(b"\xff[")
    with pytest.raises(RunError, match="never overwritten"):
        check_home(tmp_path, "run: a\n")
