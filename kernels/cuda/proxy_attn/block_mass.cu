// Attention mass of the key blocks in the last query block of a piece, exact, for every head
// (ProxyAttn, arXiv 2509.24745, step 2), in three kernels: per (query, key block) the largest logit
// and the sum of exponentials relative to it; the log-sum-exp of every query; the mass of every
// block.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention/block_sparse_attn.cuh"
#include "kernels/cuda/device/kv_tensor_map.h"

namespace headstart::cuda {
namespace {

// Heads that a CTA works on: they read the same keys, whose way from L2 is what limits the kernel.
constexpr int kHeadsPerCta = 2;
constexpr int kHeadThreads = 256;  // two warpgroups, 64 queries each
// The heads' warpgroups, and one warp that loads.
constexpr int kLogitThreads = kHeadsPerCta * kHeadThreads + 32;
constexpr int kLeastBlocksPerCta = 8;
constexpr int kMassStages = 3;
constexpr int kMassPolynomial = 2;

struct MassKernelParams {
  const int32_t* page_table;
  float2* partial;
  int32_t group_size, num_key_blocks, blocks_per_cta;
  int32_t query_token;  // first query of the last block, in the piece
  float scale_log2;
};

template <int kHeadDim>
struct alignas(1024) MassShared {
  Bf16 q[kHeadsPerCta][kBlock * kHeadDim];
  Bf16 k[kMassStages][kBlock * kHeadDim];
  uint64_t q_full, k_full[kMassStages], k_empty[kMassStages];
};

// The work of a CTA: heads of one group, and the key blocks [begin, end).
struct MassUnit {
  int32_t kv_head, first_head, num_heads, begin, end;
};

template <int kHeadDim>
__device__ __forceinline__ void LoadOperands(MassShared<kHeadDim>& shared, const CUtensorMap& q_map,
                                             const CUtensorMap& k_map,
                                             const MassKernelParams& params, const MassUnit& unit) {
  constexpr uint32_t kBytes = kBlock * kHeadDim * 2;
  const uint64_t keep = PolicyKeep();
  BarrierExpect(&shared.q_full, unit.num_heads * kBytes);
  for (int h = 0; h < unit.num_heads; ++h) {
#pragma unroll
    for (int p = 0; p < kHeadDim / 64; ++p) {
      TmaLoad(&shared.q[h][p * kBlock * 64], q_map, &shared.q_full,
              {0, params.query_token, p, unit.first_head + h}, keep);
    }
  }
  for (int n = unit.begin; n < unit.end; ++n) {
    const uint32_t step = n - unit.begin, slot = RingSlot<kMassStages>(step);
    const int page = __ldg(params.page_table + n);
    BarrierWait(&shared.k_empty[slot], RingParity<kMassStages>(step) ^ 1);
    BarrierExpect(&shared.k_full[slot], kBytes);
#pragma unroll
    for (int p = 0; p < kHeadDim / 64; ++p) {
      TmaLoad(&shared.k[slot][p * kBlock * 64], k_map, &shared.k_full[slot],
              {p * 64, 0, unit.kv_head, page}, keep);
    }
  }
}

// One warpgroup: 64 queries of the unit's head `h`.
template <int kHeadDim>
__device__ __forceinline__ void ComputePartials(MassShared<kHeadDim>& shared,
                                                const MassKernelParams& params,
                                                const MassUnit& unit, int h) {
  const int first_row = threadIdx.x % kHeadThreads / 128 * 64, lane = threadIdx.x % 32;
  const int row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const uint32_t q = DescriptorKMajor(&shared.q[h][first_row * 64]),
                 k = DescriptorKMajor(shared.k[0]);
  float2* const partial =
      params.partial + int64_t{unit.first_head + h} * params.num_key_blocks * kBlock + row;
  float s[64];
  RowState rows{};
  BarrierWait(&shared.q_full, 0);
  for (int n = unit.begin; n < unit.end; ++n) {
    const uint32_t step = n - unit.begin, slot = RingSlot<kMassStages>(step);
    BarrierWait(&shared.k_full[slot], RingParity<kMassStages>(step));
    WgmmaFence();
    Pin(s);
    IssueQk<kHeadDim>(s, q, k + slot * (kBlock * kHeadDim * 2 / 16));
    WgmmaCommit();
    WgmmaWait<0>();
    Pin(s);
    if (lane == 0) BarrierArrive(&shared.k_empty[slot]);
    if (n == params.num_key_blocks - 1) MaskAboveDiagonal(s, row, lane % 4 * 2);
    // Any maximum that is not outgrown will do as the reference: it goes to memory with the sum.
    if (step == 0) {
      const float2 highest = RowMaxima(s);
      rows.max0 = QuadMax(highest.x) * params.scale_log2;
      rows.max1 = QuadMax(highest.y) * params.scale_log2;
      Shift(s, rows, params.scale_log2);
    } else {
      SoftmaxNext(s, rows, params.scale_log2, kRescaleThreshold);
    }
    rows.sum0 = rows.sum1 = 0.0f;
    Exponentiate<kMassPolynomial>(s, rows);
    const float sum0 = QuadSum(rows.sum0), sum1 = QuadSum(rows.sum1);
    if (lane % 4 == 0) {
      float2* out = partial + int64_t{n} * kBlock;
      out[0] = make_float2(rows.max0, sum0);
      out[8] = make_float2(rows.max1, sum1);
    }
  }
}

// blockIdx: heads of the group (side by side: they share keys in L2), range of key blocks, KV head.
template <int kHeadDim>
__global__ void __launch_bounds__(kLogitThreads, 1)
    PartialMassKernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ MassKernelParams params) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<MassShared<kHeadDim>*>(
      (reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int first_of_group = blockIdx.x * kHeadsPerCta, begin = blockIdx.y * params.blocks_per_cta;
  const MassUnit unit{static_cast<int>(blockIdx.z),
                      static_cast<int>(blockIdx.z) * params.group_size + first_of_group,
                      min(kHeadsPerCta, params.group_size - first_of_group), begin,
                      min(begin + params.blocks_per_cta, params.num_key_blocks)};
  if (threadIdx.x == 0) {
    BarrierInit(&shared.q_full, 1);
    for (int i = 0; i < kMassStages; ++i) {
      BarrierInit(&shared.k_full[i], 1);
      BarrierInit(&shared.k_empty[i], unit.num_heads * kHeadThreads / 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int h = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kHeadThreads, 0);
  if (h < unit.num_heads) {
    ComputePartials<kHeadDim>(shared, params, unit, h);
  } else if (threadIdx.x == kHeadsPerCta * kHeadThreads) {
    LoadOperands<kHeadDim>(shared, q_map, k_map, params, unit);
  }
}

constexpr int kLogSumThreads = 1024;
constexpr int kRowsPerCta = 32;

// Log-sum-exp of 32 queries of a head (blockIdx.y): a warp takes every 32nd block, a lane one
// query.
__global__ void __launch_bounds__(kLogSumThreads)
    QueryLogSumKernel(const float2* partial, int num_key_blocks, float* log_sums) {
  __shared__ float2 warp_state[kLogSumThreads / 32][kRowsPerCta];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * kRowsPerCta + lane;
  const float2* own = partial + int64_t{blockIdx.y} * num_key_blocks * kBlock + row;
  float highest = -INFINITY, sum = 0.0f;
  for (int n = warp; n < num_key_blocks; n += kLogSumThreads / 32) {
    const float2 part = own[int64_t{n} * kBlock];
    const float raised = fmaxf(highest, part.x);
    sum = sum * exp2f(highest - raised) + part.y * exp2f(part.x - raised);
    highest = raised;
  }
  warp_state[warp][lane] = make_float2(highest, sum);
  __syncthreads();
  if (warp != 0) return;
  const int warps = min(kLogSumThreads / 32, num_key_blocks);  // the others saw no block
  float total = 0.0f;
  for (int i = 0; i < warps; ++i) highest = fmaxf(highest, warp_state[i][lane].x);
  for (int i = 0; i < warps; ++i)
    total += warp_state[i][lane].y * exp2f(warp_state[i][lane].x - highest);
  log_sums[blockIdx.y * kBlock + row] = highest + log2f(total);
}

constexpr int kMassThreads = 256;

// A warp makes the mass of one block of a head (blockIdx.y): the mean over the real queries.
__global__ void __launch_bounds__(kMassThreads)
    BlockMassKernel(const float2* partial, const float* log_sums, int num_key_blocks,
                    int num_queries, float* mass) {
  const int n = blockIdx.x * (kMassThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (n >= num_key_blocks) return;
  const int64_t block = int64_t{blockIdx.y} * num_key_blocks + n;
  float sum = 0.0f;
  for (int row = lane; row < num_queries; row += 32) {
    const float2 part = partial[block * kBlock + row];
    sum += part.y * exp2f(part.x - log_sums[blockIdx.y * kBlock + row]);
  }
  sum = WarpSum(sum);
  if (lane == 0) mass[block] = sum / static_cast<float>(num_queries);
}

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// CTAs that share out the heads of a group.
int HeadUnits(const HeadShape& heads) { return CeilDiv(heads.group_size(), kHeadsPerCta); }

// Two waves of CTAs, where the keys are enough for that.
int BlocksPerCta(const BlockMassParams& params, int num_key_blocks) {
  const int ranges =
      std::max(1, 2 * params.num_sms / (HeadUnits(params.kv.shape) * params.kv.shape.num_kv_heads));
  return std::max(kLeastBlocksPerCta, CeilDiv(num_key_blocks, ranges));
}

template <int kHeadDim>
cudaError_t LaunchPartials(const BlockMassParams& params, const MassKernelParams& kernel,
                           cudaStream_t stream) {
  const HeadShape& heads = params.kv.shape;
  CUtensorMap q_map, k_map;
  const TensorShape q{params.q,
                      {64, params.rows, heads.head_dim / 64, heads.num_heads},
                      {params.q_stride, 64, heads.head_dim}};
  cudaError_t error = MakeTensorMap(q, kBlock, &q_map);
  if (error == cudaSuccess)
    error = MakeTensorMap(KvPlanes(params.kv, KvPlane::kKeys), kBlock, &k_map);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(MassShared<kHeadDim>) + 1024;
  static const cudaError_t configured = cudaFuncSetAttribute(
      PartialMassKernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (configured != cudaSuccess) return configured;
  const dim3 grid(HeadUnits(heads), CeilDiv(kernel.num_key_blocks, kernel.blocks_per_cta),
                  heads.num_kv_heads);
  PartialMassKernel<kHeadDim><<<grid, kLogitThreads, kSharedBytes, stream>>>(q_map, k_map, kernel);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchBlockMass(const BlockMassParams& params, cudaStream_t stream) {
  const HeadShape& heads = params.kv.shape;
  const int64_t end = params.first_position + params.rows;
  const int num_key_blocks = static_cast<int>(NumBlocks(end));
  const int64_t last_block_begin = (num_key_blocks - 1) * kBlockTokens;
  const MassKernelParams kernel{params.page_table,
                                params.partial,
                                heads.group_size(),
                                num_key_blocks,
                                BlocksPerCta(params, num_key_blocks),
                                static_cast<int32_t>(last_block_begin - params.first_position),
                                kLog2E / std::sqrt(static_cast<float>(heads.head_dim))};
  const cudaError_t error = heads.head_dim == 128  ? LaunchPartials<128>(params, kernel, stream)
                            : heads.head_dim == 64 ? LaunchPartials<64>(params, kernel, stream)
                                                   : cudaErrorInvalidValue;
  if (error != cudaSuccess) return error;
  const dim3 row_groups(kBlock / kRowsPerCta, heads.num_heads);
  QueryLogSumKernel<<<row_groups, kLogSumThreads, 0, stream>>>(params.partial, num_key_blocks,
                                                               params.log_sums);
  const dim3 block_groups((num_key_blocks + kMassThreads / 32 - 1) / (kMassThreads / 32),
                          heads.num_heads);
  BlockMassKernel<<<block_groups, kMassThreads, 0, stream>>>(
      params.partial, params.log_sums, num_key_blocks, static_cast<int>(end - last_block_begin),
      params.mass);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
