"""The body of one lift, combine, recurrence or output: statements in order to single-assignment lets and results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from psmc import ir
from psmc.diagnostics import Label, PsmcError, fail
from psmc.frontend import surface as sf
from psmc.frontend.declare import Declarations, check_kind
from psmc.frontend.elaborate import Elaborator, Env, check_depth, wrong_rank
from psmc.frontend.expand import delay
from psmc.frontend.indices import Indices
from psmc.frontend.scope import BlockKind, Errors, Handle, Library, Meaning, Namespace, Poisoned, a, suggest
from psmc.ir.rewrite import refs

MAX_STEPS = 64

# What a block reads by plain name, and which owners (`prev.S`) it knows besides a combine's operands.
_PLAIN: dict[BlockKind, tuple[str, ...]] = {
    "lift": ("input", "param"),
    "combine": ("param",),
    "recurrence": ("input", "param"),
    "output": ("input", "param", "state"),
}
_TITLE: dict[BlockKind, str] = {
    "lift": "the lift",
    "combine": "the combine",
    "recurrence": "the recurrence",
    "output": "an output",
}
_WHY_NOT: dict[tuple[BlockKind, str], str] = {
    ("combine", "input"): "it sees two elements, not a token: put what it needs into the state, in the lift",
}


@dataclass
class BlockResolver:
    """Names and results of one block; also the `Scope` of its expressions."""

    found: Declarations
    kind: BlockKind
    errors: Errors
    operands: dict[str, ir.Space] = field(default_factory=dict)
    shared: dict[str, ir.Assign] = field(default_factory=dict)  # aggregator-level lets that this block reads
    lets: list[ir.Assign] = field(default_factory=list)
    newest: dict[str, Handle] = field(default_factory=dict)  # components and local lets, by their plain name
    finals: dict[str, ir.Assign] = field(default_factory=dict)  # newest definition of each component
    outputs: dict[str, ir.Assign] = field(default_factory=dict)
    poisoned: set[str] = field(default_factory=set)
    local: dict[str, sf.Name] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    _in_shared: str | None = None  # the aggregator-level let being read

    # --- Scope ------------------------------------------------------------------------------------

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
                f"{_TITLE[self.kind]} cannot read {a(role)}{through}",
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
                f"let '{self._in_shared}' reads the state, so {_TITLE[self.kind]} cannot use it",
                node.span,
                label=f"'{name}' is a component of the state",
                helps=(f"write the let inside {_TITLE[self.kind]}, after '{name}' is assigned",),
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
            fail("PSM210", f"{_TITLE[self.kind]} knows no '{owner.text}.'", owner.span, helps=helps)
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

    def _shared(self, name: str) -> Handle:
        """An aggregator-level let, resolved where it is first read."""
        if name not in self.found.lets:
            raise Poisoned
        if name not in self.shared:
            before, self._in_shared = self._in_shared, name
            try:
                self.shared[name] = self._define(self.found.lets[name], {}, None)
            except PsmcError:
                self.poisoned.add(name)
                raise
            finally:
                self._in_shared = before
        return handle_of(self.shared[name])

    # --- statements -------------------------------------------------------------------------------

    def run(self, body: tuple[sf.Statement, ...]) -> None:
        """Read the whole body; mistakes are collected statement by statement."""
        env: dict[str, ir.Sub] = dict(self.loops)
        for statement in body:
            with self.errors:
                if isinstance(statement, sf.For):
                    self._loop(statement)
                else:
                    self._assign(statement, env)
                continue
            self.poisoned.update(_targets(statement))  # it failed: what reads them stays silent

    def _loop(self, node: sf.For) -> None:
        dim = self.found.dims.get(node.dim.text)
        if dim is None:
            fail(
                "PSM201", f"unknown dim '{node.dim.text}'", node.dim.span, helps=suggest(node.dim.text, self.found.dims)
            )
        if dim.size is None or dim.size > MAX_STEPS:
            what = "has no fixed size" if dim.size is None else f"has size {dim.size}"
            fail(
                "PSM220",
                f"a loop is unrolled over a dim of fixed size, at most {MAX_STEPS}, and '{dim.name}' {what}",
                node.dim.span,
                helps=(f"dim {dim.name} = 2",),
            )
        self.namespace().check_free(node.var, "loop")
        if node.var.text in self.loops:
            fail(
                "PSM205",
                f"loop variable '{node.var.text}' is bound twice",
                node.var.span,
                helps=("use another letter",),
            )
        outer = dict(self.local)
        for step in range(dim.size):
            self.loops[node.var.text] = step
            self.run(node.body)
            for name in [n for n in self.local if n not in outer]:
                self.newest.pop(name, None)
            self.local = dict(outer)
            if self.errors:
                break
        del self.loops[node.var.text]

    def _assign(self, node: sf.Assign, env: Env) -> None:
        name = node.target.text
        if self.kind == "output" and not node.let:
            self._output(node, env)
        elif node.let:
            self.namespace().check_free(node.target, "let")
            self.local[name] = node.target
            self._push(name, name, self._define(node, env, None))
        elif name in self.local:
            self._push(name, name, self._define(node, env, None))
        elif name in self.found.state:
            definition = self._define(node, env, self.found.state[name])
            check_kind(definition.value, self.found.state[name], node.value.span, "this value")
            self.found.origin[f"{self.kind} {name}"] = node.span
            self._push(name, f"{name}_1", definition)
            self.finals[name] = self.lets[-1]
        else:
            self._not_a_component(node)

    def _push(self, plain: str, wanted: str, definition: ir.Assign) -> None:
        """A new version of a name, as a let of its own."""
        base, number = (plain, 1)
        version = wanted
        while version in self.taken:
            version, number = f"{base}_{number}", number + 1
        self.taken.add(version)
        self.lets.append(ir.Assign(version, definition.indices, definition.value))
        self.newest[plain] = handle_of(self.lets[-1])
        self.poisoned.discard(plain)

    def _output(self, node: sf.Assign, env: Env) -> None:
        name = node.target.text
        if name in self.outputs:
            fail(
                "PSM202",
                f"output '{name}' is given twice",
                node.target.span,
                labels=(Label(self.found.origin[f"output {name}"], "the first one"),),
                helps=("rename one of the two",),
            )
        if self.found.names.role(name) != "state":  # a component may be returned under its own name
            self.found.names.check_free(node.target, "output")
        self.found.origin[f"output {name}"] = node.span
        definition = self._define(node, env, None)
        if definition.value.kind == "bool":
            fail(
                "PSM208",
                f"output '{name}' is a condition, not a number",
                node.value.span,
                helps=("turn a condition into a number: where(condition, 1, 0)",),
            )
        self.outputs[name] = definition

    def _not_a_component(self, node: sf.Assign) -> None:
        name = node.target.text
        role = self.found.names.role(name)
        if role is not None:
            fail(
                "PSM212",
                f"{_TITLE[self.kind]} cannot assign '{name}', which is {a(role)}",
                node.target.span,
                helps=("give the new value a name of its own: let x = …",),
            )
        dims = f"[{', '.join('K' for _ in node.indices)}]" if node.indices else ""
        fail(
            "PSM212",
            f"'{name}' is not a component of the state",
            node.target.span,
            helps=(*suggest(name, self.found.state), f"declare it: state {name}{dims} = …; or write: let {name} = …"),
        )

    def _define(self, node: sf.Assign, env: Env, tensor: ir.Tensor | None) -> ir.Assign:
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

    # --- results ----------------------------------------------------------------------------------

    def block(self) -> ir.Block:
        """What was read, in single assignment; a component's last version is its result."""
        shared = [self.shared[name] for name in self.found.lets if name in self.shared]
        if self.kind == "output":
            return ir.Block((*shared, *self.lets), tuple(self.outputs.values()))
        lets = list(self.lets)
        results: list[ir.Assign] = []
        read = {r.name for let in lets for r in refs(let.value) if r.space == "let"}
        for name in self.found.state:
            last = self.finals.get(name)
            if last is None:
                continue
            if last.name in read:
                results.append(ir.Assign(name, last.indices, handle_of(last).at(last.indices)))
            else:
                lets.remove(last)
                results.append(ir.Assign(name, last.indices, last.value))
        return ir.Block((*shared, *lets), tuple(results))

    def missing(self) -> list[str]:
        """Components that were never assigned, nor tried to."""
        return [name for name in self.found.state if name not in self.finals and name not in self.poisoned]


def _targets(statement: sf.Statement) -> set[str]:
    if isinstance(statement, sf.Assign):
        return {statement.target.text}
    return set().union(*(_targets(inner) for inner in statement.body))


def handle_of(let: ir.Assign) -> Handle:
    return Handle("let", let.name, tuple(i.dim for i in let.indices), let.value.kind)
