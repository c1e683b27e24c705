// The step between the two GEMMs of the head on a block of logits, R rows by C columns: one pass for the largest logit of
// a row, one for the exponentials. The mathematics is that of kernels/torch/linear_logprob.py:
//
//     x_v = scale · (z_v + b_v),  t_v = tanh(x_v / softcap) or x_v,  gain = softcap or 1           (first pass: largest)
//     e_v = exp(gain · t_v − running_max),  running_sumexp += Σ_{v≠y} e_v                          (second pass)
//     E_v = e_v · cap'(x_v), 0 at the target
//
// `running_max` is raised where the largest logit exceeds it by more than RESCALE_THRESHOLD. Then `running_sumexp` is
// multiplied by `rescale`, and the caller does the same with its sums over earlier columns.
//
// The file is compiled once per machine code level, with LEVEL and LANES defined and that level's flags. It is written
// in GCC's and Clang's vector extension, so every level is the same source. No header with inline functions may be
// included here: the linker would keep one copy of each, perhaps one that only the newest processors can run.
//
// Accuracy, asserted by tests/test_native.py against float64: exp within 1.1 ulp on [−80, 0] (0 below), tanh within
// 1.5 ulp; the one logarithm of a row is libm's, in double.

#include "epilogue.h"

namespace autoregembed {
namespace {

using Float = float __attribute__((vector_size(4 * LANES)));
using Int = int32_t __attribute__((vector_size(4 * LANES)));
using Unsigned = uint32_t __attribute__((vector_size(4 * LANES)));
using Half = uint16_t __attribute__((vector_size(2 * LANES)));
using Double = double __attribute__((vector_size(8 * LANES)));

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t TILE = 64 * LANES;  // floats between two additions to the double-precision sum
constexpr int UNROLL = 4;
// Below exp(MIN_EXPONENT) = 2e-35 a probability counts as 0: far under eps · 1/V, far above the denormals.
constexpr float MIN_EXPONENT = -80.0f;
constexpr double RESCALE_THRESHOLD = 8.0;  // kernels/torch/linear_logprob.py

INLINE Float splat(float x) { return x - Float{}; }

INLINE Int lanes() {
    Int lane;
    for (int32_t i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

INLINE Float load(const float* p) {
    Float x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

INLINE Float load(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    Float x = {};
    for (int64_t i = 0; i < count; ++i) x[i] = p[i];
    return x;
}

INLINE void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

INLINE void store(float* p, Float x, int64_t count) {
    if (count >= LANES) return store(p, x);
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

INLINE Half to_bf16(Float x) {  // to nearest even; NaN stays NaN
    Unsigned bits = (Unsigned)x;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x != x ? (Unsigned)(Int{} + 0x7fc0) : bits, Half);
}

INLINE void store(uint16_t* p, Float x, int64_t count = LANES) {
    const Half h = to_bf16(x);
    if (count >= LANES) {
        __builtin_memcpy(p, &h, sizeof h);
    } else {
        for (int64_t i = 0; i < count; ++i) p[i] = h[i];
    }
}

INLINE Float max(Float a, Float b) { return a > b ? a : b; }  // b where either is NaN

INLINE Float power_of_two(Float shifted) {  // shifted = n + 1.5 · 2^23, n integer in (−127, 127)
    return (Float)(((Unsigned)shifted + 127u) << 23);
}

// exp for x in [MIN_EXPONENT, 88]; unspecified elsewhere, but NaN for NaN. Reduction by n ln 2 in two parts, the first of
// few bits so that the product is exact; exp(r) = 1 + r + r² q(r), q minimax on |r| ≤ ln 2 / 2 (Lawson's iteration). The
// relative error of exp is 4e-9 with these rounded coefficients.
INLINE Float exp_reduced(Float x) {
    const Float shifter = splat(12582912.0f);
    const Float shifted = x * 1.44269504088896341f + shifter;
    const Float n = shifted - shifter;
    const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Float p = r * 1.381453942e-3f + 8.368745446e-3f;
    p = p * r + 4.166838899e-2f;
    p = p * r + 1.666652113e-1f;
    p = p * r + 4.999999404e-1f;
    p = p * (r * r) + r;
    const Float two_n = power_of_two(shifted);
    return p * two_n + two_n;
}

INLINE Float exp_or_zero(Float x) {
    const Float e = exp_reduced(x);
    return x < MIN_EXPONENT ? Float{} : e;
}

// tanh: odd polynomial below 0.625 (Cephes' tanhf), 1 − 2 / (exp(2|x|) + 1) above.
INLINE Float tanh(Float x) {
    const Unsigned sign = (Unsigned)x & 0x80000000u;
    const Float a = (Float)((Unsigned)x & 0x7fffffffu);
    const Float u = a * a;
    Float p = u * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * u - 5.37397155531e-2f;
    p = p * u + 1.33314422036e-1f;
    p = p * u - 3.33332819422e-1f;
    const Float small = a + a * u * p;
    const Float big = 1.0f - 2.0f / (exp_reduced(a > 10.0f ? splat(20.0f) : a + a) + 1.0f);
    return (Float)((Unsigned)(a < 0.625f ? small : big) | sign);
}

// What the first pass leaves in the row where it changes it: with BIAS or SOFTCAP, x or t; otherwise the logits stay.
template <bool BIAS, bool SOFTCAP>
INLINE Float transform(Float z, Float b, float inner) {
    if constexpr (BIAS) z = z + b;
    if constexpr (BIAS || SOFTCAP) z = z * inner;
    if constexpr (SOFTCAP) z = tanh(z);
    return z;
}

// First pass: max over the row of gain · t.
template <bool BIAS, bool SOFTCAP>
INLINE float first_pass(float* row, const float* bias, int64_t v, float inner, float gain) {
    constexpr bool write = BIAS || SOFTCAP;
    Float running_max[UNROLL];
    for (Float& t : running_max) t = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + UNROLL * LANES <= v; i += UNROLL * LANES) {
        for (int k = 0; k < UNROLL; ++k) {
            const int64_t at = i + k * LANES;
            const Float t = transform<BIAS, SOFTCAP>(load(row + at), BIAS ? load(bias + at) : Float{}, inner);
            if constexpr (write) store(row + at, t);
            running_max[k] = max(t * gain, running_max[k]);
        }
    }
    for (; i < v; i += LANES) {
        const int64_t count = v - i;
        const Float t = transform<BIAS, SOFTCAP>(load(row + i, count), BIAS ? load(bias + i, count) : Float{}, inner);
        if constexpr (write) store(row + i, t, count);
        Float x = t * gain;
        for (int64_t lane = count; lane < LANES; ++lane) x[lane] = -__builtin_inff();
        running_max[0] = max(x, running_max[0]);
    }
    for (int k = 1; k < UNROLL; ++k) running_max[0] = max(running_max[k], running_max[0]);
    float result = running_max[0][0];
    for (int lane = 1; lane < LANES; ++lane) result = running_max[0][lane] > result ? running_max[0][lane] : result;
    return result;
}

// Second pass over the tile [i, end): E into out, Σ e into sum. CHECKED tiles hold the target or the row's end.
template <bool SOFTCAP, bool CHECKED, typename Out>
INLINE void tile(const float* row, Out* out, int64_t i, int64_t end, int64_t y, float gain, float running_max,
                 Double& sum) {
    Float partial[UNROLL] = {};
    constexpr bool write = sizeof(Out) > 1;
    auto step = [&](int64_t at, Float& part) __attribute__((always_inline)) {
        const Float t = CHECKED ? load(row + at, end - at) : load(row + at);
        Float e = exp_or_zero(t * gain - running_max);
        if constexpr (CHECKED) {
            const int32_t hit = at <= y && y < at + LANES ? (int32_t)(y - at) : -1;
            const int32_t count = end - at < LANES ? (int32_t)(end - at) : LANES;
            const Int lane = lanes();
            e = ((lane == hit) | (lane >= count)) ? Float{} : e;
        }
        part += e;
        if constexpr (SOFTCAP && write) e = e * (1.0f - t * t);
        if constexpr (write && CHECKED) store(out + at, e, end - at);
        if constexpr (write && !CHECKED) store(out + at, e);
    };
    if constexpr (CHECKED) {
        for (; i < end; i += LANES) step(i, partial[0]);
    } else {
        for (; i < end; i += UNROLL * LANES) {
            for (int k = 0; k < UNROLL; ++k) step(i + k * LANES, partial[k]);
        }
    }
    sum += __builtin_convertvector((partial[0] + partial[1]) + (partial[2] + partial[3]), Double);
}

struct Nothing {};  // sizeof 1: nothing is stored

template <bool BIAS, bool SOFTCAP, typename Out>
void rows(const Epilogue& c, int64_t first, int64_t last) {
    const int64_t v = c.columns;
    // Powers of the softcap go where they cost one product; x itself is stored where there is a bias.
    const float inner = SOFTCAP ? c.scale / c.softcap : c.scale;
    const float gain = SOFTCAP ? c.softcap : (BIAS ? 1.0f : c.scale);
    for (int64_t r = first; r < last; ++r) {
        float* row = c.logits + r * c.row_stride;
        Out* out = reinterpret_cast<Out*>(row);
        const int64_t y = c.target[r];
        const double largest = first_pass<BIAS, SOFTCAP>(row, c.bias, v, inner, gain);
        double rescale = 1.0;
        if (largest > c.running_max[r] + RESCALE_THRESHOLD) {
            rescale = __builtin_exp(c.running_max[r] - largest);
            c.running_max[r] = largest;
        }
        // A row whose logits were all −inf so far has no bound to subtract.
        const float running_max = c.running_max[r] == -__builtin_inf() ? 0.0f : (float)c.running_max[r];
        if (0 <= y && y < v) c.target_logit[r] = (double)row[y] * (double)gain;  // before E takes its place
        Double sum = {};
        for (int64_t i = 0; i < v; i += TILE) {
            const int64_t end = i + TILE < v ? i + TILE : v;
            if (end - i == TILE && !(i <= y && y < end)) {
                tile<SOFTCAP, false>(row, out, i, end, y, gain, running_max, sum);
            } else {
                tile<SOFTCAP, true>(row, out, i, end, y, gain, running_max, sum);
            }
        }
        double running_sumexp = c.running_sumexp[r] * rescale;
        for (int lane = 0; lane < LANES; ++lane) running_sumexp += sum[lane];
        c.running_sumexp[r] = running_sumexp;
        c.rescale[r] = rescale;
    }
}

template <bool BIAS, bool SOFTCAP>
void by_store(const Epilogue& c, int64_t first, int64_t last) {
    switch (c.store) {
        case Store::nothing: return rows<BIAS, SOFTCAP, Nothing>(c, first, last);
        case Store::fp32: return rows<BIAS, SOFTCAP, float>(c, first, last);
        case Store::bf16: return rows<BIAS, SOFTCAP, uint16_t>(c, first, last);
    }
}

void rows_of(const Epilogue& c, int64_t first, int64_t last) {
    const bool softcap = c.softcap != 0.0f;
    if (c.bias != nullptr) {
        softcap ? by_store<true, true>(c, first, last) : by_store<true, false>(c, first, last);
    } else {
        softcap ? by_store<false, true>(c, first, last) : by_store<false, false>(c, first, last);
    }
}

void exp_of(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, exp_or_zero(load(x + i, count - i)), count - i);
}

void tanh_of(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, tanh(load(x + i, count - i)), count - i);
}

}  // namespace

#define PASTE(a, b) a##b
#define NAME(level) PASTE(level_, level)

extern const Level NAME(LEVEL) = {rows_of, exp_of, tanh_of};

}  // namespace autoregembed
