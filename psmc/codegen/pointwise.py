"""The pointwise plan's kernels as text: the lane's functions, then templates/pointwise_*.py.j2, then the host's table.

The text stands alone among torch's names: it defines KERNELS, which `runtime.kit_launch` describes.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from psmc.codegen.paste import POINTWISE_KIT, paste
from psmc.codegen.pointwise_fields import Field, Pointers, lane_fields, lane_maps
from psmc.codegen.pointwise_lane import Backward, Lane, lane
from psmc.codegen.pointwise_scan import component, flagged, listed, renamed, sides
from psmc.codegen.pointwise_table import Arg, Tensors, table
from psmc.codegen.render import render
from psmc.codegen.tiles_code import tiles_class
from psmc.codegen.triton_expr import Key, helper_texts
from psmc.ir import Aggregator
from psmc.plan.pointwise import PointwisePlan
from psmc.plan.tuned import Tuned
from psmc.structure.report import Structure


def print_kernels(
    agg: Aggregator, structure: Structure, plan: PointwisePlan, tuned: Tuned | None = None
) -> str:
    """Module text that defines KERNELS. `agg` is licensed; the same arguments give the same text."""
    one = lane(agg, structure.live)
    tensors = Tensors(agg, structure, one)
    kit = [paste(POINTWISE_KIT, frozenset({"PointwiseKernels"})).body, *tiles_class(tuned)]
    rows = table(plan, tensors, tuned).replace("\n", "\n    ")
    return _joined([*_texts(one, tensors, True), *kit, f"KERNELS = PointwiseKernels(\n    {rows}\n)"])


def print_table(agg: Aggregator, structure: Structure, plan: PointwisePlan, name: str) -> str:
    """The same for a module that has Triton's names and a runtime already: `name` is what PointwiseKernels takes."""
    one = lane(agg, structure.live)
    tensors = Tensors(agg, structure, one)
    return _joined([*_texts(one, tensors, False), f"{name} = {table(plan, tensors)}"])


def _texts(one: Lane, tensors: Tensors, alone: bool) -> list[str]:
    return [
        _lane_text(one, alone),
        render("pointwise_kinds.py.j2"),
        render("pointwise_forward.py.j2", **_forward(one, tensors)),
        render("pointwise_segments.py.j2", **_segments(one, tensors)),
        render("pointwise_backward.py.j2", **_backward(one, tensors)),
        render("pointwise_step.py.j2", **_step(one, tensors)),
    ]


def _joined(texts: list[str]) -> str:
    return "\n\n".join(_tidy(t) for t in texts) + "\n"


