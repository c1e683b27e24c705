// Ranges of rows over threads. Every row is one thread's work from start to end, so results do not depend on the number
// of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace autoregembed {

// Calls work(first, last) on at most `threads` disjoint ranges that cover [0, count); denormals are flushed inside and
// the floating-point state of every thread is as before afterwards.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& work);

// "torch's OpenMP", or "std::thread" where torch has none that speaks GCC's interface, and in a forked child.
const char* parallel_backend();

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null.
void set_gomp_parallel(void* function);

}  // namespace autoregembed
