"""The pointwise plan's kernels as text: the lane's functions, then templates/pointwise_*.py.j2, then the host's table.

The text stands alone among torch's names: it defines KERNELS, which `runtime.kit_launch` describes.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from psmc.codegen.paste import POINTWISE_KIT, paste
from psmc.codegen.pointwise_fields import Field, Pointers, lane_fields
from psmc.codegen.pointwise_lane import Backward, Lane, lane
from psmc.codegen.pointwise_scan import component, flagged, listed, previous, renamed, stage_context, with_above
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
    scans = list({s.label: s for s in (one.whole, *one.stages)}.values())
    functions = [one.lift, *(f for s in scans for f in (s.affine, s.combine, s.advance)), one.readout]
    functions += [back.direct, back.transition, back.compose, back.pull, back.gradient]
    used = [f for f in functions if f is not None and f.results]
    return render(
        "pointwise_lane.py.j2",
        alone=alone,
        functions=[*helper_texts(used), *(f.text for f in used)],
        flagged=[flagged(s.label, "kind", s.names, s.names) for s in scans],
        before=[with_above(s.label, s.names) for s in one.stages if previous(one, s)],
        adjoint=flagged("", "cut", back.element, [n for n in back.element if n not in back.slopes]),
        floor=", and for a backward the states once more" if back.states else "",
    )


def _environment(one: Lane) -> dict[Key, str]:
    """What the functions read -> its name in a kernel: this token (b_), its state (s_), what was before (v_)."""
    back = one.back
    assert back is not None
    functions = [one.lift, one.readout, back.direct, back.transition, back.gradient]
    functions += [s.affine for s in one.stages if s.affine is not None]
    env: dict[Key, str] = {}
    for space, name, lag in (key for f in functions for key in f.arguments):
        prefix = {"state": "s_", "prev": "v_"}.get(space, "b_")
        env[space, name, lag] = prefix + name + (f"_lag{lag}" if lag else "")
    return env


def _lane_context(one: Lane, live: list[SimpleNamespace], folds: dict[str, str]) -> SimpleNamespace:
    """The whole scan, and what a token is made of."""
    env = _environment(one)
    context = stage_context(one, one.whole, env, False)
    context.live = live
    for c in context.element:
        c.fold = folds.get(c.name)
    context.lift, context.readout, context.counts = one.lift, one.readout, one.counts
    context.narrow = [n for n in one.lift.results if n in one.lift.narrow]
    sides: dict[Key, str] = {(side, n, 0): n for side in ("left", "right") for n in one.element}
    context.env_start = renamed(sides, {"left": "z_", "right": "e_"})
    context.env_step = renamed(sides, {"left": "v_", "right": "e_"})
    return context


def _component(one: Lane, name: str, **more: object) -> SimpleNamespace:
    return component(name, one.kind(name), one.starts[name], **more)


def _forward(one: Lane, tensors: Tensors) -> dict[str, object]:
    pointers = Pointers()
    tokens, params, labels = tensors.tokens(pointers, tensors.forward_inputs, tensors.forward_params)
    outputs = [f for o in tensors.outputs for f in lane_fields(pointers.add(f"out_{o.name}"), o.scalars, o.kind, "y_")]
    inner = list(pointers.names)
    saved = tensors.rows(pointers, "saved", tensors.live)
    inner += dict.fromkeys(f.pointer for f in saved.values())
    initial, final = (tensors.rows(pointers, role, tensors.live) for role in ("initial", "final"))
    live = [
        _component(one, s, saved=saved[s], initial=initial[s], final=final[s], carry=pointers.add(f"carry_{s}"))
        for s in one.live
    ]
    env = _environment(one)
    return {
        "pointers": pointers.text(),
        "tile_pointers": ", ".join(p for p in inner if p not in {f.pointer for f in params}),
        "carried": listed("h_", one.live),
        "param_values": "".join(f" {f.value}," for f in params),
        "maps": _maps(labels),
        "map_names": "".join(f"Q_{x}, D_{x}, " for x in labels),
        "labels": tensors.labels(tensors.forward_inputs),
        "param_labels": tensors.labels(tensors.forward_params),
        "params": params,
        "tokens": tokens,
        "outputs": outputs,
        "lane": _lane_context(one, live, {}),
        "stages": [stage_context(one, s, env, bool(previous(one, s))) for s in one.stages],
    }


def _maps(labels: list[str]) -> str:
    return "".join(f"Q_{x}: tl.constexpr, D_{x}: tl.constexpr,\n    " for x in labels)


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
        "maps": _maps(labels),
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
        "maps": _maps(labels),
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
    now, params, labels = tensors.tokens(main, tensors.backward_inputs, tensors.backward_params)
    now += [f for o in tensors.cotangents for f in _cotangent(main, o, back)]
    reads = {f: set(getattr(back, f).arguments) for f in ("direct", "transition", "gradient")}
    saved, initial = tensors.rows(main, "saved", tensors.states), tensors.rows(main, "initial", tensors.states)
    d_final, d_initial = (tensors.rows(main, role, tensors.smooth) for role in ("d_final", "d_initial"))
    outs = {t.label: main.add(f"d_{t.label}") for t in (*tensors.input_shares, *tensors.param_shares)}
    smooth_names = [s for t in tensors.smooth for s in t.scalars]
    carries = {s: main.add(f"carry_{s}") for s in smooth_names}

    fold_now, fold_params, fold_labels = tensors.tokens(fold, tensors.back_fold_inputs, tensors.back_fold_params)
    fold_now += [f for o in tensors.fold_cotangents for f in _cotangent(fold, o, back)]
    fold_saved = tensors.rows(fold, "saved", tensors.fold_states)
    fold_initial = tensors.rows(fold, "initial", tensors.fold_states)
    folds = {a: fold.add(f"fold_{a}") for a in back.element}
    fold.names.append("p_fold_cut")
    carry.names += [*folds.values(), *dict.fromkeys(f.pointer for f in d_final.values()), *carries.values()]

    here = reads["direct"] | reads["gradient"]
    names = {"saved": saved, "initial": initial}
    fold_names = {"saved": fold_saved, "initial": fold_initial}
    entry = {s: back.names[s] for s in smooth_names}
    smooth = [
        _component(one, s, entry=entry[s], d_final=d_final[s], d_initial=d_initial[s], carry=carries[s])
        for s in smooth_names
    ]
    shares = [_share(t, back, outs[t.label]) for t in tensors.input_shares]
    param_shares = [_share(t, back, outs[t.label]) for t in tensors.param_shares]
    return {
        "pointers": main.text(),
        "fold_pointers": fold.text(),
        "carry_pointers": carry.text(),
        "maps": _maps(labels),
        "fold_maps": _maps(fold_labels),
        "labels": labels,
        "fold_labels": fold_labels,
        "params": params,
        "fold_params": fold_params,
        "now": [f for f in now if f.key in here],
        "fold_now": [f for f in fold_now if f.key in reads["direct"]],
        "next": [f for f in now if f.key in reads["transition"]],
        "states": [_state(one, s, names, reads) for t in tensors.states for s in t.scalars],
        "fold_states": [_state(one, s, fold_names, reads) for t in tensors.fold_states for s in t.scalars],
        "smooth": smooth,
        "input_shares": [g for group in shares for g in group],
        "param_shares": [g for group in param_shares for g in group],
        "back": _back_context(one, back, folds),
    }


def _cotangent(pointers: Pointers, output: Arg, back: Backward) -> list[Field]:
    fields = lane_fields(pointers.add(f"d_out_{output.name}"), output.scalars, "real", "b_")
    named = [(f, back.cotangents[f.name]) for f in fields]
    return [replace(f, key=key, value="b_" + key[1]) for f, key in named]


def _state(one: Lane, name: str, rows: dict[str, dict[str, Field]], reads: dict[str, set[Key]]) -> SimpleNamespace:
    here = reads["direct"] | reads["gradient"]
    return _component(
        one,
        name,
        saved=rows["saved"][name],
        initial=rows["initial"][name],
        now=("state", name, 0) in here or ("prev", name, 0) in reads["transition"],
        after=("state", name, 0) in reads["transition"],
        before=("prev", name, 0) in here,
        direct=("prev", name, 0) in reads["direct"],
    )


def _share(tensor: Arg, back: Backward, pointer: str) -> list[SimpleNamespace]:
    """The gradients of a tensor's scalars, and where they go."""
    owner = {key: name for name, key in back.shares.items()}
    fields = lane_fields(pointer, tensor.scalars, "real", "")
    return [SimpleNamespace(name=owner[tensor.space, f.name, tensor.lag], out=f) for f in fields]


