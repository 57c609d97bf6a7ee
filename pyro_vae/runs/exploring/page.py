"""The page: components of Gradio, and which answer belongs to which of them."""

import json
import threading
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_vae.data.datasets import Column
from pyro_vae.data.files import PICTURES
from pyro_vae.errors import RunError
from pyro_vae.runs.exploring import markup
from pyro_vae.runs.exploring.aside import Aside
from pyro_vae.runs.exploring.explorer import MOST_UNITS, Datum, Estimate, Explorer, Latents, Unit

STEPS = 9
"""Of a walk."""
SHOWN_DRAWS = 8
"""Draws of what was not seen that are shown."""
MOST_FIELDS = 200
"""Of a form: a table with more columns is shown, and not typed in."""
TEMPLATES = files("pyro_vae.runs.exploring").joinpath("templates")
REFUSED = (RunError, ValueError, RuntimeError)
"""What a model may raise, told in a line: a stranger's may raise anything, as of numbers that are NaN."""
QUICK = {"show_progress": "hidden", "concurrency_id": "quick", "concurrency_limit": 1}
"""Answers of this process, one at a time."""
SLOW = {"show_progress": "hidden", "concurrency_id": "slow", "concurrency_limit": 1}
"""Those of the other."""


class Visit:
    """What one visitor looks at."""

    def __init__(self):
        self.datum: Datum | None = None
        self.first: Estimate | None = None
        self.ends: list[Datum | None] = [None, None]
        self.latents: Latents = {}
        self.count = 0


