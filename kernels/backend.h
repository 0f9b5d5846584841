// The one seam between the model and the machine: memory, weights in the machine's own form, and
// the operations of a Llama or Qwen prefill. CPU and CUDA implement it; every operation is tested
// against kernels/cpu/reference_ops.h.
//
// It remembers nothing of the sequences: every operation gets the ones that it works on, as rows of
// its matrices, and no call means something else because of the call before it.
//
// A backend belongs to one thread at a time (the one that computes); only PendingCopy::Wait and
// freeing host memory are for any. Operations may be asynchronous; Download and TakeTimes
// wait for what they return. Nothing is allocated by an operation once it has run at its largest
// shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention_params.h"
#include "kernels/tensor.h"

namespace headstart {

class Backend;

// Memory of a backend; freed with the object, which must not outlive the backend.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend* backend, void* data, int64_t bytes)
      : backend_(backend), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer();

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// y = x W^T + b in the form that the backend multiplies fastest. Made by Backend::PrepareLinear.
class LinearWeight {
 public:
  LinearWeight(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}
  virtual ~LinearWeight() = default;
  LinearWeight(const LinearWeight&) = delete;
  LinearWeight& operator=(const LinearWeight&) = delete;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

 private:
  int64_t in_features_;
  int64_t out_features_;
};

// Cosines and sines of all positions of a model. Made by Backend::PrepareRope.
class RopeTable {
 public:
  RopeTable(int64_t head_dim, int64_t max_positions)
      : head_dim_(head_dim), max_positions_(max_positions) {}
  virtual ~RopeTable() = default;
  RopeTable(const RopeTable&) = delete;
  RopeTable& operator=(const RopeTable&) = delete;

  int64_t head_dim() const { return head_dim_; }
  int64_t max_positions() const { return max_positions_; }

 private:
  int64_t head_dim_;
  int64_t max_positions_;
};

enum class LinearOutput : uint8_t { kStore, kAdd };  // out = y, or out += y

struct RopeSequence {
  SequenceRows rows;
  // Backend memory, or null: set to 1, never cleared, when a K or V value that was stored is
  // infinite or NaN.
  uint32_t* not_finite = nullptr;
};

struct RopeArgs {
  // [rows, (H + 2 H_kv) d] of compute_dtype: Q, K, V. Q is rotated in place; what becomes of K and
  // V there is the backend's affair.
  Matrix qkv;
  absl::Span<const RopeSequence> sequences;
  const RopeTable* rope = nullptr;
  const Buffer* q_norm = nullptr;  // f32 [d], or null: RMSNorm of every head before RoPE (Qwen3)
  const Buffer* k_norm = nullptr;
  float norm_eps = 0.0f;
  KvPages kv;  // K (normed, rotated) and V are written to the sequences' pages
};

struct AttentionSequence {
  // Its pages hold tokens [0, first_position + num_rows). first_position: any when dense, a
  // multiple of kBlockTokens with proxy_attn.
  SequenceRows rows;
  // Null: dense. Else only the blocks that ProxyAttn keeps are attended to; `dense_layers` is the
  // caller's to obey.
  const ProxyAttnOptions* proxy_attn = nullptr;
  bool ends_prompt = false;  // ProxyAttn's dense tail lies in these rows
  // f32 [H] in backend memory, with proxy_attn: each head's budget ratio so far. Read and raised;
  // zero before a prompt's first piece.
  float* budget_ratio = nullptr;
  BlockCounts* counts = nullptr;  // backend memory, or null: what these rows come to is added
  // Host memory, or null. Tests and tools, with proxy_attn: gets what was kept; the call then
  // waits.
  BlockSelection* selection = nullptr;
};

struct AttentionArgs {
  Matrix q;    // [rows, H d], rotated
  Matrix out;  // [rows, H d] of compute_dtype
  KvPages kv;
  absl::Span<const AttentionSequence> sequences;
};

// A page of the KV cache, and how many of its tokens count.
struct KvPageTokens {
  int32_t page = 0;
  int32_t num_tokens = 0;  // 1 to kBlockTokens; those behind are neither read nor written
};

struct QuantizeKvArgs {
  KvPages kv;                            // of compute_dtype
  absl::Span<const KvPageTokens> pages;  // host memory, valid until the call returns
  // Backend memory: the same pages in fp8 (see Fp8PageBytes), in this order, one behind the other.
  void* out = nullptr;
};

// Time that the device spent.
struct BackendTimes {
  double selection_seconds = 0;
  double attention_seconds = 0;
};

struct HostMemoryDeleter {
  void (*free)(void*) = nullptr;
  void operator()(std::byte* data) const { free(data); }
};
// Host memory that the backend copies to fastest (pinned, where it has a device). May outlive the
// backend.
using HostBuffer = std::unique_ptr<std::byte[], HostMemoryDeleter>;

struct HostCopy {
  const void* from = nullptr;  // backend memory
  void* to = nullptr;          // in memory of AllocateHost
  int64_t bytes = 0;
};

// A copy on its way, see Backend::CopyOut. Must not outlive the backend. Destroying it does not
// stop the copy: copies end in the order in which they began, so all memory of this one is free
// once it or a later one was waited for.
class PendingCopy {
 public:
  PendingCopy() = default;
  virtual ~PendingCopy() = default;
  PendingCopy(const PendingCopy&) = delete;
  PendingCopy& operator=(const PendingCopy&) = delete;

