// Block selection of every backend: what the comparison with the NumPy specification does not see.
#include <cmath>
#include <set>
#include <string>

#include "kernels/cpu/reference_selection.h"
#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

constexpr HeadShape kHeads{9, 3, 64};
constexpr int64_t kTokens = 1500;

ProxyAttnOptions SparseOptions() {
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = 9;
  options.stride = 16;
  options.gamma = 0.7f;
  options.floor_tokens = 0;
  options.dense_below_tokens = 0;
  options.dense_tail_blocks = 1;
  options.dense_above_density = 1;
  return options;
}

bool Same(const BlockSelection& a, const BlockSelection& b) {
  return a.ranking == b.ranking && a.counts == b.counts && a.budget_ratio == b.budget_ratio &&
         a.dense_fallback == b.dense_fallback;
}

class SelectBlocksTest : public BackendTest, public ::testing::WithParamInterface<BackendCase> {
 protected:
  void SetUp() override {
    Open(GetParam());
    if (!IsSkipped()) PutData();
  }
  void PutData() {
    q_ = Put(RandomMatrix(kTokens, 9 * 64, 1, dtype(), 3), dtype());
    const HostMatrix k = RandomMatrix(kTokens, 3 * 64, 2, dtype());
    kv_ = PutKv({k, k}, kHeads, kTokens);
    ratio_ = PutFloats(*backend_, std::vector<float>(9));
    counts_ = NewCounts(*backend_);
    out_ = NewMatrix(kTokens, 9 * 64, dtype());
    sequence_ = {};
    sequence_.rows = {0, kTokens, 0, kv_.table()};
    sequence_.proxy_attn = &options_;
    sequence_.budget_ratio = static_cast<float*>(ratio_.data());
    sequence_.counts = static_cast<BlockCounts*>(counts_.data());
  }
  void ResetRatio() {
    const std::vector<float> zeros(9);
    ASSERT_OK(backend_->Upload(zeros.data(), ratio_.bytes(), ratio_.data()));
  }
  absl::Status Attend(BlockSelection* selection) {
    sequence_.selection = selection;
    return backend_->Attention({q_.view, out_.view, kv_.view, {&sequence_, 1}});
  }
  BlockSelection Select() {
    BlockSelection selection;
    EXPECT_OK(Attend(&selection));
    return selection;
  }

  ProxyAttnOptions options_ = SparseOptions();
  DeviceMatrix q_, out_;
  DeviceKv kv_;
  Buffer ratio_, counts_;
  AttentionSequence sequence_;
};

