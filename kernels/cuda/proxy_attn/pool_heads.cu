// Sampled tokens, averaged over groups of heads.
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 in 16 bytes

// Mean of `count` heads, `head_stride` elements apart, of the 8 columns at `first`.
__device__ __forceinline__ uint4 MeanOfHeads(const Bf16* first, int count, int64_t head_stride) {
  Float8 sum{};
  for (int h = 0; h < count; ++h, first += head_stride) {
    const Float8 head = Unpack(__ldg(reinterpret_cast<const uint4*>(first)));
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] += head[e];
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) sum[e] = __fdiv_rn(sum[e], static_cast<float>(count));
  return Pack(sum);
}

// Where the token's first head begins, and how far apart its heads are.
struct QueryRows {
  const Bf16* q;
  int64_t row_stride, head_dim;
  __device__ __forceinline__ const Bf16* Token(int64_t t) const { return q + t * row_stride; }
  __device__ __forceinline__ int64_t head_stride() const { return head_dim; }
};
struct KeyPages {
  const Bf16* pages;
  const int32_t* page_table;
  int64_t page_elements, head_dim;
  __device__ __forceinline__ const Bf16* Token(int64_t t) const {
    return pages + __ldg(page_table + t / kBlockTokens) * page_elements +
           t % kBlockTokens * head_dim;
  }
  __device__ __forceinline__ int64_t head_stride() const { return kBlockTokens * head_dim; }
};

// One thread makes 8 columns of one sample of one group (blockIdx.y).
template <typename Source>
__global__ void __launch_bounds__(kThreads)
    PoolKernel(Source source, int64_t num_samples, int stride, int heads_per_group, Bf16* out) {
  const uint32_t vectors = static_cast<uint32_t>(source.head_dim) / kVector;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const int64_t sample = index / vectors, column = index % vectors * kVector;
  if (sample >= num_samples) return;
  const Bf16* first =
      source.Token(sample * stride) + blockIdx.y * heads_per_group * source.head_stride() + column;
  const uint4 mean = MeanOfHeads(first, heads_per_group, source.head_stride());
  *reinterpret_cast<uint4*>(out + (blockIdx.y * num_samples + sample) * source.head_dim + column) =
      mean;
}

template <typename Source>
cudaError_t Launch(const Source& source, int64_t num_tokens, int stride, int num_heads,
                   int num_groups, void* out, cudaStream_t stream) {
  const int64_t num_samples = (num_tokens + stride - 1) / stride;
  const int64_t work = num_samples * source.head_dim / kVector;
  const dim3 grid(static_cast<unsigned>((work + kThreads - 1) / kThreads), num_groups);
  PoolKernel<<<grid, kThreads, 0, stream>>>(source, num_samples, stride, num_heads / num_groups,
                                            static_cast<Bf16*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPoolQueries(const PoolQueriesParams& params, cudaStream_t stream) {
  const QueryRows source{static_cast<const Bf16*>(params.q), params.q_stride,
                         params.shape.head_dim};
  return Launch(source, params.rows, params.stride, params.shape.num_heads, params.num_groups,
                params.out, stream);
}

cudaError_t LaunchPoolKeys(const PoolKeysParams& params, cudaStream_t stream) {
  const KvPages& kv = params.kv;
  const KeyPages source{static_cast<const Bf16*>(kv.pages), params.page_table, kv.page_elements(),
                        kv.shape.head_dim};
  return Launch(source, params.num_tokens, params.stride, kv.shape.num_kv_heads, params.num_groups,
                params.out, stream);
}

}  // namespace headstart::cuda
