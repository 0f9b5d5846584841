// Attention of every backend against the reference: dense and over selected blocks, chunks,
// permuted pages, poisoned memory, large logits, repeats, threads.
#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <tuple>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

struct AttentionShape {
  HeadShape heads;
  int64_t rows;
  int64_t first_position = 0;
  float q_scale = 1;
};
std::string NameOf(const AttentionShape& s) {
  return std::to_string(s.heads.num_heads) + "q" + std::to_string(s.heads.num_kv_heads) + "kv" +
         std::to_string(s.heads.head_dim) + "d_" + std::to_string(s.rows) + "at" +
         std::to_string(s.first_position) + (s.q_scale == 1 ? "" : "_large");
}
void PrintTo(const AttentionShape& shape, std::ostream* os) { *os << NameOf(shape); }

std::string CaseName(
    const ::testing::TestParamInfo<std::tuple<BackendCase, AttentionShape>>& info) {
  return NameOf(std::get<0>(info.param)) + "_" + NameOf(std::get<1>(info.param));
}

// Rows that are compared: all of a short chunk, else both sides of some block borders, the ends,
// and a few more.
std::vector<int64_t> CheckedRows(int64_t rows) {
  std::set<int64_t> checked;
  if (rows <= 260) {
    for (int64_t r = 0; r < rows; ++r) checked.insert(r);
    return {checked.begin(), checked.end()};
  }
  for (const int64_t r : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{128}, int64_t{255},
                          int64_t{256}, rows - 2, rows - 1, (rows - 1) / 128 * 128}) {
    checked.insert(r);
  }
  std::mt19937 random(5);
  while (checked.size() < 24) checked.insert(random() % rows);
  return {checked.begin(), checked.end()};
}

HostMatrix PickRows(const HostMatrix& x, const std::vector<int64_t>& rows) {
  HostMatrix picked(static_cast<int64_t>(rows.size()), x.cols);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(x.Row(rows[i]), x.cols, picked.Row(static_cast<int64_t>(i)));
  }
  return picked;
}

class AttentionTest
    : public BackendTest,
      public ::testing::WithParamInterface<std::tuple<BackendCase, AttentionShape>> {
 protected:
  void SetUp() override {
    Open(std::get<0>(GetParam()));
    if (IsSkipped()) return;
    if (backend_->name() == "cuda" && heads().head_dim != 64 && heads().head_dim != 128) {
      GTEST_SKIP() << "the CUDA kernels take head_dim 64 and 128";
    }
    const int64_t kv_cols = int64_t{heads().num_kv_heads} * heads().head_dim;
    q_ = RandomMatrix(shape().rows, int64_t{heads().num_heads} * heads().head_dim, 1, dtype(),
                      shape().q_scale);
    kv_ = {RandomMatrix(end(), kv_cols, 2, dtype()), RandomMatrix(end(), kv_cols, 3, dtype())};
  }
  const AttentionShape& shape() const { return std::get<1>(GetParam()); }
  const HeadShape& heads() const { return shape().heads; }
  int64_t end() const { return shape().first_position + shape().rows; }

  struct Result {
    HostMatrix out;
    BlockSelection selection;  // with options
    BlockCounts counts;
  };
  // Runs the chunk, dense without options.
  Result Run(const DeviceMatrix& q, const DeviceKv& kv, const ProxyAttnOptions* options,
             bool ends_prompt = false) {
    Result result;
    const DeviceMatrix out = NewMatrix(q_.rows, q_.cols, dtype());
    const Buffer budget_ratio = PutFloats(*backend_, std::vector<float>(heads().num_heads));
    const Buffer counts = NewCounts(*backend_);
    AttentionSequence sequence;
    sequence.rows = {0, q_.rows, shape().first_position, kv.table()};
    sequence.proxy_attn = options;
    sequence.ends_prompt = ends_prompt;
    sequence.budget_ratio = static_cast<float*>(budget_ratio.data());
    sequence.counts = static_cast<BlockCounts*>(counts.data());
    if (options != nullptr) sequence.selection = &result.selection;
    EXPECT_OK(backend_->Attention({q.view, out.view, kv.view, {&sequence, 1}}));
    ExpectPaddingUntouched(out);
    result.out = Get(out.view);
    result.counts = GetCounts(*backend_, counts);
    return result;
  }

  void ExpectReference(const HostMatrix& actual, const BlockSelection* selection) {
    const std::vector<int64_t> rows = CheckedRows(shape().rows);
    HostMatrix expected(static_cast<int64_t>(rows.size()), q_.cols);
    HostMatrix scale = expected;
    const KvRows absolute{kv_.k, AbsoluteValues(kv_.v)};
    for (size_t i = 0; i < rows.size(); ++i) {
      const HostMatrix q = PickRows(q_, {rows[i]});
      const int64_t position = shape().first_position + rows[i];
      const auto row = static_cast<int64_t>(i);
      const HostMatrix out = reference::Attention(q, kv_, heads(), position, selection);
      const HostMatrix sum = reference::Attention(q, absolute, heads(), position, selection);
      std::copy_n(out.Row(0), q_.cols, expected.Row(row));
      std::copy_n(sum.Row(0), q_.cols, scale.Row(row));
    }
    EXPECT_TRUE(TensorsMatch(
        PickRows(actual, rows).values, expected.values,
        {.abs = RelativeErrorOfP(), .rel = UnitRoundoff(dtype()), .scale = scale.values}));
  }

 private:
  // Relative error of a probability: the absolute error of its logit (a dot product of d terms of
  // at most |q| |k| / sqrt(d) together, and its scaling, each twice: here and in the row's
  // maximum), the exponential, the row's sum, and in bf16 one rounding before it is multiplied by
  // v.
  double RelativeErrorOfP() const {
    const double d = heads().head_dim;
    const double greatest_logit = GreatestNorm(q_) * GreatestNorm(kv_.k) / std::sqrt(d);
    const double logit = 2 * (2 + std::sqrt(d)) * greatest_logit;
    const double sum = std::sqrt(static_cast<double>(end()));
    const double bf16 = dtype() == DType::kBF16 ? UnitRoundoff(dtype()) + 1e-4 : 0;
    return (16 + logit + sum) * UnitRoundoff(DType::kF32) + bf16;
  }
  // Greatest Euclidean norm of a head.
  double GreatestNorm(const HostMatrix& x) const {
    double greatest = 0;
    for (int64_t i = 0; i < x.rows * x.cols; i += heads().head_dim) {
      double sum = 0;
      for (int64_t c = i; c < i + heads().head_dim; ++c) sum += double{x.values[c]} * x.values[c];
      greatest = std::max(greatest, std::sqrt(sum));
    }
    return greatest;
  }

 protected:
  HostMatrix q_;
  KvRows kv_;
};

