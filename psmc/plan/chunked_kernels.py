"""Block sizes of the chunk kernels: a table by kernel, bytes of an operand and block of the key."""

from __future__ import annotations

from dataclasses import dataclass

from psmc.plan.tiles import Row

KERNELS = ("forward", "states", "gradients", "prepare", "key", "values")
_KEYS = (64, 128, 256)  # a row holds up to this key block


@dataclass(frozen=True)
class ChunkTile:
    """`tokens` a chunk, `values` a block of the value, `keys` a block of the key where a kernel may split it."""

    tokens: int
    values: int
    keys: int
    warps: int
    stages: int

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        return self.tokens, self.values, self.keys, self.warps, self.stages


@dataclass(frozen=True)
class ChunkTiles:
    """rows: (kernel, bytes of an operand, largest key block, tile)."""

    rows: tuple[tuple[str, int, int, ChunkTile], ...]

    @property
    def data(self) -> tuple[Row, ...]:
        return tuple(Row(kernel, size, key, tile.numbers) for kernel, size, key, tile in self.rows)

    def literal(self) -> str:
        """As a Python dict: kernel -> bytes -> ((largest key block, numbers), ...)."""
        lines = []
        for kernel in KERNELS:
            sizes = []
            for size in (2, 4):
                found = [(k, t.numbers) for name, s, k, t in self.rows if (name, s) == (kernel, size)]
                sizes.append(f"{size}: ({', '.join(map(repr, found))})")
            if found:
                lines.append(f'        "{kernel}": {{{", ".join(sizes)}}},\n')
        return "{\n" + "".join(lines) + "    }"


def tiles(valued: bool = False) -> ChunkTiles:
    """The shipped tiles. `valued`: some decay runs over the value. All kernels of a module agree on the tokens of a
    chunk."""
    rows = []
    for size in (2, 4):
        for key in _KEYS:
            rows += [(k, size, key, _tile(k, size, key, valued)) for k in KERNELS]
    return ChunkTiles(tuple(rows))


def _tile(kernel: str, size: int, key: int, valued: bool) -> ChunkTile:
    """The tile of one kernel for operands of `size` bytes and key blocks of up to `key`.

    What bounds it: a block K x BV of the state in fp32 lies in registers (255 a thread), tiles in shared memory
    (227 KiB). Kernels that scale by a decay over the value hold half a dozen tiles [BT, BV] at once; in bf16 Triton 3.6
    computes wrong results for those of 32 columns, and faults with key blocks of 32. A kernel whose loop only
    accumulates takes one stage: with more, Triton copies the next tiles over the last before the products that read
    those are done.
    """
    tokens = 64 if size == 2 and key <= 128 else 32
    if kernel == "values" and valued:
        return ChunkTile(tokens, 64 if size == 2 else 32, min(key, 64), 4, 1)
    if kernel == "values":
        return ChunkTile(tokens, 64 if size == 4 or key > 128 else 128, min(key, 64), 4, 1)
    if kernel == "forward" and valued:
        return ChunkTile(tokens, 64 if size == 2 else 32, key, 8, 2 if size == 2 and key <= 128 else 1)
    if kernel == "forward":
        return ChunkTile(tokens, 64 if key <= 128 else 32, key, 4, 2 if size == 2 else 1)
    if kernel == "states":
        return ChunkTile(tokens, 64, 64, 4, 2 if size == 2 else 1)
    if kernel in ("key", "gradients"):
        return ChunkTile(tokens, 64 if size == 2 else 32, min(key, 64), 4, 1)
    return ChunkTile(tokens, 64, min(key, 64), 4, 1)
