#include "server/rpc/attention_request.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

constexpr HeadShape kHeads = {.num_heads = 8, .num_kv_heads = 2, .head_dim = 64};

ResolvedAttention Resolve(const AttentionRequest& request, const AttentionDefaults& defaults) {
  const auto resolved = ResolveAttention(request, defaults, kHeads);
  EXPECT_OK(resolved);
  return *resolved;
}

TEST(AttentionRequestTest, NothingAskedNothingSetIsBalanced) {
  const ResolvedAttention resolved = Resolve({}, {});
  EXPECT_EQ(resolved.preset, AttentionPreset::kBalanced);
  EXPECT_EQ(resolved.options, ResolvePreset(AttentionPreset::kBalanced, kHeads));
}

TEST(AttentionRequestTest, WithoutAPresetTheServersChoiceIsTheBase) {
  AttentionDefaults defaults;
  defaults.request.preset = AttentionPreset::kFast;
  defaults.request.gamma = 0.5f;
  AttentionRequest request;
  request.floor_tokens = 256;
  const ResolvedAttention resolved = Resolve(request, defaults);
  EXPECT_EQ(resolved.preset, AttentionPreset::kFast);
  EXPECT_EQ(resolved.options.gamma, 0.5f);
  EXPECT_EQ(resolved.options.floor_tokens, 256);
}

TEST(AttentionRequestTest, APresetReplacesTheServersValues) {
  AttentionDefaults defaults;
  defaults.request.gamma = 0.5f;
  AttentionRequest request;
  request.preset = AttentionPreset::kPaper;
  EXPECT_EQ(Resolve(request, defaults).options, ResolvePreset(AttentionPreset::kPaper, kHeads));
}

TEST(AttentionRequestTest, EveryValueCanBeSet) {
  AttentionRequest request;
  request.preset = AttentionPreset::kPaper;
  request.num_proxies = 8;
  request.stride = 16;
  request.budget = BudgetRule::kRow;
  request.gamma = 0.7f;
  request.floor_tokens = 1;
  request.sink_blocks = 1;
  request.local_blocks = 3;
  request.dense_tail_blocks = 4;
  request.dense_below_tokens = 5;
  const ProxyAttnOptions options = Resolve(request, {}).options;
  EXPECT_TRUE(options.enabled);
  EXPECT_EQ(options.num_proxies, 8);
  EXPECT_EQ(options.stride, 16);
  EXPECT_EQ(options.budget, BudgetRule::kRow);
  EXPECT_EQ(options.gamma, 0.7f);
  EXPECT_EQ(options.floor_tokens, 1);
  EXPECT_EQ(options.sink_blocks, 1);
  EXPECT_EQ(options.local_blocks, 3);
  EXPECT_EQ(options.dense_tail_blocks, 4);
  EXPECT_EQ(options.dense_below_tokens, 5);
}

TEST(AttentionRequestTest, WhatOnlyTheServerSetsHoldsForEveryRequest) {
  AttentionDefaults defaults;
  defaults.dense_above_density = 0.25f;
  defaults.dense_layers = {0, 1};
  AttentionRequest request;
  request.preset = AttentionPreset::kFast;
  const ProxyAttnOptions options = Resolve(request, defaults).options;
  EXPECT_EQ(options.dense_above_density, 0.25f);
  EXPECT_EQ(options.dense_layers, (std::vector<int32_t>{0, 1}));
}

TEST(AttentionRequestTest, ExactTakesNoOtherValues) {
  AttentionRequest request;
  request.preset = AttentionPreset::kExact;
  EXPECT_FALSE(Resolve(request, {}).options.enabled);
  request.gamma = 0.9f;
  EXPECT_THAT(ResolveAttention(request, {}, kHeads),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("attention")));
  AttentionDefaults defaults;
  defaults.request.preset = AttentionPreset::kExact;
  AttentionRequest only_gamma;
  only_gamma.gamma = 0.9f;
  EXPECT_THAT(ResolveAttention(only_gamma, defaults, kHeads),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace headstart
