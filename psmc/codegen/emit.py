"""A compiled aggregator as one standalone Python module."""

from __future__ import annotations

import ast
import builtins
import hashlib
import re

from psmc.algebra.verdict import Proof, Proved, Refuted, Unknown, Verdict
from psmc.codegen.attention_code import ATTENTION_KIT, print_attention
from psmc.codegen.border import print_border
from psmc.codegen.chunk_code import print_layers
from psmc.codegen.chunk_factors import print_fused
from psmc.codegen.chunk_kernels import print_chunk_kernels
from psmc.codegen.chunk_small import Small, small_scan
from psmc.codegen.paste import KIT, POINTWISE_KIT, Pasted, imports, paste
from psmc.codegen.pointwise import print_kernels
from psmc.codegen.render import render
from psmc.codegen.specialise import names_read
from psmc.codegen.torch_code import function_sources, join, taps
from psmc.codegen.tree_code import print_tree_kernels
from psmc.diagnostics import fail
from psmc.ir import Aggregator, Extern
from psmc.ir.rewrite import refs
from psmc.ir.text import show
from psmc.plan.base import Plan
from psmc.plan.pointwise import PointwisePlan
from psmc.plan.tree import TreePlan
from psmc.plan.tuned import Tuned
from psmc.structure.report import Structure

_CONTENTS = "(sections)"
_LAWS = (("associativity", "associative"), ("identity", "identity element"))


