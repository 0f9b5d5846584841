#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
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
  CpuRopeTable(HostMemory memory, int64_t half_dim, int64_t max_positions)
      : memory_(std::move(memory)), half_dim(half_dim), max_positions(max_positions) {}

  // [half_dim] each.
  float* Cos(int64_t position) const { return Data() + position * 2 * half_dim; }
  float* Sin(int64_t position) const { return Cos(position) + half_dim; }

 private:
  float* Data() const { return reinterpret_cast<float*>(memory_.get()); }
  const HostMemory memory_;

 public:
  const int64_t half_dim;
  const int64_t max_positions;
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

absl::Status CheckMatrix(absl::string_view name, const Matrix& m, DType dtype, int64_t rows,
                         int64_t cols) {
  if (m.dtype == dtype && m.rows == rows && m.cols == cols && m.row_stride >= cols) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", DTypeName(m.dtype), " [", m.rows, ", ", m.cols, "] with stride ",
                   m.row_stride, ", expected ", DTypeName(dtype), " [", rows, ", ", cols, "]"));
}

absl::Status CheckHeads(const HeadShape& shape) {
  if (shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 &&
      shape.head_dim > 0 && shape.head_dim % 16 == 0 && shape.head_dim <= simd::kMaxHeadDim) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      shape.num_heads, " query heads, ", shape.num_kv_heads, " KV heads, head_dim ", shape.head_dim,
      ": KV heads must divide query heads, head_dim must be a multiple of 16 up to ",
      simd::kMaxHeadDim));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(const BackendOptions& options) {
  HEADSTART_ASSIGN_OR_RETURN(const CpuIsa isa, ChooseCpuIsa());
  if (options.num_threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads=", options.num_threads, " is negative; 0 means all CPUs"));
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
  HEADSTART_ASSIGN_OR_RETURN(auto gemm, OneDnnGemm::Create(isa, dtype, num_threads));
  return std::unique_ptr<CpuBackend>(new CpuBackend(isa, dtype, num_threads, std::move(gemm)));
}

CpuBackend::CpuBackend(CpuIsa isa, DType dtype, int32_t num_threads,
                       std::unique_ptr<OneDnnGemm> gemm)
    : dtype_(dtype),
      num_threads_(num_threads),
      device_(DescribeDevice(isa, dtype, num_threads)),
      kernels_(*simd::GetKernelTable(isa, dtype)),
      gemm_(std::move(gemm)),
      selector_(kernels_, dtype, num_threads),
      attention_(kernels_.attention, num_threads) {}

// ---- memory

int64_t CpuBackend::PlanScratchBytes(const HeadShape& heads, int64_t chunk_tokens,
                                     int64_t num_tokens) const {
  return attention_.PlanScratchBytes(heads, num_tokens) +
         selector_.PlanScratchBytes(heads, chunk_tokens, num_tokens);
}

absl::StatusOr<Buffer> CpuBackend::Allocate(int64_t bytes) {
  HEADSTART_ASSIGN_OR_RETURN(HostMemory memory, AllocateHost(bytes));
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
  HEADSTART_ASSIGN_OR_RETURN(HostMemory memory,
                             AllocateHost(max_positions * 2 * half_dim * int64_t{sizeof(float)}));
  auto table = std::make_unique<CpuRopeTable>(std::move(memory), half_dim, max_positions);
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
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("embedding output", out, DType::kF32,
                                        static_cast<int64_t>(ids.size()), out.cols));
  const int64_t row_bytes = out.cols * DTypeBytes(dtype_);
  const int64_t vocab_size = table.bytes() / row_bytes;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("token_ids[", i, "]=", ids[i], " is not below vocab_size ", vocab_size));
    }
  }
  const char* rows = static_cast<const char*>(table.data());
  ParallelForRanges(num_threads_, out.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.element.to_float(rows + ids[r] * row_bytes, out.cols, out.Row<float>(r));
    }
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("norm input", x, DType::kF32, x.rows, x.cols));
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("norm output", out, dtype_, x.rows, x.cols));
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
  const DType out_dtype =
      mode == LinearOutput::kAdd || out.dtype == DType::kF32 ? DType::kF32 : dtype_;
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("linear input", in, dtype_, in.rows, weight.in_features()));
  HEADSTART_RETURN_IF_ERROR(
      CheckMatrix("linear output", out, out_dtype, in.rows, weight.out_features()));
  return gemm_->Multiply(weight, in, out, mode);
}

