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

TEST_F(AdmissionTest, IdIsFreeAsSoonAsItsRequestHasEnded) {
  const Admitted first = MustAdd(Request("a", 1));
  const std::optional<Step> step = scheduler_->Next(now_);
  scheduler_->End(first.key, absl::CancelledError("gone"));
  EXPECT_OK(Add(Request("a", 1))) << "though the step of the first one still runs";
  Fail(*step, CancelledBefore(1));
  EXPECT_THAT(Add(Request("a", 1)), StatusIs(absl::StatusCode::kAlreadyExists))
      << "the end of the first one's step is not the end of the second";
}

class AttemptTest : public AdmissionTest {
 protected:
  static PrefillRequest Attempt(const std::string& key, int64_t num_tokens = 1) {
    PrefillRequest request = Request("a", num_tokens);
    request.attempt_key = key;
    return request;
  }
};

TEST_F(AttemptTest, TakesThePlaceOfTheOneBefore) {
  for (const bool runs : {false, true}) {
    const Admitted first = MustAdd(Attempt("key"));
    std::optional<Step> step;
    if (runs) step = scheduler_->Next(now_);
    ASSERT_OK_AND_ASSIGN(const auto reader, first.shipment->Open(std::nullopt, 0));
    const Admitted second = MustAdd(Attempt("key"));
    const auto event = reader->Next();
    EXPECT_THAT(std::get<ShipmentReader::Ended>(event).status,
                StatusIs(absl::StatusCode::kCancelled, HasSubstr("later attempt")));
    EXPECT_EQ(scheduler_->Requests(10).size(), 1u);
    if (runs) Fail(*step, CancelledBefore(1));
    EXPECT_EQ(RunAll(), std::vector<uint64_t>{second.key});
    scheduler_->End(second.key, absl::CancelledError("shipped"));
    EXPECT_EQ(scheduler_->load().inflight_requests, 0);
  }
}

TEST_F(AttemptTest, TakesItsRoomInTheQueue) {
  MustAdd(Attempt("key", 900));
  EXPECT_OK(Add(Attempt("key", 900)));
}

TEST_F(AttemptTest, AnotherCallsIsRefused) {
  const Admitted first = MustAdd(Attempt("key"));
  for (const char* key : {"other", ""}) {
    EXPECT_EQ(ReasonOf(Add(Attempt(key)).status()), ErrorReason::kDuplicateRequestId) << key;
  }
  scheduler_->End(first.key, absl::CancelledError("gone"));
  MustAdd(Attempt(""));
  EXPECT_EQ(ReasonOf(Add(Attempt("")).status()), ErrorReason::kDuplicateRequestId)
      << "two without a key are no attempts at the same call";
}

TEST_F(AdmissionTest, TellsWhatIsAhead) {
  const Admitted first = MustAdd(Request("a", 100));
  EXPECT_EQ(first.estimate.requests_ahead, 0);
  std::optional<Step> step = scheduler_->Next(now_);
  MustAdd(Request("b", 100));
  const Admitted third = MustAdd(Request("c", 100));
  EXPECT_EQ(third.estimate.requests_ahead, 2);
  EXPECT_EQ(third.estimate.tokens_ahead, 200);
}

TEST_F(AdmissionTest, KvThatIsKeptIsNotAhead) {
  MustAdd(Detached("kept", 100));
  MustAdd(Request("shipping", 100));
  RunAll();
  const Admitted third = MustAdd(Request("c", 1));
  EXPECT_EQ(third.estimate.requests_ahead, 0);
  EXPECT_EQ(third.estimate.tokens_ahead, 0);
}

TEST_F(AdmissionTest, CountsQueuedAndInflightApart) {
  MustAdd(Request("a", 100));
  MustAdd(Request("b", 200));
  const std::optional<Step> step = scheduler_->Next(now_);
  const SchedulerLoad& load = scheduler_->load();
  EXPECT_EQ(load.queued_requests, 1);
  EXPECT_EQ(load.queued_tokens, 200);
  EXPECT_EQ(load.inflight_requests, 2);
  EXPECT_EQ(load.inflight_tokens, 300);
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
