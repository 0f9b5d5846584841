#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_plan.h"

#if HEADSTART_ENABLE_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace headstart {

absl::StatusOr<std::unique_ptr<BackendPlan>> MakeBackendPlan(const BackendOptions& options) {
  if (options.device != "cuda") {
    HEADSTART_ASSIGN_OR_RETURN(std::unique_ptr<BackendPlan> plan, MakeBackend(options));
    return plan;
  }
  if (options.dtype == ComputeDType::kF32) {
    return absl::InvalidArgumentError("device cuda computes in bf16; f32 is for the CPU");
  }
  return std::make_unique<cuda::CudaPlan>();
}

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
