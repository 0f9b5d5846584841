// The order in which a query block ranks its key blocks.
#pragma once

#include "kernels/cuda/device/numeric.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {

// Larger means earlier: the diagonal block m, the sink, the local blocks nearest first, then by
// score. Equal keys: the lower index first.
__device__ __forceinline__ uint32_t RankKey(int n, int m, float score,
                                            const SelectionShape& shape) {
  if (n == m) return 0xFFFFFFFFu;
  if (n < shape.sink_blocks) return 0xFFFFFFFEu;
  if (m - n <= shape.local_blocks) return 0xFFFFFFFEu - (m - n);
  return OrderedBits(score);
}

}  // namespace headstart::cuda
