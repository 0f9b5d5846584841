// Times the operations of a backend one by one on the shapes of SmolLM2-135M (and attention with
// head_dim 128), and prints a table. Data are random; a time is the best of several runs.
//
// Usage: kernel_bench [--device cpu] [--dtype auto|bf16|f32] [--threads N] [--only SUBSTRING]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/base/dtype.h"

namespace headstart {
namespace {

constexpr double kMinSeconds = 0.5;  // per row of the table
constexpr int64_t kHidden = 576;
constexpr int64_t kFfn = 1536;
constexpr int64_t kVocab = 49152;

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
  std::exit(1);
}

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

struct Tensor {
  Buffer buffer;
  Matrix matrix;
};

class Bench {
 public:
  Bench(Backend& backend, std::string only) : backend_(backend), only_(std::move(only)) {}

  // Rows of the table: `amount` of work per run, in `unit`s of 1e9 per second. seconds: of the run
  // before, by another clock than the wall's.
  void Run(const std::string& name, double amount, const char* unit,
           const std::function<absl::Status()>& operation,
           const std::function<double()>& seconds = nullptr) {
    Must(operation());
    if (seconds) seconds();
    double best = 1e30;
    double total = 0;
    int runs = 0;
    while (total < kMinSeconds || runs < 3) {
      const auto start = std::chrono::steady_clock::now();
      Must(operation());
      const double taken =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      best = std::min(best, seconds ? seconds() : taken);
      total += taken;
      ++runs;
    }
    std::printf("| %-44s | %9.3f | %8.1f %-7s |\n", name.c_str(), best * 1e3, amount / best / 1e9,
                unit);
    std::fflush(stdout);
  }

  bool Wanted(const std::string& name) const { return name.find(only_) != std::string::npos; }

  Tensor Make(int64_t rows, int64_t cols, DType dtype) {
    Tensor tensor{Must(backend_.Allocate(rows * cols * DTypeBytes(dtype))), {}};
    tensor.matrix = {tensor.buffer.data(), dtype, rows, cols, cols};
    std::vector<float> values = Normal(rows * cols);
    if (dtype == DType::kF32) {
      Must(backend_.Upload(values.data(), tensor.buffer.bytes(), tensor.buffer.data()));
    } else {
      std::vector<BFloat16> rounded(values.begin(), values.end());
      Must(backend_.Upload(rounded.data(), tensor.buffer.bytes(), tensor.buffer.data()));
    }
    return tensor;
  }

  void Linear(const char* what, int64_t rows, int64_t in, int64_t out, LinearOutput mode);
  void Elementwise(int64_t rows);
  void Rope(int64_t rows);
  void Quantize(const HeadShape& shape, int64_t num_tokens);
  void Attention(const HeadShape& shape, int64_t first_position, int64_t rows);
  void Select(const HeadShape& shape, int64_t rows, int32_t num_proxies, int32_t stride);

 private:
  std::vector<float> Normal(int64_t count) {
    std::vector<float> values(count);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random_);
    return values;
  }

  Backend& backend_;
  const std::string only_;
  std::mt19937 random_{1};
};

// Pages of one layer filled with random values, in reverse order.
struct Cache {
  Tensor pages;
  std::vector<int32_t> table;
  Buffer device_table;
  KvPages kv;

  const int32_t* page_table() const { return static_cast<const int32_t*>(device_table.data()); }
};

Cache MakeCache(Bench& bench, Backend& backend, const HeadShape& shape, int64_t num_tokens) {
  Cache cache;
  cache.kv.shape = shape;
  cache.kv.dtype = backend.compute_dtype();
  const int64_t blocks = NumBlocks(num_tokens);
  cache.pages = bench.Make(blocks, cache.kv.page_elements(), cache.kv.dtype);
  for (int64_t i = 0; i < blocks; ++i) cache.table.push_back(static_cast<int32_t>(blocks - 1 - i));
  cache.device_table = Must(backend.Allocate(blocks * int64_t{sizeof(int32_t)}));
  Must(backend.Upload(cache.table.data(), cache.device_table.bytes(), cache.device_table.data()));
  cache.kv.pages = cache.pages.buffer.data();
  return cache;
}

void Bench::Linear(const char* what, int64_t rows, int64_t in, int64_t out, LinearOutput mode) {
  const std::string name = "Linear " + std::string(what) + " [" + std::to_string(rows) + ", " +
                           std::to_string(in) + "] x [" + std::to_string(out) + "]";
  if (!Wanted(name)) return;
  const std::vector<float> values = Normal(in * out);
  const HostTensor part{values.data(), DType::kF32, out, in};
  const auto weight = Must(backend_.PrepareLinear({&part, 1}, {}));
  const DType dtype = backend_.compute_dtype();
  const Tensor x = Make(rows, in, dtype);
  const Tensor y = Make(rows, out, mode == LinearOutput::kAdd ? backend_.residual_dtype() : dtype);
  if (rows == 1) {
    const double bytes = static_cast<double>(in * out * DTypeBytes(dtype));
    Run(name, bytes, "GB/s", [&] { return backend_.Linear(*weight, x.matrix, y.matrix, mode); });
  } else {
    const double flop = 2.0 * static_cast<double>(rows * in * out);
    Run(name, flop, "GFLOP/s", [&] { return backend_.Linear(*weight, x.matrix, y.matrix, mode); });
  }
}

