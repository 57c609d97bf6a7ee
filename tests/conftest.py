"""Every test starts from the same seed, and must leave Pyro's global state as it found it.

What takes seconds to import is imported by fixtures: the process that only hands out tests needs none of it.
"""

import contextlib
import gc
import os
from collections import Counter
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: small tensors gain nothing from threads, which
# wait for each other where other programs run; the runs that tests start inherit it

import pytest


@pytest.fixture(scope="session", autouse=True)
def traced():
    """Inductor takes seconds for every graph: tests run the traced graph, but for those marked ``inductor``."""
    from pyro_vae.infer import compiling, graphs

    compile_graph = compiling.compile_graph
    with pytest.MonkeyPatch.context() as patch:
        for module in (graphs, compiling):
            patch.setattr(module, "compile_graph", lambda graph, tensors: graph)
        yield lambda patch: [patch.setattr(module, "compile_graph", compile_graph) for module in (graphs, compiling)]


@pytest.fixture(autouse=True)
def inductor(request, monkeypatch, traced):
    if request.node.get_closest_marker("inductor"):
        traced(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """The figures of a run take as long as all the rest of a small one: whoever looks at them asks for ``drawing``."""
    from pyro_vae.runs import studies, training

    none = {name: lambda *args: None for name in ("training_curve", "evidence", "pictures")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "figures", SimpleNamespace(**none))
        patch.setattr(training, "report_after", lambda *args: None)
        patch.setattr(studies, "report_study_after", lambda *args: None)
        yield


@pytest.fixture(scope="session")
def drawing():
    """Where ``with drawing():`` stands, runs are drawn."""
    from pyro_vae.runs import figures, training

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "figures", figures)
            yield

    return context


@pytest.fixture(autouse=True)
def clean_state():
    import pyro
    import torch
    from torch.distributions import Distribution

    torch.manual_seed(0)
    before = (Distribution._validate_args, torch.get_default_dtype())
    yield
    assert not list(pyro.get_param_store().keys()), "something was left in Pyro's parameter store"
    assert (Distribution._validate_args, torch.get_default_dtype()) == before, "a global setting was changed"


@pytest.fixture
def doubles():
    """Programs draw in double precision."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.hookimpl(tryfirst=True)  # before tests that are marked slow are left out
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked ``one_in(n)`` those with every n-th place are quick, the others slow.

    The place is the sum of those in all its lists, so that each value of one list meets some of the other's.
    """
    seen = Counter()
    for item in items:
        if mark := item.get_closest_marker("one_in"):
            function = item.nodeid.partition("[")[0]
            place, rest = 0, seen[function]
            for each in reversed(list(item.iter_markers("parametrize"))):  # the last of them varies fastest
                rest, digit = divmod(rest, len(each.args[1]))
                place += digit
            seen[function] += 1
            if place % mark.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What was imported is not looked through whenever garbage is collected, which took a tenth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    from tests.chromium import CHROMIUM

    playwright = pytest.importorskip("playwright.sync_api", reason="there is no Playwright here")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()
