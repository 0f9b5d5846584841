#include "kernels/cuda/cuda_resources.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

#if defined(__x86_64__)
__attribute__((target("avx"))) void ZeroUpperHalves() { __builtin_ia32_vzeroupper(); }
#endif

// Clears the upper halves of the vector registers.
void ClearVectorState() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx")) ZeroUpperHalves();
#endif
}

}  // namespace

absl::Status ToStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat(what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

absl::StatusOr<Stream> MakeStream(bool urgent) {
  int least = 0, greatest = 0;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities"));
  cudaStream_t stream = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, urgent ? greatest : least),
      "stream"));
  return Stream(stream);
}

absl::StatusOr<Event> MakeEvent(unsigned flags) {
  cudaEvent_t event = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&event, flags), "event"));
  return Event(event);
}

absl::Status WaitFor(const Event& event, absl::string_view what) {
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(event.get()), what));
  ClearVectorState();
  return absl::OkStatus();
}

absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // a failed allocation leaves the context whole: clear it
    size_t free_bytes = 0, total_bytes = 0;
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "free device memory"));
    return absl::ResourceExhaustedError(absl::StrCat("no room for ", bytes,
                                                     " bytes of device memory: ", free_bytes,
                                                     " of ", total_bytes, " are free"));
  }
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(error, absl::StrCat("allocating ", bytes, " bytes of device memory")));
  return DeviceMemory(data);
}

absl::StatusOr<PinnedMemory> AllocatePinned(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMallocHost(&data, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) cudaGetLastError();  // as above
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(error, absl::StrCat("allocating ", bytes, " bytes of pinned host memory")));
  return PinnedMemory(data);
}

absl::StatusOr<void*> DeviceScratch::Reserve(int64_t bytes) {
  if (bytes > bytes_) {
    bytes_ = 0;
    memory_.reset();
    HEADSTART_ASSIGN_OR_RETURN(memory_, AllocateDevice(bytes));
    bytes_ = bytes;
  }
  return memory_.get();
}

}  // namespace headstart::cuda