void Bench::Elementwise(int64_t rows) {
  const DType dtype = backend_.compute_dtype();
  const std::string count = " [" + std::to_string(rows);
  if (const std::string name = "RmsNorm" + count + ", 576]"; Wanted(name)) {
    const Tensor x = Make(rows, kHidden, backend_.residual_dtype());
    const Tensor y = Make(rows, kHidden, dtype);
    const Tensor w = Make(1, kHidden, DType::kF32);
    Run(name, static_cast<double>(x.buffer.bytes() + y.buffer.bytes()), "GB/s",
        [&] { return backend_.RmsNorm(x.matrix, w.buffer, 1e-5f, y.matrix); });
  }
  if (const std::string name = "SwiGlu" + count + ", 2 x 1536]"; Wanted(name)) {
    const Tensor gate_up = Make(rows, 2 * kFfn, dtype);
    const Tensor y = Make(rows, kFfn, dtype);
    Run(name, static_cast<double>(gate_up.buffer.bytes() + y.buffer.bytes()), "GB/s",
        [&] { return backend_.SwiGlu(gate_up.matrix, y.matrix); });
  }
  if (const std::string name = "Embed" + count + ", 576]"; Wanted(name)) {
    const Tensor table = Make(kVocab, kHidden, dtype);
    const Tensor y = Make(rows, kHidden, backend_.residual_dtype());
    std::vector<int32_t> ids(rows);
    for (int32_t& id : ids) id = static_cast<int32_t>(random_() % kVocab);
    Run(name, static_cast<double>(y.buffer.bytes()), "GB/s",
        [&] { return backend_.Embed(ids, table.buffer, y.matrix); });
  }
}

void Bench::Rope(int64_t rows) {
  const HeadShape shape{9, 3, 64};
  const Cache cache = MakeCache(*this, backend_, shape, rows);
  if (const std::string name = "RopeAndStoreKv [" + std::to_string(rows) + ", 960]"; Wanted(name)) {
    const std::vector<float> inv_freq(32, 0.1f);
    const auto rope = Must(backend_.PrepareRope(inv_freq, 1.0f, rows));
    const Tensor qkv = Make(rows, shape.qkv_cols(), backend_.compute_dtype());
    RopeArgs args;
    const RopeSequence sequence{{0, rows, 0, cache.page_table()}, nullptr};
    args.qkv = qkv.matrix;
    args.sequences = {&sequence, 1};
    args.rope = rope.get();
    args.kv = cache.kv;
    Run(name, static_cast<double>(2 * qkv.buffer.bytes()), "GB/s",
        [&] { return backend_.RopeAndStoreKv(args); });
  }
}

// What is read and written. A run is several calls and a wait for a device that runs behind us.
void Bench::Quantize(const HeadShape& shape, int64_t num_tokens) {
  constexpr int kCalls = 8;
  const std::string name = "QuantizeKv " + std::to_string(shape.num_kv_heads) + " heads, d " +
                           std::to_string(shape.head_dim) + ", " + std::to_string(num_tokens);
  if (!Wanted(name)) return;
  const Cache cache = MakeCache(*this, backend_, shape, num_tokens);
  std::vector<KvPageTokens> pages;
  for (const int32_t page : cache.table) pages.push_back({page, kBlockTokens});
  const int64_t out_bytes = static_cast<int64_t>(pages.size()) * Fp8PageBytes(shape);
  const Buffer out = Must(backend_.Allocate(out_bytes));
  Run(name, kCalls * static_cast<double>(cache.pages.buffer.bytes() + out_bytes), "GB/s", [&] {
    for (int i = 0; i < kCalls; ++i) Must(backend_.QuantizeKv({cache.kv, pages, out.data()}));
    return backend_.TakeTimes().status();
  });
}

// Work of exact causal attention, both products: what lies above the diagonal is not counted.
double AttentionFlop(const HeadShape& shape, int64_t first_position, int64_t rows) {
  double pairs = 0;
  for (int64_t r = 0; r < rows; ++r) pairs += static_cast<double>(first_position + r + 1);
  return 4.0 * pairs * shape.num_heads * shape.head_dim;
}