def emit(
    agg: Aggregator, declared: Aggregator, proof: Proof, structure: Structure | None, plan: Plan, file: str,
    tuned: Tuned | None = None,
) -> str:  # fmt: skip
    """The module's text. `declared` is the spec as written, `agg` what runs (a lifted recurrence); `file` is what the
    regenerate command names; `tuned`: tiles for its kernels. The same inputs give the same text, in any process."""
    live = structure.live if structure is not None and plan.fold == "scan" else ()
    live = live or tuple(c.name for c in agg.state)  # also where no output reads the state
    extern = isinstance(agg.combine, Extern)
    kernels = _kernels(agg, structure, plan, tuned)
    attended = print_attention(agg, not kernels, tuned)
    matrices = plan.name == "chunked" and bool(kernels)
    small = small_scan(agg, structure) if structure is not None and matrices else None
    files = KIT
    if plan.name == "chunked":
        more = POINTWISE_KIT if small else ("kit_ahead", "kit_calls")
        views = ("kit_chunk_views", "kit_chunk_layer", "kit_chunk_plan", "kit_chunk_made", "kit_chunk_kernels")
        more = (*more, *views) if matrices else ()
        chunks = ("kit_cut", "kit_halves", "kit_decay", "kit_walk", "kit_chunk")
        fused = ("kit_fused",) if matrices else ()
        files = (*KIT[:-2], *chunks, *more, KIT[-2], "kit_small", "kit_layers", *fused, KIT[-1])
    sources, layers = function_sources(agg, live), ""
    if plan.name == "chunked" and structure is not None:
        found, layers = print_layers(agg, structure, print_fused(agg, structure), "SMALL" if small else "None")
        sources += [*found, *([small.output] if small else [])]
        layers = f"SMALL = {small.operator}\n\n{layers}" if small else layers
    if small is not None:
        kernels = _together(kernels, small.kernels)
    functions = join(sources)
    spec_text = show(declared).strip()
    names = [
        n
        for n in ("lift", "combine", "advance", "recurrence", "output", "identity", "start")
        if f"def {n}(" in functions
    ]
    rules = ", ".join(
        [
            *(f"{n}={n}" for n in names),
            *(["layered=run_layers", "layers=LAYERS", "readout=readout"] if layers else []),
            *(["matrices=ChunkKernels(CHUNK_KERNELS)", "stepped=step_layers"] if matrices else []),
        ]
    )
    if attended:
        kernels = f"{attended}\n\n{kernels or 'KERNELS = None'}"
    written = "\n".join((functions, kernels, layers, f"dict({rules})"))
    roots = {"Aggregator", "Spec", "Slot", "Values", *names_read(ast.parse(written))}
    roots |= {"check_rule"} if extern else set()
    pasted = paste(files, frozenset(roots), _never(agg, plan, names, layers, kernels, small))
    runtime = pasted.body
    digest = hashlib.sha256("\n".join((spec_text, functions, kernels, runtime, repr(plan))).encode()).hexdigest()[:16]
    used = names_read(ast.parse("\n".join((written, runtime)))) | {"SimpleNamespace", *(["Callable"] if extern else [])}
    public = agg.name
    _require_free(declared, pasted, "\n".join((functions, kernels, layers)))
    text = render(
        "module.py.j2",
        title=declared.name + (f": {' '.join(declared.doc.split())}" if declared.doc else ""),
        spec=_docstring(spec_text),
        summary=[*_proof_lines(declared, proof), f"Plan: {plan.name}. " + "; ".join(plan.why) + ".",
                 *([_docstring(f"Tiles: tuned on {tuned.device}, triton {tuned.triton}.")] if tuned else [])],
        command=_docstring(f"psmc compile {file}" + (f" --tuned {tuned.file}" if tuned else "")),
        imports=imports(paste((*files, *_launching(plan, kernels, matrices, tuned))), used, ["math"]),
        public=public,
        mathematics=functions.strip() + "\n",
        kernels=kernels.strip(),
        runtime=runtime.strip() + "\n",
        border=print_border(agg, repr(digest), live),
        rules=rules,
        layers=layers,
        fold=plan.fold,
        extern=extern,
    )
    return _with_contents("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def _together(first: str, second: str) -> str:
    """Two texts of kernels as one namespace: helpers may be in both, if they are the same."""
    here, there = (
        {f.name: ast.unparse(f) for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
        for text in (first, second)
    )
    assert all(here[n] == there[n] for n in here.keys() & there.keys()), "two functions of kernels have the same name"
    return f"{first}\n\n{second}"


def digest_of(text: str) -> str:
    """The digest that a module's border names."""
    found: list[str] = re.findall(r"^    digest='(\w+)',$", text, re.M)
    return found[-1]


def _with_contents(text: str) -> str:
    """The module with a list of its sections, by line, in place of the mark."""
    lines = text.splitlines()
    found = [(at, line.removeprefix("# --- ")) for at, line in enumerate(lines, 1) if line.startswith("# --- ")]
    mark = lines.index(_CONTENTS)
    shown = [f"{at + len(found) - 1:5}  {_short(title)}" for at, title in found]
    return "\n".join([*lines[:mark], *shown, *lines[mark + 1 :]]) + "\n"


def _short(title: str) -> str:
    head = title.split(". ")[0].rstrip(".")
    return head if len(head) <= 110 else head[:110].rsplit(" ", 1)[0] + " ..."


def _never(
    agg: Aggregator, plan: Plan, names: list[str], layers: str, kernels: str, small: Small | None
) -> frozenset[str]:
    """Conditions in the runtime that this spec never meets."""
    outputs = (a.value for a in (*agg.output.lets, *agg.output.results))
    matrices = plan.name == "chunked" and bool(kernels)
    return frozenset(
        text
        for met, texts in (
            (plan.fold == "tree", ("fold == 'tree'", "self.fold == 'tree'", "self.fold_order == 'tree'")),
            (bool(taps(agg)), ("spec.taps", "self.spec.taps", "self.extras")),
            (
                small is not None or any("level" in r.space or r.space == "prev" for r in refs(*outputs)),
                ("spec.previous", "spec.levels"),
            ),
            (bool(layers), ("hasattr(rules, 'layers')",)),
            (matrices, ("hasattr(self.rules, 'matrices')", "hasattr(self.rules, 'stepped')", "lazily",
                        "self._calls is not None")),
            (not matrices or "log_value" in kernels, ("a.over",)),
            ("recurrence" in names, ("hasattr(rules, 'recurrence')", "sequences")),
            (plan.fold == "left", ("left",)),
            (isinstance(agg.combine, Extern), ("hasattr(rules, 'extern')", "hasattr(self.rules, 'extern')")),
        )
        if not met
        for text in texts
    )


def _require_free(declared: Aggregator, pasted: Pasted, code: str) -> None:
    """PSM104 if the aggregator is called like something that its module needs: it would take its place."""
    taken = {"SPEC", "KERNELS", *pasted.defined, *pasted.plain, *dir(builtins)}
    taken |= {name for _, names in pasted.names for name in names}
    taken |= set(re.findall(r"^(?:def |class )?(\w+)(?: =|\(|:)", code, re.M))
    if declared.name in taken:
        fail(
            "PSM104", f"'{declared.name}' cannot be the name of an aggregator: its module needs that name.",
            declared.where("name"), helps=(f"call it '{declared.name.lower()}_scan', say.",),
        )  # fmt: skip


def _launching(plan: Plan, kernels: str, matrices: bool, tuned: Tuned | None) -> tuple[str, ...]:
    """What the kernels' own text pastes."""
    more = () if tuned is None else ("kit_tuned",)
    if not kernels or matrices:
        return more
    if "AttentionKernels" in kernels:
        return (*ATTENTION_KIT, *more)
    return (*(("kit_lanes", "kit_tree_kernels") if isinstance(plan, TreePlan) else POINTWISE_KIT), *more)


def _kernels(agg: Aggregator, structure: Structure | None, plan: Plan, tuned: Tuned | None) -> str:
    if isinstance(plan, TreePlan):
        return print_tree_kernels(agg, plan, tuned)
    if structure is not None and isinstance(plan, PointwisePlan):
        return print_kernels(agg, structure, plan, tuned)
    if structure is not None and plan.name == "chunked":
        return print_chunk_kernels(agg, structure, tuned)
    return ""


def _docstring(text: str) -> str:
    """User text inside a docstring: it cannot end it, and holds no escapes."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _proof_lines(agg: Aggregator, proof: Proof) -> list[str]:
    """What was shown, over the reals, one line a law."""
    if agg.claim == "no":
        return ["Associativity: not claimed; the order of combines is part of the meaning."]
    lines = []
    for field, law in _LAWS:
        verdict: Verdict | None = getattr(proof, field)
        lines.append(f"Proof ({law}): {_say(verdict, agg.claim)}.")
    if proof.float_breaks:
        names = ", ".join(proof.float_breaks)
        lines.append(f"In floats the identity element makes NaN of {names}: it is selected here, never combined in.")
    return lines


def _say(verdict: Verdict | None, claim: str) -> str:
    match verdict:
        case Proved(method=method):
            return f"proved over the reals, for all sizes ({method})"
        case Refuted():
            return "refuted"
        case Unknown(reason=reason):
            return (
                f"not decided ({reason}); the author vouches for it" if claim == "assume" else f"not decided ({reason})"
            )
    return "the author vouches for it"
