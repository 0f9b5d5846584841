// A KvSink that keeps what it gets, and fails where a test wants it to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/ship/kv_sink.h"

namespace headstart::testing {

// One committed chunk.
struct SunkChunk {
  KvChunkInfo info;
  std::vector<std::byte> data;  // K, then V, each [num_kv_heads][token_count][head_dim]
};

class FakeSink : public KvSink {
 public:
  // When set, run before Reserve; an error is what Reserve returns.
  std::function<absl::Status(const KvChunkInfo&)> on_reserve;
  // When set, run before Commit keeps the chunk; an error is what Commit returns.
  std::function<absl::Status(const SunkChunk&)> on_commit;
  // What OnStart returns.
  absl::Status start_status;

  absl::Status OnStart() override;
  absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo& chunk, int64_t bytes) override;
  absl::Status Commit() override;

  int64_t num_starts() const { return num_starts_; }
  const std::vector<SunkChunk>& chunks() const { return chunks_; }

  // A layer's keys (values) of all tokens, put together from its chunks:
  // [num_kv_heads][num_tokens][head_dim]. `row_bytes` is head_dim elements. The chunks must cover
  // the tokens without gap or overlap; checked.
  std::vector<std::byte> Keys(int32_t layer, int32_t num_kv_heads, int64_t row_bytes) const;
  std::vector<std::byte> Values(int32_t layer, int32_t num_kv_heads, int64_t row_bytes) const;

 private:
  std::vector<std::byte> Plane(int32_t layer, int32_t num_kv_heads, int64_t row_bytes,
                               bool values) const;

  int64_t num_starts_ = 0;
  SunkChunk pending_;
  std::vector<SunkChunk> chunks_;
};

}  // namespace headstart::testing