absl::Status CpuBackend::RopeAndStoreKv(const RopeArgs& args) {
  const HeadShape& shape = args.kv.shape;
  const auto& rope = *static_cast<const CpuRopeTable*>(args.rope);
  HEADSTART_RETURN_IF_ERROR(CheckHeads(shape));
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("qkv", args.qkv, dtype_, args.qkv.rows, shape.qkv_cols()));
  const int64_t end = args.first_position + args.qkv.rows;
  if (args.first_position < 0 || end > rope.max_positions || rope.half_dim * 2 != shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "RoPE for positions ", args.first_position, " to ", end, ", head_dim ", shape.head_dim,
        "; the table has ", rope.max_positions, ", head_dim ", rope.half_dim * 2));
  }
  const auto* q_norm = args.q_norm ? static_cast<const float*>(args.q_norm->data()) : nullptr;
  const auto* k_norm = args.k_norm ? static_cast<const float*>(args.k_norm->data()) : nullptr;
  const int64_t head_bytes = shape.head_dim * DTypeBytes(dtype_);
  ParallelForRanges(num_threads_, args.qkv.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t position = args.first_position + r;
      const float* cos = rope.Cos(position);
      const float* sin = rope.Sin(position);
      char* head = static_cast<char*>(args.qkv.Rows(r, 1).data);
      for (int32_t h = 0; h < shape.num_heads; ++h, head += head_bytes) {
        kernels_.element.rope_head(head, cos, sin, q_norm, args.norm_eps, shape.head_dim, head);
      }
      const int64_t page = args.kv.page_table[position / kBlockTokens];
      char* k = static_cast<char*>(args.kv.pages) +
                (page * args.kv.page_elements() + position % kBlockTokens * shape.head_dim) *
                    DTypeBytes(dtype_);
      for (int32_t h = 0; h < shape.num_kv_heads; ++h, head += head_bytes) {
        kernels_.element.rope_head(head, cos, sin, k_norm, args.norm_eps, shape.head_dim,
                                   k + h * kBlockTokens * head_bytes);
      }
      char* v = k + args.kv.plane_elements() * DTypeBytes(dtype_);
      for (int32_t h = 0; h < shape.num_kv_heads; ++h, head += head_bytes) {
        std::memcpy(v + h * kBlockTokens * head_bytes, head, head_bytes);
      }
    }
  });
  return absl::OkStatus();
}

absl::StatusOr<LayerStats*> CpuBackend::StatsOf(int32_t layer) {
  if (layer < 0 || layer >= static_cast<int32_t>(stats_.layers.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, " is not below ", stats_.layers.size(), ", see ResetStats"));
  }
  return &stats_.layers[layer];
}

absl::Status CpuBackend::SelectBlocks(const SelectArgs& args) {
  const Stopwatch stopwatch(stats_.selection_seconds);
  HEADSTART_ASSIGN_OR_RETURN(LayerStats* const stats, StatsOf(args.layer));
  HEADSTART_RETURN_IF_ERROR(CheckHeads(args.kv.shape));
  HEADSTART_RETURN_IF_ERROR(selector_.Select(args, selection_));
  if (selection_.dense_fallback) ++stats->dense_fallbacks;
  return absl::OkStatus();
}

absl::Status CpuBackend::Attention(const AttentionArgs& args) {
  const Stopwatch stopwatch(stats_.attention_seconds);
  HEADSTART_ASSIGN_OR_RETURN(LayerStats* const stats, StatsOf(args.layer));
  const HeadShape& shape = args.kv.shape;
  HEADSTART_RETURN_IF_ERROR(CheckHeads(shape));
  const int64_t cols = int64_t{shape.num_heads} * shape.head_dim;
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("q", args.q, dtype_, args.q.rows, cols));
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("attention output", args.out, dtype_, args.q.rows, cols));
  if (!args.selected) return attention_.Run(args, nullptr, *stats);
  const int64_t first_row = args.first_position / kBlockTokens;
  if (args.first_position % kBlockTokens != 0 || selection_.first_row != first_row ||
      selection_.num_rows != NumBlocks(args.q.rows) || selection_.num_heads != shape.num_heads) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention of ", args.q.rows, " tokens from ", args.first_position,
                     " does not match the last selection: ", selection_.num_rows, " rows from ",
                     selection_.first_row, ", ", selection_.num_heads, " heads"));
  }
  return attention_.Run(args, &selection_, *stats);
}

absl::Status CpuBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("gate_up", gate_up, dtype_, out.rows, 2 * out.cols));
  HEADSTART_RETURN_IF_ERROR(CheckMatrix("SwiGLU output", out, dtype_, out.rows, out.cols));
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

// ---- results

absl::Status CpuBackend::ReadKv(const KvPages& kv, int64_t token_begin, int64_t token_count,
                                absl::Span<std::byte> out) {
  const int64_t element_bytes = DTypeBytes(kv.dtype);
  const int64_t plane = int64_t{kv.shape.num_kv_heads} * token_count * kv.shape.head_dim;
  const auto bytes = static_cast<int64_t>(out.size());
  if (token_begin < 0 || token_begin % kBlockTokens != 0 || token_count < 0 || kv.dtype != dtype_ ||
      bytes != 2 * plane * element_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", token_count, " tokens of ",
                                                   DTypeName(kv.dtype), " KV from token ",
                                                   token_begin, " into ", bytes, " bytes"));
  }
  const char* pages = static_cast<const char*>(kv.pages);
  char* const target = reinterpret_cast<char*>(out.data());
  const int64_t blocks = NumBlocks(token_count);
  std::atomic<bool> finite{true};
  // One index is one page of one head of K or V.
  ParallelFor(num_threads_, int64_t{2} * kv.shape.num_kv_heads * blocks, [&](int64_t i, int32_t) {
    const int64_t head =
        i / blocks;  // K heads, then V heads: planes follow each other on both sides
    const int64_t token = i % blocks * kBlockTokens;
    const int64_t count = std::min(kBlockTokens, token_count - token) * kv.shape.head_dim;
    const int64_t page = kv.page_table[(token_begin + token) / kBlockTokens];
    const int64_t from = page * kv.page_elements() + head * kBlockTokens * kv.shape.head_dim;
    const int64_t to = (head * token_count + token) * kv.shape.head_dim;
    if (!kernels_.element.copy_finite(pages + from * element_bytes, count,
                                      target + to * element_bytes)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  if (finite.load()) return absl::OkStatus();
  return NonFiniteError(absl::StrCat("KV of tokens ", token_begin, " to ",
                                     token_begin + token_count, " is not finite"));
}

void CpuBackend::ResetStats(int32_t num_layers) {
  stats_ = BackendStats();
  stats_.layers.resize(num_layers);
}

}  // namespace headstart
