#include "tests/engine/simulation/client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/instant.h"

namespace headstart::simulation {
namespace {

constexpr char kOwner[] = "owner";

}  // namespace

void Client::After(std::optional<absl::Duration> delay, void (Client::*event)()) {
  if (delay.has_value()) engine_.timeline().After(*delay, [this, event] { (this->*event)(); });
}

void Client::Schedule() { After(plan_.arrival, &Client::Submit); }

void Client::CheckOver() {
  for (const auto& fetcher : fetchers_) fetcher->CheckOver();
}

void Client::Submit() {
  PrefillRequest& request = plan_.request;
  if (request.deadline < Instant::InfiniteFuture()) {
    request.deadline = engine_.timeline().now() + (request.deadline - Instant());
  }
  const std::string id = request.request_id;
  engine_.Tell(id, " comes: ", request.num_tokens(), " tokens, ", plan_.readers.size(), " readers",
               request.detached.has_value() ? ", detached" : "");
  const bool in_flight = engine_.model().InFlight(id);
  auto submitted = engine_.Submit(request, request.detached.has_value() ? id : "", &book_);
  if (!submitted.ok()) {
    engine_.Tell(id, " is refused: ", Words(submitted.status()));
    return CheckRefusal(submitted.status());
  }
  if (in_flight || engine_.lost()) {
    engine_.model().Violate(Invariant::kAnswers, absl::StrCat(id, " was let in"));
  }
  ScheduleReaders(*std::move(submitted));
  ScheduleFaults();
}

void Client::CheckRefusal(const absl::Status& refused) {
  const ErrorReason reason = ReasonOf(refused);
  ++engine_.model().seen().refusals[reason];
  const bool twice = engine_.model().InFlight(plan_.request.request_id);
  const bool full =
      reason == ErrorReason::kDeadlineUnreachable ||
      (!engine_.options().calm &&
       (reason == ErrorReason::kQueueFull ||
        (reason == ErrorReason::kHostMemoryFull && plan_.request.detached.has_value())));
  const bool expected = engine_.lost() ? reason == ErrorReason::kEngineLost
                        : twice        ? reason == ErrorReason::kDuplicateRequestId
                                       : full;
  if (!expected) {
    engine_.model().Violate(Invariant::kAnswers, absl::StrCat(plan_.request.request_id,
                                                              " was refused: ", Words(refused)));
  }
}

void Client::ScheduleReaders(std::unique_ptr<ShipmentReader> attached) {
  const bool needed = attached != nullptr || !plan_.request.detached->readers.empty();
  for (const ReaderPlan& reader : plan_.readers) {
    fetchers_.push_back(
        std::make_unique<Fetcher>(&engine_, &book_, reader, needed, [this] { OneReaderDone(); }));
    Fetcher* fetcher = fetchers_.back().get();
    if (attached != nullptr) {
      fetcher->Follow(std::move(attached));
    } else {
      fetcher->ComeLater();
    }
  }
}

void Client::ScheduleFaults() {
  After(plan_.cancel, &Client::Cancel);
  if (!book_.detached()) return;
  After(plan_.release, &Client::Release);
  After(plan_.stranger, &Client::TryAsStranger);
  if (plan_.renewals > 0) After(plan_.renew_every, &Client::Renew);
}

void Client::OneReaderDone() {
  if (++num_done_ < fetchers_.size()) return;
  if (book_.detached()) {
    if (plan_.releases_when_done) Release();
  } else if (engine_.mutation() != Mutation::kForgetEnd) {
    engine_.End(book_, absl::CancelledError("the call is over"));
  }
}

// The call of detached KV is over when the prompt is computed; its end means nothing then.
void Client::Cancel() {
  if (book_.detached() && book_.computed) return;
  engine_.End(book_, absl::CancelledError("the client went"));
}

void Client::Release() { CheckAnswer("release", engine_.Release(book_, kOwner), true); }

void Client::Renew() {
  const absl::Status answer = engine_.Renew(book_, kOwner);
  CheckAnswer("renew", answer, true);
  if (answer.ok() && --plan_.renewals > 0) After(plan_.renew_every, &Client::Renew);
}

void Client::TryAsStranger() {
  CheckAnswer("stranger's fetch",
              engine_.Fetch(book_, "stranger", plan_.readers[0].part, 0).status(), false);
  CheckAnswer("stranger's renew", engine_.Renew(book_, "stranger"), false);
  CheckAnswer("stranger's release", engine_.Release(book_, "stranger"), false);
}

void Client::CheckAnswer(const char* call, const absl::Status& answer, bool is_owner) {
  engine_.Tell(book_.id, ": ", call, ": ", Words(answer));
  const bool closed = !book_.shipment->Open(std::nullopt, 0).ok();
  const bool released_now = answer.ok() && closed;
  const ErrorReason expected = closed && !released_now ? ErrorReason::kUnknownFetchId
                               : is_owner              ? ErrorReason::kNone
                                                       : ErrorReason::kPeerNotAllowed;
  if (ReasonOf(answer) != expected) {
    engine_.model().Violate(Invariant::kAnswers,
                            absl::StrCat(book_.id, ": ", call, " was answered ", Words(answer)));
  }
}

}  // namespace headstart::simulation
