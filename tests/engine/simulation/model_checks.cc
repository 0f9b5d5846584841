#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "tests/engine/simulation/model.h"

namespace headstart::simulation {
namespace {

// How late the scheduler may see that something is due: it looks this often.
constexpr absl::Duration kLookInterval = absl::Milliseconds(100);
// A reader that was away gets this long until what it takes is seen.
constexpr absl::Duration kTimeToTake = absl::Seconds(1);
// How far a prediction may be off in a calm life, beside what came later and went first.
constexpr double kEstimateFactor = 1.5;
constexpr absl::Duration kEstimateSlack = absl::Milliseconds(20);

}  // namespace

void Model::Check(Instant now) {
  if (violation_.has_value()) return;
  for (RequestBook* request : requests_) LookAtEnd(*request, now);
  CheckLoad();
  int64_t held = host_.free_chunks();
  for (RequestBook* request : requests_) {
    CheckHost(*request, now);
    held += request->held;
    if (request->live() && request->expiry < now) {
      Violate(Invariant::kExpired, absl::StrCat(request->id, " is past its expiry"));
    }
  }
  if (held != host_.num_chunks()) {
    Violate(Invariant::kHost,
            absl::StrCat(held, " chunks free or held, there are ", host_.num_chunks()));
  }
  CheckDevice();
  NoteProgress(now);
  ForgetGone();
}

void Model::LookAtEnd(RequestBook& request, Instant now) {
  const absl::Status closed = request.shipment->Open(std::nullopt, 0).status();
  if (request.live() && !closed.ok()) {
    request.end = closed;
    request.reserved = 0;
    CheckReason(request, now);
    if (!request.in_step) LeaveDevice(request);
  } else if (closed != request.end.value_or(absl::OkStatus())) {
    Violate(Invariant::kOneEnd, absl::StrCat(request.id, " ended again: ", closed.message()));
  }
  ShipmentReader::Event event = request.outcome->Next();
  if (std::holds_alternative<ShipmentReader::Started>(event)) event = request.outcome->Next();
  const auto* outcome = std::get_if<ShipmentReader::Ended>(&event);
  if (outcome != nullptr && outcome->status.ok() && !std::exchange(request.told, true)) {
    CheckResult(request, *outcome->result);
  }
  const bool is_right = outcome == nullptr ? request.live() && !request.computed
                        : request.computed ? outcome->status.ok()
                                           : outcome->status == request.end;
  if (!is_right) {
    Violate(Invariant::kOneEnd, absl::StrCat(request.id, ": the call was told another end"));
  }
}

// What is told of a computed prompt; at the moment when it was computed.
void Model::CheckResult(const RequestBook& request, const PrefillResult& result) {
  if (result.cached_tokens != request.num_found) {
    Violate(Invariant::kAnswers, absl::StrCat(request.id, ": ", result.cached_tokens,
                                              " tokens cached, found were ", request.num_found));
  }
  const auto names = static_cast<size_t>(
      request.prefix.keeps_pages ? std::ssize(request.names) : request.num_found / kBlockTokens);
  if (result.page_hashes.size() != names * sizeof(PageHash) ||
      std::memcmp(result.page_hashes.data(), request.names.data(), result.page_hashes.size()) !=
          0) {
    Violate(Invariant::kAnswers, absl::StrCat(request.id, ": another's page hashes"));
  }
  if (!calm_ || !request.predicted_ttft.has_value()) return;
  const absl::Duration took = result.computed_at - request.accepted;
  seen_.deadlines_kept += request.expiry < Instant::InfiniteFuture();
  const absl::Duration expected = *request.predicted_ttft + request.others_time;
  seen_.ttft.push_back(absl::FDivDuration(took, expected));
  const absl::Duration bound = kEstimateFactor * expected + kEstimateSlack;
  if (took > bound) {
    Violate(
        Invariant::kEstimate,
        absl::StrCat(request.id, " took ", absl::FormatDuration(took), ", predicted were ",
                     absl::FormatDuration(*request.predicted_ttft), ", for those that came later ",
                     absl::FormatDuration(request.others_time)));
  }
}

void Model::CheckReason(const RequestBook& request, Instant now) {
  const ErrorReason reason = ReasonOf(*request.end);
  ++seen_.ends[reason];
  const bool kept = request.computed && request.detached();
  seen_.deadlines_missed += calm_ && !request.computed && request.predicted_ttft.has_value();
  const bool expired = request.expiry <= now;
  bool given = request.causes.contains(reason);
  if (reason == ErrorReason::kDeadlineExceeded) given = expired && !kept;
  if (reason == ErrorReason::kLeaseExpired) given = expired && kept;
  if (reason == ErrorReason::kClientStalled) given = MayBeStalled(request, now);
  if (!given) {
    Violate(Invariant::kOneEnd,
            absl::StrCat(request.id, " ended without a cause: ", request.end->message()));
  }
}

bool Model::MayBeStalled(const RequestBook& request, Instant now) const {
  const bool reader_was_away = request.readers_away > 0 || now - request.reader_back <= kTimeToTake;
  return !request.reserves && reader_was_away && request.held > 0 &&
         now - request.moved >= options_.stall_timeout &&
         now - all_computed_ >= options_.stall_timeout;
}

void Model::CheckHost(RequestBook& request, Instant now) {
  std::erase_if(request.published, [](const auto& chunk) { return chunk.expired(); });
  int64_t kept = 0;
  for (const auto& weak : request.published) {
    const std::shared_ptr<const HostChunk> chunk = weak.lock();
    const auto on_wire = request.on_wire.find(chunk.get());
    const int64_t sent = on_wire == request.on_wire.end() ? 0 : on_wire->second;
    kept += chunk.use_count() - 1 - sent;
  }
  if (kept != request.shipment->kept_chunks()) {
    Violate(Invariant::kHost, absl::StrCat(request.id, ": ", kept, " refs off the wire, ",
                                           request.shipment->kept_chunks(), " kept"));
  }
  const int64_t held = host_.held(request.key);
  const int64_t expected =
      request.reserved + request.in_hand + static_cast<int64_t>(request.published.size());
  if (held != expected) {
    Violate(Invariant::kHost, absl::StrCat(request.id, " holds ", held, " chunks, expected ",
                                           request.reserved, " reserved, ", request.in_hand,
                                           " in hand, ", request.published.size(), " published"));
  }
  if (held != request.held || request.in_step) request.moved = now;
  request.held = held;
}

void Model::CheckLoad() {
  SchedulerLoad expected;
  int64_t num_waiting = 0;
  for (const RequestBook* request : requests_) {
    if (!request->live() && !request->in_step) continue;
    num_waiting += request->waits_for_compute();
    ++expected.inflight_requests;
    expected.inflight_tokens += request->num_tokens();
    if (!request->live()) continue;
    if (request->computed) {
      expected.leases += request->detached();
      expected.lease_tokens += request->detached() ? request->num_tokens() : 0;
    } else if (!request->started) {
      ++expected.queued_requests;
      expected.queued_tokens += request->num_tokens();
    }
  }
  const SchedulerLoad& load = scheduler_.load();
  if (load.inflight_requests != expected.inflight_requests ||
      load.inflight_tokens != expected.inflight_tokens || load.leases != expected.leases ||
      load.lease_tokens != expected.lease_tokens ||
      load.queued_requests != expected.queued_requests ||
      load.queued_tokens != expected.queued_tokens || load.waiting_for_room < 0 ||
      load.waiting_for_room > num_waiting || load.acquired != num_accepted_ ||
      load.released != num_accepted_ - expected.inflight_requests || load.steps != counts_.steps ||
      load.pieces != counts_.pieces || load.urgent_steps != counts_.urgent_steps ||
      load.prompt_tokens != counts_.prompt_tokens || load.cached_tokens != counts_.cached_tokens) {
    Violate(Invariant::kOneEnd,
            absl::StrCat("load: ", load.inflight_requests, " in flight, ", load.queued_requests,
                         " queued, ", load.leases, " leases; seen ", expected.inflight_requests,
                         ", ", expected.queued_requests, ", ", expected.leases));
  }
}

void Model::CheckDevice() {
  std::set<int32_t> slots, pages;
  int64_t num_running = 0;
  for (const RequestBook* request : requests_) {
    const std::vector<int32_t>& own = request->pages.pages();
    pages.insert(own.begin(), own.end());
    if (request->slot < 0) continue;
    ++num_running;
    slots.insert(request->slot);
  }
  if (std::ssize(slots) != num_running ||
      (num_running > 0 && (*slots.begin() < 0 || *slots.rbegin() >= options_.num_slots))) {
    Violate(Invariant::kDevice, "two requests share a slot");
  }
  if (std::ssize(pages) != pages_.num_pages() - pages_.free_pages() ||
      pages_.cached_pages() != own_pages_.cached_pages() ||
      pages_.evicted() != own_pages_.evicted()) {
    Violate(Invariant::kDevice,
            absl::StrCat(pages_.free_pages(), " of ", pages_.num_pages(), " pages are free, ",
                         pages.size(), " held; ", pages_.cached_pages(), " cached and ",
                         pages_.evicted(), " evicted, of ", own_pages_.cached_pages(), " and ",
                         own_pages_.evicted()));
  }
}

void Model::NoteProgress(Instant now) {
  const int64_t free = host_.free_chunks();
  const auto live = static_cast<size_t>(
      std::count_if(requests_.begin(), requests_.end(),
                    [](const RequestBook* request) { return request->live(); }));
  if (free != std::exchange(last_free_, free)) progress_ = now;
  if (live != std::exchange(last_live_, live)) progress_ = now;
  if (std::none_of(requests_.begin(), requests_.end(),
                   [](const RequestBook* request) { return request->waits_for_compute(); })) {
    all_computed_ = now;
  }
}

void Model::ForgetGone() {
  std::erase_if(requests_, [](const RequestBook* request) {
    return !request->live() && !request->in_step && request->held == 0;
  });
}

void Model::CheckIdle(Instant now) {
  const bool somebody_waits =
      std::any_of(requests_.begin(), requests_.end(),
                  [](const RequestBook* request) { return request->waits_for_compute(); });
  if (somebody_waits && now - progress_ > options_.stall_timeout + 2 * kLookInterval) {
    Violate(Invariant::kProgress,
            absl::StrCat("nothing moved for ", absl::FormatDuration(now - progress_),
                         " while requests wait"));
  }
}

void Model::CheckGivenBack() {
  if (!requests_.empty()) {
    Violate(Invariant::kGivenBack, absl::StrCat(requests_[0]->id, " is still in"));
  }
  const SchedulerLoad& load = scheduler_.load();
  if (load.acquired != load.released || pages_.acquired() != pages_.released() ||
      pages_.free_pages() != pages_.num_pages() || host_.free_chunks() != host_.num_chunks()) {
    Violate(Invariant::kGivenBack, "requests, pages or chunks are missing");
  }
}

}  // namespace headstart::simulation
