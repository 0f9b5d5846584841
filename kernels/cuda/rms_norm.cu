#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;

// One CTA a row; the second pass over the row finds it in L1.
__global__ void __launch_bounds__(kThreads) RmsNormKernel(const RmsNormParams params) {
  __shared__ float scratch[kThreads / 32];
  const int vectors = static_cast<int>(params.hidden / 8);
  const auto* x = static_cast<const uint4*>(params.x) + int64_t{blockIdx.x} * params.x_stride / 8;
  auto* out = static_cast<uint4*>(params.out) + int64_t{blockIdx.x} * params.out_stride / 8;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const Float8 v = Unpack(x[i]);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += v[e] * v[e];
  }
  sum = BlockSum<kThreads>(sum, scratch);
  const float inverse = rsqrtf(sum / static_cast<float>(params.hidden) + params.eps);
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    Float8 v = Unpack(x[i]);
    const Float8 weight = LoadFloat8(params.weight + 8 * i);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] *= inverse * weight[e];
    out[i] = Pack(v);
  }
}

}  // namespace

cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  RmsNormKernel<<<static_cast<unsigned>(params.rows), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
