// The KV of one prompt on its way from compute to those who fetch it: a log of chunks in the order
// in which they became ready, then an outcome. Compute appends and never waits; any number of
// readers follow, each at its own pace.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/request.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/kv_part.h"
#include "kernels/base/mutex.h"

namespace headstart {

// Tokens of one layer. Page i of the memory holds tokens from (begin / kBlockTokens + i) *
// kBlockTokens on, as the device's page does: [K, V][kv_heads][kBlockTokens][head_dim], in fp8 with
// scales in front (see Fp8PageBytes).
struct KvChunk {
  int32_t layer = 0;
  TokenRange tokens;
  std::shared_ptr<const HostChunk> memory;
};

class ShipmentReader;

// Thread-safe. Owned by the request and by each reader.
class Shipment : public std::enable_shared_from_this<Shipment> {
 public:
  // When a chunk's memory goes back.
  enum class Keep : uint8_t {
    kUntilTaken,         // by the one reader that there is
    kUntilAcknowledged,  // by every announced reader that it is for
    kUntilClosed,
  };

  // `announced`: the readers that must acknowledge, for kUntilAcknowledged. `manifest`: for the
  // readers.
  Shipment(const KvGeometry& geometry, Keep keep, std::vector<KvPart> announced,
           std::string manifest = "");

  // ---- compute

  // Compute begins.
  void Start();
  void Publish(KvChunk chunk);
  // All was published. The first outcome counts.
  void Complete(PrefillResult result);
  // The prompt failed, or its KV is no longer to be had: readers that have not seen the end get
  // `why`, all memory goes back.
  void Close(absl::Status why);

  // ---- readers

  // From chunk `from_chunk` of the part on; no part: follows the outcome only. INVALID_ARGUMENT:
  // see CheckPart. OUT_OF_RANGE (reason KV_GONE): the chunk was acknowledged, or was not made yet.
  // Or what Close was given. Opening acknowledges the chunks before.
  absl::StatusOr<std::unique_ptr<ShipmentReader>> Open(std::optional<KvPart> part,
                                                       int64_t from_chunk);

  // Of the KV as it is shipped.
  const KvGeometry& geometry() const { return geometry_; }
  // Chunks whose memory has not gone back, though a reader may have them on the wire still.
  int64_t kept_chunks() const;

 private:
  friend class ShipmentReader;
  struct Announced {
    KvPart part;
    int64_t seen_chunks = 0;           // of its layers
    std::deque<int64_t> unacked = {};  // their places in the log
    int64_t acknowledged = 0;
  };
  struct Entry {
    KvChunk chunk;
    int32_t acks_missing = 0;
  };
  using Dropped = std::vector<std::shared_ptr<const HostChunk>>;

  // Notes that chunks [0, num_chunks) of the part are not needed any more; what nobody needs is
  // moved to `dropped`, to be freed without the lock.
  void Acknowledge(const KvPart& part, int64_t num_chunks, Dropped& dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WakeReaders() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const KvGeometry geometry_;
  const Keep keep_;
  const std::string manifest_;
  mutable Mutex mutex_;
  std::vector<Entry> log_ ABSL_GUARDED_BY(mutex_);
  std::vector<Announced> announced_ ABSL_GUARDED_BY(mutex_);
  std::vector<ShipmentReader*> readers_ ABSL_GUARDED_BY(mutex_);
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  std::shared_ptr<const PrefillResult> result_ ABSL_GUARDED_BY(mutex_);
  absl::Status closed_ ABSL_GUARDED_BY(mutex_);
};

// One reader. Next belongs to one thread at a time, Acknowledge to another one.
class ShipmentReader {
 public:
  struct Waiting {};  // nothing yet: `wake` will be called
  struct Started {};  // compute began; once
  struct Chunk {
    uint32_t index = 0;  // among the chunks of the part
    KvChunk chunk;
  };
  struct Ended {
    absl::Status status;
    std::shared_ptr<const PrefillResult> result;  // with OK
  };
  using Event = std::variant<Waiting, Started, Chunk, Ended>;

  ~ShipmentReader();
  ShipmentReader(const ShipmentReader&) = delete;
  ShipmentReader& operator=(const ShipmentReader&) = delete;

  // Called once after every Waiting, when there is something, and whatever came before when the
  // shipment is closed: then Next says Ended. On any thread, under a lock of the shipment, so it
  // must only pass the word on.
  void WakeWith(std::function<void()> wake);

  Event Next();

  // Chunks [0, num_chunks) of the part are safe and will not be asked for again. INVALID_ARGUMENT
  // when that is fewer than before, or more than Next has given.
  absl::Status Acknowledge(int64_t num_chunks);

  const KvGeometry& geometry() const { return shipment_->geometry_; }
  // What PrefillRequest::manifest was.
  const std::string& manifest() const { return shipment_->manifest_; }
  // Everything was computed, whether Next has said so or not.
  bool computed() const;

  // Of the part, up to here, those before from_chunk included.
  int64_t num_chunks() const { return num_chunks_; }
  int64_t kv_bytes() const { return kv_bytes_; }

 private:
  friend class Shipment;
  ShipmentReader(std::shared_ptr<Shipment> shipment, std::optional<KvPart> part)
      : shipment_(std::move(shipment)), part_(part) {}

  // Whether Next would not wait.
  bool HasNews() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shipment_->mutex_);
  // Moves to the next entry of the log that belongs to the part; false when there is none yet.
  bool FindNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shipment_->mutex_);
  // Counts the entry that FindNext stopped at.
  void Pass() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shipment_->mutex_);

  const std::shared_ptr<Shipment> shipment_;
  const std::optional<KvPart> part_;
  std::function<void()> wake_;
  bool waiting_ = false;
  bool saw_start_ = false;
  size_t place_ = 0;          // in the log
  int64_t layer_chunks_ = 0;  // of the part's layers, before place_
  int64_t num_chunks_ = 0;
  int64_t kv_bytes_ = 0;
  int64_t acknowledged_ = 0;
};

}  // namespace headstart
