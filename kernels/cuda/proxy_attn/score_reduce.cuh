// From the largest logits of single queries to block scores: the second kernel of proxy_score.cu,
// and what both kernels share.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/cuda/device/numeric.cuh"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {

inline constexpr int kQueryRows = 192;
inline constexpr int kGroupRows = 64;   // queries of a warpgroup
inline constexpr int kMaxRanges = 128;  // 2M tokens at stride 4

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the kernels over sampled tokens read: {d, sample, head}.
inline TensorShape SampledQueries(const ProxyScoreParams& params) {
  return {params.q,
          {params.head_dim, params.num_q, params.num_proxies, 1},
          {params.q_row_stride, params.q_head_stride, params.q_head_stride}};
}
inline TensorShape SampledKeys(const ProxyScoreParams& params) {
  const int64_t d = params.head_dim, num_k = params.first_sample + params.num_q;
  return {params.k, {d, num_k, params.num_key_heads, 1}, {d, num_k * d, num_k * d}};
}

// Queries are walked from `origin`, the multiple of 64 at or before the first one: then one key
// tile holds the diagonal of a warpgroup.
struct ScoreShape {
  int32_t num_q, origin, skipped;  // skipped: rows between origin and the first query
  int32_t q_tiles, key_tiles, ranges;

  ScoreShape(int64_t num_queries, int64_t first_sample) {
    num_q = static_cast<int32_t>(num_queries);
    skipped = static_cast<int32_t>(first_sample % kGroupRows);
    origin = static_cast<int32_t>(first_sample) - skipped;
    q_tiles = static_cast<int32_t>(CeilDiv(skipped + num_queries, kQueryRows));
    key_tiles = static_cast<int32_t>(CeilDiv(first_sample + num_queries, kKeyTile));
    ranges = static_cast<int32_t>(CeilDiv(key_tiles, kRangeTiles));
  }
  __host__ __device__ int32_t KeyTilesOf(int32_t q_tile) const {
    const int32_t past = (q_tile + 1) * kQueryRows, all = skipped + num_q;
    return (origin + (past < all ? past : all) - 1) / kKeyTile + 1;
  }
};

// Calls launch(head_dim, stride), two std::integral_constant, for what the parameters say;
// cudaErrorInvalidValue where no kernel is compiled for it.
template <typename Launch>
cudaError_t DispatchSampled(const ProxyScoreParams& params, const Launch& launch) {
  const auto with_stride = [&](auto head_dim) {
    switch (params.stride) {
      case 4:
        return launch(head_dim, std::integral_constant<int, 4>());
      case 8:
        return launch(head_dim, std::integral_constant<int, 8>());
      case 16:
        return launch(head_dim, std::integral_constant<int, 16>());
      default:
        return cudaErrorInvalidValue;
    }
  };
  if (params.head_dim == 128) return with_stride(std::integral_constant<int, 128>());
  if (params.head_dim == 64) return with_stride(std::integral_constant<int, 64>());
  return cudaErrorInvalidValue;
}

struct ScoreKernelParams {
  ScoreShape shape;
  __half* maxima;  // [proxy][num_q][pitch]
  float2* sums;    // [proxy][ranges][num_q] {reference, log2 of the sum}
  uint32_t* tile_counter;
  int32_t pitch;  // blocks, padded to whole key tiles
  int32_t proxies_per_key_head;
  int32_t num_proxies;
  uint32_t num_units;
  float scale_log2;
  uint32_t range_begin[kMaxRanges + 1];  // first unit of each range of keys
};

inline constexpr int kReduceThreads = 128;

// Joins the sums that a query has of its ranges of keys, `stride` apart: to shift[range * step] =
// reference - log-sum-exp. Returns the log-sum-exp.
__device__ __forceinline__ float RowLogSum(const float2* sums, int stride, int ranges, float* shift,
                                           int step) {
  float highest = -INFINITY, sum = 0.0f;
  for (int r = 0; r < ranges; ++r) highest = fmaxf(highest, sums[int64_t{r} * stride].y);
  for (int r = 0; r < ranges; ++r) sum += exp2f(sums[int64_t{r} * stride].y - highest);
  const float log_sum = highest + log2f(sum);
  for (int r = 0; r < ranges; ++r) shift[r * step] = sums[int64_t{r} * stride].x - log_sum;
  return log_sum;
}

// One CTA per query block and proxy.
template <int kStride>
__global__ void __launch_bounds__(kReduceThreads)
    ReduceScoresKernel(const __grid_constant__ ScoreKernelParams params, int first_row,
                       float* scores, int64_t score_stride, float* log_sums) {
  constexpr int kSamples = static_cast<int>(kBlockTokens) / kStride;  // of a block
  extern __shared__ float shift[];  // [ranges][kSamples]: reference - log-sum-exp
  const ScoreShape& shape = params.shape;
  const int q_block = gridDim.x - 1 - blockIdx.x, proxy = blockIdx.y, t = threadIdx.x;
  const int m = first_row + q_block, first_query = q_block * kSamples;
  const int queries = min(kSamples, shape.num_q - first_query);
  const __half* source =
      params.maxima + (int64_t{proxy} * shape.num_q + first_query) * params.pitch;
  // Four blocks of every query. The first ones are under way while the log-sum-exps are made.
  uint2 values[kSamples];
  const auto load = [&](int n) {
    constexpr uint32_t kLowestPair = 0xFC00FC00u;  // -infinity twice
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      values[i] = i < queries ? *reinterpret_cast<const uint2*>(source + i * params.pitch + n)
                              : make_uint2(kLowestPair, kLowestPair);
    }
  };
  int n = 4 * t;
  if (n <= m) load(n);
  if (t < kSamples) {
    const float2* sums =
        params.sums + int64_t{proxy} * shape.ranges * shape.num_q + first_query + t;
    const int ranges = t < queries ? ((m + 1) * kSamples - 1) / kKeyTile / kRangeTiles + 1 : 0;
    const float log_sum =
        RowLogSum(sums, shape.num_q, min(ranges, shape.ranges), shift + t, kSamples);
    if (log_sums != nullptr && t < queries) {
      log_sums[int64_t{proxy} * shape.num_q + first_query + t] = log_sum;
    }
  }
  __syncthreads();
  float* out = scores + (int64_t{proxy} * gridDim.x + q_block) * score_stride;
  while (n <= m) {
    const float* range_shift = shift + n / kStride / kRangeTiles * kSamples;
    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&values[i].x));
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&values[i].y));
      best[0] = fmaxf(best[0], low.x + range_shift[i]);
      best[1] = fmaxf(best[1], low.y + range_shift[i]);
      best[2] = fmaxf(best[2], high.x + range_shift[i]);
      best[3] = fmaxf(best[3], high.y + range_shift[i]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (n + e <= m) out[n + e] = best[e];
    }
    n += 4 * kReduceThreads;
    if (n <= m) load(n);
  }
}

}  // namespace headstart::cuda
