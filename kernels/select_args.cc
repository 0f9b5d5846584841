#include "kernels/select_args.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

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

}  // namespace

absl::Status CheckSelectArgs(const SelectArgs& args, DType dtype) {
  HEADSTART_RETURN_IF_ERROR(CheckShapes(args, dtype));
  return CheckOptions(*args.options, args.kv.shape);
}

bool IsDenseByRule(const ProxyAttnOptions& options, int64_t num_tokens, int32_t layer) {
  const auto& layers = options.dense_layers;
  return !options.enabled || num_tokens <= options.dense_below_tokens ||
         std::find(layers.begin(), layers.end(), layer) != layers.end();
}

int64_t BudgetForDensity(int64_t begin, int64_t end, double density) {
  const int64_t causal = (end * (end + 1) - begin * (begin + 1)) / 2;
  const double wanted = density * static_cast<double>(causal);
  // One more block of budget adds one block to every row that has as many.
  int64_t budget = 0, kept = 0;
  do {
    kept += end - std::max(begin, budget);
    ++budget;
  } while (budget < end && static_cast<double>(kept) < wanted);
  return budget;
}

}  // namespace headstart
