"""Slow plain-Python twins of the fingerprint's hashes, written from docs/fingerprints.md alone."""

from functools import cache

import numpy as np

U64 = (1 << 64) - 1
PRIME = 0x100000001B3
OFFSET = 0xCBF29CE484222325
GOLDEN = 0x9E3779B97F4A7C15


def fnv1a(state, data):
    for byte in bytes(data):
        state = ((state ^ byte) * PRIME) & U64
    return state


def fnv1a_state(step, ids, names, columns):
    numbers = [step, len(ids), len(names), *(int(i) for i in ids)]
    state = fnv1a(OFFSET, b"".join(n.to_bytes(8, "little") for n in numbers))
    for name in names:
        state = fnv1a(state, name.encode("utf-8") + b"\xff")
    for column in columns:
        state = fnv1a(state, np.ascontiguousarray(column).tobytes())
    return state


def mix(z):
    z &= U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
    return z ^ (z >> 31)


@cache
def keys(key_index, word):
    seed = mix(int.from_bytes(b"digest:K", "big") + GOLDEN * (2 * key_index + word + 1))
    found = []
    seen = {0}
    t = 0
    while len(found) < 4096:
        t += 1
        key = mix(seed + GOLDEN * t) >> 32
        if key not in seen:
            seen.add(key)
            found.append(key)
    return found


def multiplier(block, key_index, word):
    seed = mix(int.from_bytes(b"digest:M", "big") + GOLDEN * (2 * key_index + word + 1))
    return mix(seed + GOLDEN * (block + 1)) | 1


def digest_column(column, row_offset, key_index):
    size = column.dtype.itemsize
    raw = np.ascontiguousarray(column).tobytes()
    total = 0
    for word in range(2 if size == 8 else 1):
        table = keys(key_index, word)
        for i in range(len(column)):
            row = row_offset + i
            start = i * size + 4 * word
            v = int.from_bytes(raw[start : start + min(size, 4)], "little")
            total += v * table[row % 4096] * multiplier(row // 4096, key_index, word)
    return total & U64


def digest_state(step, ids, names, columns):
    def u64(n):
        return n.to_bytes(8, "little")

    record = u64(1) + u64(step) + u64(len(ids)) + u64(len(names))
    record += u64(digest_column(np.asarray(ids, np.uint64), 0, 0))
    for i, (name, column) in enumerate(zip(names, columns, strict=True)):
        record += name.encode("utf-8") + b"\xff" + column.dtype.name.encode() + b"\xff"
        record += u64(digest_column(column, 0, i + 1))
    return fnv1a(OFFSET, record)
