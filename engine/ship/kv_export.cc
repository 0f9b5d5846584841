#include "engine/ship/kv_export.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/stopwatch.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// The same error, saying where it was found. Payloads stay (kernels/base/nonfinite.h).
absl::Status WithPlace(const absl::Status& error, const KvChunkInfo& chunk) {
  absl::Status placed(error.code(), absl::StrCat("KV of layer ", chunk.layer, ", tokens from ",
                                                 chunk.token_begin, " on: ", error.message()));
  error.ForEachPayload([&placed](absl::string_view type, const absl::Cord& payload) {
    placed.SetPayload(type, payload);
  });
  return placed;
}

}  // namespace

absl::Status KvExport::ExportLayer(int32_t layer, const KvPages& kv, int64_t token_begin,
                                   int64_t token_count) {
  HEADSTART_RETURN_IF_ERROR(Flush());
  noted_ = Piece{kv, {layer, token_begin, token_count}};
  return absl::OkStatus();
}

absl::Status KvExport::Flush() {
  if (!noted_.has_value()) return absl::OkStatus();
  const auto [kv, tokens] = *std::exchange(noted_, std::nullopt);
  const int64_t page_bytes = kv.page_elements() * DTypeBytes(kv.dtype);
  const int64_t chunk_tokens = std::max<int64_t>(1, kMaxChunkBytes / page_bytes) * kBlockTokens;
  for (int64_t done = 0; done < tokens.token_count; done += chunk_tokens) {
    const int64_t count = std::min(chunk_tokens, tokens.token_count - done);
    HEADSTART_RETURN_IF_ERROR(ExportChunk(kv, {tokens.layer, tokens.token_begin + done, count},
                                          page_bytes / kBlockTokens * count));
  }
  return absl::OkStatus();
}

absl::Status KvExport::ExportChunk(const KvPages& kv, const KvChunkInfo& chunk, int64_t bytes) {
  const Stopwatch reserving;
  HEADSTART_ASSIGN_OR_RETURN(const absl::Span<std::byte> memory, sink_.Reserve(chunk, bytes));
  sink_seconds_ += reserving.seconds();
  if (static_cast<int64_t>(memory.size()) != bytes) {
    return absl::InternalError(
        absl::StrCat("the sink gave ", memory.size(), " bytes for a chunk of ", bytes));
  }
  const absl::Status read = backend_.ReadKv(kv, chunk.token_begin, chunk.token_count, memory);
  if (!read.ok()) return WithPlace(read, chunk);
  const Stopwatch committing;
  HEADSTART_RETURN_IF_ERROR(sink_.Commit());
  sink_seconds_ += committing.seconds();
  return absl::OkStatus();
}

}  // namespace headstart
