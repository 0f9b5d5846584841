#include "kernels/cuda/cuda_backend.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/weight_upload.h"
#include "kernels/select_args.h"

namespace headstart::cuda {
namespace {

class CudaRopeTable : public RopeTable {
 public:
  CudaRopeTable(DeviceMemory memory, int64_t half_dim, int64_t max_positions)
      : half_dim(half_dim), max_positions(max_positions), memory_(std::move(memory)) {}

  const float2* cos_sin() const { return static_cast<const float2*>(memory_.get()); }

  const int64_t half_dim;
  const int64_t max_positions;

 private:
  DeviceMemory memory_;
};

absl::StatusOr<cudaDeviceProp> FindDevice() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("device cuda: looked for an NVIDIA GPU of compute capability 9.0 (H100, H200) "
                     "through the CUDA ",
                     CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
                     " driver and found none (", cudaGetErrorString(error), ")"));
  }
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaSetDevice(0), "choosing device 0"));
  cudaDeviceProp properties{};
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaGetDeviceProperties(&properties, 0), "properties of device 0"));
  if (properties.major != 9 || properties.minor != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("device cuda: ", properties.name, " has compute capability ", properties.major,
                     ".", properties.minor, "; the kernels are for 9.0 (H100, H200) only"));
  }
  return properties;
}

absl::Status CheckMatrix(absl::string_view name, const Matrix& m, DType dtype, int64_t rows,
                         int64_t cols) {
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                       (m.rows <= 1 || m.row_stride * DTypeBytes(dtype) % 16 == 0);
  if (m.dtype == dtype && m.rows == rows && m.cols == cols && m.row_stride >= cols && aligned) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      name, " is ", DTypeName(m.dtype), " [", m.rows, ", ", m.cols, "] with stride ", m.row_stride,
      ", expected ", DTypeName(dtype), " [", rows, ", ", cols, "] with rows on 16 bytes"));
}

// For the elementwise kernels, which take eight columns at a time.
absl::Status CheckActivations(absl::string_view name, const Matrix& m, int64_t rows, int64_t cols) {
  if (cols % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has ", cols, " columns; the CUDA backend takes multiples of 8"));
  }
  return CheckMatrix(name, m, DType::kBF16, rows, cols);
}

absl::Status CheckHeads(const HeadShape& shape) {
  const bool groups =
      shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0;
  if (groups && (shape.head_dim == 64 || shape.head_dim == 128)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      shape.num_heads, " query heads, ", shape.num_kv_heads, " KV heads, head_dim ", shape.head_dim,
      ": KV heads must divide query heads, head_dim must be 64 or 128"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(const BackendOptions& options) {
  if (options.dtype == ComputeDType::kF32) {
    return absl::InvalidArgumentError("device cuda computes in bf16; f32 is for the CPU");
  }
  HEADSTART_ASSIGN_OR_RETURN(const cudaDeviceProp properties, FindDevice());
  HEADSTART_ASSIGN_OR_RETURN(Stream stream, MakeStream(/*urgent=*/false));
  HEADSTART_ASSIGN_OR_RETURN(Event finished, MakeEvent(/*timed=*/false));
  HEADSTART_ASSIGN_OR_RETURN(KvStaging kv_staging, KvStaging::Create());
  HEADSTART_ASSIGN_OR_RETURN(HostTransfer transfer, HostTransfer::Create());
  HEADSTART_ASSIGN_OR_RETURN(auto gemm, CublasLtGemm::Create());
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory tile_counter, AllocateDevice(sizeof(uint32_t)));
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaMemset(tile_counter.get(), 0, sizeof(uint32_t)), "clearing the tile counter"));
  const std::string device =
      absl::StrCat(properties.name, ", ", properties.multiProcessorCount, " multiprocessors, ",
                   properties.totalGlobalMem >> 20, " MiB, bf16");
  return std::unique_ptr<CudaBackend>(
      new CudaBackend(device, properties.multiProcessorCount,
                      {std::move(stream), std::move(finished), std::move(kv_staging),
                       std::move(transfer), std::move(gemm), std::move(tile_counter)}));
}

