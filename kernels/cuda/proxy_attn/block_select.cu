// From budgets and scores to lists of blocks (ProxyAttn, arXiv 2509.24745, step 3).
//
// A head keeps the first count blocks of its proxy's ranking, which is a set: no row is sorted. A
// warp finds the count-th largest key by its bits and writes the kept blocks in falling order, so
// that a full list is the dense order and the attention over it the same bit for bit.
#include "kernels/cuda/proxy_attn/ranking.cuh"

namespace headstart::cuda {
namespace {

__device__ __forceinline__ int64_t Triangle(int64_t rows) { return rows * (rows + 1) / 2; }

__device__ __forceinline__ int ProxyOf(const SelectionShape& shape, int head) {
  return head / (shape.num_heads / shape.num_proxies);
}

// A head's budgets: one for all rows, or a row's own.
struct BudgetOf {
  const int32_t* rows;  // null: `all` holds
  int32_t all;

  __device__ __forceinline__ BudgetOf(const BlockSelectParams& params, int head)
      : rows(nullptr), all(0) {
    if (params.row_budgets != nullptr) {
      rows = params.row_budgets + ProxyOf(params.shape, head) * params.shape.num_rows;
    } else {
      all = params.budget_blocks[head];
    }
  }
  // Blocks that are kept of a row (counted from the first), before any fallback.
  __device__ __forceinline__ int Count(const SelectionShape& shape, int row) const {
    const int blocks = static_cast<int>(shape.first_row) + row + 1;
    if (row >= shape.num_rows - shape.dense_tail_rows) return blocks;
    return min(blocks, rows != nullptr ? rows[row] : all);
  }
};

constexpr int kResolveThreads = 1024;

// One CTA, a warp a head: whether all run dense, and how many blocks are kept.
__global__ void __launch_bounds__(kResolveThreads) ResolveKernel(const BlockSelectParams params) {
  constexpr int kWarpsOfCta = kResolveThreads / 32;
  __shared__ unsigned long long warp_kept[kWarpsOfCta];
  const SelectionShape& shape = params.shape;
  const int num_rows = static_cast<int>(shape.num_rows), warp = threadIdx.x / 32;
  unsigned long long kept = 0;
  for (int head = warp; head < shape.num_heads; head += kWarpsOfCta) {
    const BudgetOf budget(params, head);
    int of_lane = 0;  // of up to 512 rows a lane, of up to 16384 blocks
    for (int row = threadIdx.x % 32; row < num_rows; row += 32) of_lane += budget.Count(shape, row);
    kept += __reduce_add_sync(~0u, static_cast<unsigned>(of_lane));
  }
  if (threadIdx.x % 32 == 0) warp_kept[warp] = kept;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarpsOfCta; ++w) kept += warp_kept[w];
  const uint64_t causal =
      shape.num_heads * (Triangle(shape.num_key_blocks()) - Triangle(shape.first_row));
  const bool dense =
      static_cast<double>(kept) > static_cast<double>(params.dense_above_density) * causal;
  const uint64_t executed = dense ? causal : kept;
  *params.totals = {executed, causal, dense};
  if (params.sum == nullptr) return;
  params.sum->executed_blocks += executed;
  params.sum->causal_blocks += causal;
  params.sum->dense_fallbacks += dense;
}

constexpr int kWarps = 4;

// What the count-th largest key of a row lies between; both ends are a warp's.
struct KeyRange {
  uint32_t lowest, highest;
};

struct Threshold {
  uint32_t key;
  bool exact;  // `count` keys reach it, no more
};

// A key in the range that at least `count` of the keys reach, and the next larger one that is told
// apart from it does not. keys: padded with zeros to a multiple of 128.
__device__ __forceinline__ Threshold FindThreshold(const uint32_t* keys, int padded, int count,
                                                   const KeyRange& range) {
  // The bits above the first one in which the ends differ are those of the result.
  int bit = 31 - __clz(range.lowest ^ range.highest);
  uint32_t threshold = bit < 0 ? range.lowest : range.lowest >> bit >> 1 << bit << 1;
  for (; bit >= 0; --bit) {
    const uint32_t candidate = threshold | 1u << bit;
    unsigned reached = 0;
    for (int n = threadIdx.x % 32 * 4; n < padded; n += 128) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + n);
      reached += (four.x >= candidate) + (four.y >= candidate) + (four.z >= candidate) +
                 (four.w >= candidate);
    }
    reached = __reduce_add_sync(~0u, reached);
    if (reached >= count) threshold = candidate;
    if (reached == count) return {threshold, true};  // nothing below it matters
  }
  return {threshold, false};
}

