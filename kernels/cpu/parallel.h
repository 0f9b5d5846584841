// Threads of the CPU kernels: one OpenMP team, which oneDNN shares.
#pragma once

#include <omp.h>

#include <cstdint>

namespace headstart {

// Calls fn(index, thread) for every index in [0, count), each once, in rising order of start;
// thread is in [0, num_threads). Which thread gets which index is left to chance, so results must
// not depend on it. fn must not throw.
template <typename Fn>
void ParallelFor(int32_t num_threads, int64_t count, const Fn& fn) {
  if (num_threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) fn(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t i = 0; i < count; ++i) fn(i, omp_get_thread_num());
}

// Calls fn(begin, end) for ranges of at most `grain` that cover [0, count).
template <typename Fn>
void ParallelForRanges(int32_t num_threads, int64_t count, int64_t grain, const Fn& fn) {
  ParallelFor(num_threads, (count + grain - 1) / grain, [&](int64_t i, int32_t) {
    const int64_t begin = i * grain;
    fn(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace headstart
