#include "client/commands/mix.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>

#include "client/commands/workload.h"

namespace headstart {
namespace {

TEST(MixTest, DrawsByWeight) {
  const auto mix = Mix::Parse({"512:4", "2048:2", "8192:1", "7:1"}, 1, 10000);
  ASSERT_TRUE(mix.ok()) << mix.status();
  EXPECT_TRUE(mix->weighted());
  EXPECT_EQ(mix->largest(), 8192);
  std::map<int64_t, int> seen;
  for (uint64_t i = 0; i < 8000; ++i) ++seen[mix->Draw(MixSeeds(3, i))];
  EXPECT_EQ(seen.size(), 4);
  EXPECT_NEAR(seen[512], 4000, 200);
  EXPECT_NEAR(seen[2048], 2000, 200);
  EXPECT_NEAR(seen[8192], 1000, 150);
  EXPECT_EQ(mix->Draw(0), 512);
  EXPECT_EQ(mix->Draw(~uint64_t{0}), 7);
}

TEST(MixTest, WithoutWeightsAllAreEqual) {
  const auto mix = Mix::Parse({"-5", "5"}, -100, 100);
  ASSERT_TRUE(mix.ok()) << mix.status();
  EXPECT_FALSE(mix->weighted());
  int fives = 0;
  for (uint64_t i = 0; i < 1000; ++i) fives += mix->Draw(MixSeeds(1, i)) == 5 ? 1 : 0;
  EXPECT_NEAR(fives, 500, 80);
}

TEST(MixTest, RefusesWhatIsNoMix) {
  for (const char* word : {"", ":", "5:", ":1", "5:1:1", "101", "-101", "5:inf", "1e3"}) {
    EXPECT_EQ(Mix::Parse({"1", word}, -100, 100).status().code(),
              absl::StatusCode::kInvalidArgument)
        << word;
  }
  EXPECT_FALSE(Mix::Parse({}, 1, 2).ok());
}

TEST(WorkloadTest, PromptsAreFunctionsOfSeedAndIndex) {
  Workload workload;
  workload.lengths = *Mix::Parse({"40:1", "80:1"}, 1, 100);
  workload.vocab_size = 1000;
  Workload same = workload;
  Workload other = workload;
  other.seed = 1;
  int shared_starts = 0;
  for (int64_t i = -3; i < 20; ++i) {
    EXPECT_EQ(PromptOf(workload, i).token_ids, PromptOf(same, i).token_ids);
    // Runs with neighbouring seeds, and neighbouring prompts, share nothing that a prefix cache
    // could find.
    const auto begins = [](const LoadPrompt& p) {
      return std::vector<uint32_t>(p.token_ids.begin(), p.token_ids.begin() + 8);
    };
    shared_starts += begins(PromptOf(workload, i)) == begins(PromptOf(other, i - 1)) ? 1 : 0;
    shared_starts += begins(PromptOf(workload, i)) == begins(PromptOf(workload, i + 1)) ? 1 : 0;
  }
  EXPECT_EQ(shared_starts, 0);
  workload.lengths = Mix::Of(40);
  other = workload;
  other.lengths = Mix::Of(80);
  EXPECT_NE(PromptOf(workload, 0).token_ids[0], PromptOf(other, 0).token_ids[0])
      << "lengths that are measured one after the other are no prefix of each other";
}

}  // namespace
}  // namespace headstart
