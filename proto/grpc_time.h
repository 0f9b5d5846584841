// gRPC's times and ours. With this header gRPC takes an Instant wherever it takes a point in time.
#pragma once

#include <grpc/support/time.h>
#include <grpcpp/support/time.h>

#include <algorithm>
#include <limits>

#include "absl/time/time.h"
#include "kernels/base/instant.h"

namespace headstart {

// Both count CLOCK_MONOTONIC. Not through std::chrono, whose nanoseconds end in the year 2262: Go's
// and Java's longest deadlines lie beyond.
inline gpr_timespec ToGrpcTime(Instant time) {
  if (time == Instant::InfiniteFuture()) return gpr_inf_future(GPR_CLOCK_MONOTONIC);
  if (time <= Instant()) return gpr_inf_past(GPR_CLOCK_MONOTONIC);
  const timespec since = absl::ToTimespec(time - Instant());
  return {since.tv_sec, static_cast<int32_t>(since.tv_nsec), GPR_CLOCK_MONOTONIC};
}

inline Instant FromGrpcTime(gpr_timespec time) {
  const gpr_timespec since = gpr_convert_clock_type(time, GPR_CLOCK_MONOTONIC);
  if (gpr_time_cmp(since, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0) {
    return Instant::InfiniteFuture();
  }
  return Instant() + absl::Seconds(since.tv_sec) + absl::Nanoseconds(since.tv_nsec);
}

// For settings of channels and servers. What is longer than an int of milliseconds, 24.8 days, is
// the largest one, which gRPC takes for never; what is shorter than one is one.
inline int ToGrpcMs(absl::Duration duration) {
  const absl::Duration longest = absl::Milliseconds(std::numeric_limits<int>::max());
  return static_cast<int>(absl::ToInt64Milliseconds(
      absl::Ceil(std::clamp(duration, absl::Milliseconds(1), longest), absl::Milliseconds(1))));
}

}  // namespace headstart

template <>
class grpc::TimePoint<headstart::Instant> {
 public:
  // NOLINTNEXTLINE(google-explicit-constructor): as gRPC's own
  TimePoint(headstart::Instant time) : time_(headstart::ToGrpcTime(time)) {}
  gpr_timespec raw_time() const { return time_; }

 private:
  gpr_timespec time_;
};
