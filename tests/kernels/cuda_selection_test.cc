// Block selection on the GPU against the reference: what is kept is the same but for blocks that
// score alike.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "kernels/cpu/reference_selection.h"
#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

// The GPU keeps the largest logit of a row and block as fp16, relative to one of them: natural-log
// units.
constexpr double kScoreError = 6e-3;

struct SelectionCase {
  HeadShape heads;
  int64_t first_position;
  int64_t num_tokens;
  int32_t proxies;
  int32_t stride;
  BudgetRule budget;
  bool ends_prompt;
};

void PrintTo(const SelectionCase& c, std::ostream* os) {
  *os << c.heads.num_heads << "/" << c.heads.num_kv_heads << " heads of " << c.heads.head_dim
      << ", " << c.num_tokens << " tokens from " << c.first_position << ", g=" << c.proxies
      << " s=" << c.stride;
}

class CudaSelectionTest : public BackendTest, public ::testing::WithParamInterface<SelectionCase> {
 protected:
  void SetUp() override { Open({"Cuda", {.device = "cuda"}, ""}); }

  static ProxyAttnOptions Options() {
    const SelectionCase& c = GetParam();
    ProxyAttnOptions options;
    options.enabled = true;
    options.num_proxies = c.proxies;
    options.stride = c.stride;
    options.budget = c.budget;
    options.gamma = 0.7f;
    options.floor_tokens = 256;
    options.dense_below_tokens = 0;
    options.dense_above_density = 0.97f;
    return options;
  }

  static reference::SelectionInput Input() {
    const SelectionCase& c = GetParam();
    reference::SelectionInput input;
    input.shape = c.heads;
    // Large logits: some blocks matter much more than others.
    input.q = RandomMatrix(c.num_tokens, int64_t{c.heads.num_heads} * c.heads.head_dim, 11,
                           DType::kBF16, 3.0f);
    input.k = RandomMatrix(c.first_position + c.num_tokens,
                           int64_t{c.heads.num_kv_heads} * c.heads.head_dim, 12, DType::kBF16);
    input.first_position = c.first_position;
    input.dtype = DType::kBF16;
    input.ends_prompt = c.ends_prompt;
    return input;
  }

  BlockSelection SelectOnDevice(const reference::SelectionInput& input,
                                const ProxyAttnOptions& options,
                                const std::vector<float>& earlier_ratio) {
    const DeviceMatrix q = Put(input.q, DType::kBF16);
    const DeviceKv kv = PutKv({input.k, input.k}, input.shape, input.k.rows);
    auto ratio = backend_->Allocate(static_cast<int64_t>(earlier_ratio.size() * sizeof(float)));
    EXPECT_OK(ratio);
    EXPECT_OK(backend_->Upload(earlier_ratio.data(), ratio->bytes(), ratio->data()));
    const DeviceMatrix out = NewMatrix(input.q.rows, input.q.cols, DType::kBF16);
    BlockSelection selection;
    AttentionSequence sequence;
    sequence.rows = {0, input.q.rows, input.first_position, kv.table()};
    sequence.proxy_attn = &options;
    sequence.ends_prompt = input.ends_prompt;
    sequence.budget_ratio = static_cast<float*>(ratio->data());
    sequence.selection = &selection;
    EXPECT_OK(backend_->Attention({q.view, out.view, kv.view, {&sequence, 1}}));
    return selection;
  }
};

constexpr HeadShape k8{8, 2, 128}, k12{12, 4, 64}, k7{7, 1, 128};
INSTANTIATE_TEST_SUITE_P(
    All, CudaSelectionTest,
    ::testing::Values(SelectionCase{k8, 0, 2048, 1, 4, BudgetRule::kOwn, false},
                      SelectionCase{k8, 0, 2049, 2, 4, BudgetRule::kShared, true},
                      SelectionCase{k8, 0, 2047, 8, 16, BudgetRule::kShared, true},
                      SelectionCase{k8, 0, 3001, 4, 8, BudgetRule::kOwn, false},
                      SelectionCase{k8, 1152, 900, 8, 16, BudgetRule::kShared, true},
                      SelectionCase{k8, 1152, 1300, 1, 4, BudgetRule::kShared, false},
                      SelectionCase{k8, 128, 1, 2, 8, BudgetRule::kShared, false},
                      SelectionCase{k8, 0, 1, 1, 16, BudgetRule::kOwn, true},
                      SelectionCase{k12, 0, 2100, 2, 4, BudgetRule::kShared, true},
                      SelectionCase{k12, 640, 1700, 12, 8, BudgetRule::kOwn, false},
                      SelectionCase{k12, 0, 2500, 4, 16, BudgetRule::kShared, false},
                      SelectionCase{k7, 0, 2300, 7, 16, BudgetRule::kShared, true},
                      SelectionCase{k7, 384, 1800, 1, 8, BudgetRule::kOwn, true},
                      SelectionCase{k8, 0, 2049, 8, 16, BudgetRule::kRow, true},
                      SelectionCase{k8, 1152, 1300, 2, 4, BudgetRule::kRow, false},
                      SelectionCase{k8, 128, 1, 2, 8, BudgetRule::kRow, false},
                      SelectionCase{k12, 640, 1700, 12, 8, BudgetRule::kRow, false},
                      SelectionCase{k12, 0, 2500, 1, 4, BudgetRule::kRow, true},
                      SelectionCase{k7, 384, 1800, 7, 16, BudgetRule::kRow, true}));

