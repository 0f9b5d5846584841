// Block scores of the proxies (ProxyAttn, arXiv 2509.24745, step 1), in two kernels.
//
// ProxyScoreKernel: a unit of work is 192 sampled queries of one proxy and a range of at most
// kRangeTiles tiles of 128 sampled keys. Per query it keeps an online sum of exponentials and
// writes, per key block, its largest logit relative to a reference of its own (fp16). Warp 0 loads;
// three warpgroups of 64 queries compute. ReduceScoresKernel: joins the ranges' sums to
// log-sum-exps, then takes the maximum over a query block's samples of (largest logit -
// log-sum-exp). exp is monotone, so this ranks as the max-pooled softmax does, without a second
// pass.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention/block_sparse_attn.cuh"
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/proxy_attn/score_reduce.cuh"

namespace headstart::cuda {
namespace {

constexpr int kScoreThreads = 512;
constexpr int kScoreWarps = 12;  // that compute
constexpr float kHeadroom =
    16.0f;  // logits are kept relative to (first maximum + headroom), log2 units
constexpr int kPolynomialShare = 2;
constexpr float kLowestHalf = -60000.0f;

struct ScoreUnit {
  int32_t proxy, q_tile, range;
  int32_t key_begin, key_count;  // tiles; count 0: no more work
};

// Range by range (the units of one are about equally long); in a range proxy by proxy, so that its
// keys stay in L2; the latest queries first.
__device__ __forceinline__ ScoreUnit UnitAt(const ScoreKernelParams& params, uint32_t index) {
  if (index >= params.num_units) return {0, 0, 0, 0, 0};
  int range = 0;
  while (index >= params.range_begin[range + 1]) ++range;
  const uint32_t rest = index - params.range_begin[range];
  const uint32_t per_proxy =
      (params.range_begin[range + 1] - params.range_begin[range]) / params.num_proxies;
  const int q_tile = params.shape.q_tiles - 1 - static_cast<int>(rest % per_proxy);
  const int begin = range * kRangeTiles;
  return {static_cast<int>(rest / per_proxy), q_tile, range, begin,
          min(params.shape.KeyTilesOf(q_tile) - begin, kRangeTiles)};
}

template <int kHeadDim>
struct alignas(1024) ScoreShared {
  static constexpr int kStages = kHeadDim == 128 ? 3 : 4;
  Bf16 q[2][kQueryRows * kHeadDim];
  Bf16 k[kStages][kKeyTile * kHeadDim];
  uint64_t q_full[2], q_empty[2], k_full[kStages], k_empty[kStages];
  ScoreUnit unit[2];
};

template <int kHeadDim>
__device__ __forceinline__ void LoadUnits(ScoreShared<kHeadDim>& shared, const CUtensorMap& q_map,
                                          const CUtensorMap& k_map,
                                          const ScoreKernelParams& params) {
  constexpr int kStages = ScoreShared<kHeadDim>::kStages;
  const uint64_t keep = PolicyKeep(), once = PolicyOnce();
  uint32_t step = 0;
  for (uint32_t w = 0;; ++w) {
    const uint32_t index = atomicAdd(params.tile_counter, 1u);
    if (index == params.num_units + gridDim.x - 1)
      *params.tile_counter = 0;  // the last draw resets the counter
    const ScoreUnit unit = UnitAt(params, index);
    const uint32_t slot = RingSlot<2>(w);
    BarrierWait(&shared.q_empty[slot], RingParity<2>(w) ^ 1);
    shared.unit[slot] = unit;
    if (unit.key_count == 0) {
      BarrierArrive(&shared.q_full[slot]);
      break;
    }
    BarrierExpect(&shared.q_full[slot], kQueryRows * kHeadDim * 2);
    const int row = unit.q_tile * kQueryRows - params.shape.skipped;
#pragma unroll
    for (int p = 0; p < kHeadDim / 64; ++p) {
      TmaLoad(&shared.q[slot][p * kQueryRows * 64], q_map, &shared.q_full[slot],
              {p * 64, row, unit.proxy, 0}, once);
    }
    const int key_head = unit.proxy / params.proxies_per_key_head;
    for (int i = unit.key_count - 1; i >= 0; --i, ++step) {
      const uint32_t stage = RingSlot<kStages>(step);
      BarrierWait(&shared.k_empty[stage], RingParity<kStages>(step) ^ 1);
      BarrierExpect(&shared.k_full[stage], kKeyTile * kHeadDim * 2);
#pragma unroll
      for (int p = 0; p < kHeadDim / 64; ++p) {
        TmaLoad(&shared.k[stage][p * kKeyTile * 64], k_map, &shared.k_full[stage],
                {p * 64, (unit.key_begin + i) * kKeyTile, key_head, 0}, keep);
      }
    }
  }
}

// Maxima, over this thread's columns, of the kBlocks key blocks in a tile, as the bit patterns of
// negative floats: among those the larger float is the smaller integer, and a clear sign bit (a
// small integer) tells that a row outgrew its headroom.
template <int kBlocks>
struct BlockMaxima {
  uint32_t row0[kBlocks], row1[kBlocks];

