// Adds up the device time between pairs of points on a stream.
#pragma once

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

class EventTimer {
 public:
  absl::Status Begin(cudaStream_t stream);
  absl::Status End(cudaStream_t stream);
  // Seconds since the last TakeSeconds; the stream must have passed the last End.
  absl::StatusOr<double> TakeSeconds();

 private:
  std::vector<std::pair<Event, Event>> pairs_;
  size_t used_ = 0;
};

}  // namespace headstart::cuda
