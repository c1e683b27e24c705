// autoregembed._native: arguments checked, GIL released, rows shared among threads. No torch headers: one build serves
// any torch, whose tensors arrive through DLPack.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "epilogue.h"
#include "parallel.h"
#include "product.h"

#ifdef HAS_AMX_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

namespace autoregembed {
namespace {

template <typename T, int dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::device::cpu>;

struct Compiled {
    std::string name;
    const Level* epilogue;
    const ProductLevel* product;
};

#ifdef HAS_AMX_BF16
// The processor has the unit, and Linux lets this process save its registers (from 5.16 on; asked for once).
bool amx_bf16() {
    static const bool usable = [] {
        unsigned a, b, c, d;
        const unsigned tile = 1u << 24, bf16 = 1u << 22;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & bf16) == 0) return false;
        const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return usable;
}
#endif

std::vector<Compiled> levels() {
    std::vector<Compiled> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
#ifdef HAS_AMX_BF16
        if (amx_bf16()) found.push_back({"amx_bf16", &level_avx512, &product_amx_bf16});
#endif
        found.push_back({"avx512", &level_avx512, &product_portable});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back({"avx2", &level_avx2, &product_portable});
    }
#endif
#if defined(__aarch64__)
    found.push_back({"neon", &level_portable, &product_portable});
#else
    found.push_back({"portable", &level_portable, &product_portable});
#endif
    return found;
}

Compiled level = levels().front();

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Compiled& candidate : levels()) names.push_back(candidate.name);
    return names;
}

void set_level(const std::string& wanted) {
    std::string names;
    for (const Compiled& candidate : levels()) {
        if (candidate.name == wanted) {
            level = candidate;
            return;
        }
        names += (names.empty() ? "" : ", ") + candidate.name;
    }
    throw nb::value_error(("level: got '" + wanted + "', expected one of " + names).c_str());
}

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

template <typename T>
T* dense(const char* name, const Array<T, 1>& x, size_t size) {
    if (x.shape(0) != size) {
        refuse(std::string(name) + ": got " + std::to_string(x.shape(0)) + " numbers, expected " + std::to_string(size));
    }
    if (size > 1 && x.stride(0) != 1) refuse(std::string(name) + ": got a strided array, expected a dense one");
    return x.data();
}

void epilogue(Array<float, 2> logits, Array<const int64_t, 1> target, std::optional<Array<const float, 1>> bias,
              std::optional<float> softcap, float scale, const std::string& store, Array<double, 1> running_max,
              Array<double, 1> running_sumexp, Array<double, 1> target_logit, Array<double, 1> rescale, int threads) {
    const size_t r = logits.shape(0), v = logits.shape(1);
    if (v == 0) refuse("logits: got no column, expected at least one");
    if (v > 1 && logits.stride(1) != 1) refuse("logits: got strided rows, expected dense ones");
    if (r > 1 && logits.stride(0) < static_cast<int64_t>(v)) refuse("logits: got rows that overlap");
    if (softcap && !(*softcap > 0)) refuse("softcap: got " + std::to_string(*softcap) + ", expected a positive number");
    Epilogue call{};
    call.logits = logits.data();
    call.row_stride = logits.stride(0);
    call.columns = static_cast<int64_t>(v);
    call.target = dense("target", target, r);
    call.bias = bias ? dense("bias", *bias, v) : nullptr;
    call.softcap = softcap.value_or(0.0f);
    call.scale = scale;
    if (store == "fp32") {
        call.store = Store::fp32;
    } else if (store == "bf16") {
        call.store = Store::bf16;
    } else if (store == "nothing") {
        call.store = Store::nothing;
    } else {
        refuse("store: got '" + store + "', expected fp32, bf16, nothing");
    }
    call.running_max = dense("running_max", running_max, r);
    call.running_sumexp = dense("running_sumexp", running_sumexp, r);
    call.target_logit = dense("target_logit", target_logit, r);
    call.rescale = dense("rescale", rescale, r);
    const Level* chosen = level.epilogue;
    nb::gil_scoped_release release;
    parallel_for(static_cast<int64_t>(r), threads,
                 [&](int64_t first, int64_t last) { chosen->rows(call, first, last); });
}

int64_t tiles(size_t size) { return (static_cast<int64_t>(size) + TILE - 1) / TILE; }

std::tuple<int64_t, int64_t> packed_shape(size_t rows, size_t columns) {
    return {tiles(rows) * TILE, tiles(columns) * TILE};
}

