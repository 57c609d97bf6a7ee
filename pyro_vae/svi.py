"""Engines: stochastic variational inference, one gradient step at a time; and the compiling of Pyro programs."""

import contextlib
import copy
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from pyro_vae.log_weights import Program, check_pathwise
from pyro_vae.networks import ContractError
from pyro_vae.objectives import Objective, check_choice


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the parameters are as they were before the step."""


class Engine(Protocol):
    """What :func:`pyro_vae.fit` asks of an engine: it is made of ``(model, guide, optim, loss)`` and has ``step``."""

    def step(self, x: Tensor) -> float | Tensor:
        """Take one gradient step on observations ``(B, X)``; return the loss, in the loss's own scale."""


class PyroSVI:
    """The reference engine: ``pyro.infer.SVI`` itself, and by default ``Trace_ELBO``.

    The optimizer's parameters are registered by one ``pyro.module`` per step, inside a parameter store of this
    engine's own. So several engines in a process all learn, and Pyro's global store stays as it was.

    Args:
        model: p(x, z); any Pyro program.
        guide: q(z | x); any Pyro program.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules, or the
            unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: one of Pyro's ELBOs, whose value and gradient are sums over the batch, or an objective of this
            library, whose are means. Default: ``Trace_ELBO()``.

    Raises:
        NonFiniteError: by ``step``, if a gradient is NaN or infinite; nothing has been updated then.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
    ):
        self.model = model
        self.guide = guide
        self.optim = optim
        self._params = pyro.get_param_store().get_state()
        modules = nn.ParameterList(
            p
            for group in optim.param_groups
            for p in group["params"]
            if isinstance(p, nn.Parameter) and p.requires_grad
        )

        def registered_model(*args, **kwargs):
            pyro.module("trained", modules)
            return model(*args, **kwargs)

        self._svi = SVI(registered_model, guide, _OneOptimizer(optim), loss=loss or Trace_ELBO())

    def step(self, *args: object, **kwargs: object) -> float:
        """Take one gradient step, on observations ``(B, X)`` for example; return the loss in its own scale."""
        with pyro.get_param_store().scope(self._params):
            return self._svi.step(*args, **kwargs)

    def evaluate_loss(self, *args: object, **kwargs: object) -> float:
        """The loss in its own scale, without a step."""
        with pyro.get_param_store().scope(self._params):
            return self._svi.evaluate_loss(*args, **kwargs)


class _OneOptimizer(PyroOptim):
    """Lets ``pyro.infer.SVI`` drive one torch optimizer for all parameters, so that schedules and checkpoints are
    those of torch. SVI calls it with the parameters it traced, and zeroes their gradients afterwards."""

    def __init__(self, optim: torch.optim.Optimizer):
        super().__init__(type(optim), {})
        self.optim = optim

    def __call__(self, params, *args, **kwargs) -> None:
        grads = [p.grad for group in self.optim.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
        if not torch.nn.utils.get_total_norm(grads).isfinite():
            self.optim.zero_grad()
            raise NonFiniteError("a gradient is NaN or infinite")
        self.optim.step()


_PLAIN = (bool, int, float, str, tuple, type(None))
MOST_GRAPHS = 16
"""So many graphs of one engine: more shapes or settings than that mean that something changes at every step."""


class CompiledSVI:
    """Stochastic variational inference whose step is one compiled graph; a drop-in for ``pyro.infer.SVI``.

    At the first step, and again for every new shape of the data, loss and gradients are traced together into one graph
    of tensor operations: Pyro's handlers, the programs' Python and the backward pass run then, and never again.
    torch's inductor compiles the graph; each step runs it, clips if asked, and lets the optimizer step. Nothing waits
    for the device: ``step`` returns a tensor, which is read when you need it. Random numbers are those that eager
    torch would draw, so that a seed gives the trajectory of :class:`PyroSVI`, up to rounding.

    On a GPU, the third step of a shape is recorded as a CUDA graph, and those after it replay the record. It holds the
    optimizer's step too if the optimizer is ``capturable``; a learning rate that changes must then be a tensor.

    The programs must have static structure: the same sites and shapes at every step, no Python that depends on the
    values of tensors, and latent sites whose draws are reparametrized. Python numbers are frozen into the graph, and
    tensors are the ones it met. Those that modules and the loss have as attributes are watched, and a change traces
    anew. What changes often, such as the weight of a warm-up, must be a tensor that is changed in place.

    NaN is not looked for: :func:`pyro_vae.fit` does, once per epoch.

    Args:
        model, guide: Pyro programs with the same arguments; see above.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules and automatic
            guides, or the unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: ``Trace_ELBO`` or ``TraceMeanField_ELBO``, whose value and gradient are sums over the batch, or an
            objective of this library, whose are means, for programs of one argument. Default: ``Trace_ELBO()``.
        max_norm: the norm of all gradients together is clipped to this, positive; None: not.
        precision: ``bfloat16`` rounds what matrix products and convolutions of float32 take and give to 8 significant
            bits, in forward and backward pass; all else, such as log-probabilities, parameters and the optimizer,
            keeps its type. ``float32`` leaves the programs as they are.
        compiler: ``inductor``; ``none`` runs the traced graph as it is, which is slower.
        cuda_graph: whether steps on a GPU are recorded and replayed.

    Raises:
        TypeError: if the loss is another of Pyro's, or no loss, or the optimizer is not one of torch that steps by
            itself, or an argument is neither a tensor nor hashable.
        ContractError: by the first step, if the programs have no static structure or a site cannot be reparametrized.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on, or others than at first.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
        max_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiler: Literal["inductor", "none"] = "inductor",
        cuda_graph: bool = True,
    ):
        loss = Trace_ELBO() if loss is None else loss
        if not isinstance(optim, torch.optim.Optimizer) or isinstance(optim, torch.optim.LBFGS):
            raise TypeError(
                f"optim must be an optimizer of torch that needs no closure, such as torch.optim.Adam(parameters), got "
                f"{type(optim).__name__}"
            )
        if isinstance(loss, type) or not (callable(loss) or isinstance(loss, PyroELBO)):
            raise TypeError(f"loss must be an instance, such as Trace_ELBO(), got {loss}")
        if isinstance(loss, PyroELBO) and type(loss) not in _BOUNDS:
            names = " and ".join(each.__name__ for each in _BOUNDS)
            raise TypeError(
                f"{type(loss).__name__} cannot be compiled, of Pyro's losses only {names} can: choose one of them, an "
                "objective of pyro_vae, or PyroSVI"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        check_choice("precision", precision, ("float32", "bfloat16"))
        check_choice("compiler", compiler, ("inductor", "none"))
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_norm, self.precision, self.compiler, self.cuda_graph = max_norm, precision, compiler, cuda_graph
        self._store = pyro.get_param_store().get_state()
        self._params = _parameters(optim)
        self._graphs: dict[tuple, _Graph] = {}
        roots = [getattr(root, "__self__", root) for root in (model, guide, loss)]
        self._modules = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        self._watched = _Attributes((*roots, *self._modules.values()))

    def step(self, *args: object, **kwargs: object) -> Tensor:
        """Take one gradient step; return the loss in its own scale, a tensor without a graph."""
        if [id(p) for p in _parameters(self.optim)] != [id(p) for p in self._params]:
            raise ValueError(
                "the optimizer holds other tensors than when CompiledSVI was made, or one of them has been frozen or "
                "freed since: make another"
            )
        graph, tensors = self._graph(args, kwargs, train=True)
        return graph.step(*tensors)

    def evaluate_loss(self, *args: object, **kwargs: object) -> Tensor:
        """The loss in its own scale, without a step; a tensor without a graph."""
        graph, tensors = self._graph(args, kwargs, train=False)
        return graph.run(*tensors)[0]

    def _graph(self, args: tuple, kwargs: dict, train: bool) -> tuple["_Graph", list[Tensor]]:
        leaves, spec = tree_flatten((args, kwargs))
        like = tuple(_like(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        given = train, spec, like, self._recorded(train)
        try:
            graph = self._graphs.get((*given, self._watched.values()))
        except TypeError as error:
            raise TypeError(f"arguments must be tensors or hashable Python values: {error}") from error
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                changed = self._watched.changed(key[-1] for key in self._graphs)
                raise ContractError(
                    f"{MOST_GRAPHS} graphs have been compiled, for other shapes of the data or other Python numbers"
                    f"{f', of which {changed} changed' if changed else ''}: give data of few shapes, and make what "
                    "changes between steps a tensor"
                )
            graph = _Graph(self, leaves, spec, train)
            self._watched.add(self._modules.values())  # those met on the way
            self._graphs[(*given, self._watched.values())] = graph
        return graph, [x for x in leaves if isinstance(x, Tensor)]

    def _recorded(self, train: bool) -> tuple:
        """What a CUDA graph holds besides the programs: where tensors lie, and the optimizer's numbers."""
        if not (train and self.cuda_graph and self._params and self._params[0].is_cuda):
            return ()
        groups = self.optim.param_groups if _is_capturable(self.optim) else []
        numbers = (value for group in groups for value in group.values() if isinstance(value, _PLAIN))
        return id(self.optim.state), *(p.data_ptr() for p in self._params), *numbers


class _Graph:
    """Loss and gradients for arguments of one shape, traced together and compiled; and the step that they make."""

    def __init__(self, svi: CompiledSVI, leaves: list[object], spec: TreeSpec, train: bool):
        self.svi = svi
        self.trained: list[Tensor] = []
        params = svi._params if train else []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
            loss = _loss(svi, args, kwargs)
            if not train:
                return (loss,)
            depends = bool(params) and isinstance(loss, Tensor) and loss.requires_grad  # no particles: the number 0
            gradients = torch.autograd.grad(loss, params, allow_unused=True) if depends else [None] * len(params)
            self.trained = [p for p, gradient in zip(params, gradients, strict=True) if gradient is not None]
            if not self.trained:
                raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
            return loss, *(gradient for gradient in gradients if gradient is not None)

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            if svi.precision == "float32":
                return run(*tensors)
            with _RoundedProducts():
                return run(*tensors)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        store = pyro.get_param_store()
        with store.scope(svi._store), _undone((*tensors, *svi._params), svi._modules), torch.enable_grad():
            self._try(svi, run, tensors)
            graph = _trace(traced, tensors)
        self._run = compile_graph(graph, tensors) if svi.compiler == "inductor" else graph
        self._recording = _Recording(self) if train and svi.cuda_graph and svi._params[0].is_cuda else None
        self._optimizer = svi.optim.state  # kept, so that its id stays its own

    def _try(self, svi: CompiledSVI, run: Callable, tensors: list[Tensor]) -> None:
        """An ordinary run first: its errors are easier to read than those of a trace."""
        store = pyro.get_param_store()
        known = set(store.keys())
        run(*tensors)
        held = {id(p) for p in svi._params}
        for name in set(store.keys()) - known:
            value = store._params[name]
            if not isinstance(value, nn.Parameter) and id(value) not in held:
                raise ValueError(
                    f"pyro.param '{name}' came into being at the first step, so that the optimizer does not hold it: "
                    "run the programs once, and then make optimizer and CompiledSVI"
                )

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradients."""
        with torch.no_grad():
            return self._run(*tensors)

    def step(self, *tensors: Tensor) -> Tensor:
        if self._recording is not None:
            return self._recording.step(*tensors)
        loss = self.differentiate(*tensors)
        self.svi.optim.step()
        return loss

    def differentiate(self, *tensors: Tensor) -> Tensor:
        """Set the parameters' gradients, clipped; return the loss."""
        loss, *gradients = self.run(*tensors)
        for p, gradient in zip(self.trained, gradients, strict=True):
            p.grad = gradient
        if self.svi.max_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.svi.max_norm)
        return loss


class _Recording:
    """Steps of one graph on a GPU: the first two run as they are, the third is recorded, it and all others replayed."""

    def __init__(self, graph: _Graph):
        self.graph, self.svi = graph, graph.svi
        self.whole = _is_capturable(graph.svi.optim)
        self.steps_before = 2  # kernels are compiled then, and the optimizer makes its state
        self.record: torch.cuda.CUDAGraph | None = None

    def step(self, *tensors: Tensor) -> Tensor:
        if self.steps_before == 0:
            self._record(tensors)
        self.steps_before -= 1
        if self.record is None:
            loss = self.graph.differentiate(*tensors)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be
                self.svi.optim.step()
            return loss
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given)
        self.record.replay()
        if not self.whole:
            for p, gradient in zip(self.graph.trained, self.gradients, strict=True):
                p.grad = gradient
            self.svi.optim.step()
        return self.loss.clone()  # the next replay overwrites it

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in tensors]
        record = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(record):
                self.loss = self.graph.differentiate(*self.inputs)
                self.gradients = [p.grad for p in self.graph.trained]
                if self.whole:
                    self.svi.optim.step()
        except RuntimeError as error:
            reason = _first_line(error)
            warnings.warn(f"a step cannot be recorded as a CUDA graph, and runs unrecorded: {reason}", stacklevel=5)
        else:
            self.record = record


