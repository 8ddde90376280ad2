"""Runtime files as text for generated modules: imports collected, the rest verbatim."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
# In the order of their use; `tree` files only where a tree is the meaning of the spec or its state.
KIT = (
    "kit_scan",
    "kit_layer",
    "kit_tree",
    "kit_forest",
    "kit_bind",
    "kit_check",
    "kit_values",
    "kit_taps",
    "kit_run",
    "kit_op",
    "kit",
)
POINTWISE_KIT = ("kit_lanes", "kit_calls", "kit_step", "kit_launch")


@dataclass(frozen=True)
class Pasted:
    """`plain`: modules imported whole; `names`: module -> names imported from it; `body`: all below the imports."""

    plain: frozenset[str]
    names: tuple[tuple[str, frozenset[str]], ...]
    body: str
    defined: frozenset[str]


@cache
def paste(files: tuple[str, ...] = KIT) -> Pasted:
    """The files as one namespace. Asserts that no top-level name is defined twice."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    bodies: list[str] = []
    defined: set[str] = set()
    for name in files:
        text = (_RUNTIME / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        last = 0
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.module != "__future__" and not (node.module or "").startswith("psmc"):
                    names.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                here = set(_defined(node))
                assert not here & defined, f"{name}: {sorted(here & defined)} defined twice"
                defined |= here
                continue
            last = node.end_lineno or last
        doc = ast.get_docstring(tree) or name
        title = doc.split("\n\n")[0].replace("\n", " ")
        bodies.append(f"# {'-' * 3} {title}\n" + "\n".join(text.splitlines()[last:]).rstrip() + "\n")
    return Pasted(
        frozenset(plain),
        tuple(sorted((m, frozenset(n)) for m, n in names.items())),
        "\n\n".join(bodies),
        frozenset(defined),
    )


def _defined(node: ast.stmt) -> Iterable[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def imports(pasted: Pasted, plain: Iterable[str] = ()) -> str:
    """The import block, standard library first, sorted."""
    lines = [(module, f"import {module}") for module in pasted.plain | set(plain)]
    lines += [(module, f"from {module} import {', '.join(sorted(names))}") for module, names in pasted.names]
    standard = sorted(text for module, text in lines if module.split(".")[0] != "torch")
    ours = sorted(text for module, text in lines if module.split(".")[0] == "torch")
    return "\n".join(sorted(standard, key=_order)) + "\n\n" + "\n".join(sorted(ours, key=_order))


def _order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line
