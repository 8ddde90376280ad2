"""Runtime files as text for generated modules: imports collected, the rest verbatim."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from psmc.codegen.specialise import Part, answered, names_read, reachable

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
POINTWISE_KIT = ("kit_lanes", "kit_ahead", "kit_calls", "kit_step", "kit_launch")


@dataclass(frozen=True)
class Pasted:
    """`plain`: modules imported whole; `names`: module -> names imported from it; `body`: all below the imports."""

    plain: frozenset[str]
    names: tuple[tuple[str, frozenset[str]], ...]
    body: str
    defined: frozenset[str]


@cache
def paste(
    files: tuple[str, ...] = KIT, roots: frozenset[str] | None = None, false: frozenset[str] = frozenset()
) -> Pasted:
    """The files as one namespace. Asserts that no top-level name is defined twice.

    `roots`: names that are wanted, with all that they need (None: everything); `false`: conditions that never hold.
    """
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    parts: list[Part] = []
    titles: dict[str, str] = {}
    defined: set[str] = set()
    for name in files:
        text = answered((_RUNTIME / f"{name}.py").read_text(encoding="utf-8"), false)
        tree, lines = ast.parse(text), text.splitlines()
        doc = ast.get_docstring(tree) or name
        titles[name] = doc.split("\n\n")[0].replace("\n", " ")
        last = 0
        for node in tree.body:
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.Import):
                plain |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.module != "__future__" and not (node.module or "").startswith("psmc"):
                    names.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                here = frozenset(_defined(node))
                assert not here & defined, f"{name}: {sorted(here & defined)} defined twice"
                defined |= here
                parts.append(Part(name, "\n".join(lines[last:end]) + "\n", here, names_read(node)))
            last = end
    if roots is not None:
        parts = reachable(parts, roots)
    bodies = []
    for name in files:
        here_text = "".join(p.text for p in parts if p.file == name)
        if here_text:
            bodies.append(f"# {'-' * 3} {titles[name]}\n" + here_text.rstrip() + "\n")
    return Pasted(
        frozenset(plain),
        tuple(sorted((m, frozenset(n)) for m, n in names.items())),
        "\n\n".join(bodies),
        frozenset(x for p in parts for x in p.defines),
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


def imports(pasted: Pasted, used: frozenset[str] | None = None, plain: Iterable[str] = ()) -> str:
    """The import block, standard library first, sorted. `used`: the names that the module reads (None: all)."""
    whole = {m for m in pasted.plain | set(plain) if used is None or m.split(".")[0] in used}
    lines = [(module, f"import {module}") for module in whole]
    for module, names in pasted.names:
        wanted = sorted(names if used is None else names & used)
        if wanted:
            lines.append((module, f"from {module} import {', '.join(wanted)}"))
    standard = sorted(text for module, text in lines if module.split(".")[0] != "torch")
    ours = sorted(text for module, text in lines if module.split(".")[0] == "torch")
    return "\n".join(sorted(standard, key=_order)) + "\n\n" + "\n".join(sorted(ours, key=_order))


def _order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line
