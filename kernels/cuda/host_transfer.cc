#include "kernels/cuda/host_transfer.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

constexpr int64_t kSlotBytes = int64_t{16} << 20;
constexpr int kSlots = 3;

}  // namespace

absl::StatusOr<HostTransfer> HostTransfer::Create() {
  std::vector<Slot> slots(kSlots);
  for (Slot& slot : slots) {
    HEADSTART_ASSIGN_OR_RETURN(slot.memory, AllocatePinned(kSlotBytes));
    HEADSTART_ASSIGN_OR_RETURN(slot.done, MakeEvent(kOrderEvent));
  }
  return HostTransfer(std::move(slots));
}

absl::Status HostTransfer::Upload(const Fill& fill, int64_t bytes, void* device,
                                  cudaStream_t stream) {
  for (int64_t offset = 0; offset < bytes; offset += kSlotBytes) {
    Slot& slot = slots_[next_];
    next_ = (next_ + 1) % kSlots;
    const int64_t count = std::min(kSlotBytes, bytes - offset);
    // An event that was never recorded is done.
    HEADSTART_RETURN_IF_ERROR(WaitFor(slot.done, "waiting for an upload"));
    fill(slot.memory.get(), offset, count);
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cudaMemcpyAsync(static_cast<char*>(device) + offset, slot.memory.get(), count,
                                 cudaMemcpyHostToDevice, stream),
                 "uploading"));
    HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventRecord(slot.done.get(), stream), "uploading"));
  }
  return absl::OkStatus();
}

absl::Status HostTransfer::Download(const void* device, int64_t bytes, void* host,
                                    cudaStream_t stream) {
  const int64_t pieces = (bytes + kSlotBytes - 1) / kSlotBytes;
  const auto count_of = [&](int64_t i) { return std::min(kSlotBytes, bytes - i * kSlotBytes); };
  for (int64_t i = 0; i < pieces + kSlots; ++i) {
    if (i >= kSlots) {  // take out the piece that used this slot before
      Slot& slot = slots_[i % kSlots];
      const int64_t done = i - kSlots;
      HEADSTART_RETURN_IF_ERROR(WaitFor(slot.done, "waiting for a download"));
      std::memcpy(static_cast<char*>(host) + done * kSlotBytes, slot.memory.get(), count_of(done));
      if (done + 1 == pieces) break;
    }
    if (i >= pieces) continue;
    Slot& slot = slots_[i % kSlots];
    HEADSTART_RETURN_IF_ERROR(ToStatus(
        cudaMemcpyAsync(slot.memory.get(), static_cast<const char*>(device) + i * kSlotBytes,
                        count_of(i), cudaMemcpyDeviceToHost, stream),
        "downloading"));
    HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventRecord(slot.done.get(), stream), "downloading"));
  }
  return absl::OkStatus();
}

}  // namespace headstart::cuda
