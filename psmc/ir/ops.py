"""The pointwise operators of the language, a row each. Every interpreter of the IR is a table keyed by these names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["bool", "int", "real", "complex"]
_RANK: dict[str, int] = {"bool": 0, "int": 1, "real": 2, "complex": 3}


def join(kinds: Sequence[Kind]) -> Kind:
    """The smallest kind that holds all of `kinds` (bool < int < real < complex)."""
    return max(kinds, key=_RANK.__getitem__)


KindRule = Callable[[tuple[Kind, ...]], "Kind | None"]  # None: these operand kinds are refused


def _numeric(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds else join(kinds)


def _field(kinds: tuple[Kind, ...]) -> Kind | None:
    """Division and transcendental functions: ints become reals, complex stays complex."""
    return None if "bool" in kinds else join((*kinds, "real"))


def _real_field(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds or "complex" in kinds else "real"


def _ordered(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds or "complex" in kinds else join(kinds)


def _comparison(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds or "complex" in kinds else "bool"


def _equality(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds else "bool"


def _logical(kinds: tuple[Kind, ...]) -> Kind | None:
    return "bool" if set(kinds) == {"bool"} else None


def _select(kinds: tuple[Kind, ...]) -> Kind | None:
    return join(kinds[1:]) if kinds[0] == "bool" and "bool" not in kinds[1:] else None


def _modulus(kinds: tuple[Kind, ...]) -> Kind | None:
    if "bool" in kinds:
        return None
    return "real" if kinds[0] == "complex" else kinds[0]


def _to_real(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds else "real"


def _to_complex(kinds: tuple[Kind, ...]) -> Kind | None:
    return None if "bool" in kinds or "complex" in kinds else "complex"


@dataclass(frozen=True)
class OpInfo:
    """`symbol` is the infix or prefix spelling; ops without one are written as calls."""

    name: str
    arity: int
    kind: KindRule
    symbol: str | None = None
    precedence: int = 100  # binds tighter when larger; calls bind tightest


_ROWS = (
    OpInfo("or", 2, _logical, "or", 10),
    OpInfo("and", 2, _logical, "and", 20),
    OpInfo("not", 1, _logical, "not", 30),
    OpInfo("lt", 2, _comparison, "<", 40),
    OpInfo("le", 2, _comparison, "<=", 40),
    OpInfo("gt", 2, _comparison, ">", 40),
    OpInfo("ge", 2, _comparison, ">=", 40),
    OpInfo("eq", 2, _equality, "==", 40),
    OpInfo("ne", 2, _equality, "!=", 40),
    OpInfo("add", 2, _numeric, "+", 50),
    OpInfo("sub", 2, _numeric, "-", 50),
    OpInfo("mul", 2, _numeric, "*", 60),
    OpInfo("div", 2, _field, "/", 60),
    OpInfo("neg", 1, _numeric, "-", 70),
    OpInfo("pow", 2, _field, "^", 80),
    OpInfo("where", 3, _select),
    OpInfo("max", 2, _ordered),
    OpInfo("min", 2, _ordered),
    OpInfo("abs", 1, _modulus),
    OpInfo("sign", 1, _ordered),
    OpInfo("clamp", 3, _ordered),  # clamp(x, lo, hi)
    OpInfo("exp", 1, _field),
    OpInfo("expm1", 1, _real_field),
    OpInfo("log", 1, _field),
    OpInfo("log1p", 1, _real_field),
    OpInfo("sqrt", 1, _real_field),
    OpInfo("rsqrt", 1, _real_field),
    OpInfo("sin", 1, _real_field),
    OpInfo("cos", 1, _real_field),
    OpInfo("tanh", 1, _real_field),
    OpInfo("sigmoid", 1, _real_field),
    OpInfo("logsigmoid", 1, _real_field),
    OpInfo("softplus", 1, _real_field),
    OpInfo("relu", 1, _ordered),
    OpInfo("silu", 1, _real_field),
    OpInfo("gelu", 1, _real_field),  # the exact form, x * Phi(x)
    OpInfo("erf", 1, _real_field),
    OpInfo("logaddexp", 2, _real_field),
    OpInfo("stop", 1, _numeric),  # identity without a gradient
    OpInfo("real", 1, _to_real),
    OpInfo("imag", 1, _to_real),
    OpInfo("conj", 1, _numeric),
    OpInfo("complex", 2, _to_complex),  # complex(re, im)
)

OPS: dict[str, OpInfo] = {row.name: row for row in _ROWS}

# Reductions bind an index. 'sum' and 'prod' take any number, 'max' ordered ones.
REDUCTIONS: dict[str, KindRule] = {"sum": _numeric, "prod": _numeric, "max": _ordered}
