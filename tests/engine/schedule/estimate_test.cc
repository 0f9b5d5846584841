// What is said about a request before it runs, and whether its deadline lets it in.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// A machine of 1000 tokens a second, which may take a time for each step besides.
class EstimateTest : public SchedulerTest {
 protected:
  void Run(const std::string& id, int64_t num_tokens) {
    const Admitted admitted = MustAdd(Request(id, num_tokens));
    while (std::optional<Step> step = scheduler_->Next(now_)) RunStep(*step);
    scheduler_->End(admitted.key, absl::CancelledError("done"));
  }
  void RunStep(Step& step) {
    int64_t tokens = 0;
    for (const Piece& piece : step.pieces) tokens += piece.num_tokens();
    const double seconds = step_seconds_ + static_cast<double>(tokens) / 1000;
    Pass(absl::Seconds(seconds));
    Finish(step, seconds);
  }
  void Learn() {
    for (int i = 0; i < 5; ++i) {
      for (const int64_t tokens : {50, 100, 200, 400, 500}) Run(absl::StrCat(i, tokens), tokens);
    }
  }
  PrefillRequest Until(PrefillRequest request, absl::Duration left) {
    request.deadline = now_ + left;
    return request;
  }
  static double Seconds(absl::Duration duration) { return absl::ToDoubleSeconds(duration); }

  double step_seconds_ = 0;
};

TEST_F(EstimateTest, SaysNothingBeforeItKnows) {
  const Estimate estimate = scheduler_->Foresee(Request("a", 100), now_);
  EXPECT_EQ(estimate.ttft(), std::nullopt);
  EXPECT_OK(estimate.refusal);
  EXPECT_EQ(scheduler_->PredictDrain(now_), std::nullopt);
  EXPECT_OK(Add(Until(Request("a", 400), absl::Milliseconds(1))));
  EXPECT_EQ(scheduler_->PredictDrain(now_), std::nullopt);
}

TEST_F(EstimateTest, LearnsFromWhatRan) {
  Learn();
  const Estimate estimate = scheduler_->Foresee(Request("a", 300), now_);
  ASSERT_TRUE(estimate.ttft().has_value());
  EXPECT_NEAR(Seconds(*estimate.compute), 0.3, 0.03);
  EXPECT_EQ(*estimate.queue, absl::ZeroDuration());
}

TEST_F(EstimateTest, ALongPromptIsTheSumOfItsPieces) {
  Learn();
  EXPECT_NEAR(Seconds(*scheduler_->Foresee(Request("a", 2000), now_).compute), 2.0, 0.3);
}

TEST_F(EstimateTest, QueueIsThoseWhoComeBefore) {
  Learn();
  MustAdd(Request("a", 400));
  MustAdd(Request("b", 400));
  MustAdd(Request("long", 3000));  // comes behind a shorter one
  const Estimate estimate = scheduler_->Foresee(Request("c", 400), now_);
  EXPECT_NEAR(Seconds(*estimate.queue), 0.8, 0.1);
  EXPECT_EQ(estimate.requests_ahead, 2);
  EXPECT_EQ(estimate.tokens_ahead, 800);
  EXPECT_NEAR(Seconds(*scheduler_->PredictDrain(now_)), 3.8, 0.4);
}

TEST_F(EstimateTest, OfOneThatWaitedLongOnePieceGoesFirst) {
  SchedulerOptions options = SmallOptions();
  options.ageing = absl::Seconds(1);
  Make(options);
  Learn();
  MustAdd(Request("long", 4 * kPiece));
  Pass(options.ageing);
  EXPECT_NEAR(Seconds(*scheduler_->Foresee(Request("a", 100), now_).queue), 0.51, 0.05);
  std::optional<Step> step = scheduler_->Next(now_);
  const Estimate estimate = scheduler_->Foresee(Request("a", 100), now_);
  EXPECT_NEAR(Seconds(*estimate.queue), 0.51, 0.05);
  EXPECT_EQ(estimate.requests_ahead, 1);
  EXPECT_EQ(estimate.tokens_ahead, 4 * kPiece);
}

