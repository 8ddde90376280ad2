"""Tiles for one module on the device at hand: a handful of candidates a kernel, each checked, then timed."""

from psmc.tuning.module import Target, interpreted
from psmc.tuning.result import Result, Tried, numbers_of
from psmc.tuning.search import NothingRuns, Search
from psmc.tuning.shape import Shape, parse, usual

__all__ = [
    "NothingRuns", "Result", "Search", "Shape", "Target", "Tried", "interpreted", "numbers_of", "parse", "usual",
]  # fmt: skip
