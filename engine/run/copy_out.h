// The way of finished KV from the device to the host: whole pages, a layer at a time, behind the
// layers that are still computed, straight into the memory from which they are sent. Those that are
// shipped as fp8 are quantised first.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/run/kv_cache.h"
#include "engine/run/kv_staging.h"
#include "engine/schedule/step.h"
#include "engine/ship/kv_part.h"
#include "kernels/backend.h"

namespace headstart {

// A piece whose KV goes out, and where it is said what became of that. Both outlive its copies.
struct OutgoingPiece {
  Piece* piece = nullptr;
  PieceResult* result = nullptr;
  // Its place among Take's flags; -1: its KV is known to be finite.
  int64_t flag = -1;
};

// One line for all steps that are under way, those inside others, too. Belongs to the thread that
// computes.
class CopyOut {
 public:
  // `kv` and `backend` must outlive this.
  CopyOut(const KvCache& kv, KvStaging staging, Backend& backend)
      : kv_(kv), staging_(std::move(staging)), backend_(backend) {}

  // Starts to copy a layer's KV of the pieces of a step, as the operations so far leave it, and
  // `flags` (u32 each), which say what of it is not finite. Takes the pieces' host memory for it;
  // leaves pieces that have failed alone. Publishes older layers where the memory for fp8 has no
  // room otherwise.
  absl::Status Take(int32_t layer, absl::Span<const OutgoingPiece> pieces,
                    const std::optional<HostCopy>& flags);

  // Publishes what has arrived, and waits until at most `most_left` layers are under way. A value
  // that is not finite is its piece's error (NonFiniteError names the layer): nothing of that layer
  // is published, nor of the piece's later ones. An error of the backend is returned.
  absl::Status Publish(size_t most_left);

  // After an error of the backend: waits for all copies, publishes nothing.
  void Abandon();

 private:
  // What a piece gets of a layer.
  struct Arrival {
    const Piece* piece = nullptr;
    PieceResult* result = nullptr;
    const uint32_t* not_finite = nullptr;  // or null
    std::vector<KvChunk> chunks;
  };
  struct Pending {
    std::unique_ptr<PendingCopy> copy;
    int32_t layer = 0;
    std::vector<Arrival> arrivals;
    int64_t staged_runs = 0;  // of the staging memory, whose room comes back
  };
  // A layer of a step as it is taken: what has not begun to be copied.
  struct Taking {
    int32_t layer = 0;
    const std::optional<HostCopy>& flags;
    Pending next = {};
    std::vector<HostCopy> copies = {};
  };
  // Some chunks of a piece, side by side.
  struct Run {
    size_t begin = 0, end = 0;  // in Piece::chunks
  };

  absl::Status TakePiece(const OutgoingPiece& piece, Taking& taking);
  // Adds the run's chunks and copies. `staged`: where its pages lie as fp8, one behind the other,
  // or null.
  void AddChunks(const Run& run, const std::byte* staged, Piece& piece, Taking& taking) const;
  // Chunks from `begin` on that are staged together.
  Run StagedRun(absl::Span<const TokenRange> chunks, size_t begin) const;
  // Where a run's pages lie as fp8; null while there is no room.
  absl::StatusOr<const std::byte*> Stage(int32_t layer, const Run& run, const Piece& piece);
  // Begins the copies that were taken so far, if there are any.
  absl::Status Start(Taking& taking);
  absl::Status PublishOldest();

  const KvCache& kv_;
  KvStaging staging_;
  Backend& backend_;
  std::deque<Pending> pending_;
};

}  // namespace headstart
