// The head's first GEMM with bf16 operands and fp32 logits, Z = A Bᵀ, on the matrix unit (AMX) or as its emulation.
#pragma once

#include <cstdint>

namespace autoregembed {

// A packed operand is (ceil(rows / TILE), ceil(columns / TILE), TILE · TILE) bf16, zeros past the end.
constexpr int64_t TILE = 32;

struct Packing {
    const uint16_t* from;  // (R, D) bf16
    int64_t row_stride;    // in bf16
    int64_t rows, columns;
    uint16_t* to;
};

struct Product {
    const uint16_t *a, *b;  // packed as left and as right operand
    float* z;               // (R, C) out
    int64_t z_stride;       // in floats
    int64_t rows, columns;
    int64_t steps;  // ceil(D / TILE)
};

// product.cpp compiled with one level's flags. All functions take a range of tiles of rows; packed operands are the same
// at every level.
struct ProductLevel {
    void (*pack_left)(const Packing&, int64_t first, int64_t last);
    void (*pack_right)(const Packing&, int64_t first, int64_t last);
    void (*rows)(const Product&, int64_t first, int64_t last);
};

extern const ProductLevel product_portable;
extern const ProductLevel product_amx_bf16;

}  // namespace autoregembed
