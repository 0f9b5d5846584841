// What runs next, and how requests end that somebody ends.
#include "engine/schedule/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "kernels/base/instant.h"
#include "kernels/base/nonfinite.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::StatusIs;

absl::Status Cancelled() { return absl::CancelledError("the client went"); }

// ---- order and pieces

TEST_F(SchedulerTest, NothingRunsWithoutRequests) {
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  EXPECT_EQ(scheduler_->Expire(now_), Instant::InfiniteFuture());
}

TEST_F(SchedulerTest, WhatTakesLeastGoesFirst) {
  const uint64_t a = MustAdd(Request("a", 3 * kPiece)).key;
  const uint64_t b = MustAdd(Request("b", 10)).key;
  const uint64_t c = MustAdd(Request("c", kPiece)).key;
  EXPECT_THAT(RunAll(), ElementsAre(b, c, a, a, a));
}

TEST_F(SchedulerTest, CutsAPromptIntoPieces) {
  PrefillRequest request = Request("a", 2 * kPiece + 100);
  for (size_t i = 0; i < request.token_ids.size(); ++i) request.token_ids[i] = int(i);
  const uint64_t key = MustAdd(std::move(request)).key;
  int32_t slot = -1;
  for (int64_t i = 0; i < 3; ++i) {
    std::optional<Step> step = scheduler_->Next(now_);
    ASSERT_TRUE(step.has_value());
    ASSERT_EQ(step->pieces.size(), 1);
    const Piece& piece = step->pieces[0];
    EXPECT_EQ(piece.request, key);
    EXPECT_EQ(piece.first_position, i * kPiece);
    EXPECT_EQ(piece.num_tokens(), i < 2 ? kPiece : 100);
    EXPECT_EQ(piece.token_ids[0], i * kPiece);
    EXPECT_EQ(piece.prompt_tokens, 2 * kPiece + 100);
    EXPECT_EQ(piece.starts_slot, i == 0);
    EXPECT_EQ(piece.ends_prompt, i == 2);
    EXPECT_EQ(piece.pages.size(), 9);  // of the whole prompt
    EXPECT_EQ(piece.chunks.size(), i < 2 ? 4 : 1);
    EXPECT_EQ(piece.host.size(), 2 * piece.chunks.size());
    EXPECT_FALSE(piece.cancelled->load());
    if (i == 0) slot = piece.slot;
    EXPECT_EQ(piece.slot, slot);
    Finish(*step);
  }
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
}

TEST_F(SchedulerTest, PieceSaysWhatTheRequestAskedFor) {
  PrefillRequest dense = Request("dense", 10);
  dense.sampling.seed = 5;
  PrefillRequest sparse = Request("sparse", 10);
  sparse.attention.enabled = true;
  sparse.attention.stride = 8;
  MustAdd(std::move(dense));
  MustAdd(std::move(sparse));
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_EQ(step->pieces[0].attention, nullptr);
  EXPECT_EQ(step->pieces[0].sampling->seed, 5);
  ASSERT_NE(step->pieces[1].attention, nullptr);
  EXPECT_EQ(step->pieces[1].attention->stride, 8);
}

TEST_F(SchedulerTest, SkippedTokensAreComputedAndNotShipped) {
  PrefillRequest request = Request("a", 2 * kPiece);
  request.skip_tokens = kPiece + 200;
  MustAdd(std::move(request));
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_EQ(step->pieces[0].num_tokens(), kPiece);
  EXPECT_THAT(step->pieces[0].chunks, IsEmpty());
  EXPECT_THAT(step->pieces[0].host, IsEmpty());
  Finish(*step);
  step = scheduler_->Next(now_);
  ASSERT_EQ(step->pieces[0].chunks.size(), 3);
  EXPECT_EQ(step->pieces[0].chunks[0].begin, kPiece + 200);
  EXPECT_EQ(step->pieces[0].chunks[0].count, 56);
}

