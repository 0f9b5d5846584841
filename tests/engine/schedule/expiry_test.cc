// How requests end by time alone: deadlines, and readers that take nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/instant.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// ---- deadlines

class DeadlineTest : public SchedulerTest {
 protected:
  PrefillRequest Until(PrefillRequest request, absl::Duration left) {
    request.deadline = now_ + left;
    return request;
  }
};

TEST_F(DeadlineTest, TellsWhenToComeAgain) {
  MustAdd(Request("forever", 10));
  EXPECT_EQ(scheduler_->Expire(now_), Instant::InfiniteFuture());
  MustAdd(Until(Request("a", 10), absl::Seconds(5)));
  MustAdd(Until(Request("b", 10), absl::Seconds(3)));
  EXPECT_EQ(scheduler_->Expire(now_), now_ + absl::Seconds(3));
}

TEST_F(DeadlineTest, EndsARequestInTheQueueWhileAnotherComputes) {
  const Admitted a = MustAdd(Request("a", 200));
  const Admitted b = MustAdd(Until(Request("b", 200), absl::Seconds(1)));
  const std::optional<Step> step = scheduler_->Next(now_);
  Pass(absl::Seconds(1) - absl::Nanoseconds(1));
  scheduler_->Expire(now_);
  EXPECT_EQ(scheduler_->load().inflight_requests, 2);
  Pass(absl::Nanoseconds(1));
  scheduler_->Expire(now_);
  EXPECT_THAT(EndOf(b), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("in the queue")));
  EXPECT_EQ(ReasonOf(EndOf(b)), ErrorReason::kDeadlineExceeded);
  EXPECT_FALSE(step->pieces[0].cancelled->load());
  EXPECT_EQ(scheduler_->load().leases_expired, 0);
}

TEST_F(DeadlineTest, EndsARequestInAStep) {
  const Admitted a = MustAdd(Until(Request("a", 10), absl::Seconds(1)));
  const std::optional<Step> step = scheduler_->Next(now_);
  Pass(absl::Seconds(1));
  EXPECT_EQ(scheduler_->Expire(now_), Instant::InfiniteFuture());
  EXPECT_TRUE(step->pieces[0].cancelled->load());
  EXPECT_THAT(EndOf(a), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("before")));
}

TEST_F(DeadlineTest, EndsARequestThatShips) {
  const Admitted a = MustAdd(Until(Request("a", 10), absl::Seconds(1)));
  RunAll();
  Pass(absl::Seconds(1));
  scheduler_->Expire(now_);
  EXPECT_THAT(EndOf(a),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("did not take KV")));
  ExpectNothingLeft();
}

// ---- stalled readers

class StallTest : public SchedulerTest {
 protected:
  // Host memory of two pieces.
  StallTest() : SchedulerTest(SmallOptions(), {.host_chunks = 2 * kPieceChunks}) {}

  // As the engine does: as often as Expire says while time passes, and Next where there is room.
  void Live(absl::Duration time) {
    const Instant end = now_ + time;
    for (;;) {
      RunAll();
      const Instant next = scheduler_->Expire(now_);
      if (next > end) break;
      now_ = next;
    }
    now_ = end;
  }
  bool IsIn(const Admitted& admitted) { return !absl::IsCancelled(EndOf(admitted)); }

  const absl::Duration limit_ = SmallOptions().stall_timeout;
};

TEST_F(StallTest, GivesUpWhoeverHoldsRoomThatOthersWaitFor) {
  const Admitted stalled = MustAdd(Request("stalled", 2 * kPiece));
  Live(absl::Seconds(1));
  const Admitted waits = MustAdd(Request("waits", 10));
  Live(limit_ - absl::Seconds(1));
  EXPECT_TRUE(IsIn(stalled));
  Live(absl::Seconds(2));
  EXPECT_THAT(EndOf(stalled), StatusIs(absl::StatusCode::kCancelled, HasSubstr("nobody took KV")));
  EXPECT_EQ(ReasonOf(EndOf(stalled)), ErrorReason::kClientStalled);
  EXPECT_TRUE(IsIn(waits));
  EXPECT_EQ(pages_->free_pages(), pages_->num_pages());  // computed
}

TEST_F(StallTest, GivesUpWhoeverWaitsForItsOwnReader) {
  const Admitted stalled = MustAdd(Request("stalled", 3 * kPiece));
  Live(limit_ + absl::Seconds(1));
  EXPECT_EQ(ReasonOf(EndOf(stalled)), ErrorReason::kClientStalled);
  ExpectNothingLeft();
}

TEST_F(StallTest, NobodyIsGivenUpWhileNobodyWaits) {
  const Admitted slow = MustAdd(Request("slow", 2 * kPiece));
  Live(10 * limit_);
  EXPECT_TRUE(IsIn(slow));
}

TEST_F(StallTest, TimeBeforeSomebodyWaitedDoesNotCount) {
  const Admitted slow = MustAdd(Request("slow", 2 * kPiece));
  Live(10 * limit_);
  MustAdd(Request("waits", 10));
  Live(limit_ / 2);
  EXPECT_TRUE(IsIn(slow));
  Live(limit_);
  EXPECT_FALSE(IsIn(slow));
}

TEST_F(StallTest, ReaderThatTakesABitIsNotStalled) {
  const Admitted slow = MustAdd(Request("slow", 3 * kPiece));
  const auto reader = Reader(slow);
  Live(limit_ / 2);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Take(*reader, 1), 1);
    Live(limit_ - absl::Seconds(1));
  }
  EXPECT_TRUE(IsIn(slow));
}

TEST_F(StallTest, ReaderWhosePlaceIsFilledAgainIsNotStalled) {
  // Before every look the reader has taken a piece and the next one has come: the same amount.
  const Admitted steady = MustAdd(Request("steady", 20 * kPiece));
  const auto reader = Reader(steady);
  Live(absl::Seconds(1));
  for (int i = 0; i < 15; ++i) {
    EXPECT_EQ(Take(*reader, kPieceChunks), kPieceChunks);
    RunAll();
    Pass(limit_ / 5);
    scheduler_->Expire(now_);
  }
  EXPECT_TRUE(IsIn(steady));
}

TEST_F(StallTest, KvThatReservedItsRoomMayStay) {
  const Admitted kept = MustAdd(Detached("kept", kPiece));
  const Admitted stalled = MustAdd(Request("stalled", 2 * kPiece));
  Live(2 * limit_);
  EXPECT_TRUE(IsIn(kept));
  EXPECT_FALSE(IsIn(stalled));
}

TEST_F(StallTest, AnnouncedReadersMustTakeToo) {
  const KvPart whole = WholeKv(SmallOptions().geometry);
  const Admitted detached = MustAdd(Detached("a", 3 * kPiece, {whole}));
  Live(limit_ + absl::Seconds(1));
  EXPECT_EQ(ReasonOf(EndOf(detached)), ErrorReason::kClientStalled);
  ExpectNothingLeft();
}

}  // namespace
}  // namespace headstart
