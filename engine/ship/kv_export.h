// Hands the KV of a finished layer to a sink.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "engine/ship/kv_sink.h"
#include "kernels/backend.h"

namespace headstart {

// A chunk holds as many whole pages as fit, and at least one: what gRPC moves best is 256 KiB to
// 1 MiB.
inline constexpr int64_t kMaxChunkBytes = 1 << 20;

class KvExport {
 public:
  // Both must outlive this.
  KvExport(Backend& backend, KvSink& sink) : backend_(backend), sink_(sink) {}

  // Takes note of tokens [token_begin, token_begin + token_count) of the layer, and hands over what
  // was noted before: by then the backend has been given the next layer, so a device computes while
  // the host copies. token_begin: multiple of kBlockTokens. INTERNAL names the layer when a value
  // is not finite; the sink's errors are passed on.
  absl::Status ExportLayer(int32_t layer, const KvPages& kv, int64_t token_begin,
                           int64_t token_count);
  // Hands over what was noted last.
  absl::Status Flush();

  // Time inside the sink so far.
  double sink_seconds() const { return sink_seconds_; }

 private:
  struct Piece {
    KvPages kv;
    KvChunkInfo tokens;
  };

  absl::Status ExportChunk(const KvPages& kv, const KvChunkInfo& chunk, int64_t bytes);

  Backend& backend_;
  KvSink& sink_;
  std::optional<Piece> noted_;
  double sink_seconds_ = 0;
};

}  // namespace headstart
