#include "tests/testing/kv_collector.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <variant>

#include "kernels/base/check.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart::testing {
namespace {

// The chunk's pages, put together to planes.
CollectedChunk Collect(const KvChunk& chunk, const KvGeometry& geometry) {
  CollectedChunk out{chunk.layer, chunk.tokens, {}};
  const int64_t row = geometry.heads.head_dim * DTypeBytes(geometry.dtype);
  const int64_t planes = int64_t{2} * geometry.heads.num_kv_heads;
  out.data.resize(static_cast<size_t>(planes * chunk.tokens.count * row));
  const int64_t first_page = chunk.tokens.begin / kBlockTokens;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < chunk.tokens.count; ++i) {
      const int64_t token = chunk.tokens.begin + i;
      const int64_t page = token / kBlockTokens - first_page;
      const std::byte* from = chunk.memory->data() + page * geometry.page_bytes() +
                              (plane * kBlockTokens + token % kBlockTokens) * row;
      std::memcpy(out.data.data() + (plane * chunk.tokens.count + i) * row, from,
                  static_cast<size_t>(row));
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const EngineOptions& options,
                                                   std::unique_ptr<Backend> backend) {
  HEADSTART_ASSIGN_OR_RETURN(ResolvedModel model, ResolveModel(options, *backend));
  return Engine::Create(std::move(model), std::move(backend), nullptr);
}

absl::StatusOr<PrefillResult> Drain(
    ShipmentReader& reader, const std::function<void(const ShipmentReader::Chunk&)>& on_chunk) {
  WakeSignal woken;
  reader.WakeWith([&woken] { woken.Notify(); });
  ShipmentReader::Event event;
  do {
    const uint64_t seen = woken.count();
    event = reader.Next();
    if (const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event)) {
      if (on_chunk) on_chunk(*chunk);
    } else if (std::holds_alternative<ShipmentReader::Waiting>(event)) {
      woken.WaitBeyond(seen, Instant::InfiniteFuture());
    }
  } while (!std::holds_alternative<ShipmentReader::Ended>(event));
  reader.WakeWith(nullptr);  // it is woken once more when the shipment is closed
  const auto& ended = std::get<ShipmentReader::Ended>(event);
  if (!ended.status.ok()) return ended.status;
  return *ended.result;
}

absl::StatusOr<PrefillResult> KvCollector::Run(Engine& engine, PrefillRequest request) {
  engine.Open();
  HEADSTART_RETURN_IF_ERROR(engine.Validate(request));
  HEADSTART_ASSIGN_OR_RETURN(Submission submission, engine.Submit(std::move(request)));
  if (on_submitted) on_submitted(submission);
  const auto result = Drain(*submission.reader, [&](const ShipmentReader::Chunk& chunk) {
    chunks_.push_back(Collect(chunk.chunk, engine.geometry()));
  });
  submission.reader.reset();
  engine.End(submission.key, absl::CancelledError("collected"));
  HEADSTART_CHECK(engine.WaitUntilIdle(Instant::Now() + absl::Seconds(60)));
  return result;
}

std::vector<std::byte> KvCollector::Keys(int32_t layer, int32_t num_kv_heads,
                                         int64_t row_bytes) const {
  return Plane(layer, num_kv_heads, row_bytes, /*values=*/false);
}

std::vector<std::byte> KvCollector::Values(int32_t layer, int32_t num_kv_heads,
                                           int64_t row_bytes) const {
  return Plane(layer, num_kv_heads, row_bytes, /*values=*/true);
}

std::vector<std::byte> KvCollector::Plane(int32_t layer, int32_t num_kv_heads, int64_t row_bytes,
                                          bool values) const {
  int64_t num_tokens = 0;
  for (const CollectedChunk& chunk : chunks_) {
    if (chunk.layer != layer) continue;
    HEADSTART_CHECK(chunk.tokens.begin == num_tokens);
    num_tokens += chunk.tokens.count;
  }
  std::vector<std::byte> plane(static_cast<size_t>(num_kv_heads * num_tokens * row_bytes));
  for (const CollectedChunk& chunk : chunks_) {
    if (chunk.layer != layer) continue;
    const int64_t head_bytes = chunk.tokens.count * row_bytes;
    HEADSTART_CHECK(static_cast<int64_t>(chunk.data.size()) == 2 * num_kv_heads * head_bytes);
    const std::byte* source = chunk.data.data() + (values ? num_kv_heads * head_bytes : 0);
    for (int32_t head = 0; head < num_kv_heads; ++head) {
      std::memcpy(plane.data() + (head * num_tokens + chunk.tokens.begin) * row_bytes,
                  source + head * head_bytes, static_cast<size_t>(head_bytes));
    }
  }
  return plane;
}

}  // namespace headstart::testing
