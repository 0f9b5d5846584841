// Copies between the device and ordinary (pageable) host memory through a ring of pinned buffers,
// so that the copy engine and the host's own copying overlap.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

class HostTransfer {
 public:
  static absl::StatusOr<HostTransfer> Create();

  // Fills `bytes` of device memory in order: `fill(target, offset, count)` writes bytes [offset,
  // offset + count) of the data to host memory. Returns when the host is done; the device is when
  // `stream` is.
  using Fill = std::function<void(void* target, int64_t offset, int64_t count)>;
  absl::Status Upload(const Fill& fill, int64_t bytes, void* device, cudaStream_t stream);

  // Waits for the copy, and for all that was enqueued on `stream` before it.
  absl::Status Download(const void* device, int64_t bytes, void* host, cudaStream_t stream);

 private:
  struct Slot {
    PinnedMemory memory;
    Event done;
  };
  explicit HostTransfer(std::vector<Slot> slots) : slots_(std::move(slots)) {}

  std::vector<Slot> slots_;
  int next_ = 0;  // the slot that was taken longest ago: small uploads do not wait for each other
};

}  // namespace headstart::cuda
