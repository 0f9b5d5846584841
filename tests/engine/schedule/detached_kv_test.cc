// KV that is kept after compute: its room, its lease, and who may have it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/instant.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr char kNobody[] = "";

class DetachedKvTest : public SchedulerTest {
 protected:
  // Host memory of four pieces.
  DetachedKvTest() : SchedulerTest(SmallOptions(), {.host_chunks = 4 * kPieceChunks}) {}

  static std::vector<KvPart> Whole() { return {WholeKv(SmallOptions().geometry)}; }

  PrefillRequest WithLease(const std::string& id, absl::Duration lease) {
    PrefillRequest request = Detached(id, 200);
    request.detached->lease = lease;
    return request;
  }
  bool IsKept(const std::string& fetch_id) { return scheduler_->Find(fetch_id, kNobody).ok(); }
};

// ---- room

TEST_F(DetachedKvTest, ReservesAllItsRoomWhenItComes) {
  const Admitted a = MustAdd(Detached("a", 2 * kPiece + 10));
  EXPECT_EQ(host_->held(a.key), 2 * kPieceChunks + 2);
  EXPECT_THAT(RunAll(), ElementsAre(a.key, a.key, a.key));
  EXPECT_EQ(host_->held(a.key), 2 * kPieceChunks + 2);
  const auto reader = Reader(a);
  EXPECT_EQ(Take(*reader, 100), 2 * kPieceChunks + 2);
  EXPECT_EQ(host_->held(a.key), 2 * kPieceChunks + 2);
}

TEST_F(DetachedKvTest, ReservesNothingForWhatIsSkipped) {
  PrefillRequest request = Detached("a", 2 * kPiece);
  request.skip_tokens = 2 * kPiece - 1;
  const Admitted a = MustAdd(std::move(request));
  EXPECT_EQ(host_->held(a.key), 2);
  EXPECT_EQ(RunAll().size(), 2);
}

TEST_F(DetachedKvTest, LeavesRoomForAPieceOfOthers) {
  const Admitted kept = MustAdd(Detached("kept", 3 * kPiece));
  const absl::Status refused = Add(Detached("more", 1)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("24 of 24")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kHostMemoryFull);
  EXPECT_TRUE(RetryAfter(refused).has_value());
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);
  const Admitted flows = MustAdd(Request("flows", kPiece));
  EXPECT_THAT(RunAll(), ElementsAre(flows.key, kept.key, kept.key, kept.key));
  scheduler_->End(flows.key, absl::CancelledError("shipped"));
  ASSERT_OK(scheduler_->Release("kept", kNobody));
  EXPECT_OK(Add(Detached("more", 1)));
}

TEST_F(DetachedKvTest, TellsWhatWillNeverFit) {
  EXPECT_THAT(Add(Detached("a", 3 * kPiece + 1)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("26 chunks")));
  ExpectNothingLeft();
}

TEST_F(DetachedKvTest, TakesNothingFromThoseWhoseKvFlows) {
  const Admitted flows = MustAdd(Request("flows", 4 * kPiece));
  RunAll();  // all of the host memory
  EXPECT_EQ(ReasonOf(Add(Detached("a", 1)).status()), ErrorReason::kHostMemoryFull);
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);
}

TEST_F(DetachedKvTest, AnnouncedReadersNeedAWindowOnly) {
  const Admitted a = MustAdd(Detached("a", 6 * kPiece, Whole()));
  EXPECT_EQ(host_->held(a.key), 0);
  EXPECT_EQ(RunAll().size(), 4);
  const auto reader = Reader(a);
  EXPECT_EQ(Take(*reader, 100), 4 * kPieceChunks);
  EXPECT_FALSE(scheduler_->Next(now_).has_value());  // taken, not acknowledged
  ASSERT_OK(reader->Acknowledge(kPieceChunks));
  EXPECT_EQ(RunAll().size(), 1);
  ASSERT_OK(reader->Acknowledge(3 * kPieceChunks));
  EXPECT_EQ(RunAll().size(), 1);
  EXPECT_EQ(Take(*reader, 100), 2 * kPieceChunks);
  ASSERT_OK(reader->Acknowledge(6 * kPieceChunks));
  EXPECT_EQ(host_->held(a.key), 0);
  EXPECT_TRUE(IsKept("a"));
}