std::string shape(int64_t rows, int64_t columns) {
    return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

template <typename T>
void require_packed(const char* name, const Array<T, 2>& x, size_t rows, size_t columns) {
    const auto [r, d] = packed_shape(rows, columns);
    if (static_cast<int64_t>(x.shape(0)) != r || static_cast<int64_t>(x.shape(1)) != d) {
        refuse(std::string(name) + ": got " + shape(x.shape(0), x.shape(1)) + ", expected " + shape(r, d));
    }
    if (x.stride(1) != 1 || x.stride(0) != d) refuse(std::string(name) + ": got a strided array, expected a dense one");
}

// bf16 comes as int16: nanobind's arrays have no bf16.
void pack(Array<const int16_t, 2> x, Array<int16_t, 2> packed, const std::string& operand, int threads) {
    const size_t r = x.shape(0), d = x.shape(1);
    if (d == 0) refuse("x: got no column, expected at least one");
    if (d > 1 && x.stride(1) != 1) refuse("x: got strided rows, expected dense ones");
    if (operand != "left" && operand != "right") refuse("operand: got '" + operand + "', expected left, right");
    require_packed("packed", packed, r, d);
    const Packing call{reinterpret_cast<const uint16_t*>(x.data()), x.stride(0), static_cast<int64_t>(r),
                       static_cast<int64_t>(d), reinterpret_cast<uint16_t*>(packed.data())};
    const auto chosen = operand == "left" ? level.product->pack_left : level.product->pack_right;
    nb::gil_scoped_release release;
    parallel_for(tiles(r), threads, [&](int64_t first, int64_t last) { chosen(call, first, last); });
}

void product(Array<const int16_t, 2> a, Array<const int16_t, 2> b, Array<float, 2> z, int threads) {
    const size_t r = z.shape(0), v = z.shape(1), d = a.shape(1);
    if (v > 1 && z.stride(1) != 1) refuse("z: got strided rows, expected dense ones");
    if (r > 1 && z.stride(0) < static_cast<int64_t>(v)) refuse("z: got rows that overlap");
    require_packed("a", a, r, d);
    require_packed("b", b, v, d);
    const Product call{reinterpret_cast<const uint16_t*>(a.data()),
                       reinterpret_cast<const uint16_t*>(b.data()),
                       z.data(),
                       z.stride(0),
                       static_cast<int64_t>(r),
                       static_cast<int64_t>(v),
                       tiles(d)};
    const auto chosen = level.product->rows;
    nb::gil_scoped_release release;
    parallel_for(tiles(r), threads, [&](int64_t first, int64_t last) { chosen(call, first, last); });
}

void elementary(const std::string& name, Array<const float, 1> x, Array<float, 1> y) {
    const float* from = dense("x", x, x.shape(0));
    float* to = dense("y", y, x.shape(0));
    if (name != "exp" && name != "tanh") refuse("name: got '" + name + "', expected exp, tanh");
    (name == "exp" ? level.epilogue->exp : level.epilogue->tanh)(from, to, static_cast<int64_t>(x.shape(0)));
}

nb::dict build_info() {
    nb::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["level"] = level.name;
    info["threads"] = parallel_backend();
    return info;
}

}  // namespace
}  // namespace autoregembed

NB_MODULE(_native, m) {
    using namespace autoregembed;
    m.attr("__version__") = AUTOREGEMBED_VERSION;
    m.def("build_info", &build_info, "Compiler, machine code level in use, and whose threads the kernels run on.");
    m.def("levels", &level_names, "Machine code levels that this processor can run, best first.");
    m.def("set_level", &set_level, nb::arg("level"), "Makes every later call use one of `levels()`.");
    m.def("set_gomp_parallel", [](uintptr_t p) { set_gomp_parallel(reinterpret_cast<void*>(p)); }, nb::arg("address"),
          "Address of GOMP_parallel in the OpenMP runtime to work on; 0: threads of our own.");
    // noconvert: a silent copy of a strided array would leave the caller's own memory as it was.
    m.def("epilogue", &epilogue, nb::arg("logits").noconvert(), nb::arg("target").noconvert(),
          nb::arg("bias").none().noconvert(), nb::arg("softcap").none(), nb::arg("scale"), nb::arg("store"),
          nb::arg("running_max").noconvert(), nb::arg("running_sumexp").noconvert(), nb::arg("target_logit").noconvert(),
          nb::arg("rescale").noconvert(), nb::arg("threads"),
          "logits (R, C) fp32 to E in place; running_max, running_sumexp, target_logit, rescale (R,) float64 as in epilogue.h.");
    m.def("packed_shape", &packed_shape, nb::arg("rows"), nb::arg("columns"), "Shape of a packed operand.");
    m.def("pack", &pack, nb::arg("x").noconvert(), nb::arg("packed").noconvert(), nb::arg("operand"), nb::arg("threads"),
          "x (R, D) bf16 as the left or the right operand of `product`, into packed packed_shape(R, D); both as int16.");
    m.def("product", &product, nb::arg("a").noconvert(), nb::arg("b").noconvert(), nb::arg("z").noconvert(),
          nb::arg("threads"), "z (R, C) fp32 = A Bᵀ of packed A (R, D) and B (C, D).");
    m.def("elementary", &elementary, nb::arg("name"), nb::arg("x").noconvert(), nb::arg("y").noconvert(),
          "The vector function exp (of x ≤ 8) or tanh by itself, y (n,) = f(x (n,)).");
}
