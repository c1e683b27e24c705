// The middle step of linear_logprob on one block of logits, and the machine code levels that it is compiled for.
#pragma once

#include <cstdint>

namespace autoregembed {

enum class Store { nothing, fp32, bf16 };

// One call over rows [0, R) of a block of logits (R, C); everything per row is indexed by the row.
struct Epilogue {
    float* logits;           // (R, C) in, E out, in place; bf16 E fills the first half of each row's bytes
    int64_t row_stride;      // in floats
    int64_t columns;         // C
    const int64_t* target;   // (R,) the target's column; outside [0, C) in blocks without it
    const float* bias;       // (C,) or null
    float softcap;           // 0: none
    float scale;
    Store store;             // nothing: no E is needed, logits may still be overwritten
    double* running_max;     // (R,) in and out: no logit so far is larger than running_max + RESCALE_THRESHOLD
    double* running_sumexp;  // (R,) in and out: Σ exp(logit − running_max) over all columns so far but the target
    double* target_logit;    // (R,) out where the target is here
    double* rescale;         // (R,) out: the factor for sums over earlier columns
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
extern const Level level_avx512_bf16;  // differs in product.cpp alone

}  // namespace autoregembed
