"""What names mean inside one lift, combine, recurrence or output, and the definitions made there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from psmc import ir
from psmc.diagnostics import PsmcError, fail
from psmc.frontend import surface as sf
from psmc.frontend.budget import check_depth
from psmc.frontend.declare import Declarations
from psmc.frontend.elaborate import Elaborator, Env
from psmc.frontend.expand import delay
from psmc.frontend.indices import Indices
from psmc.frontend.misuse import wrong_rank
from psmc.frontend.scope import BlockKind, Handle, Library, Meaning, Namespace, Poisoned, a, suggest

# What a block reads by plain name, and which owners (`prev.S`) it knows besides a combine's operands.
_PLAIN: dict[BlockKind, tuple[str, ...]] = {
    "lift": ("input", "param"),
    "combine": ("param",),
    "recurrence": ("input", "param"),
    "output": ("input", "param", "state"),
}
TITLE: dict[BlockKind, str] = {
    "lift": "the lift",
    "combine": "the combine",
    "recurrence": "the recurrence",
    "output": "an output",
}
_WHY_NOT: dict[tuple[BlockKind, str], str] = {
    ("combine", "input"): "it sees two elements, not a token: put what it needs into the state, in the lift",
}


@dataclass
class BlockScope:
    """The `Scope` of a block's expressions; `BlockResolver` moves it on from statement to statement."""

    found: Declarations
    kind: BlockKind
    operands: dict[str, ir.Space] = field(default_factory=dict)
    shared: dict[str, ir.Assign] = field(default_factory=dict)  # aggregator-level lets that this block reads
    newest: dict[str, Handle] = field(default_factory=dict)  # components and local lets, by their plain name
    local: dict[str, sf.Name] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, ir.Assign] = field(default_factory=dict)
    poisoned: set[str] = field(default_factory=set)
    _in_shared: str | None = None  # the aggregator-level let being read

    @property
    def library(self) -> Library:
        return self.found.library

    def knows(self, name: str) -> bool:
        return name in self.found.names or name in self.local

    def namespace(self) -> Namespace:
        if not self.local:
            return self.found.names
        space = self.found.names.copy()
        for name in self.local.values():
            space.adopt(name.text, "let", name.span)
        return space

    def size(self, dim: str) -> int | None:
        found = self.found.dims.get(dim)
        return found.size if found else None

    def read(self, node: sf.Access) -> Meaning:
        if node.name.text in self.poisoned and (node.owner is None):
            raise Poisoned
        return delay(self._plain(node) if node.owner is None else self._owned(node, node.owner), node)

    def _plain(self, node: sf.Access) -> Meaning:
        name = node.name.text
        role = self.found.names.role(name)
        if self._in_shared is None and name in self.newest:
            return self.newest[name]
        if role == "const":
            return self.library.consts[name] if name in self.library.consts else self._silent()
        if role == "dim":
            return ir.DimValue(name)
        if role == "let":
            return self._shared(name)
        if role == "state" and self.kind != "output":
            return self._unassigned(node)
        if role in _PLAIN[self.kind]:
            space: dict[str, tuple[ir.Space, dict[str, ir.Tensor]]] = {
                "input": ("input", self.found.inputs),
                "param": ("param", self.found.params),
                "state": ("state", self.found.state),
            }
            where, tensors = space[str(role)]
            return self.found.handle(where, tensors[name]) if name in tensors else self._silent()
        if role is not None:
            through = f" (through let '{self._in_shared}')" if self._in_shared else ""
            reason = _WHY_NOT.get((self.kind, role), "")
            fail(
                "PSM210",
                f"{TITLE[self.kind]} cannot read {a(role)}{through}",
                node.span,
                label=f"'{name}' is {a(role)}",
                helps=(reason,) if reason else (),
            )
        self._unknown(node)

    def _silent(self) -> Meaning:
        raise Poisoned

    def _unassigned(self, node: sf.Access) -> Meaning:
        name = node.name.text
        if self._in_shared is not None:
            fail(
                "PSM210",
                f"let '{self._in_shared}' reads the state, so {TITLE[self.kind]} cannot use it",
                node.span,
                label=f"'{name}' is a component of the state",
                helps=(f"write the let inside {TITLE[self.kind]}, after '{name}' is assigned",),
            )
        if self.kind == "recurrence":
            return self.found.handle("prev", self.found.state[name]) if name in self.found.state else self._silent()
        if self.kind == "combine":
            one, two = self.operands
            fail(
                "PSM209",
                f"'{name}' is not assigned yet in the combine",
                node.span,
                helps=(f"write {one}.{name} (the earlier element) or {two}.{name} (the later one)",),
            )
        fail(
            "PSM209",
            f"'{name}' is not assigned yet in the lift",
            node.span,
            helps=("a lift turns one token into one element; a rule that sees the state before it is a recurrence",),
        )

    def _unknown(self, node: sf.Access) -> NoReturn:
        name = node.name.text
        known = [*self.found.names.names(), *self.local, *self.loops]
        hint = suggest(name, known)
        if name in ("eye", "iota"):
            hint = ("write eye(i, j) here" if name == "eye" else "an index variable is a number: write i",)
        if name in self.outputs:
            hint = (f"outputs cannot be read; name the value once: let x = …, output {name} = x",)
        fail("PSM201", f"unknown name '{name}'", node.span, helps=hint)

    def _owned(self, node: sf.Access, owner: sf.Name) -> Meaning:
        space = self.operands.get(owner.text)
        if space is None and owner.text == "prev" and self.kind in ("recurrence", "output"):
            space = "prev"
        if space is None:
            if owner.text == "prev":
                helps = ("'prev' is the state before this token, in a recurrence or an output",)
            elif self.kind == "combine":
                helps = (f"the operands are {' and '.join(self.operands)}",)
            else:
                helps = (
                    "only 'prev.' may stand before a name here"
                    if self.kind != "lift"
                    else "write the plain name of an input",
                )
            fail("PSM210", f"{TITLE[self.kind]} knows no '{owner.text}.'", owner.span, helps=helps)
        tensor = self.found.state.get(node.name.text)
        if tensor is None:
            fail(
                "PSM201",
                f"the state has no component '{node.name.text}'",
                node.name.span,
                helps=suggest(node.name.text, self.found.state)
                or (f"its components are {', '.join(self.found.state)}",),
            )
        return self.found.handle(space, tensor)

    def level(self, node: sf.Access) -> Handle:
        """The component of at(c).S."""
        if self.kind != "output" or self._in_shared is not None:
            where = f"let '{self._in_shared}'" if self._in_shared else TITLE[self.kind]
            fail("PSM230", f"{where} cannot read the counter: only an output does", node.span)
        handle = self._owned(node, sf.Name("prev", node.name.span))
        assert isinstance(handle, Handle)
        return replace(handle, space="level" if node.owner is None else "prev_level")

    def _shared(self, name: str) -> Handle:
        """An aggregator-level let, resolved where it is first read."""
        if name not in self.found.lets:
            raise Poisoned
        if name not in self.shared:
            before, self._in_shared = self._in_shared, name
            try:
                self.shared[name] = self.define(self.found.lets[name], {}, None)
            except PsmcError:
                self.poisoned.add(name)
                raise
            finally:
                self._in_shared = before
        return handle_of(self.shared[name])

    def define(self, node: sf.Assign, env: Env, tensor: ir.Tensor | None) -> ir.Assign:
        """name[indices] = value, with the dims of all indices found. `tensor`: what is declared of the target."""
        unknown = Indices()
        if tensor is not None and len(node.indices) != len(tensor.dims):
            access = sf.Access(None, node.target, (), 0, node.target.span)
            wrong_rank(access, self.found.handle("let", tensor), len(node.indices), bool(node.indices))
        elaborator = Elaborator(self, unknown, self.found.budget)
        inner = dict(env)
        bound: list[ir.Index] = []
        for position, name in enumerate(node.indices):
            index = elaborator.bind(name, inner)
            inner[name.text] = index
            bound.append(index)
            if tensor is not None:
                unknown.over(index, tensor.dims[position], name.span)
        value = unknown.finish(elaborator.expr(node.value, inner))
        check_depth(value, node.value.span)
        return ir.Assign(node.target.text, tuple(unknown.finished(i) for i in bound), value)


def handle_of(let: ir.Assign) -> Handle:
    return Handle("let", let.name, tuple(i.dim for i in let.indices), let.value.kind)
