// How sparse a prompt's attention was going to be: what the heads' budgets say, before anything
// runs dense by rule.
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

}  // namespace headstart
