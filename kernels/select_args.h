// What all backends ask of the arguments of SelectBlocks, and the rules that need no scores.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace headstart {

// INVALID_ARGUMENT names the argument that is out of range. dtype: of q and of the KV pages.
absl::Status CheckSelectArgs(const SelectArgs& args, DType dtype);

// Whether the options say so without a look at the queries: not enabled, a sequence of at most
// dense_below_tokens tokens, or one of dense_layers.
bool IsDenseByRule(const ProxyAttnOptions& options, int64_t num_tokens, int32_t layer);

// The least budget in blocks with which the rows [begin, end) keep `density` of their causal
// blocks.
int64_t BudgetForDensity(int64_t begin, int64_t end, double density);

}  // namespace headstart
