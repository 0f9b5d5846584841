#include "server/rpc/attention_request.h"

namespace headstart {
namespace {

template <typename T>
void Override(const std::optional<T>& value, T* out) {
  if (value) *out = *value;
}

void ApplyOverrides(const AttentionRequest& request, ProxyAttnOptions* options) {
  Override(request.num_proxies, &options->num_proxies);
  Override(request.stride, &options->stride);
  Override(request.budget, &options->budget);
  Override(request.gamma, &options->gamma);
  Override(request.floor_tokens, &options->floor_tokens);
  Override(request.sink_blocks, &options->sink_blocks);
  Override(request.local_blocks, &options->local_blocks);
  Override(request.dense_tail_blocks, &options->dense_tail_blocks);
  Override(request.dense_below_tokens, &options->dense_below_tokens);
}

}  // namespace

bool AttentionRequest::HasOverrides() const {
  return num_proxies || stride || budget || gamma || floor_tokens || sink_blocks || local_blocks ||
         dense_tail_blocks || dense_below_tokens;
}

absl::StatusOr<ResolvedAttention> ResolveAttention(const AttentionRequest& request,
                                                   const AttentionDefaults& defaults,
                                                   const HeadShape& heads) {
  const AttentionRequest& server = defaults.request;
  ResolvedAttention resolved;
  resolved.preset = request.preset.value_or(server.preset.value_or(AttentionPreset::kBalanced));
  const bool server_values_apply = !request.preset.has_value();
  if (resolved.preset == AttentionPreset::kExact &&
      (request.HasOverrides() || (server_values_apply && server.HasOverrides()))) {
    return absl::InvalidArgumentError(
        "attention: the preset exact is dense attention and takes no other values");
  }
  resolved.options = ResolvePreset(resolved.preset, heads);
  if (server_values_apply) ApplyOverrides(server, &resolved.options);
  ApplyOverrides(request, &resolved.options);
  Override(defaults.dense_above_density, &resolved.options.dense_above_density);
  resolved.options.dense_layers = defaults.dense_layers;
  return resolved;
}

}  // namespace headstart
