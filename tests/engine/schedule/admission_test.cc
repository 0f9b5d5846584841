// Who may come in.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// An open door for three requests and a thousand tokens.
class AdmissionTest : public SchedulerTest {
 protected:
  AdmissionTest() : SchedulerTest(Options()) {}

  static SchedulerOptions Options() {
    SchedulerOptions options = SmallOptions();
    options.max_requests = 3;
    options.max_tokens = 1000;
    return options;
  }

  // A whole prompt, from coming to its end.
  void Measure(int64_t num_tokens, double seconds) {
    const Admitted admitted = MustAdd(Request("measured", num_tokens));
    const auto reader = Reader(admitted);
    std::optional<Step> step = scheduler_->Next(now_);
    ASSERT_TRUE(step.has_value() && step->pieces[0].ends_prompt);
    Finish(*step, seconds);
    scheduler_->End(admitted.key, absl::CancelledError("done"));
  }

  // 100 tokens a second.
  void MeasureAFew() {
    for (int i = 0; i < TokenRate::kMinRuns; ++i) Measure(100, 1);
  }

  PrefillRequest Until(PrefillRequest request, absl::Duration left) {
    request.deadline = now_ + left;
    return request;
  }
};

TEST_F(AdmissionTest, IsClosedUntilOpened) {
  Scheduler scheduler(SmallOptions(), pages_.get(), host_.get(),
                      MakeError(absl::StatusCode::kUnavailable, ErrorReason::kLoading, "loading"));
  EXPECT_EQ(ReasonOf(scheduler.closed()), ErrorReason::kLoading);
  EXPECT_EQ(ReasonOf(scheduler.Add(Request("a", 1), "", now_).status()), ErrorReason::kLoading);
  scheduler.Open();
  EXPECT_OK(scheduler.closed());
  EXPECT_OK(scheduler.Add(Request("a", 1), "", now_));
}

TEST_F(AdmissionTest, ClosingKeepsWhoIsIn) {
  MustAdd(Request("a", 10));
  scheduler_->Close(MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining, "draining"));
  EXPECT_EQ(ReasonOf(Add(Request("b", 1)).status()), ErrorReason::kDraining);
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);
  EXPECT_EQ(RunAll().size(), 1);
}

TEST_F(AdmissionTest, RefusesMoreRequestsThanTheLimit) {
  Admitted last;
  for (const char* id : {"a", "b", "c"}) last = MustAdd(Request(id, 1));
  const absl::Status refused = Add(Request("d", 1)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 requests")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kQueueFull);
  EXPECT_TRUE(RetryAfter(refused).has_value());
  scheduler_->End(last.key, absl::CancelledError("gone"));
  EXPECT_OK(Add(Request("d", 1)));
}

TEST_F(AdmissionTest, RefusesMoreTokensThanTheLimit) {
  MustAdd(Request("a", 999));
  EXPECT_OK(Add(Request("b", 1)));
  EXPECT_EQ(ReasonOf(Add(Request("c", 2)).status()), ErrorReason::kQueueFull);
}

TEST_F(AdmissionTest, TakesALongPromptWhenNothingElseIsIn) {
  MustAdd(Request("a", 5000));
  EXPECT_EQ(ReasonOf(Add(Request("b", 1)).status()), ErrorReason::kQueueFull);
}

TEST_F(AdmissionTest, CountsWhatIsComputedUntilItEnds) {
  const Admitted a = MustAdd(Request("a", 999));
  RunAll();
  EXPECT_EQ(ReasonOf(Add(Request("b", 2)).status()), ErrorReason::kQueueFull);
  scheduler_->End(a.key, absl::CancelledError("shipped"));
  EXPECT_OK(Add(Request("b", 2)));
}

TEST_F(AdmissionTest, RefusesAnIdThatIsInFlight) {
  const Admitted first = MustAdd(Request("a", 1));
  const absl::Status refused = Add(Request("a", 1)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("request_id: a")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDuplicateRequestId);
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);
  scheduler_->End(first.key, absl::CancelledError("gone"));
  EXPECT_OK(Add(Request("a", 1)));
}

TEST_F(AdmissionTest, IdStaysInFlightUntilTheStepOfACancelledRequestEnds) {
  const Admitted first = MustAdd(Request("a", 1));
  const std::optional<Step> step = scheduler_->Next(now_);
  scheduler_->End(first.key, absl::CancelledError("gone"));
  EXPECT_THAT(Add(Request("a", 1)), StatusIs(absl::StatusCode::kAlreadyExists));
  Fail(*step, CancelledBefore(1));
  EXPECT_OK(Add(Request("a", 1)));
}

