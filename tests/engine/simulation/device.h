// What lies on the pretended device: for each page and layer what its KV depends on, for each slot
// how far it is. Pieces read and write it as real ones do, so KV of another prompt shows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/schedule/step.h"
#include "tests/engine/simulation/model.h"

namespace headstart::simulation {

class Device {
 public:
  Device(int64_t num_pages, int32_t num_slots, int32_t num_layers, Model* model)
      : model_(*model),
        contents_(static_cast<size_t>(num_layers),
                  std::vector<uint64_t>(static_cast<size_t>(num_pages))),
        slots_(static_cast<size_t>(num_slots)) {}

  // The piece may use what it reads, and write what it writes.
  void Begin(const Piece& piece, const RequestBook& request);
  // Its pages from `begin` on are about to be written.
  void Clear(const Piece& piece, const RequestBook& request, int64_t begin);
  void RunLayer(const Piece& piece, const RequestBook& request, int32_t layer);
  // The state behind the piece.
  std::shared_ptr<const SlotState> End(const Piece& piece);

  // Of a page of the piece's prompt.
  uint64_t ContentOf(const Piece& piece, int32_t layer, int64_t page) const {
    return contents_[static_cast<size_t>(layer)]
                    [static_cast<size_t>(piece.pages[static_cast<size_t>(page)])];
  }
  // A planted bug: nothing lies there.
  void Forget(int32_t page) {
    for (auto& layer : contents_) layer[static_cast<size_t>(page)] = 0;
  }

 private:
  // A request between two pieces.
  struct Slot {
    uint64_t request = 0;
    int64_t position = 0;
    uint64_t content = 0;  // of the page before
    bool operator==(const Slot&) const = default;
  };
  // What the slot must hold before the piece.
  Slot Before(const Piece& piece) const;
  void CheckSlot(const Piece& piece, const RequestBook& request);

  Model& model_;
  std::vector<std::vector<uint64_t>> contents_;  // [layer][page]
  std::vector<Slot> slots_;
};

}  // namespace headstart::simulation
