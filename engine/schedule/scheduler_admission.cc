// Scheduler: who comes in.
#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "engine/schedule/scheduler.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr absl::Duration kMinRetryDelay = absl::Milliseconds(100);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(30);
constexpr absl::Duration kUnknownRetryDelay = absl::Seconds(1);
// What a token is taken to cost as long as nothing is known: only to put requests in order.
constexpr absl::Duration kGuessedTokenCost = absl::Microseconds(100);
// Layers of the step that runs that an urgent one may have to wait for: so far the runner is ahead.
constexpr int64_t kLayersAhead = 2;
// What was learned longer ago is not held against a request when nobody else is in.
constexpr absl::Duration kStale = absl::Seconds(1);

absl::Duration CostOrGuess(const std::optional<absl::Duration>& cost, int64_t num_tokens) {
  return cost.value_or(kGuessedTokenCost * num_tokens);
}

bool HasPage(const PrefillRequest& request, int64_t page, const PageHash& name) {
  return page < std::ssize(request.page_names) && request.page_names[page] == name;
}

absl::Duration ForPrinting(absl::Duration time) { return absl::Trunc(time, absl::Milliseconds(1)); }

}  // namespace

absl::StatusOr<Admitted> Scheduler::Add(PrefillRequest request, const std::string& fetch_id,
                                        Instant now) {
  HEADSTART_RETURN_IF_ERROR(closed_);
  HEADSTART_RETURN_IF_ERROR(EndEarlierAttempt(request));
  Estimate estimate = Foresee(request, now);
  HEADSTART_RETURN_IF_ERROR(estimate.refusal);

  auto entry = std::make_unique<Entry>();
  entry->key = ++last_key_;
  entry->expiry = request.deadline;
  entry->hint = estimate.cached_tokens;
  entry->hint_evicted = pages_.evicted();
  entry->latest_start =
      LatestStart(now, CostOrGuess(estimate.compute, request.num_tokens() - estimate.cached_tokens),
                  request.deadline);
  entry->result.accepted_at = entry->waits_since = now;
  entry->result.predicted_ttft = estimate.ttft();
  if (estimate.known.has_value()) entry->foreseen = *estimate.known + *estimate.compute;
  entry->fetch_id = fetch_id;
  entry->request = std::move(request);
  if (entry->detached()) {
    HEADSTART_RETURN_IF_ERROR(Detach(*entry));
  } else {
    entry->shipment =
        std::make_shared<Shipment>(ShippedGeometry(entry->request), Shipment::Keep::kUntilTaken,
                                   std::vector<KvPart>(), std::move(entry->request.manifest));
  }
  Admitted admitted{entry->key, std::move(estimate), entry->lease, entry->shipment};
  ++load_.queued_requests;
  load_.queued_tokens += entry->num_tokens();
  ++load_.inflight_requests;
  load_.inflight_tokens += entry->num_tokens();
  ++load_.acquired;
  by_request_id_.emplace(entry->request.request_id, entry->key);
  entries_.emplace(entry->key, std::move(entry));
  return admitted;
}

absl::Status Scheduler::EndEarlierAttempt(const PrefillRequest& request) {
  const auto found = by_request_id_.find(request.request_id);
  if (found == by_request_id_.end()) return absl::OkStatus();
  const std::string& key = entries_.at(found->second)->request.attempt_key;
  if (key.empty() || key != request.attempt_key) {
    return MakeError(absl::StatusCode::kAlreadyExists, ErrorReason::kDuplicateRequestId,
                     absl::StrCat("request_id: ", request.request_id, " is in flight"));
  }
  End(found->second, MakeError(absl::StatusCode::kCancelled, ErrorReason::kClientCancelled,
                               "the client tries again: a later attempt took its place"));
  return absl::OkStatus();
}

Estimate Scheduler::Foresee(const PrefillRequest& request, Instant now) const {
  bool displaces = false;
  Estimate estimate = Predict(request, now, &displaces);
  estimate.refusal = closed_;
  if (estimate.refusal.ok()) estimate.refusal = CheckQueue(request.num_tokens());
  if (estimate.refusal.ok()) {
    estimate.refusal =
        CheckDeadline(request.num_tokens(), request.deadline, estimate, displaces, now);
  }
  return estimate;
}

