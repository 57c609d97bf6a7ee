"""Parts of an estimate in files: whoever computes them, they are the same, and none is of something else."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from pyro_vae.errors import ContractError, RunError
from pyro_vae.runs.blockwise import FOLDER, Files, Overtaken
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
