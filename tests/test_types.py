"""Every public function says the types of what it takes and returns; pyright, in CI, checks that they are true."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def functions(body, inside=""):
    """The public functions of a module and the public methods of its public classes, by name."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__"):
            yield inside + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{inside}{node.name}.")


def unannotated(source):
    """What of each public function has no type."""
    found = []
    for name, node in functions(ast.parse(source).body):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        found += [f"{name}: {a.arg}" for a in every if a and not a.annotation and a.arg not in ("self", "cls")]
        found += [] if node.returns else [f"{name}: what it returns"]
    return found


def test_every_public_function_is_annotated():
    paths = [*ROOT.glob("pyro_vae/**/*.py"), *ROOT.glob("experiments/*.py")]
    assert not {path.name: found for path in paths if (found := unannotated(path.read_text()))}


def test_a_missing_annotation_is_seen():
    source = "class A:\n    def f(self, x, *args: int, y: int = 1) -> int: ...\ndef _g(x): ...\ndef h(): ..."
    assert unannotated(source) == ["A.f: x", "h: what it returns"]
