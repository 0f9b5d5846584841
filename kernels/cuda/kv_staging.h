// KV on its way to the host. What was written is gathered and copied to pinned memory on a stream
// of its own, while the stream that wrote it goes on; reading it out later is a copy within the
// host.
#pragma once

#include <array>
#include <cstddef>

#include "kernels/attention_params.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

// Holds the last two pieces that were taken: one is read out while the next is on its way.
class KvStaging {
 public:
  static absl::StatusOr<KvStaging> Create();

  // Device memory for pieces of `token_count` tokens.
  static int64_t DeviceBytes(const HeadShape& shape, int64_t token_count);
  // Allocates it, and as much on the host.
  absl::Status Reserve(const HeadShape& shape, int64_t token_count);

  // Takes tokens [token_begin, token_begin + token_count) as `stream` leaves them at this point, in
  // place of the piece before the last.
  absl::Status Start(const KvPages& kv, int64_t token_begin, int64_t token_count,
                     cudaStream_t stream);
  // Whether these tokens of these pages are among what is held.
  bool Holds(const KvPages& kv, int64_t token_begin, int64_t token_count) const;
  void Forget();

  // Waits, then writes held tokens as K, then V, each [num_kv_heads][token_count][head_dim]. False:
  // not all of them are finite.
  absl::StatusOr<bool> Read(const KvPages& kv, int64_t token_begin, int64_t token_count,
                            std::byte* out) const;

 private:
  struct Piece {
    Event arrived;
    DeviceScratch device;
    PinnedMemory host;
    int64_t host_bytes = 0;

    const void* pages = nullptr;
    HeadShape shape;
    int64_t token_begin = 0;
    int64_t token_count = 0;  // 0: holds nothing

    bool Holds(const KvPages& kv, int64_t begin, int64_t count) const;
  };

  absl::Status ReservePiece(int64_t bytes, Piece& piece);

  Stream stream_;
  Event written_;
  std::array<Piece, 2> pieces_;
  int next_ = 0;  // the piece that Start overwrites
};

}  // namespace headstart::cuda