TEST_P(CudaSelectionTest, KeepsWhatTheReferenceKeeps) {
  const reference::SelectionInput input = Input();
  const ProxyAttnOptions options = Options();
  std::vector<float> ratio(input.shape.num_heads, 0.125f);
  const BlockSelection actual = SelectOnDevice(input, options, ratio);
  const BlockSelection expected = reference::SelectBlocks(input, options, ratio);
  ASSERT_EQ(actual.counts.size(), expected.counts.size());
  ASSERT_EQ(actual.num_rows, expected.num_rows);
  EXPECT_EQ(actual.dense_fallback, expected.dense_fallback);
  const auto blocks = static_cast<float>(NumBlocks(input.k.rows));
  for (int32_t h = 0; h < input.shape.num_heads; ++h) {
    // A prefix sum that just reaches gamma may be one block longer or shorter.
    EXPECT_NEAR(actual.budget_ratio[h], expected.budget_ratio[h], 1.01f / blocks) << "head " << h;
  }
  for (size_t i = 0; i < actual.counts.size(); ++i)
    EXPECT_NEAR(actual.counts[i], expected.counts[i], 1);

  const reference::ProxyScores scores = reference::ScoreBlocks(input, options);
  for (int32_t h = 0; h < input.shape.num_heads; ++h) {
    const int32_t p = h / (input.shape.num_heads / options.num_proxies);
    for (int64_t m = actual.first_row; m < actual.first_row + actual.num_rows; ++m) {
      const double* row =
          scores.log_max.data() + p * expected.RankingStride() + expected.RankingOffset(m);
      const int32_t count = actual.Count(h, m);
      ASSERT_GE(count, 1);
      ASSERT_LE(count, m + 1);
      const int32_t* reference_order = expected.Ranking(p, m);
      const double last_kept = row[reference_order[count - 1]];
      const int32_t forced = static_cast<int32_t>(std::min<int64_t>(m + 1, m <= 1 ? m + 1 : 3));
      for (int32_t i = 0; i < count; ++i) {
        const int32_t block = actual.Ranking(p, m)[i];
        if (i < forced) {
          EXPECT_EQ(block, reference_order[i]) << "head " << h << ", row " << m;
        } else {
          EXPECT_GE(row[block], last_kept - kScoreError)
              << "head " << h << ", row " << m << ", block " << block;
        }
      }
    }
  }
}

TEST_P(CudaSelectionTest, IsDenseByRule) {
  const reference::SelectionInput input = Input();
  ProxyAttnOptions options = Options();
  options.dense_below_tokens = static_cast<int32_t>(input.k.rows);
  std::vector<float> ratio(input.shape.num_heads, 0.5f);
  const BlockSelection actual = SelectOnDevice(input, options, ratio);
  const BlockSelection expected = reference::SelectBlocks(input, options, ratio);
  EXPECT_EQ(actual.counts, expected.counts);
  EXPECT_EQ(actual.ranking, expected.ranking);
  EXPECT_EQ(actual.budget_ratio, expected.budget_ratio);
  EXPECT_EQ(actual.dense_fallback, expected.dense_fallback);
}

TEST_P(CudaSelectionTest, FallsBackToDenseAboveTheDensity) {
  const reference::SelectionInput input = Input();
  ProxyAttnOptions options = Options();
  options.forced_density = 0.5f;
  options.dense_above_density = 0.4f;
  const std::vector<float> ratio(input.shape.num_heads);
  const BlockSelection actual = SelectOnDevice(input, options, ratio);
  EXPECT_TRUE(actual.dense_fallback);
  for (int32_t h = 0; h < actual.num_heads; ++h) {
    for (int64_t m = actual.first_row; m < actual.first_row + actual.num_rows; ++m) {
      EXPECT_EQ(actual.Count(h, m), m + 1);
    }
  }
  EXPECT_EQ(actual.budget_ratio, ratio);
}

}  // namespace
}  // namespace headstart::testing
