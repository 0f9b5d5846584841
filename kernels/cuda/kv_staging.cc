#include "kernels/cuda/kv_staging.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr int64_t kFlagBytes =
    16;  // the finite check, in front of the values: they stay 16-byte aligned

bool AllFinite(const uint16_t* values, int64_t count) {
  return std::none_of(values, values + count,
                      [](uint16_t bits) { return (bits & 0x7f80) == 0x7f80; });
}

}  // namespace

absl::StatusOr<KvStaging> KvStaging::Create() {
  KvStaging staging;
  HEADSTART_ASSIGN_OR_RETURN(staging.stream_, MakeStream(/*urgent=*/true));
  HEADSTART_ASSIGN_OR_RETURN(staging.written_, MakeEvent(/*timed=*/false));
  HEADSTART_ASSIGN_OR_RETURN(staging.arrived_, MakeEvent(/*timed=*/false));
  return staging;
}

absl::Status KvStaging::Reserve(int64_t bytes) {
  HEADSTART_RETURN_IF_ERROR(device_.Reserve(bytes).status());
  if (bytes <= host_bytes_) return absl::OkStatus();
  // A copy into the old memory may be under way.
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream_.get()), "copying KV"));
  host_bytes_ = 0;
  HEADSTART_ASSIGN_OR_RETURN(host_, AllocatePinned(bytes));
  host_bytes_ = bytes;
  return absl::OkStatus();
}

absl::Status KvStaging::Start(const KvPages& kv, int64_t token_begin, int64_t token_count,
                              cudaStream_t stream) {
  Forget();
  const int64_t bytes =
      kFlagBytes + 2 * int64_t{kv.shape.num_kv_heads} * token_count * kv.shape.head_dim * 2;
  HEADSTART_RETURN_IF_ERROR(Reserve(bytes));
  HEADSTART_ASSIGN_OR_RETURN(void* const device, device_.Reserve(bytes));
  const cudaStream_t own = stream_.get();
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaEventRecord(written_.get(), stream), "marking KV as written"));
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaStreamWaitEvent(own, written_.get(), cudaEventWaitDefault), "waiting for KV"));
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaMemsetAsync(device, 0, kFlagBytes, own), "clearing the finite check"));
  const KvGatherParams params{kv, token_begin, token_count, static_cast<char*>(device) + kFlagBytes,
                              static_cast<uint32_t*>(device)};
  HEADSTART_RETURN_IF_ERROR(ToStatus(LaunchKvGather(params, own), "gathering KV"));
  HEADSTART_RETURN_IF_ERROR(ToStatus(
      cudaMemcpyAsync(host_.get(), device, bytes, cudaMemcpyDeviceToHost, own), "copying KV"));
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventRecord(arrived_.get(), own), "copying KV"));
  pages_ = kv.pages;
  shape_ = kv.shape;
  token_begin_ = token_begin;
  token_count_ = token_count;
  return absl::OkStatus();
}

bool KvStaging::Holds(const KvPages& kv, int64_t token_begin, int64_t token_count) const {
  return kv.pages == pages_ && token_begin >= token_begin_ &&
         token_begin + token_count <= token_begin_ + token_count_;
}

absl::StatusOr<bool> KvStaging::Read(int64_t token_begin, int64_t token_count,
                                     std::byte* out) const {
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(arrived_.get()), "waiting for KV"));
  const char* held = static_cast<const char*>(host_.get());
  const bool all_finite = *reinterpret_cast<const uint32_t*>(held) == 0;
  const int64_t row_bytes = shape_.head_dim * DTypeBytes(DType::kBF16);
  const int64_t plane_bytes = token_count * row_bytes;
  const char* from = held + kFlagBytes + (token_begin - token_begin_) * row_bytes;
  bool finite = true;
  for (int64_t plane = 0; plane < 2 * shape_.num_kv_heads; ++plane) {
    std::memcpy(out + plane * plane_bytes, from + plane * token_count_ * row_bytes, plane_bytes);
    // Something that is held is not finite: see whether it is here.
    if (!all_finite) {
      finite = finite && AllFinite(reinterpret_cast<const uint16_t*>(out + plane * plane_bytes),
                                   plane_bytes / 2);
    }
  }
  return finite;
}

}  // namespace headstart::cuda