CudaBackend::CudaBackend(std::string device, int num_sms, Resources resources)
    : device_(std::move(device)),
      num_sms_(num_sms),
      stream_(std::move(resources.stream)),
      finished_(std::move(resources.finished)),
      kv_staging_(std::move(resources.kv_staging)),
      transfer_(std::move(resources.transfer)),
      gemm_(std::move(resources.gemm)),
      tile_counter_(std::move(resources.tile_counter)),
      selector_(num_sms) {}

// ---- memory

absl::StatusOr<Buffer> CudaBackend::Allocate(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(bytes));
  return Buffer(this, memory.release(), bytes);
}

int64_t CudaBackend::PlanScratchBytes(const HeadShape& heads, int64_t chunk_tokens,
                                      int64_t num_tokens) const {
  return BlockSelector::PlanScratch(heads, chunk_tokens, num_tokens) +
         KvStaging::DeviceBytes(heads, chunk_tokens) + chunk_tokens * int64_t{sizeof(int32_t)};
}

absl::Status CudaBackend::ReserveScratch(const HeadShape& heads, int64_t chunk_tokens,
                                         int64_t num_tokens) {
  HEADSTART_RETURN_IF_ERROR(CheckHeads(heads));
  HEADSTART_RETURN_IF_ERROR(
      selector_.Reserve(BlockSelector::PlanScratch(heads, chunk_tokens, num_tokens)));
  HEADSTART_RETURN_IF_ERROR(kv_staging_.Reserve(heads, chunk_tokens));
  return ids_.Reserve(chunk_tokens * int64_t{sizeof(int32_t)}).status();
}

std::optional<int64_t> CudaBackend::FreeBytes() const {
  size_t free_bytes = 0, total_bytes = 0;
  if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) return std::nullopt;
  return static_cast<int64_t>(free_bytes);
}

void CudaBackend::Free(void* data) { DeviceMemory{data}.reset(); }

absl::Status CudaBackend::Upload(const void* host, int64_t bytes, void* device) {
  const auto fill = [host](void* target, int64_t offset, int64_t count) {
    std::memcpy(target, static_cast<const char*>(host) + offset, count);
  };
  kv_staging_.Forget();  // pages may be what is overwritten
  return transfer_.Upload(fill, bytes, device, stream_.get());
}

absl::Status CudaBackend::Download(const void* device, int64_t bytes, void* host) {
  return transfer_.Download(device, bytes, host, stream_.get());
}

// ---- weights

absl::StatusOr<std::unique_ptr<LinearWeight>> CudaBackend::PrepareLinear(
    absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  int64_t out_features = 0;
  for (const HostTensor& part : parts) out_features += part.rows;
  const int64_t in_features = parts.empty() ? 0 : parts[0].cols;
  if (in_features == 0 || in_features % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a weight with ", in_features, " input features; the CUDA backend takes multiples of 8"));
  }
  CudaLinearWeight::Memory memory;
  HEADSTART_ASSIGN_OR_RETURN(memory.weight,
                             UploadParts(parts, DType::kBF16, transfer_, stream_.get()));
  HEADSTART_ASSIGN_OR_RETURN(memory.bias_bf16,
                             UploadParts(biases, DType::kBF16, transfer_, stream_.get()));
  HEADSTART_ASSIGN_OR_RETURN(memory.bias_f32,
                             UploadParts(biases, DType::kF32, transfer_, stream_.get()));
  return std::make_unique<CudaLinearWeight>(in_features, out_features, std::move(memory));
}

absl::StatusOr<Buffer> CudaBackend::PrepareVector(const HostTensor& vector) {
  HEADSTART_ASSIGN_OR_RETURN(Buffer buffer,
                             Allocate(vector.rows * vector.cols * DTypeBytes(DType::kF32)));
  HEADSTART_RETURN_IF_ERROR(
      UploadTensor(vector, DType::kF32, buffer.data(), transfer_, stream_.get()));
  return buffer;
}

absl::StatusOr<Buffer> CudaBackend::PrepareTable(const HostTensor& table) {
  HEADSTART_ASSIGN_OR_RETURN(Buffer buffer,
                             Allocate(table.rows * table.cols * DTypeBytes(DType::kBF16)));
  HEADSTART_RETURN_IF_ERROR(
      UploadTensor(table, DType::kBF16, buffer.data(), transfer_, stream_.get()));
  return buffer;
}

