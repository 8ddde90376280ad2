"""Why a token does not fit, in human words: the one place that turns LALR's expectations into a diagnostic."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NoReturn

from lark import Token

from psmc.diagnostics import Label, fail
from psmc.frontend.names import ADVICE, KEYWORDS, name_problem
from psmc.frontend.tokens import OPENERS
from psmc.source import SourceFile, Span

_SECTIONS = {
    *("DIM", "INPUT", "PARAM", "STATE", "LIFT", "COMBINE", "RECURRENCE", "OUTPUT", "ASSOCIATIVE", "ORDER", "CONST"),
    "FN",
}
_OPERATORS = {"PLUS", "MINUS", "TIMES", "DIVIDE", "POWER", "COMPARE", "AND", "OR"}
_ATOMS = {"NAME", "NUMBER", "INF", "LPAR"}
_CLOSERS = {close: opener for opener, close in OPENERS.items()}
_TEXT = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": 'a path in "quotes"',
    "LPAR": "'('",
    "RPAR": "')'",
    "LSQB": "'['",
    "RSQB": "']'",
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "EQUAL": "'='",
    "COMMA": "','",
    "COLON": "':'",
    "DOT": "'.'",
    "MINUS": "'-'",
}
# What comes after a keyword where it is one; followed by anything else, it was meant as a name.
_FOLLOWS = {
    **dict.fromkeys(("DIM", "INPUT", "PARAM", "STATE", "OUTPUT", "CONST", "FN", "LET", "FOR", "AGGREGATOR"), ("NAME",)),
    **dict.fromkeys(("LIFT", "RECURRENCE"), ("LBRACE",)),
    **dict.fromkeys(("ASSOCIATIVE", "ORDER"), ("COLON",)),
    "COMBINE": ("LPAR", "EXTERN"),
    "USE": ("STRING",),
}
_PAIRS = {
    "**": "a power is written x ^ y",
    "//": "comments start with '#'",
    "<-": "a definition is written 'name = expression'",
    "+=": "write S = S + …",
    "*=": "write S = S * …",
    "-=": "write S = S - …",
    "/=": "write S = S / …",
    "==": "a definition is written with one '='",
    ":=": "a definition is written with a plain '='",
}


def explain(source: SourceFile, code: tuple[Token, ...], at: int, accepts: set[str]) -> NoReturn:
    """Raise the diagnostic for `code[at]`, which the grammar cannot take; `accepts` are the terminals it could."""
    token = code[at]
    span = _span(source, token)
    opened = _open_brackets(code[:at])
    following = code[at + 1].type if at + 1 < len(code) else "$END"
    shown = "the end of the file" if token.type == "$END" else f"'{_clip(token)}'"
    problem = name_problem(str(token), span) if _is_meant_as_name(token, following, accepts) else None
    if problem:
        fail(problem.code, problem.message, span, helps=problem.helps)
    if opened and (_is_too_late(token, opened) or (opened[-1] != "{" and _begins_a_line(source, code, at))):
        _unclosed(source, code, at, opened[-1], shown)
    if str(token) in _CLOSERS and _CLOSERS[str(token)] not in opened:
        fail("PSM101", f"{shown} closes nothing", span, helps=("delete it, or find a bracket that closed too early",))
    if token.type in _SECTIONS and not opened and at and code[at - 1] == "}":
        closer = (Label(_span(source, code[at - 1]), "this closed the aggregator"),)
        fail("PSM101", f"{shown} stands outside of any aggregator", span, labels=closer, helps=("delete that '}'",))
    start = _continues_a_line(source, code, at) if "EQUAL" in accepts else None
    if start is not None:
        help_ = "write the operator, such as '*', or ';' where a statement ends"
        fail("PSM101", f"expected an operator, found '{start}'", _span(source, start), helps=(help_,))
    fail("PSM101", f"expected {_wanted(accepts)}, found {shown}", span, helps=_helps(code, at, accepts))


def _unclosed(source: SourceFile, code: tuple[Token, ...], at: int, opener: Token, shown: str) -> NoReturn:
    close = OPENERS[str(opener)]
    end = _span(source, code[at - 1]).end
    place = Span(source, end - 1, end) if code[at].type == "$END" else _span(source, code[at])
    fail(
        "PSM101",
        f"'{opener}' is never closed: {shown} comes first",
        place,
        labels=(Label(_span(source, opener), "opened here"),),
        helps=(f"add the missing '{close}'" + (" after this" if code[at].type == "$END" else " before it"),),
    )


def _open_brackets(code: tuple[Token, ...]) -> list[Token]:
    opened: list[Token] = []
    for token in code:
        if str(token) in OPENERS:
            opened.append(token)
        elif str(token) in _CLOSERS and opened:
            opened.pop()
    return opened


def _is_too_late(token: Token, opened: list[Token]) -> bool:
    """Does `token` show that the closing bracket was forgotten?"""
    if token.type in ("$END", "AGGREGATOR", "USE"):
        return True
    inner = str(opened[-1])
    if token.type in _SECTIONS or token.type in ("LET", "FOR", "SEMICOLON"):
        return inner != "{" or (len(opened) > 1 and token.type in _SECTIONS)
    return str(token) in _CLOSERS and _CLOSERS[str(token)] != inner and _CLOSERS[str(token)] in opened


def _is_meant_as_name(token: Token, following: str, accepts: set[str]) -> bool:
    """A keyword where only a name fits (`input state[K]`), or used like one (`order = 1`, `x * for + 1`)."""
    if str(token) not in KEYWORDS or "NAME" not in accepts:
        return False
    if token.type in _FOLLOWS and "LIFT" not in accepts:
        return following not in _FOLLOWS[token.type]
    return "INF" not in accepts and "LET" not in accepts


def _helps(code: tuple[Token, ...], at: int, accepts: set[str]) -> tuple[str, ...]:
    """Advice for the usual mistakes, most telling first."""
    token = code[at]
    previous = code[at - 1] if at else Token("$START", "")
    help_ = _misspelt(token, previous, accepts) or _misused(code, at, previous, accepts)
    if help_ is None and "EQUAL" in accepts and "LIFT" not in accepts:
        help_ = "a statement is 'name[indices] = expression'"
    if help_ is None and "USE" in accepts:
        help_ = "a file holds 'aggregator name { … }', and 'const', 'fn' and 'use' before it"
    return (help_,) if help_ else ()


def _misspelt(token: Token, previous: Token, accepts: set[str]) -> str | None:
    words = {t.lower() for t in accepts if t.lower() in KEYWORDS}
    if "REDUCE" in accepts:
        words |= {"sum", "prod", "max"}
    near = _near(token, words)
    if near:
        return f"did you mean '{near}'?"
    if str(previous) in ADVICE:
        return ADVICE[str(previous)]
    near = _near(previous, KEYWORDS)  # what was read as a name may be a misspelt keyword
    return f"did you mean '{near}' instead of '{previous}'?" if near else None


def _misused(code: tuple[Token, ...], at: int, previous: Token, accepts: set[str]) -> str | None:
    token = code[at]
    for first, second in ((previous, token), (token, code[min(at + 1, len(code) - 1)])):
        if first.end_pos == second.start_pos and f"{first}{second}" in _PAIRS:
            return _PAIRS[f"{first}{second}"]
    match previous.type, token.type:
        case (_, "REDUCE") | ("REDUCE", "LSQB"):
            return "put the reduction in parentheses, or last in its product"
        case (_, "COMPARE") if "AND" in accepts:
            return "comparisons do not chain: write a < b and b < c"
        case (_, "COMPARE") if token == "==" and "EQUAL" in accepts:
            return _PAIRS["=="]
        case (_, "EQUAL") if "COMPARE" in accepts:
            return "equality is written '=='"
        case ("RSQB", "LSQB"):
            return "several subscripts share one pair of brackets: S[i, j]"
        case ("LSQB" | "COMMA", "NUMBER") if "NAME" in accepts:
            return "what is assigned or summed over has index names in its brackets, not numbers"
        case ("LSQB" | "COMMA", "COLON"):
            return "each dim has an index: s[i, j] = x[i, j]"
        case ("ASSOCIATIVE" | "ORDER", "EQUAL"):
            return f"write {previous}: {code[min(at + 1, len(code) - 1)]}"
        case (_, "COMPARE") if accepts >= {"COMMA", "LIFT"}:
            return "an interval says which values there are: x in (0, inf)"
        case ("RPAR", _) if accepts == {"DOT"}:
            return "functions stand by themselves: exp(x); a tree's level is at(c).S[i, j]"
        case ("COMBINE", _):
            return "name the two sides, the earlier one first: combine (l, r) { … }"
        case (_, "NAME") if accepts >= {"COMMA", "LIFT"}:
            return "declarations of one section are separated by commas"
    return None


def _near(token: Token, words: set[str] | frozenset[str]) -> str | None:
    text = str(token).lower()
    if token.type != "NAME" or len(text) < 3:
        return None
    swapped = [w for w in sorted(words) if sorted(w) == sorted(text)]
    return next(iter(swapped + get_close_matches(text, sorted(words), 1, 0.75)), None)


def _continues_a_line(source: SourceFile, code: tuple[Token, ...], at: int) -> Token | None:
    """The name that the unfinished statement before `at` begins with, if an expression ends just before it."""
    start = at - 1
    if start >= 0 and code[start].type == "RSQB":
        while start > 0 and code[start].type != "LSQB":
            start -= 1
        start -= 1
    if start < 1 or code[start].type != "NAME" or code[start - 1].type not in ("NAME", "NUMBER", "RSQB", "RPAR"):
        return None
    known = _near(code[start], KEYWORDS) or str(code[start]) in ADVICE
    return None if known or _begins_a_line(source, code, start) else code[start]


def _begins_a_line(source: SourceFile, code: tuple[Token, ...], at: int) -> bool:
    """Is `code[at]` a name at the beginning of a line?"""
    gap = source.text[code[at - 1].end_pos : code[at].start_pos] if at else "\n"
    return code[at].type == "NAME" and "\n" in gap


def _wanted(accepts: set[str]) -> str:
    """'an expression', or a short list of what could stand here."""
    rest = accepts - {"SEMICOLON", "DOC"}
    parts: list[str] = []
    for found, covers, words in _GROUPS:
        if found <= rest:
            rest -= covers
            parts.append(words)
    parts += sorted(_TEXT.get(t, f"'{t.lower()}'") for t in rest if t != "$END")
    if not parts:
        return "the end of the file"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


# (terminals that show it, terminals it covers, how to say it), tried in order
_GROUPS: tuple[tuple[set[str], set[str], str], ...] = (
    (_ATOMS, _ATOMS | {"MINUS", "NOT", "REDUCE"}, "an expression"),
    ({"TIMES", "PLUS"}, _OPERATORS | {"LSQB", "LBRACE", "LPAR", "DOT"}, "an operator"),
    ({"USE", "AGGREGATOR"}, {"USE", "AGGREGATOR", "CONST", "FN"}, "'aggregator'"),
    ({"LIFT", "OUTPUT"}, _SECTIONS | {"LET"}, "a section ('state', 'output', …)"),
    ({"LET", "FOR", "NAME"}, {"LET", "FOR", "NAME"}, "a statement"),
    ({"EXTERN", "LPAR"}, {"EXTERN", "LPAR"}, "'(l, r)' or 'extern'"),
)


def _span(source: SourceFile, token: Token) -> Span:
    return Span(source, token.start_pos or 0, token.end_pos or 0)


def _clip(token: Token) -> str:
    text = str(token).split("\n", 1)[0]
    return text if len(text) <= 30 else text[:29] + "…"
