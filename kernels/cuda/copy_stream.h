// Copies from the device to pinned memory on a stream of their own: the way out.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

// Events to sleep on, used again and again: to make one takes longer than a small copy.
// Thread-safe.
class EventPool {
 public:
  absl::StatusOr<Event> Take();
  void GiveBack(Event event);

 private:
  Mutex mutex_;
  std::vector<Event> events_ ABSL_GUARDED_BY(mutex_);
};

class CopyStream {
 public:
  static absl::StatusOr<CopyStream> Create();

  // Copies what `stream` leaves at this point, behind the copies before. A call of the driver costs
  // about 7 us, as much as 300 KiB: neighbours that are neighbours in memory on both sides go as
  // one.
  absl::StatusOr<std::unique_ptr<PendingCopy>> Start(absl::Span<const HostCopy> copies,
                                                     cudaStream_t stream);

 private:
  Stream stream_;
  Event ready_;  // what is to be copied has been written
  std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
};

}  // namespace headstart::cuda