absl::StatusOr<std::unique_ptr<RopeTable>> CudaBackend::PrepareRope(
    absl::Span<const float> inv_freq, float scaling, int64_t max_positions) {
  const auto half = static_cast<int64_t>(inv_freq.size());
  const int64_t frequency_bytes = half * int64_t{sizeof(float)};
  HEADSTART_ASSIGN_OR_RETURN(const DeviceMemory frequencies, AllocateDevice(frequency_bytes));
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory table,
                             AllocateDevice(max_positions * half * int64_t{sizeof(float2)}));
  HEADSTART_RETURN_IF_ERROR(Upload(inv_freq.data(), frequency_bytes, frequencies.get()));
  const RopeTableParams params{static_cast<const float*>(frequencies.get()),
                               static_cast<float2*>(table.get()), max_positions, half, scaling};
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchRopeTable(params, stream_.get()), "RoPE table"));
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream_.get()), "RoPE table"));
  return std::make_unique<CudaRopeTable>(std::move(table), half, max_positions);
}

// ---- operations

absl::Status CudaBackend::Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) {
  const auto num_ids = static_cast<int64_t>(ids.size());
  HEADSTART_RETURN_IF_ERROR(CheckActivations("embedding output", out, num_ids, out.cols));
  const int64_t vocab_size = table.bytes() / (out.cols * DTypeBytes(DType::kBF16));
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("token_ids[", i, "]=", ids[i], " is not below vocab_size ", vocab_size));
    }
  }
  if (num_ids == 0) return absl::OkStatus();
  const int64_t bytes = num_ids * int64_t{sizeof(int32_t)};
  HEADSTART_ASSIGN_OR_RETURN(void* const device_ids, ids_.Reserve(bytes));
  const auto fill = [&](void* target, int64_t offset, int64_t count) {
    std::memcpy(target, reinterpret_cast<const char*>(ids.data()) + offset, count);
  };
  HEADSTART_RETURN_IF_ERROR(transfer_.Upload(fill, bytes, device_ids, stream_.get()));
  const EmbeddingParams params{static_cast<const int32_t*>(device_ids),
                               table.data(),
                               out.data,
                               num_ids,
                               out.cols,
                               out.row_stride};
  return ToStatus(LaunchEmbedding(params, stream_.get()), "embedding");
}

absl::Status CudaBackend::RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckActivations("norm input", x, x.rows, x.cols));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("norm output", out, x.rows, x.cols));
  if (x.rows == 0) return absl::OkStatus();
  const RmsNormParams params{x.data,         static_cast<const float*>(weight.data()),
                             out.data,       x.rows,
                             x.cols,         x.row_stride,
                             out.row_stride, eps};
  return ToStatus(LaunchRmsNorm(params, stream_.get()), "RMSNorm");
}

absl::Status CudaBackend::Linear(const LinearWeight& weight, Matrix in, Matrix out,
                                 LinearOutput mode) {
  const auto& cuda_weight = static_cast<const CudaLinearWeight&>(weight);
  const bool f32 = mode == LinearOutput::kStore && out.dtype == DType::kF32;
  HEADSTART_RETURN_IF_ERROR(
      CheckMatrix("linear input", in, DType::kBF16, in.rows, weight.in_features()));
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("linear output", out, f32 ? DType::kF32 : DType::kBF16,
                                        in.rows, weight.out_features()));
  if (in.rows == 0) return absl::OkStatus();
  return gemm_->Multiply(cuda_weight, in, out, mode, stream_.get());
}

