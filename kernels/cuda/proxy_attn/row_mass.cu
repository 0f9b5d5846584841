// Estimated attention mass of every row's key blocks, for the budget rule `row` (ProxyAttn, arXiv
// 2509.24745, whose strided probabilities are summed here instead of max-pooled): the mean over a
// query block's samples of the probabilities of a key block's samples.
//
// A second pass over the sampled logits, with the log-sum-exp of every query known from the first
// (proxy_score.cu): probabilities are exact in fp32 and nothing but the result goes to memory. One
// warpgroup a CTA, 64 sampled queries of one proxy, which are whole query blocks; it walks their
// tiles of 128 sampled keys, which are whole key blocks, with one tile loading ahead.
#include <cmath>

#include "kernels/cuda/attention/block_sparse_attn.cuh"
#include "kernels/cuda/proxy_attn/score_reduce.cuh"

namespace headstart::cuda {
namespace {

constexpr int kRowMassThreads = 128;
constexpr int kRowMassStages = 2;
constexpr int kRowsPerSum = 8;  // queries whose probabilities one warp adds up
constexpr int kRowSums = kGroupRows / kRowsPerSum;

struct RowMassKernelParams {
  const float* log_sums;  // [proxy][num_q]
  float* mass;            // [proxy][num_rows][mass_stride]
  int64_t mass_stride;
  int32_t num_q, first_sample, num_rows, proxies_per_key_head;
  float scale_log2;
};

template <int kHeadDim, int kStride>
struct alignas(1024) RowMassShared {
  Bf16 q[kGroupRows * kHeadDim];
  Bf16 k[kRowMassStages][kKeyTile * kHeadDim];
  float sums[2][kRowSums][kStride];  // a tile holds kStride key blocks
  uint64_t q_full, k_full[kRowMassStages];
};

// By one thread.
template <int kHeadDim>
__device__ __forceinline__ void LoadPanels(Bf16* destination, const CUtensorMap& map,
                                           uint64_t* barrier, int row, int head, int rows) {
  BarrierExpect(barrier, rows * kHeadDim * 2);
#pragma unroll
  for (int p = 0; p < kHeadDim / 64; ++p) {
    TmaLoad(destination + p * rows * 64, map, barrier, {p * 64, row, head, 0}, PolicyKeep());
  }
}

// Adds up the probabilities in s by key block and by eight queries.
template <int kStride>
__device__ __forceinline__ void SumBlocks(const float (&s)[64], float (&sums)[kRowSums][kStride]) {
  constexpr int kGroups = 16 / kStride;  // column groups of a key block
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < kStride; ++b) {
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int j = kGroups * b; j < kGroups * (b + 1); ++j) {
      low += s[4 * j] + s[4 * j + 1];
      high += s[4 * j + 2] + s[4 * j + 3];
    }
    low = WarpSum(low);
    high = WarpSum(high);
    if (lane == 0) {
      sums[2 * warp][b] = low;
      sums[2 * warp + 1][b] = high;
    }
  }
}

// Writes the mass of the tile's key blocks in the CTA's query blocks.
template <int kStride>
__device__ __forceinline__ void WriteMass(const RowMassKernelParams& params,
                                          const float (&sums)[kRowSums][kStride], int first_query,
                                          int key_tile, int proxy) {
  constexpr int kSamples = static_cast<int>(kBlockTokens) / kStride;  // of a block
  constexpr int kParts = kSamples / kRowsPerSum;
  const int q_block = threadIdx.x / kStride, b = threadIdx.x % kStride;
  const int query = first_query + q_block * kSamples;
  if (q_block >= kGroupRows / kSamples || query >= params.num_q) return;
  const int row = query / kSamples, n = key_tile * kStride + b;
  if (n > params.first_sample / kSamples + row) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) sum += sums[q_block * kParts + i][b];
  params.mass[(int64_t{proxy} * params.num_rows + row) * params.mass_stride + n] =
      sum / static_cast<float>(min(kSamples, params.num_q - query));
}

