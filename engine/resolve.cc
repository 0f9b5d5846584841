#include "engine/resolve.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/run/kv_staging.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

std::string FolderName(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).lexically_normal();
  return folder.has_filename() ? folder.filename().string()
                               : folder.parent_path().filename().string();
}

// Of short prompts, that find room in the KV pool beside the longest one.
constexpr int64_t kPoolBatches = 4;
constexpr int64_t kDefaultBatchTokens = 2048;
// Requests that may be between their first and their last piece. A slot is small.
constexpr int32_t kNumSlots = 64;

// Most tokens of a piece: no prompt is longer than the longest.
int64_t PieceTokens(const EngineOptions& options) {
  return std::min(options.piece_tokens, NumBlocks(options.max_prompt_tokens) * kBlockTokens);
}

absl::Status BadOption(absl::string_view name, int64_t value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is not ", allowed));
}

// Replaces the zeros in `options` by what they stand for.
absl::Status FillZeros(const ModelConfig& config, int64_t max_tokens, EngineOptions& options) {
  constexpr int64_t kMaxPieceTokens = 1 << 24;  // as long as a context may be
  const int64_t context = std::min(config.max_positions, max_tokens);
  if (options.model_name.empty()) options.model_name = FolderName(options.model_dir);
  if (options.piece_tokens <= 0 || options.piece_tokens % kBlockTokens != 0 ||
      options.piece_tokens > kMaxPieceTokens) {
    return BadOption(
        "piece_tokens", options.piece_tokens,
        absl::StrCat("a positive multiple of ", kBlockTokens, " up to ", kMaxPieceTokens));
  }
  if (options.batch_tokens == 0) {
    options.batch_tokens = std::min(kDefaultBatchTokens, options.piece_tokens);
  }
  if (options.batch_tokens <= 0 || options.batch_tokens % kBlockTokens != 0 ||
      options.batch_tokens > options.piece_tokens) {
    return BadOption("batch_tokens", options.batch_tokens,
                     absl::StrCat("a multiple of ", kBlockTokens, " in [", kBlockTokens,
                                  ", piece_tokens=", options.piece_tokens, "]"));
  }
  if (options.max_prompt_tokens < 0 || options.max_prompt_tokens > context) {
    return BadOption("max_prompt_tokens", options.max_prompt_tokens,
                     absl::StrCat("in [1, ", context, "], ",
                                  context < config.max_positions ? "which this device takes"
                                                                 : "the model's context",
                                  ", or 0 for all of it"));
  }
  // Page numbers are int32, and bytes must be countable.
  const int64_t max_pool_tokens =
      std::min((int64_t{1} << 31) * kBlockTokens - kBlockTokens,
               (int64_t{1} << 60) / config.KvBytesPerToken(DType::kF32));
  if (options.kv_pool_tokens < 0 || options.kv_pool_tokens > max_pool_tokens) {
    return BadOption("kv_pool_tokens", options.kv_pool_tokens,
                     absl::StrCat("in [0, ", max_pool_tokens, "]"));
  }
  if (options.max_prompt_tokens == 0) options.max_prompt_tokens = context;
  if (options.kv_pool_tokens == 0) {
    options.kv_pool_tokens = options.max_prompt_tokens + kPoolBatches * options.batch_tokens;
  }
  options.kv_pool_tokens = NumBlocks(options.kv_pool_tokens) * kBlockTokens;
  return absl::OkStatus();
}