absl::Status CudaBackend::RopeAndStoreKv(const RopeArgs& args) {
  const HeadShape& shape = args.kv.shape;
  const auto& rope = *static_cast<const CudaRopeTable*>(args.rope);
  HEADSTART_RETURN_IF_ERROR(CheckHeads(shape));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("qkv", args.qkv, args.qkv.rows, shape.qkv_cols()));
  const int64_t end = args.first_position + args.qkv.rows;
  if (args.first_position < 0 || end > rope.max_positions || rope.half_dim * 2 != shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "RoPE for positions ", args.first_position, " to ", end, ", head_dim ", shape.head_dim,
        "; the table has ", rope.max_positions, ", head_dim ", rope.half_dim * 2));
  }
  if ((args.q_norm == nullptr) != (args.k_norm == nullptr)) {
    return absl::InvalidArgumentError("QK-norm needs both weights, of queries and of keys");
  }
  if (args.qkv.rows == 0) return absl::OkStatus();
  RopeKvWriteParams params{};
  params.qkv = args.qkv.data;
  params.rows = args.qkv.rows;
  params.qkv_stride = args.qkv.row_stride;
  params.first_position = args.first_position;
  params.cos_sin = rope.cos_sin();
  if (args.q_norm != nullptr) {
    params.q_norm = static_cast<const float*>(args.q_norm->data());
    params.k_norm = static_cast<const float*>(args.k_norm->data());
  }
  params.eps = args.norm_eps;
  params.kv = args.kv;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(LaunchRopeKvWrite(params, stream_.get()), "RoPE and KV write"));
  return kv_staging_.Start(args.kv, args.first_position, args.qkv.rows, stream_.get());
}

absl::Status CudaBackend::CheckLayer(int32_t layer) const {
  if (layer >= 0 && layer < static_cast<int32_t>(dense_stats_.size())) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("layer ", layer, " is not below ", dense_stats_.size(), ", see ResetStats"));
}

absl::Status CudaBackend::SelectBlocks(const SelectArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckLayer(args.layer));
  HEADSTART_RETURN_IF_ERROR(CheckHeads(args.kv.shape));
  HEADSTART_RETURN_IF_ERROR(CheckSelectArgs(args, DType::kBF16));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("q", args.q, args.q.rows, args.q.cols));
  HEADSTART_RETURN_IF_ERROR(selection_timer_.Begin(stream_.get()));
  HEADSTART_RETURN_IF_ERROR(
      selector_.Select(args, static_cast<uint32_t*>(tile_counter_.get()), stream_.get()));
  HEADSTART_RETURN_IF_ERROR(selection_timer_.End(stream_.get()));
  HEADSTART_ASSIGN_OR_RETURN(SelectionTotals* const total, SelectedTotals(args.layer));
  return ToStatus(LaunchCountFallback(selector_.totals(), total, stream_.get()), "statistics");
}

absl::Status CudaBackend::Attention(const AttentionArgs& args) {
  const HeadShape& shape = args.kv.shape;
  const int64_t cols = int64_t{shape.num_heads} * shape.head_dim;
  HEADSTART_RETURN_IF_ERROR(CheckLayer(args.layer));
  HEADSTART_RETURN_IF_ERROR(CheckHeads(shape));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("q", args.q, args.q.rows, cols));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("attention output", args.out, args.q.rows, cols));
  if (args.selected && !selector_.Matches(shape, args.first_position, args.q.rows)) {
    return absl::InvalidArgumentError(absl::StrCat("attention of ", args.q.rows, " tokens from ",
                                                   args.first_position,
                                                   " does not match the last selection"));
  }
  if (args.q.rows == 0) return absl::OkStatus();
  AttentionParams params{};
  params.q = args.q.data;
  params.out = args.out.data;
  params.rows = args.q.rows;
  params.q_stride = args.q.row_stride;
  params.out_stride = args.out.row_stride;
  params.kv = args.kv;
  AttentionSequence sequence{0, args.q.rows, args.first_position, args.kv.page_table, {}};
  if (args.selected) sequence.kept = selector_.kept();
  params.sequences = &sequence;
  params.num_sequences = 1;
  params.tile_counter = static_cast<uint32_t*>(tile_counter_.get());
  params.num_sms = num_sms_;
  HEADSTART_RETURN_IF_ERROR(attention_timer_.Begin(stream_.get()));
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchAttention(params, stream_.get()), "attention"));
  HEADSTART_RETURN_IF_ERROR(attention_timer_.End(stream_.get()));
  return CountBlocks(args);
}

absl::StatusOr<SelectionTotals*> CudaBackend::SelectedTotals(int32_t layer) {
  const auto bytes = static_cast<int64_t>(dense_stats_.size() * sizeof(SelectionTotals));
  HEADSTART_ASSIGN_OR_RETURN(void* const totals, selected_totals_.Reserve(bytes));
  if (!totals_cleared_) {
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cudaMemsetAsync(totals, 0, bytes, stream_.get()), "clearing statistics"));
    totals_cleared_ = true;
  }
  return static_cast<SelectionTotals*>(totals) + layer;
}