  // Whether Wait would return at once.
  virtual bool Ready() = 0;
  // Returns when all bytes have arrived. From any thread, once.
  virtual absl::Status Wait() = 0;
};

// What limits of backends are about.
struct ModelShape {
  HeadShape heads;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
};

// What a backend takes and what it needs, known before there is one.
class BackendPlan {
 public:
  virtual ~BackendPlan() = default;

  // Type of activations, of Linear's input and of the KV cache: kBF16 or kF32.
  virtual DType compute_dtype() const = 0;
  // Whether the operations take matrices of such a model. INVALID_ARGUMENT: field, value, limit.
  virtual absl::Status CheckModel(const ModelShape& model) const = 0;
  // Longest sequence.
  virtual int64_t max_tokens() const = 0;
  // Most that attention and selection come to keep beside what is allocated here, for sequences of
  // up to `num_tokens` tokens in pieces of up to `piece_tokens`, whatever the options.
  virtual int64_t PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                                   int64_t num_tokens) const = 0;
};

class Backend : public BackendPlan {
 public:
  virtual std::string name() const = 0;    // "cpu", "cuda"
  virtual std::string device() const = 0;  // in words: model, instruction set, threads
  // Type of the residual stream.
  virtual DType residual_dtype() const = 0;

  // ---- memory
  // Allocates all of PlanScratchBytes now, where the backend would otherwise do so with the first
  // request that needs it.
  virtual absl::Status ReserveScratch(const HeadShape& /*heads*/, int64_t /*piece_tokens*/,
                                      int64_t /*num_tokens*/) {
    return absl::OkStatus();
  }
  // Whether what is allocated here is the host's memory.
  virtual bool UsesHostMemory() const { return false; }
  // What can still be allocated of a memory of its own.
  virtual std::optional<int64_t> FreeBytes() const { return std::nullopt; }
  // Whether the first run of a shape takes much longer than later ones (a search for the fastest
  // algorithm): the engine then makes such runs before the first request.
  virtual bool LearnsShapes() const { return false; }
  // RESOURCE_EXHAUSTED with the number of bytes when there is not enough.
  virtual absl::StatusOr<Buffer> Allocate(int64_t bytes) = 0;
  virtual absl::Status Upload(const void* host, int64_t bytes, void* device) = 0;
  virtual absl::Status Download(const void* device, int64_t bytes, void* host) = 0;