std::vector<AttentionShape> DenseShapes() {
  const HeadShape smol{9, 3, 64};
  std::vector<AttentionShape> shapes;
  for (const int64_t rows : {1, 2, 127, 128, 129, 300}) shapes.push_back({smol, rows});
  for (const int64_t rows : {2047, 2048, 2049}) shapes.push_back({{3, 1, 64}, rows});
  shapes.push_back({{2, 1, 64}, 8192 + 37});
  // Group sizes 1, 4, 7, 8; head_dim 128 and others.
  shapes.push_back({{2, 2, 128}, 200});
  shapes.push_back({{8, 2, 128}, 129});
  shapes.push_back({{14, 2, 64}, 257});
  shapes.push_back({{8, 1, 64}, 140});
  shapes.push_back({{2, 1, 16}, 130});
  shapes.push_back({{2, 1, 96}, 130});
  shapes.push_back({{2, 1, 256}, 130});
  // Chunks and prefix hits, also within a block; single tokens of a decode.
  shapes.push_back({smol, 200, 128});
  shapes.push_back({smol, 1, 128});
  shapes.push_back({smol, 37, 1000});
  shapes.push_back({smol, 1, 1000});
  shapes.push_back({smol, 3, 1030});
  shapes.push_back({{8, 2, 128}, 1, 2500});
  shapes.push_back({{14, 2, 64}, 129, 1920});
  // Logits of some hundreds.
  shapes.push_back({smol, 300, 0, 30});
  shapes.push_back({{8, 2, 128}, 1, 700, 30});
  return shapes;
}

using DenseAttentionTest = AttentionTest;
INSTANTIATE_TEST_SUITE_P(All, DenseAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::ValuesIn(DenseShapes())),
                         CaseName);

TEST_P(DenseAttentionTest, MatchesTheReference) {
  const DeviceMatrix q = Put(q_, dtype());
  const DeviceKv kv = PutKv(kv_, heads(), end());
  const Result result = Run(q, kv, nullptr);
  ExpectReference(result.out, nullptr);
  const int64_t first = shape().first_position / kBlockTokens, blocks = NumBlocks(end());
  const auto causal =
      static_cast<uint64_t>(heads().num_heads * (blocks * (blocks + 1) - first * (first + 1)) / 2);
  EXPECT_EQ(result.counts.executed_blocks, causal);
  EXPECT_EQ(result.counts.causal_blocks, causal);
  EXPECT_EQ(result.counts.dense_fallbacks, 0);
}

ProxyAttnOptions SparseOptions(const HeadShape& heads) {
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = heads.num_heads;
  options.stride = 16;
  options.dense_below_tokens = 0;
  options.floor_tokens = 0;
  options.forced_density = 0.4f;
  options.dense_tail_blocks = 1;
  return options;
}

std::vector<AttentionShape> SparseShapes() {
  return {
      {{9, 3, 64}, 1},        {{9, 3, 64}, 1024},      {{9, 3, 64}, 1000, 1024},
      {{4, 4, 64}, 1299},     {{8, 2, 128}, 900, 128}, {{14, 2, 64}, 641},
      {{8, 1, 64}, 768, 256}, {{2, 1, 64}, 8192 + 37}, {{9, 3, 64}, 1000, 128, 30},
      {{9, 3, 64}, 2, 1024},
  };
}

using SparseAttentionTest = AttentionTest;
INSTANTIATE_TEST_SUITE_P(All, SparseAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::ValuesIn(SparseShapes())),
                         CaseName);