absl::Status Scheduler::CheckQueue(int64_t num_tokens) const {
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

absl::Status Scheduler::CheckDeadline(int64_t num_tokens, Instant deadline,
                                      const Estimate& estimate, bool displaces, Instant now) const {
  const absl::Duration left = deadline - now;
  if (left <= absl::ZeroDuration()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                     "the deadline had passed when the request came");
  }
  if (!estimate.queue.has_value()) return absl::OkStatus();
  // Else a machine that was slow for a while would refuse everybody, and never learn better.
  if (load_.inflight_requests == 0 && now - learned_at_ >= kStale) return absl::OkStatus();
  const double margin = costs_.Margin();
  const absl::Duration needed = *estimate.ttft() * margin;
  if (needed <= left && !displaces) return absl::OkStatus();
  const std::string what =
      absl::StrCat("the deadline is ", absl::FormatDuration(ForPrinting(left)), " away, ",
                   num_tokens, " tokens behind ", estimate.tokens_ahead, " others need about ",
                   absl::FormatDuration(ForPrinting(needed)),
                   needed <= left ? ", and one that is in already would miss its own" : "");
  if (*estimate.compute * margin > left) {  // at any time
    return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable, what);
  }
  const absl::Duration too_long = displaces ? *estimate.compute : needed - left;
  return MakeRetryableError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable,
                            what, std::clamp(too_long, kMinRetryDelay, kMaxRetryDelay));
}

// The time in which the server works off as many tokens as are asked for.
absl::Duration Scheduler::RetryDelay(int64_t num_tokens) const {
  const std::optional<double> rate = costs_.TokensPerSecond();
  if (!rate) return kUnknownRetryDelay;
  return std::clamp(absl::Seconds(static_cast<double>(num_tokens) / *rate), kMinRetryDelay,
                    kMaxRetryDelay);
}

// ---- predictions

Estimate Scheduler::Predict(const PrefillRequest& request, Instant now, bool* displaces) const {
  Estimate estimate;
  estimate.cached_tokens = prefixes_.Count(request, 0);
  const std::optional<absl::Duration> cost =
      CostFrom(request, 0, estimate.cached_tokens, Steps::kOwn);
  const int64_t num_computed = request.num_tokens() - estimate.cached_tokens;
  const absl::Duration guess = CostOrGuess(cost, num_computed);
  const QueuedWork newcomer{
      {request.priority, LatestStart(now, guess, request.deadline), last_key_ + 1},
      request.num_tokens(),
      guess,
      request.deadline};
  std::vector<QueuedWork> others;
  for (const auto& [key, entry] : entries_) {
    if (!entry->computed && !entry->ended) AddWork(*entry, now, others);
  }
  const bool urgent = WouldBeUrgent(request, newcomer.rank, estimate.cached_tokens, now);
  const absl::Duration busy = urgent_step_.Rest(now) + (urgent ? LayerWait() : step_.Rest(now));
  const Forecast forecast =
      MakeForecast(newcomer, std::move(others), busy, urgent, costs_.Margin(), now);
  estimate.requests_ahead = forecast.requests_ahead;
  estimate.tokens_ahead = forecast.tokens_ahead;
  if (!cost.has_value()) return estimate;
  estimate.known = forecast.queue;
  estimate.compute = *cost;
  estimate.queue =
      std::max(forecast.ttft() * interruptions_.Factor(num_computed) - *cost, absl::ZeroDuration());
  *displaces = forecast.displaces;
  return estimate;
}

bool Scheduler::WouldBeUrgent(const PrefillRequest& request, const Rank& rank, int64_t found,
                              Instant now) const {
  if (request.num_tokens() - found > options_.batch_tokens || step_.Rest(now) <= LayerWait()) {
    return false;
  }
  const PageHash* const next_page = prefixes_.NextName(request, 0, found);
  return absl::c_none_of(entries_, [&](const auto& other) {
    const Entry& entry = *other.second;
    if (entry.computed || entry.ended) return false;
    const bool has_its_next_page =
        next_page != nullptr && HasPage(entry.request, found / kBlockTokens, *next_page);
    return has_its_next_page || (entry.in_step && RankOf(entry, now).Before(rank));
  });
}

void Scheduler::AddWork(const Entry& entry, Instant now, std::vector<QueuedWork>& work) const {
  const int64_t from = PositionBehindStep(entry);
  const auto cost_from = [&](int64_t position) {
    const int64_t ready = std::max({position, entry.ready, entry.hint});
    return CostFrom(entry.request, position, ready, Steps::kShared).value_or(absl::ZeroDuration());
  };
  const int64_t ready = std::max({from, entry.ready, entry.hint});
  QueuedWork next{RankOf(entry, now), entry.num_tokens(), cost_from(from), entry.request.deadline,
                  IsShort(entry, ready)};
  const Rank unaged{entry.request.priority, entry.latest_start, entry.key};
  if (next.rank.level > unaged.level) {
    const QueuedWork rest{unaged, 0, cost_from(entry.in_step ? from : from + options_.piece_tokens),
                          std::exchange(next.deadline, Instant::InfiniteFuture())};
    next.cost -= rest.cost;
    work.push_back(rest);
  }
  work.push_back(next);
}