def compile_graph(graph: GraphModule, tensors: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """What inductor makes of a traced graph; the graph itself, with a warning, where that fails.

    Inductor's own random numbers take as long as a matrix product on a CPU; those of torch are cheap, and the same as
    without compiling.
    """
    validation = Distribution._validate_args
    try:
        import torch._inductor as inductor  # takes a second, which those who do not compile need not wait

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own future
            return inductor.compile(copy.copy(graph), tensors, options={"fallback_random": True})
    except Exception as error:  # whatever inductor fails at, the traced graph is right
        reason = "it finds no C++ compiler, install g++ or clang" if _has_no_compiler(error) else _first_line(error)
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
        function: takes tensors and gives tensors, or a tuple of them, without gradients; what else it reads must not
            change.
        often: calls of one shape before it is compiled.
    """

    def __init__(self, function: Callable[..., Any], often: int = 100):
        self.function, self.often = function, often
        self._calls: Counter[tuple] = Counter()
        self._compiled: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        key = tuple(map(_like, tensors))
        self._calls[key] += 1
        if self._calls[key] == self.often + 1:
            self._compiled[key] = self._compile(tensors)
        run = self._compiled.get(key, self.function)
        with torch.no_grad():
            return run(*tensors)

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        def flat(*tensors: Tensor) -> list[Tensor]:
            return tree_flatten(self.function(*tensors))[0]

        with _undone(tensors, {}), torch.no_grad():
            leaves, spec = tree_flatten(self.function(*tensors))
        with _undone(tensors, {}):
            try:
                with torch.enable_grad():  # some densities have a way of their own without, which inductor slows down
                    graph = _trace(flat, tensors)
            except Exception as error:  # the function itself has run: something in it cannot be traced
                warnings.warn(
                    f"log p(x) is computed uncompiled, since the programs cannot be traced: {_first_line(error)}",
                    stacklevel=2,
                )
                return self.function
            if any(node.target is torch.ops.aten.bernoulli.default for node in graph.graph.nodes):
                return self.function  # inductor may draw these in another order, so that nothing could be checked
            compiled = compile_graph(graph, list(tensors))
        with _undone(tensors, {}), torch.no_grad():
            found = compiled(*tensors)
        if all(map(_same_but_for_rounding, found, leaves)):
            return lambda *tensors: tree_unflatten(list(compiled(*tensors)), spec)
        warnings.warn(
            "log p(x) is computed uncompiled, since the compiled programs give something else: they depend on a Python "
            "number that changes, or on random numbers that are not torch's",
            stacklevel=2,
        )
        return self.function


class _RoundedProducts(TorchDispatchMode):
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


def _is_capturable(optim: torch.optim.Optimizer) -> bool:
    return all(group.get("capturable") for group in optim.param_groups)


def _has_no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler":
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


def _like(x: Tensor) -> tuple:
    """What a graph is made for; strides too, since inductor reads memory."""
    return x.shape, x.stride(), x.dtype, x.device


def _same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by so little as another order of summation makes."""
    largest = b.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0).item() if b.numel() else 1.0
    tolerance = largest * (1e-10 if b.dtype == torch.float64 else 1e-5)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


