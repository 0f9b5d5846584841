// What every pretended runner does with a piece's KV.
#pragma once

#include <memory>
#include <utility>

#include "engine/schedule/step.h"

namespace headstart {

// Publishes the piece's chunks of one layer.
inline void PublishLayer(Piece& piece, int32_t layer) {
  for (size_t i = 0; i < piece.chunks.size(); ++i) {
    HostChunk& memory = piece.host[layer * piece.chunks.size() + i];
    piece.shipment->Publish(
        {layer, piece.chunks[i], std::make_shared<const HostChunk>(std::move(memory))});
  }
}

inline void PublishAll(Piece& piece) {
  if (piece.chunks.empty()) return;
  const size_t num_layers = piece.host.size() / piece.chunks.size();
  for (size_t layer = 0; layer < num_layers; ++layer) {
    PublishLayer(piece, static_cast<int32_t>(layer));
  }
}

}  // namespace headstart
