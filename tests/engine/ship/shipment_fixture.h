// Shipments of a small model, chunks for them, and short names for both.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "engine/ship/shipment.h"
#include "tests/testing/status_matchers.h"

namespace headstart {

using Keep = Shipment::Keep;

inline constexpr int64_t kChunkTokens = kBlockTokens;
inline constexpr int32_t kLayers = 4;
inline constexpr uint64_t kOwner = 1;

// Four layers of two KV heads; a chunk is a page.
inline constexpr KvGeometry kGeometry = {
    .num_layers = kLayers, .heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}};

inline KvPart Layers(int32_t begin, int32_t count) {
  return {.layer_begin = begin, .layer_count = count, .head_count = 2};
}

inline KvPart Heads(int32_t begin, int32_t count) {
  return {.layer_count = kLayers, .head_begin = begin, .head_count = count};
}

inline KvPart Stripe(KvPart part, int32_t index, int32_t count) {
  part.stripe_index = index;
  part.stripe_count = count;
  return part;
}

// Layer and first token: what a chunk is called here.
using Name = std::pair<int32_t, int64_t>;

inline Name NameOf(const KvChunk& chunk) { return {chunk.layer, chunk.tokens.begin}; }

inline PrefillResult WithToken(int32_t id) {
  PrefillResult result;
  result.first_token.id = id;
  return result;
}

class ShipmentTest : public ::testing::Test {
 protected:
  std::shared_ptr<Shipment> Make(Keep keep, std::vector<KvPart> announced = {}) {
    return std::make_shared<Shipment>(kGeometry, keep, std::move(announced));
  }

  std::unique_ptr<ShipmentReader> Open(Shipment& shipment, std::optional<KvPart> part,
                                       int64_t from_chunk = 0) {
    auto reader = shipment.Open(part, from_chunk);
    EXPECT_OK(reader);
    return reader.ok() ? *std::move(reader) : nullptr;
  }

  KvChunk NewChunk(int32_t layer, int64_t index) {
    std::vector<HostChunk> memory = pages_.Take(1, kOwner);
    EXPECT_EQ(memory.size(), 1);
    return {layer,
            {index * kChunkTokens, kChunkTokens},
            std::make_shared<const HostChunk>(std::move(memory[0]))};
  }

  // `count` chunks of every layer, layer by layer, as a piece makes them.
  void PublishPiece(Shipment& shipment, int64_t first, int64_t count) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int64_t i = first; i < first + count; ++i) shipment.Publish(NewChunk(layer, i));
    }
  }

  // The chunks that the reader has until it waits or ends; `Started` is left out.
  std::vector<Name> ReadAll(ShipmentReader& reader) {
    std::vector<Name> names;
    for (;;) {
      ShipmentReader::Event event = reader.Next();
      if (std::holds_alternative<ShipmentReader::Started>(event)) continue;
      const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
      if (chunk == nullptr) return names;
      names.push_back(NameOf(chunk->chunk));
    }
  }

  absl::Status EndOf(ShipmentReader& reader) {
    const ShipmentReader::Event event = reader.Next();
    const auto* ended = std::get_if<ShipmentReader::Ended>(&event);
    return ended == nullptr ? absl::UnknownError("not ended") : ended->status;
  }

  int64_t held() const { return pages_.held(kOwner); }

  HostPages pages_{nullptr, kGeometry.chunk_bytes(), 1000};
};

inline bool IsWaiting(const ShipmentReader::Event& event) {
  return std::holds_alternative<ShipmentReader::Waiting>(event);
}

}  // namespace headstart
