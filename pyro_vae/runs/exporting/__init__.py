"""A trained model as programs that need nothing of this library: encoder, decoder and sampler, as ONNX or torch.export.

``export(run, out)`` writes them, compared with the model on real data first, beside ``manifest.json`` and a model card.
"""

import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyro_vae.errors import RunError, need_extra
from pyro_vae.files import PARTIAL
from pyro_vae.infer.trees import tensors
from pyro_vae.runs import cards
from pyro_vae.runs.directory import check_empty, inside, provenance, several, table, write_json, write_text, writing
from pyro_vae.runs.exporting.described import tensors_as_lists
from pyro_vae.runs.exporting.formats import ENDINGS, difference, opened, saved, traced, unused
from pyro_vae.runs.exporting.noise import Noise, NotExportable
from pyro_vae.runs.exporting.programs import PROGRAMS, Program, stored
from pyro_vae.runs.exporting.telling import meaning, observations_told, ports
from pyro_vae.runs.given import check_made, check_trust
from pyro_vae.runs.hub import is_downloaded
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.reading import bytes_of
from pyro_vae.runs.scoring import unit_of

Format = Literal["onnx", "torch"]
Part = Literal["encoder", "decoder", "sampler"]
MANIFEST = "manifest.json"
_COMPARED = 256
"""Data on which a program is compared with the model."""
_MOST_FLIPPED = 1e-3
"""Share of whole numbers drawn that rounding may change: where noise falls on the edge of two values."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        format: onnx, for onnxruntime and others; torch: programs of torch.export, .pt2, for torch alone.
        out: directory to write, new or empty; null: export-onnx, or export-torch, in the run.
        parts: which programs: encoder, from x and noise to the parameters of q(z given x) and a draw; decoder, from z
            to the parameters of p(x given z) and its mean; sampler, from noise to z, x and that mean.
        license: identifier of the licence of the weights, such as apache-2.0, for the model card; null: none is said.
        tolerance: how far an output may be from that of the model, ``|a - b| / max(1, |b|)``, positive; with more,
            nothing is written.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
    """

    DESCRIPTION: ClassVar[str] = (
        "A finished run as programs that need nothing of pyro_vae: ONNX files, or torch.export's.\n\n"
        "Usage: pyro-vae export RUN [--format onnx|torch] [--out DIR] [options]\n\n"
        "DIR gets encoder, decoder and sampler, for any number of data; manifest.json, which says what each input and\n"
        "output is; and README.md, a model card. Random numbers come in as inputs, so that the same noise makes the\n"
        "same draw. What standardizes inputs is inside. Each file is read back and compared with the model, on test\n"
        "data of the run where they are at hand; what cannot be written is refused in one line that names it."
    )

    run: Path
    format: Format = "onnx"
    out: Path | None = None
    parts: Sequence[Part] = ("encoder", "decoder", "sampler")
    license: str | None = None
    tolerance: float = 1e-5
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(get_args(Part)):
            raise ValueError(f"--parts must be different ones of {', '.join(get_args(Part))}, got {list(self.parts)}")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"--tolerance must be positive and finite, got {self.tolerance}")


class Exported(NamedTuple):
    """What was written: the directory, what ``manifest.json`` there says, and a text to show."""

    path: Path
    manifest: dict[str, Any]
    text: str


def export(
    run: Run | Path | str,
    out: Path | str | None = None,
    format: Format = "onnx",
    parts: Sequence[Part] = ("encoder", "decoder", "sampler"),
    license: str | None = None,
    tolerance: float = 1e-5,
    trust: bool | None = None,
) -> Exported:
    """Write a finished run as programs that need nothing of this library; all of them, or nothing.

    Args:
        run: a finished run, or its directory.
        out, format, parts, license, tolerance: see :class:`ExportSettings`.
        trust: see :func:`pyro_vae.runs.load`.

    Raises:
        RunError: if there is no such run, something is in ``out``, a part cannot be written as a program, which is
            named, or a program differs from the model by more than the tolerance.
        MissingExtra: without the packages of the extra ``export``, for ONNX.
    """
    check_trust(trust)
    try:
        settings = ExportSettings(Path(run), format, None if out is None else Path(out), parts, license, tolerance)
    except ValueError as error:
        raise RunError(str(error)) from error
    if format == "onnx":
        need_extra("export", ["onnx", "onnxscript", "onnxruntime"])
    cards.checked_license(license)
    place = settings.out or inside(settings.run, f"export-{format}", option="--out")
    check_empty(place, "--out")
    run = run if isinstance(run, Run) else load(settings.run, trust)
    with torch.random.fork_rng([]), _directory(place) as partial:
        torch.manual_seed(0)
        work = _Work(run, settings, partial)
        programs = {part: work.written(part) for part in settings.parts}
        manifest = _manifest(run, settings, work, programs)
        write_json(partial / MANIFEST, manifest)
        write_text(partial / cards.FILE, cards.card(run, license, manifest))
    return Exported(place, manifest, _text(manifest))