TEST_F(EstimateTest, ShortOnesShareTheirSteps) {
  step_seconds_ = 0.3;
  Learn();
  const int64_t tokens = 64;  // four of them fill a step
  for (int i = 0; i < 8; ++i) MustAdd(Request(absl::StrCat(i), tokens));
  const double all = 2 * step_seconds_ + 8 * static_cast<double>(tokens) / 1000;
  EXPECT_NEAR(Seconds(*scheduler_->PredictDrain(now_)), all, all / 10);
  const Estimate estimate = scheduler_->Foresee(Request("next", tokens), now_);
  EXPECT_NEAR(Seconds(*estimate.queue), all, all / 10);
  // By itself it has a step of its own.
  const double alone = step_seconds_ + static_cast<double>(tokens) / 1000;
  EXPECT_NEAR(Seconds(*estimate.compute), alone, alone / 10);
}

TEST_F(EstimateTest, WhatRunsCountsByWhatIsLeftOfIt) {
  Learn();
  MustAdd(Request("a", 500));
  std::optional<Step> step = scheduler_->Next(now_);
  Pass(absl::Milliseconds(300));
  const Estimate estimate = scheduler_->Foresee(Request("b", 500), now_);
  EXPECT_NEAR(Seconds(*estimate.queue), 0.2, 0.05);
}

TEST_F(EstimateTest, AShortOneWaitsForLayersOnly) {
  Learn();
  MustAdd(Request("long", 3000));
  std::optional<Step> step = scheduler_->Next(now_);
  const Estimate estimate = scheduler_->Foresee(Request("short", 100), now_);
  // Both layers of this model; it does not wait for the other pieces.
  EXPECT_LT(Seconds(*estimate.queue), 0.55);
}

TEST_F(EstimateTest, AShortOneBetweenLayersDoesNotWaitForLongOnesThatWait) {
  SchedulerOptions options = SmallOptions();
  options.geometry.num_layers = 16;
  Make(options, {.host_chunks = 1000});
  Learn();
  MustAdd(Prioritised(Request("runs", kPiece), -1));
  std::optional<Step> step = scheduler_->Next(now_);
  MustAdd(Prioritised(Request("before", kPiece), 1));
  const Estimate estimate = scheduler_->Foresee(Request("short", 100), now_);
  EXPECT_NEAR(Seconds(*estimate.queue), 0.51 * 2 / 16, 0.02);
  EXPECT_EQ(estimate.requests_ahead, 1);
  Pass(absl::Milliseconds(490));  // no layers are left between which it could run
  EXPECT_NEAR(Seconds(*scheduler_->Foresee(Request("short", 100), now_).queue), 0.53, 0.03);
}

TEST_F(EstimateTest, WhatGaveWayIsNotDoneEarlier) {
  Learn();
  MustAdd(Request("long", kPiece));
  std::optional<Step> step = scheduler_->Next(now_);
  MustAdd(Request("short", 200));
  std::optional<Step> inside = scheduler_->NextUrgent(*step, now_);
  ASSERT_TRUE(inside.has_value());
  EXPECT_NEAR(Seconds(*scheduler_->PredictDrain(now_)), 0.71, 0.05);
  RunStep(*inside);
  EXPECT_NEAR(Seconds(*scheduler_->PredictDrain(now_)), 0.51, 0.05);
}

TEST_F(EstimateTest, IsWhatComesToPass) {
  Learn();
  std::vector<std::pair<Instant, uint64_t>> predicted;
  for (int i = 0; i < 6; ++i) {
    const Admitted admitted = MustAdd(Request(absl::StrCat(i), 100 * (i % 3 + 2)));
    predicted.emplace_back(now_ + *admitted.estimate.ttft(), admitted.key);
  }
  while (std::optional<Step> step = scheduler_->Next(now_)) {
    RunStep(*step);
    for (const Piece& piece : step->pieces) {
      for (const auto& [when, key] : predicted) {
        // Later ones that are shorter come before.
        if (key != piece.request) continue;
        EXPECT_NEAR(Seconds(now_ - when), 0, 0.75);
      }
    }
  }
}

TEST_F(EstimateTest, RefusesADeadlineThatHasPassed) {
  for (const absl::Duration left : {absl::ZeroDuration(), -absl::Seconds(1)}) {
    const absl::Status refused = Add(Until(Request("a", 1), left)).status();
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded));
    EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineExceeded);
  }
}