// Writes the blocks above the threshold, and of those on it the lowest, in falling order; `count`
// in all.
__device__ __forceinline__ void WriteKept(const uint32_t* keys, int blocks, const Threshold& found,
                                          int count, uint16_t* list) {
  const int lane = threadIdx.x % 32;
  const uint32_t threshold = found.key;
  int equal_below = 0, equal_kept = blocks;  // on the threshold: not yet visited, and kept
  if (!found.exact) {
    int above = 0, equal = 0;
    for (int n = lane; n < blocks; n += 32) {
      above += keys[n] > threshold;
      equal += keys[n] == threshold;
    }
    equal_kept = count - static_cast<int>(__reduce_add_sync(~0u, above));
    equal_below = __reduce_add_sync(~0u, equal);
  }
  int written = 0;
  for (int first = (blocks - 1) / 32 * 32; first >= 0; first -= 32) {
    const int n = first + 31 - lane;  // falling with the lane
    const uint32_t key = n < blocks ? keys[n] : 0;
    const bool is_equal = n < blocks && key == threshold;
    const uint32_t equals = __ballot_sync(~0u, is_equal);
    const uint32_t lanes_before = (1u << lane) - 1;
    const int rank =
        equal_below - 1 - __popc(equals & lanes_before);  // of this one, counted from the lowest
    const uint32_t kept = __ballot_sync(~0u, key > threshold || (is_equal && rank < equal_kept));
    if (kept >> lane & 1) list[written + __popc(kept & lanes_before)] = static_cast<uint16_t>(n);
    written += __popc(kept);
    equal_below -= __popc(equals);
  }
}

// A warp a row (blockIdx.x) and head (blockIdx.y). Shared memory: kWarps * key_capacity keys.
__global__ void __launch_bounds__(kWarps * 32)
    SelectKernel(const BlockSelectParams params, int key_capacity) {
  extern __shared__ uint4 raw_keys[];
  const SelectionShape& shape = params.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
  const int row =
      static_cast<int>(shape.num_rows) - 1 - static_cast<int>(blockIdx.x * kWarps) - warp;
  if (row < 0) return;
  const int64_t first = shape.first_row, m = first + row;
  const int blocks = static_cast<int>(m) + 1;
  const int count =
      params.totals->dense_fallbacks != 0 ? blocks : BudgetOf(params, head).Count(shape, row);
  uint16_t* list = params.lists + head * params.head_stride + Triangle(m) - Triangle(first);
  if (lane == 0) params.counts[head * shape.num_rows + row] = count;
  if (count == blocks) {
    for (int i = lane; i < blocks; i += 32) list[i] = static_cast<uint16_t>(m - i);
    return;
  }
  uint32_t* keys = reinterpret_cast<uint32_t*>(raw_keys) + warp * key_capacity;
  const float* scores =
      params.scores + (ProxyOf(shape, head) * shape.num_rows + row) * shape.score_stride;
  const int padded = (blocks + 127) / 128 * 128;
  KeyRange range{~0u, 0};  // of the keys that are not forced
  for (int n = lane; n < padded; n += 32) {
    keys[n] = n < blocks ? RankKey(n, static_cast<int>(m), n < m ? scores[n] : 0.0f, shape) : 0;
    if (n >= blocks || IsForced(n, static_cast<int>(m), shape)) continue;
    range.lowest = min(range.lowest, keys[n]);
    range.highest = max(range.highest, keys[n]);
  }
  range = {__reduce_min_sync(~0u, range.lowest), __reduce_max_sync(~0u, range.highest)};
  if (count <= NumForced(blocks, shape)) range = {0, ~0u};
  __syncwarp();
  WriteKept(keys, blocks, FindThreshold(keys, padded, count, range), count, list);
}

}  // namespace

cudaError_t LaunchBlockSelect(const BlockSelectParams& params, cudaStream_t stream) {
  const SelectionShape& shape = params.shape;
  const int key_capacity = static_cast<int>((shape.num_key_blocks() + 127) / 128 * 128);
  const int bytes = kWarps * key_capacity * static_cast<int>(sizeof(uint32_t));
  constexpr int kMostBytes = 227 * 1024;  // 1.8M tokens
  if (bytes > kMostBytes) return cudaErrorInvalidValue;
  static const cudaError_t configured =
      cudaFuncSetAttribute(SelectKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (configured != cudaSuccess) return configured;
  ResolveKernel<<<1, kResolveThreads, 0, stream>>>(params);
  const dim3 grid(static_cast<unsigned>((shape.num_rows + kWarps - 1) / kWarps), shape.num_heads);
  SelectKernel<<<grid, kWarps * 32, bytes, stream>>>(params, key_capacity);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
