#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace autoregembed {
namespace {

// Softmax tails are full of denormals, each a hundred times the cost of a normal number.
class FlushDenormals {
  public:
    FlushDenormals() : before_(read()) { write(before_ | MASK); }
    ~FlushDenormals() { write(before_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
#if defined(__x86_64__) || defined(_M_X64)
    using State = unsigned;
    static constexpr State MASK = 0x8040;  // MXCSR: flush to zero, denormals are zero
    static State read() { return _mm_getcsr(); }
    static void write(State s) { _mm_setcsr(s); }
#elif defined(__aarch64__)
    using State = uint64_t;
    static constexpr State MASK = uint64_t{1} << 24;  // FPCR.FZ
    static State read() {
        State s;
        asm volatile("mrs %0, fpcr" : "=r"(s));
        return s;
    }
    static void write(State s) { asm volatile("msr fpcr, %0" ::"r"(s)); }
#else
    using State = int;
    static constexpr State MASK = 0;
    static State read() { return 0; }
    static void write(State) {}
#endif
    State before_;
};

struct Job {
    const std::function<void(int64_t, int64_t)>& work;
    int64_t count;
    int64_t parts;
    std::atomic<int64_t> next{0};

    void run_part(int64_t part) {
        FlushDenormals guard;
        work(count * part / parts, count * (part + 1) / parts);
    }
    void run_rest() {
        for (int64_t part = next++; part < parts; part = next++) run_part(part);
    }
};

// libgomp's threads spin for milliseconds after a GEMM. Threads of our own would compete with them for the cores;
// working on the very pool that torch uses does not. Its entry point is the one that GCC's `#pragma omp parallel` calls.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};

// GCC's pool does not survive fork(): the child has its record of the threads, not the threads.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

void set_gomp_parallel(void* function) {
#if defined(__SANITIZE_THREAD__)
    function = nullptr;  // the thread sanitizer cannot see the barriers of an OpenMP runtime
#endif
    gomp_parallel = reinterpret_cast<GompParallel>(function);
}

const char* parallel_backend() { return gomp_parallel.load() != nullptr && !forked ? "torch's OpenMP" : "std::thread"; }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& work) {
    if (count <= 0) return;
    Job job{work, count, std::min<int64_t>(count, std::max(threads, 1))};
    if (job.parts == 1) return job.run_part(0);
    const GompParallel openmp = forked ? nullptr : gomp_parallel.load();
    if (openmp != nullptr) {
        // The runtime may grant fewer threads than asked for, so parts are taken and not assigned.
        openmp([](void* data) { static_cast<Job*>(data)->run_rest(); }, &job, static_cast<unsigned>(job.parts), 0);
        return;
    }
    std::vector<std::thread> pool;
    pool.reserve(job.parts - 1);
    try {
        for (int64_t i = 1; i < job.parts; ++i) pool.emplace_back([&job] { job.run_rest(); });
    } catch (const std::system_error&) {
        // Out of threads: those that started, and this one, do the work.
    }
    job.run_rest();
    for (std::thread& thread : pool) thread.join();
}

}  // namespace autoregembed
