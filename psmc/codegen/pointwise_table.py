"""Which tensors each pointwise kernel takes, in order; and the same as a table for the host (runtime.kit_launch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

from psmc.codegen.pointwise_fields import Field, Pointers, lane_fields, token_fields
from psmc.codegen.pointwise_lane import Lane
from psmc.codegen.tiles_code import tiles_text
from psmc.codegen.triton_expr import Key, LaneFunction
from psmc.ir import Aggregator, Kind
from psmc.ir.query import taps
from psmc.plan.pointwise import PointwisePlan
from psmc.plan.tiles import Row
from psmc.plan.tuned import Tuned
from psmc.structure.report import Structure


@dataclass(frozen=True)
class Arg:
    """A tensor of a call. `place`: where it stands among its like; `scalars`: two if it is complex."""

    name: str
    lag: int
    kind: Kind
    dims: tuple[str, ...]
    scalars: tuple[str, ...]
    place: int
    space: str

    @property
    def label(self) -> str:
        return self.name + (f"_lag{self.lag}" if self.lag else "")

    def keys(self, space: str = "") -> set[Key]:
        return {(space or self.space, s, self.lag) for s in self.scalars}


class Tensors:
    """All tensors of a spec, and for each kernel the ones that it reads or writes."""

    def __init__(self, agg: Aggregator, structure: Structure, one: Lane) -> None:
        self.agg, self.one = agg, one
        declared = [(t, 0) for t in agg.leaf_inputs]
        declared += [(t, lag) for t in agg.leaf_inputs for lag in range(1, taps(agg).get(t.name, 0) + 1)]

        def arg(at: int, name: str, kind: Kind, space: str, dims: tuple[str, ...] = (), lag: int = 0) -> Arg:
            return Arg(name, lag, kind, dims, one.parts[name] if kind == "complex" else (name,), at, space)

        live = [agg.component(n) for n in structure.live]
        self.inputs = [arg(at, t.name, t.kind, "input", t.dims, lag) for at, (t, lag) in enumerate(declared)]
        self.params = [arg(at, t.name, t.kind, "param", t.dims) for at, t in enumerate(agg.params)]
        self.outputs = [arg(at, a.name, a.value.kind, "output") for at, a in enumerate(agg.output.results)]
        self.live = [arg(at, c.name, c.kind, "state") for at, c in enumerate(live)]
        self.dims = live[0].dims

        back = one.back
        assert back is not None
        lift, readout = reading(one.lift) | reading(one.step), reading(one.readout)
        self.forward_inputs, self.forward_params = self._read(lift | readout)
        self.fold_inputs, self.fold_params = self._read(reading(one.lift) | reading(one.fold))
        whole = reading(back.direct) | reading(back.back) | (lift if back.states else set())
        self.backward_inputs, self.backward_params = self._read(whole)
        entry = reading(back.entry) | (lift if back.fold_states else set())
        self.back_fold_inputs, self.back_fold_params = self._read(entry)
        self.cotangents, self.fold_cotangents = self._cotangents(whole), self._cotangents(entry)
        self.states = self.live if back.states else []
        self.fold_states = self.live if back.fold_states else []
        self.smooth = [t for t in self.live if t.kind != "int"]
        stored = {back.shares[name] for name in back.back.results if name in back.shares}
        self.input_shares = [t for t in self.inputs if t.keys() & stored]
        self.param_shares = [t for t in self.params if t.keys() & stored]

    def _read(self, keys: set[Key]) -> tuple[list[Arg], list[Arg]]:
        return [t for t in self.inputs if t.keys() & keys], [t for t in self.params if t.keys() & keys]

    def _cotangents(self, keys: set[Key]) -> list[Arg]:
        back = self.one.back
        assert back is not None
        return [t for t in self.outputs if {back.cotangents[s] for s in t.scalars if s in back.cotangents} & keys]

    def labels(self, args: Iterable[Arg]) -> list[str]:
        return [t.label for t in args]

    def tokens(
        self, pointers: Pointers, inputs: Sequence[Arg], params: Sequence[Arg]
    ) -> tuple[list[Field], list[Field], list[str]]:
        """Fields of inputs and of params, and the labels that have a lane map, in the order of the arguments."""
        found: tuple[list[Field], list[Field]] = ([], [])
        for which, group in enumerate((inputs, params)):
            for t in group:
                found[which].extend(token_fields(pointers.add(t.label), t.label, t.lag, t.scalars, t.kind, t.space))
        return found[0], found[1], self.labels([*inputs, *params])

    def rows(self, pointers: Pointers, role: str, args: Sequence[Arg]) -> dict[str, Field]:
        """A pointer a tensor; the fields of its scalars."""
        found: dict[str, Field] = {}
        for t in args:
            found |= {f.name: f for f in lane_fields(pointers.add(f"{role}_{t.name}"), t.scalars, t.kind, "")}
        return found


def reading(function: LaneFunction) -> set[Key]:
    return set(function.arguments)


def table(plan: PointwisePlan, tensors: Tensors, tuned: Tuned | None = None) -> str:
    """What PointwiseKernels takes."""
    one = tensors.one
    back = one.back
    assert back is not None
    kernels = ("kind", "forward", "fold", "carry", "backward", "backward_fold", "backward_carry", "step")
    x = tensors
    places = {
        "forward": (x.forward_inputs, x.forward_params),
        "fold": (x.fold_inputs, x.fold_params),
        "backward": (x.backward_inputs, x.backward_params, x.cotangents, x.states),
        "backward_fold": (x.back_fold_inputs, x.back_fold_params, x.fold_cotangents, x.fold_states),
    }
    smooth = [s for t in tensors.smooth for s in t.scalars]
    rows = [
        *((f"{k}_kernel", f"{k}_kernel") for k in kernels),
        ("interpreted", "triton is not None and not isinstance(forward_kernel, triton.JITFunction)"),
        ("dims", repr(tensors.dims)),
        ("inputs", _rows((t.label, t.dims, t.kind) for t in tensors.inputs)),
        ("params", _rows((t.label, t.dims, t.kind) for t in tensors.params)),
        ("outputs", _rows((t.name, t.kind) for t in tensors.outputs)),
        ("live", _rows((t.name, t.kind) for t in tensors.live)),
        *((name, repr(tuple(tuple(t.place for t in g) for g in groups))) for name, groups in places.items()),
        ("smooth", repr(tuple(t.place for t in tensors.smooth))),
        ("input_shares", repr(tuple(t.place for t in tensors.input_shares))),
        ("param_shares", repr(tuple(t.place for t in tensors.param_shares))),
        ("element_scalars", repr(tuple(one.kind(s) for s in one.element))),
        ("live_scalars", repr(tuple(one.kind(s) for s in one.live))),
        ("live_owners", repr(tuple(at for at, t in enumerate(tensors.live) for _ in t.scalars))),
        ("smooth_owners", repr(tuple(at for at, t in enumerate(tensors.smooth) for _ in t.scalars))),
        ("entries", repr(len(back.element))),
        ("smooth_scalars", repr(len(smooth))),
        ("saved", repr(tuple(t.place for t in tensors.states))),
        ("every", repr(plan.every)),
        ("counts", repr(one.counts)),
        ("tiles", tiles_text(tuple(_tiles(plan)), tuned)),
    ]
    body = "".join(f"    {key}={value},\n" for key, value in rows)
    return f"SimpleNamespace(\n{body})"


def _rows(values: Iterable[object]) -> str:
    return "(" + "".join(f"{v!r}, " for v in values).rstrip() + ")"


def _tiles(plan: PointwisePlan) -> Iterator[Row]:
    for way, tiles in (("forward", plan.forward), ("backward", plan.backward)):
        for size, tile in tiles:
            yield Row(way, size, 0, astuple(tile))
