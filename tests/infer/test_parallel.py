"""Several processes that train one model take the steps that one would take."""

import multiprocessing

import pytest
import torch
from pyro.infer import SVI

from tests.infer import parallel_checks as checks


def in_processes(size, folder, function):
    """What a function gives in each process of a group."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=checks.entry, args=(rank, size, folder, function)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(2, folder := tmp_path_factory.mktemp("two"), checks.quick), folder


def test_steps_are_those_of_one_process(two):
    for case in [("PyroSVI", "Trace_ELBO"), ("clipped", "IWAE"), ("CompiledSVI", "beta")]:
        weights, losses = checks.trained(*case)
        for found in two[0]:
            torch.testing.assert_close(found[case][0], weights, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[case][1], losses, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_loss_with_every_engine(size, tmp_path):
    every = in_processes(size, tmp_path, checks.gradients)
    for case in every[0]:
        weights, losses = checks.trained(*case)
        for found in every:
            torch.testing.assert_close(found[case][0], weights, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[case][1], losses, rtol=1e-6, atol=0)


def test_parameters_that_come_into_being_and_a_plate_that_is_a_part(two):
    theirs = checks.made_lazily(SVI)
    for found in two[0]:
        assert found["lazy"].keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(found["lazy"][name], value, rtol=1e-9, atol=1e-12)


def test_a_training_is_one_in_all_processes(two):
    (first, second), folder = two
    torch.testing.assert_close(first["fit"][0], second["fit"][0], rtol=0, atol=0)
    assert first["fit"][1] == second["fit"][1]
    assert (first["logged"], second["logged"]) == (3, 0)
    with pytest.warns(UserWarning, match="goes on in 1 process, after 2: it is the same but for its random numbers"):
        _, history = checks.fitted(folder / "checkpoint.pt", 4, resume=True)
    assert history[:3] == first["fit"][1]


def test_noise_is_of_each_process_and_step(two):
    (first, after), (second, after_second) = (found["noise"] for found in two[0])
    assert len({*first, *second, after}) == 7
    assert after == after_second


def test_what_differs_is_refused_in_every_process(two):
    start = "ContractError: process 1 has another"
    expected = {
        "rows": "ContractError: a batch size of 1 is too small for 2 processes",
        "batch": f"{start} mini-batch than process 0",
        "rate": f"{start} lr than process 0: 0.02, not 0.01",
        "weights": f"{start} weights than process 0",
        "drift": "ContractError: the processes do not have the same weights any more",
        "first": "IndexError: list index out of range",
    }
    for found in two[0]:
        for name, reason in expected.items():
            assert found["refused"][name].startswith(reason)
    assert [found["refused"]["here"] for found in two[0]] == ["ValueError: process 1: no file", "ValueError: no file"]
