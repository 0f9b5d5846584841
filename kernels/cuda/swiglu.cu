#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int kThreads = 256;

// A thread makes eight columns of a row (blockIdx.y).
__global__ void __launch_bounds__(kThreads) SwiGluKernel(const SwiGluParams params) {
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 8, row = blockIdx.x;
  if (column >= params.cols) return;
  const auto* in = static_cast<const Bf16*>(params.gate_up) + row * params.gate_up_stride + column;
  const Float8 gate = Unpack(*reinterpret_cast<const uint4*>(in));
  Float8 value = Unpack(*reinterpret_cast<const uint4*>(in + params.cols));
#pragma unroll
  for (int e = 0; e < 8; ++e) value[e] *= __fdividef(gate[e], 1.0f + __expf(-gate[e]));
  *reinterpret_cast<uint4*>(static_cast<Bf16*>(params.out) + row * params.out_stride + column) =
      Pack(value);
}

}  // namespace

cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.rows),
                  static_cast<unsigned>((params.cols / 8 + kThreads - 1) / kThreads));
  SwiGluKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headstart::cuda