TEST_P(SparseAttentionTest, SeesTheKeptBlocksOnly) {
  const DeviceMatrix q = Put(q_, dtype());
  const DeviceKv kv = PutKv(kv_, heads(), end());
  const ProxyAttnOptions options = SparseOptions(heads());
  const Result result = Run(q, kv, &options);
  ExpectReference(result.out, &result.selection);
}

TEST_P(SparseAttentionTest, CountsTheBlocksThatItRan) {
  const DeviceMatrix q = Put(q_, dtype());
  const DeviceKv kv = PutKv(kv_, heads(), end());
  const ProxyAttnOptions options = SparseOptions(heads());
  const Result result = Run(q, kv, &options, /*ends_prompt=*/true);
  uint64_t kept = 0;
  for (const int32_t count : result.selection.counts) kept += static_cast<uint64_t>(count);
  EXPECT_EQ(result.counts.executed_blocks, kept);
  EXPECT_EQ(result.counts.causal_blocks, heads().num_heads * result.selection.RankingStride());
}

// A budget of everything, or a rule that needs no scores.
TEST_P(SparseAttentionTest, AllBlocksEqualDenseBitForBit) {
  const DeviceMatrix q = Put(q_, dtype());
  const DeviceKv kv = PutKv(kv_, heads(), end());
  const HostMatrix dense = Run(q, kv, nullptr).out;
  ProxyAttnOptions full_budget = SparseOptions(heads());
  full_budget.forced_density = 0;
  full_budget.gamma = 1;
  full_budget.dense_above_density = 1;
  ProxyAttnOptions by_rule = SparseOptions(heads());
  by_rule.dense_below_tokens = static_cast<int32_t>(end());
  for (const ProxyAttnOptions* options : {&full_budget, &by_rule}) {
    const Result full = Run(q, kv, options);
    EXPECT_FALSE(full.selection.dense_fallback);
    for (int64_t m = full.selection.first_row; m < NumBlocks(end()); ++m) {
      for (int32_t h = 0; h < heads().num_heads; ++h) {
        ASSERT_EQ(full.selection.Count(h, m), m + 1);
      }
    }
    EXPECT_EQ(full.out.values, dense.values);
  }
}

using RepeatTest = AttentionTest;
INSTANTIATE_TEST_SUITE_P(All, RepeatTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::Values(AttentionShape{{9, 3, 64}, 500},
                                                              AttentionShape{
                                                                  {8, 2, 128}, 300, 384})),
                         CaseName);

TEST_P(RepeatTest, RepeatsBitForBit) {
  const DeviceMatrix q = Put(q_, dtype());
  const DeviceKv kv = PutKv(kv_, heads(), end());
  const ProxyAttnOptions options = SparseOptions(heads());
  const std::vector<float> sparse = Run(q, kv, &options).out.values;
  const std::vector<float> dense = Run(q, kv, nullptr).out.values;
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(Run(q, kv, &options).out.values, sparse) << "repeat " << i;
    ASSERT_EQ(Run(q, kv, nullptr).out.values, dense) << "repeat " << i;
  }
}

// Chunks of a dense prompt give what the whole prompt gives, and every number of threads gives the
// same, both bit for bit: a row's result depends on its position alone.
class DenseInvarianceTest : public BackendTest,
                            public ::testing::WithParamInterface<BackendCase> {};
INSTANTIATE_TEST_SUITE_P(All, DenseInvarianceTest, ::testing::ValuesIn(BackendsUnderTest()),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(DenseInvarianceTest, DependsOnNeitherChunksNorThreads) {
  constexpr HeadShape kHeads{9, 3, 64};
  constexpr int64_t kTokens = 1026;  // the last block has two rows
  std::vector<float> expected;
  for (const int32_t threads : {1, 2, 3, 8}) {
    BackendCase backend = GetParam();
    backend.options.num_threads = threads;
    Open(backend);
    if (IsSkipped()) return;
    const HostMatrix q_rows = RandomMatrix(kTokens, 9 * 64, 1, dtype());
    const KvRows kv_rows{RandomMatrix(kTokens, 3 * 64, 2, dtype()),
                         RandomMatrix(kTokens, 3 * 64, 3, dtype())};
    const DeviceMatrix q = Put(q_rows, dtype());
    const DeviceKv kv = PutKv(kv_rows, kHeads, kTokens);
    for (const int64_t chunk : {kTokens, int64_t{128}, int64_t{300}}) {
      const DeviceMatrix out = NewMatrix(kTokens, q_rows.cols, dtype());
      for (int64_t begin = 0; begin < kTokens; begin += chunk) {
        const int64_t rows = std::min(chunk, kTokens - begin);
        AttentionSequence sequence;
        sequence.rows = {begin, rows, begin, kv.table()};
        ASSERT_OK(backend_->Attention({q.view, out.view, kv.view, {&sequence, 1}}));
      }
      const std::vector<float> got = Get(out.view).values;
      if (expected.empty()) expected = got;
      ASSERT_EQ(got, expected) << threads << " threads, chunks of " << chunk;
    }
  }
}

}  // namespace
}  // namespace headstart::testing