int64_t Scheduler::PositionBehindStep(const Entry& entry) const {
  return entry.in_step ? NextPass(entry, entry.ready).end : entry.position;
}

std::optional<absl::Duration> Scheduler::CostFrom(const PrefillRequest& request, int64_t position,
                                                  int64_t ready, Steps steps) const {
  const ProxyAttnOptions* attention = request.attention.enabled ? &request.attention : nullptr;
  absl::Duration sum;
  for (int64_t begin = position; begin < request.num_tokens(); begin += options_.piece_tokens) {
    const int64_t end = std::min(begin + options_.piece_tokens, request.num_tokens());
    const int64_t from = std::max(begin, ready);
    if (from >= end) continue;
    const PieceShape piece{end - from, from, attention};
    const double share = steps == Steps::kOwn
                             ? 1
                             : std::min(1.0, static_cast<double>(piece.num_tokens) /
                                                 static_cast<double>(options_.batch_tokens));
    const std::optional<absl::Duration> cost = costs_.Predict({&piece, 1}, share);
    if (!cost.has_value()) return std::nullopt;
    sum += *cost;
  }
  return sum;
}

absl::Duration Scheduler::RunningStep::Rest(Instant now) const {
  return std::max(cost - (now - began), absl::ZeroDuration());
}

absl::Duration Scheduler::LayerWait() const {
  return step_.cost * kLayersAhead / options_.geometry.num_layers;
}

std::optional<absl::Duration> Scheduler::PredictDrain(Instant now) const {
  if (!costs_.TokensPerSecond().has_value()) return std::nullopt;  // nothing is known
  absl::Duration sum = step_.Rest(now) + urgent_step_.Rest(now);
  for (const auto& [key, entry] : entries_) {
    if (entry->computed || entry->ended) continue;
    const int64_t from = PositionBehindStep(*entry);
    const std::optional<absl::Duration> cost =
        CostFrom(entry->request, from, std::max(from, entry->ready), Steps::kShared);
    if (!cost.has_value()) return std::nullopt;
    sum += *cost;
  }
  return sum;
}

// ---- detached KV

KvGeometry Scheduler::ShippedGeometry(const PrefillRequest& request) const {
  return options_.geometry.As(request.kv_dtype.value_or(options_.geometry.dtype));
}

absl::Status Scheduler::Detach(Entry& entry) {
  const DetachedKv& wanted = *entry.request.detached;
  entry.lease = wanted.lease > absl::ZeroDuration() ? std::min(wanted.lease, options_.max_lease)
                                                    : options_.default_lease;
  auto keep = Shipment::Keep::kUntilClosed;
  if (wanted.readers.empty()) {
    HEADSTART_RETURN_IF_ERROR(Reserve(entry));
  } else {
    HEADSTART_RETURN_IF_ERROR(CheckCoverage(wanted.readers, options_.geometry));
    keep = Shipment::Keep::kUntilAcknowledged;
  }
  entry.shipment = std::make_shared<Shipment>(ShippedGeometry(entry.request), keep, wanted.readers,
                                              std::move(entry.request.manifest));
  by_fetch_id_.emplace(entry.fetch_id, entry.key);
  return absl::OkStatus();
}

// KV that nobody announced to fetch may stay long: all of it must find room at once, and a piece's
// worth stays free for those whose KV flows. So nobody who computes waits for one who does not.
absl::Status Scheduler::Reserve(Entry& entry) {
  const int64_t needed = CountChunks(entry.request);
  const int64_t limit = host_.num_chunks() - PieceChunks(options_);
  const std::string what =
      absl::StrCat("detached KV without readers needs ", needed, " chunks of host memory");
  if (needed > limit) {
    return MakeError(absl::StatusCode::kFailedPrecondition, ErrorReason::kHostMemoryFull,
                     absl::StrCat(what, ", limit ", limit));
  }
  if (reserved_chunks_ + needed <= limit) entry.reserved = host_.Take(needed, entry.key);
  if (static_cast<int64_t>(entry.reserved.size()) < needed) {
    return MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kHostMemoryFull,
                              absl::StrCat(what, ", ", host_.free_chunks(), " are free and ",
                                           reserved_chunks_, " of ", limit, " reserved"),
                              RetryDelay(entry.num_tokens()));
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

}  // namespace headstart
