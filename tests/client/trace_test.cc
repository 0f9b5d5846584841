#include "client/commands/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Lt;
using ::testing::SizeIs;

// The first lines of Mooncake's conversation_trace.jsonl have this form.
constexpr char kTrace[] =
    R"({"timestamp": 0, "input_length": 1053, "output_length": 26, "hash_ids": [0, 773, 774]}
{"timestamp": 3000, "input_length": 915, "output_length": 355, "hash_ids": [0, 462]}

{"timestamp": 5999, "input_length": 898, "output_length": 57, "hash_ids": [0, 462]}
)";

absl::StatusOr<Trace> Parse(const std::string& text, const TraceOptions& options = {}) {
  std::istringstream in(text);
  return ParseTrace(in, options);
}

std::vector<absl::Duration> TimesOf(const Trace& trace) {
  std::vector<absl::Duration> times;
  for (const TracePrompt& prompt : trace.prompts) times.push_back(prompt.due);
  return times;
}

TEST(TraceTest, ReadsMooncakesFormat) {
  const auto trace = Parse(kTrace);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_THAT(trace->prompts, SizeIs(3));
  EXPECT_EQ(trace->prompts[0].num_tokens, 1053);
  EXPECT_THAT(trace->prompts[0].hash_ids, ElementsAre(0, 773, 774));
  EXPECT_THAT(TimesOf(*trace),
              ElementsAre(absl::ZeroDuration(), absl::Seconds(3), absl::Milliseconds(5999)));
}

TEST(TraceTest, TimesCountFromTheFirstAndAreScaled) {
  const auto trace = Parse(
      R"({"timestamp": 9000.5, "input_length": 2}
{"timestamp": 8000.5, "input_length": 1})",
      {.speed = 4});
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->prompts[0].num_tokens, 1) << "the one that came first";
  EXPECT_THAT(TimesOf(*trace), ElementsAre(absl::ZeroDuration(), absl::Milliseconds(250)));
}

TEST(TraceTest, EndsWithItsNumberOrItsTime) {
  EXPECT_THAT(Parse(kTrace, {.max_prompts = 2})->prompts, SizeIs(2));
  EXPECT_THAT(Parse(kTrace, {.speed = 2, .duration = absl::Seconds(2)})->prompts, SizeIs(2));
}

TEST(TraceTest, LongPromptsAreCutOrLeftOut) {
  const auto cut = Parse(kTrace, {.max_tokens = 900});
  ASSERT_TRUE(cut.ok()) << cut.status();
  ASSERT_THAT(cut->prompts, SizeIs(3));
  EXPECT_EQ(cut->num_cut, 2);
  EXPECT_EQ(cut->num_skipped, 0);
  EXPECT_EQ(cut->prompts[0].num_tokens, 900);
  EXPECT_THAT(cut->prompts[0].hash_ids, ElementsAre(0, 773));
  const auto skipped = Parse(kTrace, {.max_tokens = 900, .skip_long = true});
  ASSERT_TRUE(skipped.ok()) << skipped.status();
  EXPECT_THAT(skipped->prompts, SizeIs(1));
  EXPECT_EQ(skipped->num_skipped, 2);
  EXPECT_THAT(Parse(kTrace, {.max_tokens = 10, .skip_long = true}).status().message(),
              HasSubstr("no prompt, 3 were left out"));
}

