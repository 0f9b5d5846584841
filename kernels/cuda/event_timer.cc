#include "kernels/cuda/event_timer.h"

#include <utility>

#include "kernels/base/status_macros.h"

namespace headstart::cuda {

absl::Status EventTimer::Begin(cudaStream_t stream) {
  if (under_way_ == pairs_.size()) HEADSTART_RETURN_IF_ERROR(AddUpPassed());
  if (under_way_ == pairs_.size()) {
    HEADSTART_ASSIGN_OR_RETURN(Event begin, MakeEvent(kTimedEvent));
    HEADSTART_ASSIGN_OR_RETURN(Event end, MakeEvent(kTimedEvent));
    pairs_.push_back({std::move(begin), std::move(end)});
  }
  return ToStatus(cudaEventRecord(pairs_[under_way_].begin.get(), stream), "timing");
}

absl::Status EventTimer::End(cudaStream_t stream) {
  return ToStatus(cudaEventRecord(pairs_[under_way_++].end.get(), stream), "timing");
}

absl::Status EventTimer::AddUpPassed() {
  for (; under_way_ > 0; --under_way_) {
    Pair& pair = pairs_.front();
    const cudaError_t passed = cudaEventQuery(pair.end.get());
    if (passed == cudaErrorNotReady) {
      (void)cudaGetLastError();  // no error, but kept as one
      return absl::OkStatus();
    }
    HEADSTART_RETURN_IF_ERROR(ToStatus(passed, "timing"));
    float ms = 0.0f;
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cudaEventElapsedTime(&ms, pair.begin.get(), pair.end.get()), "timing"));
    seconds_ += ms * 1e-3;
    pairs_.push_back(std::move(pair));
    pairs_.pop_front();
  }
  return absl::OkStatus();
}

absl::StatusOr<double> EventTimer::TakeSeconds() {
  HEADSTART_RETURN_IF_ERROR(AddUpPassed());
  return std::exchange(seconds_, 0.0);
}

}  // namespace headstart::cuda
