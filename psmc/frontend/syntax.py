"""Why a token does not fit, in human words: the one place that turns LALR's expectations into a diagnostic."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NoReturn

from lark import Token

from psmc.diagnostics import Label, fail
from psmc.frontend.names import KEYWORDS, name_problem
from psmc.frontend.tokens import OPENERS
from psmc.source import SourceFile, Span

_SECTIONS = frozenset("DIM INPUT PARAM STATE LIFT COMBINE RECURRENCE OUTPUT ASSOCIATIVE ORDER CONST FN".split())
_OPERATORS = frozenset("PLUS MINUS TIMES DIVIDE POWER COMPARE AND OR".split())
_ATOMS = frozenset("NAME NUMBER INF LPAR".split())
_TEXT = {
    "NAME": "a name", "NUMBER": "a number", "STRING": 'a path in "quotes"', "DOC": "a docstring", "$END": "the end of the file",
    "LPAR": "'('", "RPAR": "')'", "LSQB": "'['", "RSQB": "']'", "LBRACE": "'{'", "RBRACE": "'}'", "EQUAL": "'='",
    "COMMA": "','", "COLON": "':'", "DOT": "'.'", "MINUS": "'-'",
}  # fmt: skip


def explain(source: SourceFile, code: tuple[Token, ...], at: int, accepts: set[str]) -> NoReturn:
    """Raise the diagnostic for `code[at]`, which the grammar cannot take; `accepts` are the terminals it could."""
    token = code[at]
    span = _span(source, token)
    previous = code[at - 1] if at else None
    opener = _innermost(code[:at])
    shown = "the end of the file" if token.type == "$END" else f"'{_clip(token)}'"
    wanted = _wanted(accepts)

    if opener is not None and (token.type == "$END" or _closes_too_late(token, opener, code[:at])):
        close = OPENERS[str(opener)]
        place = Span(source, _span(source, previous).end - 1, _span(source, previous).end) if previous else span
        fail(
            "PSM101",
            f"'{opener}' is never closed: {shown} comes first",
            place if token.type == "$END" else span,
            labels=(Label(_span(source, opener), "opened here"),),
            helps=(f"add '{close}' before it" if token.type != "$END" else f"add the missing '{close}'",),
        )
    if token.type in ("RBRACE", "RPAR", "RSQB") and opener is None:
        fail("PSM101", f"{shown} closes nothing", span, helps=("delete it, or look for a bracket that closed too early",))
    if "NAME" in accepts and str(token) in KEYWORDS and not _ATOMS <= accepts | {"INF"} or _names_a_thing(token, code, at):
        problem = name_problem(str(token), span)
        if problem:
            fail(problem.code, problem.message, span, helps=problem.helps)
    fail("PSM101", f"expected {wanted}, found {shown}", span, helps=_helps(source, code, at, accepts))


def _names_a_thing(token: Token, code: tuple[Token, ...], at: int) -> bool:
    """A keyword where an expression or a statement would have had a name: `state = 1`, `x * order`."""
    if str(token) not in KEYWORDS or token.type == "REDUCE":
        return False
    following = code[at + 1].type if at + 1 < len(code) else "$END"
    return following in ("EQUAL", "LSQB", "PLUS", "TIMES", "DIVIDE") and token.type not in ("AND", "OR", "NOT", "IN")


def _helps(source: SourceFile, code: tuple[Token, ...], at: int, accepts: set[str]) -> tuple[str, ...]:
    token = code[at]
    previous = code[at - 1] if at else None
    words = {t.lower() for t in accepts if t.lower() in KEYWORDS} | ({"sum", "prod", "max"} if "REDUCE" in accepts else set())
    if token.type == "NAME" or str(token) in KEYWORDS:
        near = get_close_matches(str(token).lower(), sorted(words), 1, 0.7)
        if near:
            return (f"did you mean '{near[0]}'?",)
    if token.type == "COMPARE" and "EQUAL" in accepts:
        return ("a definition is written with one '='",)
    if token.type == "COMPARE":
        return ("comparisons do not chain: write a < b and b < c",)
    if previous is None:
        return ()
    if previous.type == "NAME":  # what was read as the name of a statement may be a misspelt keyword
        near = get_close_matches(str(previous).lower(), sorted(KEYWORDS), 1, 0.75)
        if near and near[0] != previous:
            return (f"did you mean '{near[0]}' instead of '{previous}'?",)
    if str(previous) + str(token) in _DOUBLED:
        return (_DOUBLED[str(previous) + str(token)],)
    if token.type == "REDUCE" and "LPAR" in accepts:
        return ("put the reduction in parentheses, or last in its product",)
    if "EQUAL" in accepts and _same_line(source, code, at):
        return ("every statement is 'name[indices] = expression'; is an operator such as '*' missing before it?",)
    return ()


_DOUBLED = {
    "**": "a power is written x ^ y",
    "//": "comments start with '#'",
    "<-": "a definition is written 'name = expression'",
    "+=": "write S = S + …",
    "*=": "write S = S * …",
    "-=": "write S = S - …",
    "/=": "write S = S / …",
}


def _same_line(source: SourceFile, code: tuple[Token, ...], at: int) -> bool:
    """Is the unfinished statement before `at` on the same line as the end of an expression?"""
    start = at - 1
    if start >= 0 and code[start].type == "RSQB":
        while start > 0 and code[start].type != "LSQB":
            start -= 1
        start -= 1
    if start < 1 or code[start].type != "NAME" or code[start - 1].type not in ("NAME", "NUMBER", "RSQB", "RPAR"):
        return False
    before, this = code[start - 1].end_pos or 0, code[start].start_pos or 0
    return "\n" not in source.text[before:this]


def _wanted(accepts: set[str]) -> str:
    """'an expression', or a short list of what could stand here."""
    rest = set(accepts)
    parts: list[str] = []
    if rest >= _ATOMS:
        parts.append("an expression")
        rest -= _ATOMS | {"MINUS", "NOT", "REDUCE"}
    if rest >= {"TIMES", "PLUS"}:
        rest -= _OPERATORS | {"LSQB", "LBRACE", "LPAR", "DOT", "COMPARE"}
        parts.append("an operator")
    if "USE" in rest and "AGGREGATOR" in rest:
        rest -= {"USE", "AGGREGATOR", "CONST", "FN", "SEMICOLON"}
        parts.append("'aggregator'")
    if rest >= {"LIFT", "OUTPUT"}:
        rest -= _SECTIONS | {"LET", "SEMICOLON"}
        parts.append("a section such as 'state' or 'output'")
    if rest >= {"LET", "FOR", "NAME"}:
        rest -= {"LET", "FOR", "NAME", "SEMICOLON"}
        parts.append("a statement")
    if "EXTERN" in rest:
        parts.append("'(l, r)' or 'extern'")
        rest -= {"EXTERN", "LPAR"}
    parts += [_TEXT.get(t, f"'{t.lower()}'") for t in sorted(rest - {"SEMICOLON", "DOC"})]
    if not parts:
        return "something else"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _innermost(code: tuple[Token, ...]) -> Token | None:
    opened: list[Token] = []
    for token in code:
        if str(token) in OPENERS:
            opened.append(token)
        elif str(token) in OPENERS.values() and opened:
            opened.pop()
    return opened[-1] if opened else None


def _closes_too_late(token: Token, opener: Token, code: tuple[Token, ...]) -> bool:
    """A section inside a block or a bracket, or an aggregator inside anything: the closing bracket was forgotten."""
    if token.type in ("AGGREGATOR", "USE"):
        return True
    depth = sum((str(t) in OPENERS) - (str(t) in OPENERS.values()) for t in code)
    if token.type in _SECTIONS and depth > 1:
        return True
    return token.type == "RBRACE" and str(opener) != "{"


def _span(source: SourceFile, token: Token) -> Span:
    return Span(source, token.start_pos or 0, token.end_pos or 0)


def _clip(token: Token) -> str:
    text = str(token).split("\n", 1)[0]
    return text if len(text) <= 30 else text[:29] + "…"