absl::Status CheckRuns(const ModelConfig& config, const BackendPlan& backend) {
  const absl::Status runs =
      backend.CheckModel({config.heads, config.hidden_size, config.intermediate_size});
  if (runs.ok()) return runs;
  return absl::Status(runs.code(), absl::StrCat("config.json: ", runs.message()));
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

// What is needed of the host: at the end or while weights are read, whatever is more, and the
// program itself.
int64_t HostBytes(const MemoryPlan& plan, const Backend& backend) {
  constexpr int64_t kProgramBytes = 64 << 20;
  const bool keeps_all = backend.UsesHostMemory();
  const int64_t at_the_end = (keeps_all ? plan.total_bytes() : 0) + plan.host_kv_bytes;
  const int64_t reading = (keeps_all ? plan.weight_bytes : 0) + plan.reading_bytes;
  return std::max(at_the_end, reading) + kProgramBytes;
}

absl::Status CheckRoom(const MemoryPlan& plan, int64_t needed, const FreeMemory& free) {
  if (needed <= free.bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model needs ", needed, " bytes (weights ", plan.weight_bytes, ", KV pool ",
      plan.kv_pool_bytes, ", activations ", plan.workspace_bytes, ", scratch ", plan.scratch_bytes,
      ", staging ", plan.staging_bytes, "; of the host for KV on its way out ", plan.host_kv_bytes,
      ", to read weights ", plan.reading_bytes, "), ", free.limited_by, " leaves ", free.bytes,
      ": ", needed - free.bytes,
      " are missing; less kv_pool_tokens, max_prompt_tokens, piece_tokens or host_kv_bytes need "
      "less"));
}

}  // namespace

absl::StatusOr<ResolvedModel> ResolveModel(const EngineOptions& options,
                                           const BackendPlan& backend) {
  const DType compute_dtype = backend.compute_dtype();
  ResolvedModel model;
  HEADSTART_ASSIGN_OR_RETURN(model.config, ReadModelConfig(options.model_dir, options.links));
  model.options = options;
  EngineOptions& resolved = model.options;
  HEADSTART_RETURN_IF_ERROR(CheckRuns(model.config, backend));
  HEADSTART_RETURN_IF_ERROR(FillZeros(model.config, backend.max_tokens(), resolved));
  model.prompt_limit = resolved.max_prompt_tokens;
  resolved.max_prompt_tokens = std::min(resolved.max_prompt_tokens, resolved.kv_pool_tokens);
  // Several prompts may run together, but the pool holds their KV.
  model.limits.urgent_rows = std::min(resolved.batch_tokens, resolved.kv_pool_tokens);
  model.limits.max_rows = std::max(PieceTokens(resolved), model.limits.urgent_rows);
  model.limits.num_slots = kNumSlots;
  model.limits.max_pieces = kNumSlots;
  model.geometry = GeometryOf(model.config, compute_dtype);
  HEADSTART_RETURN_IF_ERROR(FillHostKvBytes(model));
  model.plan = PlanMemory(model.config, compute_dtype, model.limits, resolved.kv_pool_tokens);
  model.plan.staging_bytes = KvStaging::Bytes(model.geometry, model.limits.max_rows);
  model.plan.host_kv_bytes = resolved.host_kv_bytes;
  model.plan.scratch_bytes = backend.PlanScratchBytes(model.config.heads, model.limits.max_rows,
                                                      resolved.max_prompt_tokens);
  return model;
}

absl::Status CheckFits(const MemoryPlan& plan, const Backend& backend,
                       const std::optional<FreeMemory>& host) {
  if (const std::optional<int64_t> free = backend.FreeBytes()) {
    HEADSTART_RETURN_IF_ERROR(CheckRoom(plan, plan.total_bytes(), {*free, "the device"}));
  }
  return host ? CheckRoom(plan, HostBytes(plan, backend), *host) : absl::OkStatus();
}

SchedulerOptions SchedulerOptionsOf(const ResolvedModel& model) {
  const EngineOptions& options = model.options;
  SchedulerOptions out;
  out.geometry = model.geometry;
  out.piece_tokens = PieceTokens(options);
  out.batch_tokens = model.limits.urgent_rows;
  out.num_slots = model.limits.num_slots;
  out.ageing = options.ageing;
  out.max_requests = options.max_requests;
  out.max_tokens = options.max_tokens;
  out.default_lease = options.default_lease;
  out.max_lease = options.max_lease;
  out.stall_timeout = options.stall_timeout;
  return out;
}

}  // namespace headstart
