#include "engine/schedule/scheduler.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr absl::Duration kMinRetryDelay = absl::Milliseconds(100);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(30);
constexpr absl::Duration kUnknownRetryDelay = absl::Seconds(1);
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
    : options_(options), pages_(*pages), host_(*host), closed_(std::move(closed)) {
  HEADSTART_CHECK(host->num_chunks() >= PieceChunks(options));
  free_slots_.resize(static_cast<size_t>(options.num_slots));
  std::iota(free_slots_.rbegin(), free_slots_.rend(), 0);
}

// ---- who comes in

absl::StatusOr<Admitted> Scheduler::Add(PrefillRequest request, const std::string& fetch_id,
                                        absl::Time now) {
  HEADSTART_RETURN_IF_ERROR(closed_);
  if (by_request_id_.contains(request.request_id)) {
    return MakeError(absl::StatusCode::kAlreadyExists, ErrorReason::kDuplicateRequestId,
                     absl::StrCat("request_id: ", request.request_id, " is in flight"));
  }
  const int64_t num_tokens = request.num_tokens();
  HEADSTART_RETURN_IF_ERROR(CheckRoom(num_tokens));
  HEADSTART_RETURN_IF_ERROR(CheckDeadline(num_tokens, request.deadline, now));

  const uint64_t key = ++last_key_;
  auto entry = std::make_unique<Entry>();
  entry->expiry = request.deadline;
  entry->result.accepted_at = now;
  entry->fetch_id = fetch_id;
  entry->request = std::move(request);
  if (entry->request.detached.has_value()) {
    HEADSTART_RETURN_IF_ERROR(Detach(key, *entry));
  } else {
    entry->shipment =
        std::make_shared<Shipment>(options_.geometry, Shipment::Keep::kUntilTaken,
                                   std::vector<KvPart>(), std::move(entry->request.manifest));
  }
  Admitted admitted{.key = key, .lease = entry->lease, .shipment = entry->shipment};
  for (const auto& [other_key, other] : entries_) {
    if (other->computed) continue;
    ++admitted.requests_ahead;
    admitted.tokens_ahead += other->request.num_tokens();
  }
  by_request_id_.emplace(entry->request.request_id, key);
  entries_.emplace(key, std::move(entry));
  ++load_.queued_requests;
  load_.queued_tokens += num_tokens;
  ++load_.inflight_requests;
  load_.inflight_tokens += num_tokens;
  ++load_.acquired;
  return admitted;
}

absl::Status Scheduler::Detach(uint64_t key, Entry& entry) {
  const DetachedKv& wanted = *entry.request.detached;
  entry.lease = wanted.lease > absl::ZeroDuration() ? std::min(wanted.lease, options_.max_lease)
                                                    : options_.default_lease;
  auto keep = Shipment::Keep::kUntilClosed;
  if (wanted.readers.empty()) {
    HEADSTART_RETURN_IF_ERROR(Reserve(key, entry));
  } else {
    HEADSTART_RETURN_IF_ERROR(CheckCoverage(wanted.readers, options_.geometry));
    keep = Shipment::Keep::kUntilAcknowledged;
  }
  entry.shipment = std::make_shared<Shipment>(options_.geometry, keep, wanted.readers,
                                              std::move(entry.request.manifest));
  by_fetch_id_.emplace(entry.fetch_id, key);
  return absl::OkStatus();
}

// KV that nobody announced to fetch may stay long: all of it must find room at once, and a piece's
// worth stays free for those whose KV flows. So nobody who computes waits for one who does not.
absl::Status Scheduler::Reserve(uint64_t key, Entry& entry) {
  const int64_t needed = CountChunks(entry.request);
  const int64_t limit = host_.num_chunks() - PieceChunks(options_);
  const std::string what =
      absl::StrCat("detached KV without readers needs ", needed, " chunks of host memory");
  if (needed > limit) {
    return MakeError(absl::StatusCode::kFailedPrecondition, ErrorReason::kHostMemoryFull,
                     absl::StrCat(what, ", limit ", limit));
  }
  if (reserved_chunks_ + needed <= limit) entry.reserved = host_.Take(needed, key);
  if (static_cast<int64_t>(entry.reserved.size()) < needed) {
    return MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kHostMemoryFull,
                              absl::StrCat(what, ", ", host_.free_chunks(), " are free and ",
                                           reserved_chunks_, " of ", limit, " reserved"),
                              RetryDelay(entry.request.num_tokens()));
  }
  entry.num_reserved = needed;
  reserved_chunks_ += needed;
  return absl::OkStatus();
}

int64_t Scheduler::CountChunks(const PrefillRequest& request) const {
  int64_t chunks = 0;
  for (int64_t begin = 0; begin < request.num_tokens(); begin += options_.piece_tokens) {
    const int64_t count = std::min(options_.piece_tokens, request.num_tokens() - begin);
    chunks += static_cast<int64_t>(
        CutIntoChunks(begin, count, request.skip_tokens, options_.geometry.chunk_pages).size());
  }
  return chunks * options_.geometry.num_layers;
}

