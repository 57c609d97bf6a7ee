"""Many holders compared in one go find what each of them finds."""

from collections import OrderedDict, deque

import pytest
import torch

from pyro_vae.infer import holding
from pyro_vae.infer.holding import Cells, Entries, Items, Named, Row, Slots


def closure_of(value):
    return (lambda: value).__closure__


class Settings:
    number = 1.5


CHANGES = {  # holder, change, whether the same is held afterwards
    "entry": (lambda: Entries({"a": 1.5, "b": 2}, ""), lambda d: d.update(a=2.5), False),
    "equal entry": (lambda: Entries({"a": 1.5, "b": 2}, ""), lambda d: d.update(a=float("1.5")), True),
    "another type": (lambda: Entries({"a": 1, "b": 2}, ""), lambda d: d.update(a=True), False),
    "sign of zero": (lambda: Entries({"a": 0.0}, ""), lambda d: d.update(a=-0.0), False),
    "new entry": (lambda: Entries({"a": 1.5}, ""), lambda d: d.update(c=1), False),
    "no entry": (lambda: Entries({"a": 1.5, "b": 2}, ""), lambda d: d.pop("b"), False),
    "renamed": (lambda: Entries({"a": 1.5, "b": 1.5}, ""), lambda d: d.update(c=d.pop("b")), False),
    "ordered": (lambda: Entries(OrderedDict(a=1, b=2), ""), lambda d: d.move_to_end("a"), False),
    "named": (lambda: Named({"a": 1.5, "b": 2}, "", ["a"]), lambda d: d.update(a=2), False),
    "not named": (lambda: Named({"a": 1.5, "b": 2}, "", ["a"]), lambda d: d.update(b=3), True),
    "appeared": (lambda: Named({"a": 1.5}, "", ["a", "c"]), lambda d: d.update(c=1), False),
    "of a class": (lambda: Named(vars(Settings), "", ["number"]), lambda _: setattr(Settings, "number", 2.5), False),
    "tensor": (lambda: Entries({"a": torch.ones(2)}, ""), lambda d: d.update(a=torch.ones(2)), False),
    "in a list": (lambda: Items([1.5, 2], ""), lambda items: items.__setitem__(0, 2.5), False),
    "equal in a list": (lambda: Items([1.5, 2], ""), lambda items: items.__setitem__(0, float("1.5")), True),
    "longer": (lambda: Items([1.5, 2], ""), lambda items: items.append(2), False),
    "deque": (lambda: Items(deque((1, 2)), ""), lambda items: items.rotate(), False),
    "closure": (lambda: Cells(closure_of(1.5), "", ("value",)), lambda c: setattr(c[0], "cell_contents", 2), False),
    "no closure": (lambda: Cells(closure_of(1.5), "", ("value",)), lambda c: delattr(c[0], "cell_contents"), False),
    "code": (
        lambda: Slots(lambda x=1: x, "", ["__code__", "__defaults__", "__kwdefaults__"]),
        lambda f: setattr(f, "__defaults__", (2,)),
        False,
    ),
}


@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_row_finds(name, versions, monkeypatch):
    if not versions:
        monkeypatch.setattr(holding, "dict_versions", lambda: None)
    monkeypatch.setattr(Settings, "number", 1.5)
    make, change, same = CHANGES[name]
    others, alone = [CHANGES[each][0]() for each in CHANGES if each != "of a class"], make()
    row = Row([*others[:10], alone, *others[10:]])
    assert row.holds()
    change(alone.of)
    assert [row.holds() for _ in range(3)] == [same] * 3
    assert alone.holds() == same


def test_versions_of_dicts_are_found():
    """Else nothing is wrong, but each step takes longer."""
    assert holding.dict_versions() is not None
