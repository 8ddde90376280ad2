"""Calls of specs that one fused layer makes up, straight to its kernels, once a call of their shapes was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec
from psmc.runtime.kit_chunk_layer import step_launch, step_states
from psmc.runtime.kit_chunk_views import ChunkCall
from psmc.runtime.kit_run import Rules, transformed
from psmc.runtime.kit_scan import Values
from psmc.runtime.kit_small import small_call

_MOST_CALLS = 256  # remembered
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_Place = tuple[int, tuple[int, ...] | None]  # an argument, and the shape in which a param is read


class FusedCalls:
    """Calls and steps that passed all checks, by what the checks look at."""

    def __init__(self, spec: Spec, rules: Rules) -> None:
        self.kernels = rules.matrices
        self.names = tuple(s.name for s in (*spec.inputs, *spec.params))
        self.inputs = len(spec.inputs)
        self.dims = next(s.dims for s in spec.components if s.name == rules.layers[-1].components[0])
        self._known: dict[Any, Any] = {}
        *before, layer = rules.layers
        fused = None if spec.taps else getattr(layer, "fused", None)
        read = () if fused is None else (*fused.keys, fused.c, *fused.values, *fused.scalars)
        orders = ((0, 1),), ((0, 1), (0,))  # of the components' dims: key, value; key
        plain = fused is not None and layer.orders in orders and all(kind != "factor" for _, kind, _ in read)
        plain = plain and all(getattr(x, "operator", None) is not None for x in before)
        self.layer: Any = layer if plain else None
        self.small: list[Any] = before if plain else []  # their prefixes follow the arguments
        self.at = {name: n for n, name in enumerate(self.names)}
        for x in self.small:
            self.at |= {s.name: len(self.at) + n for n, s in enumerate(x.operator.spec.outputs)}

    # --- sequences

    def ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Arguments in the spec's order, if they are all and no others; else none."""
        if kwargs:
            rest = self.names[len(args) :]
            if len(rest) != len(kwargs) or not all(n in kwargs for n in rest):
                return ()
            return (*args, *[kwargs[n] for n in rest])
        return args if len(args) == len(self.names) else ()

    def key(self, what: str, args: Sequence[Any], state: Any, slots: Any = None) -> Any:
        """What the checks look at; None: not for the kernels."""
        if self.layer is None or not args or torch.compiler.is_compiling() or transformed():
            return None
        names: tuple[str, ...] = ()
        tensors = args
        if state is not None:
            if type(state) is not dict:
                return None
            names, tensors = tuple(state), (*args, *state.values())
        kernels = self.kernels
        found: list[Any] = [what, names, slots is None, kernels.processors, id(kernels.table.tiles)]
        for x in tensors if slots is None else (*tensors, slots):
            if type(x) not in _PLAIN_TENSORS or x.is_neg():
                return None
            found.append((x.shape, x.stride(), x.dtype, x.device))
        return tuple(found)

    def whole(self, key: Any, args: Sequence[Tensor], state: Any) -> tuple[Tensor, Values] | None:
        """The output and the last states of a call that is known."""
        known = self._known.get(key)
        if known is None:
            return None
        names = self.layer.components
        ends: Values = {}
        for x, own in zip(self.small, known[2], strict=True):
            given = {k: args[self.at[k]] for k in (*own.inputs, *own.params)}
            own = replace(own, inputs={k: given[k] for k in own.inputs}, params={k: given[k] for k in own.params})
            found, end = x.operator(own, {}, state, None, None, None)
            args = (*args, *found.values())
            ends |= end
        starts = (None, None) if state is None else (*[state[n] for n in names], None)[:2]
        placed = [None if p is None else args[p[0]] if p[1] is None else args[p[0]].view(p[1]) for p in known[1]]
        a = known[0].of((*starts, None, None, *placed))
        if a.layout is None:
            a = a._replace(layout=self.kernels.layout(a))
            self._known[key] = known[0]._replace(layout=a.layout), *known[1:]
        out, *finals = self.kernels.call(a)
        return out, {**ends, **dict(zip(names, finals, strict=False))}

    def learn(self, key: Any, args: Sequence[Tensor], call: Call) -> None:
        """Remembers a call that has just been checked, if it is one of these."""
        if key is None or not all(call.leading):
            return
        small = [small_call(call, x) for x in self.small]
        found = self._empty(args, call)
        if found is not None and None not in small:
            self._remember(key, (*found, small))

    def _remember(self, key: Any, what: Any) -> None:
        if len(self._known) >= _MOST_CALLS:
            self._known.clear()
        self._known[key] = what

    def _empty(self, args: Sequence[Tensor], call: Call) -> tuple[ChunkCall, tuple[_Place | None, ...]] | None:
        """The call without its tensors, and which arguments they are from c on; None: the kernels do not take them."""
        fused = self.layer.fused
        takes = self.kernels.takes(*(call.sizes[d] for d in self.dims), call.device)
        if len(call.lanes) != 1 or call.compute != torch.float32 or not takes:
            return None

        def place(width: int, name: str, kind: str, lag: int) -> _Place | None:
            if kind != "param":
                return self.at[name if kind == "input" else f"{kind}_{name}"], None
            at = self.at[name]
            shape = args[at].shape
            front, own = shape[: len(shape) - width], shape[len(shape) - width :]
            return (at, (1, 1, *call.lanes, *own)) if front == call.lanes else None

        wide = [place(1, *read) for read in (fused.c, *fused.keys, *fused.values)]
        scalars = [place(0, *read) for read in fused.scalars]
        if None in wide or None in scalars:
            return None
        counts = (len(fused.keys), len(fused.values), fused.numbers, len(scalars))
        keys, values, numbers, few = ((None,) * n for n in counts)
        shape: Any = (*(*call.leading, 1)[:2], *call.lanes)
        empty = ChunkCall(
            None, None, None, None, args[0], keys, values, numbers, shape, fused.shift,
            fused.scale(call.n), None, None, call.dtype, fused.decay, fused.over, few,  # type: ignore[arg-type]
        )  # fmt: skip
        return empty, (*wide, *numbers, *scalars)

    # --- tokens

    def again(self, state: Any, args: Sequence[Any], slots: Any, in_place: bool) -> tuple[Tensor, Any] | None:
        """The output of one token and the state after it, if a step like this is known. None, too, where autograd
        watches."""
        if state is None or len(args) != len(self.names):
            return None
        key = self.key("step", args, state, slots)
        known = None if key is None else self._known.get(key)
        if known is None:
            return None
        if not in_place:
            if torch.is_grad_enabled() and any(x.requires_grad for x in (*args, *state.values())):
                return None
            state = {k: x.clone() for k, x in state.items()}
        launch, places, (shape, dtype), small = known
        for x, reads in zip(self.small, small, strict=True):
            own = {k: state[k] for k in x.components}
            moved = x.operator.quick.again(own, [args[n] for n in reads], slots, True)
            if moved is None:
                return None
            args = (*args, *moved[0])
        out = torch.empty(shape, dtype=dtype, device=args[0].device)
        named = {None: None, "out": out, "slots": slots, **state}
        launch(*[args[p] if type(p) is int else named[p] for p in places])
        return out, state

    def learn_step(self, args: Sequence[Tensor], call: Call, state: Values, slots: Tensor | None) -> None:
        """Remembers a step that has just been run."""
        key = self.key("step", args, state, slots)
        found = None if key is None else self._empty(args, call)
        states = None if found is None else step_states(self.layer, state)
        if found is None or states is None or len(self.small) > 1:  # all of them move, or none
            return
        empty, read = found
        tensors = [x.unsqueeze(1) if n < self.inputs else x for n, x in enumerate(args)]
        lanes, small = (call.leading[0], 1, *call.lanes), []
        for x in self.small:
            if small_call(call, x) is None:
                return
            spec = x.operator.spec
            small.append([self.at[s.name] for s in (*spec.inputs, *spec.params)])
            tensors += [torch.empty(lanes, dtype=torch.float32, device=call.device) for _ in spec.outputs]
        placed = [None if p is None else tensors[p[0]] if p[1] is None else tensors[p[0]].view(p[1]) for p in read]
        a = empty.of((None, None, None, None, *placed))
        a = a._replace(layout=self.kernels.layout(a))
        if not a.layout.readable:
            return
        named = {id(x): p[0] for x, p in zip(placed, read, strict=True) if p is not None}
        launch, given = step_launch(self.kernels, a, states, slots)
        rest: dict[int, Any] = {id(None): None, id(slots): "slots" if slots is not None else None}
        rest |= {id(x): name for x, name in zip(states, self.layer.components, strict=True)}
        places = tuple([named[id(x)] if id(x) in named else rest.get(id(x), "out") for x in given])
        self._remember(key, (launch, places, ((call.leading[0], *call.lanes, a.c.shape[-1]), call.dtype), small))