absl::Status Scheduler::CheckRoom(int64_t num_tokens) const {
  if (load_.inflight_requests == 0) return absl::OkStatus();
  if (load_.inflight_requests < options_.max_requests &&
      load_.inflight_tokens + num_tokens <= options_.max_tokens) {
    return absl::OkStatus();
  }
  return MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull,
                            absl::StrCat("queue full: ", load_.inflight_requests, " requests of ",
                                         options_.max_requests, ", ", load_.inflight_tokens, " + ",
                                         num_tokens, " tokens of ", options_.max_tokens),
                            RetryDelay(num_tokens));
}

absl::Status Scheduler::CheckDeadline(int64_t num_tokens, absl::Time deadline,
                                      absl::Time now) const {
  const absl::Duration left = deadline - now;
  if (left <= absl::ZeroDuration()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the deadline had passed when the request came");
  }
  const std::optional<double> rate = rate_.Best();
  if (!rate) return absl::OkStatus();
  // The running prompt may be nearly done, so it does not count. Half the prediction is the benefit
  // of the doubt: prompts of other lengths run at other rates.
  const double tokens = static_cast<double>(load_.queued_tokens + num_tokens);
  const absl::Duration predicted = absl::Seconds(tokens / *rate);
  if (predicted / 2 <= left) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable,
      absl::StrCat("the deadline is ", absl::FormatDuration(left), " away, ", tokens,
                   " tokens need about ",
                   absl::FormatDuration(absl::Trunc(predicted, absl::Milliseconds(1)))));
}

// The time in which the server works off as many tokens as are asked for.
absl::Duration Scheduler::RetryDelay(int64_t num_tokens) const {
  const std::optional<double> rate = rate_.Best();
  if (!rate) return kUnknownRetryDelay;
  return std::clamp(absl::Seconds(static_cast<double>(num_tokens) / *rate), kMinRetryDelay,
                    kMaxRetryDelay);
}

// ---- what runs next

std::optional<Step> Scheduler::Next(absl::Time now) {
  // An older request that only others keep from running is not overtaken.
  bool may_start = true, may_take_room = true;
  for (auto& [key, entry] : entries_) {
    if (entry->computed || entry->ended) continue;
    HEADSTART_CHECK(!entry->in_step);
    if (entry->slot < 0 && !(may_start && GiveSlotAndPages(*entry))) {
      may_start = false;
      continue;
    }
    std::vector<TokenRange> chunks = NextChunks(*entry);
    const auto needed = static_cast<int64_t>(chunks.size()) * options_.geometry.num_layers;
    auto host = GiveRoom(key, *entry, needed, may_take_room, now);
    if (!host.has_value()) {
      // Else it waits for its own readers.
      const int64_t room = host_.num_chunks() - reserved_chunks_ - host_.held(key);
      if (needed <= room) may_take_room = false;
      continue;
    }
    Step step;
    step.pieces.push_back(MakePiece(key, *entry, std::move(chunks), *std::move(host), now));
    return step;
  }
  return std::nullopt;
}

bool Scheduler::GiveSlotAndPages(Entry& entry) {
  if (free_slots_.empty()) return false;
  absl::StatusOr<PageRefs> pages = pages_.Take(NumBlocks(entry.request.num_tokens()));
  if (!pages.ok()) return false;
  entry.pages = *std::move(pages);
  entry.slot = free_slots_.back();
  free_slots_.pop_back();
  return true;
}

int64_t Scheduler::NextTokens(const Entry& entry) const {
  return std::min(options_.piece_tokens, entry.request.num_tokens() - entry.next_position);
}

std::vector<TokenRange> Scheduler::NextChunks(const Entry& entry) const {
  return CutIntoChunks(entry.next_position, NextTokens(entry), entry.request.skip_tokens,
                       options_.geometry.chunk_pages);
}

std::optional<std::vector<HostChunk>> Scheduler::GiveRoom(uint64_t key, Entry& entry, int64_t count,
                                                          bool may_take, absl::Time now) {
  std::vector<HostChunk> room;
  if (!entry.reserved.empty()) {
    for (int64_t i = 0; i < count; ++i) {
      room.push_back(std::move(entry.reserved.back()));
      entry.reserved.pop_back();
    }
    return room;
  }
  if (may_take) room = host_.Take(count, key);
  if (static_cast<int64_t>(room.size()) < count) {
    if (!entry.waits_for_room_since.has_value()) {
      entry.waits_for_room_since = now;
      ++load_.waiting_for_room;
    }
    return std::nullopt;
  }
  if (entry.waits_for_room_since.has_value()) {
    entry.result.room_wait_seconds += absl::ToDoubleSeconds(now - *entry.waits_for_room_since);
    entry.waits_for_room_since.reset();
    --load_.waiting_for_room;
  }
  return room;
}

