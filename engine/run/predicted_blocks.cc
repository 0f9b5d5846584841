#include "engine/run/predicted_blocks.h"

#include <algorithm>

namespace headstart {
namespace {

// Blocks that the rows [begin, end) keep with a budget: row m has m + 1 to choose from.
int64_t KeptBlocks(int64_t begin, int64_t end, int64_t budget) {
  const int64_t whole = std::clamp(budget, begin, end);  // rows before this one keep all
  return (whole * (whole + 1) - begin * (begin + 1)) / 2 + (end - whole) * budget;
}

}  // namespace

std::vector<int64_t> PredictedBlocks(absl::Span<const float> budget_ratios, int32_t num_heads,
                                     int64_t num_tokens, int32_t floor_tokens) {
  const size_t num_layers = budget_ratios.size() / static_cast<size_t>(num_heads);
  const int64_t end = NumBlocks(num_tokens);
  std::vector<int64_t> predicted(num_layers);
  for (size_t i = 0; i < budget_ratios.size(); ++i) {
    if (budget_ratios[i] == 0.0f) continue;
    const size_t layer = i / static_cast<size_t>(num_heads);
    const int64_t begin = layer + 1 == num_layers ? end - 1 : 0;
    predicted[layer] += KeptBlocks(begin, end, BudgetBlocks(budget_ratios[i], end, floor_tokens));
  }
  return predicted;
}

std::vector<int64_t> CausalBlocks(int32_t num_layers, int32_t num_heads, int64_t num_tokens) {
  const int64_t rows = NumBlocks(num_tokens);
  std::vector<int64_t> causal(static_cast<size_t>(num_layers), num_heads * rows * (rows + 1) / 2);
  causal.back() = num_heads * rows;  // of the last row
  return causal;
}

}  // namespace headstart
