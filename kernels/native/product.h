// The head's first GEMM with bf16 operands and fp32 logits, Z = A Bᵀ, at every machine code level.
#pragma once

#include <cstdint>

namespace autoregembed {

// The unit of both structs is the pair (2p, 2p + 1) of bf16 along D, in 32 bits.
struct Packing {
    const uint16_t* from;  // (R, D) bf16, D even
    int64_t row_stride;    // in bf16
    int64_t rows, pairs;   // R, D / 2
    uint32_t* to;          // (R rounded up to a multiple of ROWS_MULTIPLE, D / 2)
};

struct Product {
    const uint32_t *a, *b;  // packed as left and as right operand
    float* z;               // (R, C) out
    int64_t z_stride;       // in floats
    int64_t rows, columns, pairs;
};

// Rows of a packed operand are a multiple of its tile's, which differs between levels and divides this.
constexpr int64_t ROWS_MULTIPLE = 96;

// product.cpp compiled with one level's flags. `pack_*` and `rows` take a range of tiles of `left` or `right` rows.
struct ProductLevel {
    int64_t left, right;
    void (*pack_left)(const Packing&, int64_t first, int64_t last);
    void (*pack_right)(const Packing&, int64_t first, int64_t last);
    void (*rows)(const Product&, int64_t first, int64_t last);
};

extern const ProductLevel product_portable;
extern const ProductLevel product_avx2;
extern const ProductLevel product_avx512;
extern const ProductLevel product_avx512_bf16;

}  // namespace autoregembed
