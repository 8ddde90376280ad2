"""The .psm text frontend: a file to the surface AST."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lark import Lark, Token, UnexpectedToken
from lark.common import LexerConf
from lark.lexer import Lexer, LexerState

from psmc import assets
from psmc.diagnostics import fail
from psmc.frontend import surface
from psmc.frontend.build import Builder
from psmc.frontend.syntax import explain
from psmc.frontend.tokens import Scanner, Tokens, check_size
from psmc.source import MAX_SOURCE_BYTES, SourceFile, Span, read_bytes


def read(path: str | Path, span: Span | None = None) -> SourceFile:
    """The text of a file. Raises PSM102 if it is missing or not UTF-8 text, PSM501 if it is too large; at `span`, where
    another file asks for it."""
    name = Path(path)
    try:
        data = read_bytes(name)
        size = len(data) if len(data) <= MAX_SOURCE_BYTES else max(len(data), name.stat().st_size)
    except FileNotFoundError:
        if name.is_symlink():
            message = f"{name} is a link to {name.readlink()}, where there is no file"
            fail("PSM102", message, span, helps=("mend the link",))
        fail("PSM102", f"{name}: there is no such file", span, helps=("check the path",))
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else str(error)) or "it cannot be read"
        fail("PSM102", f"{str(name)!r:.200}: {why.lower()}", span, helps=("give the path of a .psm file",))
    if size > MAX_SOURCE_BYTES:
        fail(
            "PSM501", f"{name} has {size:,} bytes; psmc reads at most {MAX_SOURCE_BYTES:,}", span,
            helps=("a spec is some 10 to 20 lines: is this the right file?",),
        )  # fmt: skip
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} on line {line}"
        fail("PSM102", message, span, helps=("save it as UTF-8",))
    # A lone CR ends a line where the file was made, and a comment with it.
    return SourceFile(str(name), re.sub("\r(?!\n)", "\n", text))


def parse(source: SourceFile) -> surface.File:
    """The surface AST of a file, every node spanned. Raises PsmcError 1xx for its mistakes, 5xx for our limits."""
    check_size(source)
    tree = _tree(source, tokens(source), "file")
    file: surface.File = Builder(source).build(tree)
    return file


def parse_declarations(
    source: SourceFile, role: Literal["input", "param", "state"], start: int = 0, end: int | None = None
) -> tuple[surface.Declared, ...]:
    """Declarations as a decorator's string holds them: `q[K] k[K] beta in [0, 1]`, commas optional.

    Reads `source.text[start:end]`, so that spans point into the Python file the string is written in.
    """
    check_size(source)
    tree = _tree(source, tokens(source, start, end), "declarations", end)
    builder = Builder(source)
    return builder.declarations(tree, role)


def tokens(source: SourceFile, start: int = 0, end: int | None = None) -> Tokens:
    """Tokens and comments of `source.text[start:end]`."""
    return _scanner().scan(source, start, end)


class _NoLexer(Lexer):
    """Tokens come from `Scanner`; lark only parses them."""

    def __init__(self, conf: LexerConf) -> None:
        del conf

    def lex(self, lexer_state: LexerState, parser_state: Any) -> Iterator[Token]:
        del lexer_state, parser_state
        return iter(())


@cache
def grammar() -> Lark:
    """The loaded grammar. `strict`: any shift/reduce conflict is an error, where lark would silently shift."""
    return load(assets.text("grammar", "psm.lark"))


def load(text: str) -> Lark:
    """Build the LALR tables of a grammar. Raises lark.GrammarError if it has a conflict."""
    return Lark(
        text,
        parser="lalr",
        lexer=_NoLexer,
        strict=True,
        start=["file", "declarations"],
        propagate_positions=True,
        maybe_placeholders=True,
    )


@cache
def _scanner() -> Scanner:
    return Scanner(grammar().terminals)


def _tree(source: SourceFile, found: Tokens, start: str, end: int | None = None) -> Any:
    stop = len(source.text) if end is None else end
    code = (*found.code, Token("$END", "", stop, 0, 0, 0, 0, stop))
    at = 0
    with suppress(UnexpectedToken):
        state = grammar().parse_interactive(start=start).parser_state
        for at, token in enumerate(code[:-1]):  # noqa: B007
            state.feed_token(token)
        at = len(code) - 1
        return state.feed_token(code[at], True)
    # LALR may have reduced under the wrong token before it saw the mistake, so ask a parser that has not met it.
    parser = grammar().parse_interactive(start=start)
    for token in code[:at]:
        parser.parser_state.feed_token(token)
    accepts: set[str] = parser.accepts()  # type: ignore[no-untyped-call]
    explain(source, code, at, accepts)