TEST(TraceTest, HostileLinesAreNamed) {
  const std::pair<std::string, const char*> lines[] = {
      {"", nullptr},  // means nothing
      {"7", "is no JSON object"},
      {"{\"timestamp\": 1", "is no JSON object"},
      {std::string(100'000, '['), "is no JSON object"},
      {std::string("{\"a\": \"\0\xff\x1b\"}", 13), "is no JSON object"},
      {R"({"input_length": 1})", "timestamp is no number"},
      {R"({"timestamp": "0", "input_length": 1})", "timestamp is no number"},
      {R"({"timestamp": -1, "input_length": 1})", "timestamp is no number"},
      {R"({"timestamp": 1e300, "input_length": 1})", "timestamp is no number"},
      {R"({"timestamp": 1})", "input_length is no whole number"},
      {R"({"timestamp": 1, "input_length": 0})", "input_length is no whole number"},
      {R"({"timestamp": 1, "input_length": 1.5})", "input_length is no whole number"},
      {R"({"timestamp": 1, "input_length": 18446744073709551615})", "input_length is no whole"},
      {R"({"timestamp": 1, "input_length": 9, "hash_ids": 3})", "hash_ids is no array"},
      {R"({"timestamp": 1, "input_length": 9, "hash_ids": [null]})", "hash_ids[0] is no whole"},
      {R"({"timestamp": 1, "input_length": 512, "hash_ids": [1, 2]})",
       "hash_ids has 2 ids, input_length has 1 blocks"}};
  for (const auto& [line, message] : lines) {
    const absl::Status status =
        Parse(absl::StrCat("{\"timestamp\": 0, \"input_length\": 1}\n", line, "\n")).status();
    if (message == nullptr) {
      EXPECT_TRUE(status.ok()) << status;
      continue;
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << line.substr(0, 80);
    EXPECT_THAT(status.message(), HasSubstr(absl::StrCat("line 2: ", message)));
    EXPECT_THAT(std::string(status.message()), ::testing::Not(HasSubstr("\x1b")));
    EXPECT_LT(status.message().size(), 500);
  }
  EXPECT_THAT(Parse("").status().message(), HasSubstr("no prompt"));
  EXPECT_EQ(ReadTrace("/no/such/file", {}).status().code(), absl::StatusCode::kNotFound);
}

TEST(TraceTest, EqualIdsGiveEqualTokens) {
  const TracePrompt one{.num_tokens = 20, .hash_ids = {5, 6, 7}};
  const TracePrompt two{.num_tokens = 18, .hash_ids = {5, 9, 7}};
  const auto a = TraceTokens(one, 8, 1000, /*seed=*/1);
  const auto b = TraceTokens(two, 8, 1000, /*seed=*/2);
  ASSERT_THAT(a, SizeIs(20));
  ASSERT_THAT(b, SizeIs(18));
  EXPECT_THAT(a, Each(Lt(1000)));
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 8, b.begin()));
  EXPECT_FALSE(std::equal(a.begin() + 8, a.begin() + 16, b.begin() + 8));
  EXPECT_TRUE(std::equal(b.begin() + 16, b.end(), a.begin() + 16)) << "a part of the same block";
  // Fixed for all times: traces of today and tomorrow give the same prompts.
  EXPECT_THAT(TraceTokens({.num_tokens = 3, .hash_ids = {5}}, 8, 1000, 0),
              ElementsAre(a[0], a[1], a[2]));
}

TEST(TraceTest, TokensWithoutAnIdBelongToThePromptAlone) {
  const TracePrompt prompt{.num_tokens = 16, .hash_ids = {5}};
  const auto a = TraceTokens(prompt, 8, 1000, /*seed=*/1);
  const auto b = TraceTokens(prompt, 8, 1000, /*seed=*/2);
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 8, b.begin()));
  EXPECT_FALSE(std::equal(a.begin() + 8, a.end(), b.begin() + 8));
  EXPECT_EQ(TraceTokens(prompt, 8, 1000, 1), a);
}

TEST(TraceTest, PrefixesAreHeldBlockByBlock) {
  const auto names = [](std::vector<uint64_t> ids, int64_t tokens) {
    return PrefixNames({.num_tokens = tokens, .hash_ids = std::move(ids)}, 8);
  };
  EXPECT_THAT(names({1, 2, 3}, 20), SizeIs(2)) << "the last block is a part";
  HeldPrefixes held;
  EXPECT_EQ(held.CountHeld(names({1, 2}, 16)), 0);
  held.Add(names({1, 2, 3}, 24));
  EXPECT_EQ(held.CountHeld(names({1, 2, 4}, 24)), 2);
  EXPECT_EQ(held.CountHeld(names({1, 2, 3, 4}, 32)), 3);
  EXPECT_EQ(held.CountHeld(names({2, 3}, 16)), 0) << "the same block behind another start";
}

}  // namespace
}  // namespace headstart
