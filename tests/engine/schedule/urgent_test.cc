// What runs between the layers of a step.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;

class UrgentTest : public SchedulerTest {
 protected:
  // A long prompt, of which a piece runs.
  Step RunLong(int32_t priority = 0) {
    PrefillRequest request = Request("long", 4 * kPiece);
    request.priority = priority;
    MustAdd(std::move(request));
    return *scheduler_->Next(now_);
  }
};

TEST_F(UrgentTest, NothingIsUrgentWhenNothingWaits) {
  Step running = RunLong();
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
}

TEST_F(UrgentTest, ShortOnesRunTogetherInside) {
  Step running = RunLong();
  const uint64_t a = MustAdd(Request("a", 100)).key;
  const uint64_t b = MustAdd(Request("b", 156)).key;
  const uint64_t c = MustAdd(Request("c", 10)).key;
  std::optional<Step> inside = scheduler_->NextUrgent(running, now_);
  ASSERT_TRUE(inside.has_value() && inside->urgent);
  EXPECT_THAT(KeysOf(inside), ::testing::UnorderedElementsAre(a, c));  // the shortest first
  EXPECT_EQ(scheduler_->load().urgent_steps, 0);                       // of those that are finished
  Finish(*inside);
  inside = scheduler_->NextUrgent(running, now_);
  EXPECT_THAT(KeysOf(inside), ElementsAre(b));
  Finish(*inside);
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
  EXPECT_EQ(scheduler_->load().urgent_steps, 2);
  Finish(running);
}

TEST_F(UrgentTest, WhatDoesNotFitWaits) {
  Step running = RunLong();
  MustAdd(Request("a", 257));
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
}

TEST_F(UrgentTest, WhatWaitedLongGetsAPieceAndNoMore) {
  SchedulerOptions options = SmallOptions();
  options.ageing = absl::Seconds(1);
  Make(options);
  const uint64_t waited = MustAdd(Request("long", 4 * kPiece)).key;
  Pass(options.ageing);
  const uint64_t a = MustAdd(Request("a", 100)).key;
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(waited));
  EXPECT_FALSE(scheduler_->NextUrgent(*step, now_).has_value());
  Finish(*step);
  step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(a));
  Finish(*step);
  step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(waited));
  Pass(options.ageing);  // while it runs it does not wait
  const uint64_t b = MustAdd(Request("b", 100)).key;
  EXPECT_THAT(KeysOf(scheduler_->NextUrgent(*step, now_)), ElementsAre(b));
}

TEST_F(UrgentTest, DoesNotInterruptHigherPriority) {
  Step running = RunLong(/*priority=*/1);
  MustAdd(Request("a", 10));
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
}

TEST_F(UrgentTest, DoesNotInterruptWhatIsLate) {
  Step running = RunLong();
  Pass(absl::Seconds(8));
  MustAdd(Request("a", 10));
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
}

TEST_F(UrgentTest, DoesNotInterruptAnEarlierOneLikeItself) {
  MustAdd(Request("a", 100));
  Step running = *scheduler_->Next(now_);
  Pass(absl::Milliseconds(1));
  MustAdd(Request("b", 100));
  EXPECT_FALSE(scheduler_->NextUrgent(running, now_).has_value());
}

TEST_F(UrgentTest, OuterStepIsFinishedAsIfNothingHadBeen) {
  Step running = RunLong();
  const Admitted inside = MustAdd(Request("a", 100));
  std::optional<Step> urgent = scheduler_->NextUrgent(running, now_);
  Finish(*urgent);
  scheduler_->End(inside.key, absl::CancelledError("done"));
  Finish(running);
  std::optional<Step> next = scheduler_->Next(now_);
  ASSERT_TRUE(next.has_value());
  EXPECT_FALSE(next->urgent);
  EXPECT_EQ(next->pieces[0].first_position, kPiece);
}

TEST_F(UrgentTest, TellsHowLongAPromptGaveWay) {
  const Admitted admitted = MustAdd(Request("a", 300));
  Step running = *scheduler_->Next(now_);
  Pass(absl::Milliseconds(70));
  Finish(running, 0.05);  // without what ran inside
  auto reader = admitted.shipment->Open(std::nullopt, 0);
  ASSERT_OK(reader);
  ShipmentReader::Event event = (*reader)->Next();
  while (!std::holds_alternative<ShipmentReader::Ended>(event)) event = (*reader)->Next();
  const auto& ended = std::get<ShipmentReader::Ended>(event);
  EXPECT_NEAR(ended.result->gave_way_seconds, 0.02, 1e-9);
}

}  // namespace
}  // namespace headstart
