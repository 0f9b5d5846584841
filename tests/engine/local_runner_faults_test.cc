// What goes wrong with one piece of a step, or with a step inside another.
#include <atomic>
#include <vector>

#include "kernels/base/nonfinite.h"
#include "tests/engine/runner_fixture.h"

namespace headstart {
namespace {

using testing::BackendCall;
using ::testing::HasSubstr;
using testing::StatusIs;

class RunnerFaultsTest : public RunnerTest {
 protected:
  // A step of one prompt with `inner` inside, at its second question.
  StepResult RunAround(const TestPrompt& outer, UrgentSteps& urgent) {
    Step step = StepOf(LastPiece(outer));
    return runner_->Run(step, &urgent);
  }
  UrgentSteps UrgentStepOf(Piece piece) {
    std::vector<Step> steps;
    steps.push_back(StepOf(std::move(piece)));
    return {1, std::move(steps)};
  }
  // After whatever came before, a prompt gets what it got then.
  void ExpectRecovered(TestPrompt& prompt, const Outcome& before) {
    backend_->SetHook(nullptr);
    backend_->PoisonOutput("", 0);
    ExpectSame(Alone(prompt), before);
  }
};
INSTANTIATE_TEST_SUITE_P(DTypes, RunnerFaultsTest, ::testing::Values(ComputeDType::kF32));

TEST_P(RunnerFaultsTest, OneOfABatchIsCancelledTheOthersGoOn) {
  TestPrompt kept = NewPrompt(300), cancelled = NewPrompt(200);
  const Outcome kept_alone = Alone(kept);
  Renew(kept);
  Step step;
  step.pieces.push_back(LastPiece(cancelled));
  step.pieces.push_back(LastPiece(kept));
  std::atomic<bool> flag{false};
  step.pieces[0].cancelled = &flag;
  backend_->SetHook([&](const BackendCall& call) {
    if (call.op == "RopeAndStoreKv" && call.layer == 1) flag.store(true);
    return absl::OkStatus();
  });
  const StepResult results = runner_->Run(step, nullptr);
  EXPECT_THAT(results[0].status,
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("before layer 2")));
  EXPECT_LE(Shipped(cancelled).size(), 2 * 2);
  ExpectSame(OutcomeOf(kept, results[1]), kept_alone);
}

TEST_P(RunnerFaultsTest, AStepThatNobodyWantsAnyMoreStops) {
  TestPrompt prompt = NewPrompt(300);
  const Outcome alone = Alone(prompt);
  std::atomic<bool> flag{false};
  int layers = 0;
  backend_->SetHook([&](const BackendCall& call) {
    if (call.op == "RopeAndStoreKv") flag.store(++layers == 2);
    return absl::OkStatus();
  });
  Renew(prompt);
  Step step = StepOf(LastPiece(prompt));
  step.pieces[0].cancelled = &flag;
  EXPECT_THAT(runner_->Run(step, nullptr)[0].status, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(layers, 2);
  ExpectRecovered(prompt, alone);
}

// The outer step is cancelled by what happens inside: it ends there, the urgent one does not.
TEST_P(RunnerFaultsTest, AnOuterStepMayBeCancelledFromInside) {
  TestPrompt outer = NewPrompt(300), inner = NewPrompt(100);
  const Outcome inner_alone = Alone(inner);
  Renew(inner);
  std::atomic<bool> flag{false};
  UrgentSteps urgent = UrgentStepOf(LastPiece(inner));
  urgent.before_step = [&] { flag.store(true); };
  Step step = StepOf(LastPiece(outer));
  step.pieces[0].cancelled = &flag;
  EXPECT_THAT(runner_->Run(step, &urgent)[0].status,
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("before layer 2")));
  ASSERT_EQ(urgent.finished.size(), 1);
  ExpectSame(OutcomeOf(inner, urgent.finished[0].second[0]), inner_alone);
}

// An urgent step that nobody wants takes nothing of the outer one with it.
TEST_P(RunnerFaultsTest, ACancelledUrgentStepLeavesTheOuterOneAlone) {
  TestPrompt outer = NewPrompt(300), inner = NewPrompt(100);
  const Outcome outer_alone = Alone(outer);
  Renew(outer);
  const std::atomic<bool> flag{true};
  Piece piece = LastPiece(inner);
  piece.cancelled = &flag;
  UrgentSteps urgent = UrgentStepOf(std::move(piece));
  const StepResult result = RunAround(outer, urgent);
  EXPECT_THAT(urgent.finished[0].second[0].status, StatusIs(absl::StatusCode::kCancelled));
  ExpectSame(OutcomeOf(outer, result[0]), outer_alone);
}

// A NaN is its piece's own affair, in a batch and inside another step; of its layer and those
// behind nothing goes out.
TEST_P(RunnerFaultsTest, ANanEndsItsPieceOnly) {
  TestPrompt bad = NewPrompt(200), good = NewPrompt(300);
  const Outcome good_alone = Alone(good), bad_alone = Alone(bad);
  for (TestPrompt* prompt : {&bad, &good}) Renew(*prompt);
  backend_->PoisonOutput("RmsNorm", 2);  // the first row: that of the first piece
  Step step;
  step.pieces.push_back(LastPiece(bad));
  step.pieces.push_back(LastPiece(good));
  const StepResult results = runner_->Run(step, nullptr);
  EXPECT_TRUE(IsNonFiniteError(results[0].status)) << results[0].status;
  EXPECT_THAT(results[0].status.message(), HasSubstr("layer 2"));
  EXPECT_EQ(Shipped(bad).size(), 2 * 2);
  ExpectSame(OutcomeOf(good, results[1]), good_alone);

  for (TestPrompt* prompt : {&bad, &good}) Renew(*prompt);
  backend_->PoisonOutput("", 0);
  UrgentSteps urgent = UrgentStepOf(LastPiece(bad));
  urgent.before_step = [&] { backend_->PoisonOutput("RmsNorm", 0); };
  urgent.after_step = [&] { backend_->PoisonOutput("", 0); };
  const StepResult result = RunAround(good, urgent);
  EXPECT_TRUE(IsNonFiniteError(urgent.finished[0].second[0].status));
  ExpectSame(OutcomeOf(good, result[0]), good_alone);
  ExpectRecovered(bad, bad_alone);
}

// KV that nobody gets is looked at, too: others may find its pages.
TEST_P(RunnerFaultsTest, ANanInKvThatIsNotShippedEndsItsPiece) {
  const TestPrompt prompt = NewPrompt(300);
  Piece piece = PieceOf(prompt, 0, 256);
  piece.chunks.clear();
  piece.host.clear();
  backend_->PoisonOutput("RmsNorm", kLayers - 1);
  Step step = StepOf(std::move(piece));
  const StepResult result = runner_->Run(step, nullptr);
  EXPECT_TRUE(IsNonFiniteError(result[0].status)) << result[0].status;
}

// An error of the backend ends both steps, wherever in the inner one it happens.
TEST_P(RunnerFaultsTest, ABackendErrorInsideEndsBoth) {
  TestPrompt outer = NewPrompt(300), inner = NewPrompt(100);
  const Outcome outer_alone = Alone(outer);
  for (const std::string op :
       {"Upload", "Embed", "Linear", "CopyOut", "Wait", "Download", "TakeTimes"}) {
    SCOPED_TRACE(op);
    for (TestPrompt* prompt : {&outer, &inner}) Renew(*prompt);
    UrgentSteps urgent = UrgentStepOf(LastPiece(inner));
    urgent.before_step = [&] {
      backend_->SetHook([&](const BackendCall& call) {
        return call.op == op ? absl::InternalError("lost") : absl::OkStatus();
      });
    };
    const StepResult result = RunAround(outer, urgent);
    ASSERT_EQ(urgent.finished.size(), 1);
    EXPECT_THAT(urgent.finished[0].second[0].status, StatusIs(absl::StatusCode::kInternal));
    EXPECT_THAT(result[0].status, StatusIs(absl::StatusCode::kInternal, HasSubstr("lost")));
    ExpectRecovered(outer, outer_alone);
  }
}

}  // namespace
}  // namespace headstart
