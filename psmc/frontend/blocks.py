"""The body of one lift, combine, recurrence or output: statements in order to single-assignment lets and results."""

from __future__ import annotations

from dataclasses import dataclass, field

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.block_scope import TITLE, BlockScope, handle_of
from psmc.frontend.declare import Declarations, check_kind
from psmc.frontend.elaborate import Env
from psmc.frontend.scope import Errors, a, suggest
from psmc.ir.rewrite import refs

MAX_STEPS = 64


@dataclass
class BlockResolver:
    """The statements of one block. Every assignment makes a new let; the last ones become results."""

    scope: BlockScope
    errors: Errors
    lets: list[ir.Assign] = field(default_factory=list)
    finals: dict[str, ir.Assign] = field(default_factory=dict)  # newest definition of each component
    versions: dict[str, int] = field(default_factory=dict)  # the last number given, by name
    taken: set[str] = field(init=False)  # names that a new let must not have

    def __post_init__(self) -> None:
        self.taken = set(self.found.names.names())

    @property
    def found(self) -> Declarations:
        return self.scope.found

    # --- statements -------------------------------------------------------------------------------

    def run(self, body: tuple[sf.Statement, ...]) -> None:
        """Read the whole body; mistakes are collected statement by statement."""
        env: dict[str, ir.Sub] = dict(self.scope.loops)
        for statement in body:
            with self.errors:
                if isinstance(statement, sf.For):
                    self._loop(statement)
                else:
                    self._assign(statement, env)
                continue
            self.scope.poisoned.update(_targets(statement))  # it failed: what reads them stays silent

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
        self.scope.namespace().check_free(node.var, "loop")
        if node.var.text in self.scope.loops:
            fail(
                "PSM205",
                f"loop variable '{node.var.text}' is bound twice",
                node.var.span,
                helps=("use another letter",),
            )
        outer = dict(self.scope.local)
        for step in range(dim.size):
            self.scope.loops[node.var.text] = step
            self.run(node.body)
            for name in [n for n in self.scope.local if n not in outer]:
                self.scope.newest.pop(name, None)
            self.scope.local = dict(outer)
            if self.errors:
                break
        del self.scope.loops[node.var.text]

    def _assign(self, node: sf.Assign, env: Env) -> None:
        name = node.target.text
        if self.scope.kind == "output" and not node.let:
            self._output(node, env)
        elif node.let:
            self.scope.namespace().check_free(node.target, "let")
            self.scope.local[name] = node.target
            self._push(name, name, self.scope.define(node, env, None))
        elif name in self.scope.local:
            self._push(name, name, self.scope.define(node, env, None))
        elif name in self.found.state:
            definition = self.scope.define(node, env, self.found.state[name])
            check_kind(definition.value, self.found.state[name], node.value.span, "this value")
            self.found.origin[f"{self.scope.kind} {name}"] = node.span
            self._push(name, f"{name}_1", definition)
            self.finals[name] = self.lets[-1]
        else:
            self._not_a_component(node)

    def _push(self, plain: str, wanted: str, definition: ir.Assign) -> None:
        """A new version of a name, as a let of its own."""
        version = wanted
        while version in self.taken:
            self.versions[plain] = number = self.versions.get(plain, 0) + 1
            version = f"{plain}_{number}"
        self.taken.add(version)
        self.lets.append(ir.Assign(version, definition.indices, definition.value))
        self.scope.newest[plain] = handle_of(self.lets[-1])
        self.scope.poisoned.discard(plain)

    def _output(self, node: sf.Assign, env: Env) -> None:
        name = node.target.text
        if name in self.scope.outputs:
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
        definition = self.scope.define(node, env, None)
        if definition.value.kind == "bool":
            fail(
                "PSM208",
                f"output '{name}' is a condition, not a number",
                node.value.span,
                helps=("turn a condition into a number: where(condition, 1, 0)",),
            )
        self.scope.outputs[name] = definition

    def _not_a_component(self, node: sf.Assign) -> None:
        name = node.target.text
        role = self.found.names.role(name)
        if role is not None:
            fail(
                "PSM212",
                f"{TITLE[self.scope.kind]} cannot assign '{name}', which is {a(role)}",
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

    # --- results ----------------------------------------------------------------------------------

    def block(self) -> ir.Block:
        """What was read, in single assignment; a component's last version is its result."""
        shared = [self.scope.shared[name] for name in self.found.lets if name in self.scope.shared]
        if self.scope.kind == "output":
            return ir.Block((*shared, *self.lets), tuple(self.scope.outputs.values()))
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
        return [name for name in self.found.state if name not in self.finals and name not in self.scope.poisoned]


def _targets(statement: sf.Statement) -> set[str]:
    if isinstance(statement, sf.Assign):
        return {statement.target.text}
    return set().union(*(_targets(inner) for inner in statement.body))
