#include "kernels/cuda/event_timer.h"

#include "kernels/base/status_macros.h"

namespace headstart::cuda {

absl::Status EventTimer::Begin(cudaStream_t stream) {
  if (used_ == pairs_.size()) {
    HEADSTART_ASSIGN_OR_RETURN(Event begin, MakeEvent(kTimedEvent));
    HEADSTART_ASSIGN_OR_RETURN(Event end, MakeEvent(kTimedEvent));
    pairs_.emplace_back(std::move(begin), std::move(end));
  }
  return ToStatus(cudaEventRecord(pairs_[used_].first.get(), stream), "timing");
}

absl::Status EventTimer::End(cudaStream_t stream) {
  return ToStatus(cudaEventRecord(pairs_[used_++].second.get(), stream), "timing");
}

absl::StatusOr<double> EventTimer::TakeSeconds() {
  const size_t used = std::exchange(used_, 0);
  double seconds = 0;
  for (size_t i = 0; i < used; ++i) {
    float ms = 0.0f;
    HEADSTART_RETURN_IF_ERROR(ToStatus(
        cudaEventElapsedTime(&ms, pairs_[i].first.get(), pairs_[i].second.get()), "timing"));
    seconds += ms * 1e-3;
  }
  return seconds;
}

}  // namespace headstart::cuda
