// Runs block selection on cases from standard input and writes what was kept to standard output,
// for proxy_attn_spec_test.py, which also defines both formats (write_case, read_result).
//
// Usage: proxy_attn_dump IMPLEMENTATION < cases > results
// IMPLEMENTATION: "Reference", or a name out of BackendsUnderTest(). Exit code 77: not on this
// machine.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/reference_selection.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_data.h"

namespace headstart::testing {
namespace {

constexpr int kSkipped = 77;

struct Case {
  HeadShape shape;
  DType dtype = DType::kF32;
  std::vector<int32_t> chunk_ends;  // rising; the last is the number of tokens
  bool ends_prompt = false;         // of the last chunk
  int32_t layer = 0;
  ProxyAttnOptions options;
  HostMatrix q;
  HostMatrix k;
};

template <typename T>
std::vector<T> ReadArray(int64_t count) {
  std::vector<T> values(count);
  HEADSTART_CHECK(std::fread(values.data(), sizeof(T), count, stdin) == values.size());
  return values;
}
int32_t ReadInt() { return ReadArray<int32_t>(1)[0]; }
float ReadFloat() { return ReadArray<float>(1)[0]; }
std::vector<int32_t> ReadInts() {
  const int32_t count = ReadInt();
  return ReadArray<int32_t>(count);
}

// `num_heads` has been read already: its absence is the end of the cases.
Case ReadCase(int32_t num_heads) {
  Case c;
  c.shape.num_heads = num_heads;
  c.shape.num_kv_heads = ReadInt();
  c.shape.head_dim = ReadInt();
  c.dtype = ReadInt() == 0 ? DType::kF32 : DType::kBF16;
  c.chunk_ends = ReadInts();
  c.ends_prompt = ReadInt() != 0;
  c.layer = ReadInt();
  ProxyAttnOptions& o = c.options;
  o.enabled = true;
  o.num_proxies = ReadInt();
  o.stride = ReadInt();
  o.budget = static_cast<BudgetRule>(ReadInt());
  o.floor_tokens = ReadInt();
  o.sink_blocks = ReadInt();
  o.local_blocks = ReadInt();
  o.dense_tail_blocks = ReadInt();
  o.dense_below_tokens = ReadInt();
  o.dense_layers = ReadInts();
  o.gamma = ReadFloat();
  o.dense_above_density = ReadFloat();
  o.forced_density = ReadFloat();
  c.q = HostMatrix(c.chunk_ends.back(), int64_t{num_heads} * c.shape.head_dim);
  c.k = HostMatrix(c.chunk_ends.back(), int64_t{c.shape.num_kv_heads} * c.shape.head_dim);
  c.q.values = ReadArray<float>(c.q.rows * c.q.cols);
  c.k.values = ReadArray<float>(c.k.rows * c.k.cols);
  return c;
}

template <typename T>
void WriteArray(const std::vector<T>& values) {
  const auto count = static_cast<int32_t>(values.size());
  HEADSTART_CHECK(std::fwrite(&count, sizeof(count), 1, stdout) == 1);
  HEADSTART_CHECK(std::fwrite(values.data(), sizeof(T), values.size(), stdout) == values.size());
}

void WriteSelection(const BlockSelection& s) {
  WriteArray<int32_t>({static_cast<int32_t>(s.first_row), static_cast<int32_t>(s.num_rows),
                       s.num_heads, s.num_proxies, s.dense_fallback ? 1 : 0});
  WriteArray(s.ranking);
  WriteArray(s.counts);
  WriteArray(s.budget_ratio);
}

HostMatrix Rows(const HostMatrix& x, int64_t begin, int64_t end) {
  HostMatrix rows(end - begin, x.cols);
  rows.values.assign(x.Row(begin), x.Row(begin) + rows.rows * x.cols);
  return rows;
}

absl::Status RunReference(const Case& c) {
  std::vector<float> budget_ratio(c.shape.num_heads);
  int64_t begin = 0;
  for (const int32_t end : c.chunk_ends) {
    reference::SelectionInput input;
    input.shape = c.shape;
    input.q = Rows(c.q, begin, end);
    input.k = Rows(c.k, 0, end);
    input.first_position = begin;
    input.dtype = c.dtype;
    input.layer = c.layer;
    input.ends_prompt = c.ends_prompt && end == c.chunk_ends.back();
    WriteSelection(reference::SelectBlocks(input, c.options, budget_ratio));
    begin = end;
  }
  return absl::OkStatus();
}

absl::Status RunBackend(Backend& backend, const Case& c) {
  if (c.dtype != backend.compute_dtype()) {
    return absl::InvalidArgumentError("the case is not of the backend's type");
  }
  const DeviceMatrix q = PutMatrix(backend, c.q, c.dtype);
  const Buffer budget_ratio = PutFloats(backend, std::vector<float>(c.shape.num_heads));
  const DeviceMatrix out = NewMatrix(backend, c.q.rows, c.q.cols, c.dtype);
  // Attention knows no layers: where one is dense, its caller says so.
  ProxyAttnOptions options = c.options;
  const auto& dense = options.dense_layers;
  if (std::find(dense.begin(), dense.end(), c.layer) != dense.end()) options.enabled = false;
  int64_t begin = 0;
  for (const int32_t end : c.chunk_ends) {
    // Keys that are still to come are NaN.
    const KvRows keys{Rows(c.k, 0, end), Rows(c.k, 0, end)};
    const DeviceKv kv = PutKv(backend, keys, c.shape, c.chunk_ends.back());
    BlockSelection selection;
    AttentionSequence sequence;
    sequence.rows = {begin, end - begin, begin, kv.table()};
    sequence.proxy_attn = &options;
    sequence.ends_prompt = c.ends_prompt && end == c.chunk_ends.back();
    sequence.budget_ratio = static_cast<float*>(budget_ratio.data());
    sequence.selection = &selection;
    HEADSTART_RETURN_IF_ERROR(backend.Attention({q.view, out.view, kv.view, {&sequence, 1}}));
    WriteSelection(selection);
    begin = end;
  }
  return absl::OkStatus();
}

int Main(const std::string& implementation) {
  std::unique_ptr<Backend> backend;
  if (implementation != "Reference") {
    auto opened = OpenBackend(implementation);
    if (!opened.ok()) {
      std::fprintf(stderr, "%s\n", opened.status().ToString().c_str());
      return IsMissingHere(opened.status()) ? kSkipped : 1;
    }
    backend = *std::move(opened);
  }
  int32_t num_heads = 0;
  while (std::fread(&num_heads, sizeof(num_heads), 1, stdin) == 1) {
    const Case c = ReadCase(num_heads);
    const absl::Status status = backend == nullptr ? RunReference(c) : RunBackend(*backend, c);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.ToString().c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace headstart::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s IMPLEMENTATION < cases > results\n", argv[0]);
    return 2;
  }
  return headstart::testing::Main(argv[1]);
}
