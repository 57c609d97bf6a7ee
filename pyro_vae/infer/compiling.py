"""Graphs of tensor operations made fast: by inductor, in bfloat16, and only where it pays."""

import contextlib
import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from pyro_vae.infer.tracing import first_line, trace_graph


@torch.library.custom_op("pyro_vae::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _bernoulli(probs: Tensor) -> Tensor:
    """``torch.bernoulli``, for which inductor would draw other random numbers, and other many."""
    return torch.bernoulli(probs)


@_bernoulli.register_fake
def _(probs: Tensor) -> Tensor:
    return torch.empty_like(probs)


def _with_torchs_draws(graph: GraphModule) -> GraphModule:
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bernoulli.default and not node.kwargs:
            node.target = torch.ops.pyro_vae.bernoulli.default
    graph.recompile()
    return graph


_OPTIONS = {"fallback_random": True, "triton.cudagraphs": False}  # steps are recorded whole, or not at all


def _cached(tensors: list[Tensor]) -> Any:
    """Context in which inductor looks into its cache on disk, which it does where shapes are on record; on a CPU."""
    if any(x.is_cuda for x in tensors):
        return contextlib.nullcontext()
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings sympy, which only compiling needs

    shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    return tracing(TracingContext(shapes))


def import_ahead() -> None:
    """Import what compiling needs, which takes seconds, while there is nothing else to do."""
    validation = Distribution._validate_args
    try:
        importlib.import_module("torch._inductor.compile_fx")
    finally:
        Distribution._validate_args = validation  # importing inductor switches it off for the whole process


def compile_graph(graph: GraphModule, tensors: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """What inductor makes of a traced graph; the graph itself, with a warning, where that fails.

    Inductor's own random numbers take as long as a matrix product on a CPU; those of torch are cheap, and the same as
    without compiling.
    """
    validation = Distribution._validate_args
    try:
        import torch._inductor as inductor  # takes a second, which only compiling should cost

        with torch.no_grad(), warnings.catch_warnings(), _cached(tensors):
            warnings.simplefilter("ignore")  # torch's, of its own future
            return cast(Any, inductor).compile(_with_torchs_draws(graph), tensors, options=_OPTIONS)
    except Exception as error:  # whatever inductor fails at, the traced graph is right
        reason = "it finds no C++ compiler, install g++ or clang" if _has_no_compiler(error) else first_line(error)
        warnings.warn(f"inductor cannot compile this, which runs uncompiled, and slower: {reason}", stacklevel=2)
        return graph
    finally:
        Distribution._validate_args = validation  # importing inductor switches it off for the whole process


class Compiled:
    """A function of tensors that runs Pyro programs, compiled for those shapes that come up often.

    Few calls are not worth the seconds that compiling takes, and run as they are. A graph that was compiled gives what
    the function gives, from the same random numbers, up to rounding; that is checked once, and where it does not
    hold, or the programs cannot be traced, the function goes on as it is, with a warning. Programs that draw Bernoulli
    variables are not compiled.

    Args:
        function: takes trees of tensors and gives tensors, or a tuple of them, without gradients; what else it reads
            must not change.
        often: calls of one shape before it is compiled; infinite: never.
        at_once: of the function's arguments, whether they are of a shape that is compiled at its first call.
    """

    def __init__(
        self, function: Callable[..., Any], often: float = 100, at_once: Callable[..., bool] = lambda *_: False
    ):
        self.function, self.often, self._at_once = function, often, at_once
        self._calls: Counter[tuple] = Counter()
        self._compiled: dict[tuple, Callable[..., Any]] = {}

    def anew(self) -> "Compiled":
        """The same, as if nothing had been called yet; graphs that were compiled are not compiled again.

        Each part of an estimate begins so: rounding must not depend on what was computed before in this process.
        """
        other = Compiled(self.function, self.often, self._at_once)
        other._compiled = self._compiled
        return other

    def __call__(self, *args: Any) -> Any:
        tensors, given = tree_flatten(args)
        key = given, *map(likeness, tensors)
        self._calls[key] += 1
        with torch.no_grad():
            if self._calls[key] <= self.often and not self._at_once(*args):
                return self.function(*args)
            if key not in self._compiled:
                self._compiled[key] = self._compile(tensors, given)
            return self._compiled[key](*tensors)

    def _compile(self, tensors: list[Tensor], given: TreeSpec) -> Callable[..., Any]:
        def function(*tensors: Tensor) -> Any:
            return self.function(*tree_unflatten(list(tensors), given))

        def flat(*tensors: Tensor) -> list[Tensor]:
            return tree_flatten(function(*tensors))[0]

        with undone(tensors, {}), torch.no_grad():
            leaves, spec = tree_flatten(function(*tensors))
        with undone(tensors, {}):
            try:
                with torch.enable_grad():  # some densities have a way of their own without, which inductor slows down
                    graph = trace_graph(flat, tensors)
            except Exception as error:  # the function itself has run: something in it cannot be traced
                warnings.warn(
                    f"log p(x) is computed uncompiled, since the programs cannot be traced: {first_line(error)}",
                    stacklevel=2,
                )
                return function
            if any(node.target is torch.ops.aten.bernoulli.default for node in graph.graph.nodes):
                return function  # inductor may draw these in another order, so that nothing could be checked
            compiled = compile_graph(graph, list(tensors))
        with undone(tensors, {}), torch.no_grad():
            found = compiled(*tensors)
        if all(map(_same_but_for_rounding, found, leaves)):
            return lambda *tensors: tree_unflatten(list(compiled(*tensors)), spec)
        warnings.warn(
            "log p(x) is computed uncompiled, since the compiled programs give something else: they depend on a Python "
            "number that changes, or on random numbers that are not torch's",
            stacklevel=2,
        )
        return function


class RoundedProducts(TorchDispatchMode):
    """Matrix products and convolutions of float32 tensors happen in bfloat16, and give float32 again."""

    products = frozenset(
        getattr(torch.ops.aten, name).default
        for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.products:
            return func(*args, **(kwargs or {}))
        down = tree_map_only(Tensor, lambda a: a.bfloat16() if a.dtype == torch.float32 else a, (args, kwargs or {}))
        result = func(*down[0], **down[1])
        return tree_map_only(Tensor, lambda a: a.float() if a.dtype == torch.bfloat16 else a, result)


def _has_no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler":
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


def likeness(x: Tensor) -> tuple:
    """What a graph is made for; strides too, since inductor reads memory."""
    return x.shape, x.stride(), x.dtype, x.device


def _same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by so little as another order of summation makes."""
    largest = b.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0).item() if b.numel() else 1.0
    tolerance = largest * (1e-10 if b.dtype == torch.float64 else 1e-5)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


@contextlib.contextmanager
def undone(tensors: Iterable[Tensor], modules: dict[int, nn.Module]) -> Iterator[None]:
    """Run programs without lasting effects: random states and buffers, such as running means, are put back.

    Modules whose ``forward`` runs meanwhile are added to ``modules``.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, *_: object) -> None:
        modules[id(module)] = module
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in kept:
                kept[id(buffer)] = buffer, buffer.detach().clone()

    for module in list(modules.values()):
        keep(module)
    hook = nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        with torch.random.fork_rng({x.device for x in tensors if x.is_cuda}):
            yield
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, value in kept.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