  __device__ __forceinline__ void Take(const float (&s)[64]) {
    constexpr int kGroups = 16 / kBlocks;  // of 8 columns
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t low0 = ~0u, low1 = ~0u;
#pragma unroll
      for (int j = kGroups * b; j < kGroups * (b + 1); ++j) {
        low0 = __vimin3_u32(low0, __float_as_uint(s[4 * j]), __float_as_uint(s[4 * j + 1]));
        low1 = __vimin3_u32(low1, __float_as_uint(s[4 * j + 2]), __float_as_uint(s[4 * j + 3]));
      }
      row0[b] = low0;
      row1[b] = low1;
    }
  }
  __device__ __forceinline__ bool AnyOutgrown() const {
    uint32_t lowest = ~0u;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) lowest = __vimin3_u32(lowest, row0[b], row1[b]);
    return static_cast<int>(lowest) >= 0;
  }
  // Reduces over the four lanes of a row as a transpose: lanes 0, 1 end with row r, lanes 2, 3 with
  // row r + 8; the even lane with the first half of the blocks, the odd one with the second.
  __device__ __forceinline__ void Reduce(int quad, float (&out)[kBlocks / 2]) const {
    const bool second_row = (quad & 2) != 0, second_half = (quad & 1) != 0;
    uint32_t mine[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t sent = second_row ? row0[b] : row1[b];
      mine[b] = min(second_row ? row1[b] : row0[b], __shfl_xor_sync(~0u, sent, 2));
    }
#pragma unroll
    for (int b = 0; b < kBlocks / 2; ++b) {
      const uint32_t sent = second_half ? mine[b] : mine[b + kBlocks / 2];
      const uint32_t kept = second_half ? mine[b + kBlocks / 2] : mine[b];
      out[b] = __uint_as_float(min(kept, __shfl_xor_sync(~0u, sent, 1)));
    }
  }
};

