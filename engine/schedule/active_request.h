// A request from the moment it comes in until everything of it went back: what the scheduler knows
// of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/schedule/page_pool.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/shipment.h"
#include "kernels/base/instant.h"

namespace headstart {

struct ActiveRequest {
  uint64_t key = 0;
  PrefillRequest request;
  std::string fetch_id;
  std::shared_ptr<Shipment> shipment;
  PrefillResult result;  // adds up, piece by piece
  absl::Duration lease = absl::ZeroDuration();
  Instant expiry = Instant::InfiniteFuture();        // the deadline, once computed the lease
  Instant latest_start = Instant::InfiniteFuture();  // see Rank
  Instant waits_since = Instant::InfinitePast();     // since it came, or its last piece ended
  std::optional<absl::Duration> foreseen;            // until computed, without Interruptions

  // ---- how far it is

  // Tokens before `position` were computed or found, and given to the runner to ship. It moves from
  // one multiple of piece_tokens to the next.
  int64_t position = 0;
  // KV of tokens before `ready` lies in the pages: `position`, or beyond it what was found.
  int64_t ready = 0;
  // As far as pages were there at the last look, before it has any; and how many had been evicted.
  int64_t hint = 0;
  int64_t hint_evicted = 0;
  int64_t num_computed = 0;
  // What the slot has to hold behind `ready`; null at the start of a prompt.
  std::shared_ptr<const SlotState> state;
  bool slot_is_stale = true;  // pages or state are not what the slot holds

  bool queued = true;  // no piece of it was run
  bool in_step = false;
  Instant stepped_at = Instant::InfinitePast();  // into the last step
  bool computed = false;
  bool ended = false;  // while in a step: goes when that is finished
  std::atomic<bool> cancelled{false};

  // ---- what it holds

  int32_t slot = -1;
  PageRefs pages;
  std::vector<HostChunk> reserved;  // for all that is still to be computed
  int64_t num_reserved = 0;         // when it came
  std::optional<Instant> waits_for_room_since;
  // Host memory of it that the last Expire saw, and since when nobody is known to have taken any.
  int64_t held = 0;
  Instant held_since = Instant::InfinitePast();

  int64_t num_tokens() const { return request.num_tokens(); }
  bool detached() const { return request.detached.has_value(); }
  bool waits_for_compute() const { return !computed && !ended && !in_step; }
};

}  // namespace headstart