TEST_F(SchedulerTest, ResultAddsUpThePieces) {
  const Instant start = now_;
  const Admitted admitted = MustAdd(Request("a", 2 * kPiece));
  const auto reader = Reader(admitted);
  for (int i = 1; i <= 2; ++i) {
    Pass(absl::Seconds(1));
    std::optional<Step> step = scheduler_->Next(now_);
    PublishAll(step->pieces[0]);
    PieceResult result;
    result.result.first_token.id = 10 * i;
    result.result.selection_seconds = 1.0 * i;
    result.result.attention_seconds = 2.0 * i;
    result.result.compute_seconds = 4.0 * i;
    Pass(absl::Seconds(10));
    scheduler_->Finish(*step, {result}, now_);
  }
  EXPECT_EQ(Take(*reader, 100), 2 * kPieceChunks);
  const ShipmentReader::Event event = reader->Next();
  const PrefillResult& result = *std::get<ShipmentReader::Ended>(event).result;
  EXPECT_EQ(result.first_token.id, 20);
  EXPECT_EQ(result.selection_seconds, 3);
  EXPECT_EQ(result.attention_seconds, 6);
  EXPECT_EQ(result.compute_seconds, 12);
  EXPECT_EQ(result.accepted_at, start);
  EXPECT_EQ(result.started_at, start + absl::Seconds(1));
  EXPECT_EQ(result.computed_at, start + absl::Seconds(22));
}

// ---- device

TEST_F(SchedulerTest, DeviceIsFreeWhenThePromptIsComputed) {
  MustAdd(Request("a", 2 * kPiece));
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_EQ(pages_->free_pages(), 100 - 8);
  Finish(*step);
  EXPECT_EQ(pages_->free_pages(), 100 - 8);
  step = scheduler_->Next(now_);
  Finish(*step);
  EXPECT_EQ(pages_->free_pages(), 100);
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);  // it ships still
}

TEST_F(SchedulerTest, StartsNoMoreThanTheSlots) {
  SchedulerOptions options = SmallOptions();
  options.num_slots = 2;
  Make(options, {.host_chunks = 2 * kPieceChunks});
  // Both first pieces fill the host memory: two requests between their first and last piece.
  const Admitted a = MustAdd(Prioritised(Request("a", 3 * kPiece), 2));
  const Admitted b = MustAdd(Prioritised(Request("b", 2 * kPiece), 1));
  const Admitted c = MustAdd(Request("c", 10));
  const auto a_reader = Reader(a), b_reader = Reader(b);
  EXPECT_THAT(RunAll(), ElementsAre(a.key, a.key));
  Take(*a_reader, kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(a.key));
  Take(*a_reader, 2 * kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(b.key, b.key));
  Take(*b_reader, 2 * kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(c.key));
}

TEST_F(SchedulerTest, WaitsForPagesOfTheDeviceAndIsNotOvertaken) {
  Make(SmallOptions(), {.pages = 11, .host_chunks = kPieceChunks});
  const Admitted a = MustAdd(Prioritised(Request("a", 2 * kPiece), 2));
  const Admitted b = MustAdd(Prioritised(Request("b", kPiece), 1));
  const Admitted c = MustAdd(Request("c", 257));  // would fit
  const auto reader = Reader(a), b_reader = Reader(b);
  EXPECT_THAT(RunAll(), ElementsAre(a.key));  // waits for room, has 8 of the pages
  Take(*reader, 4);
  EXPECT_THAT(RunAll(), IsEmpty());
  Take(*reader, 4);
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_EQ(KeyOf(step), a.key);
  Finish(*step);
  Take(*reader, kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(b.key));
  Take(*b_reader, kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(c.key));
}

// ---- room in host memory

TEST_F(SchedulerTest, RequestWithoutRoomIsNotInTheNextStep) {
  Make(SmallOptions(), {.host_chunks = kPieceChunks});
  const Admitted a = MustAdd(Request("a", 2 * kPiece));
  const auto reader = Reader(a);
  EXPECT_EQ(scheduler_->load().waiting_for_room, 0);
  EXPECT_THAT(RunAll(), ElementsAre(a.key));
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  EXPECT_EQ(scheduler_->load().waiting_for_room, 1);
  Take(*reader, kPieceChunks - 1);
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  EXPECT_EQ(scheduler_->load().waiting_for_room, 1);
  Pass(absl::Seconds(3));
  Take(*reader, 1);
  EXPECT_THAT(RunAll(), ElementsAre(a.key));
  EXPECT_EQ(scheduler_->load().waiting_for_room, 0);
  Take(*reader, kPieceChunks);
  const ShipmentReader::Event event = reader->Next();
  EXPECT_EQ(std::get<ShipmentReader::Ended>(event).result->room_wait_seconds, 3);
}

