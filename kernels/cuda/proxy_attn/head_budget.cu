// How many blocks each head keeps (ProxyAttn, arXiv 2509.24745, step 2).
#include "kernels/cuda/proxy_attn/ranking.cuh"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 1024;

__device__ __forceinline__ void SortDescending(uint64_t* items,
                                               int size) {  // bitonic; size: a power of two
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const bool descending = (low & width) == 0;
        const uint64_t a = items[low], b = items[high];
        if ((a < b) == descending) {
          items[low] = b;
          items[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// The least count whose prefix sum of mass reaches gamma; all when none does. One warp.
__device__ __forceinline__ int CountToReach(double gamma, const float* mass, int size) {
  const int lane = threadIdx.x % 32, segment = (size + 31) / 32;
  const int begin = min(lane * segment, size), end = min(begin + segment, size);
  double sum = 0.0;
  for (int i = begin; i < end; ++i) sum += mass[i];
  double before = 0.0;  // of the lanes below, in rising order
  for (int l = 0; l < 31; ++l) {
    const double other = __shfl_sync(~0u, sum, l);
    if (l < lane) before += other;
  }
  int count = size;
  for (int i = begin; i < end; ++i) {
    before += mass[i];
    if (before >= gamma) {
      count = i + 1;
      break;
    }
  }
  return static_cast<int>(__reduce_min_sync(~0u, static_cast<unsigned>(count)));
}

// One CTA a head. Shared memory: `padded` sort items, each a key above the inverted block number
// (so that ties go to the lower one), then `padded` floats.
__global__ void __launch_bounds__(kThreads)
    HeadBudgetKernel(const HeadBudgetParams params, int padded) {
  extern __shared__ uint64_t items[];
  const SelectionShape& shape = params.shape;
  const int head = blockIdx.x, blocks = static_cast<int>(shape.num_key_blocks()), m = blocks - 1;
  const int proxy = head / (shape.num_heads / shape.num_proxies);
  const float* mass = params.mass + int64_t{head} * blocks;
  const float* scores =
      params.scores + (int64_t{proxy} * shape.num_rows + shape.num_rows - 1) * shape.score_stride;
  for (int n = threadIdx.x; n < padded; n += kThreads) {
    uint32_t key = 0;
    if (n < blocks)
      key = params.shared ? RankKey(n, m, n < m ? scores[n] : 0.0f, shape) : OrderedBits(mass[n]);
    items[n] = uint64_t{key} << 32 | static_cast<uint32_t>(~n);
  }
  __syncthreads();
  SortDescending(items, padded);
  float* ordered = reinterpret_cast<float*>(items + padded);
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    ordered[i] = mass[~static_cast<uint32_t>(items[i])];
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int count = params.gamma < 1.0f ? CountToReach(params.gamma, ordered, blocks) : blocks;
  if (threadIdx.x != 0) return;
  const float ratio = fmaxf(params.budget_ratio[head],
                            __fdiv_rn(static_cast<float>(count), static_cast<float>(blocks)));
  params.budget_ratio[head] = ratio;
  // The small number keeps the rounding of the ratio from adding a block.
  const int kept = static_cast<int>(ceil(static_cast<double>(ratio) * blocks - 0x1p-10));
  params.budget_blocks[head] = max(kept, params.floor_blocks);
}

__global__ void FixedBudgetKernel(int num_heads, int blocks, int32_t* budget_blocks) {
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head < num_heads) budget_blocks[head] = blocks;
}

}  // namespace

cudaError_t LaunchHeadBudget(const HeadBudgetParams& params, cudaStream_t stream) {
  int padded = 1;
  while (padded < params.shape.num_key_blocks()) padded *= 2;
  constexpr int kItemBytes = sizeof(uint64_t) + sizeof(float);
  const int bytes = padded * kItemBytes;
  constexpr int kMostBytes = 16384 * kItemBytes;  // 2M tokens
  if (bytes > kMostBytes) return cudaErrorInvalidValue;
  static const cudaError_t configured = cudaFuncSetAttribute(
      HeadBudgetKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  HeadBudgetKernel<<<params.shape.num_heads, kThreads, bytes, stream>>>(params, padded);
  return cudaGetLastError();
}

cudaError_t LaunchFixedBudget(int32_t num_heads, int32_t blocks, int32_t* budget_blocks,
                              cudaStream_t stream) {
  FixedBudgetKernel<<<(num_heads + 127) / 128, 128, 0, stream>>>(num_heads, blocks, budget_blocks);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
