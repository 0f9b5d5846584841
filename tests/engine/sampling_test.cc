#include "engine/run/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "kernels/base/nonfinite.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// Probabilities 0.1, 0.4, 0.2, 0.3.
const std::vector<float> kLogits = {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(3.0f)};

// How often each id comes in `draws` draws with the seeds 0, 1, 2, …
std::map<int32_t, int> Draw(SamplingOptions options, int draws) {
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) {
    options.seed = static_cast<uint64_t>(i);
    const absl::StatusOr<SampledToken> token = SampleToken(kLogits, options);
    EXPECT_OK(token);
    if (token.ok()) ++counts[token->id];
  }
  return counts;
}

TEST(SamplingTest, GreedyTakesTheLargestLogit) {
  ASSERT_OK_AND_ASSIGN(const SampledToken token, SampleToken(kLogits, {}));
  EXPECT_EQ(token.id, 1);
  EXPECT_NEAR(token.logprob, std::log(0.4), 1e-6);
}

TEST(SamplingTest, GreedyTiesGoToTheLowerId) {
  ASSERT_OK_AND_ASSIGN(const SampledToken token, SampleToken({1.0f, 5.0f, 5.0f}, {}));
  EXPECT_EQ(token.id, 1);
}

TEST(SamplingTest, LogProbSurvivesLargeLogits) {
  ASSERT_OK_AND_ASSIGN(const SampledToken token, SampleToken({3e38f, -3e38f}, {}));
  EXPECT_EQ(token.id, 0);
  EXPECT_FLOAT_EQ(token.logprob, 0.0f);
}

TEST(SamplingTest, TemperatureOneDrawsByProbability) {
  SamplingOptions options;
  options.temperature = 1.0f;
  const std::map<int32_t, int> counts = Draw(options, 10'000);
  const double expected[] = {0.1, 0.4, 0.2, 0.3};
  for (int32_t id = 0; id < 4; ++id) {
    // Five standard deviations of a binomial count.
    const double deviation = std::sqrt(1e4 * expected[id] * (1 - expected[id]));
    EXPECT_NEAR(counts.at(id), 1e4 * expected[id], 5 * deviation) << id;
  }
}

TEST(SamplingTest, TemperatureSharpens) {
  SamplingOptions options;
  options.temperature = 0.5f;  // probabilities squared: 1, 16, 4, 9 of 30
  const std::map<int32_t, int> counts = Draw(options, 10'000);
  EXPECT_NEAR(counts.at(1), 1e4 * 16 / 30, 250);
  EXPECT_NEAR(counts.at(0), 1e4 * 1 / 30, 100);
}

TEST(SamplingTest, LogProbIsAtTemperatureOneOverTheWholeVocabulary) {
  SamplingOptions options;
  options.temperature = 0.25f;
  options.top_k = 1;
  ASSERT_OK_AND_ASSIGN(const SampledToken token, SampleToken(kLogits, options));
  EXPECT_EQ(token.id, 1);
  EXPECT_NEAR(token.logprob, std::log(0.4), 1e-6);
}

TEST(SamplingTest, TopKKeepsTheMostLikely) {
  SamplingOptions options;
  options.temperature = 1.0f;
  options.top_k = 2;
  const std::map<int32_t, int> counts = Draw(options, 2'000);
  EXPECT_EQ(counts.size(), 2);
  EXPECT_NEAR(counts.at(1), 2000 * 4 / 7.0, 120);
  EXPECT_NEAR(counts.at(3), 2000 * 3 / 7.0, 120);
  options.top_k = 100;  // more than there are
  EXPECT_EQ(Draw(options, 2'000).size(), 4);
}

TEST(SamplingTest, TopPKeepsTheFewestThatReachIt) {
  SamplingOptions options;
  options.temperature = 1.0f;
  options.top_p = 0.3f;
  EXPECT_EQ(Draw(options, 500).size(), 1);
  options.top_p = 0.65f;  // 0.4 + 0.3
  EXPECT_EQ(Draw(options, 500).size(), 2);
  options.top_p = 1.0f;
  EXPECT_EQ(Draw(options, 500).size(), 4);
}

TEST(SamplingTest, TopPCountsWhatTopKLeft) {
  SamplingOptions options;
  options.temperature = 1.0f;
  options.top_k = 2;     // 4/7, 3/7
  options.top_p = 0.5f;  // of the two
  EXPECT_EQ(Draw(options, 500).size(), 1);
}

TEST(SamplingTest, EqualSeedsDrawEqualTokens) {
  SamplingOptions options;
  options.temperature = 1.0f;
  options.seed = 1234567;
  ASSERT_OK_AND_ASSIGN(const SampledToken first, SampleToken(kLogits, options));
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK_AND_ASSIGN(const SampledToken again, SampleToken(kLogits, options));
    EXPECT_EQ(again.id, first.id);
  }
}

TEST(SamplingTest, RefusesLogitsThatAreNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, infinity, -infinity}) {
    const absl::Status status = SampleToken({0.0f, bad, 1.0f}, {}).status();
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal, HasSubstr("logit 1 is not finite")));
    EXPECT_TRUE(IsNonFiniteError(status));
  }
}

TEST(SamplingTest, RefusesOptionsByName) {
  const auto with = [](auto set) {
    SamplingOptions options;
    set(options);
    return ValidateSamplingOptions(options);
  };
  using Options = SamplingOptions&;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_OK(with([](Options) {}));
  EXPECT_THAT(with([](Options o) { o.temperature = -1; }),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampling.temperature=-1")));
  EXPECT_THAT(with([nan](Options o) { o.temperature = nan; }),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampling.temperature=nan")));
  EXPECT_THAT(with([](Options o) { o.top_k = -2; }),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampling.top_k=-2")));
  EXPECT_THAT(with([](Options o) { o.top_p = 1.5f; }),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampling.top_p=1.5")));
  EXPECT_THAT(with([nan](Options o) { o.top_p = nan; }),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampling.top_p")));
}

}  // namespace
}  // namespace headstart
