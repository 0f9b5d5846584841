#include "engine/attention_options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

constexpr HeadShape kLlama8B = {.num_heads = 32, .num_kv_heads = 8, .head_dim = 128};
constexpr HeadShape kQwen7B = {.num_heads = 28, .num_kv_heads = 4, .head_dim = 128};
constexpr HeadShape kSmolLm2 = {.num_heads = 9, .num_kv_heads = 3, .head_dim = 64};

TEST(AttentionPresetTest, NamesRoundTrip) {
  for (const AttentionPreset preset : {AttentionPreset::kExact, AttentionPreset::kPaper,
                                       AttentionPreset::kBalanced, AttentionPreset::kFast}) {
    ASSERT_OK_AND_ASSIGN(const AttentionPreset parsed,
                         ParseAttentionPreset(AttentionPresetName(preset)));
    EXPECT_EQ(parsed, preset);
  }
  EXPECT_THAT(ParseAttentionPreset("quick"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("\"quick\" is not one of exact, paper, balanced, fast")));
}

TEST(AttentionPresetTest, ExactIsDense) {
  EXPECT_FALSE(ResolvePreset(AttentionPreset::kExact, kLlama8B).enabled);
}

TEST(AttentionPresetTest, PaperHasThePapersValues) {
  const ProxyAttnOptions options = ResolvePreset(AttentionPreset::kPaper, kLlama8B);
  EXPECT_TRUE(options.enabled);
  EXPECT_EQ(options.num_proxies, 1);
  EXPECT_EQ(options.stride, 4);
  EXPECT_EQ(options.budget, BudgetRule::kOwn);
  EXPECT_EQ(options.gamma, 0.95f);
  EXPECT_EQ(options.floor_tokens, 2048);
  EXPECT_EQ(options.sink_blocks, 0);
  EXPECT_EQ(options.local_blocks, 0);
  EXPECT_EQ(options.dense_tail_blocks, 0);
  EXPECT_EQ(ResolvePreset(AttentionPreset::kPaper, kQwen7B).num_proxies, 4);
  EXPECT_EQ(ResolvePreset(AttentionPreset::kPaper, kSmolLm2).num_proxies, 1);
}

TEST(AttentionPresetTest, BalancedAndFastDifferInGammaAndFloor) {
  const ProxyAttnOptions balanced = ResolvePreset(AttentionPreset::kBalanced, kQwen7B);
  EXPECT_EQ(balanced.num_proxies, 28);
  EXPECT_EQ(balanced.stride, 16);
  EXPECT_EQ(balanced.budget, BudgetRule::kShared);
  EXPECT_EQ(balanced.gamma, 0.8f);
  EXPECT_EQ(balanced.floor_tokens, 2048);
  EXPECT_EQ(balanced.sink_blocks, 1);
  EXPECT_EQ(balanced.local_blocks, 1);
  EXPECT_EQ(balanced.dense_tail_blocks, 2);
  ProxyAttnOptions fast = ResolvePreset(AttentionPreset::kFast, kQwen7B);
  EXPECT_EQ(fast.gamma, 0.6f);
  EXPECT_EQ(fast.floor_tokens, 1024);
  fast.gamma = balanced.gamma;
  fast.floor_tokens = balanced.floor_tokens;
  EXPECT_EQ(fast, balanced);
}

constexpr int32_t kLayers = 32;

TEST(AttentionOptionsTest, PresetsAreValidForEveryModel) {
  for (const HeadShape& heads : {kLlama8B, kQwen7B, kSmolLm2}) {
    for (const AttentionPreset preset : {AttentionPreset::kExact, AttentionPreset::kPaper,
                                         AttentionPreset::kBalanced, AttentionPreset::kFast}) {
      EXPECT_OK(ValidateAttentionOptions(ResolvePreset(preset, heads), heads, kLayers));
    }
  }
}

TEST(AttentionOptionsTest, TakesExactlyTheProxyCountsThatCutTheHeadsEvenly) {
  for (int32_t g = -1; g <= 40; ++g) {
    ProxyAttnOptions options;
    options.num_proxies = g;
    const bool fits = g == 1 || g == 3 || g == 9;
    EXPECT_EQ(ValidateAttentionOptions(options, kSmolLm2, kLayers).ok(), fits) << g;
    const bool fits_qwen = g == 1 || g == 2 || g == 4 || g == 28;  // not 7, 14: 4 doesn't divide
    EXPECT_EQ(ValidateAttentionOptions(options, kQwen7B, kLayers).ok(), fits_qwen) << g;
  }
}

TEST(AttentionOptionsTest, RefusesValuesByName) {
  const auto refusal = [](auto set) {
    ProxyAttnOptions options;
    set(options);
    return ValidateAttentionOptions(options, kLlama8B, kLayers);
  };
  using Options = ProxyAttnOptions&;
  const auto is = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(refusal([](Options o) { o.num_proxies = 5; }),
              is("attention.num_proxies=5 is not a divisor"));
  EXPECT_THAT(refusal([](Options o) { o.stride = 5; }), is("attention.stride=5 is not 4, 8 or 16"));
  EXPECT_THAT(refusal([](Options o) { o.gamma = 0; }), is("attention.gamma=0 is not in (0, 1]"));
  EXPECT_THAT(refusal([nan](Options o) { o.gamma = nan; }), is("attention.gamma=nan"));
  EXPECT_THAT(refusal([](Options o) { o.gamma = 1.01f; }), is("attention.gamma=1.01 is"));
  EXPECT_THAT(refusal([](Options o) { o.gamma = std::nextafter(1.0f, 2.0f); }),
              is("attention.gamma=1.0000001 is not in (0, 1]"));
  EXPECT_THAT(refusal([](Options o) { o.floor_tokens = -1; }), is("attention.floor_tokens=-1"));
  EXPECT_THAT(refusal([](Options o) { o.sink_blocks = 2; }), is("attention.sink_blocks=2"));
  EXPECT_THAT(refusal([](Options o) { o.local_blocks = -1; }), is("attention.local_blocks=-1"));
  EXPECT_THAT(refusal([](Options o) { o.dense_tail_blocks = -1; }),
              is("attention.dense_tail_blocks=-1"));
  EXPECT_THAT(refusal([](Options o) { o.dense_below_tokens = -1; }),
              is("attention.dense_below_tokens=-1"));
  EXPECT_THAT(refusal([](Options o) { o.dense_above_density = 1.5f; }),
              is("attention.dense_above_density=1.5"));
  EXPECT_THAT(refusal([](Options o) { o.forced_density = -0.5f; }),
              is("attention.forced_density=-0.5"));
  EXPECT_THAT(refusal([](Options o) {
                o.dense_layers = {0, -3};
              }),
              is("attention.dense_layers=-3"));
  EXPECT_THAT(refusal([](Options o) { o.dense_layers = {kLayers}; }),
              is("attention.dense_layers=32 is not below the 32 layers"));
}

}  // namespace
}  // namespace headstart
