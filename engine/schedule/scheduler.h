// Who comes in, what runs next, when a request ends. No thread, no clock, no device, no waiting:
// time is an argument, so a simulation runs this very class.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/schedule/page_pool.h"
#include "engine/schedule/step.h"
#include "engine/schedule/token_rate.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/kv_part.h"
#include "engine/ship/shipment.h"

namespace headstart {

struct SchedulerOptions {
  KvGeometry geometry;
  int64_t piece_tokens = 8192;  // most tokens of a piece; a multiple of kBlockTokens
  int32_t num_slots = 16;       // requests that are between their first and their last piece
  // Both count from accepted to ended: requests that wait, compute, ship and are kept.
  int64_t max_requests = 64;
  int64_t max_tokens = 1 << 20;  // a longer prompt is taken when nothing else is in
  absl::Duration default_lease = absl::Seconds(60);
  absl::Duration max_lease = absl::Minutes(10);
  // A request whose KV in host memory nobody takes for this long, while a request (itself, too)
  // waits for room there, is given up.
  absl::Duration stall_timeout = absl::Seconds(30);
};

// Chunks of the KV of a whole piece: the least that host memory must hold.
int64_t PieceChunks(const SchedulerOptions& options);

struct SchedulerLoad {
  int64_t queued_requests = 0;  // accepted, compute has not begun
  int64_t queued_tokens = 0;
  int64_t inflight_requests = 0;  // accepted and not ended, all others included
  int64_t inflight_tokens = 0;
  int64_t waiting_for_room = 0;  // for host memory, with their next piece
  int64_t leases = 0;            // computed and kept
  int64_t lease_tokens = 0;      // prompt tokens of these
  // Since the start. Requests that came in and that ended: equal when nothing is in flight.
  int64_t acquired = 0;
  int64_t released = 0;
  int64_t leases_expired = 0;
};

// What Add answers.
struct Admitted {
  uint64_t key = 0;
  // Of those who came before and are not computed yet.
  int64_t requests_ahead = 0;
  int64_t tokens_ahead = 0;
  absl::Duration lease = absl::ZeroDuration();  // as granted; of detached KV
  std::shared_ptr<Shipment> shipment;
};

// Requests go first in, first out, one piece a step. Not thread-safe, but for the counts of the
// pools.
class Scheduler {
 public:
  // `pages` and `host` outlive the scheduler; `host` has PieceChunks at least. Closed until Open.
  Scheduler(const SchedulerOptions& options, PagePool* pages, HostPages* host, absl::Status closed);

  void Open() { closed_ = absl::OkStatus(); }
  // From now on every Add is refused with `why`; who is in stays in.
  void Close(absl::Status why) { closed_ = std::move(why); }
  const absl::Status& closed() const { return closed_; }

  // Takes a request that is valid for the model and fits into `pages`. `fetch_id`: of detached KV,
  // never used before. ALREADY_EXISTS: the request id is in flight. RESOURCE_EXHAUSTED: the queue
  // is full, or host memory for KV that nobody announced to fetch; says when to come back.
  // DEADLINE_EXCEEDED: past, or out of reach at the fastest rate measured lately even in half the
  // predicted time. INVALID_ARGUMENT: readers. Or whatever Close was given.
  absl::StatusOr<Admitted> Add(PrefillRequest request, const std::string& fetch_id, absl::Time now);

  // The next step, until Finish the only one; none when nothing can run.
  std::optional<Step> Next(absl::Time now);
  void Finish(const Step& step, StepResult result, absl::Time now);

  // Ends a request with `why`, whatever it does; one that ended already is left alone.
  void End(uint64_t key, const absl::Status& why);
  // Ends all.
  void EndAll(const absl::Status& why);

  // Ends what is due at `now`. Returns when to be called again, unless Add, Next or Finish are
  // called before.
  absl::Time Expire(absl::Time now);

