// Views of memory: who made the memory owns it, a view never does.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace headstart {

// Rows of a dense matrix in a backend's memory. Element (r, c) is element r * row_stride + c of
// `data`.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // elements

  Matrix Rows(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * row_stride * DTypeBytes(dtype), dtype, count, cols,
            row_stride};
  }
  Matrix Cols(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * DTypeBytes(dtype), dtype, rows, count, row_stride};
  }
  template <typename T>
  T* Row(int64_t r) const {
    return static_cast<T*>(data) + r * row_stride;
  }
};

// A weight as it lies in a model file, in host memory that outlives the call it is passed to.
// Row-major [rows, cols]; a vector has rows == 1.
struct HostTensor {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
};

}  // namespace headstart
