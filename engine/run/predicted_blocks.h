// How many blocks a prompt's attention was going to take: what the heads' budgets say, before
// anything runs dense by rule; and all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/attention_params.h"

namespace headstart {

// By layer: the query-key blocks that the heads' budgets ask for in a prompt of num_tokens, of all
// rows that the layer attends for (the last layer: the last block's). 0 where no budget was
// estimated, which a ratio of 0 tells. budget_ratios: [num_layers][num_heads], not empty.
std::vector<int64_t> PredictedBlocks(absl::Span<const float> budget_ratios, int32_t num_heads,
                                     int64_t num_tokens, int32_t floor_tokens);

// By layer: the causal query-key blocks of a prompt of num_tokens, of all heads and of all rows
// that the layer attends for.
std::vector<int64_t> CausalBlocks(int32_t num_layers, int32_t num_heads, int64_t num_tokens);

}  // namespace headstart
