#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/machine.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/parallel.h"

namespace headstart {
namespace {

// Rows that one thread takes at a time from an elementwise operation.
constexpr int64_t kGrainRows = 16;

class CpuRopeTable : public RopeTable {
 public:
  CpuRopeTable(HostMemory memory, int64_t head_dim, int64_t max_positions)
      : RopeTable(head_dim, max_positions), memory_(std::move(memory)) {}

  // [head_dim / 2] each.
  float* Cos(int64_t position) const {
    return reinterpret_cast<float*>(memory_.get()) + position * head_dim();
  }
  float* Sin(int64_t position) const { return Cos(position) + head_dim() / 2; }

 private:
  const HostMemory memory_;
};

// Copies are done when CopyOut returns.
class DoneCopy : public PendingCopy {
 public:
  bool Ready() override { return true; }
  absl::Status Wait() override { return absl::OkStatus(); }
};

// Adds the time from its construction to its destruction to `seconds`.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  double& seconds_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string DescribeDevice(CpuIsa isa, DType dtype, int32_t num_threads) {
  return absl::StrCat(CpuModelName(), ", ", CpuIsaName(isa), ", ", DTypeName(dtype), ", ",
                      num_threads, num_threads == 1 ? " thread" : " threads");
}

OpLimits LimitsOf(DType dtype) {
  OpLimits limits;
  limits.compute_dtype = dtype;
  limits.residual_dtype = DType::kF32;
  limits.head_dim_step = 16;
  limits.max_head_dim = simd::kMaxHeadDim;
  return limits;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(const BackendOptions& options) {
  HEADSTART_ASSIGN_OR_RETURN(const CpuIsa isa, ChooseCpuIsa());
  constexpr int32_t kMaxThreads = 1024;  // OpenMP ends the process when it can't have its threads
  if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("num_threads=", options.num_threads,
                                                   " is not in [0, ", kMaxThreads,
                                                   "]; 0 means all CPUs"));
  }
  const bool has_bf16 = isa == CpuIsa::kAvx512Bf16;
  if (options.dtype == ComputeDType::kBF16 && !has_bf16) {
    return absl::InvalidArgumentError(absl::StrCat("bf16 needs a CPU with AVX512-BF16; this one (",
                                                   CpuModelName(), ") runs ", CpuIsaName(isa),
                                                   ": use f32"));
  }
  const bool bf16 = has_bf16 && options.dtype != ComputeDType::kF32;
  const DType dtype = bf16 ? DType::kBF16 : DType::kF32;
  const int32_t num_threads = options.num_threads > 0 ? options.num_threads : UsableCpus();
  HEADSTART_RETURN_IF_ERROR(CheckThreads(num_threads));
  HEADSTART_ASSIGN_OR_RETURN(auto gemm, OneDnnGemm::Create(isa, dtype, num_threads));
  return std::unique_ptr<CpuBackend>(new CpuBackend(isa, dtype, num_threads, std::move(gemm)));
}

CpuBackend::CpuBackend(CpuIsa isa, DType dtype, int32_t num_threads,
                       std::unique_ptr<OneDnnGemm> gemm)
    : dtype_(dtype),
      limits_(LimitsOf(dtype)),
      num_threads_(num_threads),
      device_(DescribeDevice(isa, dtype, num_threads)),
      kernels_(*simd::GetKernelTable(isa, dtype)),
      gemm_(std::move(gemm)),
      selector_(kernels_, dtype, num_threads),
      attention_(kernels_.attention, num_threads) {}

// ---- memory

int64_t CpuBackend::PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                                     int64_t num_tokens) const {
  return attention_.PlanScratchBytes(heads, num_tokens) +
         selector_.PlanScratchBytes(heads, piece_tokens, num_tokens);
}

absl::StatusOr<Buffer> CpuBackend::Allocate(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(HostMemory memory, AllocateHostMemory(bytes));
  return Buffer(this, memory.release(), bytes);
}

void CpuBackend::Free(void* data) { FreeHostMemory()(data); }

absl::Status CpuBackend::Upload(const void* host, int64_t bytes, void* device) {
  std::memcpy(device, host, bytes);
  return absl::OkStatus();
}

absl::Status CpuBackend::Download(const void* device, int64_t bytes, void* host) {
  std::memcpy(host, device, bytes);
  return absl::OkStatus();
}

// ---- weights

absl::StatusOr<std::unique_ptr<LinearWeight>> CpuBackend::PrepareLinear(
    absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  return gemm_->Prepare(parts, biases);
}

