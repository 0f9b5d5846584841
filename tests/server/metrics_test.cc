// What becomes of a call in the metrics, and of the server's state.
#include "server/ops/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/instant.h"
#include "server/version.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Seconds are powers of two, so that sums are exact.
class MetricsTest : public ::testing::Test {
 protected:
  MetricsTest() {
    result_.accepted_at = Instant();
    result_.started_at = result_.accepted_at + absl::Seconds(1);
    result_.compute_seconds = 2;
    result_.gave_way_seconds = 1;
    result_.computed_at = result_.accepted_at + absl::Seconds(4);
  }

  // A prompt of 640 tokens that ended so.
  void Record(const absl::Status& status = absl::OkStatus()) {
    CallRecord record;
    record.request_id = "r";
    record.accepted = true;
    record.num_tokens = 640;
    record.accepted_at = result_.accepted_at;
    record.queue = result_.started_at - result_.accepted_at;
    record.ended_at = result_.computed_at + absl::Seconds(1);
    record.sent.result = std::make_shared<const PrefillResult>(result_);
    metrics_->RecordCall(record, status);
  }

  // The value of a line, given all before the blank; -1 when there is none.
  double Value(const std::string& series) const {
    const std::string text = metrics_->Serialize(snapshot_);
    for (absl::string_view line : absl::StrSplit(text, '\n')) {
      double value = 0;
      if (absl::ConsumePrefix(&line, series + " ") && absl::SimpleAtod(line, &value)) return value;
    }
    return -1;
  }

  // Of the five seconds that a prompt takes.
  void Promise(absl::Duration base, absl::Duration per_1k_tokens) {
    metrics_ = std::make_unique<Metrics>(ServerFacts{"m", "cpu", "abc", {base, per_1k_tokens}});
  }

  double Valid() const { return Value("headstart_requests_valid_total{model=\"m\"}"); }
  double Within() const { return Value("headstart_requests_within_objective_total{model=\"m\"}"); }

  std::unique_ptr<Metrics> metrics_ = std::make_unique<Metrics>(ServerFacts{"m", "cpu", "abc", {}});
  MetricsSnapshot snapshot_;
  PrefillResult result_;
};

TEST_F(MetricsTest, CountsHowFarAnEstimateWasOff) {
  result_.predicted_ttft = absl::Seconds(6);  // 4 were right
  Record();
  EXPECT_EQ(Value("headstart_ttft_estimate_error_ratio_sum{model=\"m\"}"), 0.5);
  EXPECT_EQ(Value("headstart_ttft_estimate_error_ratio_bucket{model=\"m\",le=\"0.5\"}"), 1);
  EXPECT_EQ(Value("headstart_ttft_estimate_error_ratio_bucket{model=\"m\",le=\"0.3\"}"), 0);
  result_.predicted_ttft = absl::Seconds(1);  // too early counts like too late
  Record();
  EXPECT_EQ(Value("headstart_ttft_estimate_error_ratio_sum{model=\"m\"}"), 1.25);
}

TEST_F(MetricsTest, CountsNoEstimateWhereNoneWasMadeOrReadersDecided) {
  Record();
  result_.predicted_ttft = absl::Seconds(6);
  result_.room_wait_seconds = 0.5;
  Record();
  result_.room_wait_seconds = 0;
  Record(absl::CancelledError("gone"));
  EXPECT_EQ(Value("headstart_ttft_estimate_error_ratio_count{model=\"m\"}"), 0);
}

TEST_F(MetricsTest, CountsGivingWayOfPromptsThatEndedWell) {
  Record();
  Record(absl::CancelledError("gone"));
  EXPECT_EQ(Value("headstart_gave_way_seconds_sum{model=\"m\"}"), 1);
  EXPECT_EQ(Value("headstart_gave_way_seconds_count{model=\"m\"}"), 1);
}

TEST_F(MetricsTest, TellsFoundTokensFromComputedOnes) {
  result_.cached_tokens = 512;
  Record();
  EXPECT_EQ(Value("headstart_prompt_tokens_total{model=\"m\",source=\"computed\"}"), 128);
  EXPECT_EQ(Value("headstart_prompt_tokens_total{model=\"m\",source=\"prefix_cache\"}"), 512);
}

TEST_F(MetricsTest, SaysNothingOfTheDrainBeforeItIsKnown) {
  EXPECT_THAT(metrics_->Serialize(snapshot_),
              Not(HasSubstr("\nheadstart_predicted_drain_seconds")));
  snapshot_.predicted_drain = absl::ZeroDuration();
  EXPECT_EQ(Value("headstart_predicted_drain_seconds{model=\"m\"}"), 0);
  snapshot_.predicted_drain = absl::Milliseconds(1500);
  EXPECT_EQ(Value("headstart_predicted_drain_seconds{model=\"m\"}"), 1.5);
}

