#include "kernels/cuda/weight_upload.h"

#include <cstring>

#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

float ElementAsFloat(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBF16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case DType::kF16:
      return Float16ToFloat(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

void ConvertElements(const HostTensor& from, int64_t begin, int64_t count, DType dtype, void* to) {
  if (from.dtype == dtype) {
    const int64_t size = DTypeBytes(dtype);
    std::memcpy(to, static_cast<const char*>(from.data) + begin * size, count * size);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float value = ElementAsFloat(from.data, from.dtype, begin + i);
    if (dtype == DType::kBF16) {
      static_cast<BFloat16*>(to)[i] = BFloat16(value);
    } else {
      static_cast<float*>(to)[i] = value;
    }
  }
}

}  // namespace

absl::Status UploadTensor(const HostTensor& tensor, DType dtype, void* device,
                          HostTransfer& transfer, cudaStream_t stream) {
  const int64_t size = DTypeBytes(dtype);
  const auto fill = [&](void* target, int64_t offset, int64_t count) {
    ConvertElements(tensor, offset / size, count / size, dtype, target);
  };
  return transfer.Upload(fill, tensor.rows * tensor.cols * size, device, stream);
}

absl::StatusOr<DeviceMemory> UploadParts(absl::Span<const HostTensor> parts, DType dtype,
                                         HostTransfer& transfer, cudaStream_t stream) {
  int64_t elements = 0;
  for (const HostTensor& part : parts) elements += part.rows * part.cols;
  if (elements == 0) return DeviceMemory();
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(elements * DTypeBytes(dtype)));
  char* target = static_cast<char*>(memory.get());
  for (const HostTensor& part : parts) {
    HEADSTART_RETURN_IF_ERROR(UploadTensor(part, dtype, target, transfer, stream));
    target += part.rows * part.cols * DTypeBytes(dtype);
  }
  return memory;
}

}  // namespace headstart::cuda
