// Backend for machines without a GPU: oneDNN for matrix products, own SIMD kernels for the rest,
// threaded with OpenMP. Operations are done when they return.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/gemm_onednn.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/proxy_attn.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/op_args.h"

namespace headstart {

class CpuBackend : public Backend {
 public:
  // INVALID_ARGUMENT when bf16 is asked for and the CPU (or HEADSTART_CPU_ISA) has no AVX512-BF16,
  // or num_threads is not in [0, 1024]. RESOURCE_EXHAUSTED: threads that can't be had.
  static absl::StatusOr<std::unique_ptr<CpuBackend>> Create(const BackendOptions& options);

  std::string name() const override { return "cpu"; }
  std::string device() const override { return device_; }
  DType compute_dtype() const override { return dtype_; }
  DType residual_dtype() const override { return DType::kF32; }

  absl::Status CheckModel(const ModelShape& model) const override {
    return CheckShape(limits_, model);
  }
  int64_t max_tokens() const override { return limits_.max_tokens; }
  int64_t PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                           int64_t num_tokens) const override;
  bool UsesHostMemory() const override { return true; }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override;
  absl::Status Upload(const void* host, int64_t bytes, void* device) override;
  absl::Status Download(const void* device, int64_t bytes, void* host) override;

  absl::StatusOr<std::unique_ptr<LinearWeight>> PrepareLinear(
      absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) override;
  absl::StatusOr<Buffer> PrepareVector(const HostTensor& vector) override;
  absl::StatusOr<Buffer> PrepareTable(const HostTensor& table) override;
  absl::StatusOr<std::unique_ptr<RopeTable>> PrepareRope(absl::Span<const float> inv_freq,
                                                         float scaling,
                                                         int64_t max_positions) override;

  absl::Status Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) override;
  absl::Status RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) override;
  absl::Status Linear(const LinearWeight& weight, Matrix in, Matrix out,
                      LinearOutput mode) override;
  absl::Status RopeAndStoreKv(const RopeArgs& args) override;
  absl::Status Attention(const AttentionArgs& args) override;
  absl::Status SwiGlu(Matrix gate_up, Matrix out) override;
  absl::Status QuantizeKv(const QuantizeKvArgs& args) override;

  absl::StatusOr<HostBuffer> AllocateHost(int64_t bytes) override;
  absl::StatusOr<std::unique_ptr<PendingCopy>> CopyOut(absl::Span<const HostCopy> copies) override;
  absl::StatusOr<BackendTimes> TakeTimes() override { return std::exchange(times_, {}); }

 private:
  CpuBackend(CpuIsa isa, DType dtype, int32_t num_threads, std::unique_ptr<OneDnnGemm> gemm);

  void Free(void* data) override;
  absl::StatusOr<Buffer> ConvertToBuffer(const HostTensor& tensor, DType dtype);
  // Rotates and stores one row, a token of a sequence; false when a K or V value is not finite.
  bool StoreRow(const RopeArgs& args, const SequenceRows& rows, int64_t index) const;
  // The blocks of a sequence that attention is to see; null: all.
  absl::StatusOr<const BlockSelection*> Select(const SequenceAttention& args);
  // Adds what a sequence came to; selection null: all of its blocks.
  static void Count(const HeadShape& shape, const AttentionSequence& sequence,
                    const BlockSelection* selection);

  const DType dtype_;
  const OpLimits limits_;
  const int32_t num_threads_;
  const std::string device_;
  const simd::KernelTable& kernels_;
  std::unique_ptr<OneDnnGemm> gemm_;
  ProxyAttnSelector selector_;
  CpuAttention attention_;
  BlockSelection selection_;  // working memory of Attention
  BackendTimes times_;
};

}  // namespace headstart
