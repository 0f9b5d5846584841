// Where finished KV goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace headstart {

struct KvChunkInfo {
  int32_t layer = 0;
  int64_t token_begin = 0;  // multiple of kBlockTokens
  int64_t token_count = 0;
};

// Takes KV as layers finish, on the engine's thread. For every chunk the engine calls Reserve,
// fills the memory (K, then V, each [num_kv_heads][token_count][head_dim]) and calls Commit.
class KvSink {
 public:
  virtual ~KvSink() = default;

  // Before the first chunk: the job was checked and got its memory; compute starts.
  virtual absl::Status OnStart() = 0;
  // May block until the reader has room. An error (cancelled, stalled, deadline) ends the job with
  // it.
  virtual absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo& chunk,
                                                        int64_t bytes) = 0;
  virtual absl::Status Commit() = 0;
};

// Takes KV and throws it away.
class DiscardingSink : public KvSink {
 public:
  absl::Status OnStart() override { return absl::OkStatus(); }
  absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo& /*chunk*/,
                                                int64_t bytes) override {
    memory_.resize(static_cast<size_t>(bytes));
    return absl::MakeSpan(memory_);
  }
  absl::Status Commit() override { return absl::OkStatus(); }

 protected:
  // The chunk that is reserved.
  absl::Span<const std::byte> memory() const { return memory_; }

 private:
  std::vector<std::byte> memory_;
};

}  // namespace headstart
