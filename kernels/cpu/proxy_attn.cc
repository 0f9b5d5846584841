#include "kernels/cpu/proxy_attn.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/block_select.h"
#include "kernels/cpu/selection_run.h"

namespace headstart {
namespace {

absl::Status CheckShapes(const SelectArgs& args, DType dtype) {
  const HeadShape& shape = args.kv.shape;
  if (args.q.dtype != dtype || args.kv.dtype != dtype) {
    return absl::InvalidArgumentError(absl::StrCat("selection of ", DTypeName(dtype), " got q in ",
                                                   DTypeName(args.q.dtype), " and keys in ",
                                                   DTypeName(args.kv.dtype)));
  }
  if (args.q.rows <= 0 || args.q.cols != int64_t{shape.num_heads} * shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("q is [", args.q.rows, ", ", args.q.cols,
                                                   "], not [> 0, ", shape.num_heads, " x ",
                                                   shape.head_dim, "]"));
  }
  if (args.first_position < 0 || args.first_position % kBlockTokens != 0) {
    return absl::InvalidArgumentError(absl::StrCat("first_position=", args.first_position,
                                                   " is not a multiple of ", kBlockTokens));
  }
  return absl::OkStatus();
}

absl::Status CheckOptions(const ProxyAttnOptions& options, const HeadShape& shape) {
  const int32_t g = options.num_proxies;
  if (g < 1 || shape.num_heads % g != 0 ||
      (shape.num_kv_heads % g != 0 && g % shape.num_kv_heads != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("num_proxies=", g, " does not fit ",
                                                   shape.num_heads, " query heads and ",
                                                   shape.num_kv_heads, " KV heads"));
  }
  if (options.stride != 4 && options.stride != 8 && options.stride != 16) {
    return absl::InvalidArgumentError(
        absl::StrCat("stride=", options.stride, " is not 4, 8 or 16"));
  }
  return absl::OkStatus();
}

absl::Status Reset(const SelectionChunk& c, BlockSelection& selection) {
  try {
    ResetSelection(c.shape, c.options.num_proxies, c.args.first_position, c.num_tokens, selection);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for the block lists of ", c.num_tokens, " tokens"));
  }
  return absl::OkStatus();
}

void SelectSparse(const SelectionChunk& c, const SelectionRun& run, BlockSelection& selection) {
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

absl::Status ProxyAttnSelector::Select(const SelectArgs& args, BlockSelection& selection) {
  HEADSTART_RETURN_IF_ERROR(CheckShapes(args, dtype_));
  HEADSTART_RETURN_IF_ERROR(CheckOptions(*args.options, args.kv.shape));
  const SelectionChunk chunk(args);
  HEADSTART_RETURN_IF_ERROR(Reset(chunk, selection));
  const int64_t bytes = SelectionRun(chunk, kernels_, num_threads_, nullptr).bytes();
  HEADSTART_ASSIGN_OR_RETURN(char* const memory, scratch_.Get(bytes));
  const SelectionRun run(chunk, kernels_, num_threads_, memory);
  if (IsDenseByRule(chunk.options, chunk.num_tokens, args.layer)) {
    run.RankRows(/*scored=*/false, selection);
    MakeDenseFrom(0, selection);
  } else {
    SelectSparse(chunk, run, selection);
  }
  std::copy_n(args.budget_ratio, chunk.shape.num_heads, selection.budget_ratio.begin());
  return absl::OkStatus();
}

}  // namespace headstart
