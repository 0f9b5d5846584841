// KV on its way to the host. What was written last is gathered and copied to pinned memory on a
// stream of its own, while the stream that wrote it goes on; reading it out later is a copy within
// the host.
#pragma once

#include <cstddef>

#include "kernels/attention_params.h"
#include "kernels/cuda/cuda_resources.h"

namespace headstart::cuda {

class KvStaging {
 public:
  static absl::StatusOr<KvStaging> Create();

  // Takes tokens [token_begin, token_begin + token_count) as `stream` leaves them at this point.
  // Overwrites what was held.
  absl::Status Start(const KvPages& kv, int64_t token_begin, int64_t token_count,
                     cudaStream_t stream);
  // Whether these tokens of these pages are among what was taken last.
  bool Holds(const KvPages& kv, int64_t token_begin, int64_t token_count) const;
  void Forget() { token_count_ = 0; }

  // Waits, then writes held tokens as K, then V, each [num_kv_heads][token_count][head_dim]. False:
  // not all of them are finite.
  absl::StatusOr<bool> Read(int64_t token_begin, int64_t token_count, std::byte* out) const;

 private:
  absl::Status Reserve(int64_t bytes);

  Stream stream_;
  Event written_, arrived_;
  DeviceScratch device_;
  PinnedMemory host_;
  int64_t host_bytes_ = 0;

  const void* pages_ = nullptr;
  HeadShape shape_;
  int64_t token_begin_ = 0;
  int64_t token_count_ = 0;  // 0: holds nothing
};

}  // namespace headstart::cuda
