"""The benchmark runs, and its ratios are those of its seconds. What it measures is not tested."""

import gc
import json
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.nn.utils import parameters_to_vector

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark.programs import PROGRAMS
from pyro_vae import runs

pytestmark = pytest.mark.slow

PYRO = "Pyro SVI, Trace_ELBO"
COMPILED = {PYRO, "CompiledSVI", "CompiledSVI, bfloat16", "by hand, torch.compile", "bare matrix products"}


def test_every_contender_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)  # no other libraries
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor is slow,
    monkeypatch.setattr(
        "pyro_vae.infer.graphs.compile_graph", lambda graph, tensors: graph
    )  # and compiles in other tests
    # steps of the epoch's batch size, whose graphs are then compiled but once
    argv = "--repeats 3 --steps 1 --batch_sizes [256] --models [K=50] --model_batch_size 4 --epoch_images 300"
    argv += f" --programs [VAE] --num_images 2 --num_samples 20 --device cpu --run_dir={tmp_path / 'run'}"
    benchmark.main(argv.split())
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    tables = capsys.readouterr().out.split("\n\n")
    for part, title, group, least in (
        ("step", "training step", "batch of 256", COMPILED),
        ("models", "step of another model", "K=50, batch of 4", {PYRO, "Pyro ELBOModule, torch Adam", "CompiledSVI"}),
        ("programs", "step of a small program", "VAE", {"Pyro SVI", "CompiledSVI, as traced", "CompiledSVI"}),
        ("epoch", "epoch", "256 images", COMPILED),
        ("evidence", "importance sampling", "2 images, K = 20", {"pyro_vae importance_sampling", "Pyro Importance"}),
    ):
        assert list(found[part]) == [group]
        contenders = found[part][group]
        assert least <= contenders.keys()
        assert not {"NumPyro", "pythae"} & contenders.keys()
        assert found["peak_resident_bytes"][part] > 2**20
        (table,) = (each for each in tables if each.lstrip().startswith(f"| {title}, {group} "))
        cells = {
            row[1].strip(): [cell.strip() for cell in row[2:]]
            for row in (line.split("|") for line in table.strip().splitlines())
        }
        for name, each in contenders.items():
            assert 0 < each["low"] <= each["median"] <= each["high"]
            assert each["first"] > 0
            base = contenders[{"evidence": "bare matrix products", "programs": "Pyro SVI"}.get(part, PYRO)]["median"]
            if part == "evidence":  # speeds
                assert cells[name][:3:2] == [f"{1 / each['median']:,.0f}", f"{base / each['median']:.3g}"]
            else:
                assert cells[name][:3:2] == [f"{1e3 * each['median']:.3g}", f"{each['median'] / base:.3g}"]
    steps = found["programs"]["VAE"]
    (summary,) = (each for each in tables if each.lstrip().startswith("| of Pyro SVI, 1 programs "))
    assert f"| {steps['CompiledSVI']['median'] / steps['Pyro SVI']['median']:.3g} " in summary
    assert "numpyro" not in found["versions"]
    assert (tmp_path / "run" / "benchmark.png").stat().st_size > 1000


def test_contenders_take_the_same_steps():
    x = (torch.rand(4, 784) < 0.2).float()
    trained = {}
    for engine in (benchmark.by_hand, benchmark.pyro_svi, benchmark.elbo_module, benchmark.compiled_svi):
        torch.manual_seed(1)
        vae = benchmark.build("MLP", x.device)
        step = engine(lambda vae=vae: vae, *() if engine is benchmark.by_hand else (Trace_ELBO(),))
        for seed in range(3):
            torch.manual_seed(seed)
            step(x)
        trained[engine] = parameters_to_vector(vae.parameters())
    torch.manual_seed(1)
    start = parameters_to_vector(benchmark.build("MLP", x.device).parameters())
    expected = trained.pop(benchmark.by_hand)
    for found in trained.values():
        assert (found - expected).norm() < 1e-2 * (expected - start).norm()


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs_take_pyros_steps(name):
    store, trained = pyro.get_param_store(), []
    for engine in (benchmark.plain_program, partial(benchmark.compiled_program, compiler="none")):
        torch.manual_seed(0)
        with store.scope():
            program = PROGRAMS[name](torch.device("cpu"))
            step = engine(program)
            for _ in range(7):
                step(*program.args)
            trained.append({key: value.detach().clone() for key, value in store.items()})
    torch.testing.assert_close(*trained, rtol=1e-3, atol=2e-4)  # Adam enlarges rounding
    assert trained[0]


def test_a_recorded_step_by_hand_keeps_what_it_replays(monkeypatch):
    """A CUDA graph holds no memory: parameters and the optimizer's state must live as long as it."""
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    kept = []

    def make():
        vae = benchmark.build("MLP", torch.device("cpu"))
        kept.extend(map(weakref.ref, vae.parameters()))
        return vae

    made = benchmark.adam
    monkeypatch.setattr(benchmark, "adam", lambda vae: kept.append(weakref.ref(optim := made(vae))) or optim)
    replay = benchmark.by_hand_recorded(make, benchmark.observations(2, torch.device("cpu")))
    gc.collect()
    assert all(each() is not None for each in kept)
    del replay
    gc.collect()
    assert not any(each() is not None for each in kept)


def test_other_libraries_that_cannot_be_imported_are_left_out(monkeypatch, capsys):
    timed = {}
    monkeypatch.setattr(benchmark, "measure", lambda contenders, *_: timed.update(contenders) or {})
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    for name in ("jax", "numpyro", "pythae"):
        monkeypatch.setitem(sys.modules, name, None)
    list(benchmark.epochs(benchmark.Settings(epoch_images=300), torch.device("cpu")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["NumPyro is installed", "pythae is installed"]
    assert "CompiledSVI" in timed
    assert not {"NumPyro", "pythae"} & timed.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats=2"], "--repeats must be at least 3"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--batch_sizes=[0]"], "--batch_sizes must all be at least 1"),
        (["--batch_sizes=[]"], "--batch_sizes must not be empty"),
        (["--parts=[]"], "--parts must not be empty"),
        (["--parts=[steps]"], "--parts: expected one of 'step', 'models', 'programs', 'epoch', 'evidence'"),
        (["--epoch_images=255"], "--epoch_images must be at least 256"),
        (["--long_repeats=2"], "--long_repeats must be at least 3"),
        (["--programs=[Ising]"], "--programs must be some of 'regression, AutoNormal'"),
        (["--model_batch_size=0"], "--model_batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(argv, message):
    with pytest.raises(runs.RunError, match=message):
        benchmark.main(argv)


def test_a_directory_in_use_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.delattr(benchmark, "measure")
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match="no empty directory"):
        benchmark.main([f"--run_dir={tmp_path}"])
