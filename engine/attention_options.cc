#include "engine/attention_options.h"

#include <array>
#include <charconv>

#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

// Numbers are shown by as many digits as tell them from their neighbours.
template <typename Number>
absl::Status Bad(absl::string_view field, Number value, absl::string_view allowed) {
  std::array<char, 32> digits;
  const char* const end = std::to_chars(digits.begin(), digits.end(), value).ptr;
  return absl::InvalidArgumentError(
      absl::StrCat("attention.", field, "=", absl::string_view(digits.data(), end - digits.data()),
                   " is not ", allowed));
}

}  // namespace

absl::StatusOr<AttentionPreset> ParseAttentionPreset(absl::string_view name) {
  for (const AttentionPreset preset : {AttentionPreset::kExact, AttentionPreset::kPaper,
                                       AttentionPreset::kBalanced, AttentionPreset::kFast}) {
    if (name == AttentionPresetName(preset)) return preset;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("attention preset \"", name, "\" is not one of exact, paper, balanced, fast"));
}

absl::string_view AttentionPresetName(AttentionPreset preset) {
  switch (preset) {
    case AttentionPreset::kExact:
      return "exact";
    case AttentionPreset::kPaper:
      return "paper";
    case AttentionPreset::kBalanced:
      return "balanced";
    case AttentionPreset::kFast:
      return "fast";
  }
  return "?";
}

ProxyAttnOptions ResolvePreset(AttentionPreset preset, const HeadShape& heads) {
  ProxyAttnOptions options;
  switch (preset) {
    case AttentionPreset::kExact:
      return options;
    case AttentionPreset::kPaper:
      options.enabled = true;
      options.num_proxies = heads.group_size() <= 4 ? 1 : heads.num_kv_heads;
      options.stride = 4;
      options.budget = BudgetRule::kOwn;
      options.gamma = 0.95f;
      options.floor_tokens = 2048;
      options.sink_blocks = 0;
      options.local_blocks = 0;
      options.dense_tail_blocks = 0;
      return options;
    case AttentionPreset::kBalanced:
    case AttentionPreset::kFast: {
      const bool fast = preset == AttentionPreset::kFast;
      options.enabled = true;
      options.num_proxies = heads.num_heads;
      options.stride = 16;
      options.budget = BudgetRule::kShared;
      options.gamma = fast ? 0.6f : 0.8f;
      options.floor_tokens = fast ? 1024 : 2048;
      options.sink_blocks = 1;
      options.local_blocks = 1;
      options.dense_tail_blocks = 2;
      return options;
    }
  }
  return options;
}

absl::Status ValidateAttentionOptions(const ProxyAttnOptions& options, const HeadShape& heads,
                                      int32_t num_layers) {
  const int32_t g = options.num_proxies;
  if (g < 1 || heads.num_heads % g != 0 ||
      (heads.num_kv_heads % g != 0 && g % heads.num_kv_heads != 0)) {
    return Bad("num_proxies", g,
               absl::StrCat("a divisor of the ", heads.num_heads, " query heads that divides the ",
                            heads.num_kv_heads, " KV heads or is a multiple of them"));
  }
  if (options.stride != 4 && options.stride != 8 && options.stride != 16) {
    return Bad("stride", options.stride, "4, 8 or 16");
  }
  if (!(options.gamma > 0.0f && options.gamma <= 1.0f)) {
    return Bad("gamma", options.gamma, "in (0, 1]");
  }
  if (options.floor_tokens < 0) return Bad("floor_tokens", options.floor_tokens, "0 or more");
  if (options.sink_blocks < 0 || options.sink_blocks > 1) {
    return Bad("sink_blocks", options.sink_blocks, "0 or 1");
  }
  if (options.local_blocks < 0) return Bad("local_blocks", options.local_blocks, "0 or more");
  if (options.dense_tail_blocks < 0) {
    return Bad("dense_tail_blocks", options.dense_tail_blocks, "0 or more");
  }
  if (options.dense_below_tokens < 0) {
    return Bad("dense_below_tokens", options.dense_below_tokens, "0 or more");
  }
  if (!(options.dense_above_density >= 0.0f && options.dense_above_density <= 1.0f)) {
    return Bad("dense_above_density", options.dense_above_density, "in [0, 1]");
  }
  if (!(options.forced_density >= 0.0f && options.forced_density <= 1.0f)) {
    return Bad("forced_density", options.forced_density, "in [0, 1]");
  }
  for (const int32_t layer : options.dense_layers) {
    if (layer >= 0 && layer < num_layers) continue;
    return Bad("dense_layers", layer, absl::StrCat("below the ", num_layers, " layers"));
  }
  return absl::OkStatus();
}

}  // namespace headstart