TEST_F(EstimateTest, RefusesADeadlineThatNothingCanMeet) {
  Learn();
  const absl::Status refused = Add(Until(Request("a", 400), absl::Milliseconds(200))).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("400 tokens")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineUnreachable);
  EXPECT_EQ(RetryAfter(refused), std::nullopt);  // it would be no better later
  EXPECT_OK(Add(Until(Request("b", 400), absl::Seconds(1))));
}

// What made the machine slow may be over; only running something can tell.
TEST_F(EstimateTest, TriesAgainWhenNobodyIsInAndNothingWasLearnedLately) {
  Learn();
  EXPECT_FALSE(Add(Until(Request("a", 400), absl::Milliseconds(200))).ok());
  Pass(absl::Seconds(1));
  const absl::StatusOr<Admitted> tried = Add(Until(Request("b", 400), absl::Milliseconds(200)));
  ASSERT_OK(tried);
  EXPECT_EQ(ReasonOf(Add(Until(Request("c", 400), absl::Milliseconds(200))).status()),
            ErrorReason::kDeadlineUnreachable);
}

TEST_F(EstimateTest, RefusesWhatQueuesTooLongAndSaysWhenToComeBack) {
  Learn();
  for (int i = 0; i < 3; ++i) MustAdd(Until(Request(absl::StrCat(i), 500), absl::Seconds(2)));
  const Estimate estimate = scheduler_->Foresee(Until(Request("b", 500), absl::Seconds(2.1)), now_);
  EXPECT_EQ(estimate.requests_ahead, 3);
  EXPECT_EQ(ReasonOf(estimate.refusal), ErrorReason::kDeadlineUnreachable);
  EXPECT_TRUE(RetryAfter(estimate.refusal).has_value());
}

TEST_F(EstimateTest, RefusesWhoWouldMakeAnotherMissItsDeadline) {
  Learn();
  MustAdd(Until(Request("a", 500), absl::Seconds(0.8)));
  PrefillRequest important = Request("b", 500);
  important.priority = 1;
  const absl::Status refused = Add(std::move(important)).status();
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kDeadlineUnreachable);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("would miss")));
}

// The margin was eaten by what nobody foresaw: as long as it can be in time, nobody goes before it.
TEST_F(EstimateTest, ProtectsWhoIsInAlthoughItIsLateAlready) {
  Learn();
  MustAdd(Until(Request("long", 2000), absl::Seconds(3)));
  Pass(absl::Seconds(3) - *scheduler_->PredictDrain(now_));  // it has what it needs, and no more
  EXPECT_EQ(ReasonOf(Add(Prioritised(Request("a", 100), 1)).status()),
            ErrorReason::kDeadlineUnreachable);
  Pass(absl::Seconds(0.5));  // nobody can save it any more
  EXPECT_OK(Add(Prioritised(Request("b", 100), 1)));
}

TEST_F(EstimateTest, ForeseesWhatLaterOnesUsuallyTake) {
  Learn();
  for (int i = 0; i < 30; ++i) {
    const Admitted admitted = MustAdd(Request(absl::StrCat("more", i), 300));
    Pass(absl::Seconds(0.3));  // others, that came later
    std::optional<Step> step = scheduler_->Next(now_);
    RunStep(*step);
    scheduler_->End(admitted.key, absl::CancelledError("done"));
  }
  const Estimate estimate = scheduler_->Foresee(Request("a", 300), now_);
  EXPECT_NEAR(Seconds(*estimate.ttft()), 0.6, 0.06);
  EXPECT_NEAR(Seconds(*estimate.compute), 0.3, 0.03);
  EXPECT_NEAR(Seconds(*scheduler_->Foresee(Request("b", 60), now_).ttft()), 0.06, 0.01);
}

TEST_F(EstimateTest, MeasuresItsOwnError) {
  Learn();
  const double before = scheduler_->costs().Margin();
  for (int i = 0; i < 60; ++i) Run(absl::StrCat("more", i), 300);
  EXPECT_LT(scheduler_->costs().Margin(), before);
}

TEST_F(EstimateTest, RetryDelayOfAFullQueueFollowsTheRate) {
  SchedulerOptions options = SmallOptions();
  options.max_tokens = 1000;
  Make(options);
  Learn();
  MustAdd(Request("a", 900));
  EXPECT_NEAR(Seconds(*RetryAfter(Add(Request("b", 500)).status())), 0.5, 0.05);
}

}  // namespace
}  // namespace headstart
