// Z = A Bᵀ with A (R, D) and B (C, D) in bf16 and Z (R, C) in fp32: the head's first GEMM. oneDNN, as torch calls it,
// would round Z to bf16, and a log-probability needs all of its bits.
//
// The file is written for the eight tile registers of AMX, each 16 rows of 64 bytes: 32 x 32 logits in four of them, 32
// columns of two tiles of A and of B in the others. It is compiled twice: for the matrix unit, and with an emulation of
// its four instructions, in whose order of sums the two agree bit for bit but for denormals, which the unit takes as 0.
// So what is tested anywhere is tested on every processor; the emulation is for that alone.
//
// A part of a tile of A, in the L1 cache, meets all of B, in the L2 cache, so that Z is written along its rows: the
// rows of a tile of Z are pages apart.

#include "product.h"

#include <cstring>

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace autoregembed {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t HALF = TILE / 2;
constexpr int64_t REGISTER = HALF * TILE;  // bf16 in a tile register
constexpr int64_t DEPTH = 12;              // steps of a part of D: of a tile of A 24 KiB, which the L1 cache holds

#ifdef __AMX_BF16__

struct Unit {
    Unit() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
        _tile_loadconfig(&shapes);
    }
    ~Unit() { _tile_release(); }
};

#define ZERO(t) _tile_zero(t)
#define LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define STORE(t, to, stride) _tile_stored(t, to, stride)
#define MULTIPLY(sums, a, b) _tile_dpbf16ps(sums, a, b)
// GCC's tile loads do not say that they read memory.
#define WRITTEN() __asm__ volatile("" ::: "memory")

#else

struct Unit {
    alignas(64) unsigned char memory[8][16][64];

    void load(int t, const void* from, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(memory[t][i], static_cast<const char*>(from) + i * stride, 64);
    }