TEST_F(AdmissionTest, TellsWhatIsAhead) {
  const Admitted first = MustAdd(Request("a", 100));
  EXPECT_EQ(first.requests_ahead, 0);
  std::optional<Step> step = scheduler_->Next(now_);
  MustAdd(Request("b", 30));
  const Admitted third = MustAdd(Request("c", 1));
  EXPECT_EQ(third.requests_ahead, 2);
  EXPECT_EQ(third.tokens_ahead, 130);
}

TEST_F(AdmissionTest, KvThatIsKeptIsNotAhead) {
  MustAdd(Detached("kept", 100));
  MustAdd(Request("shipping", 100));
  RunAll();
  const Admitted third = MustAdd(Request("c", 1));
  EXPECT_EQ(third.requests_ahead, 0);
  EXPECT_EQ(third.tokens_ahead, 0);
}

TEST_F(AdmissionTest, CountsQueuedAndInflightApart) {
  MustAdd(Request("a", 100));
  MustAdd(Request("b", 30));
  const std::optional<Step> step = scheduler_->Next(now_);
  const SchedulerLoad& load = scheduler_->load();
  EXPECT_EQ(load.queued_requests, 1);
  EXPECT_EQ(load.queued_tokens, 30);
  EXPECT_EQ(load.inflight_requests, 2);
  EXPECT_EQ(load.inflight_tokens, 130);
}

TEST_F(AdmissionTest, RefusesADeadlineThatHasPassed) {
  for (const absl::Duration left : {absl::ZeroDuration(), -absl::Seconds(1)}) {
    const absl::Status refused = Add(Until(Request("a", 1), left)).status();
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded));
    EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineExceeded);
  }
}

TEST_F(AdmissionTest, RefusesADeadlineOutOfReach) {
  MeasureAFew();
  // 400 tokens need 4 s at 100 tokens/s. Refused only when even half of that is too long.
  const absl::Status refused = Add(Until(Request("a", 400), absl::Seconds(1))).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("400 tokens")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineUnreachable);
  EXPECT_OK(Add(Until(Request("b", 400), absl::Seconds(2))));
}

TEST_F(AdmissionTest, CountsQueuedButNotRunningTokensAgainstADeadline) {
  MeasureAFew();
  MustAdd(Request("a", 900));
  EXPECT_EQ(ReasonOf(Add(Until(Request("b", 50), absl::Seconds(2))).status()),
            ErrorReason::kDeadlineUnreachable);
  const std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_OK(Add(Until(Request("b", 50), absl::Seconds(2))));
}

TEST_F(AdmissionTest, BelievesNoRateBeforeItHasSeenAFewRuns) {
  for (int i = 1; i < TokenRate::kMinRuns; ++i) Measure(1, 1000);
  EXPECT_OK(Add(Until(Request("a", 900), absl::Seconds(1))));
}

TEST_F(AdmissionTest, FastestRecentRunCounts) {
  Measure(500, 0.001);
  for (int i = 1; i < TokenRate::kMinRuns; ++i) Measure(1, 10);
  EXPECT_OK(Add(Until(Request("a", 900), absl::Seconds(1))));
}

TEST_F(AdmissionTest, RateIsThatOfWholePrompts) {
  for (int i = 0; i < TokenRate::kMinRuns; ++i) {
    const Admitted admitted = MustAdd(Request("measured", 1000));  // two pieces
    for (int piece = 0; piece < 2; ++piece) {
      std::optional<Step> step = scheduler_->Next(now_);
      Finish(*step, 5);
    }
    scheduler_->End(admitted.key, absl::CancelledError("done"));
  }
  EXPECT_EQ(ReasonOf(Add(Until(Request("a", 500), absl::Seconds(2.4))).status()),
            ErrorReason::kDeadlineUnreachable);
  EXPECT_OK(Add(Until(Request("a", 500), absl::Seconds(2.6))));
}

TEST_F(AdmissionTest, RetryDelayFollowsTheRate) {
  MeasureAFew();
  MustAdd(Request("a", 900));
  EXPECT_EQ(RetryAfter(Add(Request("b", 500)).status()), absl::Seconds(5));
}

TEST_F(AdmissionTest, NothingIsLeftAfterManyCameAndWent) {
  for (int i = 0; i < 500; ++i) {
    const absl::StatusOr<Admitted> admitted = Add(Request(absl::StrCat(i), 300));
    if (i % 3 == 0) RunAll();
    if (i % 2 == 0 && admitted.ok()) scheduler_->End(admitted->key, absl::CancelledError("gone"));
    if (i % 7 == 0) scheduler_->EndAll(absl::CancelledError("all"));
  }
  scheduler_->EndAll(absl::CancelledError("all"));
  EXPECT_GT(scheduler_->load().acquired, 0);
  ExpectNothingLeft();
}

}  // namespace
}  // namespace headstart
