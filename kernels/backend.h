// The one seam between the model and the machine: memory, weights in the machine's own form, and
// the operations of a Llama or Qwen prefill. CPU and CUDA implement it; every operation is tested
// against kernels/cpu/reference_ops.h.
//
// A backend belongs to one thread at a time (the prefill worker). Operations may be asynchronous;
// ReadKv, Download and ReadStats wait for what they return. Nothing is allocated by an operation
// once it has run at its largest shape.
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
  virtual ~RopeTable() = default;
};

enum class LinearOutput : uint8_t { kStore, kAdd };  // out = y, or out += y

struct RopeArgs {
  Matrix qkv;  // [num_tokens, (H + 2 H_kv) d] of compute_dtype: Q, K, V; Q is rotated in place
  int64_t first_position = 0;
  const RopeTable* rope = nullptr;
  const Buffer* q_norm = nullptr;  // f32 [d], or null: RMSNorm of every head before RoPE (Qwen3)
  const Buffer* k_norm = nullptr;
  float norm_eps = 0.0f;
  KvPages kv;  // K (normed, rotated) and V are written to tokens first_position …
};

struct SelectArgs {
  Matrix q;                    // [num_tokens, H d], rotated
  int64_t first_position = 0;  // multiple of kBlockTokens
  KvPages kv;                  // holds tokens [0, first_position + q.rows)
  int32_t layer = 0;
  bool ends_prompt = false;  // the dense tail applies to this chunk
  const ProxyAttnOptions* options = nullptr;
  // f32 [H] in backend memory: each head's budget ratio so far. Read and raised; zero before the
  // first chunk.
  float* budget_ratio = nullptr;
};

struct AttentionArgs {
  Matrix q;                    // [num_tokens, H d], rotated
  int64_t first_position = 0;  // any position when dense; multiple of kBlockTokens with a selection
  KvPages kv;                  // holds tokens [0, first_position + q.rows)
  int32_t layer = 0;
  bool selected = false;  // attend to the blocks that the last SelectBlocks kept; else to all
  Matrix out;             // [num_tokens, H d] of compute_dtype
};

// Blocks of one layer, summed over heads and query blocks since ResetStats.
struct LayerStats {
  int64_t executed_blocks = 0;
  int64_t causal_blocks = 0;
  int64_t dense_fallbacks = 0;  // chunks
};

struct BackendStats {
  std::vector<LayerStats> layers;
  double selection_seconds = 0;
  double attention_seconds = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;    // "cpu", "cuda"
  virtual std::string device() const = 0;  // in words: model, instruction set, threads
  // Type of activations, of Linear's input and of the KV cache: kBF16 or kF32.
  virtual DType compute_dtype() const = 0;
  // Type of the residual stream.
  virtual DType residual_dtype() const = 0;

  // ---- memory
  // Most that attention and selection come to keep beside what is allocated here, for sequences of
  // up to `num_tokens` tokens in chunks of up to `chunk_tokens`, whatever the options. 0: the
  // backend makes no plan of it.
  virtual int64_t PlanScratchBytes(const HeadShape& /*heads*/, int64_t /*chunk_tokens*/,
                                   int64_t /*num_tokens*/) const {
    return 0;
  }
  // Allocates all of it now, where the backend would otherwise do so with the first request that
  // needs it.
  virtual absl::Status ReserveScratch(const HeadShape& /*heads*/, int64_t /*chunk_tokens*/,
                                      int64_t /*num_tokens*/) {
    return absl::OkStatus();
  }
  // What can still be allocated; nothing where the machine gives no firm answer.
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
  // kAdd.
  virtual absl::Status Linear(const LinearWeight& weight, Matrix in, Matrix out,
                              LinearOutput mode) = 0;
  // QK-norm, RoPE, and K and V to their pages.
  virtual absl::Status RopeAndStoreKv(const RopeArgs& args) = 0;
  // ProxyAttn steps 1 to 3. The kept blocks stay in the backend until the next call.
  virtual absl::Status SelectBlocks(const SelectArgs& args) = 0;
  // Causal GQA attention, scale 1 / sqrt(head_dim).
  virtual absl::Status Attention(const AttentionArgs& args) = 0;
  // out = silu(gate) * up. gate_up: [n, 2 f] with gate in the first f columns; out: [n, f]. May be
  // called with out aliasing nothing of gate_up.
  virtual absl::Status SwiGlu(Matrix gate_up, Matrix out) = 0;

  // ---- results
  // Copies tokens [token_begin, token_begin + token_count) of the pages to host memory as K, then
  // V, each [num_kv_heads][token_count][head_dim]. token_begin: multiple of kBlockTokens. Waits for
  // nothing but these tokens when they were written by one of the last two RopeAndStoreKv.
  // NonFiniteError (kernels/base/nonfinite.h) when a copied value is not finite.
  virtual absl::Status ReadKv(const KvPages& kv, int64_t token_begin, int64_t token_count,
                              absl::Span<std::byte> out) = 0;
  // What the last SelectBlocks kept.
  virtual absl::StatusOr<BlockSelection> ReadSelection() = 0;
  virtual void ResetStats(int32_t num_layers) = 0;
  virtual absl::StatusOr<BackendStats> ReadStats() = 0;

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
};

// INVALID_ARGUMENT when the device is unknown or not in this build (says what it looked for).
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options);

}  // namespace headstart
