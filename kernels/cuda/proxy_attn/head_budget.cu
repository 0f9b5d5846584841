// How many blocks each head keeps (ProxyAttn, arXiv 2509.24745, step 2), or each row of a proxy.
#include "kernels/cuda/proxy_attn/ranking.cuh"

namespace headstart::cuda {
namespace {

constexpr int kHeadThreads = 1024;
constexpr int kRowThreads = 256;
// Of shared memory, see LeastPrefix.
constexpr int kItemBytes = sizeof(uint64_t) + sizeof(float);
constexpr int kMostBytes = 16384 * kItemBytes;  // 2M tokens

// Bitonic, by the CTA. size: a power of two.
template <int kThreads>
__device__ __forceinline__ void SortDescending(uint64_t* items, int size) {
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

// The least number of blocks, taken by falling key, ties to the lower one, whose mass reaches
// gamma. By the CTA; its first warp gets the result. items: shared memory, `padded` sort items,
// each a key above the inverted block number, then `padded` floats.
template <int kThreads, typename KeyOf>
__device__ __forceinline__ int LeastPrefix(uint64_t* items, int padded, int blocks,
                                           const float* mass, float gamma, const KeyOf& key_of) {
  for (int n = threadIdx.x; n < padded; n += kThreads) {
    const uint32_t key = n < blocks ? key_of(n) : 0;
    items[n] = uint64_t{key} << 32 | static_cast<uint32_t>(~n);
  }
  __syncthreads();
  SortDescending<kThreads>(items, padded);
  float* ordered = reinterpret_cast<float*>(items + padded);
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    ordered[i] = mass[~static_cast<uint32_t>(items[i])];
  }
  __syncthreads();
  if (threadIdx.x >= 32 || gamma >= 1.0f) return blocks;
  return CountToReach(gamma, ordered, blocks);
}

// One CTA a head.
__global__ void __launch_bounds__(kHeadThreads)
    HeadBudgetKernel(const HeadBudgetParams params, int padded) {
  extern __shared__ uint64_t items[];
  const SelectionShape& shape = params.shape;
  const int head = blockIdx.x, blocks = static_cast<int>(shape.num_key_blocks()), m = blocks - 1;
  const int proxy = head / (shape.num_heads / shape.num_proxies);
  const float* mass = params.mass + int64_t{head} * blocks;
  const float* scores =
      params.scores + (int64_t{proxy} * shape.num_rows + shape.num_rows - 1) * shape.score_stride;
  const int count =
      LeastPrefix<kHeadThreads>(items, padded, blocks, mass, params.gamma, [&](int n) {
        return params.shared ? RankKey(n, m, n < m ? scores[n] : 0.0f, shape)
                             : OrderedBits(mass[n]);
      });
  if (threadIdx.x != 0) return;
  const float ratio = fmaxf(params.budget_ratio[head],
                            __fdiv_rn(static_cast<float>(count), static_cast<float>(blocks)));
  params.budget_ratio[head] = ratio;
  // The small number keeps the rounding of the ratio from adding a block.
  const int kept = static_cast<int>(ceil(static_cast<double>(ratio) * blocks - 0x1p-10));
  params.budget_blocks[head] = max(kept, params.floor_blocks);
}

__host__ __device__ int PowerOfTwo(int64_t at_least) {
  int power = 1;
  while (power < at_least) power *= 2;
  return power;
}

// One CTA a row (blockIdx.x, the longest first) of a proxy (blockIdx.y).
__global__ void __launch_bounds__(kRowThreads) RowBudgetKernel(const RowBudgetParams params) {
  extern __shared__ uint64_t items[];
  const SelectionShape& shape = params.shape;
  const int64_t row = gridDim.x - 1 - blockIdx.x, index = blockIdx.y * shape.num_rows + row;
  const int m = static_cast<int>(shape.first_row + row);
  const float* scores = params.scores + index * shape.score_stride;
  const int count = LeastPrefix<kRowThreads>(
      items, PowerOfTwo(m + 1), m + 1, params.mass + index * shape.score_stride, params.gamma,
      [&](int n) { return RankKey(n, m, n < m ? scores[n] : 0.0f, shape); });
  if (threadIdx.x == 0) params.row_budgets[index] = max(count, params.floor_blocks);
}

__global__ void FixedBudgetKernel(int num_heads, int blocks, int32_t* budget_blocks) {
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head < num_heads) budget_blocks[head] = blocks;
}

}  // namespace

cudaError_t LaunchHeadBudget(const HeadBudgetParams& params, cudaStream_t stream) {
  const int padded = PowerOfTwo(params.shape.num_key_blocks());
  const int bytes = padded * kItemBytes;
  if (bytes > kMostBytes) return cudaErrorInvalidValue;
  static const cudaError_t configured = cudaFuncSetAttribute(
      HeadBudgetKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  HeadBudgetKernel<<<params.shape.num_heads, kHeadThreads, bytes, stream>>>(params, padded);
  return cudaGetLastError();
}

cudaError_t LaunchRowBudget(const RowBudgetParams& params, cudaStream_t stream) {
  const int bytes = PowerOfTwo(params.shape.num_key_blocks()) * kItemBytes;
  if (bytes > kMostBytes) return cudaErrorInvalidValue;
  static const cudaError_t configured = cudaFuncSetAttribute(
      RowBudgetKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  const dim3 grid(static_cast<unsigned>(params.shape.num_rows), params.shape.num_proxies);
  RowBudgetKernel<<<grid, kRowThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchFixedBudget(int32_t num_heads, int32_t blocks, int32_t* budget_blocks,
                              cudaStream_t stream) {
  FixedBudgetKernel<<<(num_heads + 127) / 128, 128, 0, stream>>>(num_heads, blocks, budget_blocks);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
