#include "tests/testing/fault_backend.h"

#include <iterator>
#include <limits>
#include <utility>

#include "kernels/base/status_macros.h"

namespace headstart::testing {

void FaultBackend::SetHook(Hook hook) {
  MutexLock lock(&mutex_);
  hook_ = std::move(hook);
}

void FaultBackend::PoisonOutput(absl::string_view op, int32_t layer) {
  MutexLock lock(&mutex_);
  poisoned_op_ = std::string(op);
  poisoned_layer_ = layer;
}

int64_t FaultBackend::CountCalls(absl::string_view op) const {
  MutexLock lock(&mutex_);
  const auto found = calls_.find(op);
  return found == calls_.end() ? 0 : found->second;
}

absl::Status FaultBackend::Before(absl::string_view op, int64_t bytes) {
  int32_t layer = 0;
  {
    MutexLock lock(&mutex_);
    layer = layer_;
  }
  return BeforeInLayer(op, layer, bytes);
}

absl::Status FaultBackend::BeforeInLayer(absl::string_view op, int32_t layer, int64_t bytes) {
  Hook hook;
  {
    MutexLock lock(&mutex_);
    ++calls_[std::string(op)];
    hook = hook_;
  }
  return hook ? hook({op, layer, bytes}) : absl::OkStatus();
}

void FaultBackend::EnterLayer(int32_t layer) {
  MutexLock lock(&mutex_);
  layer_ = layer;
  ffn_ran_ = false;
}

void FaultBackend::FollowNorm() {
  MutexLock lock(&mutex_);
  if (ffn_ran_) ++layer_;
  ffn_ran_ = false;
}

int32_t FaultBackend::LayerOf(const void* data) const {
  MutexLock lock(&mutex_);
  const auto behind = layer_of_kv_.upper_bound(data);
  return behind == layer_of_kv_.begin() ? -1 : std::prev(behind)->second;
}

int32_t FaultBackend::LearnLayer(const KvPages& kv) {
  MutexLock lock(&mutex_);
  const auto next = static_cast<int32_t>(layer_of_kv_.size());
  return layer_of_kv_.try_emplace(kv.pages, next).first->second;
}

absl::Status FaultBackend::After(absl::string_view op, Matrix out) {
  {
    MutexLock lock(&mutex_);
    if (op != poisoned_op_ || layer_ != poisoned_layer_) return absl::OkStatus();
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (out.dtype == DType::kF32) return inner().Upload(&nan, sizeof(nan), out.data);
  const BFloat16 small_nan(nan);
  return inner().Upload(&small_nan, sizeof(small_nan), out.data);
}

absl::StatusOr<Buffer> FaultBackend::Allocate(int64_t bytes) {
  HEADSTART_RETURN_IF_ERROR(Before("Allocate", bytes));
  return inner().Allocate(bytes);
}

absl::Status FaultBackend::Upload(const void* host, int64_t bytes, void* device) {
  HEADSTART_RETURN_IF_ERROR(Before("Upload", bytes));
  return inner().Upload(host, bytes, device);
}

absl::Status FaultBackend::Download(const void* device, int64_t bytes, void* host) {
  HEADSTART_RETURN_IF_ERROR(Before("Download", bytes));
  return inner().Download(device, bytes, host);
}

absl::StatusOr<std::unique_ptr<LinearWeight>> FaultBackend::PrepareLinear(
    absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareLinear"));
  return inner().PrepareLinear(parts, biases);
}

absl::StatusOr<Buffer> FaultBackend::PrepareVector(const HostTensor& vector) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareVector"));
  return inner().PrepareVector(vector);
}

absl::StatusOr<Buffer> FaultBackend::PrepareTable(const HostTensor& table) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareTable"));
  return inner().PrepareTable(table);
}

absl::StatusOr<std::unique_ptr<RopeTable>> FaultBackend::PrepareRope(
    absl::Span<const float> inv_freq, float scaling, int64_t max_positions) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareRope"));
  return inner().PrepareRope(inv_freq, scaling, max_positions);
}

