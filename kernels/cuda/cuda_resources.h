// CUDA's errors as absl::Status, and its streams, events and memory as move-only objects.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headstart::cuda {

// OK for cudaSuccess; RESOURCE_EXHAUSTED for a failed allocation; INTERNAL for all else, after
// which the device's context must be taken for lost. `what` says what was tried.
absl::Status ToStatus(cudaError_t error, absl::string_view what);

template <auto kDestroy>
struct Destroyer {
  template <typename T>
  void operator()(T* handle) const {
    (void)kDestroy(handle);  // nobody is left to tell
  }
};
using Stream = std::unique_ptr<CUstream_st, Destroyer<cudaStreamDestroy>>;
using Event = std::unique_ptr<CUevent_st, Destroyer<cudaEventDestroy>>;
using DeviceMemory = std::unique_ptr<void, Destroyer<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, Destroyer<cudaFreeHost>>;

// A stream that does not wait for the default one; `urgent` streams go first when multiprocessors
// get free.
absl::StatusOr<Stream> MakeStream(bool urgent);
// Flags of cudaEventCreateWithFlags: to wait for, to measure time, or to sleep until it has
// happened.
inline constexpr unsigned kOrderEvent = cudaEventDisableTiming;
inline constexpr unsigned kTimedEvent = cudaEventDefault;
inline constexpr unsigned kSleepEvent = cudaEventDisableTiming | cudaEventBlockingSync;
absl::StatusOr<Event> MakeEvent(unsigned flags);
// Holds this thread until the event has happened. The driver comes back from waiting with the upper
// halves of the vector registers in use, and while they are, code that was not compiled for AVX
// runs some 15 times slower on Intel's servers (34 ms instead of 2 for one look at 128K logits):
// they are cleared.
absl::Status WaitFor(const Event& event, absl::string_view what);
// RESOURCE_EXHAUSTED says how many bytes were asked for and how many are free.
absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes);
absl::StatusOr<PinnedMemory> AllocatePinned(int64_t bytes);

// Device memory that only grows: allocates when more is asked for than ever before.
class DeviceScratch {
 public:
  absl::StatusOr<void*> Reserve(int64_t bytes);

 private:
  DeviceMemory memory_;
  int64_t bytes_ = 0;
};

}  // namespace headstart::cuda
