"""A model card: README.md beside a model's files, in the format of Hugging Face, with what its run knows of it.

Names of columns, data sets and classes come from strangers: they are plain text in Markdown, and quoted in YAML.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pyro_vae.data.datasets import Column, Schema
from pyro_vae.errors import RunError
from pyro_vae.runs.directory import noun_of, several
from pyro_vae.runs.hub import is_downloaded
from pyro_vae.runs.loading import Run
from pyro_vae.runs.reading import weights_of, yaml_of
from pyro_vae.runs.reporting.contents import history_of, settings_apart
from pyro_vae.runs.reporting.words import Verdict, verdict
from pyro_vae.runs.scoring import number, rows_of

FILE = "README.md"
_MOST_COLUMNS = 100
_LOCAL = ("--run_dir", "--data_dir", "--device", "--resume", "--report", "--tensorboard", "--wandb", "--mlflow")
"""Settings that say where and how a run was made, not what it is."""
_OWN = ("pyro_vae", "pyro", "torch")
"""Packages whose classes are built whether a run is trusted or not."""


def card(run: Run, license: str | None = None, manifest: Mapping[str, Any] | None = None) -> str:
    """The model card of a finished run: Markdown that begins with metadata in YAML.

    Args:
        run: a finished run; its data set is not needed, and none of its classes is built.
        license: identifier of the licence of the weights, such as ``apache-2.0``; None: none is said, and the card says
            so.
        manifest: of the programs that lie beside the card, as ``pyro-vae export`` writes it; None: there are none.

    Raises:
        RunError: if the licence is no identifier, or a file of the run cannot be read.
    """
    license = checked_license(license)
    _, schema = weights_of(run.path)
    name = run.name if is_downloaded(run.path) else run.path.resolve().name or "run"
    found = verdict(run.result, run.evidence, history_of(run.path))
    metadata = yaml.safe_dump(_metadata(run, schema, name, found, license), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{metadata}---\n",
        f"# {plain(name)}\n",
        _about(run, schema),
        *_numbers(run, found),
        *_data(run, schema),
        *_settings(run),
        *_loading(run, schema, manifest),
        *_limits(license),
    ]
    return "\n".join(sections)


def checked_license(license: str | None) -> str | None:
    """An identifier of a licence in lower case, as Hugging Face spells it.

    Raises:
        RunError: if it is none.
    """
    if license is None:
        return None
    if not isinstance(license, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise RunError(f"--license: expected an identifier such as apache-2.0, mit or cc-by-4.0, got {license!r:.80}")
    return license.lower()


def plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, in one line: no markup, no link, no formula."""
    line = " ".join("".join(each if each.isprintable() else " " for each in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;").replace("$", "&#36;")
    line = re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", line)
    return re.sub(r"^([-+=#])|^(\d+)([.)])(?= |$)", r"\2\\\1\3", line)  # which begin lists, headings and rules


def _metadata(run: Run, schema: Schema, name: str, found: Verdict, license: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"license": license} if license is not None else {}
    content |= {"library_name": "pyro_vae", "tags": ["pyro", "variational-autoencoder", "density-estimation"]}
    drawn = schema.noun == "image" and not schema.condition
    if drawn:
        content["pipeline_tag"] = "unconditional-image-generation"
    if not math.isfinite(found.value):
        return content
    dataset = str(run.result.get("dataset") or "unknown")
    task = {"type": content["pipeline_tag"]} if drawn else {"type": "other", "name": "Density estimation"}
    unit = run.result["unit"]
    told = {"type": "log-likelihood", "value": round(found.value, 4), "name": f"log p(x), {unit}", "verified": False}
    where = {"type": re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "unknown", "name": dataset}
    result = {"task": task, "dataset": {**where, "split": "test"}, "metrics": [told]}
    return content | {"model-index": [{"name": name, "results": [result]}]}


def _about(run: Run, schema: Schema) -> str:
    try:
        model = str(yaml_of(run.path / "config.yaml").get("model", "VAE"))
    except RunError:
        model = "variational autoencoder"
    result = run.result
    told = f", given {plain(', '.join(column.name for column in schema.condition))}" * bool(schema.condition)
    dataset = plain(result.get("dataset") or "data")
    versions = result.get("versions") or {}
    made = f"pyro\\_vae {plain(versions.get('pyro_vae') or 'of an unknown version')}"
    shape = " x ".join(map(str, schema.shape))
    return f"A {plain(model)} of {dataset}: {schema.noun}s of shape {shape}{told}. It was trained with {made}.\n"


def _numbers(run: Run, found: Verdict) -> Iterator[str]:
    result = run.result
    yield "## Log-likelihood\n"
    value = "no number" if not math.isfinite(found.value) else f"**{number(found.value, 2)}**"
    error = "" if found.error is None else f" ± {number(found.error)} (Monte Carlo error)"
    over = number(result["test_log_likelihood_se"])
    yield f"log p(x) is {value}{error}, in {plain(result['unit'])}; larger is better. Another test set would differ by"
    yield f"± {over}. It is the mean over {several(result['num_images'], 'test ' + noun_of(result))}.\n"
    yield f"May it be believed? {plain(found.answer)}\n"
    for claim in found.claims:
        mark = {True: "for it", False: "against it", None: "neither"}[claim.good]
        yield f"- {mark}: {plain(claim.text)}"
    yield "\n" + _table(("number", "value", "what it is"), rows_of(result))


def _data(run: Run, schema: Schema) -> Iterator[str]:
    result = run.result
    yield "## Data\n"
    rows = [("data set", result.get("dataset")), ("fingerprint of its content", result.get("data"))]
    rows += [("shape of one " + schema.noun, " x ".join(map(str, schema.shape)))]
    if schema.pixels is not None:
        rows += [("pixels as stored", f"0..{schema.pixels.max_value}"), ("binarization", schema.pixels.binarization)]
    rows += [("test data", f"{result['num_images']:,}"), ("values may be missing", "yes" if schema.missing else "no")]
    yield _table(("what", "is"), rows)
    for title, columns in (("Columns", schema.columns), ("Told to the model beside x", schema.condition)):
        if columns:
            yield (
                f"{title}, log p(x) being in the units of these columns:\n"
                if columns is schema.columns
                else (f"{title}:\n")
            )
            yield _table(("column", "kind", "values"), [_column(each) for each in columns[:_MOST_COLUMNS]])
            if len(columns) > _MOST_COLUMNS:
                yield f"{len(columns) - _MOST_COLUMNS:,} more columns are not listed.\n"


def _column(column: Column) -> tuple[str, str, str]:
    shown = ", ".join(map(str, column.values[:20])) + ", .." * (len(column.values) > 20)
    return column.name, column.kind, shown or "any"


def _settings(run: Run) -> Iterator[str]:
    yield "## Settings that differ from the defaults\n"
    try:
        changed, _ = settings_apart(run.path)
    except RunError as error:
        yield f"The settings cannot be read: {plain(error)}\n"
        return
    rows = [
        (name, *(_without_folder(each) for each in values))
        for name, *values in changed
        if name.partition(".")[0] not in _LOCAL
    ]
    yield _table(("setting", "here", "default"), rows) if rows else "None.\n"


def _without_folder(value: str) -> str:
    """A path by its last name: where somebody's data lay is nobody's business."""
    bare = value.strip("'\"")
    return Path(bare).name or value if bare.startswith(("/", "~")) else value


def _loading(run: Run, schema: Schema, manifest: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## How to load it\n"
    if manifest is not None:
        yield _of_programs(manifest)
        yield "The run itself, with its weights as safetensors, is loaded by pyro\\_vae:\n"
    foreign = foreign_classes(run.path)
    trust = "" if foreign else ", trust=False"
    given = ", given=..." if schema.condition else ""
    about = "code of its author is run" if foreign else "nothing of it is executed"
    yield "```python\nfrom pyro_vae import runs\n"
    yield f'run = runs.load("DIRECTORY"{trust})  # the directory of the run; {about}'
    yield f"run.sample(10{given})\nrun.score(x{given})  # log p(x) of each row, with its error\n```\n"
    if foreign:
        yield "It needs classes of others, which loading imports and builds, so load it only if you trust them:"
        yield f"{plain(', '.join(foreign))}.\n"


def foreign_classes(directory: Path) -> list[str]:
    """Import paths in a run's settings of classes that are neither of this library nor of Pyro or torch."""
    found: dict[str, None] = {}
    waiting: list[Any] = [yaml_of(directory / "config.yaml")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            path = each.get("class_path")
            if isinstance(path, str) and path.partition(".")[0] not in _OWN:
                found[path] = None
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return list(found)


def _of_programs(manifest: Mapping[str, Any]) -> str:
    """The programs of an export, and how each is called."""
    rows = []
    for name, program in manifest["programs"].items():
        ends = [", ".join(f"{each['name']} {_shape(each['shape'])}" for each in program[e]) for e in _ENDS]
        rows.append((program.get("file") or name, *ends))
    text = "These programs need no pyro\\_vae; manifest.json says what each input and output is.\n\n"
    text += _table(("file", "inputs", "outputs"), rows)
    if manifest["format"] == "onnx":
        made = "import onnxruntime\n\ndecoder = onnxruntime.InferenceSession('decoder.onnx')\n"
        made += "decoder.run(None, {'z': z})  # z: float32"
    else:
        made = "import torch\n\ndecoder = torch.export.load('decoder.pt2').module()\ndecoder(z)"
    return f"{text}\n```python\n{made}\n```\n"


_ENDS = ("inputs", "outputs")


def _shape(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))})"


def _limits(license: str | None) -> Iterator[str]:
    yield "## Licence and limits\n"
    if license is None:
        yield "No licence was said for these weights: nobody is given leave to use them. Ask their author.\n"
    else:
        yield f"{plain(license)}, as said by who wrote this card.\n"
    yield "Nothing is known here of intended uses, of biases of the data, or of people in them. The log-likelihood is"
    yield "that of data like the training data, and says little of how good draws look."


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([plain(each) for each in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