absl::StatusOr<Buffer> CpuBackend::ConvertToBuffer(const HostTensor& tensor, DType dtype) {
  const int64_t count = tensor.rows * tensor.cols;
  HEADSTART_ASSIGN_OR_RETURN(Buffer buffer, Allocate(count * DTypeBytes(dtype)));
  ConvertElements(tensor.data, tensor.dtype, count, buffer.data(), dtype, num_threads_);
  return buffer;
}

absl::StatusOr<Buffer> CpuBackend::PrepareVector(const HostTensor& vector) {
  return ConvertToBuffer(vector, DType::kF32);
}

absl::StatusOr<Buffer> CpuBackend::PrepareTable(const HostTensor& table) {
  return ConvertToBuffer(table, dtype_);
}

absl::StatusOr<std::unique_ptr<RopeTable>> CpuBackend::PrepareRope(absl::Span<const float> inv_freq,
                                                                   float scaling,
                                                                   int64_t max_positions) {
  const auto half_dim = static_cast<int64_t>(inv_freq.size());
  HEADSTART_ASSIGN_OR_RETURN(
      HostMemory memory, AllocateHostMemory(max_positions * 2 * half_dim * int64_t{sizeof(float)}));
  auto table = std::make_unique<CpuRopeTable>(std::move(memory), 2 * half_dim, max_positions);
  ParallelForRanges(num_threads_, max_positions, 256, [&](int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; ++position) {
      for (int64_t i = 0; i < half_dim; ++i) {
        const double angle = static_cast<float>(position) * inv_freq[i];
        table->Cos(position)[i] = static_cast<float>(std::cos(angle) * scaling);
        table->Sin(position)[i] = static_cast<float>(std::sin(angle) * scaling);
      }
    }
  });
  return table;
}

// ---- operations

absl::Status CpuBackend::Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckEmbed(limits_, ids, table, out));
  const int64_t row_bytes = out.cols * DTypeBytes(dtype_);
  const char* rows = static_cast<const char*>(table.data());
  ParallelForRanges(num_threads_, out.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.element.to_float(rows + ids[r] * row_bytes, out.cols, out.Row<float>(r));
    }
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckRmsNorm(limits_, x, out));
  const auto* w = static_cast<const float*>(weight.data());
  ParallelForRanges(num_threads_, x.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.element.rms_norm(x.Row<float>(r), w, eps, x.cols, out.Rows(r, 1).data);
    }
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Linear(const LinearWeight& weight, Matrix in, Matrix out,
                                LinearOutput mode) {
  HEADSTART_RETURN_IF_ERROR(CheckLinear(limits_, weight, in, out, mode));
  return gemm_->Multiply(weight, in, out, mode);
}

absl::Status CpuBackend::RopeAndStoreKv(const RopeArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckRope(limits_, args));
  for (const RopeSequence& sequence : args.sequences) {
    std::atomic<bool> finite{true};
    const auto store = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!StoreRow(args, sequence.rows, r)) finite.store(false, std::memory_order_relaxed);
      }
    };
    ParallelForRanges(num_threads_, sequence.rows.num_rows, kGrainRows, store);
    if (!finite.load() && sequence.not_finite != nullptr) *sequence.not_finite = 1;
  }
  return absl::OkStatus();
}

bool CpuBackend::StoreRow(const RopeArgs& args, const SequenceRows& rows, int64_t index) const {
  const HeadShape& shape = args.kv.shape;
  const auto& rope = *static_cast<const CpuRopeTable*>(args.rope);
  const auto* q_norm = args.q_norm ? static_cast<const float*>(args.q_norm->data()) : nullptr;
  const auto* k_norm = args.k_norm ? static_cast<const float*>(args.k_norm->data()) : nullptr;
  const int64_t head_bytes = shape.head_dim * DTypeBytes(dtype_);
  const int64_t position = rows.first_position + index;
  const float* cos = rope.Cos(position);
  const float* sin = rope.Sin(position);
  char* head = static_cast<char*>(args.qkv.Rows(rows.first_row + index, 1).data);
  const auto rotate = [&](const float* norm) {
    kernels_.element.rope_head(head, cos, sin, norm, args.norm_eps, shape.head_dim, head);
  };
  for (int32_t h = 0; h < shape.num_heads; ++h, head += head_bytes) rotate(q_norm);
  // The planes of a page follow each other: V head i is plane H_kv + i, in the row as in the page.
  const char* const kv = head;
  const int64_t page = rows.page_table[position / kBlockTokens];
  char* slot = static_cast<char*>(args.kv.pages) +
               page * args.kv.page_elements() * DTypeBytes(dtype_) +
               position % kBlockTokens * head_bytes;
  for (int32_t plane = 0; plane < 2 * shape.num_kv_heads; ++plane) {
    if (plane < shape.num_kv_heads) rotate(k_norm);
    std::memcpy(slot, head, head_bytes);
    head += head_bytes;
    slot += kBlockTokens * head_bytes;
  }
  return kernels_.element.all_finite(kv, int64_t{2} * shape.num_kv_heads * shape.head_dim);
}

