// A backend in which tests can stop, fail or spoil single operations of another one.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/base/mutex.h"
#include "tests/testing/backend_wrapper.h"

namespace headstart::testing {

// One call of a Backend function.
struct BackendCall {
  absl::string_view op;  // name of the function: "Allocate", "Linear", "Attention", …;
                         // "Wait" of what CopyOut gave
  // Layer of the forward pass. Where an operation has KV pages among its arguments they say it:
  // they are the layer's, counted in the order in which RopeAndStoreKv first saw them. Others
  // belong to the layer that runs: 0 from Embed on, that of the KV pages seen last, one more with
  // the first RmsNorm after a SwiGlu (the head is the layer behind the last). -1 before the first
  // Embed (loading).
  int32_t layer = -1;
  int64_t bytes = 0;  // Allocate, AllocateHost, Upload, Download, CopyOut, Wait
};

// Hooks may be set from any thread; they run on the thread that calls the backend.
class FaultBackend : public BackendWrapper {
 public:
  // Runs before the call. May block (on a Notification, to hold a layer). When it returns an
  // error the call does not happen and returns this error.
  using Hook = std::function<absl::Status(const BackendCall&)>;

  explicit FaultBackend(std::unique_ptr<Backend> inner) : BackendWrapper(std::move(inner)) {}

  void SetHook(Hook hook);
  // From now on the first value that `op` (Embed, RmsNorm, Linear, SwiGlu or Attention) writes in
  // `layer` is replaced by a NaN. An empty op ends it.
  void PoisonOutput(absl::string_view op, int32_t layer);
  // Calls of `op` so far.
  int64_t CountCalls(absl::string_view op) const;

  // What FreeBytes and LearnsShapes say.
  void SetFreeBytes(int64_t bytes) { free_bytes_ = bytes; }
  void SetLearnsShapes() { learns_shapes_ = true; }

  std::optional<int64_t> FreeBytes() const override { return free_bytes_; }
  bool LearnsShapes() const override { return learns_shapes_; }
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
  class Copy;

  // Counts the call and runs the hook, for the layer that runs.
  absl::Status Before(absl::string_view op, int64_t bytes = 0);
  absl::Status BeforeInLayer(absl::string_view op, int32_t layer, int64_t bytes);
  void EnterLayer(int32_t layer);
  // The layer that runs ends with its SwiGlu: a norm behind it is the next one's.
  void FollowNorm();
  // The layer whose pages hold `data`; -1: none that was seen.
  int32_t LayerOf(const void* data) const;
  // The same of pages that are about to be written: the first time, they are the next layer's.
  int32_t LearnLayer(const KvPages& kv);
  // Spoils `out` when the test wants it.
  absl::Status After(absl::string_view op, Matrix out);

  std::optional<int64_t> free_bytes_;
  bool learns_shapes_ = false;
  mutable Mutex mutex_;
  Hook hook_ ABSL_GUARDED_BY(mutex_);
  std::string poisoned_op_ ABSL_GUARDED_BY(mutex_);
  int32_t poisoned_layer_ ABSL_GUARDED_BY(mutex_) = -1;
  std::map<std::string, int64_t, std::less<>> calls_ ABSL_GUARDED_BY(mutex_);
  int32_t layer_ ABSL_GUARDED_BY(mutex_) = -1;
  bool ffn_ran_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<const void*, int32_t> layer_of_kv_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart::testing
