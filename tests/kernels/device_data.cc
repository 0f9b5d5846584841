#include "tests/kernels/device_data.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <random>

#include "kernels/base/check.h"

namespace headstart::testing {
namespace {

// Elements from the end of a row to the start of the next.
constexpr int64_t kPadding = 8;

// Bytes of 0xff are NaN in f32 and in bf16.
std::vector<std::byte> NanBytes(int64_t count) {
  return std::vector<std::byte>(count, std::byte{0xff});
}

int64_t BytesOf(const Matrix& m) { return m.rows * m.row_stride * DTypeBytes(m.dtype); }

// The parameters of `view` on host memory.
Matrix HostView(const Matrix& view, std::vector<std::byte>& memory) {
  Matrix host = view;
  host.data = memory.data();
  return host;
}

KvPages HostView(const DeviceKv& kv, std::vector<std::byte>& memory) {
  KvPages host = kv.view;
  host.pages = memory.data();
  return host;
}

Buffer Upload(Backend& backend, const void* data, int64_t bytes) {
  auto buffer = backend.Allocate(bytes);
  HEADSTART_CHECK(buffer.ok());
  HEADSTART_CHECK(backend.Upload(data, bytes, buffer->data()).ok());
  return *std::move(buffer);
}

}  // namespace

HostMatrix RandomMatrix(int64_t rows, int64_t cols, uint32_t seed, DType dtype, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  HostMatrix x(rows, cols);
  for (float& value : x.values) value = reference::RoundTo(normal(random), dtype);
  return x;
}

HostMatrix AbsoluteValues(HostMatrix x) {
  for (float& value : x.values) value = std::abs(value);
  return x;
}

DeviceMatrix NewMatrix(Backend& backend, int64_t rows, int64_t cols, DType dtype) {
  DeviceMatrix matrix;
  matrix.view = {nullptr, dtype, rows, cols, cols + kPadding};
  matrix.memory = Upload(backend, NanBytes(BytesOf(matrix.view)).data(), BytesOf(matrix.view));
  matrix.view.data = matrix.memory.data();
  return matrix;
}

DeviceMatrix PutMatrix(Backend& backend, const HostMatrix& values, DType dtype) {
  DeviceMatrix matrix = NewMatrix(backend, values.rows, values.cols, dtype);
  std::vector<std::byte> host = NanBytes(BytesOf(matrix.view));
  reference::Store(values, HostView(matrix.view, host));
  HEADSTART_CHECK(backend.Upload(host.data(), host.size(), matrix.memory.data()).ok());
  return matrix;
}

HostMatrix GetMatrix(Backend& backend, const Matrix& matrix) {
  // The last row may end with its last column: what follows is not the matrix's.
  const int64_t elements = (matrix.rows - 1) * matrix.row_stride + matrix.cols;
  std::vector<std::byte> host(elements * DTypeBytes(matrix.dtype));
  HEADSTART_CHECK(backend.Download(matrix.data, host.size(), host.data()).ok());
  return reference::Load(HostView(matrix, host));
}

DeviceKv PutKv(Backend& backend, const KvRows& kv, const HeadShape& shape,
               int64_t capacity_tokens) {
  HEADSTART_CHECK(capacity_tokens >= kv.k.rows);
  DeviceKv device;
  const int64_t blocks = NumBlocks(capacity_tokens);
  const int64_t pool_pages = blocks + 2;
  std::vector<int32_t> pages(pool_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(static_cast<uint32_t>(blocks)));
  device.host_page_table.assign(pages.begin(), pages.begin() + blocks);
  device.view.dtype = backend.compute_dtype();
  device.view.shape = shape;

  std::vector<std::byte> host =
      NanBytes(pool_pages * device.view.page_elements() * DTypeBytes(backend.compute_dtype()));
  reference::StoreKv(kv, 0, HostView(device, host), device.host_page_table.data());
  device.pages = Upload(backend, host.data(), static_cast<int64_t>(host.size()));
  device.page_table =
      Upload(backend, device.host_page_table.data(), blocks * int64_t{sizeof(int32_t)});
  device.view.pages = device.pages.data();
  return device;
}

KvRows GetKv(Backend& backend, const DeviceKv& kv, int64_t num_tokens) {
  std::vector<std::byte> host(kv.pages.bytes());
  HEADSTART_CHECK(backend.Download(kv.pages.data(), host.size(), host.data()).ok());
  return reference::LoadKv(HostView(kv, host), kv.host_page_table.data(), num_tokens);
}

Buffer PutFloats(Backend& backend, const std::vector<float>& values) {
  return Upload(backend, values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
}

Buffer NewCounts(Backend& backend) {
  const BlockCounts zeros;
  return Upload(backend, &zeros, sizeof(zeros));
}

BlockCounts GetCounts(Backend& backend, const Buffer& counts) {
  BlockCounts host;
  HEADSTART_CHECK(backend.Download(counts.data(), sizeof(host), &host).ok());
  return host;
}

}  // namespace headstart::testing
