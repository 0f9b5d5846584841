// What the tests of all operations share.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>

#include "kernels/backend.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_data.h"

namespace headstart::testing {

class BackendTest : public ::testing::Test {
 protected:
  // Opens the backend, or skips the test when this machine lacks its device or instructions.
  void Open(const BackendCase& backend);
  DType dtype() const { return backend_->compute_dtype(); }

  DeviceMatrix Put(const HostMatrix& values, DType dtype) {
    return PutMatrix(*backend_, values, dtype);
  }
  DeviceMatrix NewMatrix(int64_t rows, int64_t cols, DType dtype) {
    return testing::NewMatrix(*backend_, rows, cols, dtype);
  }
  HostMatrix Get(const Matrix& matrix) { return GetMatrix(*backend_, matrix); }
  DeviceKv PutKv(const KvRows& kv, const HeadShape& shape, int64_t capacity_tokens) {
    return testing::PutKv(*backend_, kv, shape, capacity_tokens);
  }
  KvRows GetKv(const DeviceKv& kv, int64_t num_tokens) {
    return testing::GetKv(*backend_, kv, num_tokens);
  }
  // Fails the test when something was written between the rows.
  void ExpectPaddingUntouched(const DeviceMatrix& matrix);

  std::unique_ptr<Backend> backend_;
};

}  // namespace headstart::testing