absl::Status FaultBackend::Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) {
  EnterLayer(0);
  HEADSTART_RETURN_IF_ERROR(Before("Embed"));
  HEADSTART_RETURN_IF_ERROR(inner().Embed(ids, table, out));
  return After("Embed", out);
}

absl::Status FaultBackend::RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) {
  FollowNorm();
  HEADSTART_RETURN_IF_ERROR(Before("RmsNorm"));
  HEADSTART_RETURN_IF_ERROR(inner().RmsNorm(x, weight, eps, out));
  return After("RmsNorm", out);
}

absl::Status FaultBackend::Linear(const LinearWeight& weight, Matrix in, Matrix out,
                                  LinearOutput mode) {
  HEADSTART_RETURN_IF_ERROR(Before("Linear"));
  HEADSTART_RETURN_IF_ERROR(inner().Linear(weight, in, out, mode));
  return After("Linear", out);
}

absl::Status FaultBackend::RopeAndStoreKv(const RopeArgs& args) {
  EnterLayer(LearnLayer(args.kv));
  HEADSTART_RETURN_IF_ERROR(Before("RopeAndStoreKv"));
  return inner().RopeAndStoreKv(args);
}

absl::Status FaultBackend::Attention(const AttentionArgs& args) {
  EnterLayer(LayerOf(args.kv.pages));
  HEADSTART_RETURN_IF_ERROR(Before("Attention"));
  HEADSTART_RETURN_IF_ERROR(inner().Attention(args));
  if (args.sequences.empty()) return absl::OkStatus();
  return After("Attention", args.out.Rows(args.sequences[0].rows.first_row, 1));
}

absl::Status FaultBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(Before("SwiGlu"));
  HEADSTART_RETURN_IF_ERROR(inner().SwiGlu(gate_up, out));
  {
    MutexLock lock(&mutex_);
    ffn_ran_ = true;
  }
  return After("SwiGlu", out);
}

absl::Status FaultBackend::QuantizeKv(const QuantizeKvArgs& args) {
  HEADSTART_RETURN_IF_ERROR(BeforeInLayer("QuantizeKv", LayerOf(args.kv.pages), 0));
  return inner().QuantizeKv(args);
}

absl::StatusOr<HostBuffer> FaultBackend::AllocateHost(int64_t bytes) {
  HEADSTART_RETURN_IF_ERROR(Before("AllocateHost", bytes));
  return inner().AllocateHost(bytes);
}

// A copy whose Wait can be stopped or fail, on the thread that waits.
class FaultBackend::Copy : public PendingCopy {
 public:
  Copy(FaultBackend& backend, std::unique_ptr<PendingCopy> inner, int32_t layer, int64_t bytes)
      : backend_(backend), inner_(std::move(inner)), layer_(layer), bytes_(bytes) {}

  bool Ready() override { return inner_->Ready(); }
  absl::Status Wait() override {
    HEADSTART_RETURN_IF_ERROR(backend_.BeforeInLayer("Wait", layer_, bytes_));
    return inner_->Wait();
  }

 private:
  FaultBackend& backend_;
  const std::unique_ptr<PendingCopy> inner_;
  const int32_t layer_;
  const int64_t bytes_;
};

absl::StatusOr<std::unique_ptr<PendingCopy>> FaultBackend::CopyOut(
    absl::Span<const HostCopy> copies) {
  int64_t bytes = 0;
  for (const HostCopy& copy : copies) bytes += copy.bytes;
  const int32_t layer = copies.empty() ? -1 : LayerOf(copies[0].from);
  HEADSTART_RETURN_IF_ERROR(BeforeInLayer("CopyOut", layer, bytes));
  HEADSTART_ASSIGN_OR_RETURN(auto copy, inner().CopyOut(copies));
  return std::make_unique<Copy>(*this, std::move(copy), layer, bytes);
}

absl::StatusOr<BackendTimes> FaultBackend::TakeTimes() {
  HEADSTART_RETURN_IF_ERROR(Before("TakeTimes"));
  return inner().TakeTimes();
}

}  // namespace headstart::testing
