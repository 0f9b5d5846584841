// The truth of ProxyAttn's block selection (arXiv 2509.24745): scalar, double accumulation.
//
// What the paper and attention_params.h leave open, and every backend does alike:
//  * A proxy's mean over heads is an fp32 sum in rising head order, divided by their number, then
//    rounded to the storage type (the type of the KV pages).
//  * The diagonal block is always forced, also with sink_blocks = local_blocks = 0.
//  * A mass that never reaches gamma, and gamma = 1, ask for every block.
//  * budget_ratio is the greatest (blocks that reach gamma) / (key blocks) of all pieces so far, as
//    float; the budget is ceil(budget_ratio * key blocks - 2^-10), so that rounding adds no block.
//  * The floor is ceil(floor_tokens / kBlockTokens) blocks. It is not part of budget_ratio.
//  * dense_below_tokens is compared with the tokens so far, this piece included. It, dense_layers
//    and forced_density leave budget_ratio as it is.
//  * forced_density f: K is the least count for which the rows' sum of min(m + 1, K) reaches
//    f times their causal blocks; no floor. The dense tail and dense_above_density still apply.
//  * dense_above_density is compared with all kept blocks of the piece: over all heads, with the
//    dense tail.
//  * A selection that is dense by rule (not `enabled`, dense_below_tokens, dense_layers) ranks each
//    row's blocks in forced order, then by index.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention_params.h"
#include "kernels/base/dtype.h"
#include "kernels/cpu/reference_ops.h"

namespace headstart::reference {

// Step 1, of the query blocks [first_row, first_row + num_rows): one value per (proxy, row m,
// causal block n), laid out as BlockSelection::ranking is, with its offsets.
struct ProxyScores {
  std::vector<double> log_max;  // max over sampled t in m, u in n of logit(t, u) - L_t
  std::vector<double> mass;  // sum over the same of exp(logit(t, u) - L_t), normalised over the row
};

// One piece of one layer.
struct SelectionInput {
  HeadShape shape;
  HostMatrix q;                // [n, H d], rotated; row r at position first_position + r
  HostMatrix k;                // [first_position + n, H_kv d], rotated
  int64_t first_position = 0;  // multiple of kBlockTokens
  DType dtype = DType::kF32;   // storage type: q-bar and k-bar are rounded to it
  int32_t layer = 0;
  bool ends_prompt = false;
};

// Every `stride`-th row of x (row 0 first), averaged over groups of heads: [ceil(rows / stride),
// num_groups * d].
HostMatrix SampleAndPool(const HostMatrix& x, int32_t num_heads, int32_t num_groups, int32_t stride,
                         DType dtype);
ProxyScores ScoreBlocks(const SelectionInput& input, const ProxyAttnOptions& options);
// Block mass of the last query block of the piece: [num_heads][num_key_blocks], each head's sum
// is 1.
std::vector<double> LastRowMass(const SelectionInput& input);
// All steps. budget_ratio: [num_heads], read and raised.
BlockSelection SelectBlocks(const SelectionInput& input, const ProxyAttnOptions& options,
                            std::vector<float>& budget_ratio);

}  // namespace headstart::reference
