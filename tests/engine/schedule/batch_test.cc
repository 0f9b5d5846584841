// What goes into a step, and in which order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;

class BatchTest : public SchedulerTest {
 protected:
  std::vector<uint64_t> ended_;
};

TEST_F(BatchTest, TakesAsManyAsFitTogether) {
  const uint64_t a = MustAdd(Prioritised(Request("a", 100), 1)).key;
  const uint64_t b = MustAdd(Prioritised(Request("b", 100), 1)).key;
  const uint64_t c = MustAdd(Prioritised(Request("c", 57), 1)).key;  // 257 in all
  const uint64_t d = MustAdd(Request("d", 99)).key;
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(c, a, d));
  Finish(*step);
  EXPECT_THAT(RunAll(), ElementsAre(b));
}

TEST_F(BatchTest, PiecesHaveSlotsAndPagesOfTheirOwn) {
  MustAdd(Request("a", 128));
  MustAdd(Request("b", 128));
  const std::optional<Step> step = scheduler_->Next(now_);
  ASSERT_EQ(step->pieces.size(), 2);
  EXPECT_NE(step->pieces[0].slot, step->pieces[1].slot);
  EXPECT_NE(step->pieces[0].pages[0], step->pieces[1].pages[0]);
  EXPECT_TRUE(step->pieces[0].starts_slot && step->pieces[1].starts_slot);
}

TEST_F(BatchTest, ALargePieceRunsAlone) {
  const uint64_t a = MustAdd(Request("a", 300)).key;
  const uint64_t b = MustAdd(Request("b", 1)).key;
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(b));  // takes less, so it is due earlier
  Finish(*step);
  EXPECT_THAT(RunAll(), ElementsAre(a));
}

TEST_F(BatchTest, PiecesAreCutByPositionWhateverElseRuns) {
  MustAdd(Request("a", 2 * kPiece + 10));
  std::vector<std::pair<int64_t, int64_t>> pieces;
  for (int i = 0; std::optional<Step> step = scheduler_->Next(now_); ++i) {
    for (const Piece& piece : step->pieces) {
      if (piece.prompt_tokens > kPiece) {
        pieces.emplace_back(piece.first_position, piece.num_tokens());
      }
    }
    Finish(*step);
    if (i < 2) MustAdd(Request(absl::StrCat("other", i), 20));
  }
  EXPECT_THAT(pieces, ElementsAre(std::pair(0, kPiece), std::pair(kPiece, kPiece),
                                  std::pair(2 * kPiece, 10)));
}

TEST_F(BatchTest, HigherPriorityGoesFirst) {
  const uint64_t a = MustAdd(Request("a", 200)).key;
  PrefillRequest important = Request("b", 400);
  important.priority = 1;
  const uint64_t b = MustAdd(std::move(important)).key;
  PrefillRequest later = Request("c", 100);
  later.priority = -1;
  const uint64_t c = MustAdd(std::move(later)).key;
  EXPECT_THAT(RunAll(), ElementsAre(b, a, c));
}

TEST_F(BatchTest, WaitingCountsAsPriority) {
  const uint64_t waits = MustAdd(Request("a", 300)).key;
  Pass(SmallOptions().ageing);
  PrefillRequest equal = Request("b", 300);
  equal.priority = 1;
  equal.deadline = now_ + absl::Seconds(500);
  MustAdd(std::move(equal));
  PrefillRequest more = Request("c", 300);
  more.priority = 2;
  const uint64_t c = MustAdd(std::move(more)).key;
  const std::vector<uint64_t> order = RunAll();
  EXPECT_THAT(order, ElementsAre(c, waits, ::testing::_));
}

TEST_F(BatchTest, EarlierDeadlineGoesFirst) {
  PrefillRequest late = Request("a", 300);
  late.deadline = now_ + absl::Milliseconds(200);
  const uint64_t a = MustAdd(std::move(late)).key;
  PrefillRequest soon = Request("b", 300);
  soon.deadline = now_ + absl::Milliseconds(100);
  const uint64_t b = MustAdd(std::move(soon)).key;
  EXPECT_THAT(RunAll(), ElementsAre(b, a));
}

TEST_F(BatchTest, AnEarlierOfTheSameLengthIsNeverOvertaken) {
  const uint64_t first = MustAdd(Request("first", 300)).key;
  for (int i = 0; i < 5; ++i) {
    Pass(absl::Milliseconds(1));
    MustAdd(Request(absl::StrCat("later", i), 300));
  }
  EXPECT_EQ(RunAll()[0], first);
}

// A stream of short ones puts a long one off only until it is late.
TEST_F(BatchTest, ALongOneBehindShortOnesIsDueSomeTime) {
  const uint64_t long_one = MustAdd(Request("long", 4 * kPiece)).key;
  int steps = 0;
  for (; steps < 1000; ++steps) {
    MustAdd(Request(absl::StrCat("short", steps), 256));
    std::optional<Step> step = scheduler_->Next(now_);
    ASSERT_TRUE(step.has_value());
    const bool runs = KeyOf(step) == long_one;
    Pass(absl::Milliseconds(30));
    for (const Piece& piece : step->pieces) {
      if (piece.request != long_one) ended_.push_back(piece.request);
    }
    Finish(*step, 0.03);
    for (const uint64_t key : ended_) scheduler_->End(key, absl::CancelledError("done"));
    if (runs) break;
  }
  EXPECT_GT(steps, 5);
  EXPECT_LT(steps, 300);
}

TEST_F(BatchTest, AShortOneTakesMemoryThatALongOneWaitsForUntilThatIsLate) {
  Make(SmallOptions(), {.pages = 9});
  const uint64_t runs = MustAdd(Request("runs", 2 * kPiece)).key;  // 8 of 9 pages
  std::optional<Step> step = scheduler_->Next(now_);
  Finish(*step);
  PrefillRequest urgent = Request("waits", 2 * kPiece);
  urgent.priority = 1;
  MustAdd(std::move(urgent));
  const uint64_t first = MustAdd(Request("short", 100)).key;
  step = scheduler_->Next(now_);
  EXPECT_EQ(KeyOf(step), first);
  Finish(*step);
  scheduler_->End(first, absl::CancelledError("done"));
  Pass(absl::Seconds(5));
  MustAdd(Request("late", 100));
  EXPECT_THAT(KeysOf(scheduler_->Next(now_)), ElementsAre(runs));
}

}  // namespace
}  // namespace headstart
