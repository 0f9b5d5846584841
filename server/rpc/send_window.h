// How many bytes of KV may lie between the engine and one client's connection. Knows no gRPC.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/mutex.h"

namespace headstart {

// Thread-safe; one thread takes.
class SendWindow {
 public:
  SendWindow(int64_t capacity_bytes, absl::Duration stall_timeout)
      : capacity_bytes_(capacity_bytes), stall_timeout_(stall_timeout) {}

  // Takes `bytes`, waiting for room if need be; more than the capacity is taken when nothing else
  // is held. Returns how long it waited, zero if not at all. CANCELLED (reason CLIENT_STALLED) when
  // nothing came back for the stall limit, DEADLINE_EXCEEDED at `deadline`, or what Break was
  // given.
  absl::StatusOr<absl::Duration> Take(int64_t bytes, absl::Time deadline);

  // The client has taken bytes that Take got.
  void GiveBack(int64_t bytes);

  // Ends every Take, present and future, with `why`. The first call counts.
  void Break(absl::Status why);

 private:
  bool HasRoom(int64_t bytes) const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return held_bytes_ == 0 || held_bytes_ + bytes <= capacity_bytes_;
  }

  const int64_t capacity_bytes_;
  const absl::Duration stall_timeout_;
  Mutex mutex_;
  CondVar changed_;
  int64_t held_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time last_progress_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Status broken_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