TEST_F(SchedulerTest, RequestWithoutRoomTakesNoPages) {
  Make(SmallOptions(), {.host_chunks = kPieceChunks});
  const Admitted a = MustAdd(Request("a", kPiece));
  const auto reader = Reader(a);
  EXPECT_EQ(RunAll().size(), 1);
  const Admitted b = MustAdd(Request("b", kPiece));
  EXPECT_THAT(RunAll(), IsEmpty());
  EXPECT_EQ(scheduler_->load().waiting_for_room, 1);
  EXPECT_EQ(pages_->free_pages(), pages_->num_pages());
  Take(*reader, kPieceChunks);
  EXPECT_THAT(RunAll(), ElementsAre(b.key));
}

// Then nobody who keeps KV is in its way.
TEST_F(SchedulerTest, RequestThatLacksTheDeviceDoesNotWaitForRoom) {
  SchedulerOptions options = SmallOptions();
  options.num_slots = 1;
  Make(options, {.host_chunks = 2 * kPieceChunks});
  const Admitted a = MustAdd(Request("a", 3 * kPiece));
  const auto reader = Reader(a);
  EXPECT_EQ(RunAll().size(), 2);
  MustAdd(Prioritised(Request("b", kPiece), 1));
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  EXPECT_EQ(scheduler_->load().waiting_for_room, 2);  // a with its third piece, and b
  Take(*reader, kPieceChunks);
  EXPECT_EQ(KeyOf(scheduler_->Next(now_)), a.key);  // b lacks the slot
  EXPECT_EQ(scheduler_->load().waiting_for_room, 0);
}

TEST_F(SchedulerTest, RequestThatWaitsForItsOwnReaderIsOvertaken) {
  Make(SmallOptions(), {.host_chunks = 2 * kPieceChunks});
  const Admitted slow = MustAdd(Prioritised(Request("slow", 3 * kPiece), 1));
  const Admitted other = MustAdd(Request("other", 10));
  const auto reader = Reader(slow);
  EXPECT_THAT(RunAll(), ElementsAre(slow.key, slow.key));
  Take(*reader, 2);
  EXPECT_THAT(RunAll(), ElementsAre(other.key));
}

TEST_F(SchedulerTest, RequestThatWaitsForOthersIsNotOvertaken) {
  Make(SmallOptions(), {.host_chunks = 2 * kPieceChunks});
  const Admitted a = MustAdd(Request("a", 2 * kPiece));
  const auto reader = Reader(a);
  EXPECT_EQ(RunAll().size(), 2);
  const Admitted b = MustAdd(Prioritised(Request("b", kPiece), 1));
  const Admitted c = MustAdd(Request("c", 257));
  Take(*reader, kPieceChunks - 1);  // enough for c, not for b
  EXPECT_THAT(RunAll(), IsEmpty());
  Take(*reader, 1);
  EXPECT_THAT(RunAll(), ElementsAre(b.key));
}

// What the request holds itself leaves room for its next piece: it waits for others only.
TEST_F(SchedulerTest, RequestWithAnUntakenRestIsNotOvertakenEither) {
  Make(SmallOptions(), {.host_chunks = 2 * kPieceChunks});
  const Admitted a = MustAdd(Prioritised(Request("a", 2 * kPiece), 1));
  const auto a_reader = Reader(a);
  std::optional<Step> step = scheduler_->Next(now_);
  Finish(*step);
  Take(*a_reader, kPieceChunks - 1);  // a holds one chunk, nothing else is held
  std::vector<HostChunk> others = host_->Take(kPieceChunks + 1, 99);
  const Admitted c = MustAdd(Request("c", 257));
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  others.pop_back();
  others.pop_back();
  EXPECT_THAT(RunAll(), ElementsAre(a.key));
}

