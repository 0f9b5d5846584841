// The way of finished KV from the device to the host: whole pages, a layer at a time, behind the
// layers that are still computed, straight into the memory from which they are sent.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/run/kv_cache.h"
#include "engine/run/request_slot.h"
#include "engine/schedule/step.h"
#include "engine/ship/kv_part.h"
#include "kernels/backend.h"

namespace headstart {

// Belongs to the thread that computes.
class CopyOut {
 public:
  // `kv` and `backend` must outlive this. `num_slots`: of the requests whose pieces come.
  static absl::StatusOr<std::unique_ptr<CopyOut>> Create(const KvGeometry& geometry,
                                                         int32_t num_slots, const KvCache& kv,
                                                         Backend& backend);

  // Starts to copy the layer's KV of piece `index` of a step, as the operations so far leave it.
  // Takes the piece's host memory for it. The piece and its slot must outlive the copy.
  absl::Status Take(int32_t layer, Piece& piece, size_t index, const RequestSlot& slot);

  // Publishes what has arrived, and waits until at most `most_left` layers are under way. A value
  // that is not finite is its piece's error (NonFiniteError names the layer): nothing of that layer
  // is published, nor of the piece's later ones. An error of the backend is returned.
  absl::Status Publish(size_t most_left, StepResult& results);

  // After an error: waits for all copies, publishes nothing.
  void Abandon();

 private:
  struct Pending {
    std::unique_ptr<PendingCopy> copy;
    size_t index = 0;  // of the piece
    int64_t first_position = 0;
    std::shared_ptr<Shipment> shipment;
    std::vector<KvChunk> chunks;
    const uint32_t* not_finite = nullptr;
  };

  CopyOut(const KvGeometry& geometry, const KvCache& kv, Backend& backend, HostBuffer flags)
      : geometry_(geometry), kv_(kv), backend_(backend), flags_(std::move(flags)) {}

  const KvGeometry geometry_;
  const KvCache& kv_;
  Backend& backend_;
  const HostBuffer flags_;  // u32 [num_slots][num_layers]: what the device says is not finite
  std::deque<Pending> pending_;
};

}  // namespace headstart
