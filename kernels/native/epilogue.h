// The middle step of linear_logprob on one chunk of logits, and the machine code levels that it is compiled for.
#pragma once

#include <cstdint>

namespace autoregembed {

enum class Store { nothing, fp32, bf16 };

// One call over rows [0, R) of logits (R, V); everything per row is indexed by the row.
struct Epilogue {
    float* logits;          // (R, V) in, E out, in place; bf16 E fills the first half of each row's bytes
    int64_t row_stride;     // in floats
    int64_t vocabulary;     // V
    const int64_t* target;  // (R,) in [0, V)
    const float* bias;      // (V,) or null
    float softcap;          // 0: none
    float scale;
    Store store;            // nothing: log-probabilities alone, logits may still be overwritten
    float* logprob;         // (R,) out
    float* factor;          // (R,) out: d logprob / d logits = factor · E
};

// One machine code level: epilogue.cpp compiled with that level's flags.
struct Level {
    void (*rows)(const Epilogue&, int64_t first, int64_t last);
    void (*exp)(const float* x, float* y, int64_t count);  // the vector functions by themselves, for their tests
    void (*tanh)(const float* x, float* y, int64_t count);
};

extern const Level level_portable;  // SSE2 on x86-64, NEON on AArch64
extern const Level level_avx2;
extern const Level level_avx512;

}  // namespace autoregembed
