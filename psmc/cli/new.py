"""`psmc new`: a commented first spec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from psmc.cli import console, inputs
from psmc.diagnostics import fail

Kind = Literal["combine", "recurrence", "decorator"]

_COMBINE = '''\
# {name}: a leaky average with a gate per token. Change it into your model.
#
# A sequence model is a scan: the state after t tokens is x_1 ∘ x_2 ∘ … ∘ x_t. `lift` turns one token into an element,
# `combine` joins two neighbouring elements, `output` reads the state. If combine is associative, the same rule trains
# in parallel and decodes token by token; `psmc check {file}` proves it.
aggregator {name} {{
  """h' = a h + (1 - a) x, a in (0, 1) given by the token."""
  input x
  input gate in (-inf, 0]  # the log of a: an interval says what may be passed
  state a = 1, h = 0       # '=' gives the identity element: combining with it changes nothing
  lift {{
    a = exp(gate)
    h = (1 - exp(gate)) * x
  }}
  combine (l, r) {{  # l is the earlier element
    a = l.a * r.a
    h = r.a * l.h + r.h
  }}
  output y = h
  associative: yes  # a claim, which is proved; 'no' means a fixed order, 'assume' vouches for it
}}
'''

_RECURRENCE = '''\
# {name}: linear attention with a decay per key channel. Change it into your model.
#
# A recurrence says how one token changes the state, as papers write it. psmc lifts it to an associative combine, where
# it is affine in the state, and proves that; `psmc explain {file}` shows the result.
aggregator {name} {{
  """S' = diag(exp g) S + k vᵀ, y = qᵀ S."""
  dim K, V  # sizes are taken from the tensors that are passed
  input q[K], k[K], v[V]
  input g[K] in (-inf, 0]  # log decay
  state S[K, V] = 0        # where a sequence starts
  recurrence {{
    # On the right S is its newest value; prev.S would be the one before this token.
    S[i, j] = exp(g[i]) * S[i, j] + k[i] * v[j]
  }}
  output y[j] = sum[i] q[i] * S[i, j]
  associative: yes
}}
'''

_DECORATOR = '''\
# {name}: a leaky average with a gate per token, as a decorated class. Change it into your model.
#
# The methods are traced once, on symbolic arrays: they say the mathematics, in array style, and never see numbers.
# Importing this file proves the claim and compiles the class: {cls}(x, gate) then runs on [B, T, *lanes] tensors.

import psmc
from psmc.lang import exp


@psmc.aggregator(inputs="x gate in (-inf, 0]", state="a=1 h=0", associative=True)
class {cls}:
    """h' = a h + (1 - a) x, a in (0, 1) given by the token."""

    def lift(x):
        """One token to one element."""
        a = exp(x.gate)
        return dict(a=a, h=(1 - a) * x.x)

    def combine(l, r):
        """Two neighbouring elements to one; l is the earlier."""
        return dict(a=l.a * r.a, h=r.a * l.h + r.h)

    def output(s, x):
        return dict(y=s.h)
'''
_TEMPLATES: dict[Kind, str] = {"combine": _COMBINE, "recurrence": _RECURRENCE, "decorator": _DECORATOR}


@click.command(epilog="\b\nExamples:\n  psmc new decay\n  psmc new my_attention --kind recurrence")
@click.argument("name", metavar="NAME")
@click.option(
    "--kind", type=click.Choice(list(_TEMPLATES)), default="combine", show_default=True,
    help="A combine rule, a recurrence, or a decorated Python class.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def command(name: str, kind: Kind, force: bool) -> int:
    """Start a spec: writes NAME.psm (or NAME.py), commented, which `psmc check` proves as it is.

    NAME may carry a directory.
    """
    from psmc.frontend.psm import parse
    from psmc.frontend.resolve import resolve
    from psmc.source import SourceFile

    given = Path(name)
    suffix = ".py" if kind == "decorator" else inputs.SUFFIX
    path = given if given.suffix == suffix else given.with_name(given.name + suffix) if given.name else given
    stem = path.stem
    if not (stem.isascii() and stem.isidentifier()):
        fail(
            "PSM104", f"'{stem}' cannot be the name of an aggregator.",
            helps=("use ASCII letters, digits and underscores, a letter first: psmc new my_model.",),
        )  # fmt: skip
    # Every kind takes the same names: those of the language.
    text = _TEMPLATES["recurrence" if kind == "recurrence" else "combine"].format(name=stem, file=path.name)
    resolve(parse(SourceFile(str(path.with_suffix(inputs.SUFFIX)), text)))
    if os.path.lexists(path) and not force:
        fail("PSM295", f"{path} exists already.", helps=("choose another name, or pass --force to overwrite it.",))
    cls = "".join(part[:1].upper() + part[1:] for part in stem.split("_")) or stem
    inputs.write(path, _TEMPLATES[kind].format(name=stem, file=path.name, cls=cls))
    following = f"python {path}" if kind == "decorator" else f"psmc check {path}"
    console.say(f"wrote {path}; next: {following}")
    return 0
