// Weights of a model file to device memory, converted on the way.
#pragma once

#include "absl/types/span.h"
#include "kernels/cuda/host_transfer.h"
#include "kernels/tensor.h"

namespace headstart::cuda {

// Enqueues on `stream`; the tensor's memory is free when the call returns. dtype: kBF16 or kF32.
absl::Status UploadTensor(const HostTensor& tensor, DType dtype, void* device,
                          HostTransfer& transfer, cudaStream_t stream);

// The tensors one after another, in memory of their own. Null when they have no elements.
absl::StatusOr<DeviceMemory> UploadParts(absl::Span<const HostTensor> parts, DType dtype,
                                         HostTransfer& transfer, cudaStream_t stream);

}  // namespace headstart::cuda
