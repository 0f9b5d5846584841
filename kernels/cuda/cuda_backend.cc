#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/weight_upload.h"
#include "kernels/op_args.h"

namespace headstart::cuda {
namespace {

class CudaRopeTable : public RopeTable {
 public:
  CudaRopeTable(DeviceMemory memory, int64_t head_dim, int64_t max_positions)
      : RopeTable(head_dim, max_positions), memory_(std::move(memory)) {}

  const float2* cos_sin() const { return static_cast<const float2*>(memory_.get()); }

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

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(const BackendOptions& options) {
  if (options.dtype == ComputeDType::kF32) {
    return absl::InvalidArgumentError("device cuda computes in bf16; f32 is for the CPU");
  }
  HEADSTART_ASSIGN_OR_RETURN(const cudaDeviceProp properties, FindDevice());
  HEADSTART_ASSIGN_OR_RETURN(Stream stream, MakeStream(/*urgent=*/false));
  HEADSTART_ASSIGN_OR_RETURN(Event finished, MakeEvent(kOrderEvent));
  HEADSTART_ASSIGN_OR_RETURN(CopyStream copies, CopyStream::Create());
  HEADSTART_ASSIGN_OR_RETURN(HostTransfer transfer, HostTransfer::Create());
  HEADSTART_ASSIGN_OR_RETURN(auto gemm, CublasLtGemm::Create(options.fastest_products));
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory tile_counter, AllocateDevice(sizeof(uint32_t)));
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaMemset(tile_counter.get(), 0, sizeof(uint32_t)), "clearing the tile counter"));
  const std::string device =
      absl::StrCat(properties.name, ", ", properties.multiProcessorCount, " multiprocessors, ",
                   properties.totalGlobalMem >> 20, " MiB, bf16");
  return std::unique_ptr<CudaBackend>(
      new CudaBackend(device, properties.multiProcessorCount,
                      {std::move(stream), std::move(finished), std::move(copies),
                       std::move(transfer), std::move(gemm), std::move(tile_counter)}));
}

CudaBackend::CudaBackend(std::string device, int num_sms, Resources resources)
    : device_(std::move(device)),
      num_sms_(num_sms),
      stream_(std::move(resources.stream)),
      finished_(std::move(resources.finished)),
      copies_(std::move(resources.copies)),
      transfer_(std::move(resources.transfer)),
      gemm_(std::move(resources.gemm)),
      tile_counter_(std::move(resources.tile_counter)),
      selector_(num_sms) {}

// ---- memory

absl::StatusOr<Buffer> CudaBackend::Allocate(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(bytes));
  return Buffer(this, memory.release(), bytes);
}

absl::Status CudaBackend::ReserveScratch(const HeadShape& heads, int64_t piece_tokens,
                                         int64_t num_tokens) {
  HEADSTART_RETURN_IF_ERROR(CheckHeads(kLimits, heads));
  HEADSTART_RETURN_IF_ERROR(selector_.Reserve(PlanSelection(heads, piece_tokens, num_tokens)));
  return ids_.Reserve(piece_tokens * int64_t{sizeof(int32_t)}).status();
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
  return std::make_unique<CudaRopeTable>(std::move(table), 2 * half, max_positions);
}

// ---- operations

absl::Status CudaBackend::Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckEmbed(kLimits, ids, table, out));
  const auto num_ids = static_cast<int64_t>(ids.size());
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
  HEADSTART_RETURN_IF_ERROR(CheckRmsNorm(kLimits, x, out));
  if (x.rows == 0) return absl::OkStatus();
  const RmsNormParams params{x.data,         static_cast<const float*>(weight.data()),
                             out.data,       x.rows,
                             x.cols,         x.row_stride,
                             out.row_stride, eps};
  return ToStatus(LaunchRmsNorm(params, stream_.get()), "RMSNorm");
}

absl::Status CudaBackend::Linear(const LinearWeight& weight, Matrix in, Matrix out,
                                 LinearOutput mode) {
  HEADSTART_RETURN_IF_ERROR(CheckLinear(kLimits, weight, in, out, mode));
  if (in.rows == 0) return absl::OkStatus();
  return gemm_->Multiply(static_cast<const CudaLinearWeight&>(weight), in, out, mode,
                         stream_.get());
}

