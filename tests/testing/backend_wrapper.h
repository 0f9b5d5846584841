// A backend that passes everything on to another one: what a test wants otherwise, it overrides.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "kernels/backend.h"

namespace headstart::testing {

class BackendWrapper : public Backend {
 public:
  explicit BackendWrapper(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  std::string name() const override { return inner_->name(); }
  std::string device() const override { return inner_->device(); }
  DType compute_dtype() const override { return inner_->compute_dtype(); }
  DType residual_dtype() const override { return inner_->residual_dtype(); }
  absl::Status CheckModel(const ModelShape& model) const override {
    return inner_->CheckModel(model);
  }
  int64_t max_tokens() const override { return inner_->max_tokens(); }
  int64_t PlanScratchBytes(const HeadShape& heads, int64_t piece_tokens,
                           int64_t num_tokens) const override {
    return inner_->PlanScratchBytes(heads, piece_tokens, num_tokens);
  }
  absl::Status ReserveScratch(const HeadShape& heads, int64_t piece_tokens,
                              int64_t num_tokens) override {
    return inner_->ReserveScratch(heads, piece_tokens, num_tokens);
  }
  std::optional<int64_t> FreeBytes() const override { return inner_->FreeBytes(); }
  bool UsesHostMemory() const override { return inner_->UsesHostMemory(); }
  bool LearnsShapes() const override { return inner_->LearnsShapes(); }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return inner_->Allocate(bytes); }
  absl::Status Upload(const void* host, int64_t bytes, void* device) override {
    return inner_->Upload(host, bytes, device);
  }
  absl::Status Download(const void* device, int64_t bytes, void* host) override {
    return inner_->Download(device, bytes, host);
  }
  absl::StatusOr<std::unique_ptr<LinearWeight>> PrepareLinear(
      absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) override {
    return inner_->PrepareLinear(parts, biases);
  }
  absl::StatusOr<Buffer> PrepareVector(const HostTensor& vector) override {
    return inner_->PrepareVector(vector);
  }
  absl::StatusOr<Buffer> PrepareTable(const HostTensor& table) override {
    return inner_->PrepareTable(table);
  }
  absl::StatusOr<std::unique_ptr<RopeTable>> PrepareRope(absl::Span<const float> inv_freq,
                                                         float scaling,
                                                         int64_t max_positions) override {
    return inner_->PrepareRope(inv_freq, scaling, max_positions);
  }
  absl::Status Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) override {
    return inner_->Embed(ids, table, out);
  }
  absl::Status RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) override {
    return inner_->RmsNorm(x, weight, eps, out);
  }
  absl::Status Linear(const LinearWeight& weight, Matrix in, Matrix out,
                      LinearOutput mode) override {
    return inner_->Linear(weight, in, out, mode);
  }
  absl::Status RopeAndStoreKv(const RopeArgs& args) override {
    return inner_->RopeAndStoreKv(args);
  }
  absl::Status Attention(const AttentionArgs& args) override { return inner_->Attention(args); }
  absl::Status SwiGlu(Matrix gate_up, Matrix out) override { return inner_->SwiGlu(gate_up, out); }
  absl::Status QuantizeKv(const QuantizeKvArgs& args) override { return inner_->QuantizeKv(args); }
  absl::StatusOr<HostBuffer> AllocateHost(int64_t bytes) override {
    return inner_->AllocateHost(bytes);
  }
  absl::StatusOr<std::unique_ptr<PendingCopy>> CopyOut(absl::Span<const HostCopy> copies) override {
    return inner_->CopyOut(copies);
  }
  absl::StatusOr<BackendTimes> TakeTimes() override { return inner_->TakeTimes(); }

 protected:
  Backend& inner() { return *inner_; }

 private:
  // The inner backend's buffers name it as their owner, so none comes back here.
  void Free(void*) override {}

  std::unique_ptr<Backend> inner_;
};

}  // namespace headstart::testing
