// Thousands of lives of the scheduler; and that each invariant is looked at.
//   HEADSTART_SIM_SEEDS=100000 engine_simulation_test   more lives than usual
//   engine_simulation_test --seed 17                    one life, with all that happens in it
#include "tests/engine/simulation/simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace headstart::simulation {
namespace {

constexpr int64_t kSeeds = 10000;

std::string Describe(uint64_t seed, const Report& report) {
  return absl::StrCat("seed ", seed, ": ", InvariantName(report.violation->invariant), ": ",
                      report.violation->what);
}

int64_t NumSeeds() {
  int64_t seeds = 0;
  const char* wanted = std::getenv("HEADSTART_SIM_SEEDS");
  return wanted != nullptr && absl::SimpleAtoi(wanted, &seeds) ? seeds : kSeeds;
}

void Add(const Sightings& from, Sightings& to) {
  for (const auto& [reason, count] : from.ends) to.ends[reason] += count;
  for (const auto& [reason, count] : from.refusals) to.refusals[reason] += count;
  to.computed += from.computed;
  to.whole_parts += from.whole_parts;
  to.resumed_streams += from.resumed_streams;
  to.urgent_steps += from.urgent_steps;
  to.batches += from.batches;
  to.copies += from.copies;
  to.cached_tokens += from.cached_tokens;
  to.shared_pages += from.shared_pages;
  to.late_pages += from.late_pages;
  to.waits_for_page += from.waits_for_page;
  to.overtakings += from.overtakings;
  to.deadlines_kept += from.deadlines_kept;
  to.deadlines_missed += from.deadlines_missed;
  to.ttft.insert(to.ttft.end(), from.ttft.begin(), from.ttft.end());
}

TEST(SimulationTest, EveryInvariantHoldsInEveryLife) {
  Sightings seen;
  for (int64_t seed = 0; seed < NumSeeds(); ++seed) {
    const Report report = Simulate(seed);
    if (report.violation.has_value()) {
      const Report again = Simulate(seed, Mutation::kNone, /*trace=*/true);
      FAIL() << absl::StrJoin(again.trace, "\n") << "\n" << Describe(seed, again);
    }
    Add(report.seen, seen);
  }
  // The lives went wherever a life can go.
  for (const ErrorReason reason :
       {ErrorReason::kDeadlineExceeded, ErrorReason::kClientCancelled, ErrorReason::kClientStalled,
        ErrorReason::kNonfiniteOutput, ErrorReason::kOutOfMemory, ErrorReason::kInternal,
        ErrorReason::kEngineLost, ErrorReason::kKvReleased, ErrorReason::kLeaseExpired}) {
    EXPECT_GT(seen.ends[reason], 0) << ErrorReasonName(reason);
  }
  for (const ErrorReason reason :
       {ErrorReason::kQueueFull, ErrorReason::kHostMemoryFull, ErrorReason::kDuplicateRequestId,
        ErrorReason::kDeadlineUnreachable, ErrorReason::kEngineLost}) {
    EXPECT_GT(seen.refusals[reason], 0) << ErrorReasonName(reason);
  }
  EXPECT_GT(seen.computed, NumSeeds());
  EXPECT_GT(seen.whole_parts, NumSeeds());
  EXPECT_GT(seen.resumed_streams, 0);
  for (const int64_t count :
       {seen.urgent_steps, seen.batches, seen.copies, seen.cached_tokens, seen.shared_pages,
        seen.waits_for_page, seen.overtakings, seen.deadlines_kept}) {
    EXPECT_GT(count, NumSeeds() / 10);
  }
  EXPECT_GT(seen.late_pages, 0);
  // A deadline that was promised is kept, nearly always, and a prediction is right.
  EXPECT_LT(seen.deadlines_missed, seen.deadlines_kept / 100);
  std::sort(seen.ttft.begin(), seen.ttft.end());
  ASSERT_GT(std::ssize(seen.ttft), NumSeeds() / 10);
  EXPECT_NEAR(seen.ttft[seen.ttft.size() / 2], 1, 0.1);
  EXPECT_LT(seen.ttft[seen.ttft.size() * 95 / 100], 1.25);
}

TEST(SimulationTest, SameSeedSameLife) {
  const Report once = Simulate(3, Mutation::kNone, /*trace=*/true);
  EXPECT_GT(once.trace.size(), 10);
  EXPECT_EQ(once.trace, Simulate(3, Mutation::kNone, /*trace=*/true).trace);
  EXPECT_NE(once.trace, Simulate(4, Mutation::kNone, /*trace=*/true).trace);
}

struct Planted {
  Mutation mutation;
  const char* name;
  Invariant breaks;
  std::optional<Invariant> or_breaks = std::nullopt;
};

void PrintTo(const Planted& planted, std::ostream* out) { *out << planted.name; }

class PlantedBugTest : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedBugTest, IsFoundByItsInvariant) {
  int found = 0;
  for (uint64_t seed = 0; seed < 200 && found < 5; ++seed) {
    const Report report = Simulate(seed, GetParam().mutation);
    if (!report.violation.has_value()) continue;
    ++found;
    if (report.violation->invariant == GetParam().or_breaks) continue;
    EXPECT_STREQ(InvariantName(report.violation->invariant), InvariantName(GetParam().breaks))
        << Describe(seed, report);
  }
  EXPECT_EQ(found, 5);
}

