// Presets of ProxyAttn, and the check of options against a model.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/attention_params.h"

namespace headstart {

enum class AttentionPreset : uint8_t { kExact, kPaper, kBalanced, kFast };

absl::StatusOr<AttentionPreset> ParseAttentionPreset(absl::string_view name);
absl::string_view AttentionPresetName(AttentionPreset preset);

// The preset's values for a model: g depends on its heads.
ProxyAttnOptions ResolvePreset(AttentionPreset preset, const HeadShape& heads);

// INVALID_ARGUMENT names the field, the value and what it may be.
absl::Status ValidateAttentionOptions(const ProxyAttnOptions& options, const HeadShape& heads,
                                      int32_t num_layers);

}  // namespace headstart