// ---- the end

TEST_F(SchedulerTest, QueuedRequestThatIsEndedNeverRuns) {
  const Admitted a = MustAdd(Request("a", 200));
  const Admitted b = MustAdd(Request("b", 200));
  const std::optional<Step> step = scheduler_->Next(now_);
  scheduler_->End(b.key, Cancelled());
  EXPECT_EQ(EndOf(b), Cancelled());
  EXPECT_FALSE(step->pieces[0].cancelled->load());
  EXPECT_EQ(scheduler_->load().queued_requests, 0);
  EXPECT_EQ(scheduler_->load().inflight_requests, 1);
  scheduler_->Finish(*step, {{}}, now_);
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
}

TEST_F(SchedulerTest, EndedRequestInAStepGoesWithTheStep) {
  const Admitted a = MustAdd(Request("a", 2 * kPiece));
  {
    std::optional<Step> step = scheduler_->Next(now_);
    scheduler_->End(a.key, Cancelled());
    EXPECT_TRUE(step->pieces[0].cancelled->load());
    EXPECT_EQ(EndOf(a), Cancelled());
    EXPECT_EQ(pages_->free_pages(), 92);  // the runner writes to them still
    EXPECT_EQ(scheduler_->load().inflight_requests, 1);
    scheduler_->End(a.key, absl::InternalError("again"));
    PublishLayer(step->pieces[0], 0);
    Fail(*step, CancelledBefore(1));
  }
  EXPECT_EQ(EndOf(a), Cancelled());
  EXPECT_FALSE(scheduler_->Next(now_).has_value());
  ExpectNothingLeft();
}

TEST_F(SchedulerTest, StepMayEndWellThoughItsRequestWasEnded) {
  const Admitted a = MustAdd(Request("a", 10));
  {
    std::optional<Step> step = scheduler_->Next(now_);
    scheduler_->End(a.key, Cancelled());
    Finish(*step);
  }
  EXPECT_EQ(EndOf(a), Cancelled());
  ExpectNothingLeft();
}

TEST_F(SchedulerTest, ComputedRequestGivesItsKvBackAtItsEnd) {
  const Admitted a = MustAdd(Request("a", 2 * kPiece));
  RunAll();
  EXPECT_EQ(host_->free_chunks(), 100 - 2 * kPieceChunks);
  scheduler_->End(a.key, Cancelled());
  scheduler_->End(a.key, Cancelled());
  scheduler_->End(12345, Cancelled());
  ExpectNothingLeft();
}

TEST_F(SchedulerTest, FailedPieceEndsItsRequestOnly) {
  for (const absl::Status& why :
       {NonFiniteError("layer 1"), absl::ResourceExhaustedError("no memory")}) {
    const Admitted a = MustAdd(Prioritised(Request("a", 3 * kPiece), 1));
    const Admitted b = MustAdd(Request("b", 10));
    std::optional<Step> step = scheduler_->Next(now_);
    Finish(*step);
    step = scheduler_->Next(now_);
    Fail(*step, why);
    EXPECT_EQ(EndOf(a), why);
    EXPECT_THAT(RunAll(), ElementsAre(b.key));
    scheduler_->End(b.key, Cancelled());
    step.reset();
    ExpectNothingLeft();
  }
}

TEST_F(SchedulerTest, EndAllEndsWhoeverIsIn) {
  const Admitted kept = MustAdd(Detached("kept", 10));
  const Admitted computed = MustAdd(Request("computed", 10));
  RunAll();
  const Admitted running = MustAdd(Request("running", 10));
  {
    const std::optional<Step> step = scheduler_->Next(now_);
    const Admitted queued = MustAdd(Detached("queued", 10));
    scheduler_->EndAll(absl::UnavailableError("lost"));
    for (const Admitted& admitted : {kept, computed, running, queued}) {
      EXPECT_THAT(EndOf(admitted), StatusIs(absl::StatusCode::kUnavailable));
    }
    EXPECT_EQ(scheduler_->load().inflight_requests, 1);
    Fail(*step, absl::InternalError("lost"));
  }
  ExpectNothingLeft();
}

}  // namespace
}  // namespace headstart