TEST_F(DetachedKvTest, BadReadersAreRefusedWithoutATrace) {
  PrefillRequest request = Detached("a", 10, Whole());
  request.detached->readers[0].head_count = 1;
  EXPECT_THAT(Add(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("KV head 1")));
  EXPECT_FALSE(IsKept("a"));
  ExpectNothingLeft();
  EXPECT_OK(Add(Detached("a", 10, Whole())));
}

// ---- leases

TEST_F(DetachedKvTest, GrantsLeases) {
  const SchedulerOptions options = SmallOptions();
  EXPECT_EQ(MustAdd(WithLease("a", absl::ZeroDuration())).lease, options.default_lease);
  EXPECT_EQ(MustAdd(WithLease("b", absl::Seconds(5))).lease, absl::Seconds(5));
  EXPECT_EQ(MustAdd(WithLease("c", absl::Hours(5))).lease, options.max_lease);
  EXPECT_EQ(MustAdd(Request("d", 10)).lease, absl::ZeroDuration());
}

TEST_F(DetachedKvTest, LeaseBeginsWhenThePromptIsComputed) {
  const Admitted a = MustAdd(WithLease("a", absl::Seconds(5)));
  Pass(absl::Seconds(100));
  EXPECT_EQ(scheduler_->Expire(now_), Instant::InfiniteFuture());
  EXPECT_EQ(scheduler_->load().leases, 0);
  RunAll();
  EXPECT_EQ(scheduler_->load().leases, 1);
  EXPECT_EQ(scheduler_->load().lease_tokens, 200);
  EXPECT_EQ(scheduler_->Expire(now_), now_ + absl::Seconds(5));
  Pass(absl::Seconds(5) - absl::Nanoseconds(1));
  scheduler_->Expire(now_);
  EXPECT_TRUE(IsKept("a"));
  Pass(absl::Nanoseconds(1));
  scheduler_->Expire(now_);
  EXPECT_FALSE(IsKept("a"));
  EXPECT_THAT(EndOf(a), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("lease of 5s")));
  EXPECT_EQ(ReasonOf(EndOf(a)), ErrorReason::kLeaseExpired);
  EXPECT_EQ(scheduler_->load().leases_expired, 1);
  ExpectNothingLeft();
}

TEST_F(DetachedKvTest, DeadlineCountsUntilThePromptIsComputed) {
  for (const char* id : {"late", "in time"}) {
    PrefillRequest request = WithLease(id, absl::Minutes(1));
    request.deadline = now_ + absl::Seconds(1);
    MustAdd(std::move(request));
  }
  std::optional<Step> late = scheduler_->Next(now_);
  Finish(*late);
  Pass(absl::Seconds(1));
  scheduler_->Expire(now_);
  EXPECT_TRUE(IsKept("late"));  // computed
  EXPECT_FALSE(IsKept("in time"));
  EXPECT_EQ(scheduler_->load().leases_expired, 0);
}