  // ---- detached KV. NOT_FOUND (reason UNKNOWN_FETCH_ID), PERMISSION_DENIED: not `owner`'s.
  absl::StatusOr<std::shared_ptr<Shipment>> Find(const std::string& fetch_id,
                                                 const std::string& owner) const;
  // Another lease from now on, unless the KV is gone already. Returns the lease.
  absl::StatusOr<absl::Duration> Renew(const std::string& fetch_id, const std::string& owner,
                                       absl::Time now);
  absl::Status Release(const std::string& fetch_id, const std::string& owner);

  const SchedulerLoad& load() const { return load_; }

 private:
  struct Entry {
    PrefillRequest request;
    std::string fetch_id;
    std::shared_ptr<Shipment> shipment;
    PrefillResult result;  // adds up, piece by piece
    absl::Duration lease = absl::ZeroDuration();
    absl::Time expiry = absl::InfiniteFuture();  // the deadline, once computed the lease
    int64_t next_position = 0;
    int32_t slot = -1;
    PageRefs pages;
    std::vector<HostChunk> reserved;  // for all that is still to be computed
    int64_t num_reserved = 0;         // when it came
    bool queued = true;               // no piece of it was run
    bool in_step = false;
    bool computed = false;
    bool ended = false;  // while in a step: goes when that is finished
    std::atomic<bool> cancelled{false};
    std::optional<absl::Time> waits_for_room_since;
    // Host memory of it that the last Expire saw, and since when nobody is known to have taken any.
    int64_t held = 0;
    absl::Time held_since = absl::InfinitePast();
  };
  using Entries = std::map<uint64_t, std::unique_ptr<Entry>>;

  absl::Status CheckRoom(int64_t num_tokens) const;
  absl::Status CheckDeadline(int64_t num_tokens, absl::Time deadline, absl::Time now) const;
  absl::Duration RetryDelay(int64_t num_tokens) const;
  // Of the request's KV, in chunks of all layers.
  int64_t CountChunks(const PrefillRequest& request) const;
  absl::Status Detach(uint64_t key, Entry& entry);
  absl::Status Reserve(uint64_t key, Entry& entry);

  bool GiveSlotAndPages(Entry& entry);
  // Buffers for the piece; none when there is no room.
  std::optional<std::vector<HostChunk>> GiveRoom(uint64_t key, Entry& entry, int64_t count,
                                                 bool may_take, absl::Time now);
  Piece MakePiece(uint64_t key, Entry& entry, std::vector<TokenRange> chunks,
                  std::vector<HostChunk> host, absl::Time now);
  std::vector<TokenRange> NextChunks(const Entry& entry) const;
  int64_t NextTokens(const Entry& entry) const;
  void Advance(Entry& entry, const Piece& piece, PieceResult& result, absl::Time now);
  void FreeDevice(Entry& entry);
  // Why the request ends at its expiry.
  absl::Status WhyExpired(const Entry& entry) const;
  // The first of the requests that wait for host memory came to that then; InfiniteFuture: none
  // waits.
  absl::Time RoomWantedSince() const;
  // Whether it holds host memory, and too long nobody has taken any of it though it was wanted.
  bool IsStalled(uint64_t key, Entry& entry, absl::Time wanted_since, absl::Time now) const;
  void Remove(Entries::iterator found);
  absl::StatusOr<uint64_t> KeyOf(const std::string& fetch_id, const std::string& owner) const;

  const SchedulerOptions options_;
  PagePool& pages_;
  HostPages& host_;
  absl::Status closed_;
  TokenRate rate_;
  SchedulerLoad load_;
  int64_t reserved_chunks_ = 0;  // of all requests
  uint64_t last_key_ = 0;
  Entries entries_;  // by key: in the order in which they came
  std::unordered_map<std::string, uint64_t> by_request_id_;
  std::unordered_map<std::string, uint64_t> by_fetch_id_;
  std::vector<int32_t> free_slots_;
};

}  // namespace headstart