Piece Scheduler::MakePiece(uint64_t key, Entry& entry, std::vector<TokenRange> chunks,
                           std::vector<HostChunk> host, absl::Time now) {
  if (std::exchange(entry.queued, false)) {
    --load_.queued_requests;
    load_.queued_tokens -= entry.request.num_tokens();
    entry.result.started_at = now;
    entry.shipment->Start();
  }
  entry.in_step = true;
  Piece piece;
  piece.request = key;
  piece.slot = entry.slot;
  piece.token_ids =
      absl::MakeConstSpan(entry.request.token_ids).subspan(entry.next_position, NextTokens(entry));
  piece.first_position = entry.next_position;
  piece.prompt_tokens = entry.request.num_tokens();
  piece.ends_prompt = piece.first_position + piece.num_tokens() == piece.prompt_tokens;
  piece.pages = entry.pages.pages();
  piece.attention = entry.request.attention.enabled ? &entry.request.attention : nullptr;
  piece.sampling = &entry.request.sampling;
  piece.chunks = std::move(chunks);
  piece.host = std::move(host);
  piece.shipment = entry.shipment;
  piece.cancelled = &entry.cancelled;
  return piece;
}

void Scheduler::Finish(const Step& step, StepResult result, absl::Time now) {
  HEADSTART_CHECK(result.size() == step.pieces.size());
  for (size_t i = 0; i < result.size(); ++i) {
    const auto found = entries_.find(step.pieces[i].request);
    HEADSTART_CHECK(found != entries_.end() && found->second->in_step);
    Entry& entry = *found->second;
    entry.in_step = false;
    entry.held_since = now;
    if (entry.ended) {
      Remove(found);
    } else if (!result[i].status.ok()) {
      End(found->first, result[i].status);
    } else {
      Advance(entry, step.pieces[i], result[i], now);
    }
  }
}

void Scheduler::Advance(Entry& entry, const Piece& piece, PieceResult& result, absl::Time now) {
  entry.next_position += piece.num_tokens();
  PrefillResult& sum = entry.result;
  sum.selection_seconds += result.result.selection_seconds;
  sum.attention_seconds += result.result.attention_seconds;
  sum.compute_seconds += result.result.compute_seconds;
  if (!piece.ends_prompt) return;
  result.result.selection_seconds = sum.selection_seconds;
  result.result.attention_seconds = sum.attention_seconds;
  result.result.compute_seconds = sum.compute_seconds;
  result.result.room_wait_seconds = sum.room_wait_seconds;
  result.result.accepted_at = sum.accepted_at;
  result.result.started_at = sum.started_at;
  result.result.computed_at = now;
  rate_.Add(entry.request.num_tokens(), absl::Seconds(sum.compute_seconds));
  entry.computed = true;
  FreeDevice(entry);
  entry.shipment->Complete(std::move(result.result));
  if (!entry.request.detached.has_value()) return;
  entry.expiry = now + entry.lease;
  ++load_.leases;
  load_.lease_tokens += entry.request.num_tokens();
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
  const int64_t num_tokens = entry.request.num_tokens();
  FreeDevice(entry);
  if (entry.queued) {
    --load_.queued_requests;
    load_.queued_tokens -= num_tokens;
  }
  if (entry.waits_for_room_since.has_value()) --load_.waiting_for_room;
  --load_.inflight_requests;
  load_.inflight_tokens -= num_tokens;
  ++load_.released;
  if (entry.computed && entry.request.detached.has_value()) {
    --load_.leases;
    load_.lease_tokens -= num_tokens;
  }
  reserved_chunks_ -= entry.num_reserved;
  by_request_id_.erase(entry.request.request_id);
  by_fetch_id_.erase(entry.fetch_id);
  entries_.erase(found);
}

absl::Time Scheduler::Expire(absl::Time now) {
  const absl::Time wanted_since = RoomWantedSince();
  absl::Time next = wanted_since <= now ? now + kStallCheckInterval : absl::InfiniteFuture();
  std::vector<std::pair<uint64_t, absl::Status>> due;
  for (auto& [key, entry] : entries_) {
    if (entry->ended) continue;
    if (entry->expiry <= now) {
      due.emplace_back(key, WhyExpired(*entry));
    } else if (IsStalled(key, *entry, wanted_since, now)) {
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
  if (entry.computed && entry.request.detached.has_value()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kLeaseExpired,
                     absl::StrCat("the lease of ", absl::FormatDuration(entry.lease), " ended"));
  }
  const absl::string_view where = entry.queued     ? "in the queue"
                                  : entry.computed ? "while the client did not take KV"
                                                   : "before the prompt was computed";
  return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                   absl::StrCat("the deadline passed ", where));
}

absl::Time Scheduler::RoomWantedSince() const {
  absl::Time since = absl::InfiniteFuture();
  for (const auto& [key, entry] : entries_) {
    if (!entry->ended) since = std::min(since, entry->waits_for_room_since.value_or(since));
  }
  return since;
}

bool Scheduler::IsStalled(uint64_t key, Entry& entry, absl::Time wanted_since,
                          absl::Time now) const {
  const int64_t held = host_.held(key);
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
                                                const std::string& owner, absl::Time now) {
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
