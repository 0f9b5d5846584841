#include "tests/testing/fake_sink.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart::testing {

absl::Status FakeSink::OnStart() {
  ++num_starts_;
  return start_status;
}

absl::StatusOr<absl::Span<std::byte>> FakeSink::Reserve(const KvChunkInfo& chunk, int64_t bytes) {
  if (on_reserve) HEADSTART_RETURN_IF_ERROR(on_reserve(chunk));
  pending_.info = chunk;
  pending_.data.assign(static_cast<size_t>(bytes), std::byte{0});
  return absl::MakeSpan(pending_.data);
}

absl::Status FakeSink::Commit() {
  if (on_commit) HEADSTART_RETURN_IF_ERROR(on_commit(pending_));
  chunks_.push_back(std::move(pending_));
  pending_ = {};
  return absl::OkStatus();
}

std::vector<std::byte> FakeSink::Keys(int32_t layer, int32_t num_kv_heads,
                                      int64_t row_bytes) const {
  return Plane(layer, num_kv_heads, row_bytes, /*values=*/false);
}

std::vector<std::byte> FakeSink::Values(int32_t layer, int32_t num_kv_heads,
                                        int64_t row_bytes) const {
  return Plane(layer, num_kv_heads, row_bytes, /*values=*/true);
}

std::vector<std::byte> FakeSink::Plane(int32_t layer, int32_t num_kv_heads, int64_t row_bytes,
                                       bool values) const {
  int64_t num_tokens = 0;
  for (const SunkChunk& chunk : chunks_) {
    if (chunk.info.layer != layer) continue;
    HEADSTART_CHECK(chunk.info.token_begin == num_tokens);
    num_tokens += chunk.info.token_count;
  }
  std::vector<std::byte> plane(static_cast<size_t>(num_kv_heads * num_tokens * row_bytes));
  for (const SunkChunk& chunk : chunks_) {
    if (chunk.info.layer != layer) continue;
    const int64_t head_bytes = chunk.info.token_count * row_bytes;
    HEADSTART_CHECK(static_cast<int64_t>(chunk.data.size()) == 2 * num_kv_heads * head_bytes);
    const std::byte* source = chunk.data.data() + (values ? num_kv_heads * head_bytes : 0);
    for (int32_t head = 0; head < num_kv_heads; ++head) {
      std::memcpy(plane.data() + (head * num_tokens + chunk.info.token_begin) * row_bytes,
                  source + head * head_bytes, static_cast<size_t>(head_bytes));
    }
  }
  return plane;
}

}  // namespace headstart::testing
