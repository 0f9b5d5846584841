#include "server/admission.h"

#include <gtest/gtest.h>

#include <optional>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/error.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

constexpr absl::Time kNever = absl::InfiniteFuture();

absl::Status Loading() {
  return MakeError(absl::StatusCode::kUnavailable, ErrorReason::kLoading, "loading");
}

// An open door for three requests and a thousand tokens.
class AdmissionTest : public ::testing::Test {
 protected:
  AdmissionTest() : admission_({.max_requests = 3, .max_tokens = 1000}, Loading()) {
    admission_.Open();
  }
  Admission admission_;
};

TEST_F(AdmissionTest, IsClosedUntilOpened) {
  Admission admission({}, Loading());
  EXPECT_EQ(ReasonOf(admission.CheckOpen()), ErrorReason::kLoading);
  EXPECT_EQ(ReasonOf(admission.Admit("a", 1, kNever).status()), ErrorReason::kLoading);
  admission.Open();
  EXPECT_OK(admission.CheckOpen());
  EXPECT_OK(admission.Admit("a", 1, kNever));
}

TEST_F(AdmissionTest, ClosingKeepsTicketsGood) {
  ASSERT_OK_AND_ASSIGN(Ticket ticket, admission_.Admit("a", 10, kNever));
  admission_.Close(MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining, "draining"));
  EXPECT_EQ(ReasonOf(admission_.Admit("b", 1, kNever).status()), ErrorReason::kDraining);
  EXPECT_EQ(admission_.load().inflight_requests, 1);
  ticket.Start();
  EXPECT_EQ(admission_.load().queued_requests, 0);
}

TEST_F(AdmissionTest, RefusesMoreRequestsThanTheLimit) {
  std::vector<Ticket> tickets;
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_OK_AND_ASSIGN(Ticket ticket, admission_.Admit(id, 1, kNever));
    tickets.push_back(std::move(ticket));
  }
  const absl::Status refused = admission_.Admit("d", 1, kNever).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 requests")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kQueueFull);
  EXPECT_TRUE(RetryAfter(refused).has_value());
  tickets.pop_back();
  EXPECT_OK(admission_.Admit("d", 1, kNever));
}

TEST_F(AdmissionTest, RefusesMoreTokensThanTheLimit) {
  ASSERT_OK_AND_ASSIGN(Ticket ticket, admission_.Admit("a", 999, kNever));
  EXPECT_OK(admission_.Admit("b", 1, kNever));
  EXPECT_EQ(ReasonOf(admission_.Admit("c", 2, kNever).status()), ErrorReason::kQueueFull);
}

TEST_F(AdmissionTest, TakesALongPromptWhenNothingElseIsIn) {
  ASSERT_OK_AND_ASSIGN(Ticket ticket, admission_.Admit("a", 5000, kNever));
  EXPECT_EQ(ReasonOf(admission_.Admit("b", 1, kNever).status()), ErrorReason::kQueueFull);
}