class Page:
    """The page of a run.

    Args:
        explorer: of the run.
        aside: the process that anneals.
    """

    def __init__(self, explorer: Explorer, aside: Aside):
        import gradio  # pyright: ignore[reportMissingImports]  # here: it takes seconds, and is an extra

        self.gr: Any = gradio
        self.explorer, self.aside = explorer, aside
        self.units = explorer.units[:MOST_UNITS]
        self.fields = explorer.schema.columns if len(explorer.schema.columns) <= MOST_FIELDS else ()
        self.conditions = explorer.schema.condition
        self._computing = threading.Lock()

    def build(self) -> Any:
        """The page, not served yet."""
        noun, run = self.explorer.schema.noun, self.explorer.run
        name = run.name if run.name.startswith("hf://") else run.path.resolve().name
        blocks = self.gr.Blocks(title="pyro-vae explore", analytics_enabled=False)
        with blocks:
            self.visit = self.gr.State(Visit())
            self.gr.HTML(f"<h1>{markup.escape(name)}</h1>{markup.notes(about(self.explorer))}")
            with self.gr.Row():
                with self.gr.Column(scale=1, min_width=280):
                    self.gr.HTML(f"<h2>One {noun}</h2>")
                    self._input()
                with self.gr.Column(scale=1, min_width=280):
                    self.gr.HTML("<h2>What the model makes of it</h2>")
                    self.message = self.gr.HTML(elem_id="message")
                    self.seen = self.gr.HTML(elem_id="seen")
                    self.scores = self.gr.HTML(elem_id="scores")
                    self.filled = self.gr.HTML(elem_id="filled")
            self.gr.HTML("<h2>The latent space</h2>")
            with self.gr.Tab("Move units"):
                self._sliders()
            with self.gr.Tab("Walk"):
                self._walk()
            with self.gr.Tab("Samples"):
                self._samples()
            with self.gr.Tab("Posterior"):
                self.posterior = self.gr.HTML(elem_id="posterior")
            self._wire(blocks)
        return blocks

    # What is asked: a drawing, a form, a file, a test datum

    def _input(self) -> None:
        noun = self.explorer.schema.noun
        self.given = [self._field(column, f"given: {column.name}") for column in self.conditions]
        if self.explorer.is_image:
            script = TEMPLATES.joinpath("canvas.js").read_text("utf-8")
            script = script.replace("SHAPE", json.dumps(self.explorer.schema.shape))
            board = TEMPLATES.joinpath("canvas.html").read_text("utf-8")
            self.canvas = self.gr.HTML(None, html_template=board, js_on_load=script, elem_id="canvas")
            self.entries = [self.canvas]
        else:
            with self.gr.Column(elem_classes="sliders"):
                self.entries = [self._field(column, column.name) for column in self.fields]
        with self.gr.Row():
            last = self.explorer.num_test - 1
            self.place = self.gr.Number(0, label=f"test {noun}, 0 to {last:,}", step=1)
            self.show = self.gr.Button(f"Show the test {noun}")
        kinds = [*PICTURES, ".npy", ".npz"] if self.explorer.is_image else [".csv", ".tsv", ".parquet"]
        self.upload = self.gr.UploadButton(f"Upload: the first {noun} of a file", file_types=kinds)

    def _field(self, column: Column, label: str) -> Any:
        """A field of a form, for a column."""
        if column.values:
            choices = [(markup.cell(value), value) for value in column.values]
            return self.gr.Dropdown(choices, value=None, label=label)
        return self.gr.Number(None, label=label)

    def _wire(self, blocks: Any) -> None:
        answers = [self.message, self.seen, self.scores, self.posterior, self.filled, self.moved, *self.sliders]
        last = {"trigger_mode": "always_last"}  # what is asked meanwhile is answered too, not dropped
        sources, how = [*self.entries, *self.given], {**last, **QUICK}
        shown = [*answers, *self.entries, *self.given]
        test = self.show.click(self.by_place, [self.visit, self.place], shown, **how)
        loaded = blocks.load(self.by_place, [self.visit, self.place], shown, **QUICK)
        file = self.upload.upload(self.by_file, [self.visit, self.upload, *self.given], shown, **QUICK)
        asked = [test, loaded, file]
        if self.entries:  # there is none of a table that is too wide for a form
            changes = [each.input for each in sources]
            asked.append(self.gr.on(changes, self.by_hand, [self.visit, *sources], answers, **how))
        for each in asked:
            each.then(self.fill, [self.visit], [self.filled], **how)
            each.then(self.anneal, [self.visit], [self.scores], **last, **SLOW)
        if self.sliders:
            moves = [slider.input for slider in self.sliders]
            self.gr.on(moves, self.move, [self.visit, *self.sliders], [self.moved], **how)
            self.back.click(self.put_back, [self.visit], [self.moved, *self.sliders], **QUICK)
        for number, button in enumerate(self.ends):
            button.click(self._ending(number), [self.visit], [self.walked], **QUICK)
        self.draw.click(self.sample, [self.visit, self.chosen], [self.samples], **QUICK)

    def _given(self, values: Sequence[Any]) -> dict[str, Any] | None:
        given = {column.name: value for column, value in zip(self.conditions, values, strict=True)}
        if empty := [name for name, value in given.items() if value is None]:
            raise RunError(f"the model has a condition: choose {empty[0]}")
        return given or None

    def by_hand(self, visit: Visit, *values: Any) -> list[Any]:
        """Answers on what was drawn or typed."""
        entries, given = values[: len(self.entries)], values[len(self.entries) :]

        def read() -> Datum:
            told = self._given(given)
            if self.explorer.is_image:
                return self.explorer.read_cells(*cells_of(entries[0]), told)
            row = {column.name: [value] for column, value in zip(self.fields, entries, strict=True)}
            return self.explorer.read(pd.DataFrame(row), told)

        return self._answers(visit, read)

    def by_place(self, visit: Visit, place: Any) -> list[Any]:
        """Answers on a test datum, which is brought into the canvas or the form, with its condition."""
        return [*self._answers(visit, lambda: self.explorer.test_datum(place)), *self._back(visit)]

    def by_file(self, visit: Visit, file: str, *given: Any) -> list[Any]:
        """Answers on the first datum of a file, which may have its condition."""
        told = {column.name: value for column, value in zip(self.conditions, given, strict=True) if value is not None}
        return [*self._answers(visit, lambda: self.explorer.read_file(Path(file), told or None)), *self._back(visit)]

    def _answers(self, visit: Visit, read: Callable[[], Datum]) -> list[Any]:
        try:
            with self._computing:
                datum = read()
                looked = self.explorer.look(datum)
                first = self.explorer.score(datum)
        except REFUSED as error:
            visit.datum = visit.first = None  # nothing of another datum stands beside the refusal
            return [markup.notes([str(error)], "wrong"), *[""] * 5, *(self.gr.skip() for _ in self.sliders)]
        visit.datum, visit.first = datum, first
        visit.latents = looked.loc
        return [
            markup.notes(datum.told),
            self._shown(datum.x, looked.made),
            markup.scores(self.explorer, first, None),
            markup.posterior(self.units, looked.loc, looked.scale)
            if self.units
            else markup.notes(["No unit is active."]),
            "",
            *self.put_back(visit),
        ]

    def _shown(self, x: Any, made: Any) -> str:
        if self.explorer.is_image:
            told = ["as the model sees it", "its reconstruction"]
            return markup.pictures(self.explorer, torch.cat([x, made]), told, "the image and its reconstruction")
        rows = [(name, markup.cell(x[name].iloc[0]), markup.cell(made[name].iloc[0])) for name in made]
        return markup.table(["column", "value", "reconstruction"], rows, "the row and its reconstruction")

    def _back(self, visit: Visit) -> list[Any]:
        """The datum for the canvas or the form, and its condition for the fields of that."""
        if visit.datum is None:
            return [self.gr.skip() for _ in (*self.entries, *self.given)]
        visit.count += 1
        x, told = visit.datum.x, visit.datum.given or {}
        given = [typed(column, told.get(column.name)) for column in self.conditions]
        if not self.explorer.is_image:
            return [*(typed(column, x[column.name].iloc[0]) for column in self.fields), *given]
        cells, unseen = self.explorer.cells(visit.datum)
        return [{"by": "run", "number": visit.count, "cells": cells, "unseen": unseen}, *given]

    # What takes longer than the first answers

    def fill(self, visit: Visit) -> str:
        """What was not seen, given what was."""
        datum = visit.datum
        if datum is None:
            return ""
        try:
            with self._computing:
                gaps = self.explorer.gaps(datum)
                if not gaps.any():
                    return ""
                filled = self.explorer.impute(datum)
        except REFUSED as error:
            return markup.notes([str(error)], "wrong")
        found = filled.imputation
        good = found.evidence.reliable
        doubt = "Pareto k of the weights of these draws is too large: they are not to be believed."
        told = [doubt] if good is not None and not good[0] else []
        if not self.explorer.is_image:
            names = [column.name for column in self.explorer.schema.columns]
            rows = [
                (
                    name,
                    markup.cell(filled.values[name].iloc[0]),
                    "-" if column.values else markup.cell(found.std[0, place].item()),
                )
                for place, (name, column) in enumerate(zip(names, self.explorer.schema.columns, strict=True))
                if gaps.flatten()[place]
            ]
            made = markup.table(["column", "given what was seen", "deviation"], rows, "what was not seen")
        else:
            shape = self.explorer.schema.shape
            rows = torch.stack([found.mean[0], *found.draws[:SHOWN_DRAWS, 0]]).reshape(-1, *shape)
            names = ["mean", *(f"draw {number + 1}" for number in range(SHOWN_DRAWS))]
            made = markup.pictures(self.explorer, rows, names, "what was not seen, filled in")
        entries = f"{gaps.sum():,} entr{'y' if gaps.sum() == 1 else 'ies'}"
        head = f"<h3>What was not seen, given what was: {entries}</h3>"
        return f'{head}<div class="small">{made}</div>{markup.notes(told)}'

    def anneal(self, visit: Visit) -> Any:
        """The annealed estimate, from the other process, if the visitor still looks at the same datum."""
        datum, first = visit.datum, visit.first
        if datum is None or first is None:
            return self.gr.skip()
        try:
            found: Estimate | str = self.aside.annealed(datum)
        except RunError as error:
            found = f"no annealed estimate: {error}"
        return markup.scores(self.explorer, first, found) if visit.datum is datum else self.gr.skip()

    # The latent space

    def _sliders(self) -> None:
        self.sliders: list[Any] = []
        if not self.units:
            self.gr.HTML(markup.notes(["No unit varies with the data: there is nothing to move."]))
            self.moved = self.gr.HTML(elem_id="moved")
            return
        left = len(self.explorer.units) - len(self.units)
        told = "E[x given z], from the posterior mean of the datum above. Each slider goes as far as the unit does in "
        told += "test data; the units that vary most are first."
        self.gr.HTML(markup.notes([told, *([f"{left:,} more active units stay where they are."] if left else [])]))
        with self.gr.Row():
            with self.gr.Column(scale=1 if self.explorer.is_image else 3, min_width=200, elem_classes="beside"):
                self.moved = self.gr.HTML(elem_id="moved")
                self.back = self.gr.Button("Back to the datum")
            with self.gr.Column(scale=4, min_width=260, elem_classes="sliders"):
                for unit in self.units:
                    step = 1 if unit.discrete else 0.01
                    name = markup.name(unit, self.units)
                    self.sliders.append(self.gr.Slider(unit.low, unit.high, 0, step=step, label=name, buttons=[]))

    def put_back(self, visit: Visit) -> list[Any]:
        """The image of the latents as they are, and the sliders at them."""
        if not visit.latents:
            return [self.gr.skip() for _ in range(1 + len(self.sliders))]
        values = [stop(unit, visit.latents) for unit in self.units]
        return [self.move(visit, *values), *values]

    def move(self, visit: Visit, *values: float) -> str:
        """E[x | z] where the sliders are."""
        if visit.datum is None or not values:
            return ""
        try:
            set_to = {unit: float(value) for unit, value in zip(self.units, values, strict=True)}
            others = {unit: value for unit, value in set_to.items() if value != stop(unit, visit.latents)}
            with self._computing:
                moved = self.explorer.moved(visit.latents, others)
                made = self.explorer.decode(moved, visit.datum.given)
        except REFUSED as error:
            return markup.notes([str(error)], "wrong")
        if self.explorer.is_image:
            return markup.picture(self.explorer, made[0], "", "what the model makes of the latents")
        return markup.frame(made, "what the model makes of the latents")

    def _walk(self) -> None:
        noun = self.explorer.schema.noun
        self.gr.HTML(
            markup.notes(
                [
                    f"E[x given z] on the straight line between the posterior means of two {noun}s: look at one, start "
                    "there; look at another, end there."
                    + " Its condition is that of the start."
                    * bool(self.conditions)
                ]
            )
        )
        with self.gr.Row():
            self.ends = [self.gr.Button(f"Start at this {noun}"), self.gr.Button(f"End at this {noun}")]
        self.walked = self.gr.HTML(elem_id="walked")

    def _ending(self, number: int) -> Callable[[Visit], str]:
        def walk(visit: Visit) -> str:
            visit.ends[number] = visit.datum
            first, last = visit.ends
            if first is None or last is None:
                return markup.notes([f"Now look at another {self.explorer.schema.noun}, and choose the other end."])
            with self._computing:
                made = self.explorer.walk(first, last, STEPS)
            if not self.explorer.is_image:
                return markup.frame(made, "the walk")
            names = [f"{step / (STEPS - 1):.0%}" for step in range(STEPS)]
            return markup.pictures(self.explorer, made, names, "the walk")

        return walk

    def _samples(self) -> None:
        kind = "Means of x given z, z drawn from the prior." if self.explorer.is_image else "Draws of rows."
        self.gr.HTML(markup.notes([kind]))
        self.chosen = self.gr.Slider(1, 60, 12, step=1, label="how many, of each class")
        self.draw = self.gr.Button("Draw")
        self.samples = self.gr.HTML(elem_id="samples")

    def sample(self, visit: Visit, number: float) -> str:
        """Samples: of each class, where there are classes; of other conditions, given that of the datum."""
        visit.count += 1
        try:
            with self._computing:
                rows = []
                for told, given in self._classes(visit):
                    rows.append((told, self.explorer.sample(int(number), given, self.explorer.seed + visit.count)))
        except REFUSED as error:
            return markup.notes([str(error)], "wrong")
        shown = []
        for told, made in rows:
            head = f"<h3>{markup.escape(told)}</h3>" if told else ""
            if self.explorer.is_image:
                names = [""] * len(made)
                shown.append(head + markup.pictures(self.explorer, made, names, f"samples {told}"))
            else:
                shown.append(head + markup.frame(made, f"samples {told}"))
        return f'<div class="small">{"".join(shown)}</div>'

    def _classes(self, visit: Visit) -> list[tuple[str, dict[str, Any] | None]]:
        if not self.conditions:
            return [("", None)]
        if len(self.conditions) == 1 and self.conditions[0].values:
            (column,) = self.conditions
            return [(f"{column.name} {value}", {column.name: value}) for value in column.values[:20]]
        if visit.datum is None or visit.datum.given is None:
            return []
        told = ", ".join(f"{name} {markup.cell(value)}" for name, value in visit.datum.given.items())
        return [(f"given {told}", visit.datum.given)]