// Writes kCount halves (4, 8 or 16 bytes) at once.
template <int kCount>
__device__ __forceinline__ void StoreHalves(__half* out, const float (&values)[kCount],
                                            float shift) {
  uint32_t packed[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const __half2 pair = __floats2half2_rn(fmaxf(values[2 * i] + shift, kLowestHalf),
                                           fmaxf(values[2 * i + 1] + shift, kLowestHalf));
    packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  if constexpr (kCount == 2) *reinterpret_cast<uint32_t*>(out) = packed[0];
  if constexpr (kCount == 4) *reinterpret_cast<uint2*>(out) = make_uint2(packed[0], packed[1]);
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint4*>(out) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// Raises the maxima of the rows that outgrew their headroom; s is relative to the old ones.
__device__ __forceinline__ void RaiseMaxima(float (&s)[64], RowState& rows) {
  const float2 highest = RowMaxima(s);
  const float grow0 = fmaxf(0.0f, QuadMax(highest.x) + kHeadroom),
              grow1 = fmaxf(0.0f, QuadMax(highest.y) + kHeadroom);
  rows = RowState{rows.max0 + grow0, rows.max1 + grow1, rows.sum0 * Exp2Approx(-grow0),
                  rows.sum1 * Exp2Approx(-grow1)};
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    s[4 * j] -= grow0;
    s[4 * j + 1] -= grow0;
    s[4 * j + 2] -= grow1;
    s[4 * j + 3] -= grow1;
  }
}

template <int kHeadDim, int kStride>
__device__ __forceinline__ void ComputeUnits(ScoreShared<kHeadDim>& shared,
                                             const ScoreKernelParams& params, int consumer) {
  constexpr int kStages = ScoreShared<kHeadDim>::kStages;
  constexpr int kBlocks =
      kStride;  // key blocks in a tile: 128 sampled keys of kBlockTokens / kStride each
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const bool second_row = (quad & 2) != 0;
  const ScoreShape& shape = params.shape;
  float s[64];
  uint32_t step = 0;
  for (uint32_t w = 0;; ++w) {
    const uint32_t slot = RingSlot<2>(w);
    BarrierWait(&shared.q_full[slot], RingParity<2>(w));
    const ScoreUnit unit = shared.unit[slot];
    const int key_count = __shfl_sync(~0u, unit.key_count, 0);  // uniform for the compiler
    if (key_count == 0) break;
    const int base = unit.q_tile * kQueryRows + consumer * kGroupRows;  // rows from the origin
    const int row = base + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int diagonal =
        (shape.origin + base + kGroupRows - 1) / kKeyTile;  // the only tile that needs the mask
    const int own_query = row + (second_row ? 8 : 0) - shape.skipped;  // after BlockMaxima::Reduce
    const bool own_exists = own_query >= 0 && own_query < shape.num_q;
    __half* out = params.maxima + (int64_t{unit.proxy} * shape.num_q + own_query) * params.pitch +
                  kBlocks / 2 * (quad & 1);
    const uint32_t q_desc = DescriptorKMajor(&shared.q[slot][consumer * kGroupRows * 64]);
    RowState rows{0.0f, 0.0f, 0.0f, 0.0f};
    float reference0 = 0.0f, reference1 = 0.0f,
          shift = 0.0f;  // shift: maximum in use - reference, of own_query
    bool started = false;
    for (int i = 0; i < key_count; ++i, ++step) {
      const int key_tile = __shfl_sync(~0u, unit.key_begin + key_count - 1 - i, 0);
      const uint32_t stage = RingSlot<kStages>(step);
      BarrierWait(&shared.k_full[stage], RingParity<kStages>(step));
      if (key_tile <= diagonal) {
        WgmmaFence();
        Pin(s);
        IssueQk<kHeadDim, kQueryRows>(
            s, q_desc, DescriptorKMajor(shared.k[0]) + stage * (kKeyTile * kHeadDim * 2 / 16));
        WgmmaCommit();
        WgmmaWait<0>();
        Pin(s);
      }
      if (lane == 0)
        BarrierArrive(
            &shared.k_empty[stage]);  // every warp for itself, or one that lags misses a phase
      if (key_tile > diagonal) continue;
      if (key_tile == diagonal)
        MaskAboveDiagonal(s, shape.origin + row - key_tile * kKeyTile, quad * 2);
      if (!started) {  // exact maxima once a unit
        const float2 highest = RowMaxima(s);
        reference0 = QuadMax(highest.x) * params.scale_log2;
        reference1 = QuadMax(highest.y) * params.scale_log2;
        rows.max0 = reference0 + kHeadroom;
        rows.max1 = reference1 + kHeadroom;
        shift = kHeadroom;
        started = true;
      }
      Shift(s, rows, params.scale_log2);
      BlockMaxima<kBlocks> maxima;
      maxima.Take(s);
      if (__any_sync(~0u, maxima.AnyOutgrown())) {
        RaiseMaxima(s, rows);
        shift = second_row ? rows.max1 - reference1 : rows.max0 - reference0;
        maxima.Take(s);
      }
      float own[kBlocks / 2];
      maxima.Reduce(quad, own);
      if (own_exists) StoreHalves(out + key_tile * kBlocks, own, shift);
      Exponentiate<kPolynomialShare>(s, rows);
    }
    if (lane == 0) BarrierArrive(&shared.q_empty[slot]);
    const float sum0 = QuadSum(rows.sum0), sum1 = QuadSum(rows.sum1);
    if ((quad & 1) == 0 && own_exists) {
      const float reference = second_row ? reference1 : reference0;
      const float log_sum = second_row ? rows.max1 + __log2f(sum1) : rows.max0 + __log2f(sum0);
      params.sums[(int64_t{unit.proxy} * shape.ranges + unit.range) * shape.num_q + own_query] =
          make_float2(reference, started ? log_sum : -INFINITY);
    }
  }
}

template <int kHeadDim, int kStride>
__global__ void __launch_bounds__(kScoreThreads, 1)
    ProxyScoreKernel(const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ ScoreKernelParams params) {
  constexpr int kStages = ScoreShared<kHeadDim>::kStages;
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<ScoreShared<kHeadDim>*>(
      (reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&shared.q_full[i], 1);
      BarrierInit(&shared.q_empty[i], kScoreWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.k_full[i], 1);
      BarrierInit(&shared.k_empty[i], kScoreWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    RegistersShrink<32>();
    if (threadIdx.x == 0) LoadUnits<kHeadDim>(shared, q_map, k_map, params);
  } else {
    RegistersGrow<160>();
    ComputeUnits<kHeadDim, kStride>(shared, params, warpgroup - 1);
  }
}

ScoreKernelParams KernelParams(const ProxyScoreParams& params) {
  ScoreKernelParams kernel{ScoreShape(params.num_q, params.first_sample)};
  const ScoreShape& shape = kernel.shape;
  kernel.maxima = static_cast<__half*>(params.row_maxima);
  kernel.sums = static_cast<float2*>(params.row_sums);
  kernel.tile_counter = params.tile_counter;
  kernel.pitch = shape.key_tiles * params.stride;
  kernel.proxies_per_key_head = params.num_proxies / params.num_key_heads;
  kernel.num_proxies = params.num_proxies;
  kernel.scale_log2 = kLog2E / std::sqrt(static_cast<float>(params.head_dim));
  int32_t first_q_tile = 0;  // that reaches into the range
  for (int32_t r = 0; r < shape.ranges; ++r) {
    while (shape.KeyTilesOf(first_q_tile) <= r * kRangeTiles) ++first_q_tile;
    kernel.range_begin[r + 1] =
        kernel.range_begin[r] + params.num_proxies * (shape.q_tiles - first_q_tile);
  }
  kernel.num_units = kernel.range_begin[shape.ranges];
  return kernel;
}

template <int kHeadDim, int kStride>
cudaError_t Launch(const ProxyScoreParams& params, cudaStream_t stream) {
  const ScoreKernelParams kernel = KernelParams(params);
  CUtensorMap q_map, k_map;
  cudaError_t error = MakeTensorMap(SampledQueries(params), kQueryRows, &q_map);
  if (error == cudaSuccess) error = MakeTensorMap(SampledKeys(params), kKeyTile, &k_map);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(ScoreShared<kHeadDim>) + 1024;
  static const cudaError_t configured =
      cudaFuncSetAttribute(ProxyScoreKernel<kHeadDim, kStride>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (configured != cudaSuccess) return configured;
  ProxyScoreKernel<kHeadDim, kStride>
      <<<params.num_sms, kScoreThreads, kSharedBytes, stream>>>(q_map, k_map, kernel);
  constexpr int64_t kSamples = kBlockTokens / kStride;
  const dim3 grid(static_cast<unsigned>(CeilDiv(params.num_q, kSamples)), params.num_proxies);
  const size_t shift_bytes = kernel.shape.ranges * kSamples * sizeof(float);
  ReduceScoresKernel<kStride><<<grid, kReduceThreads, shift_bytes, stream>>>(
      kernel, static_cast<int>(params.first_sample / kSamples), params.scores, params.score_stride,
      params.log_sums);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchProxyScore(const ProxyScoreParams& params, cudaStream_t stream) {
  if (ScoreShape(params.num_q, params.first_sample).ranges > kMaxRanges)
    return cudaErrorInvalidValue;
  return DispatchSampled(params, [&](auto head_dim, auto stride) {
    return Launch<head_dim.value, stride.value>(params, stream);
  });
}

}  // namespace headstart::cuda