TEST_F(MetricsTest, TellsMainStepsFromUrgentOnes) {
  snapshot_.load.steps = 5;
  snapshot_.load.urgent_steps = 2;
  snapshot_.load.pieces = 11;
  EXPECT_EQ(Value("headstart_steps_total{model=\"m\",kind=\"main\"}"), 3);
  EXPECT_EQ(Value("headstart_steps_total{model=\"m\",kind=\"urgent\"}"), 2);
  EXPECT_EQ(Value("headstart_step_pieces_total{model=\"m\"}"), 11);
}

TEST_F(MetricsTest, CachedPagesAreNeitherFreeNorUsed) {
  snapshot_.pool_blocks = 10;
  snapshot_.pool_free = 8;
  snapshot_.pool_cached = 5;
  snapshot_.pool_evicted = 7;
  EXPECT_EQ(Value("headstart_kv_pool_blocks{state=\"free\"}"), 3);
  EXPECT_EQ(Value("headstart_kv_pool_blocks{state=\"cached\"}"), 5);
  EXPECT_EQ(Value("headstart_kv_pool_blocks{state=\"used\"}"), 2);
  EXPECT_EQ(Value("headstart_kv_cache_utilization_ratio"), 0.2);
  EXPECT_EQ(Value("headstart_kv_pool_evictions_total"), 7);
}

TEST_F(MetricsTest, TheObjectiveGrowsWithThePrompt) {
  const absl::Duration rest = absl::Milliseconds(1875);
  Promise(absl::Seconds(5) - rest, rest * 1024 / 640);  // 640 tokens: exactly what it takes
  Record();
  EXPECT_EQ(Valid(), 1);
  EXPECT_EQ(Within(), 1);
  Promise(absl::Seconds(5) - rest, rest);
  Record();
  EXPECT_EQ(Valid(), 1);
  EXPECT_EQ(Within(), 0);
}

TEST_F(MetricsTest, WhatTheServerCouldNotDoMissedTheObjective) {
  Promise(absl::Hours(1), absl::Hours(1));
  int count = 0;
  for (const auto code : {absl::StatusCode::kResourceExhausted, absl::StatusCode::kUnavailable,
                          absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kInternal}) {
    Record(absl::Status(code, "no"));
    EXPECT_EQ(Valid(), ++count) << code;
    EXPECT_EQ(Within(), 0);
  }
}

TEST_F(MetricsTest, WrongRequestsSayNothingOfTheServer) {
  for (const auto code : {absl::StatusCode::kInvalidArgument, absl::StatusCode::kNotFound,
                          absl::StatusCode::kPermissionDenied, absl::StatusCode::kAlreadyExists,
                          absl::StatusCode::kFailedPrecondition}) {
    Record(absl::Status(code, "no"));
  }
  metrics_->RecordCall({}, absl::DeadlineExceededError("no message came"));
  EXPECT_EQ(Valid(), 0);
  EXPECT_EQ(Within(), 0);
}

TEST_F(MetricsTest, WhoGivesUpAfterItsTimeWasOverCounts) {
  for (const auto code : {absl::StatusCode::kCancelled, absl::StatusCode::kAborted}) {
    Promise(absl::Seconds(6), absl::Milliseconds(1));
    Record(absl::Status(code, "changed its mind"));
    EXPECT_EQ(Valid(), 0);
    Promise(absl::Seconds(4), absl::Milliseconds(1));
    Record(absl::Status(code, "waited long enough"));
    EXPECT_EQ(Valid(), 1);
    EXPECT_EQ(Within(), 0);
  }
}

TEST_F(MetricsTest, SaysWhoItIsBeforeTheModelIsLoaded) {
  EXPECT_EQ(
      Value(absl::StrCat("headstart_build_info{backend=\"cpu\",options_hash=\"abc\",version=\"",
                         kVersion, "\"}")),
      1);
}

TEST_F(MetricsTest, TellsStuckAndTheEndOfADrain) {
  EXPECT_EQ(Value("headstart_stuck"), 0);
  EXPECT_EQ(Value("headstart_drain_deadline_seconds"), 0);
  snapshot_.stuck = true;
  snapshot_.drain_deadline = 1 << 30;
  EXPECT_EQ(Value("headstart_stuck"), 1);
  EXPECT_EQ(Value("headstart_drain_deadline_seconds"), 1 << 30);
}

}  // namespace
}  // namespace headstart
