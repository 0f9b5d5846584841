// The order in which a query block ranks its key blocks.
#pragma once

#include "kernels/cuda/device/numeric.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {

// Whether key block n is kept by query block m whatever its score, and how many of m's `blocks`
// are.
__device__ __forceinline__ bool IsForced(int n, int m, const SelectionShape& shape) {
  return n < shape.sink_blocks || m - n <= shape.local_blocks;
}
__device__ __forceinline__ int NumForced(int blocks, const SelectionShape& shape) {
  return min(blocks, 1 + shape.sink_blocks + shape.local_blocks);
}

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
