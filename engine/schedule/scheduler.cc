#include "engine/schedule/scheduler.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/check.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// How often those who hold host memory are looked at while others wait for it.
constexpr absl::Duration kStallCheckInterval = absl::Milliseconds(100);

}  // namespace

int64_t PieceChunks(const SchedulerOptions& options) {
  const KvGeometry& geometry = options.geometry;
  const auto chunks = CutIntoChunks(0, options.piece_tokens, 0, geometry.chunk_pages).size();
  return static_cast<int64_t>(chunks) * geometry.num_layers;
}

Scheduler::Scheduler(const SchedulerOptions& options, PagePool* pages, HostPages* host,
                     absl::Status closed)
    : options_(options),
      pages_(*pages),
      host_(*host),
      prefixes_(pages, options.piece_tokens),
      closed_(std::move(closed)) {
  HEADSTART_CHECK(host->num_chunks() >= PieceChunks(options));
  free_slots_.resize(static_cast<size_t>(options.num_slots));
  std::iota(free_slots_.rbegin(), free_slots_.rend(), 0);
}

// ---- the end

void Scheduler::FreeDevice(Entry& entry) {
  if (entry.slot >= 0) free_slots_.push_back(entry.slot);
  entry.slot = -1;
  entry.pages = PageRefs();
}

void Scheduler::End(uint64_t key, const absl::Status& why) {
  const auto found = entries_.find(key);
  if (found == entries_.end() || found->second->ended) return;
  Entry& entry = *found->second;
  entry.ended = true;
  entry.cancelled.store(true, std::memory_order_relaxed);
  entry.shipment->Close(why);
  entry.reserved.clear();
  by_request_id_.erase(entry.request.request_id);
  if (!entry.in_step) Remove(found);
}

void Scheduler::EndAll(const absl::Status& why) {
  std::vector<uint64_t> keys;
  for (const auto& [key, entry] : entries_) keys.push_back(key);
  for (const uint64_t key : keys) End(key, why);
}

// Everything that a request held goes back here.
void Scheduler::Remove(Entries::iterator found) {
  Entry& entry = *found->second;
  const int64_t num_tokens = entry.num_tokens();
  FreeDevice(entry);
  if (entry.queued) {
    --load_.queued_requests;
    load_.queued_tokens -= num_tokens;
  }
  if (entry.waits_for_room_since.has_value()) --load_.waiting_for_room;
  --load_.inflight_requests;
  load_.inflight_tokens -= num_tokens;
  ++load_.released;
  if (entry.computed && entry.detached()) {
    --load_.leases;
    load_.lease_tokens -= num_tokens;
  }
  reserved_chunks_ -= entry.num_reserved;
  by_fetch_id_.erase(entry.fetch_id);
  entries_.erase(found);
}

Instant Scheduler::Expire(Instant now) {
  const Instant wanted_since = RoomWantedSince();
  Instant next = wanted_since <= now ? now + kStallCheckInterval : Instant::InfiniteFuture();
  std::vector<std::pair<uint64_t, absl::Status>> due;
  for (auto& [key, entry] : entries_) {
    if (entry->ended) continue;
    if (entry->expiry <= now) {
      due.emplace_back(key, WhyExpired(*entry));
    } else if (IsStalled(*entry, wanted_since, now)) {
      due.emplace_back(key, MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientStalled,
                                      absl::StrCat("nobody took KV for ",
                                                   absl::FormatDuration(options_.stall_timeout),
                                                   " while host memory was full")));
    } else {
      next = std::min(next, entry->expiry);
    }
  }
  for (const auto& [key, why] : due) {
    if (why.code() == absl::StatusCode::kDeadlineExceeded &&
        ReasonOf(why) == ErrorReason::kLeaseExpired) {
      ++load_.leases_expired;
    }
    End(key, why);
  }
  return next;
}

absl::Status Scheduler::WhyExpired(const Entry& entry) const {
  if (entry.computed && entry.detached()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kLeaseExpired,
                     absl::StrCat("the lease of ", absl::FormatDuration(entry.lease), " ended"));
  }
  const absl::string_view where = entry.queued     ? "in the queue"
                                  : entry.computed ? "while the client did not take KV"
                                                   : "before the prompt was computed";
  return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                   absl::StrCat("the deadline passed ", where));
}

Instant Scheduler::RoomWantedSince() const {
  Instant since = Instant::InfiniteFuture();
  for (const auto& [key, entry] : entries_) {
    if (!entry->ended) since = std::min(since, entry->waits_for_room_since.value_or(since));
  }
  return since;
}

bool Scheduler::IsStalled(Entry& entry, Instant wanted_since, Instant now) const {
  const int64_t held = host_.held(entry.key);
  const bool moves = held == 0 || held != entry.held || entry.in_step;
  entry.held = held;
  if (moves || entry.num_reserved > 0) entry.held_since = now;
  return now - std::max(entry.held_since, wanted_since) >= options_.stall_timeout;
}

// ---- detached KV

absl::StatusOr<uint64_t> Scheduler::KeyOf(const std::string& fetch_id,
                                          const std::string& owner) const {
  const auto found = by_fetch_id_.find(fetch_id);
  if (found == by_fetch_id_.end() || entries_.at(found->second)->ended) {
    return MakeError(absl::StatusCode::kNotFound, ErrorReason::kUnknownFetchId,
                     "fetch_id: never given out, released, expired, or its prompt failed");
  }
  const std::string& wanted = entries_.at(found->second)->request.detached->owner;
  if (!wanted.empty() && wanted != owner) {
    return MakeError(absl::StatusCode::kPermissionDenied, ErrorReason::kPeerNotAllowed,
                     "fetch_id: was given to a client with another certificate");
  }
  return found->second;
}

absl::StatusOr<std::shared_ptr<Shipment>> Scheduler::Find(const std::string& fetch_id,
                                                          const std::string& owner) const {
  HEADSTART_ASSIGN_OR_RETURN(const uint64_t key, KeyOf(fetch_id, owner));
  return entries_.at(key)->shipment;
}

absl::StatusOr<absl::Duration> Scheduler::Renew(const std::string& fetch_id,
                                                const std::string& owner, Instant now) {
  HEADSTART_ASSIGN_OR_RETURN(const uint64_t key, KeyOf(fetch_id, owner));
  Entry& entry = *entries_.at(key);
  if (entry.computed) entry.expiry = std::max(entry.expiry, now + entry.lease);
  return entry.lease;
}

absl::Status Scheduler::Release(const std::string& fetch_id, const std::string& owner) {
  HEADSTART_ASSIGN_OR_RETURN(const uint64_t key, KeyOf(fetch_id, owner));
  End(key, MakeError(absl::StatusCode::kAborted, ErrorReason::kKvReleased, "the KV was released"));
  return absl::OkStatus();
}

}  // namespace headstart