absl::Status CpuBackend::Attention(const AttentionArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckAttention(limits_, args));
  for (const AttentionSequence& sequence : args.sequences) {
    const SequenceAttention of_sequence(args, sequence);
    HEADSTART_ASSIGN_OR_RETURN(const BlockSelection* const selection, Select(of_sequence));
    if (sequence.selection != nullptr) *sequence.selection = *selection;
    Count(args.kv.shape, sequence, selection);
    const Stopwatch stopwatch(times_.attention_seconds);
    HEADSTART_RETURN_IF_ERROR(attention_.Run(of_sequence, selection));
  }
  return absl::OkStatus();
}

absl::StatusOr<const BlockSelection*> CpuBackend::Select(const SequenceAttention& args) {
  if (args.proxy_attn == nullptr) return nullptr;
  const Stopwatch stopwatch(times_.selection_seconds);
  HEADSTART_RETURN_IF_ERROR(selector_.Select(args, selection_));
  return &selection_;
}

void CpuBackend::Count(const HeadShape& shape, const AttentionSequence& sequence,
                       const BlockSelection* selection) {
  if (sequence.counts == nullptr) return;
  const int64_t causal = CausalBlocks(shape, sequence.rows);
  int64_t kept = causal;
  if (selection != nullptr) {
    kept = std::accumulate(selection->counts.begin(), selection->counts.end(), int64_t{0});
    if (selection->dense_fallback) ++sequence.counts->dense_fallbacks;
  }
  sequence.counts->executed_blocks += static_cast<uint64_t>(kept);
  sequence.counts->causal_blocks += static_cast<uint64_t>(causal);
}

absl::Status CpuBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckSwiGlu(limits_, gate_up, out));
  const Matrix gate = gate_up.Cols(0, out.cols);
  const Matrix up = gate_up.Cols(out.cols, out.cols);
  ParallelForRanges(num_threads_, out.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.element.swiglu(gate.Rows(r, 1).data, up.Rows(r, 1).data, out.cols,
                              out.Rows(r, 1).data);
    }
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::QuantizeKv(const QuantizeKvArgs& args) {
  HEADSTART_RETURN_IF_ERROR(CheckQuantizeKv(limits_, args));
  const HeadShape& shape = args.kv.shape;
  const int64_t planes = int64_t{2} * shape.num_kv_heads;  // K's heads, then V's
  const int64_t head_elements = kBlockTokens * shape.head_dim;
  const auto* pages = static_cast<const char*>(args.kv.pages);
  auto* out = static_cast<std::byte*>(args.out);
  ParallelFor(
      num_threads_, static_cast<int64_t>(args.pages.size()) * planes, [&](int64_t index, int32_t) {
        const KvPageTokens& page = args.pages[static_cast<size_t>(index / planes)];
        const int64_t plane = index % planes;
        const char* head = pages + (page.page * args.kv.page_elements() + plane * head_elements) *
                                       DTypeBytes(dtype_);
        std::byte* const fp8 = out + index / planes * Fp8PageBytes(shape);
        std::byte* const numbers = fp8 + Fp8ScaleBytes(shape) + plane * head_elements;
        reinterpret_cast<float*>(fp8)[plane] = kernels_.element.quantize(
            head, page.num_tokens * int64_t{shape.head_dim}, reinterpret_cast<uint8_t*>(numbers));
      });
  return absl::OkStatus();
}

// ---- results

absl::StatusOr<HostBuffer> CpuBackend::AllocateHost(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(HostMemory memory, AllocateHostMemory(bytes));
  const auto free_memory = [](void* data) { FreeHostMemory()(data); };
  return HostBuffer(reinterpret_cast<std::byte*>(memory.release()), {free_memory});
}

absl::StatusOr<std::unique_ptr<PendingCopy>> CpuBackend::CopyOut(
    absl::Span<const HostCopy> copies) {
  ParallelFor(num_threads_, static_cast<int64_t>(copies.size()), [&](int64_t i, int32_t) {
    std::memcpy(copies[i].to, copies[i].from, static_cast<size_t>(copies[i].bytes));
  });
  return std::make_unique<DoneCopy>();
}

}  // namespace headstart