def _back_context(one: Lane, back: Backward, folds: dict[str, str]) -> SimpleNamespace:
    env = _environment(one)
    names = back.element
    shift = {k: ("n" + v if k[0] == "input" else v) for k, v in env.items()}
    shift |= {k: "ns_" + k[1] for k in env if k[0] == "state"} | {k: "s_" + k[1] for k in env if k[0] == "prev"}
    direct, transition = back.direct.results, back.transition.results
    entries = [SimpleNamespace(name=n, identity=back.identity[n], fold=folds[n]) for n in names]
    cotangents, slopes = [], []
    for n in names:
        if n in back.slopes:
            slopes.append(SimpleNamespace(name=n, identity=back.identity[n]))
            continue
        here, after = f"tl.where(m_here, u_{n}, 0.0)", f"tl.where(m_after, w_{n}, 0.0)"
        terms = [here] * (n in direct) + [after] * (n in transition)
        after = after if n in transition else "tl.zeros([1, BC], tl.float32)"
        total = " + ".join(terms) or "tl.zeros([W, R, BC], tl.float32)"
        cotangents.append(SimpleNamespace(name=n, sum=total, sum_next=after))
    env |= {back.moved[c]: f"l_{back.names[c]}" for c in back.moved}
    if back.first:
        env[back.first] = back.first[1]
    sides: dict[Key, str] = {(side, n, 0): n for side in ("left", "right") for n in names}
    return SimpleNamespace(
        direct=back.direct,
        transition=back.transition,
        pull=back.pull,
        gradient=back.gradient,
        env=env,
        env_next=shift,
        env_join=renamed(sides, {"left": "h_", "right": "c_"}),
        env_inner=renamed(sides, {"left": "q_", "right": "g_"}),
        params=[env[k] for k in back.transition.arguments if k[0] == "param"],
        slopes=slopes,
        cotangents=cotangents,
        entries=entries,
        elements=listed("a_", names),
        inner=listed("g_", names),
        outer=listed("c_", names),
        carried=listed("h_", names),
        joined=listed("f_", names),
        first=back.first[1] if back.first else None,
    )