template <int kHeadDim, int kStride>
__global__ void __launch_bounds__(kRowMassThreads)
    RowMassKernel(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ RowMassKernelParams params) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<RowMassShared<kHeadDim, kStride>*>(
      (reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int first_query = (gridDim.x - 1 - blockIdx.x) * kGroupRows;  // the longest rows first
  const int proxy = blockIdx.y, key_head = proxy / params.proxies_per_key_head;
  const int last_query = min(first_query + kGroupRows, params.num_q) - 1;
  const int key_tiles = (params.first_sample + last_query) / kKeyTile + 1;
  if (threadIdx.x == 0) {
    BarrierInit(&shared.q_full, 1);
    for (int i = 0; i < kRowMassStages; ++i) BarrierInit(&shared.k_full[i], 1);
    BarrierInitFence();
  }
  __syncthreads();
  const auto load_keys = [&](int tile) {
    const int slot = tile % kRowMassStages;
    LoadPanels<kHeadDim>(shared.k[slot], k_map, &shared.k_full[slot], tile * kKeyTile, key_head,
                         kKeyTile);
  };
  if (threadIdx.x == 0) {
    LoadPanels<kHeadDim>(shared.q, q_map, &shared.q_full, first_query, proxy, kGroupRows);
    load_keys(0);
  }
  const int lane = threadIdx.x % 32, query = first_query + threadIdx.x / 32 * 16 + lane / 4;
  // An infinite sum makes the probabilities of a query that is not there 0.
  const auto log_sum_of = [&](int q) {
    return q < params.num_q ? params.log_sums[int64_t{proxy} * params.num_q + q] : INFINITY;
  };
  const RowState rows{log_sum_of(query), log_sum_of(query + 8), 0.0f, 0.0f};
  const uint32_t q_desc = DescriptorKMajor(shared.q), k_desc = DescriptorKMajor(shared.k[0]);
  BarrierWait(&shared.q_full, 0);
  float s[64];
  for (int tile = 0; tile < key_tiles; ++tile) {
    // The slot was read in the round before last, and a barrier lies between.
    if (threadIdx.x == 0 && tile + 1 < key_tiles) load_keys(tile + 1);
    const uint32_t slot = RingSlot<kRowMassStages>(tile);
    BarrierWait(&shared.k_full[slot], RingParity<kRowMassStages>(tile));
    WgmmaFence();
    Pin(s);
    IssueQk<kHeadDim, kGroupRows>(s, q_desc, k_desc + slot * (kKeyTile * kHeadDim * 2 / 16));
    WgmmaCommit();
    WgmmaWait<0>();
    Pin(s);
    MaskAboveDiagonal(s, params.first_sample + query - tile * kKeyTile, lane % 4 * 2);
    Shift(s, rows, params.scale_log2);
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = Exp2Approx(s[i]);
    SumBlocks<kStride>(s, shared.sums[tile % 2]);
    __syncthreads();
    WriteMass<kStride>(params, shared.sums[tile % 2], first_query, tile, proxy);
  }
}

template <int kHeadDim, int kStride>
cudaError_t Launch(const RowMassParams& params, cudaStream_t stream) {
  const ProxyScoreParams& scores = params.scores;
  CUtensorMap q_map, k_map;
  cudaError_t error = MakeTensorMap(SampledQueries(scores), kGroupRows, &q_map);
  if (error == cudaSuccess) error = MakeTensorMap(SampledKeys(scores), kKeyTile, &k_map);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(RowMassShared<kHeadDim, kStride>) + 1024;
  static const cudaError_t configured = cudaFuncSetAttribute(
      RowMassKernel<kHeadDim, kStride>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (configured != cudaSuccess) return configured;
  constexpr int64_t kSamples = kBlockTokens / kStride;
  const RowMassKernelParams kernel{scores.log_sums,
                                   params.mass,
                                   scores.score_stride,
                                   static_cast<int32_t>(scores.num_q),
                                   static_cast<int32_t>(scores.first_sample),
                                   static_cast<int32_t>(CeilDiv(scores.num_q, kSamples)),
                                   scores.num_proxies / scores.num_key_heads,
                                   kLog2E / std::sqrt(static_cast<float>(kHeadDim))};
  const dim3 grid(static_cast<unsigned>(CeilDiv(scores.num_q, kGroupRows)), scores.num_proxies);
  RowMassKernel<kHeadDim, kStride>
      <<<grid, kRowMassThreads, kSharedBytes, stream>>>(q_map, k_map, kernel);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRowMass(const RowMassParams& params, cudaStream_t stream) {
  return DispatchSampled(params.scores, [&](auto head_dim, auto stride) {
    return Launch<head_dim.value, stride.value>(params, stream);
  });
}

}  // namespace headstart::cuda
