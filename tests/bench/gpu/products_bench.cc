// Matrix products of Llama-3.1-8B's shapes by number of rows: with algorithms that give a row the
// bits that it gets alone, against whatever is fastest.
//
//   products_bench [--repeat N] [--only NAME]
//
// A line a product and number of rows: microseconds (the best of N runs of kProducts each) both
// ways, and how many times the second the first takes. A last line for each number of rows sums up
// the four products of a layer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/stopwatch.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr int kProducts = 20;

struct Product {
  const char* name;
  int64_t in_features, out_features;
  LinearOutput mode;
  bool of_a_layer;
};
constexpr Product kAll[] = {
    {"qkv", 4096, 6144, LinearOutput::kStore, true},
    {"output", 4096, 4096, LinearOutput::kAdd, true},
    {"gate_up", 4096, 28672, LinearOutput::kStore, true},
    {"down", 14336, 4096, LinearOutput::kAdd, true},
    {"vocabulary", 4096, 128256, LinearOutput::kStore, false},
};

std::vector<int64_t> RowsOf(const Product& product) {
  if (!product.of_a_layer) return {1, 2, 4, 8, 16, 32, 64};  // one for each prompt of a step
  return {1, 16, 128, 256, 512, 1024, 2048, 4096, 8192};
}

// By number of rows: seconds of one product.
using Times = std::map<int64_t, double>;

absl::StatusOr<double> TimeOnce(Backend& backend, const LinearWeight& weight, const Matrix& in,
                                const Matrix& out, LinearOutput mode) {
  HEADSTART_RETURN_IF_ERROR(backend.TakeTimes().status());  // waits
  const Stopwatch stopwatch;
  for (int i = 0; i < kProducts; ++i) {
    HEADSTART_RETURN_IF_ERROR(backend.Linear(weight, in, out, mode));
  }
  HEADSTART_RETURN_IF_ERROR(backend.TakeTimes().status());
  return stopwatch.seconds() / kProducts;
}

absl::StatusOr<Buffer> Filled(Backend& backend, int64_t elements) {
  std::vector<BFloat16> values(static_cast<size_t>(elements));
  uint32_t state = 1;
  for (BFloat16& value : values) {
    state = state * 1664525u + 1013904223u;  // Numerical Recipes
    value = BFloat16(static_cast<float>(state >> 8) * 0x1p-23f - 1.0f);
  }
  HEADSTART_ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(elements * 2));
  HEADSTART_RETURN_IF_ERROR(backend.Upload(values.data(), elements * 2, buffer.data()));
  return buffer;
}

absl::StatusOr<Times> Measure(const Product& product, bool fastest, int repeat) {
  HEADSTART_ASSIGN_OR_RETURN(const auto backend,
                             MakeBackend({.device = "cuda", .fastest_products = fastest}));
  const std::vector<int64_t> all_rows = RowsOf(product);
  const int64_t max_rows = all_rows.back();
  const std::vector<BFloat16> values(
      static_cast<size_t>(product.in_features * product.out_features), BFloat16(0.01f));
  const HostTensor tensor{values.data(), DType::kBF16, product.out_features, product.in_features};
  HEADSTART_ASSIGN_OR_RETURN(const auto weight, backend->PrepareLinear({&tensor, 1}, {}));
  HEADSTART_ASSIGN_OR_RETURN(const Buffer in, Filled(*backend, max_rows * product.in_features));
  const DType out_dtype = product.of_a_layer ? DType::kBF16 : DType::kF32;
  HEADSTART_ASSIGN_OR_RETURN(
      const Buffer out, backend->Allocate(max_rows * product.out_features * DTypeBytes(out_dtype)));
  Times times;
  for (const int64_t rows : all_rows) {
    const Matrix x{in.data(), DType::kBF16, rows, product.in_features, product.in_features};
    const Matrix y{out.data(), out_dtype, rows, product.out_features, product.out_features};
    HEADSTART_RETURN_IF_ERROR(backend->Linear(*weight, x, y, product.mode));  // searches
    double best = 1e30;
    for (int i = 0; i < repeat; ++i) {
      HEADSTART_ASSIGN_OR_RETURN(const double seconds,
                                 TimeOnce(*backend, *weight, x, y, product.mode));
      best = std::min(best, seconds);
    }
    times[rows] = best;
  }
  return times;
}

void Print(const char* name, int64_t rows, double invariant, double fastest) {
  std::printf("| %-10s | %5lld | %9.1f | %9.1f | %6.3f |\n", name, static_cast<long long>(rows),
              invariant * 1e6, fastest * 1e6, invariant / fastest);
  std::fflush(stdout);
}

absl::Status Run(const std::string& only, int repeat) {
  std::printf("| product    |  rows | invariant |   fastest |  times |\n");
  std::printf("|------------|-------|-----------|-----------|--------|\n");
  Times layer_invariant, layer_fastest;
  for (const Product& product : kAll) {
    if (!only.empty() && only != product.name) continue;
    HEADSTART_ASSIGN_OR_RETURN(const Times invariant, Measure(product, false, repeat));
    HEADSTART_ASSIGN_OR_RETURN(const Times fastest, Measure(product, true, repeat));
    for (const auto& [rows, seconds] : invariant) {
      Print(product.name, rows, seconds, fastest.at(rows));
      if (!product.of_a_layer) continue;
      layer_invariant[rows] += seconds;
      layer_fastest[rows] += fastest.at(rows);
    }
  }
  for (const auto& [rows, seconds] : layer_invariant) {
    Print("all four", rows, seconds, layer_fastest.at(rows));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) {
  std::string only;
  int repeat = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--only") only = argv[i + 1];
    if (name == "--repeat") repeat = std::atoi(argv[i + 1]);
  }
  const absl::Status status = headstart::Run(only, repeat);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
