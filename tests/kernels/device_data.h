// Matrices and KV caches in the memory of a backend under test. Everything that an operation must
// not read is NaN.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/reference_ops.h"

namespace headstart::testing {

using reference::HostMatrix;
using reference::KvRows;

// Standard normal values times `scale`, rounded to `dtype`; the same for the same seed.
HostMatrix RandomMatrix(int64_t rows, int64_t cols, uint32_t seed, DType dtype, float scale = 1);
HostMatrix AbsoluteValues(HostMatrix x);

// A matrix in a backend's memory, with NaN between its rows.
struct DeviceMatrix {
  Buffer memory;
  Matrix view;
};

// One sequence's KV cache: a shuffled page table, and pages that are NaN but for its tokens.
struct DeviceKv {
  Buffer pages;
  Buffer page_table;
  KvPages view;
  std::vector<int32_t> host_page_table;

  const int32_t* table() const { return static_cast<const int32_t*>(page_table.data()); }
};

// These end the process when the backend fails: they are no part of what is tested.
DeviceMatrix NewMatrix(Backend& backend, int64_t rows, int64_t cols, DType dtype);  // all NaN
DeviceMatrix PutMatrix(Backend& backend, const HostMatrix& values, DType dtype);
HostMatrix GetMatrix(Backend& backend, const Matrix& matrix);
// Pages of the backend's compute type with room for capacity_tokens, at least those of `kv`.
DeviceKv PutKv(Backend& backend, const KvRows& kv, const HeadShape& shape, int64_t capacity_tokens);
KvRows GetKv(Backend& backend, const DeviceKv& kv, int64_t num_tokens);
Buffer PutFloats(Backend& backend, const std::vector<float>& values);
Buffer NewCounts(Backend& backend);  // one BlockCounts of zeros
BlockCounts GetCounts(Backend& backend, const Buffer& counts);

}  // namespace headstart::testing
