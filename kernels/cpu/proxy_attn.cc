#include "kernels/cpu/proxy_attn.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/block_select.h"
#include "kernels/cpu/selection_run.h"

namespace headstart {
namespace {

absl::Status Reset(const SelectionPiece& c, BlockSelection& selection) {
  try {
    ResetSelection(c.shape, c.options.num_proxies, c.args.first_position, c.num_tokens, selection);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for the block lists of ", c.num_tokens, " tokens"));
  }
  return absl::OkStatus();
}

void SelectSparse(const SelectionPiece& c, const SelectionRun& run, BlockSelection& selection) {
  run.PackSampledKeys();
  run.RankRows(/*scored=*/true, selection);
  if (c.options.forced_density > 0) {
    SetForcedCounts(c.options, selection);
  } else if (c.options.budget != BudgetRule::kRow) {
    run.ScoreLastBlock();
    run.SetBudgets(selection);
  }
  ApplyDenseRules(c.options, c.args.ends_prompt, selection);
}

}  // namespace

int64_t ProxyAttnSelector::PlanScratchBytes(const HeadShape& shape, int64_t piece_tokens,
                                            int64_t num_tokens) const {
  // The last piece of the longest sequence, in whole blocks.
  const int64_t rows = NumBlocks(std::min(piece_tokens, num_tokens)) * kBlockTokens;
  ProxyAttnOptions options;
  options.num_proxies = shape.num_heads;
  options.stride = 4;
  SequenceAttention args;
  args.q = {nullptr, dtype_, rows, int64_t{shape.num_heads} * shape.head_dim, 0};
  args.first_position = NumBlocks(num_tokens) * kBlockTokens - rows;
  args.kv.shape = shape;
  args.proxy_attn = &options;
  const SelectionPiece piece(args);
  BlockSelection lists;
  lists.first_row = piece.first_row;
  lists.num_rows = NumBlocks(rows);
  return SelectionRun(piece, kernels_, num_threads_, nullptr).bytes() +
         shape.num_heads * (lists.RankingStride() + lists.num_rows) * int64_t{sizeof(int32_t)};
}

absl::Status ProxyAttnSelector::Select(const SequenceAttention& args, BlockSelection& selection) {
  const SelectionPiece piece(args);
  HEADSTART_RETURN_IF_ERROR(Reset(piece, selection));
  const int64_t bytes = SelectionRun(piece, kernels_, num_threads_, nullptr).bytes();
  HEADSTART_ASSIGN_OR_RETURN(char* const memory, scratch_.Get(bytes));
  const SelectionRun run(piece, kernels_, num_threads_, memory);
  if (IsDenseByRule(piece.options, piece.num_tokens)) {
    run.RankRows(/*scored=*/false, selection);
    MakeDenseFrom(0, selection);
  } else {
    SelectSparse(piece, run, selection);
  }
  std::copy_n(args.budget_ratio, piece.shape.num_heads, selection.budget_ratio.begin());
  return absl::OkStatus();
}

}  // namespace headstart
