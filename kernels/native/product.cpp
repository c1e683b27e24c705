// Z = A Bᵀ with A (R, D) and B (C, D) in bf16 and Z (R, C) in fp32: the head's first GEMM. oneDNN, as torch calls it,
// would round Z to bf16, and a log-probability needs all of its bits.
//
// As in BLIS: `right` rows of B by DEPTH pairs are a panel that the L1 cache holds, and `left` rows of A are a tile that
// meets it in registers. The unit of D is the pair (2p, 2p + 1) of bf16 in 32 bits, an operand of vdpbf16ps. Where the
// processor lacks that instruction two multiply-adds do the same in the same order: products of bf16 are exact in fp32,
// so all levels agree bit for bit but for denormals, which the instruction takes as 0.
//
// The file is compiled once per machine code level; see epilogue.cpp for what follows from that. immintrin.h is the one
// header with code, and its functions are always inlined.

#include "product.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace autoregembed {
namespace {

using Float = float __attribute__((vector_size(4 * LANES)));
using Pairs = uint32_t __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

// LEFT · 2 vectors of sums, 2 of B and one of A: 27 of 32 registers, or 11 of 16.
constexpr int LEFT = LANES == 16 ? 12 : 4;
constexpr int RIGHT = 2 * LANES;
static_assert(ROWS_MULTIPLE % LEFT == 0 && ROWS_MULTIPLE % RIGHT == 0);
constexpr int64_t DEPTH = 192;  // pairs: a panel of 24 KiB where LANES is 16
constexpr int64_t BAND = 16;    // tiles of A that meet one panel after the other, in the L2 cache

template <typename T>
INLINE T load(const void* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

INLINE Float add_products(Float sum, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Float)(a & 0xffff0000u) * (Float)(b & 0xffff0000u);  // the second of a pair first, as the instruction does
    return sum + (Float)(a << 16) * (Float)(b << 16);
#endif
}

// Parts of [0, pairs) of at most DEPTH, equal but for one.
INLINE int64_t part_size(int64_t pairs) {
    const int64_t parts = (pairs + DEPTH - 1) / DEPTH;
    return parts ? (pairs + parts - 1) / parts : 1;
}

// Packed: (parts, tiles, pairs of the part, WIDTH); rows past the end are 0.
template <int WIDTH>
void pack(const Packing& c, int64_t first, int64_t last) {
    const int64_t tiles = (c.rows + WIDTH - 1) / WIDTH, size = part_size(c.pairs);
    for (int64_t start = 0; start < c.pairs; start += size) {
        const int64_t count = c.pairs - start < size ? c.pairs - start : size;
        for (int64_t t = first; t < last; ++t) {
            uint32_t* to = c.to + (start * tiles + t * count) * WIDTH;
            for (int w = 0; w < WIDTH; ++w) {
                const int64_t r = t * WIDTH + w;
                if (r < c.rows) {
                    const uint16_t* from = c.from + r * c.row_stride + 2 * start;
                    for (int64_t p = 0; p < count; ++p) __builtin_memcpy(to + p * WIDTH + w, from + 2 * p, 4);
                } else {
                    for (int64_t p = 0; p < count; ++p) to[p * WIDTH + w] = 0;
                }
            }
        }
    }
}

// Z (LEFT, RIGHT) of a tile and a panel: sums over `pairs`, added to what is there unless they are the first.
INLINE void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* z, int64_t z_stride, bool first) {
    Float sum[LEFT][2];
#pragma GCC unroll 12
    for (int i = 0; i < LEFT; ++i) {
        sum[i][0] = first ? Float{} : load<Float>(z + i * z_stride);
        sum[i][1] = first ? Float{} : load<Float>(z + i * z_stride + LANES);
    }
    for (int64_t p = 0; p < pairs; ++p) {
        const Pairs b0 = load<Pairs>(b + p * RIGHT), b1 = load<Pairs>(b + p * RIGHT + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < LEFT; ++i) {
            const Pairs left = a[p * LEFT + i] - Pairs{};
            sum[i][0] = add_products(sum[i][0], left, b0);
            sum[i][1] = add_products(sum[i][1], left, b1);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < LEFT; ++i) {
        store(z + i * z_stride, sum[i][0]);
        store(z + i * z_stride + LANES, sum[i][1]);
    }
}

// A tile at the edge of Z goes through a whole one.
void edge(const uint32_t* a, const uint32_t* b, int64_t pairs, float* z, int64_t z_stride, int64_t rows,
          int64_t columns, bool first) {
    float whole[LEFT * RIGHT] = {};
    for (int64_t i = 0; i < rows && !first; ++i) __builtin_memcpy(whole + i * RIGHT, z + i * z_stride, 4 * columns);
    tile(a, b, pairs, whole, RIGHT, first);
    for (int64_t i = 0; i < rows; ++i) __builtin_memcpy(z + i * z_stride, whole + i * RIGHT, 4 * columns);
}

// Z of tiles [first, last) of A and all of B.
void rows_of(const Product& c, int64_t first, int64_t last) {
    const int64_t lefts = (c.rows + LEFT - 1) / LEFT, rights = (c.columns + RIGHT - 1) / RIGHT;
    const int64_t size = part_size(c.pairs);
    for (int64_t band = first; band < last; band += BAND) {
        const int64_t band_end = band + BAND < last ? band + BAND : last;
        for (int64_t start = 0; start < c.pairs; start += size) {
            const int64_t count = c.pairs - start < size ? c.pairs - start : size;
            for (int64_t j = 0; j < rights; ++j) {
                const uint32_t* b = c.b + (start * rights + j * count) * RIGHT;
                const int64_t columns = c.columns - j * RIGHT;
                for (int64_t i = band; i < band_end; ++i) {
                    const uint32_t* a = c.a + (start * lefts + i * count) * LEFT;
                    float* z = c.z + i * LEFT * c.z_stride + j * RIGHT;
                    const int64_t rows = c.rows - i * LEFT;
                    if (rows >= LEFT && columns >= RIGHT) {
                        tile(a, b, count, z, c.z_stride, start == 0);
                    } else {
                        edge(a, b, count, z, c.z_stride, rows < LEFT ? rows : LEFT, columns < RIGHT ? columns : RIGHT,
                             start == 0);
                    }
                }
            }
        }
    }
}

}  // namespace

#define PASTE(a, b) a##b
#define NAME(level) PASTE(product_, level)

extern const ProductLevel NAME(LEVEL) = {LEFT, RIGHT, pack<LEFT>, pack<RIGHT>, rows_of};

}  // namespace autoregembed
