"""Identity elements: expressions over numbers, consts, dims, `eye` and `iota`."""

from __future__ import annotations

from dataclasses import dataclass

from psmc import ir
from psmc.diagnostics import fail
from psmc.frontend import surface as sf
from psmc.frontend.declare import Declarations, check_kind
from psmc.frontend.elaborate import Elaborator
from psmc.frontend.expand import delay
from psmc.frontend.indices import Indices
from psmc.frontend.scope import Errors, Library, Meaning, Namespace, suggest


@dataclass(frozen=True)
class _IdentityScope:
    """An identity is made of numbers, dims, `eye` and `iota`."""

    found: Declarations
    indices: tuple[ir.Index, ...]

    @property
    def library(self) -> Library:
        return self.found.library

    def read(self, node: sf.Access) -> Meaning:
        name = node.name.text
        if node.owner is None:
            special = self._special(name, node)
            if special is not None:
                return special
            if name in self.library.consts:
                return delay(self.library.consts[name], node)
            if name in self.found.dims:
                return delay(ir.DimValue(name), node)
        if self.found.names.role(name) is not None:
            fail(
                "PSM222",
                f"an identity element cannot read '{name}'",
                node.span,
                helps=("it is made of numbers, consts, dims, 'eye' and 'iota'",),
            )
        fail("PSM201", f"unknown name '{name}'", node.span, helps=suggest(name, [*self.library.consts, "eye", "iota"]))

    def _special(self, name: str, node: sf.Access) -> ir.Expr | None:
        rank = {"eye": 2, "iota": 1}.get(name)
        if rank is None or name in self.found.names:
            return None
        if len(self.indices) != rank or len({i.dim for i in self.indices}) != 1:
            shape = "a square matrix, as in A[K, K]" if rank == 2 else "a vector, as in p[N]"
            fail("PSM222", f"'{name}' is the identity of {shape}", node.span, helps=("write a number: = 0",))
        return ir.Eye(*self.indices) if rank == 2 else ir.IndexValue(self.indices[0])

    def knows(self, name: str) -> bool:
        return name in self.found.names

    def namespace(self) -> Namespace:
        return self.found.names

    def size(self, dim: str) -> int | None:
        found = self.found.dims.get(dim)
        return found.size if found else None


def components(node: sf.Aggregator, found: Declarations, errors: Errors) -> tuple[ir.Component, ...]:
    """The state, with each identity as a definition over its own indices."""
    out: list[ir.Component] = []
    for item in node.items:
        if not isinstance(item, sf.Declared) or item.identity is None or item.name.text not in found.state:
            continue
        with errors:
            tensor = found.state[item.name.text]
            indices = tuple(ir.Index(f"#{n}", dim) for n, dim in enumerate(tensor.dims))
            unknown = Indices()
            scope = _IdentityScope(found, indices)
            value = unknown.finish(Elaborator(scope, unknown, found.budget).expr(item.identity, {}))
            check_kind(value, tensor, item.identity.span, "its identity")
            found.origin[f"identity {tensor.name}"] = item.identity.span
            identity = ir.Assign(tensor.name, indices, value)
            out.append(ir.Component(tensor.name, tensor.dims, tensor.kind, tensor.interval, identity))
    return tuple(out)