TEST_F(AdmissionTest, RefusesAnIdThatIsInFlight) {
  std::optional<Ticket> ticket;
  {
    ASSERT_OK_AND_ASSIGN(Ticket first, admission_.Admit("a", 1, kNever));
    ticket = std::move(first);
  }
  EXPECT_THAT(admission_.Admit("a", 1, kNever), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_EQ(admission_.load().inflight_requests, 1);
  ticket.reset();
  EXPECT_OK(admission_.Admit("a", 1, kNever));
}

TEST_F(AdmissionTest, TellsWhatIsAhead) {
  ASSERT_OK_AND_ASSIGN(Ticket first, admission_.Admit("a", 100, kNever));
  first.Start();
  ASSERT_OK_AND_ASSIGN(Ticket second, admission_.Admit("b", 30, kNever));
  ASSERT_OK_AND_ASSIGN(Ticket third, admission_.Admit("c", 1, kNever));
  EXPECT_EQ(first.requests_ahead(), 0);
  EXPECT_EQ(third.requests_ahead(), 2);
  EXPECT_EQ(third.tokens_ahead(), 130);
}

TEST_F(AdmissionTest, CountsQueuedAndInflightApart) {
  ASSERT_OK_AND_ASSIGN(Ticket first, admission_.Admit("a", 100, kNever));
  ASSERT_OK_AND_ASSIGN(Ticket second, admission_.Admit("b", 30, kNever));
  first.Start();
  const Load load = admission_.load();
  EXPECT_EQ(load.queued_requests, 1);
  EXPECT_EQ(load.queued_tokens, 30);
  EXPECT_EQ(load.inflight_requests, 2);
  EXPECT_EQ(load.inflight_tokens, 130);
}

TEST_F(AdmissionTest, RefusesADeadlineThatHasPassed) {
  const absl::Status refused = admission_.Admit("a", 1, absl::Now() - absl::Seconds(1)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineExceeded);
}

TEST_F(AdmissionTest, RefusesADeadlineOutOfReach) {
  for (int i = 0; i < TokenRate::kMinRuns; ++i) {
    admission_.AddMeasurement(100, absl::Seconds(1));
  }
  // 400 tokens need 4 s at 100 tokens/s. Refused only when even half of that is too long.
  const absl::Status refused = admission_.Admit("a", 400, absl::Now() + absl::Seconds(1)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("400 tokens")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineUnreachable);
  EXPECT_OK(admission_.Admit("b", 400, absl::Now() + absl::Seconds(3)));
}

TEST_F(AdmissionTest, CountsQueuedButNotRunningTokensAgainstADeadline) {
  for (int i = 0; i < TokenRate::kMinRuns; ++i) {
    admission_.AddMeasurement(100, absl::Seconds(1));
  }
  ASSERT_OK_AND_ASSIGN(Ticket ahead, admission_.Admit("a", 900, kNever));
  const auto in_two_seconds = [] { return absl::Now() + absl::Seconds(2); };
  EXPECT_EQ(ReasonOf(admission_.Admit("b", 50, in_two_seconds()).status()),
            ErrorReason::kDeadlineUnreachable);
  ahead.Start();
  EXPECT_OK(admission_.Admit("b", 50, in_two_seconds()));
}

TEST_F(AdmissionTest, BelievesNoRateBeforeItHasSeenAFewRuns) {
  admission_.AddMeasurement(1, absl::Seconds(1000));
  EXPECT_OK(admission_.Admit("a", 900, absl::Now() + absl::Seconds(1)));
}

TEST_F(AdmissionTest, FastestRecentRunCounts) {
  admission_.AddMeasurement(1000, absl::Milliseconds(1));
  admission_.AddMeasurement(1, absl::Seconds(10));
  admission_.AddMeasurement(1, absl::Seconds(10));
  EXPECT_OK(admission_.Admit("a", 900, absl::Now() + absl::Seconds(1)));
}

TEST_F(AdmissionTest, RetryDelayFollowsTheRate) {
  for (int i = 0; i < TokenRate::kMinRuns; ++i) {
    admission_.AddMeasurement(100, absl::Seconds(1));
  }
  ASSERT_OK_AND_ASSIGN(Ticket ticket, admission_.Admit("a", 900, kNever));
  const absl::Status refused = admission_.Admit("b", 500, kNever).status();
  EXPECT_EQ(RetryAfter(refused), absl::Seconds(5));
}

TEST_F(AdmissionTest, WaitsUntilTheLastTicketIsBack) {
  std::optional<Ticket> ticket;
  {
    ASSERT_OK_AND_ASSIGN(Ticket admitted, admission_.Admit("a", 1, kNever));
    ticket = std::move(admitted);
  }
  EXPECT_FALSE(admission_.WaitUntilIdle(absl::Now()));
  std::thread releaser([&] { ticket.reset(); });
  EXPECT_TRUE(admission_.WaitUntilIdle(kNever));
  releaser.join();
}

TEST_F(AdmissionTest, NothingIsLeftAfterManyThreadsCameAndWent) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      for (int i = 0; i < 500; ++i) {
        auto ticket = admission_.Admit(absl::StrCat(t, ".", i), 100, kNever);
        if (ticket.ok() && i % 2 == 0) ticket->Start();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Load load = admission_.load();
  EXPECT_EQ(load.acquired, load.released);
  EXPECT_GT(load.acquired, 0);
  EXPECT_EQ(load.queued_requests, 0);
  EXPECT_EQ(load.queued_tokens, 0);
  EXPECT_EQ(load.inflight_requests, 0);
  EXPECT_EQ(load.inflight_tokens, 0);
}

}  // namespace
}  // namespace headstart