def about(explorer: Explorer) -> list[str]:
    """What the page is about, in lines: the run, and how pixels become observations."""
    result, rule = explorer.run.result, explorer.schema.pixels
    lines = [f"{explorer.data.title}; the run's log p(x) is {result['test_log_likelihood']:.2f} {explorer.unit}."]
    if not explorer.is_image:
        lines.append("An empty field was not seen: log p(x) is then that of the others, and it is filled in below.")
        return lines
    shape = " x ".join(map(str, explorer.schema.shape[1:]))
    how = {
        "dynamic": "a pixel is 1 with a probability that is its grey value, drawn with the seed of the test set",
        "static": "a pixel is 1 with a probability that is its grey value, drawn with the seed of the test set",
        "threshold": "a pixel is 1 where it is above half of white",
        "dequantized": "noise of one level is added to each pixel, with the seed of the test set",
        "integers": "a pixel is its level as a whole number",
        "none": "a pixel is its grey value between 0 and 1",
    }.get(rule.binarization if rule else "none", "as they are")
    lines.append(
        f"You draw on {shape} pixels, those of the data, black being 0. A drawing is encoded as the run's own data "
        f"are: {how}. A picture that is uploaded is cut to its middle and brought to this size first, as pyro-vae "
        "score does."
    )
    return lines


def cells_of(value: Any) -> tuple[Any, Any]:
    """What the canvas sent: its cells, and which were not seen."""
    if not isinstance(value, dict) or not {"cells", "unseen"} <= value.keys():
        raise RunError("draw something first")
    return value["cells"], value["unseen"]


def stop(unit: Unit, latents: Latents) -> float:
    """Where a slider stands for the latents, which may lie between its stops, or beyond its ends."""
    return min(max(round(latents[unit.site][0, unit.place].item(), 2), unit.low), unit.high)


def typed(column: Column, value: Any) -> Any:
    """A value for its field; None: not seen."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    return value if column.values else float(f"{float(value):.7g}")