absl::Status CudaBackend::CountBlocks(const AttentionArgs& args) {
  if (args.selected) {
    HEADSTART_ASSIGN_OR_RETURN(SelectionTotals* const total, SelectedTotals(args.layer));
    return ToStatus(LaunchCountBlocks(selector_.totals(), total, stream_.get()), "statistics");
  }
  const int64_t first = args.first_position / kBlockTokens,
                end = NumBlocks(args.first_position + args.q.rows);
  const int64_t causal = args.kv.shape.num_heads * (end * (end + 1) - first * (first + 1)) / 2;
  dense_stats_[args.layer].executed_blocks += causal;
  dense_stats_[args.layer].causal_blocks += causal;
  return absl::OkStatus();
}

absl::Status CudaBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckActivations("gate_up", gate_up, out.rows, 2 * out.cols));
  HEADSTART_RETURN_IF_ERROR(CheckActivations("SwiGLU output", out, out.rows, out.cols));
  if (out.rows == 0) return absl::OkStatus();
  const SwiGluParams params{gate_up.data, out.data,           out.rows,
                            out.cols,     gate_up.row_stride, out.row_stride};
  return ToStatus(LaunchSwiGlu(params, stream_.get()), "SwiGLU");
}

// ---- results

absl::Status CudaBackend::ReadKv(const KvPages& kv, int64_t token_begin, int64_t token_count,
                                 absl::Span<std::byte> out) {
  const int64_t bytes =
      2 * int64_t{kv.shape.num_kv_heads} * token_count * kv.shape.head_dim * DTypeBytes(kv.dtype);
  const auto given_bytes = static_cast<int64_t>(out.size());
  if (token_begin < 0 || token_begin % kBlockTokens != 0 || token_count < 0 ||
      kv.dtype != DType::kBF16 || given_bytes != bytes) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", token_count, " tokens of ",
                                                   DTypeName(kv.dtype), " KV from token ",
                                                   token_begin, " into ", given_bytes, " bytes"));
  }
  if (token_count == 0) return absl::OkStatus();
  if (!kv_staging_.Holds(kv, token_begin, token_count)) {
    HEADSTART_RETURN_IF_ERROR(kv_staging_.Start(kv, token_begin, token_count, stream_.get()));
  }
  HEADSTART_ASSIGN_OR_RETURN(const bool finite,
                             kv_staging_.Read(kv, token_begin, token_count, out.data()));
  if (finite) return absl::OkStatus();
  return NonFiniteError(absl::StrCat("KV of tokens ", token_begin, " to ",
                                     token_begin + token_count, " is not finite"));
}

void CudaBackend::ResetStats(int32_t num_layers) {
  dense_stats_.assign(num_layers, LayerStats());
  selection_timer_.Reset();
  attention_timer_.Reset();
  totals_cleared_ = false;
}

absl::StatusOr<BackendStats> CudaBackend::ReadStats() {
  BackendStats stats;
  stats.layers = dense_stats_;
  if (totals_cleared_) {
    std::vector<SelectionTotals> totals(dense_stats_.size());
    const auto bytes = static_cast<int64_t>(totals.size() * sizeof(SelectionTotals));
    HEADSTART_ASSIGN_OR_RETURN(const void* const device_totals, selected_totals_.Reserve(bytes));
    HEADSTART_RETURN_IF_ERROR(Download(device_totals, bytes, totals.data()));
    for (size_t i = 0; i < totals.size(); ++i) {
      stats.layers[i].executed_blocks += static_cast<int64_t>(totals[i].executed_blocks);
      stats.layers[i].causal_blocks += static_cast<int64_t>(totals[i].causal_blocks);
      stats.layers[i].dense_fallbacks += static_cast<int64_t>(totals[i].dense_fallback);
    }
  }
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaEventRecord(finished_.get(), stream_.get()), "reading statistics"));
  HEADSTART_RETURN_IF_ERROR(WaitFor(finished_, "reading statistics"));
  HEADSTART_ASSIGN_OR_RETURN(stats.selection_seconds, selection_timer_.Seconds());
  HEADSTART_ASSIGN_OR_RETURN(stats.attention_seconds, attention_timer_.Seconds());
  return stats;
}

}  // namespace headstart::cuda