@contextlib.contextmanager
def _undone(tensors: Iterable[Tensor], modules: dict[int, nn.Module]) -> Iterator[None]:
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
                buffer.copy_(value)


def _trace(function: Callable[..., Any], tensors: Iterable[Tensor]) -> GraphModule:
    """The graph of a function of tensors, with Pyro's validation, which looks at values, switched off.

    Raises:
        ContractError: if something else looks at the values of tensors.
    """

    def guarded(*tensors: Tensor) -> Any:
        with _Guard():
            return function(*tensors)

    validate = Distribution._validate_sample  # distributions made beforehand have a switch of their own, which is on
    Distribution._validate_sample = lambda self, value: None
    try:
        with pyro.validation_enabled(False):
            return make_fx(guarded)(*tensors)
    finally:
        Distribution._validate_sample = validate


class _Guard(TorchDispatchMode):
    """Refuses what depends on the values of tensors: a graph would hold those of the step at which it was traced."""

    looks = frozenset(
        getattr(getattr(torch.ops.aten, name), overload)
        for name, overload in (
            ("_local_scalar_dense", "default"),
            ("nonzero", "default"),
            ("masked_select", "default"),
            ("_unique2", "default"),
        )
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in self.looks or by_mask:
            raise ContractError(
                f"the programs look at the values of tensors{_where()}, in an if, a float(), an .item() or a choice by "
                "a mask, which one graph cannot hold: write torch.where, or train with PyroSVI"
            )
        return func(*args, **(kwargs or {}))


def _where() -> str:
    """The line of the programs that is running, outside of the libraries; empty if there is none."""
    for frame in reversed(traceback.extract_stack()):
        if "site-packages" not in frame.filename and Path(frame.filename).parent != Path(__file__).parent:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _parameters(optim: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.requires_grad]


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:  # a tuple that holds a list, for example
        return False
    return True


class _Attributes:
    """The numbers, strings and tensors that objects have as attributes, watched for changes."""

    def __init__(self, objects: Iterable[object]):
        self._seen: set[int] = set()
        self._numbers: list[tuple[dict, str]] = []
        self._tensors: list[tuple[dict, str]] = []
        self.add(objects)

    def add(self, objects: Iterable[object]) -> None:
        for each in objects:
            if id(each) in self._seen or not hasattr(each, "__dict__"):
                continue
            self._seen.add(id(each))
            holders = [vars(each)]
            if isinstance(each, nn.Module):
                holders += [each._parameters, each._buffers]
            for holder in holders:
                for name, value in holder.items():
                    if isinstance(value, Tensor):
                        self._tensors.append((holder, name))
                    elif type(value) in _PLAIN and _is_hashable(value):
                        self._numbers.append((holder, name))

    def values(self) -> tuple:
        """What they are now; of tensors, which ones."""
        numbers = tuple([holder.get(name) for holder, name in self._numbers])
        return numbers, tuple([id(holder.get(name)) for holder, name in self._tensors])

    def changed(self, found: Iterable[tuple]) -> str:
        """The names of the numbers that were not always the same."""
        columns = zip(*(numbers for numbers, _ in found if len(numbers) == len(self._numbers)), strict=True)
        return ", ".join(name for (_, name), each in zip(self._numbers, columns, strict=False) if len(set(each)) > 1)


def _loss(svi: CompiledSVI, args: tuple, kwargs: dict) -> Tensor:
    if not isinstance(svi.loss, PyroELBO):
        return svi.loss(svi.model, svi.guide, *args, **kwargs)
    bound, total = _BOUNDS[type(svi.loss)], 0.0
    for model_trace, guide_trace in svi.loss._get_traces(svi.model, svi.guide, args, kwargs):
        check_pathwise(guide_trace)
        total = total - bound(model_trace, guide_trace) / svi.loss.num_particles
    return total


def _sampled_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``Trace_ELBO`` differentiates if every site is reparametrized, without its waiting for the device."""
    log_p = sum(site["log_prob_sum"] for site in model_trace.nodes.values() if site["type"] == "sample")
    return log_p - sum(site["log_prob_sum"] for site in guide_trace.nodes.values() if site["type"] == "sample")


def _closed_form_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``TraceMeanField_ELBO`` differentiates: KL in closed form where it is known, else sampled."""
    bound = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        guide_site = guide_trace.nodes.get(name)
        if site["is_observed"] or guide_site is None:
            bound = bound + site["log_prob_sum"]
            continue
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
        except NotImplementedError:
            bound = bound + site["log_prob_sum"] - guide_site["log_prob_sum"]
        else:
            bound = bound - scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
    auxiliary = (s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n not in model_trace.nodes)
    return bound - sum(site["log_prob_sum"] for site in auxiliary)


_BOUNDS = {Trace_ELBO: _sampled_bound, TraceMeanField_ELBO: _closed_form_bound}
