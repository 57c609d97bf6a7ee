"""Programs as files: traced by torch.export, written as .pt2 or .onnx, and compared with what they were made of."""

import contextlib
import io
import logging
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from pyro_vae.runs.exporting.noise import NotExportable

Call = Callable[..., dict[str, Tensor]]
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}


def traced(module: nn.Module, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """A module of tensors as one graph, for any number of data.

    Raises:
        NotExportable: naming the part at fault, if it cannot be traced, or draws random numbers of its own.
    """
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                module, tuple(inputs), dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)}, strict=False
            ).run_decompositions({})
    except NotExportable:
        raise
    except Exception as error:  # of torch, and of parts of anybody
        reason = textwrap.shorten(str(error).partition("\n")[0] or type(error).__name__, 200)
        if "Constraints violated" in reason:
            reason = "it fixes the number of data, as len(x) does where x.shape[0] does not"
        raise NotExportable(f"{_at_fault(error)} cannot be traced: {reason}") from error
    nodes = program.graph.nodes
    able = [each.target for each in nodes if torch.Tag.nondeterministic_seeded in getattr(each.target, "tags", ())]
    if able and not _same_again(program, inputs):  # such as a GRU, which has no dropout here
        raise NotExportable(f"random numbers are drawn inside, by {able[0]}, that do not come from the noise")
    for node in list(nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)  # it would keep what nothing else needs
    program.graph.eliminate_dead_code()
    _drop_idle_weights(program)
    program.graph_module.recompile()
    return program


def _same_again(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> bool:
    """Whether a program has the same outputs for the same inputs, wherever the random numbers of torch begin."""
    call, found = program.module(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(call(*inputs))
    return all(torch.equal(found[0][name].nan_to_num(0), found[1][name].nan_to_num(0)) for name in found[0])


def _drop_idle_weights(program: torch.export.ExportedProgram) -> None:
    """Take out the weights on which no output depends: those of a decoder have no place in an encoder's file."""
    specs, kept = program.graph_signature.input_specs, []
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, specs, strict=True):
        if node.users or spec.kind == InputKind.USER_INPUT:
            kept.append(spec)
            continue
        program.graph.erase_node(node)
        for known in (program.state_dict, program.constants):
            known.pop(str(spec.target), None)
    specs[:] = kept


def unused(program: torch.export.ExportedProgram, names: Sequence[str]) -> list[str]:
    """The inputs on which no output depends, but perhaps for how many data there are, which the others know too."""
    size = torch.ops.aten.sym_size.int
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
    pairs = zip(names, program.graph_signature.user_inputs, strict=True)
    return [name for name, node in pairs if all(user.target is size for user in users[str(node)])]


def saved(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], path: Path) -> None:
    """Write a traced program; the ending of the path says in which format.

    Raises:
        NotExportable: if the format cannot express it.
    """
    if path.suffix == ".pt2":
        with _quiet():
            torch.export.save(program, path)
        return
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, (), input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False
            )
            for each in made.model.graph:
                each.metadata_props.clear()
            made.save(path)
    except Exception as error:  # of an exporter that raises many kinds
        reason = textwrap.shorten(_last_line(error), 200)
        raise NotExportable(f"ONNX cannot express it: {reason}; --format torch may") from error


def opened(path: Path, outputs: Sequence[str]) -> Call:
    """A program that was written, called with tensors."""
    if path.suffix == ".pt2":
        with _quiet():
            program = torch.export.load(path).module()
        return lambda *inputs: program(*inputs)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(list(outputs), {n: each.numpy() for n, each in zip(names, inputs, strict=True)})
        return {name: torch.from_numpy(each) for name, each in zip(outputs, found, strict=True)}

    return call


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest |a - b| / max(1, |b|) of two tensors; what is NaN, or infinite, must be so in both."""
    if found.shape != wanted.shape:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    gap = ((found - wanted).abs() / wanted.abs().clamp(min=1)).double()
    gap = torch.where(same, 0.0, torch.where(gap.isfinite(), gap, torch.inf))
    return float(gap.max()) if gap.numel() else 0.0


def _at_fault(error: BaseException) -> str:
    """The innermost module that ran, which is none of torch."""
    found = "the model"
    place: TracebackType | None = error.__traceback__
    while place is not None:
        each = place.tb_frame.f_locals.get("self")
        if isinstance(each, nn.Module) and not type(each).__module__.startswith(("torch.", "pyro_vae.runs.")):
            found = type(each).__name__
        place = place.tb_next
    return found


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(traceback.format_exception_only(error)[-1].split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What exporters print and warn of is for their developers."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
