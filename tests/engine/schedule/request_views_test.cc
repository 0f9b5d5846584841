// What requests are said to be doing, and when their pieces ran.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/instant.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

constexpr size_t kAll = 100;

TEST_F(SchedulerTest, SaysWhatRequestsAreDoing) {
  PrefillRequest first = Detached("first", kPiece + 10);
  first.priority = 3;
  MustAdd(std::move(first));
  Pass(absl::Seconds(1));
  MustAdd(Request("second", 20));
  const auto states = [this] {
    std::vector<RequestState> out;
    for (const RequestView& view : scheduler_->Requests(kAll)) out.push_back(view.state);
    return out;
  };
  using State = RequestState;
  EXPECT_THAT(states(), ::testing::ElementsAre(State::kWaiting, State::kWaiting));
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(states(), ::testing::ElementsAre(State::kComputing, State::kWaiting));
  Finish(*step);
  EXPECT_THAT(states(), ::testing::ElementsAre(State::kPaused, State::kWaiting));
  const std::vector<RequestView> views = scheduler_->Requests(kAll);
  EXPECT_EQ(views[0].request_id, "first");
  EXPECT_EQ(views[0].num_tokens, kPiece + 10);
  EXPECT_EQ(views[0].priority, 3);
  EXPECT_EQ(views[0].position, kPiece);
  EXPECT_EQ(views[0].accepted_at, Instant());
  EXPECT_EQ(views[1].accepted_at, Instant() + absl::Seconds(1));
  EXPECT_EQ(views[1].position, 0);
  RunAll();
  EXPECT_THAT(states(), ::testing::ElementsAre(State::kKept, State::kShipping));
  scheduler_->EndAll(absl::CancelledError("the end"));
  EXPECT_TRUE(scheduler_->Requests(kAll).empty());
}

TEST_F(SchedulerTest, ListsNoMoreRequestsThanAskedFor) {
  for (const char* id : {"a", "b", "c"}) MustAdd(Request(id, 10));
  EXPECT_EQ(scheduler_->Requests(2).size(), 2);
  EXPECT_EQ(scheduler_->Requests(2)[1].request_id, "b");
  scheduler_->EndAll(absl::CancelledError("the end"));
}

TEST_F(SchedulerTest, ResultsSayWhenPiecesRan) {
  const Admitted admitted = MustAdd(Request("a", kPiece + 10));
  const auto reader = Reader(admitted);
  while (std::optional<Step> step = scheduler_->Next(now_)) {
    Pass(absl::Seconds(2));
    Finish(*step);
    Pass(absl::Seconds(1));
  }
  Take(*reader, 100);
  const ShipmentReader::Event event = reader->Next();
  const auto* ended = std::get_if<ShipmentReader::Ended>(&event);
  ASSERT_NE(ended, nullptr);
  const std::vector<PieceRun>& pieces = ended->result->pieces;
  ASSERT_EQ(pieces.size(), 2);
  EXPECT_EQ(pieces[0].first_position, 0);
  EXPECT_EQ(pieces[0].num_tokens, kPiece);
  EXPECT_EQ(pieces[0].begin, Instant());
  EXPECT_EQ(pieces[0].end, Instant() + absl::Seconds(2));
  EXPECT_EQ(pieces[1].first_position, kPiece);
  EXPECT_EQ(pieces[1].num_tokens, 10);
  EXPECT_EQ(pieces[1].begin, Instant() + absl::Seconds(3));
  EXPECT_EQ(pieces[1].end, Instant() + absl::Seconds(5));
  EXPECT_FALSE(pieces[0].from_cache);
  scheduler_->EndAll(absl::CancelledError("the end"));
}

}  // namespace
}  // namespace headstart
