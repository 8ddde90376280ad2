"""Surface AST to typed IR: what every name, index and kind means. The one resolver of both frontends."""

from __future__ import annotations

from dataclasses import replace

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.block_scope import BlockScope
from psmc.frontend.blocks import BlockResolver
from psmc.frontend.declare import Declarations, declare
from psmc.frontend.identity import components
from psmc.frontend.library import Load, extend, file_library
from psmc.frontend.scope import BlockKind, Errors, Library
from psmc.frontend.sections import check_sections, claimed, head, one
from psmc.ir.canonical import canonical
from psmc.ir.query import level_dims


def resolve(file: sf.File, *, load: Load | None = None) -> tuple[ir.Aggregator, ...]:
    """The aggregators of a file, in order, in canonical form.

    `load(path, span)` gives the file that `use "path"` names; whoever passes it decides which paths may be read.
    Raises PsmcError with every 2xx mistake that can be told apart.
    """
    errors = Errors()
    library = file_library(file, load, errors)
    seen: dict[str, sf.Name] = {}
    out: list[ir.Aggregator] = []
    for node in file.aggregators:
        with errors:
            first = seen.setdefault(node.name.text, node.name)
            if first is not node.name:
                fail(
                    "PSM202",
                    f"aggregator '{node.name.text}' is defined twice",
                    node.name.span,
                    labels=(Label(first.span, "first defined here"),),
                    helps=("rename one of the two",),
                )
            out.append(_aggregator(node, library))
    errors.flush()
    return tuple(out)


def _aggregator(node: sf.Aggregator, outer: Library) -> ir.Aggregator:
    errors = Errors()
    consts = [i for i in node.items if isinstance(i, sf.Const)]
    fns = [i for i in node.items if isinstance(i, sf.Fn)]
    others = frozenset(i.name.text for i in node.items if isinstance(i, sf.Dim | sf.Declared))
    library = extend(outer, consts, fns, errors, others) if consts or fns else outer
    found = declare(node, library, errors)
    found.origin["name"] = node.name.span
    state = components(node, found, errors)
    errors.flush()  # what follows would only repeat them

    lift = one(node, sf.Lift)
    recurrence = one(node, sf.Recurrence)
    combine = one(node, sf.Combine) or one(node, sf.CombineExtern)
    with errors:
        check_sections(node, lift, combine, recurrence)
    claim, order = claimed(node, combine, recurrence, found, errors)

    blocks: dict[BlockKind, ir.Block] = {}
    used: set[str] = set()
    sections: dict[BlockKind, sf.Lift | sf.Combine | sf.CombineExtern | sf.Recurrence | None] = {
        "lift": lift,
        "combine": combine,
        "recurrence": recurrence,
    }
    for kind, section in sections.items():
        if isinstance(section, sf.CombineExtern):
            found.origin["combine"] = section.span
        elif section is not None:
            with errors:
                blocks[kind] = _block(found, kind, section, errors, used)
    readout = _readout(node, found, errors, used)
    errors.flush()
    agg = ir.Aggregator(
        name=node.name.text,
        dims=tuple(found.dims.values()),
        inputs=tuple(found.inputs.values()),
        params=tuple(found.params.values()),
        state=state,
        lift=blocks.get("lift"),
        combine=ir.Extern() if isinstance(combine, sf.CombineExtern) else blocks.get("combine"),
        recurrence=blocks.get("recurrence"),
        readout=readout,
        claim=claim,
        order=order,
        doc="\n".join(line.rstrip() for line in node.doc.strip().splitlines()),
        origin=dict(sorted(found.origin.items())),
    )
    _check_inputs(agg, node)
    _check_dims(agg, found)
    _check_levels(agg)
    return canonical(agg)