absl::Status CudaBackend::RopeAndStoreKv(const RopeArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckRope(kLimits, args));
  RopeKvWriteParams params{};
  params.qkv = args.qkv.data;
  params.qkv_stride = args.qkv.row_stride;
  params.cos_sin = static_cast<const CudaRopeTable*>(args.rope)->cos_sin();
  if (args.q_norm != nullptr) {
    params.q_norm = static_cast<const float*>(args.q_norm->data());
    params.k_norm = static_cast<const float*>(args.k_norm->data());
  }
  params.eps = args.norm_eps;
  params.kv = args.kv;
  for (absl::Span<const RopeSequence> left = args.sequences; !left.empty();
       left.remove_prefix(params.num_sequences)) {
    params.num_sequences = static_cast<int>(std::min<size_t>(left.size(), kMaxSequences));
    for (int i = 0; i < params.num_sequences; ++i) {
      params.sequences[i] = {left[i].rows, left[i].not_finite};
    }
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(LaunchRopeKvWrite(params, stream_.get()), "RoPE and KV write"));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::Attention(const AttentionArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckAttention(kLimits, args));
  std::vector<AttendedSequence> dense;  // together
  for (const AttentionSequence& sequence : args.sequences) {
    const ProxyAttnOptions* options = sequence.proxy_attn;
    const SequenceRows& rows = sequence.rows;
    const bool by_rule = options != nullptr && sequence.selection == nullptr &&
                         IsDenseByRule(*options, rows.first_position + rows.num_rows);
    if (options == nullptr || by_rule) {
      dense.push_back({rows, {}, sequence.counts});
      continue;
    }
    HEADSTART_RETURN_IF_ERROR(Select(args, sequence));
    const AttendedSequence selected{rows, selector_.kept(), nullptr};
    HEADSTART_RETURN_IF_ERROR(Attend(args, {&selected, 1}));
  }
  for (size_t first = 0; first < dense.size(); first += kMaxSequences) {
    HEADSTART_RETURN_IF_ERROR(
        Attend(args, absl::MakeConstSpan(dense).subspan(first, kMaxSequences)));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::Select(const AttentionArgs& args, const AttentionSequence& sequence) {
  const SequenceAttention of_sequence(args, sequence);
  HEADSTART_RETURN_IF_ERROR(selection_timer_.Begin(stream_.get()));
  HEADSTART_RETURN_IF_ERROR(selector_.Select(
      of_sequence, sequence.counts, static_cast<uint32_t*>(tile_counter_.get()), stream_.get()));
  HEADSTART_RETURN_IF_ERROR(selection_timer_.End(stream_.get()));
  if (sequence.selection == nullptr) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(*sequence.selection, selector_.Read(of_sequence, stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Attend(const AttentionArgs& args,
                                 absl::Span<const AttendedSequence> sequences) {
  AttentionParams params{};
  params.q = args.q.data;
  params.out = args.out.data;
  params.rows = args.q.rows;
  params.q_stride = args.q.row_stride;
  params.out_stride = args.out.row_stride;
  params.kv = args.kv;
  params.sequences = sequences.data();
  params.num_sequences = static_cast<int>(sequences.size());
  params.tile_counter = static_cast<uint32_t*>(tile_counter_.get());
  params.num_sms = num_sms_;
  HEADSTART_RETURN_IF_ERROR(attention_timer_.Begin(stream_.get()));
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchAttention(params, stream_.get()), "attention"));
  return attention_timer_.End(stream_.get());
}

absl::Status CudaBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckSwiGlu(kLimits, gate_up, out));
  if (out.rows == 0) return absl::OkStatus();
  const SwiGluParams params{gate_up.data, out.data,           out.rows,
                            out.cols,     gate_up.row_stride, out.row_stride};
  return ToStatus(LaunchSwiGlu(params, stream_.get()), "SwiGLU");
}

absl::Status CudaBackend::QuantizeKv(const QuantizeKvArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckQuantizeKv(kLimits, args));
  QuantizeKvParams params{};
  params.kv = args.kv;
  params.out = args.out;
  for (absl::Span<const KvPageTokens> left = args.pages; !left.empty();
       left.remove_prefix(params.num_pages)) {
    params.num_pages = static_cast<int>(std::min<size_t>(left.size(), kMaxQuantizedPages));
    for (int i = 0; i < params.num_pages; ++i) params.pages[i] = {left[i].page, left[i].num_tokens};
    HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchQuantizeKv(params, stream_.get()), "KV to fp8"));
    params.out = static_cast<char*>(params.out) + params.num_pages * Fp8PageBytes(args.kv.shape);
  }
  return absl::OkStatus();
}

// ---- results

absl::StatusOr<HostBuffer> CudaBackend::AllocateHost(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(PinnedMemory memory, AllocatePinned(bytes));
  const auto free_memory = [](void* data) { PinnedMemory{data}.reset(); };
  return HostBuffer(static_cast<std::byte*>(memory.release()), {free_memory});
}

absl::StatusOr<std::unique_ptr<PendingCopy>> CudaBackend::CopyOut(
    absl::Span<const HostCopy> copies) {
  return copies_.Start(copies, stream_.get());
}

absl::StatusOr<BackendTimes> CudaBackend::TakeTimes() {
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaEventRecord(finished_.get(), stream_.get()), "taking times"));
  HEADSTART_RETURN_IF_ERROR(WaitFor(finished_, "taking times"));
  BackendTimes times;
  HEADSTART_ASSIGN_OR_RETURN(times.selection_seconds, selection_timer_.TakeSeconds());
  HEADSTART_ASSIGN_OR_RETURN(times.attention_seconds, attention_timer_.TakeSeconds());
  return times;
}

}  // namespace headstart::cuda
