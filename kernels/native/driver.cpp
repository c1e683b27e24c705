// The kernels without Python: calls on stdin, results on stdout, both in the order of the structs' fields and in the
// machine's own byte order. tests/test_native_aarch64.py runs it in an emulator.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "epilogue.h"
#include "parallel.h"

using namespace autoregembed;

namespace {

enum Function : int64_t { EPILOGUE, EXP, TANH, DENORMALS };

struct Header {
    int64_t function;
    int64_t rows, columns, row_stride;
    int64_t offset;  // of the first logit, in floats
    int64_t bias;    // 1: there is one
    int64_t store;   // as enum Store
    int64_t threads;
    double softcap, scale;
};

template <typename T>
std::vector<T> read(size_t count) {
    std::vector<T> x(count);
    if (std::fread(x.data(), sizeof(T), count, stdin) != count) std::exit(1);
    return x;
}

template <typename T>
void write(const std::vector<T>& x) {
    if (std::fwrite(x.data(), sizeof(T), x.size(), stdout) != x.size()) std::exit(1);
}

void epilogue(const Header& h) {
    std::vector<float> memory = read<float>(h.offset + (h.rows ? (h.rows - 1) * h.row_stride + h.columns : 0));
    const std::vector<int64_t> target = read<int64_t>(h.rows);
    const std::vector<float> bias = read<float>(h.bias ? h.columns : 0);
    std::vector<double> state[4];  // running_max, running_sumexp, target_logit, rescale
    for (std::vector<double>& x : state) x = read<double>(h.rows);
    const Epilogue call{memory.data() + h.offset,
                        h.row_stride,
                        h.columns,
                        target.data(),
                        h.bias ? bias.data() : nullptr,
                        static_cast<float>(h.softcap),
                        static_cast<float>(h.scale),
                        static_cast<Store>(h.store),
                        state[0].data(),
                        state[1].data(),
                        state[2].data(),
                        state[3].data()};
    parallel_for(h.rows, static_cast<int>(h.threads),
                 [&](int64_t first, int64_t last) { level_portable.rows(call, first, last); });
    write(memory);
    for (const std::vector<double>& x : state) write(x);
}

void elementary(const Header& h) {
    const std::vector<float> x = read<float>(h.columns);
    std::vector<float> y(x.size());
    (h.function == EXP ? level_portable.exp : level_portable.tanh)(x.data(), y.data(), h.columns);
    write(y);
}

float denormal() {
    volatile float small = 1e-40f;
    return small * 0.5f;
}

// A denormal before, in and after a parallel region: alive, flushed, alive.
void denormals(const Header& h) {
    std::vector<float> x(h.rows + 2);
    x.front() = denormal();
    parallel_for(h.rows, static_cast<int>(h.threads), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) x[i + 1] = denormal();
    });
    x.back() = denormal();
    write(x);
}

}  // namespace

int main() {
    Header h;
    while (std::fread(&h, sizeof h, 1, stdin) == 1) {
        if (h.function == EPILOGUE) {
            epilogue(h);
        } else if (h.function == DENORMALS) {
            denormals(h);
        } else {
            elementary(h);
        }
        std::fflush(stdout);
    }
}