INSTANTIATE_TEST_SUITE_P(
    All, PlantedBugTest,
    ::testing::Values(Planted{Mutation::kKeepDevicePages, "KeepDevicePages", Invariant::kDevice},
                      Planted{Mutation::kWrongDevicePage, "WrongDevicePage", Invariant::kDevice},
                      Planted{Mutation::kKeepHostChunk, "KeepHostChunk", Invariant::kHost},
                      Planted{Mutation::kKeepSentChunk, "KeepSentChunk", Invariant::kHost},
                      Planted{Mutation::kCloseBehind, "CloseBehind", Invariant::kOneEnd},
                      Planted{Mutation::kWrongReason, "WrongReason", Invariant::kOneEnd},
                      Planted{Mutation::kRepeatPiece, "RepeatPiece", Invariant::kPieces},
                      Planted{Mutation::kPublishTwice, "PublishTwice", Invariant::kParts},
                      Planted{Mutation::kLeaveOutChunk, "LeaveOutChunk", Invariant::kParts},
                      Planted{Mutation::kSwapChunks, "SwapChunks", Invariant::kParts},
                      Planted{Mutation::kOverwriteChunk, "OverwriteChunk", Invariant::kContent},
                      Planted{Mutation::kForgetExpire, "ForgetExpire", Invariant::kExpired},
                      Planted{Mutation::kLoseStep, "LoseStep", Invariant::kBusy},
                      Planted{Mutation::kWrongPriority, "WrongPriority", Invariant::kOrder},
                      // Who is first wrongly may lack memory: then nobody runs.
                      Planted{Mutation::kNoAgeing, "NoAgeing", Invariant::kOrder, Invariant::kBusy},
                      Planted{Mutation::kLongPiece, "LongPiece", Invariant::kBudget},
                      Planted{Mutation::kTwiceAtOnce, "TwiceAtOnce", Invariant::kBudget},
                      Planted{Mutation::kShareAcrossRoots, "ShareAcrossRoots", Invariant::kContent},
                      Planted{Mutation::kForgetPage, "ForgetPage", Invariant::kContent},
                      Planted{Mutation::kWrongState, "WrongState", Invariant::kContent},
                      Planted{Mutation::kOverwriteShared, "OverwriteShared", Invariant::kShared},
                      Planted{Mutation::kSlowerThanLearned, "SlowerThanLearned",
                              Invariant::kEstimate},
                      Planted{Mutation::kNeverStall, "NeverStall", Invariant::kProgress},
                      Planted{Mutation::kAckUnsent, "AckUnsent", Invariant::kAnswers},
                      Planted{Mutation::kForgetEnd, "ForgetEnd", Invariant::kGivenBack}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace headstart::simulation

int main(int argc, char** argv) {
  using namespace headstart::simulation;
  uint64_t seed = 0;
  if (argc == 3 && std::string(argv[1]) == "--seed" && absl::SimpleAtoi(argv[2], &seed)) {
    const Report report = Simulate(seed, Mutation::kNone, /*trace=*/true);
    for (const std::string& line : report.trace) std::cout << line << "\n";
    if (report.violation.has_value()) std::cout << Describe(seed, report) << "\n";
    return report.violation.has_value();
  }
  ::testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
