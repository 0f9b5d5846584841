#include "engine/resolve.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

std::string FolderName(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).lexically_normal();
  return folder.has_filename() ? folder.filename().string()
                               : folder.parent_path().filename().string();
}

absl::Status BadOption(absl::string_view name, int64_t value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is not ", allowed));
}

// Replaces the zeros in `options` by what they stand for.
absl::Status FillZeros(const ModelConfig& config, EngineOptions& options) {
  if (options.model_name.empty()) options.model_name = FolderName(options.model_dir);
  if (options.piece_tokens <= 0 || options.piece_tokens % kBlockTokens != 0) {
    return BadOption("piece_tokens", options.piece_tokens,
                     absl::StrCat("a positive multiple of ", kBlockTokens));
  }
  if (options.max_prompt_tokens < 0 || options.max_prompt_tokens > config.max_positions) {
    return BadOption("max_prompt_tokens", options.max_prompt_tokens,
                     absl::StrCat("in [1, ", config.max_positions,
                                  "], the model's context, or 0 for all of it"));
  }
  // Page numbers are int32.
  constexpr int64_t kMaxPoolTokens = (int64_t{1} << 31) * kBlockTokens - kBlockTokens;
  if (options.kv_pool_tokens < 0 || options.kv_pool_tokens > kMaxPoolTokens) {
    return BadOption("kv_pool_tokens", options.kv_pool_tokens,
                     absl::StrCat("in [0, ", kMaxPoolTokens, "]"));
  }
  if (options.max_prompt_tokens == 0) options.max_prompt_tokens = config.max_positions;
  if (options.kv_pool_tokens == 0) options.kv_pool_tokens = options.max_prompt_tokens;
  options.kv_pool_tokens = NumBlocks(options.kv_pool_tokens) * kBlockTokens;
  return absl::OkStatus();
}

KvGeometry GeometryOf(const ModelConfig& config, DType kv_dtype) {
  KvGeometry geometry;
  geometry.num_layers = config.num_layers;
  geometry.heads = config.heads;
  geometry.dtype = kv_dtype;
  geometry.chunk_pages = ChunkPages(geometry.page_bytes());
  return geometry;
}

absl::Status FillHostKvBytes(ResolvedModel& model) {
  constexpr int64_t kDefaultBytes = int64_t{2} << 30;
  constexpr int64_t kDefaultPrompts = 8;
  const KvGeometry& geometry = model.geometry;
  const int64_t chunk_bytes = geometry.chunk_bytes();
  const int64_t piece_bytes = PieceChunks(SchedulerOptionsOf(model)) * chunk_bytes;
  int64_t& bytes = model.options.host_kv_bytes;
  if (bytes == 0) {
    const int64_t prompt_bytes =
        NumBlocks(model.options.max_prompt_tokens) * geometry.page_bytes() * geometry.num_layers;
    bytes = std::max(std::min(kDefaultBytes, kDefaultPrompts * prompt_bytes), 2 * piece_bytes);
  }
  bytes -= bytes % chunk_bytes;
  if (bytes >= piece_bytes) return absl::OkStatus();
  return BadOption("host_kv_bytes", bytes,
                   absl::StrCat("at least ", piece_bytes, ", the KV of a piece"));
}

}  // namespace

absl::StatusOr<ResolvedModel> ResolveModel(const EngineOptions& options, DType compute_dtype,
                                           const Backend* backend) {
  ResolvedModel model;
  HEADSTART_ASSIGN_OR_RETURN(model.config, ReadModelConfig(options.model_dir));
  model.options = options;
  EngineOptions& resolved = model.options;
  HEADSTART_RETURN_IF_ERROR(FillZeros(model.config, resolved));
  model.prompt_limit = resolved.max_prompt_tokens;
  resolved.max_prompt_tokens = std::min(resolved.max_prompt_tokens, resolved.kv_pool_tokens);
  model.max_rows = std::min(resolved.piece_tokens, resolved.max_prompt_tokens);
  model.geometry = GeometryOf(model.config, compute_dtype);
  HEADSTART_RETURN_IF_ERROR(FillHostKvBytes(model));
  model.plan = PlanMemory(model.config, compute_dtype, model.max_rows, resolved.kv_pool_tokens,
                          SchedulerOptionsOf(model).num_slots);
  model.plan.host_kv_bytes = resolved.host_kv_bytes;
  if (backend != nullptr) {
    model.plan.scratch_bytes =
        backend->PlanScratchBytes(model.config.heads, model.max_rows, resolved.max_prompt_tokens);
  }
  return model;
}

absl::Status CheckFits(const MemoryPlan& plan, const Backend& backend) {
  const std::optional<int64_t> free_bytes = backend.FreeBytes();
  if (!free_bytes.has_value() || plan.total_bytes() <= *free_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model needs ", plan.total_bytes(), " bytes (weights ", plan.weight_bytes, ", KV pool ",
      plan.kv_pool_bytes, ", activations ", plan.workspace_bytes, ", scratch ", plan.scratch_bytes,
      "), the device has ", *free_bytes, " free: ", plan.total_bytes() - *free_bytes,
      " are missing; less kv_pool_tokens, max_prompt_tokens or piece_tokens need less"));
}

SchedulerOptions SchedulerOptionsOf(const ResolvedModel& model) {
  const EngineOptions& options = model.options;
  SchedulerOptions out;
  out.geometry = model.geometry;
  // No prompt is longer, so no piece needs more room.
  out.piece_tokens = std::min(options.piece_tokens, NumBlocks(model.max_rows) * kBlockTokens);
  out.max_requests = options.max_requests;
  out.max_tokens = options.max_tokens;
  out.default_lease = options.default_lease;
  out.max_lease = options.max_lease;
  out.stall_timeout = options.stall_timeout;
  return out;
}

}  // namespace headstart
