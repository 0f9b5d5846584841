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

int64_t PieceBytes(const HeadShape& shape, int64_t token_count) {
  return kFlagBytes +
         2 * int64_t{shape.num_kv_heads} * token_count * shape.head_dim * DTypeBytes(DType::kBF16);
}

}  // namespace

absl::StatusOr<KvStaging> KvStaging::Create() {
  KvStaging staging;
  HEADSTART_ASSIGN_OR_RETURN(staging.stream_, MakeStream(/*urgent=*/true));
  HEADSTART_ASSIGN_OR_RETURN(staging.written_, MakeEvent(/*timed=*/false));
  for (Piece& piece : staging.pieces_) {
    HEADSTART_ASSIGN_OR_RETURN(piece.arrived, MakeEvent(/*timed=*/false));
  }
  return staging;
}

int64_t KvStaging::DeviceBytes(const HeadShape& shape, int64_t token_count) {
  return 2 * PieceBytes(shape, token_count);
}

absl::Status KvStaging::Reserve(const HeadShape& shape, int64_t token_count) {
  for (Piece& piece : pieces_) {
    HEADSTART_RETURN_IF_ERROR(ReservePiece(PieceBytes(shape, token_count), piece));
  }
  return absl::OkStatus();
}

absl::Status KvStaging::ReservePiece(int64_t bytes, Piece& piece) {
  HEADSTART_RETURN_IF_ERROR(piece.device.Reserve(bytes).status());
  if (bytes <= piece.host_bytes) return absl::OkStatus();
  // A copy into the old memory may be under way.
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream_.get()), "copying KV"));
  piece.host_bytes = 0;
  HEADSTART_ASSIGN_OR_RETURN(piece.host, AllocatePinned(bytes));
  piece.host_bytes = bytes;
  return absl::OkStatus();
}

void KvStaging::Forget() {
  for (Piece& piece : pieces_) piece.token_count = 0;
}

absl::Status KvStaging::Start(const KvPages& kv, int64_t token_begin, int64_t token_count,
                              cudaStream_t stream) {
  Piece& piece = pieces_[next_];
  next_ ^= 1;
  piece.token_count = 0;
  const int64_t bytes = PieceBytes(kv.shape, token_count);
  HEADSTART_RETURN_IF_ERROR(ReservePiece(bytes, piece));
  HEADSTART_ASSIGN_OR_RETURN(void* const device, piece.device.Reserve(bytes));
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
      cudaMemcpyAsync(piece.host.get(), device, bytes, cudaMemcpyDeviceToHost, own), "copying KV"));
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventRecord(piece.arrived.get(), own), "copying KV"));
  piece.pages = kv.pages;
  piece.shape = kv.shape;
  piece.token_begin = token_begin;
  piece.token_count = token_count;
  return absl::OkStatus();
}

bool KvStaging::Piece::Holds(const KvPages& kv, int64_t begin, int64_t count) const {
  return kv.pages == pages && begin >= token_begin && begin + count <= token_begin + token_count;
}

bool KvStaging::Holds(const KvPages& kv, int64_t token_begin, int64_t token_count) const {
  return std::any_of(pieces_.begin(), pieces_.end(),
                     [&](const Piece& piece) { return piece.Holds(kv, token_begin, token_count); });
}

absl::StatusOr<bool> KvStaging::Read(const KvPages& kv, int64_t token_begin, int64_t token_count,
                                     std::byte* out) const {
  // The later piece, should both hold them.
  const Piece& last = pieces_[next_ ^ 1];
  const Piece& piece = last.Holds(kv, token_begin, token_count) ? last : pieces_[next_];
  HEADSTART_RETURN_IF_ERROR(WaitFor(piece.arrived, "waiting for KV"));
  const char* held = static_cast<const char*>(piece.host.get());
  const bool all_finite = *reinterpret_cast<const uint32_t*>(held) == 0;
  const int64_t row_bytes = piece.shape.head_dim * DTypeBytes(DType::kBF16);
  const int64_t plane_bytes = token_count * row_bytes;
  const char* from = held + kFlagBytes + (token_begin - piece.token_begin) * row_bytes;
  bool finite = true;
  for (int64_t plane = 0; plane < 2 * piece.shape.num_kv_heads; ++plane) {
    std::memcpy(out + plane * plane_bytes, from + plane * piece.token_count * row_bytes,
                plane_bytes);
    // Something that is held is not finite: see whether it is here.
    if (!all_finite) {
      finite = finite && AllFinite(reinterpret_cast<const uint16_t*>(out + plane * plane_bytes),
                                   plane_bytes / 2);
    }
  }
  return finite;
}

}  // namespace headstart::cuda