    void store(int t, void* to, int64_t stride) const {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, memory[t][i], 64);
    }

    // Pairs along D in 32 bits: the first of all pairs are summed, the second likewise, then both are added.
    void multiply(int sums, int a, int b) {
        for (int i = 0; i < 16; ++i) {
            float even[16] = {}, odd[16] = {}, total[16];
            for (int k = 0; k < 16; ++k) {
                for (int j = 0; j < 16; ++j) {
                    even[j] += half(a, i, k, 0) * half(b, k, j, 0);
                    odd[j] += half(a, i, k, 1) * half(b, k, j, 1);
                }
            }
            std::memcpy(total, memory[sums][i], 64);
            for (int j = 0; j < 16; ++j) total[j] += even[j] + odd[j];
            std::memcpy(memory[sums][i], total, 64);
        }
    }

    float half(int t, int row, int pair, int which) const {
        uint16_t bits;
        std::memcpy(&bits, memory[t][row] + 4 * pair + 2 * which, 2);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

#define ZERO(t) std::memset(unit.memory[t], 0, sizeof unit.memory[t])
#define LOAD(t, from, stride) unit.load(t, from, stride)
#define STORE(t, to, stride) unit.store(t, to, stride)
#define MULTIPLY(sums, a, b) unit.multiply(sums, a, b)
#define WRITTEN()

#endif

// Packed: a step of a tile is two registers. Left: 16 rows of 16 pairs each; right: 16 pairs of 16 rows each.
template <bool RIGHT>
void pack(const Packing& c, int64_t first, int64_t last) {
    const int64_t steps = (c.columns + TILE - 1) / TILE;
    for (int64_t t = first; t < last; ++t) {
        for (int64_t s = 0; s < steps; ++s) {
            uint16_t* to = c.to + (t * steps + s) * TILE * TILE;
            const int64_t count = c.columns - s * TILE < TILE ? c.columns - s * TILE : TILE;
            for (int64_t w = 0; w < TILE; ++w) {
                uint16_t row[TILE] = {};
                const int64_t r = t * TILE + w;
                if (r < c.rows) {
                    const uint16_t* from = c.from + r * c.row_stride + s * TILE;
                    if (count == TILE) {
                        std::memcpy(row, from, sizeof row);
                    } else {
                        std::memcpy(row, from, 2 * count);
                    }
                }
                uint16_t* tile = to + w / HALF * REGISTER;
                if (RIGHT) {
                    for (int64_t p = 0; p < HALF; ++p) std::memcpy(tile + p * TILE + w % HALF * 2, row + 2 * p, 4);
                } else {
                    std::memcpy(tile + w % HALF * TILE, row, sizeof row);
                }
            }
        }
    }
}

// Z (TILE, TILE) of a tile of A and one of B: sums over `steps`, added to what is there unless they are the first.
INLINE void tile([[maybe_unused]] Unit& unit, const uint16_t* a, const uint16_t* b, int64_t steps, float* z,
                 int64_t z_stride, bool first) {
    const int64_t stride = 4 * z_stride;
    float* below = z + HALF * z_stride;
    if (first) {
        ZERO(0);
        ZERO(1);
        ZERO(2);
        ZERO(3);
    } else {
        LOAD(0, z, stride);
        LOAD(1, z + HALF, stride);
        LOAD(2, below, stride);
        LOAD(3, below + HALF, stride);
    }
    for (int64_t s = 0; s < steps; ++s, a += 2 * REGISTER, b += 2 * REGISTER) {
        LOAD(4, a, 64);
        LOAD(6, b, 64);
        LOAD(7, b + REGISTER, 64);
        LOAD(5, a + REGISTER, 64);
        MULTIPLY(0, 4, 6);
        MULTIPLY(1, 4, 7);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
    }
    STORE(0, z, stride);
    STORE(1, z + HALF, stride);
    STORE(2, below, stride);
    STORE(3, below + HALF, stride);
}

// A tile at the edge of Z goes through a whole one.
void edge(Unit& unit, const uint16_t* a, const uint16_t* b, int64_t steps, float* z, int64_t z_stride, int64_t rows,
          int64_t columns, bool first) {
    alignas(64) float whole[TILE * TILE] = {};
    for (int64_t i = 0; i < rows && !first; ++i) std::memcpy(whole + i * TILE, z + i * z_stride, 4 * columns);
    WRITTEN();
    tile(unit, a, b, steps, whole, TILE, first);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(z + i * z_stride, whole + i * TILE, 4 * columns);
}

// Z of tiles [first, last) of A and all of B.
void rows_of(const Product& c, int64_t first, int64_t last) {
    Unit unit;
    const int64_t parts = (c.steps + DEPTH - 1) / DEPTH, size = (c.steps + parts - 1) / parts;
    for (int64_t i = first; i < last; ++i) {
        const int64_t rows = c.rows - i * TILE < TILE ? c.rows - i * TILE : TILE;
        for (int64_t start = 0; start < c.steps; start += size) {
            const uint16_t* a = c.a + (i * c.steps + start) * TILE * TILE;
            const int64_t steps = c.steps - start < size ? c.steps - start : size;
            for (int64_t j = 0; j * TILE < c.columns; ++j) {
                const uint16_t* b = c.b + (j * c.steps + start) * TILE * TILE;
                float* z = c.z + i * TILE * c.z_stride + j * TILE;
                const int64_t columns = c.columns - j * TILE < TILE ? c.columns - j * TILE : TILE;
                if (rows == TILE && columns == TILE) {
                    tile(unit, a, b, steps, z, c.z_stride, start == 0);
                } else {
                    edge(unit, a, b, steps, z, c.z_stride, rows, columns, start == 0);
                }
            }
        }
    }
}

}  // namespace

#define PASTE(a, b) a##b
#define NAME(level) PASTE(product_, level)

extern const ProductLevel NAME(LEVEL) = {pack<false>, pack<true>, rows_of};

}  // namespace autoregembed