TEST_F(DetachedKvTest, RenewalIsAnotherLeaseFromNowOn) {
  MustAdd(WithLease("a", absl::Seconds(5)));
  RunAll();
  for (int i = 0; i < 3; ++i) {
    Pass(absl::Seconds(4));
    scheduler_->Expire(now_);
    ASSERT_OK_AND_ASSIGN(const absl::Duration lease, scheduler_->Renew("a", kNobody, now_));
    EXPECT_EQ(lease, absl::Seconds(5));
  }
  EXPECT_EQ(scheduler_->Expire(now_), now_ + absl::Seconds(5));
  Pass(absl::Seconds(5));
  scheduler_->Expire(now_);
  EXPECT_THAT(scheduler_->Renew("a", kNobody, now_), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(DetachedKvTest, RenewalBeforeComputeChangesNothing) {
  PrefillRequest request = WithLease("a", absl::Minutes(1));
  request.deadline = now_ + absl::Seconds(1);
  MustAdd(std::move(request));
  EXPECT_OK(scheduler_->Renew("a", kNobody, now_));
  EXPECT_EQ(scheduler_->Expire(now_), now_ + absl::Seconds(1));
}

TEST_F(DetachedKvTest, LeaseCanEndWhileItIsRead) {
  const Admitted a = MustAdd(WithLease("a", absl::Seconds(5)));
  RunAll();
  const auto reader = Reader(a);
  EXPECT_EQ(Take(*reader, 1), 1);
  Pass(absl::Seconds(5));
  scheduler_->Expire(now_);
  const ShipmentReader::Event event = reader->Next();
  EXPECT_EQ(ReasonOf(std::get<ShipmentReader::Ended>(event).status), ErrorReason::kLeaseExpired);
  ExpectNothingLeft();
}

// ---- who may have it

TEST_F(DetachedKvTest, UnknownIds) {
  MustAdd(Request("attached", 10));
  for (const char* id : {"never", "attached", ""}) {
    const absl::Status refused = scheduler_->Find(id, kNobody).status();
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kNotFound));
    EXPECT_EQ(ReasonOf(refused), ErrorReason::kUnknownFetchId);
    EXPECT_THAT(scheduler_->Renew(id, kNobody, now_), StatusIs(absl::StatusCode::kNotFound));
    EXPECT_THAT(scheduler_->Release(id, kNobody), StatusIs(absl::StatusCode::kNotFound));
  }
}

TEST_F(DetachedKvTest, OnlyItsOwnerMayTouchIt) {
  PrefillRequest request = Detached("a", 10);
  request.detached->owner = "decode-1";
  const Admitted a = MustAdd(std::move(request));
  for (const char* other : {"decode-2", ""}) {
    const absl::Status refused = scheduler_->Find("a", other).status();
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kPermissionDenied));
    EXPECT_EQ(ReasonOf(refused), ErrorReason::kPeerNotAllowed);
    EXPECT_THAT(scheduler_->Renew("a", other, now_), StatusIs(absl::StatusCode::kPermissionDenied));
    EXPECT_THAT(scheduler_->Release("a", other), StatusIs(absl::StatusCode::kPermissionDenied));
  }
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<Shipment> found, scheduler_->Find("a", "decode-1"));
  EXPECT_EQ(found, a.shipment);
  EXPECT_OK(scheduler_->Renew("a", "decode-1", now_));
  EXPECT_OK(scheduler_->Release("a", "decode-1"));
}

TEST_F(DetachedKvTest, WithoutAnOwnerWhoeverKnowsTheId) {
  MustAdd(Detached("a", 10));
  EXPECT_OK(scheduler_->Find("a", "anyone"));
  EXPECT_OK(scheduler_->Release("a", "anyone"));
}

// ---- release

TEST_F(DetachedKvTest, ReleaseEndsItWhereverItIs) {
  const Admitted kept = MustAdd(Detached("kept", 10));
  RunAll();
  const Admitted running = MustAdd(Detached("running", 10, Whole()));
  {
    const std::optional<Step> step = scheduler_->Next(now_);
    ASSERT_EQ(KeyOf(step), running.key);
    const Admitted queued = MustAdd(Detached("queued", 10));
    for (const Admitted& admitted : {kept, queued, running}) {
      const std::string id = admitted.key == kept.key     ? "kept"
                             : admitted.key == queued.key ? "queued"
                                                          : "running";
      ASSERT_OK(scheduler_->Release(id, kNobody));
      EXPECT_THAT(EndOf(admitted), StatusIs(absl::StatusCode::kAborted));
      EXPECT_EQ(ReasonOf(EndOf(admitted)), ErrorReason::kKvReleased);
      EXPECT_THAT(scheduler_->Find(id, kNobody), StatusIs(absl::StatusCode::kNotFound));
      EXPECT_THAT(scheduler_->Release(id, kNobody), StatusIs(absl::StatusCode::kNotFound));
    }
    EXPECT_TRUE(step->pieces[0].cancelled->load());
    Fail(*step, CancelledBefore(0));
  }
  ExpectNothingLeft();
}

TEST_F(DetachedKvTest, FailedPromptIsUnknown) {
  MustAdd(Detached("a", 10));
  const std::optional<Step> step = scheduler_->Next(now_);
  Fail(*step, absl::InternalError("broken"));
  EXPECT_THAT(scheduler_->Find("a", kNobody), StatusIs(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace headstart
