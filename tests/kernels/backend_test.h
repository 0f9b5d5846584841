// What the tests of all operations share: the backends under test, and matrices and KV caches in
// their memory. Everything that an operation must not read is NaN.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/reference_ops.h"

namespace headstart::testing {

using reference::HostMatrix;
using reference::KvRows;

// A backend as tests open it.
struct BackendCase {
  std::string name;
  BackendOptions options;
  std::string cpu_isa;  // HEADSTART_CPU_ISA; empty: the machine's best
};

// All that this build can have: bf16 and f32, and f32 on every instruction set.
std::vector<BackendCase> BackendsUnderTest();
// For names of test cases, and as gtest prints a parameter.
inline std::string NameOf(const BackendCase& backend) { return backend.name; }
void PrintTo(const BackendCase& backend, std::ostream* os);

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
  int64_t pool_pages = 0;
};

class BackendTest : public ::testing::Test {
 protected:
  // Opens the backend, or skips the test when this machine lacks its device or instructions.
  void Open(const BackendCase& backend);
  DType dtype() const { return backend_->compute_dtype(); }

  DeviceMatrix Put(const HostMatrix& values, DType dtype);
  DeviceMatrix NewMatrix(int64_t rows, int64_t cols, DType dtype);  // all NaN
  HostMatrix Get(const Matrix& matrix);
  // Fails the test when something was written between the rows.
  void ExpectPaddingUntouched(const DeviceMatrix& matrix);

  // `capacity_tokens` is at least kv.k.rows; only the rows of kv are written.
  DeviceKv PutKv(const KvRows& kv, const HeadShape& shape, int64_t capacity_tokens);
  KvRows GetKv(const DeviceKv& kv, int64_t num_tokens);

  std::unique_ptr<Backend> backend_;

 private:
  Buffer Allocate(int64_t bytes);
  Buffer Upload(const void* data, int64_t bytes);
};

}  // namespace headstart::testing