  // ---- weights, at load time
  // Row-concatenation of `parts` (q, k, v or gate, up), each [out_i, in]; `biases` empty or one [1,
  // out_i] per part.
  virtual absl::StatusOr<std::unique_ptr<LinearWeight>> PrepareLinear(
      absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) = 0;
  // f32 copy of a vector: norm weights.
  virtual absl::StatusOr<Buffer> PrepareVector(const HostTensor& vector) = 0;
  // Copy in compute_dtype: the embedding [vocab, hidden].
  virtual absl::StatusOr<Buffer> PrepareTable(const HostTensor& table) = 0;
  // cos and sin of position * inv_freq[i], times `scaling`, for positions [0, max_positions). The
  // product is taken in fp32, as Hugging Face does. inv_freq: [head_dim / 2].
  virtual absl::StatusOr<std::unique_ptr<RopeTable>> PrepareRope(absl::Span<const float> inv_freq,
                                                                 float scaling,
                                                                 int64_t max_positions) = 0;

  // ---- operations
  // out[i] = table[ids[i]]. `ids` is host memory, valid until the call returns. out: residual_dtype
  // [ids, hidden].
  virtual absl::Status Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) = 0;
  // out = x / rms(x) * weight. x: residual_dtype, out: compute_dtype, both [n, hidden].
  virtual absl::Status RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) = 0;
  // in: compute_dtype [n, in]. out: [n, out]; compute_dtype or f32 with kStore, residual_dtype with
  // kAdd. A row's result does not depend on the others, unless BackendOptions say so.
  virtual absl::Status Linear(const LinearWeight& weight, Matrix in, Matrix out,
                              LinearOutput mode) = 0;
  // QK-norm, RoPE, and K and V to their pages.
  virtual absl::Status RopeAndStoreKv(const RopeArgs& args) = 0;
  // Causal GQA attention, scale 1 / sqrt(head_dim), to all blocks or to those that ProxyAttn keeps.
  virtual absl::Status Attention(const AttentionArgs& args) = 0;
  // out = silu(gate) * up. gate_up: [n, 2 f] with gate in the first f columns; out: [n, f], not in
  // gate_up.
  virtual absl::Status SwiGlu(Matrix gate_up, Matrix out) = 0;

  // Pages to fp8. Of each plane and head: scale = a / 448, a the greatest magnitude of the tokens
  // that count; number = x / scale, rounded to the nearest E4M3 (ties to even), at most 448 in
  // magnitude. Both are fp32 divisions, rounded to nearest; a scale of 0 divides as infinity. So
  // all backends give the same bits. Of a head with infinities or NaN nothing useful comes.
  virtual absl::Status QuantizeKv(const QuantizeKvArgs& args) = 0;

  // ---- results
  // RESOURCE_EXHAUSTED with the number of bytes when there is not enough.
  virtual absl::StatusOr<HostBuffer> AllocateHost(int64_t bytes) = 0;
  // Copies what the operations so far leave in `from`, on a way of its own: later ones go on
  // meanwhile and must not write there until the copy has arrived.
  virtual absl::StatusOr<std::unique_ptr<PendingCopy>> CopyOut(
      absl::Span<const HostCopy> copies) = 0;
  // What went into attention and into selection since the last TakeTimes. Waits for all operations.
  // Every Attention is noted until then: to be called once a prompt or so.
  virtual absl::StatusOr<BackendTimes> TakeTimes() = 0;

 private:
  friend class Buffer;
  virtual void Free(void* data) = 0;
};

inline Buffer::~Buffer() {
  if (data_ != nullptr) backend_->Free(data_);
}

enum class ComputeDType : uint8_t { kAuto, kBF16, kF32 };

struct BackendOptions {
  std::string device = "cpu";  // "cpu" or "cuda"
  // kAuto: bf16 where the machine multiplies it, else f32.
  ComputeDType dtype = ComputeDType::kAuto;
  int32_t num_threads = 0;  // CPU: 0 = all that this process may use
  // CUDA: take the fastest algorithm for every number of rows. What a row gets then depends in its
  // last bits on how many there are.
  bool fastest_products = false;
};

// A plan of that device; the CPU's is of this machine, a GPU need not be there nor in this build.
// INVALID_ARGUMENT when the device is unknown or does not compute in that type.
absl::StatusOr<std::unique_ptr<BackendPlan>> MakeBackendPlan(const BackendOptions& options);

// INVALID_ARGUMENT when the device is unknown or not in this build (says what it looked for).
// RESOURCE_EXHAUSTED: threads that can't be had.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options);

}  // namespace headstart
