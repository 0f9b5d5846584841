// Adds up the device time between pairs of points on a stream.
#pragma once

#include <cstddef>
#include <deque>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

// On one stream. Pairs that the stream has passed are used again, whether somebody asks for the
// time or not.
class EventTimer {
 public:
  absl::Status Begin(cudaStream_t stream);
  absl::Status End(cudaStream_t stream);
  // Seconds since the last TakeSeconds; the stream must have passed the last End.
  absl::StatusOr<double> TakeSeconds();

  // As many as were under way at once.
  size_t num_pairs() const { return pairs_.size(); }

 private:
  struct Pair {
    Event begin, end;
  };

  // Adds up the oldest pairs, as far as the stream has passed them.
  absl::Status AddUpPassed();

  std::deque<Pair> pairs_;  // in the order of the stream those that are under way, then free ones
  size_t under_way_ = 0;
  double seconds_ = 0;
};

}  // namespace headstart::cuda
