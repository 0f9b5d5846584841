#include "server/lifecycle.h"

#include <gtest/gtest.h>

#include <thread>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "kernels/base/instant.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::StatusIs;
using Phase = Lifecycle::Phase;

constexpr absl::Duration kStuckAfter = absl::Seconds(10);

class LifecycleTest : public ::testing::Test {
 protected:
  std::vector<std::pair<Phase, bool>> changes_;
  Lifecycle life_{kStuckAfter,
                  [this](Phase phase, bool healthy) { changes_.emplace_back(phase, healthy); }};
};

TEST_F(LifecycleTest, LoadsServesAndDrains) {
  EXPECT_TRUE(life_.loading());
  EXPECT_THAT(life_.Ready(), StatusIs(absl::StatusCode::kUnavailable, "loading"));
  EXPECT_EQ(ReasonOf(life_.WhyClosed()), ErrorReason::kLoading);
  life_.Load();
  EXPECT_OK(life_.WaitUntilLoaded());
  EXPECT_OK(life_.Ready());
  EXPECT_OK(life_.WhyClosed());
  EXPECT_TRUE(life_.Drain());
  EXPECT_FALSE(life_.Drain());
  life_.WaitForEnd();
  EXPECT_OK(life_.Live());
  EXPECT_THAT(life_.Ready(), StatusIs(absl::StatusCode::kUnavailable, "draining"));
  EXPECT_EQ(ReasonOf(life_.WhyClosed()), ErrorReason::kDraining);
  EXPECT_TRUE(RetryAfter(life_.WhyClosed()).has_value());
  EXPECT_EQ(changes_, (std::vector<std::pair<Phase, bool>>{{Phase::kServing, true},
                                                           {Phase::kDraining, false}}));
}

TEST_F(LifecycleTest, ModelThatComesWhileDrainingIsNotServed) {
  life_.Drain();
  EXPECT_TRUE(life_.loading());
  life_.Load();
  EXPECT_FALSE(life_.loading());
  EXPECT_EQ(life_.phase(), Phase::kDraining);
  EXPECT_EQ(changes_.back(), std::pair(Phase::kDraining, false)) << "told again, with the model";
}

TEST_F(LifecycleTest, FailureIsTheEndWhateverComesAfter) {
  std::thread waiter([this] {
    EXPECT_THAT(life_.WaitUntilLoaded(), StatusIs(absl::StatusCode::kInternal, "gone"));
    life_.WaitForEnd();
  });
  life_.Fail(absl::InternalError("gone"));
  waiter.join();
  EXPECT_FALSE(life_.loading());
  EXPECT_FALSE(life_.Drain());
  EXPECT_EQ(life_.phase(), Phase::kFailed);
  EXPECT_THAT(life_.Live(), StatusIs(absl::StatusCode::kUnavailable, "failed"));
  EXPECT_EQ(ReasonOf(life_.WhyClosed()), ErrorReason::kEngineLost);
}

TEST_F(LifecycleTest, ComputeThatFinishesNoLayerIsStuck) {
  const Instant start = Instant();
  life_.Load();
  EXPECT_EQ(life_.WatchCompute(true, 0, start), std::nullopt) << "seen for the first time";
  EXPECT_EQ(life_.WatchCompute(true, 0, start + kStuckAfter), std::nullopt);
  EXPECT_EQ(life_.WatchCompute(true, 0, start + kStuckAfter + absl::Seconds(1)), true);
  EXPECT_FALSE(life_.healthy());
  EXPECT_THAT(life_.Live(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(life_.Ready(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(life_.WatchCompute(true, 1, start + absl::Minutes(1)), false);
  EXPECT_TRUE(life_.healthy());
  EXPECT_EQ(changes_,
            (std::vector<std::pair<Phase, bool>>{
                {Phase::kServing, true}, {Phase::kServing, false}, {Phase::kServing, true}}));
}

TEST_F(LifecycleTest, IdleIsNotStuck) {
  life_.Load();
  for (int minute = 0; minute < 5; ++minute) {
    EXPECT_EQ(life_.WatchCompute(false, 7, Instant() + absl::Minutes(minute)), std::nullopt);
  }
  EXPECT_TRUE(life_.healthy());
}

}  // namespace
}  // namespace headstart