INSTANTIATE_TEST_SUITE_P(All, SelectBlocksTest, ::testing::ValuesIn(BackendsUnderTest()),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(SelectBlocksTest, KeepsNestedPrefixesWithForcedBlocks) {
  options_.num_proxies = 3;
  const BlockSelection s = Select();
  for (int64_t m = 0; m < s.num_rows; ++m) {
    for (int32_t p = 0; p < 3; ++p) {
      const int32_t* ranking = s.Ranking(p, m);
      EXPECT_EQ(std::set<int32_t>(ranking, ranking + m + 1).size(), m + 1);
      EXPECT_EQ(ranking[0], m);
      if (m >= 2) {
        EXPECT_EQ(ranking[1], 0);
        EXPECT_EQ(ranking[2], m - 1);
      }
    }
    for (int32_t h = 0; h < 9; ++h) {
      EXPECT_GE(s.Count(h, m), 1);
      EXPECT_LE(s.Count(h, m), m + 1);
    }
  }
}

TEST_P(SelectBlocksTest, RepeatsBitForBit) {
  for (const BudgetRule rule : {BudgetRule::kOwn, BudgetRule::kShared, BudgetRule::kRow}) {
    options_.budget = rule;
    ResetRatio();
    const BlockSelection first = Select();
    for (int i = 0; i < 20; ++i) {
      ResetRatio();
      ASSERT_TRUE(Same(Select(), first)) << "repeat " << i;
    }
  }
}

TEST_P(SelectBlocksTest, DoesNotDependOnThreads) {
  BlockSelection first;
  for (const int32_t threads : {1, 2, 5}) {
    BackendCase backend = GetParam();
    backend.options.num_threads = threads;
    // Memory must go before the backend that it belongs to.
    q_ = {};
    kv_ = {};
    ratio_ = {};
    counts_ = {};
    out_ = {};
    Open(backend);
    PutData();
    const BlockSelection selection = Select();
    if (threads == 1) first = selection;
    EXPECT_TRUE(Same(selection, first)) << threads << " threads";
  }
}

TEST_P(SelectBlocksTest, KeepsNothingOfEarlierCalls) {
  sequence_.rows.num_rows = 700;
  const BlockSelection fresh = Select();
  sequence_.rows.num_rows = kTokens;
  Select();
  sequence_.rows.num_rows = 700;
  ResetRatio();
  EXPECT_TRUE(Same(Select(), fresh));
}

TEST_P(SelectBlocksTest, RaisesTheBudgetRatioAndNeverLowersIt) {
  const BlockSelection whole = Select();
  std::vector<float> ratio(9);
  ASSERT_OK(backend_->Download(ratio_.data(), ratio_.bytes(), ratio.data()));
  EXPECT_EQ(ratio, whole.budget_ratio);
  // A later call with a ratio of 1 keeps everything.
  const std::vector<float> ones(9, 1.0f);
  ASSERT_OK(backend_->Upload(ones.data(), ratio_.bytes(), ratio_.data()));
  const BlockSelection all = Select();
  EXPECT_EQ(all.budget_ratio, ones);
  for (int64_t m = 0; m < all.num_rows; ++m) EXPECT_EQ(all.Count(0, m), m + 1);
}

TEST_P(SelectBlocksTest, CountsDenseFallbacks) {
  options_.dense_above_density = 0.1f;
  EXPECT_TRUE(Select().dense_fallback);
  options_.dense_above_density = 1;
  EXPECT_FALSE(Select().dense_fallback);
  EXPECT_EQ(GetCounts(*backend_, counts_).dense_fallbacks, 1);
}

// What was timed is given out once.
TEST_P(SelectBlocksTest, TimesSelectionAndAttention) {
  ASSERT_OK(backend_->TakeTimes());
  ASSERT_OK(Attend(nullptr));
  auto times = backend_->TakeTimes();
  ASSERT_OK(times);
  EXPECT_GT(times->selection_seconds, 0);
  EXPECT_GT(times->attention_seconds, 0);
  times = backend_->TakeTimes();
  ASSERT_OK(times);
  EXPECT_EQ(times->selection_seconds, 0);
  EXPECT_EQ(times->attention_seconds, 0);
  sequence_.proxy_attn = nullptr;
  ASSERT_OK(Attend(nullptr));
  times = backend_->TakeTimes();
  ASSERT_OK(times);
  EXPECT_EQ(times->selection_seconds, 0);
  EXPECT_GT(times->attention_seconds, 0);
}

TEST_P(SelectBlocksTest, RefusesWhatItCannotSelect) {
  const auto refuses = [&](const std::string& message) {
    EXPECT_THAT(Attend(nullptr), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  options_.num_proxies = 2;
  refuses("num_proxies=2");
  options_.num_proxies = 0;
  refuses("num_proxies=0");
  options_.num_proxies = 9;
  options_.stride = 5;
  refuses("stride=5");
  options_.stride = 16;
  sequence_.rows.first_position = 100;
  refuses("first_position=100");
  sequence_.rows.first_position = 0;
  sequence_.budget_ratio = nullptr;
  refuses("budget_ratio");
  sequence_.budget_ratio = static_cast<float*>(ratio_.data());
  q_.view.cols -= 64;
  refuses("512");
  q_.view.cols += 64;
  sequence_.proxy_attn = nullptr;
  BlockSelection selection;
  EXPECT_THAT(Attend(&selection),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dense sequence")));
}

}  // namespace
}  // namespace headstart::testing
