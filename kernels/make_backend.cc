#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

#if HEADSTART_ENABLE_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace headstart {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options) {
  if (options.device == "cpu") return CpuBackend::Create(options);
#if HEADSTART_ENABLE_CUDA
  if (options.device == "cuda") return cuda::CudaBackend::Create(options);
  constexpr char kDevices[] = "cpu, cuda";
#else
  constexpr char kDevices[] = "cpu";
#endif
  return absl::InvalidArgumentError(
      absl::StrCat("device \"", options.device, "\" is not in this build, which has: ", kDevices));
}

}  // namespace headstart
