#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void RopeTableKernel(const RopeTableParams params) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= params.positions * params.half) return;
  // The fp32 product is the model's definition of the angle; only its cosine and sine are taken in
  // double.
  const float angle =
      static_cast<float>(index / params.half) * params.inv_freq[index % params.half];
  double sine, cosine;
  sincos(static_cast<double>(angle), &sine, &cosine);
  params.cos_sin[index] = make_float2(static_cast<float>(cosine * params.scaling),
                                      static_cast<float>(sine * params.scaling));
}

// Sum over the kLanes neighbouring lanes that hold one head.
template <int kLanes>
__device__ __forceinline__ float HeadSum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A token of one of the sequences.
struct TokenPlace {
  const RopeKvWriteParams::Sequence& sequence;
  int64_t index;  // of the sequence's rows
};
__device__ __forceinline__ TokenPlace PlaceOf(const RopeKvWriteParams& params, int64_t index) {
  int s = 0;
  while (index >= params.sequences[s].rows.num_rows) index -= params.sequences[s++].rows.num_rows;
  return {params.sequences[s], index};
}

// One CTA a token. kHeadDim / 16 lanes hold a head; a lane eight columns of its first half and the
// eight that rotate with them.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    RopeKvWriteKernel(const __grid_constant__ RopeKvWriteParams params) {
  constexpr int kHalf = kHeadDim / 2, kLanes = kHalf / 8;
  const HeadShape& shape = params.kv.shape;
  const auto [sequence, index] = PlaceOf(params, blockIdx.x);
  const int64_t position = sequence.rows.first_position + index;
  const int slot = static_cast<int>(position % kBlockTokens);
  Bf16* const page = static_cast<Bf16*>(params.kv.pages) +
                     sequence.rows.page_table[position / kBlockTokens] * params.kv.page_elements();
  Bf16* const row =
      static_cast<Bf16*>(params.qkv) + (sequence.rows.first_row + index) * params.qkv_stride;
  const int column = threadIdx.x % kLanes * 8;
  const auto* angles = reinterpret_cast<const float*>(params.cos_sin + position * kHalf + column);
  const Float8 first_angles = LoadFloat8(angles), second_angles = LoadFloat8(angles + 8);
  const int num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  constexpr int kHeadsPerStep = kThreads / kLanes;
  for (int first_head = 0; first_head < num_heads; first_head += kHeadsPerStep) {
    const int own_head = first_head + threadIdx.x / kLanes;
    const int head = min(own_head, num_heads - 1);  // idle lanes take part in the sums
    Bf16* const source = row + head * kHeadDim + column;
    Float8 low = Unpack(*reinterpret_cast<const uint4*>(source));
    Float8 high = Unpack(*reinterpret_cast<const uint4*>(source + kHalf));
    const int kv_head = head - shape.num_heads;  // negative: a query head
    const bool is_value = kv_head >= shape.num_kv_heads;
    const float* weight = kv_head < 0 ? params.q_norm : params.k_norm;
    if (params.q_norm != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += low[e] * low[e] + high[e] * high[e];
      const float inverse = rsqrtf(HeadSum<kLanes>(sum) / kHeadDim + params.eps);
      if (!is_value) {
        const Float8 low_weight = LoadFloat8(weight + column),
                     high_weight = LoadFloat8(weight + kHalf + column);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          low[e] *= inverse * low_weight[e];
          high[e] *= inverse * high_weight[e];
        }
      }
    }
    if (!is_value) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float cosine = e < 4 ? first_angles[2 * e] : second_angles[2 * e - 8];
        const float sine = e < 4 ? first_angles[2 * e + 1] : second_angles[2 * e - 7];
        const float x = low[e], y = high[e];
        low[e] = x * cosine - y * sine;
        high[e] = y * cosine + x * sine;
      }
    }
    if (own_head >= num_heads) continue;
    // The planes of a page follow each other: V head i is plane H_kv + i.
    Bf16* const target =
        kv_head < 0 ? source : page + (kv_head * kBlockTokens + slot) * kHeadDim + column;
    const uint4 packed_low = Pack(low), packed_high = Pack(high);
    *reinterpret_cast<uint4*>(target) = packed_low;
    *reinterpret_cast<uint4*>(target + kHalf) = packed_high;
    if (kv_head >= 0 && sequence.not_finite != nullptr &&
        (AnyNotFinite(packed_low) || AnyNotFinite(packed_high))) {
      *sequence.not_finite = 1;
    }
  }
}

}  // namespace

cudaError_t LaunchRopeTable(const RopeTableParams& params, cudaStream_t stream) {
  const int64_t work = params.positions * params.half;
  RopeTableKernel<<<static_cast<unsigned>((work + 255) / 256), 256, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchRopeKvWrite(const RopeKvWriteParams& params, cudaStream_t stream) {
  if (params.num_sequences < 1 || params.num_sequences > kMaxSequences)
    return cudaErrorInvalidValue;
  int64_t rows = 0;
  for (int i = 0; i < params.num_sequences; ++i) rows += params.sequences[i].rows.num_rows;
  const auto grid = static_cast<unsigned>(rows);
  switch (params.kv.shape.head_dim) {
    case 64:
      RopeKvWriteKernel<64><<<grid, kThreads, 0, stream>>>(params);
      break;
    case 128:
      RopeKvWriteKernel<128><<<grid, kThreads, 0, stream>>>(params);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace headstart::cuda
