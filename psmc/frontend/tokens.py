"""Text to tokens, by the terminals of the grammar. Bounds nesting and numbers before the parser sees anything."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from lark import Token
from lark.lexer import TerminalDef

from psmc.diagnostics import Label, fail
from psmc.source import MAX_SOURCE_BYTES, SourceFile, Span

MAX_NESTING = 200
MAX_TOKENS = 100_000  # in a file: seconds to parse
MAX_AGGREGATORS = 500  # in a file: each is proved by itself
OPENERS = {"(": ")", "[": "]", "{": "}"}
_CLOSERS = frozenset(OPENERS.values())
_TRIVIA = frozenset({"COMMENT", "SPACE"})
# How tightly operators in a row bind; signs, 'not', powers and reductions, which nest to the right, most of all.
_TIGHTNESS = {"OR": 0, "AND": 1, "PLUS": 2, "MINUS": 2, "TIMES": 3, "DIVIDE": 3}
_PREFIX = frozenset({"MINUS", "NOT", "POWER", "REDUCE"})
_OPERANDS = frozenset({"NAME", "NUMBER", "INF", "DOT"})

# What people type who come from other languages, and how it is written here. Longest first.
_SLIPS = {
    "**": "a power is written x ^ y",
    "//": "comments start with '#'; a rounded-down quotient does not exist",
    "/*": "comments start with '#'",
    "&&": "write 'and'",
    "||": "write 'or'",
    ":=": "write '='",
    "->": "a definition is written 'name = expression'",
    "!": "write 'not'",
    "&": "write 'and'",
    "|": "write 'or'; an absolute value is abs(x)",
    "%": "there is no remainder operator",
    "@": "write the sum out: sum[k] A[i, k] * B[k, j]",
    "'": "strings are written in double quotes",
    "−": "write the ASCII '-'",
    "–": "write the ASCII '-'",
    "·": "write '*'",
    "×": "write '*'",
    "≤": "write '<='",
    "≥": "write '>='",
    "≠": "write '!='",
    "∞": "write 'inf'",
    "²": "a power is written x ^ 2",
    "³": "a power is written x ^ 3",
    "√": "write sqrt(x)",
    "\u00a0": "this is a no-break space: write a plain one",
    "\ufeff": "this is a byte order mark in the middle of the text: delete it",
}


@dataclass(frozen=True)
class Tokens:
    """`code` in order, without trivia; `comments` in order, each as the span of '# …'."""

    code: tuple[Token, ...]
    comments: tuple[Span, ...]


class _Chains:
    """Operators in a row between two brackets: a + b + … nests once each, and the parser would meet all of them before
    it builds the first."""

    def __init__(self) -> None:
        self._start: int | None = None  # of the expression
        self._counts = [0] * 5  # by tightness: how deep the operand at hand is at least
        self.operand = False  # whether one has just ended, so that a minus is no sign

    def add(self, source: SourceFile, kind: str, begin: int, at: int) -> None:
        """The next token at these brackets. Raises PsmcError PSM502."""
        if kind in _OPERANDS:
            self.operand = True
            self._start = begin if self._start is None else self._start
            return
        level = _TIGHTNESS.get(kind) if self.operand else None
        self.operand = False
        if kind == "COMPARE":
            self._counts[2:] = [0, 0, 0]
            return
        if level is None and kind not in _PREFIX:
            self._counts, self._start = [0] * 5, None
            return
        level = 4 if level is None else level
        self._counts[level + 1 :] = [0] * (4 - level)
        if kind == "REDUCE":  # takes what is left of the product
            self._counts[3] = 0
        self._counts[level] += 1
        if self._counts[level] > MAX_NESTING:
            refuse_depth(Span(source, begin if self._start is None else self._start, at))


def refuse_depth(span: Span) -> NoReturn:
    """Raises PsmcError PSM502."""
    fail(
        "PSM502", f"this expression is nested deeper than {MAX_NESTING}", span,
        notes=("a chain a + b + c + … nests once per operator",),
        helps=("name parts of it with 'let', or use a reduction such as sum[i]",),
    )  # fmt: skip


class Scanner:
    """One regular expression over the grammar's terminals; longer literals win, keywords win over NAME."""

    def __init__(self, terminals: Iterable[TerminalDef]) -> None:
        patterns: list[TerminalDef] = []
        self.words: dict[str, str] = {}
        for terminal in terminals:
            literal = terminal.pattern.type == "str"
            if literal and terminal.pattern.value.isidentifier():
                self.words[terminal.pattern.value] = terminal.name
            else:
                patterns.append(terminal)
        # REDUCE is a choice of words: as a pattern of its own it would split 'summary'.
        for terminal in [p for p in patterns if re.fullmatch(r"\(\?:[a-z|]+\)", p.pattern.value)]:
            patterns.remove(terminal)
            self.words.update(dict.fromkeys(terminal.pattern.value[3:-1].split("|"), terminal.name))
        patterns.sort(key=lambda t: (-t.priority, t.pattern.type == "str", -len(t.pattern.value), t.name))
        self._regex = re.compile("|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in patterns))

    def scan(self, source: SourceFile, start: int = 0, end: int | None = None) -> Tokens:
        """Tokens of `source.text[start:end]`. Raises PsmcError: 1xx outside the language, 5xx for our limits."""
        text = source.text
        stop = len(text) if end is None else end
        code: list[Token] = []
        comments: list[Span] = []
        opened: list[Token] = []
        chains = [_Chains()]
        aggregators = 0
        at, match_at, words = start, self._regex.match, self.words
        while at < stop:
            match = match_at(text, at, stop)
            if match is None:
                _refuse_character(source, at)
            kind, value = match.lastgroup or "", match.group()
            begin, at = at, match.end()
            if kind in _TRIVIA:
                if kind == "COMMENT":
                    comments.append(Span(source, begin, at))
                continue
            if kind == "NAME":
                kind = words.get(value, kind)
                if at < stop and text[at].isalnum():
                    _refuse_character(source, at)
            elif kind == "NUMBER" and at < stop and (text[at].isalnum() or text[at] in "._"):
                _refuse_number(source, begin)
            elif kind == "STRING" and text.startswith('"""', begin):
                _refuse_character(source, begin)
            token = Token(kind, value, begin, 0, 0, 0, 0, at)
            aggregators += value == "aggregator"
            if aggregators > MAX_AGGREGATORS or len(code) == MAX_TOKENS:
                _refuse_length(Span(source, begin, at), aggregators > MAX_AGGREGATORS)
            if value in OPENERS:
                opened.append(token)
                chains.append(_Chains())
                if len(opened) > MAX_NESTING:
                    fail(
                        "PSM502",
                        f"brackets are nested deeper than {MAX_NESTING}",
                        Span(source, begin, at),
                        labels=(Label(Span(source, opened[0].start_pos or 0, opened[0].end_pos or 0), "from here"),),
                        helps=("name parts of the expression with 'let'",),
                    )
            elif value in _CLOSERS:
                if opened:
                    opened.pop()
                    chains.pop()
                chains[-1].operand = True
            else:
                chains[-1].add(source, kind, begin, at)
            code.append(token)
        return Tokens(tuple(code), tuple(comments))


def check_size(source: SourceFile) -> None:
    """Refuse what is too large to be a spec, and NUL bytes. Raises PsmcError."""
    size = len(source.text) if source.text.isascii() else len(source.text.encode("utf-8", "replace"))
    if size > MAX_SOURCE_BYTES:
        fail(
            "PSM501",
            f"{source.name} has {size:,} bytes; psmc reads at most {MAX_SOURCE_BYTES:,}",
            helps=("a spec is some 10 to 20 lines: is this the right file?",),
        )
    nul = source.text.find("\0")
    if nul >= 0:
        fail("PSM102", "the text holds a NUL byte", Span(source, nul, nul + 1), helps=("save it as plain UTF-8 text",))


def _refuse_length(span: Span, whole: bool) -> NoReturn:
    """`whole`: it is aggregators that are too many, else tokens."""
    count = f"{MAX_AGGREGATORS} aggregators" if whole else f"{MAX_TOKENS:,} words and signs"
    helps = ("write several files; psmc check takes a directory.",)
    fail("PSM501", f"{span.source.name} holds more than {count}", span, helps=helps)


def _refuse_number(source: SourceFile, start: int) -> NoReturn:
    found = re.compile(r"[0-9A-Za-z_.]+").match(source.text, start)
    assert found is not None
    span = Span(source, start, found.end())
    word = re.fullmatch(r"([0-9.]+)([A-Za-z_]\w*)", found.group())
    help_ = "numbers look like 2, 0.5 or 1e-6"
    if word and word[2].lower() != "e" and word[1] != "0":
        help_ = f"a product needs its sign: {word[1]} * {word[2]}"
    fail("PSM105", f"'{found.group()[:40]}' is not a number", span, helps=(help_,))


def _refuse_character(source: SourceFile, at: int) -> NoReturn:
    text = source.text
    char = text[at]
    if char == '"':
        triple = text.startswith('"""', at)
        quote = '"""' if triple else '"'
        where = "" if triple else " on its line"
        message = f"text in quotes has no closing {quote}{where}"
        fail("PSM101", message, Span(source, at, at + len(quote)), label="opened here")
    shown = f"'{char}'" if char.isprintable() else f"the character U+{ord(char):04X}"
    for slip, advice in _SLIPS.items():
        if text.startswith(slip, at):
            what = f"'{slip}'" if slip.isprintable() else shown
            fail("PSM101", f"{what} is not part of the language", Span(source, at, at + len(slip)), helps=(advice,))
    if char.isalpha() or unicodedata.category(char).startswith(("M", "N")):
        word = re.compile(r"\w+").search(text, at)
        span = Span(source, at, word.end() if word and word.start() == at else at + 1)
        message = f"'{span.text[:40]}' is not ASCII: names are ASCII letters, digits and underscores"
        fail("PSM104", message, span, helps=_spelled(char))
    fail("PSM101", f"{shown} is not part of the language", Span(source, at, at + 1))


def _spelled(char: str) -> tuple[str, ...]:
    """'β' -> beta."""
    name = unicodedata.name(char, "").split(" ")
    if name[:1] == ["GREEK"] and name[-2:-1] == ["LETTER"]:
        return ("write 'lam'",) if name[-1] == "LAMDA" else (f"write '{name[-1].lower()}'",)
    return ()
