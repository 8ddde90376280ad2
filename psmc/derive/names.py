"""Names for derived tensors that collide with nothing the spec declares."""

from __future__ import annotations

from psmc.ir import Aggregator, Block


def declared_names(agg: Aggregator) -> set[str]:
    """Every name a spec declares: itself, dims, tensors, components, lets and outputs."""
    names = {agg.name} | {d.name for d in agg.dims} | {t.name for t in (*agg.inputs, *agg.params)}
    names |= {c.name for c in agg.state} | {a.name for a in agg.output.results}
    blocks = [b for b in (agg.lift, agg.combine, agg.recurrence, agg.readout) if isinstance(b, Block)]
    return names | {let.name for b in blocks for let in b.lets}


def fresh_name(base: str, taken: set[str]) -> str:
    """`base`, or base_1, base_2, ...: the first that is not taken. It is taken afterwards."""
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name