class _Work:
    """A run that is being exported, with the data on which its programs are compared."""

    def __init__(self, run: Run, settings: ExportSettings, out: Path):
        self.run, self.settings, self.out = run, settings, out
        self.vae, self.schema = run.model, run.schema
        self.given, self.on = self._data()

    def _data(self) -> tuple[dict[str, Tensor], str]:
        """Observations, and conditions as they are stored; and what they are."""
        try:
            x, *others = (each[:_COMPARED] for each in tensors(self.run.data.test))
            c = stored(others[0], self.schema.condition) if self.schema.condition else None
            on = f"{several(len(x), 'test ' + self.schema.noun)} of the run"
        except RunError as error:
            c, told = self._conditions(), f" (its data are not here: {error})"
            sampler = PROGRAMS["sampler"](self.vae, self.schema, [])
            try:
                x = sampler.run({} if c is None else {"c": c}, Noise(_COMPARED), _COMPARED)["x"]
            except NotExportable as other:
                raise RunError(f"there is nothing to compare programs on, without draws ({other}){told}") from error
            on = f"{several(len(x), self.schema.noun)} drawn by the model{told}"
        return {"x": x, **({} if c is None else {"c": c})}, on

    def _conditions(self) -> Tensor | None:
        """One of each kind of condition after the other, where the data are not at hand."""
        columns = self.schema.condition
        place = torch.arange(_COMPARED)
        made = [place % len(each.values) if each.values else each.loc + 0 * place for each in columns]
        return torch.stack(made, 1).float() if columns else None

    def written(self, part: Part) -> dict[str, Any]:
        """Write a program, read it back, compare it; return what the manifest says of it.

        Raises:
            NotExportable: if it cannot be written, or differs too much.
        """
        try:
            return self._written(part)
        except NotExportable as error:
            others = [each for each in self.settings.parts if each != part]
            hint = f"; --parts '[{', '.join(others)}]' leaves it out" if others else ""
            raise NotExportable(f"the {part} cannot be exported: {error}{hint}") from error

    def _written(self, part: Part) -> dict[str, Any]:
        with torch.no_grad():
            program, inputs, wanted = self._dry(part)
            trees = tensors_as_lists(program.trees)  # before tracing, of tensors without values
            traced_program = traced(program, list(inputs.values()))
            if idle := unused(traced_program, list(inputs)):  # such as labels that this part is not told
                inputs = {name: each for name, each in inputs.items() if name not in idle}
                program = PROGRAMS[part](self.vae, self.schema, list(inputs)).eval()
                traced_program = traced(program, list(inputs.values()))
            path = self.out / f"{part}{ENDINGS[self.settings.format]}"
            with writing(path):
                saved(traced_program, list(inputs), list(wanted), path)
            checked = self._compared(path, inputs, wanted)
        names = {"inputs": ports(inputs), "outputs": ports(wanted)}
        for end in names.values():
            for each in end:
                each["what"] = meaning(each["name"], part, self.schema, trees)
        sha256 = hashlib.sha256(bytes_of(path)).hexdigest()
        return {"file": path.name, "sha256": sha256, **names, "distributions": trees, "compared": checked}

    def _dry(self, part: Part) -> tuple[Program, dict[str, Tensor], dict[str, Tensor]]:
        """A program, the inputs that it may need, and its outputs: one run, by which it is found how much noise."""
        size = len(self.given["x"])
        given = dict(self.given)
        if part != "encoder":
            del given["x"]
        if part == "decoder":
            encoder, noise = PROGRAMS["encoder"](self.vae, self.schema, []), Noise(size)
            found = encoder.run(self.given, noise, size)
            given = {name: found[name] for name in encoder.trees} | given
        first, noise = PROGRAMS[part](self.vae, self.schema, []), Noise(size)
        outputs = first.run(given, noise, size)
        inputs = given | noise.whole()
        program = PROGRAMS[part](self.vae, self.schema, list(inputs)).eval()
        program.trees = first.trees
        if (mean := outputs.get("mean")) is not None and mean.isnan().all(0).any():
            raise NotExportable(
                f"entry {int(mean.isnan().all(0).nonzero()[0])} has no mean, and no most probable value"
            )
        return program, inputs, outputs

    def _compared(self, path: Path, inputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
        """How far a file's outputs are from the model's, for all data at once, and for one alone."""
        call, largest, flipped, whole = opened(path, list(wanted)), {}, 0, 0
        for size in (len(self.given["x"]), 1):
            found = call(*(each[:size].contiguous() for each in inputs.values()))
            for name, each in wanted.items():
                ours, theirs = each[:size], found[name]
                if name in ("x", "mean") and ours.shape == theirs.shape:  # whole numbers, which jump
                    jumps = (each == each.round()).all(0).expand_as(ours)
                    flipped, whole = flipped + int((ours != theirs)[jumps].sum()), whole + int(jumps.sum())
                    theirs = torch.where(jumps, ours, theirs)
                largest[name] = max(largest.get(name, 0.0), difference(theirs, ours))
        name = max(largest, key=lambda each: largest[each])
        tolerance = self.settings.tolerance
        if largest[name] > tolerance:
            told = f"its {name} differs from the model's by {largest[name]:.2g}, more than --tolerance {tolerance:g}"
            raise NotExportable(told)
        if flipped > max(1, _MOST_FLIPPED * whole):
            raise NotExportable(f"{flipped:,} of {whole:,} whole numbers that it draws are not those of the model")
        about = {"on": self.on, "batch_sizes": [len(self.given["x"]), 1], "measure": "|a - b| / max(1, |b|)"}
        about |= {"largest_difference": largest[name], "tolerance": tolerance, "by_output": largest}
        return about | {"whole_numbers": whole, "whole_numbers_that_differ": flipped}


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """Context: a directory to write to, which becomes ``out`` at the end; nothing is left of half an export."""
    partial = out.with_name(f"{out.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    with writing(f"--out {out}"):
        partial.mkdir(parents=True)
    try:
        yield partial
        with writing(f"--out {out}"):
            if out.is_dir():
                out.rmdir()  # it is empty, or this is refused
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _manifest(run: Run, settings: ExportSettings, work: _Work, programs: Mapping[str, Any]) -> dict[str, Any]:
    versions = provenance(torch.device("cpu"))["versions"]
    for name in ("onnx", "onnxscript", "onnxruntime") if settings.format == "onnx" else ():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # of another distribution, such as onnxruntime-gpu
            versions[name] = "unknown"
    result = run.result
    return {
        "format": settings.format,
        "model": type(work.vae).__name__,
        "programs": dict(programs),
        **observations_told(work.vae, work.schema),
        "log_likelihood": {"unit": unit_of(work.vae, work.schema), "is": "of the run, see README.md; not exported"},
        "run": {
            "name": run.name if is_downloaded(run.path) else run.path.resolve().name,
            "weights_sha256": hashlib.sha256(bytes_of(run.path / "model.safetensors")).hexdigest(),
            "dataset": result.get("dataset"),
            "data": result.get("data"),
        },
        "license": cards.checked_license(settings.license),
        "versions": versions,
    }


def _text(manifest: Mapping[str, Any]) -> str:
    rows = [("file", "inputs", "outputs", "largest difference")]
    for each in manifest["programs"].values():
        inputs, outputs = (", ".join(port["name"] for port in each[end]) for end in ("inputs", "outputs"))
        rows.append((each["file"], inputs, outputs, f"{each['compared']['largest_difference']:.1e}"))
    (first, *_) = manifest["programs"].values()
    return f"{table(rows)}\n\ncompared with the model on {first['compared']['on']}, |a - b| / max(1, |b|)"
