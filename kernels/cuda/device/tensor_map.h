// Tensor maps for the bulk copy engine, made on the host without linking libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace headstart::cuda {

// A bf16 tensor of four dimensions, the fastest (contiguous) first. Strides in elements.
struct TensorShape {
  const void* data = nullptr;  // 16-byte aligned
  int64_t size[4] = {};
  int64_t stride[3] = {};  // of dimensions 1, 2, 3; multiples of 8
};

// A map whose box is box_rows x 64 elements of dimensions 1 and 0, with the 128-byte swizzle.
// cudaErrorInvalidValue when the driver refuses the shape.
cudaError_t MakeTensorMap(const TensorShape& shape, int32_t box_rows, CUtensorMap* map);

}  // namespace headstart::cuda