def _block(
    found: Declarations,
    kind: BlockKind,
    section: sf.Lift | sf.Combine | sf.Recurrence,
    errors: Errors,
    used: set[str],
) -> ir.Block:
    found.origin[kind] = section.span
    scope = BlockScope(found, kind)
    resolver = BlockResolver(scope, errors)
    if isinstance(section, sf.Combine):
        if section.left.text == section.right.text:
            fail(
                "PSM202",
                f"both operands are called '{section.left.text}'",
                section.right.span,
                helps=("name them apart: combine (l, r)",),
            )
        scope.operands = {section.left.text: "left", section.right.text: "right"}
    resolver.run(section.body)
    used.update(scope.shared)
    missing = resolver.missing()
    if missing:
        shown = "; ".join(f"{m}{_subscripts(len(found.state[m].dims))} = …" for m in missing)
        with errors:
            fail(
                "PSM211",
                f"the {kind} never assigns {', '.join(repr(m) for m in missing)}",
                head(section),
                labels=tuple(Label(found.origin[f"state {m}"], "declared here") for m in missing),
                helps=(f"every component needs a value: {shown}",),
            )
    return resolver.block()


def _subscripts(rank: int) -> str:
    return f"[{', '.join('ijmnpstu'[:rank])}]" if rank else ""


def _readout(node: sf.Aggregator, found: Declarations, errors: Errors, used: set[str]) -> ir.Block:
    """The outputs; lets that no block reads are checked here, where all names can be read."""
    scope = BlockScope(found, "output")
    resolver = BlockResolver(scope, errors)
    resolver.run(tuple(a for item in node.items if isinstance(item, sf.Output) for a in item.body))
    block = resolver.block()
    for name, let in found.lets.items():
        if name not in used and name not in scope.shared:
            with errors:
                scope.read(sf.Access(None, let.target, None, 0, let.target.span))
    return block


def _check_inputs(agg: ir.Aggregator, node: sf.Aggregator) -> None:
    """A caller passes something that tells batch and time."""
    if not agg.leaf_inputs:
        fail(
            "PSM213",
            f"aggregator '{agg.name}' has no input",
            node.name.span,
            helps=("declare what a token brings: input x; even a count takes its batch and time from one",),
        )


def _check_levels(agg: ir.Aggregator) -> None:
    """at(c).S reads a tree's counter, over one dim that counts the levels."""
    dims = level_dims(agg)
    if not dims:
        return
    read = next(a for a in agg.output.results if level_dims(replace(agg, readout=ir.Block(agg.readout.lets, (a,)))))
    span = agg.where(f"output {read.name}", "name")
    if agg.claim != "no" or agg.order != "tree" or agg.recurrence is not None:
        fail(
            "PSM230",
            f"output '{read.name}' reads the counter of a tree, and '{agg.name}' is none",
            span,
            helps=("at(c).S needs 'associative: no' and 'order: tree'; the state itself is read as S",),
        )
    if len(dims) > 1:
        fail(
            "PSM230",
            f"levels are counted by {' and by '.join(dims)}",
            span,
            helps=(f"let one dim count them everywhere: {dims[0]}",),
        )
    if next(d.size for d in agg.dims if d.name == dims[0]) is None:
        fail(
            "PSM230",
            f"nothing says how many levels there are: {dims[0]} has no size",
            span,
            helps=(f"fix it: dim {dims[0]} = 16 counts the levels of up to 2^16 - 1 tokens",),
        )


def _check_dims(agg: ir.Aggregator, found: Declarations) -> None:
    """Every dim must get its size from the spec or from a tensor that the caller passes."""
    known = {d for tensor in (*agg.leaf_inputs, *agg.params) for d in tensor.dims}
    for dim in agg.dims:
        if dim.size is None and dim.name not in known:
            fail(
                "PSM229",
                f"nothing gives the size of dim '{dim.name}': no input or param has it",
                found.origin[f"dim {dim.name}"],
                helps=(f"fix it: dim {dim.name} = 16; or delete it if it is not used",),
            )
