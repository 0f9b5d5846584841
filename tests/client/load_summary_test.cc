#include "client/commands/load_summary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/base/instant.h"

namespace headstart {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::Pair;

const Instant kStart = Instant() + absl::Seconds(1000);

// A prompt that went well, so many ms from its plan to accepted, first token, all KV.
LoadSample Good(int64_t tokens, int accepted_ms, int token_ms, int kv_ms) {
  LoadSample sample;
  sample.planned = sample.sent = kStart;
  sample.accepted = kStart + absl::Milliseconds(accepted_ms);
  sample.first_token = kStart + absl::Milliseconds(token_ms);
  sample.all_kv = sample.ended = kStart + absl::Milliseconds(kv_ms);
  sample.prompt_tokens = tokens;
  return sample;
}

LoadSample Bad(const std::string& error, bool refused, int ms) {
  LoadSample sample;
  sample.planned = sample.sent = kStart;
  sample.ended = kStart + absl::Milliseconds(ms);
  sample.prompt_tokens = 100;
  sample.error = error;
  sample.message = error + " after " + std::to_string(ms);
  sample.refused = refused;
  return sample;
}

TEST(LoadSummaryTest, PercentileIsNearestRank) {
  EXPECT_EQ(Percentile({}, 0.5), 0.0);
  EXPECT_EQ(Percentile({7}, 0.99), 7.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.5), 2.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.9), 4.0);
  std::vector<double> hundred;
  for (int i = 100; i > 0; --i) hundred.push_back(i);
  const Percentiles p = PercentilesOf(hundred);
  EXPECT_EQ(p.count, 100);
  EXPECT_THAT((std::vector<double>{p.p50, p.p90, p.p95, p.p99, p.max}),
              ElementsAre(50, 90, 95, 99, 100));
  EXPECT_EQ(PercentilesOf({}).count, 0);
}

TEST(LoadSummaryTest, ClassesAreByLength) {
  EXPECT_EQ(ClassOf(1), 0);
  EXPECT_EQ(ClassOf(2048), 0);
  EXPECT_EQ(ClassOf(2049), 1);
  EXPECT_EQ(ClassOf(32768), 2);
  EXPECT_EQ(ClassOf(1 << 24), 3);
  const LoadSummary summary = Summarize(
      {.samples = {Good(100, 1, 100, 150), Good(200, 1, 300, 300), Good(9000, 1, 900, 950)},
       .start = kStart,
       .wall = absl::Seconds(1)},
      absl::Milliseconds(300));
  EXPECT_EQ(summary.classes[0].ok, 2);
  EXPECT_EQ(summary.classes[0].within_slo, 2) << "the objective itself is within";
  EXPECT_DOUBLE_EQ(summary.classes[0].ttft.p50, 0.1);
  EXPECT_DOUBLE_EQ(summary.classes[0].all_kv.p50, 0.15);
  EXPECT_EQ(summary.classes[1].prompts, 0);
  EXPECT_EQ(summary.classes[2].within_slo, 0);
  EXPECT_EQ(summary.all.within_slo, 2);
  EXPECT_DOUBLE_EQ(summary.all.ttft.max, 0.9);
}

TEST(LoadSummaryTest, ErrorsAreCountedApart) {
  LoadResult result{.samples = {Good(1000, 1, 1000, 1000), Good(1000, 1, 3000, 3000)},
                    .start = kStart,
                    .wall = absl::Seconds(2)};
  result.samples[0].density = 0.5;
  result.samples[1].density = 1.0;
  for (LoadSample& sample : result.samples) sample.kv_bytes = 1'000'000'000;
  for (const int ms : {2, 4}) result.samples.push_back(Bad("UNAVAILABLE DRAINING", true, ms));
  result.samples.push_back(Bad("INTERNAL", false, 50));
  result.samples.back().accepted = kStart;
  const LoadSummary summary = Summarize(result);
  EXPECT_EQ(summary.all.prompts, 5);
  EXPECT_EQ(summary.all.ok, 2);
  EXPECT_EQ(summary.all.accepted, 3);
  EXPECT_EQ(summary.refused, 2);
  EXPECT_EQ(summary.failed, 1);
  ASSERT_THAT(summary.errors, ElementsAre(Pair("INTERNAL", _), Pair("UNAVAILABLE DRAINING", _)));
  const ErrorSummary& refused = summary.errors.at("UNAVAILABLE DRAINING");
  EXPECT_EQ(refused.count, 2);
  EXPECT_EQ(refused.refused, 2);
  EXPECT_EQ(refused.example, "UNAVAILABLE DRAINING after 2");
  EXPECT_DOUBLE_EQ(refused.time.max, 0.004);
  EXPECT_DOUBLE_EQ(summary.refusal_time.p99, 0.004) << "of refusals alone";
  EXPECT_DOUBLE_EQ(summary.tokens_per_second, 1000.0);
  EXPECT_DOUBLE_EQ(summary.requests_per_second, 1.0);
  EXPECT_DOUBLE_EQ(summary.kv_gigabytes_per_second, 1.0);
  EXPECT_DOUBLE_EQ(summary.kv_bytes_per_prompt, 1e9) << "of those that went well";
  EXPECT_DOUBLE_EQ(summary.density, 0.75);
}

TEST(LoadSummaryTest, LateSendsAreCountedAndCountAsTheServersTime) {
  LoadSample late = Good(100, 11, 30, 30);
  late.sent = kStart + absl::Milliseconds(10);
  const LoadSummary summary = Summarize(
      {.samples = {Good(100, 1, 20, 20), late}, .start = kStart, .wall = absl::Seconds(1)});
  EXPECT_EQ(summary.late, 1);
  EXPECT_DOUBLE_EQ(summary.max_lateness, 0.01);
  EXPECT_DOUBLE_EQ(summary.all.ttft.max, 0.03);
}

TEST(LoadSummaryTest, PredictionsCountFromAcceptance) {
  LoadSample exact = Good(100, 10, 110, 110);
  exact.predicted_ttft = absl::Milliseconds(100);
  LoadSample twice = exact;
  twice.predicted_ttft = absl::Milliseconds(200);
  LoadSample half = exact;
  half.predicted_ttft = absl::Milliseconds(50);
  const LoadSummary summary = Summarize({.samples = {exact, twice, half, Good(100, 1, 2, 2)},
                                         .start = kStart,
                                         .wall = absl::Seconds(1)});
  EXPECT_EQ(summary.prediction_error.count, 3) << "one was without";
  EXPECT_DOUBLE_EQ(summary.prediction_error.p50, 0.5);
  EXPECT_DOUBLE_EQ(summary.prediction_error.p95, 1.0);
}

TEST(LoadSummaryTest, NothingWentWell) {
  const LoadSummary summary = Summarize(
      {.samples = {Bad("INTERNAL", false, 1)}, .start = kStart, .wall = absl::Seconds(1)});
  EXPECT_EQ(summary.all.ok, 0);
  EXPECT_EQ(summary.tokens_per_second, 0.0);
  EXPECT_EQ(summary.prefix_hit_rate(), 0.0);
}

}  // namespace
}  // namespace headstart
