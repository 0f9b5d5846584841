// Backend for NVIDIA Hopper GPUs (sm_90): own attention, selection and elementwise kernels,
// cuBLASLt for the products. Activations, KV cache and residual stream are bf16. Operations are
// enqueued on one stream; what leaves does so on others, while later layers compute.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/block_selector.h"
#include "kernels/cuda/copy_stream.h"
#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/event_timer.h"
#include "kernels/cuda/gemm_cublaslt.h"
#include "kernels/cuda/host_transfer.h"

namespace headstart::cuda {

class CudaBackend : public Backend {
 public:
  // The first device of the process. INVALID_ARGUMENT when there is none, when it is not sm_90
  // (says what it is), or for f32 as the compute type.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const BackendOptions& options);

  std::string name() const override { return "cuda"; }
  std::string device() const override { return device_; }
  DType compute_dtype() const override { return DType::kBF16; }
  DType residual_dtype() const override { return DType::kBF16; }

  absl::Status CheckModel(const ModelShape& model) const override {
    return CheckShape(kLimits, model);
  }
  int64_t max_tokens() const override { return kLimits.max_tokens; }
  int64_t PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                           int64_t num_tokens) const override {
    return PlanScratch(heads, piece_tokens, num_tokens);
  }
  absl::Status ReserveScratch(const HeadShape& heads, int64_t piece_tokens,
                              int64_t num_tokens) override;
  std::optional<int64_t> FreeBytes() const override;
  bool LearnsShapes() const override { return true; }  // cuBLASLt's algorithms
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
  absl::StatusOr<BackendTimes> TakeTimes() override;

 private:
  struct Resources {
    Stream stream;
    Event finished;
    CopyStream copies;
    HostTransfer transfer;
    std::unique_ptr<CublasLtGemm> gemm;
    DeviceMemory tile_counter;
  };
  CudaBackend(std::string device, int num_sms, Resources resources);

  void Free(void* data) override;
  // Selects the blocks of a sequence and reads them where that is wanted.
  absl::Status Select(const AttentionArgs& args, const AttentionSequence& sequence);
  // Attention of up to kMaxSequences sequences in one launch.
  absl::Status Attend(const AttentionArgs& args, absl::Span<const AttendedSequence> sequences);

  const std::string device_;
  const int num_sms_;
  Stream stream_;
  Event finished_;  // recorded and waited for by TakeTimes
  CopyStream copies_;
  HostTransfer transfer_;
  std::unique_ptr<CublasLtGemm> gemm_;
  DeviceMemory tile_counter_;  // one word; kernels that take tiles leave it 0
  BlockSelector selector_;
  DeviceScratch ids_;
  EventTimer selection_timer_, attention_timer_;
};

}  // namespace headstart::cuda
