"""Text to train on: files and folders, split into training and held-out text, as bytes or byte pairs."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = {".txt", ".md", ".py", ".rst"}


def read(path: Path, held: Path | None, limit: int) -> tuple[bytes, bytes]:
    """(training text, held-out text), at most `limit` bytes of training text.

    A file: its last tenth is held out, unless `held` is another file. A folder: whole packages are, one in twenty by a
    hash of their names, so that no file of a package is trained on and another one scored.
    """
    if held is not None:
        return _text(path)[:limit], _text(held)
    if path.is_file():
        text = path.read_bytes()
        cut = len(text) - len(text) // 10
        return text[:cut][:limit], text[cut:]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    packages = sorted(p for p in path.iterdir() if p.is_dir() or p.suffix in SUFFIXES)
    for package in packages:
        scored = zlib.crc32(package.name.encode()) % 20 == 0
        text = _text(package)
        size += 0 if scored else len(text)
        parts[scored].append(text)
        if size > limit:
            break
    if not parts[0] or not parts[1]:
        raise SystemExit(f"{path} has too few packages to hold some out: pass --held")
    return b"".join(parts[0])[:limit], b"".join(parts[1])


def _text(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    return b"\n".join(p.read_bytes() for p in files)


class Bytes:
    """A token is a byte."""

    size = 256

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def decode(self, tokens: list[int]) -> bytes:
        return bytes(tokens)


class Pairs:
    """Byte-pair encoding within words (Sennrich et al. 2016, arXiv 1508.07909), learned from a text.

    Words are runs of letters with the space before them, digits, or anything else; merges never cross them.
    """

    WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+")

    def __init__(self, text: bytes, size: int) -> None:
        self.pieces = [bytes([n]) for n in range(256)]
        self.rank: dict[tuple[int, int], int] = {}
        self._known: dict[bytes, list[int]] = {}
        counts = Counter(self.WORDS.findall(text))
        words = [(list(word), n) for word, n in sorted(counts.items())]
        pairs: Counter[tuple[int, int]] = Counter()
        where: dict[tuple[int, int], set[int]] = defaultdict(set)
        for at, (word, n) in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += n
                where[pair].add(at)
        while len(self.pieces) < size and pairs:
            best = max(pairs, key=lambda p: (pairs[p], self.pieces[p[0]], self.pieces[p[1]]))
            if pairs[best] < 2:
                break
            self.rank[best] = new = len(self.pieces)
            self.pieces.append(self.pieces[best[0]] + self.pieces[best[1]])
            for at in sorted(where.pop(best)):
                word, n = words[at]
                for pair in pairwise(word):
                    pairs[pair] -= n
                    if pairs[pair] <= 0:
                        del pairs[pair]
                merged = _merge(word, best, new)
                words[at] = (merged, n)
                for pair in pairwise(merged):
                    pairs[pair] += n
                    where[pair].add(at)
        self.size = len(self.pieces)

    def encode(self, text: bytes) -> Tensor:
        out: list[int] = []
        for word in self.WORDS.findall(text):
            if word not in self._known:
                self._known[word] = self._word(list(word))
            out += self._known[word]
        return torch.tensor(out, dtype=torch.int64)

    def decode(self, tokens: list[int]) -> bytes:
        return b"".join(self.pieces[t] for t in tokens)

    def _word(self, word: list[int]) -> list[int]:
        while len(word) > 1:
            best = min(pairwise(word), key=lambda p: self.rank.get(p, 1 << 60))
            if best not in self.rank:
                break
            word = _merge(word, best, self.rank[best])
        return word


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Each `pair` of a word, from the left, becomes one piece."""
    out, at = [], 0
    while at < len(word):
        if word[at] == pair[0] and at + 1 < len(word) and word[at + 1] == pair[1]:
            out.append(new)
            at += 2
        else:
            out.append(word[at])
            at += 1
    return out