void Bench::Attention(const HeadShape& shape, int64_t first_position, int64_t rows) {
  const std::string name = "Attention " + std::to_string(shape.num_heads) + "/" +
                           std::to_string(shape.num_kv_heads) + " heads, d " +
                           std::to_string(shape.head_dim) + ", " + std::to_string(rows) + " at " +
                           std::to_string(first_position);
  if (!Wanted(name)) return;
  const int64_t tokens = first_position + rows;
  const Cache cache = MakeCache(*this, backend_, shape, tokens);
  const int64_t cols = int64_t{shape.num_heads} * shape.head_dim;
  const Tensor q = Make(rows, cols, cache.kv.dtype);
  const Tensor out = Make(rows, cols, cache.kv.dtype);
  AttentionSequence sequence;
  sequence.rows = {0, rows, first_position, cache.page_table()};
  const AttentionArgs args{q.matrix, out.matrix, cache.kv, {&sequence, 1}};
  if (rows == 1) {
    const double bytes = static_cast<double>(2 * tokens * shape.num_kv_heads * shape.head_dim *
                                             DTypeBytes(cache.kv.dtype));
    Run(name, bytes, "GB/s", [&] { return backend_.Attention(args); });
  } else {
    Run(name, AttentionFlop(shape, first_position, rows), "GFLOP/s",
        [&] { return backend_.Attention(args); });
  }
}

// Selection alone: what its clock says of attention over selected blocks.
void Bench::Select(const HeadShape& shape, int64_t rows, int32_t num_proxies, int32_t stride) {
  const std::string name = "Selection " + std::to_string(shape.num_heads) + "/" +
                           std::to_string(shape.num_kv_heads) + " heads, d " +
                           std::to_string(shape.head_dim) + ", " + std::to_string(rows) + ", g " +
                           std::to_string(num_proxies) + ", s " + std::to_string(stride);
  if (!Wanted(name)) return;
  const Cache cache = MakeCache(*this, backend_, shape, rows);
  const Tensor q = Make(rows, int64_t{shape.num_heads} * shape.head_dim, cache.kv.dtype);
  const Tensor out = Make(rows, q.matrix.cols, cache.kv.dtype);
  const Tensor budget_ratio = Make(1, shape.num_heads, DType::kF32);
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = num_proxies;
  options.stride = stride;
  AttentionSequence sequence;
  sequence.rows = {0, rows, 0, cache.page_table()};
  sequence.proxy_attn = &options;
  sequence.ends_prompt = true;
  sequence.budget_ratio = static_cast<float*>(budget_ratio.buffer.data());
  const AttentionArgs args{q.matrix, out.matrix, cache.kv, {&sequence, 1}};
  // Logits of the proxies, and of the last query block against all keys.
  const double samples = static_cast<double>(rows) / stride;
  const double logits = num_proxies * samples * samples / 2 +
                        static_cast<double>(shape.num_heads * kBlockTokens * rows);
  Run(
      name, 2 * logits * shape.head_dim, "GFLOP/s", [&] { return backend_.Attention(args); },
      [&] { return Must(backend_.TakeTimes()).selection_seconds; });
}

void RunAll(Backend& backend, const std::string& only) {
  std::printf("%s\n\n| %-44s | %9s | %16s |\n|---|---|---|\n", backend.device().c_str(),
              "operation", "ms", "rate");
  Bench bench(backend, only);
  for (int64_t rows : {1, 128, 1000, 8128}) {
    bench.Linear("qkv", rows, kHidden, 960, LinearOutput::kStore);
    bench.Linear("output +=", rows, kHidden, kHidden, LinearOutput::kAdd);
    bench.Linear("gate_up", rows, kHidden, 2 * kFfn, LinearOutput::kStore);
    bench.Linear("down +=", rows, kFfn, kHidden, LinearOutput::kAdd);
  }
  bench.Linear("lm_head", 1, kHidden, kVocab, LinearOutput::kStore);
  bench.Elementwise(512);
  bench.Elementwise(8128);
  bench.Rope(8128);
  bench.Quantize({9, 3, 64}, 8192);
  bench.Quantize({32, 8, 128}, 32768);
  const HeadShape smol{9, 3, 64};
  for (int64_t rows : {128, 1024, 4096, 8128}) bench.Attention(smol, 0, rows);
  bench.Attention(smol, 8000, 128);
  for (int64_t rows : {1, 4, 8}) bench.Attention(smol, 8000, rows);
  bench.Select(smol, 8128, 9, 16);
  bench.Select(smol, 8128, 9, 4);
  bench.Select(smol, 8128, 1, 4);
  bench.Attention({12, 2, 128}, 0, 4096);
  bench.Attention({12, 2, 128}, 8000, 1);
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) {
  headstart::BackendOptions options;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    const std::string value = argv[i + 1];
    if (flag == "--device") options.device = value;
    if (flag == "--threads") options.num_threads = std::atoi(value.c_str());
    if (flag == "--only") only = value;
    if (flag == "--dtype" && value == "bf16") options.dtype = headstart::ComputeDType::kBF16;
    if (flag == "--dtype" && value == "f32") options.dtype = headstart::ComputeDType::kF32;
  }
  const auto backend = headstart::Must(headstart::MakeBackend(options));
  headstart::RunAll(*backend, only);
  return 0;
}