def _tidy(text: str) -> str:
    """No blank lines inside functions, two between them; jinja leaves some."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept: list[str] = []
    for at, line in enumerate(lines):
        following = next((x for x in lines[at:] if x), "")
        if line or not following.startswith(" ") or "class " in text:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _lane_text(one: Lane, alone: bool) -> str:
    back = one.back
    assert back is not None
    functions = [one.lift, one.step, one.readout, one.fold, one.rule.combine, one.rule.advance]
    functions += [back.direct, back.back, back.entry, back.compose, back.pull]
    used = [f for f in functions if f.results]
    adjoint = [n for n in back.element if n in back.names.values()]
    return render(
        "pointwise_lane.py.j2",
        alone=alone,
        functions=[*helper_texts(used, native=alone), *(f.text for f in used)],
        state=_state(one, [_component(one, s) for s in one.live]),
        flagged=flagged("kind", one.element, one.element),
        adjoint=flagged("cut", back.element, adjoint),
    )


def _environment(one: Lane) -> dict[Key, str]:
    """What the functions read -> its name in a kernel: this token (b_), its state (s_), what was before (v_)."""
    back = one.back
    assert back is not None
    env: dict[Key, str] = {}
    for f in (one.lift, one.step, one.readout, back.direct, back.back, back.entry):
        for space, name, lag in f.arguments:
            prefix = {"state": "s_", "prev": "v_"}.get(space, "b_")
            env[space, name, lag] = prefix + name + (f"_lag{lag}" if lag else "")
    return env


def _state(one: Lane, live: list[SimpleNamespace]) -> SimpleNamespace:
    """What moves the state on, and what it reads."""
    env = _environment(one)
    read = [k for k in env if k in {*one.step.arguments, *one.lift.arguments} and k[0] in ("input", "param")]
    return SimpleNamespace(
        live=live,
        step=one.step,
        lift=one.lift,
        counts=one.counts,
        env=env,
        arguments=", ".join(env[k] for k in read),
        carried=listed("h_", one.live),
        states=listed("s_", one.live),
        after=f"{listed('v_', one.live)}, {listed('s_', one.live)}",
    )


def _lane_context(one: Lane, live: list[SimpleNamespace], folds: dict[str, str]) -> SimpleNamespace:
    """The whole scan, and what a token is made of."""
    found, names = _state(one, live), one.element
    starts = {c.name: c.start for c in live}
    found.names = names
    found.element = [component(n, one.kind(n), starts.get(n), fold=folds.get(n)) for n in names]
    found.fold, found.advance, found.readout = one.fold, one.rule.advance, one.readout
    found.elements, found.inner, found.outer = listed("e_", names), listed("g_", names), listed("c_", names)
    found.env_fold = renamed({k: found.env.get(k, k[1]) for k in one.fold.arguments}, {"left": "h_"})
    found.env_start, found.env_step = sides(names, "z_", "e_"), sides(names, "v_", "e_")
    found.env_join, found.env_inner = sides(names, "h_", "c_"), sides(names, "q_", "g_")
    return found


def _component(one: Lane, name: str, **more: object) -> SimpleNamespace:
    return component(name, one.kind(name), one.starts[name], **more)


def _forward(one: Lane, tensors: Tensors) -> dict[str, object]:
    pointers = Pointers()
    tokens, params, labels = tensors.tokens(pointers, tensors.forward_inputs, tensors.forward_params)
    outputs = [f for o in tensors.outputs for f in lane_fields(pointers.add(f"out_{o.name}"), o.scalars, o.kind, "y_")]
    saved, initial, final = (tensors.rows(pointers, role, tensors.live) for role in ("saved", "initial", "final"))
    live = [
        _component(one, s, saved=saved[s], initial=initial[s], final=final[s], carry=pointers.add(f"carry_{s}"))
        for s in one.live
    ]
    return {
        "pointers": pointers.text(),
        "maps": lane_maps(labels),
        "labels": labels,
        "params": params,
        "tokens": tokens,
        "outputs": outputs,
        "lane": _lane_context(one, live, {}),
    }


def _segments(one: Lane, tensors: Tensors) -> dict[str, object]:
    fold, carry = Pointers(["p_fold_kind"]), Pointers()
    tokens, params, labels = tensors.tokens(fold, tensors.fold_inputs, tensors.fold_params)
    folds = {s: fold.add(f"fold_{s}") for s in one.element}
    fold.names.append("p_fold_kind")
    for name in folds.values():
        carry.names.append(name)
    initial = tensors.rows(carry, "initial", tensors.live)
    carries = {s: carry.add(f"carry_{s}") for s in one.live}
    live = [_component(one, s, fold=folds[s], initial=initial[s], carry=carries[s]) for s in one.live]
    return {
        "fold_pointers": fold.text(),
        "carry_pointers": carry.text(),
        "maps": lane_maps(labels),
        "labels": labels,
        "params": params,
        "tokens": tokens,
        "lane": _lane_context(one, live, folds),
    }


def _step(one: Lane, tensors: Tensors) -> dict[str, object]:
    pointers = Pointers()
    tokens, params, labels = tensors.tokens(pointers, tensors.forward_inputs, tensors.forward_params)
    outputs = [f for o in tensors.outputs for f in lane_fields(pointers.add(f"out_{o.name}"), o.scalars, o.kind, "y_")]
    state = tensors.rows(pointers, "state", tensors.live)
    after = tensors.rows(pointers, "next", tensors.live)
    live = [_component(one, s, state=state[s], next=after[s]) for s in one.live]
    return {
        "step_pointers": pointers.text(),
        "token_labels": tensors.labels(tensors.forward_inputs),
        "maps": lane_maps(labels),
        "labels": labels,
        "params": params,
        "tokens": tokens,
        "outputs": outputs,
        "lane": _lane_context(one, live, {}),
    }


def _backward(one: Lane, tensors: Tensors) -> dict[str, object]:
    back = one.back
    assert back is not None
    main, fold, carry = Pointers(), Pointers(["p_fold_cut"]), Pointers()
    tokens, params, labels = tensors.tokens(main, tensors.backward_inputs, tensors.backward_params)
    cotangents = [f for o in tensors.cotangents for f in _cotangent(main, o, back)]
    saved = tensors.rows(main, "saved", tensors.states)
    d_final, d_initial = (tensors.rows(main, role, tensors.smooth) for role in ("d_final", "d_initial"))
    outs = {t.label: main.add(f"d_{t.label}") for t in (*tensors.input_shares, *tensors.param_shares)}
    smooth_names = [s for t in tensors.smooth for s in t.scalars]
    carries = {s: main.add(f"carry_{s}") for s in smooth_names}

    fold_tokens, fold_params, fold_labels = tensors.tokens(fold, tensors.back_fold_inputs, tensors.back_fold_params)
    fold_tokens += [f for o in tensors.fold_cotangents for f in _cotangent(fold, o, back)]
    fold_saved = tensors.rows(fold, "saved", tensors.fold_states)
    folds = {a: fold.add(f"fold_{a}") for a in back.element}
    fold.names.append("p_fold_cut")
    carry.names += [*folds.values(), *dict.fromkeys(f.pointer for f in d_final.values()), *carries.values()]

    direct = set(back.direct.results)
    smooth = [
        _component(
            one, s, entry=back.names[s], direct=back.names[s] in direct, d_final=d_final[s], d_initial=d_initial[s],
            carry=carries[s],
        )
        for s in smooth_names
    ]  # fmt: skip
    input_shares = [g for t in tensors.input_shares for g in _share(t, back, outs[t.label])]
    param_shares = [g for t in tensors.param_shares for g in _share(t, back, outs[t.label])]
    lane, others = _again(one, [*tokens, *cotangents], saved)
    fold_lane, fold_others = _again(one, fold_tokens, fold_saved)
    return {
        "pointers": main.text(),
        "fold_pointers": fold.text(),
        "carry_pointers": carry.text(),
        "maps": lane_maps(labels),
        "fold_maps": lane_maps(fold_labels),
        "labels": labels,
        "fold_labels": fold_labels,
        "params": params,
        "fold_params": fold_params,
        "lane": lane,
        "others": others,
        "fold_lane": fold_lane,
        "fold_others": fold_others,
        "cotangents": cotangents,
        "smooth": smooth,
        "input_shares": input_shares,
        "param_shares": param_shares,
        "gradients": [g.out for g in input_shares],
        "back": _back_context(one, back, folds),
    }


def _again(one: Lane, fields: list[Field], saved: dict[str, Field]) -> tuple[SimpleNamespace, list[Field]]:
    """What it takes to run the states again (nothing, if none are read), and the other fields."""
    lane = _state(one, [_component(one, s, saved=saved[s]) for s in one.live if saved])
    read = {*one.step.arguments, *one.lift.arguments} if saved else set()
    lane.tokens = [f for f in fields if f.key in read]
    return lane, [f for f in fields if f.key not in read]


def _cotangent(pointers: Pointers, output: Arg, back: Backward) -> list[Field]:
    fields = lane_fields(pointers.add(f"d_out_{output.name}"), output.scalars, "real", "b_")
    named = [(f, back.cotangents[f.name]) for f in fields]
    return [replace(f, key=key, value="b_" + key[1]) for f, key in named]


def _share(tensor: Arg, back: Backward, pointer: str) -> list[SimpleNamespace]:
    """The gradients of a tensor's scalars, and where they go."""
    owner = {key: name for name, key in back.shares.items()}
    fields = lane_fields(pointer, tensor.scalars, "real", "")
    return [SimpleNamespace(name=owner[tensor.space, f.name, tensor.lag], out=f) for f in fields]


def _back_context(one: Lane, back: Backward, folds: dict[str, str]) -> SimpleNamespace:
    env, names = _environment(one), back.element
    adjoint = [n for n in names if n in back.names.values()]
    env |= {back.moved[c]: f"c_{c}" for c in back.moved}
    if back.first:
        env[back.first] = back.first[1]
    entries = [
        SimpleNamespace(name=n, identity=back.identity[n], fold=folds[n], slope=n not in adjoint) for n in names
    ]
    return SimpleNamespace(
        direct=back.direct,
        back=back.back,
        entry=back.entry,
        pull=back.pull,
        env=env,
        first=back.first[1] if back.first else None,
        entries=entries,
        cotangents=adjoint,
        element=names,
        elements=listed("a_", names),
        folded=listed("z_", names),
        joined=listed("f_", names),
        inner=listed("g_", names),
        outer=listed("c_", names),
        env_join=sides(names, "h_", "c_"),
        env_inner=sides(names, "q_", "g_"),
    )
