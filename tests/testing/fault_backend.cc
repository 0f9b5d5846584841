#include "tests/testing/fault_backend.h"

#include <limits>

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
    if (op == "Embed") {
      layer_ = 0;
      ffn_ran_ = false;
    }
    if (op == "RmsNorm" && ffn_ran_) {
      ++layer_;
      ffn_ran_ = false;
    }
    if (op == "SwiGlu") ffn_ran_ = true;
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

absl::Status FaultBackend::After(absl::string_view op, Matrix out) {
  {
    MutexLock lock(&mutex_);
    if (op != poisoned_op_ || layer_ != poisoned_layer_) return absl::OkStatus();
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (out.dtype == DType::kF32) return inner_->Upload(&nan, sizeof(nan), out.data);
  const BFloat16 small_nan(nan);
  return inner_->Upload(&small_nan, sizeof(small_nan), out.data);
}

absl::StatusOr<Buffer> FaultBackend::Allocate(int64_t bytes) {
  HEADSTART_RETURN_IF_ERROR(Before("Allocate", bytes));
  return inner_->Allocate(bytes);
}

absl::Status FaultBackend::Upload(const void* host, int64_t bytes, void* device) {
  HEADSTART_RETURN_IF_ERROR(Before("Upload", bytes));
  return inner_->Upload(host, bytes, device);
}

absl::Status FaultBackend::Download(const void* device, int64_t bytes, void* host) {
  HEADSTART_RETURN_IF_ERROR(Before("Download", bytes));
  return inner_->Download(device, bytes, host);
}

absl::StatusOr<std::unique_ptr<LinearWeight>> FaultBackend::PrepareLinear(
    absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareLinear"));
  return inner_->PrepareLinear(parts, biases);
}

absl::StatusOr<Buffer> FaultBackend::PrepareVector(const HostTensor& vector) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareVector"));
  return inner_->PrepareVector(vector);
}

absl::StatusOr<Buffer> FaultBackend::PrepareTable(const HostTensor& table) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareTable"));
  return inner_->PrepareTable(table);
}

absl::StatusOr<std::unique_ptr<RopeTable>> FaultBackend::PrepareRope(
    absl::Span<const float> inv_freq, float scaling, int64_t max_positions) {
  HEADSTART_RETURN_IF_ERROR(Before("PrepareRope"));
  return inner_->PrepareRope(inv_freq, scaling, max_positions);
}

absl::Status FaultBackend::Embed(absl::Span<const int32_t> ids, const Buffer& table, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(Before("Embed"));
  HEADSTART_RETURN_IF_ERROR(inner_->Embed(ids, table, out));
  return After("Embed", out);
}

absl::Status FaultBackend::RmsNorm(Matrix x, const Buffer& weight, float eps, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(Before("RmsNorm"));
  HEADSTART_RETURN_IF_ERROR(inner_->RmsNorm(x, weight, eps, out));
  return After("RmsNorm", out);
}

absl::Status FaultBackend::Linear(const LinearWeight& weight, Matrix in, Matrix out,
                                  LinearOutput mode) {
  HEADSTART_RETURN_IF_ERROR(Before("Linear"));
  HEADSTART_RETURN_IF_ERROR(inner_->Linear(weight, in, out, mode));
  return After("Linear", out);
}

absl::Status FaultBackend::RopeAndStoreKv(const RopeArgs& args) {
  HEADSTART_RETURN_IF_ERROR(Before("RopeAndStoreKv"));
  {
    MutexLock lock(&mutex_);
    layer_of_kv_[args.kv.pages] = layer_;
  }
  return inner_->RopeAndStoreKv(args);
}

absl::Status FaultBackend::SelectBlocks(const SelectArgs& args) {
  {
    MutexLock lock(&mutex_);
    layer_ = args.layer;
  }
  HEADSTART_RETURN_IF_ERROR(Before("SelectBlocks"));
  return inner_->SelectBlocks(args);
}

absl::Status FaultBackend::Attention(const AttentionArgs& args) {
  {
    MutexLock lock(&mutex_);
    layer_ = args.layer;
  }
  HEADSTART_RETURN_IF_ERROR(Before("Attention"));
  HEADSTART_RETURN_IF_ERROR(inner_->Attention(args));
  return After("Attention", args.out);
}

absl::Status FaultBackend::SwiGlu(Matrix gate_up, Matrix out) {
  HEADSTART_RETURN_IF_ERROR(Before("SwiGlu"));
  HEADSTART_RETURN_IF_ERROR(inner_->SwiGlu(gate_up, out));
  return After("SwiGlu", out);
}

absl::Status FaultBackend::ReadKv(const KvPages& kv, int64_t token_begin, int64_t token_count,
                                  absl::Span<std::byte> out) {
  int32_t layer = 0;
  {
    MutexLock lock(&mutex_);
    layer = layer_of_kv_[kv.pages];
  }
  HEADSTART_RETURN_IF_ERROR(BeforeInLayer("ReadKv", layer, static_cast<int64_t>(out.size())));
  return inner_->ReadKv(kv, token_begin, token_count, out);
}

absl::StatusOr<BlockSelection> FaultBackend::ReadSelection() {
  HEADSTART_RETURN_IF_ERROR(Before("ReadSelection"));
  return inner_->ReadSelection();
}

absl::StatusOr<BackendStats> FaultBackend::ReadStats() {
  HEADSTART_RETURN_IF_ERROR(Before("ReadStats"));
  return inner_->ReadStats();
}

}  // namespace headstart::testing
