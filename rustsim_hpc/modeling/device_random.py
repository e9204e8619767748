"""The engine's random numbers as CUDA C, for kernels that users write: the same bits as `rustsim_hpc.random`.

A kernel that takes ``const rs_rng* rng`` gets its phase's stream: ``rs_uniform(rng, i, draw)`` is the number
of the partition's row i in this step. It performs the same operations as :mod:`rustsim_hpc.random`, whose
constants it uses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from rustsim_hpc import random as faces

RNG: Final = "rs_rng"
"""C type of a stream; a kernel takes it by pointer to const."""

_SOURCE = r"""
typedef unsigned long long rs_u64;
struct rs_rng { rs_u64 key; long long first_row; const rs_u64* ids; const long long* step; };

union rs_word { rs_u64 bits; double value; };
__device__ inline double rs_float(rs_u64 bits) { rs_word word; word.bits = bits; return word.value; }
__device__ inline rs_u64 rs_bits(double value) { rs_word word; word.value = value; return word.bits; }

/* Philox4x32-10, doi:10.1145/2063384.2063405. */
__device__ inline void rs_block(const rs_rng* rng, long long i, unsigned block, unsigned* c) {
    rs_u64 id = rng->ids ? rng->ids[i] : (rs_u64)(rng->first_row + i);
    unsigned k0 = (unsigned)rng->key, k1 = (unsigned)(rng->key >> 32);
    c[0] = (unsigned)id; c[1] = (unsigned)(id >> 32); c[2] = (unsigned)*rng->step; c[3] = block;
    for (int round = 0; round < 10; ++round) {
        rs_u64 p0 = (rs_u64)c[0] * 0xD2511F53u, p1 = (rs_u64)c[2] * 0xCD9E8D57u;
        c[0] = (unsigned)(p1 >> 32) ^ c[1] ^ k0; c[1] = (unsigned)p1;
        c[2] = (unsigned)(p0 >> 32) ^ c[3] ^ k1; c[3] = (unsigned)p0;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
}
__device__ inline rs_u64 rs_half(const rs_rng* rng, long long i, unsigned block, unsigned half) {
    unsigned c[4];
    rs_block(rng, i, block, c);
    return half ? (rs_u64)c[2] << 32 | c[3] : (rs_u64)c[0] << 32 | c[1];
}
__device__ inline double rs_open(rs_u64 bits) { return ((double)(bits >> 12) + 0.5) * @UNIT_52@; }
__device__ inline double rs_nan() { return rs_float(0x7FF8000000000000ull); }

/* The logarithm of fdlibm, e_log.c. */
__device__ inline double rs_log(double x) {
    rs_u64 bits = rs_bits(x) + ((0x3FF00000ull - 0x3FE6A09Eull) << 32);
    double k = (double)(bits >> 52) - 1023.0;
    double f = rs_float((bits & 0xFFFFFFFFFFFFFull) + (0x3FE6A09Eull << 32)) - 1.0;
    double s = f / (2.0 + f), z = s * s, w = z * z;
    double series = z * (@LOG_ODD(w)@) + w * (@LOG_EVEN(w)@);
    double half_square = 0.5 * f * f;
    return s * (half_square + series) + k * @LN2_LOW@ - half_square + f + k * @LN2_HIGH@;
}
/* Wichura's AS 241. */
__device__ inline double rs_quantile(double u) {
    double q = u - 0.5, r, x;
    if ((q < 0.0 ? -q : q) <= @CENTRAL_LIMIT@) {
        r = @CENTRAL_SQUARE@ - q * q;
        return q * (@CENTRAL_NUMERATOR(r)@) / (@CENTRAL_DENOMINATOR(r)@);
    }
    r = sqrt(-rs_log(q < 0.0 ? u : 1.0 - u));
    if (r <= @TAIL_LIMIT@) {
        r = r - @TAIL_SHIFT@;
        x = (@TAIL_NUMERATOR(r)@) / (@TAIL_DENOMINATOR(r)@);
    } else {
        r = r - @TAIL_LIMIT@;
        x = (@FAR_NUMERATOR(r)@) / (@FAR_DENOMINATOR(r)@);
    }
    return q < 0.0 ? -x : x;
}
__device__ inline rs_u64 rs_upper(rs_u64 a, rs_u64 b) {
    rs_u64 al = (unsigned)a, ah = a >> 32, bl = (unsigned)b, bh = b >> 32, c1 = al * bh, c2 = ah * bl;
    rs_u64 middle = ((al * bl) >> 32) + (unsigned)c1 + (unsigned)c2;
    return ah * bh + (c1 >> 32) + (c2 >> 32) + (middle >> 32);
}

/* What kernels call: row i of the partition; a draw out of range gives NaN or -1, as in row kernels. */
__device__ inline double rs_uniform(const rs_rng* rng, long long i, rs_u64 draw) {
    if (draw >= @uniform_draws@) return rs_nan();
    return (double)(rs_half(rng, i, @uniform_slot@ | (unsigned)(draw >> 1), draw & 1) >> 11) * @UNIT_53@;
}
__device__ inline float rs_uniform32(const rs_rng* rng, long long i, rs_u64 draw) {
    unsigned c[4];
    if (draw >= @uniform32_draws@) return (float)rs_nan();
    rs_block(rng, i, @uniform32_slot@ | (unsigned)(draw >> 2), c);
    unsigned low = draw & 1 ? c[1] : c[0], high = draw & 1 ? c[3] : c[2];
    return (float)((draw & 2 ? high : low) >> 8) * (float)@UNIT_24@;
}
__device__ inline double rs_normal(const rs_rng* rng, long long i, rs_u64 draw) {
    if (draw >= @normal_draws@) return rs_nan();
    return rs_quantile(rs_open(rs_half(rng, i, @normal_slot@ | (unsigned)(draw >> 1), draw & 1)));
}
__device__ inline double rs_exponential(const rs_rng* rng, long long i, rs_u64 draw) {
    if (draw >= @exponential_draws@) return rs_nan();
    return -rs_log(rs_open(rs_half(rng, i, @exponential_slot@ | (unsigned)(draw >> 1), draw & 1)));
}
__device__ inline long long rs_integers(const rs_rng* rng, long long i, rs_u64 draw, long long n) {
    if (draw >= @integers_draws@ || n < 1) return -1;
    unsigned first = @integers_slot@ | (unsigned)(draw << @ATTEMPTS_SHIFT@);
    rs_u64 m = (rs_u64)n, bits = rs_half(rng, i, first, 0), upper = rs_upper(bits, m);
    if (bits * m < m) {
        rs_u64 reject_below = (0 - m) % m;
        for (unsigned attempt = 0; attempt < @ATTEMPTS@; ++attempt) {
            bits = rs_half(rng, i, first | attempt >> 1, attempt & 1);
            upper = rs_upper(bits, m);
            if (bits * m >= reject_below) break;
        }
    }
    return (long long)upper;
}
"""


def source_with_random(code: str) -> str:
    """Return CUDA C with the engine's random functions prepended, if it names a stream.

    Line numbers of compiler messages refer to ``code``.
    """
    return f"{cuda_random()}#line 1\n{code}" if re.search(rf"\b{RNG}\b", code) else code


@lru_cache(maxsize=1)
def cuda_random() -> str:
    """Return CUDA C with `rs_uniform`, `rs_uniform32`, `rs_normal`, `rs_exponential` and `rs_integers`."""
    return re.sub(r"@(\w+)(?:\((\w)\))?@", _filled, _SOURCE)


def _filled(found: re.Match[str]) -> str:
    name, variable = found.groups()
    kind, _, what = name.rpartition("_")
    if what == "draws":
        return f"{faces.DRAWS[kind]}ull"
    if what == "slot":
        return f"{getattr(faces, f'SLOT_{kind.upper()}') << faces.SLOT_SHIFT}u"
    if kind == "UNIT":
        return repr(2.0 ** -int(what))
    value = getattr(faces, name)
    return _horner(value, variable) if variable else repr(value)


def _horner(coefficients: Sequence[float], variable: str) -> str:
    text = repr(coefficients[0])
    for coefficient in coefficients[1:]:
        text = f"({text} * {variable} + {coefficient!r})"
    return text
