"""Kernels for the softmax attention of a rule, as text: templates/attention_*.py.j2, then a table of them."""

from __future__ import annotations

import hashlib
import textwrap
from fractions import Fraction
from types import SimpleNamespace

from psmc.codegen.paste import paste
from psmc.codegen.render import render
from psmc.codegen.tiles_code import tiles_class, tiles_text
from psmc.codegen.triton_expr import LaneFunction, helper_texts, print_function
from psmc.ir import Aggregator, Assign, Block, Const, DimValue, Expr, IndexValue, Ref
from psmc.ir.rewrite import transform
from psmc.plan.attention import by_kernel, found_in, tiles
from psmc.plan.tiles import rows
from psmc.plan.tuned import Tuned
from psmc.structure.attention import Attention

ATTENTION_KIT = ("kit_ahead", "kit_calls", "kit_attention")
_LN2 = "0.6931471805599453"
_PLACES = ("n", "m", "N", "M")  # what a mask reads: the places of a query and a key, how many there are


def print_attention(agg: Aggregator, fused: bool = True, tuned: Tuned | None = None) -> str:
    """Module text that defines ATTENTION_0, ... in the order of a combine's attentions, None where it is torch's call
    that runs it (all of them, unless `fused`); '' if there is none."""
    found = found_in(agg)
    run = [a for a in found if fused and by_kernel(agg, a) is None]
    if not run:
        return "".join(f"ATTENTION_{n} = None\n" for n in range(len(found)))
    forms = [_form(agg, a) for a in run]
    unlike = list(dict.fromkeys(forms))
    text = kernel_text(unlike)
    sizes = tiles_text(rows(tiles()), tuned, _literal())
    parts = [text, paste(ATTENTION_KIT, frozenset({"AttentionKernels"})).body, *tiles_class(tuned)]
    parts.append(f"ATTENTION_TILES = {sizes}\n")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    parts += [_table(n, form, digest) for n, form in enumerate(unlike)]
    held = {a: f"ATTENTION_KERNELS_{unlike.index(form)}" for a, form in zip(run, forms, strict=True)}
    parts.append("".join(f"ATTENTION_{n} = {held.get(a)}\n" for n, a in enumerate(found)))
    return "\n\n".join(parts)


Form = tuple[str | None, ...]  # for each set of tokens the text of its mask's function, if it has one


def kernel_text(forms: list[Form]) -> str:
    """The kernels for so many sets of tokens with such masks."""
    masks = list(dict.fromkeys(text for form in forms for text in form if text is not None))
    texts = [text.replace("seen(", f"seen_{n}(", 1) for n, text in enumerate(masks)]
    parts = [render("attention_parts.py.j2", masks=texts)]
    for at, form in enumerate(forms):
        view = _view(at, form, masks)
        parts += [render(f"attention_{name}.py.j2", f=view, ln2=_LN2) for name in ("forward", "backward")]
    return "\n\n\n".join(part.strip() for part in parts) + "\n"


def _form(agg: Aggregator, one: Attention) -> Form:
    return tuple(
        None if mask is None else _mask(agg, mask, one.query.indices[-2].dim, keys.indices[-2].dim)
        for mask, keys in zip(one.masks, one.keys, strict=True)
    )


def _mask(agg: Aggregator, mask: Assign, query: str, key: str) -> str:
    """seen(n, m, N, M) -> bool, over tiles of places."""
    names = {mask.indices[0]: "n", mask.indices[1]: "m"}
    fixed = {d.name: d.size for d in agg.dims}

    def scalar(node: Expr) -> Expr | None:
        if isinstance(node, IndexValue):
            return Ref("input", names[node.index], (), "int")
        if isinstance(node, DimValue):
            size = fixed[node.dim]
            if size is not None:
                return Const(Fraction(size))
            return Ref("input", "N" if node.dim == query else "M", (), "int")
        return None

    block = Block(results=(Assign("seen", (), transform(mask.value, scalar)),))
    made: LaneFunction = print_function("seen", block, [("input", name, 0) for name in _PLACES], whole=True)
    return "\n\n\n@jit\n".join((*(t.strip() for t in helper_texts([made])), made.text.strip()))


def _view(at: int, form: Form, masks: list[str]) -> SimpleNamespace:
    """What the templates read."""
    sets = [SimpleNamespace(at=n, **_lookups(n, mask, masks)) for n, mask in enumerate(form)]
    kinds = [SimpleNamespace(at=n, **_lookups("", mask, masks)) for n, mask in enumerate(dict.fromkeys(form))]
    each = [f"{letter}{n}_{axis}" for n in range(len(form)) for letter in "kv" for axis in "xyzt"]
    query = [f"q_{axis}" for axis in "xyzt"]
    return SimpleNamespace(
        at=at, sets=sets, kinds=kinds,
        numbers=_wrapped(["N", *(f"M{n}" for n in range(len(form))), "Y", "Z", *query, *each, "scale"]),
        set_numbers=_wrapped(["N", "M", "Y", "Z", *query, *(f"{a}_{axis}" for a in "kv" for axis in "xyzt"), "scale"]),
    )  # fmt: skip


def _wrapped(names: list[str]) -> SimpleNamespace:
    """As parameters, and as strings."""
    lines = ["\n    ".join(textwrap.wrap(", ".join(words), 114)) for words in (names, [f'"{n}"' for n in names])]
    return SimpleNamespace(plain=lines[0], quoted=lines[1])


def _lookups(at: int | str, mask: str | None, masks: list[str]) -> dict[str, str]:
    """A set's strides, and which of its tokens are seen."""
    name = None if mask is None else f"seen_{masks.index(mask)}"
    inside, across = f"(o_m < M{at})[None, :]", f"(o_m < M{at})[:, None] & (o_n < N)[None, :]"
    if name is not None:
        inside += f" & {name}(o_n[:, None], o_m[None, :], N, M{at})"
        across += f" & {name}(o_n[None, :], o_m[:, None], N, M{at})"
    rows = {letter: ", ".join(f"{letter}{at}_{axis}" for axis in "xyz") for letter in "kv"}
    return {**rows, "seen": inside, "seen_across": across}


def _table(at: int, form: Form, digest: str) -> str:
    kinds = list(dict.fromkeys(form))
    keys = ", ".join(f"attention_keys_kernel_{at}_{kinds.index(mask)}" for mask in form)
    return (
        f"ATTENTION_KERNELS_{at} = AttentionKernels(SimpleNamespace(\n"
        f"    digest={f'{digest}_{at}'!r},\n    forward=attention_forward_kernel_{at},\n"
        f"    query=attention_query_kernel_{at},\n    keys=({keys},),\n    tiles=ATTENTION_TILES,\n"
        f"    interpreted=triton is not None and not isinstance(attention_forward_kernel_{at}, triton.JITFunction),\n"
        "))\n"
    )


def _literal() -> str:
    lines = []
    for kernel, sizes in tiles().items():
        rows = "".join(f'        "{products}": {row!r},\n' for products, row in sizes.items())
        lines.append(f'    "{kernel}": {{\n{rows}    }},\n')
    return "{  # kernel -> products -> ((largest width, (queries, keys, warps, stages)), ...)\n" + "".join(lines) + "}"
