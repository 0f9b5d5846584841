#include "tests/engine/simulation/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {
namespace {

HostBuffer NewHostBuffer(int64_t bytes) {
  return HostBuffer(new std::byte[bytes],
                    {[](void* data) { delete[] static_cast<std::byte*>(data); }});
}

SchedulerOptions WithMutation(SchedulerOptions options, Mutation mutation) {
  if (mutation == Mutation::kNeverStall) options.stall_timeout = absl::Hours(1);
  return options;
}

}  // namespace

SimulatedEngine::SimulatedEngine(const EngineOptions& options, Mutation mutation, uint64_t seed,
                                 bool trace)
    : options_(options),
      mutation_(mutation),
      trace_(trace),
      random_(seed),
      pages_(options.num_pages),
      host_(NewHostBuffer(kStampBytes * options.host_chunks), kStampBytes, options.host_chunks),
      timeline_([this] { AfterEvent(); }),
      scheduler_(std::make_unique<Scheduler>(WithMutation(options.scheduler, mutation), &pages_,
                                             &host_, absl::UnavailableError("not open"))),
      model_(std::make_unique<Model>(options.scheduler, &pages_, &host_, scheduler_.get())),
      runner_(std::make_unique<PretendRunner>(options.runner, mutation, &random_, &timeline_,
                                              model_.get(), &host_)) {
  scheduler_->Open();
}

void SimulatedEngine::WriteTrace(const std::string& line) {
  lines_.push_back(
      absl::StrCat(absl::FormatDuration(timeline_.now() - absl::UnixEpoch()), "  ", line));
}

void SimulatedEngine::AfterEvent() {
  model_->Check(timeline_.now());
  if (model_->violation().has_value()) timeline_.Stop();
}

void SimulatedEngine::Run() {
  do {
    while (std::optional<Step> step = Next()) {
      if (model_->violation().has_value()) return;
      RunStep(*std::move(step));
      Expire();  // a lease may have begun
      AfterEvent();
    }
    if (!model_->violation().has_value()) model_->CheckIdle(timeline_.now());
    Expire();  // somebody may have begun to wait for room
  } while (!model_->violation().has_value() && timeline_.RunNext());
  model_->CheckGivenBack();
}

std::optional<Step> SimulatedEngine::Next() {
  std::optional<Step> step = scheduler_->Next(timeline_.now());
  if (!step.has_value()) return step;
  if (mutation_ == Mutation::kLoseStep && random_.Percent(10)) return std::nullopt;
  Mutate(*step);
  model_->Stepped(*step, timeline_.now());
  const Piece& piece = step->pieces[0];
  Tell("step of ", piece.request, ": ", piece.num_tokens(), " tokens at ", piece.first_position,
       ", ", piece.host.size(), " chunks, ", host_.free_chunks(), " free");
  return step;
}

void SimulatedEngine::Mutate(Step& step) {
  Piece& piece = step.pieces[0];
  if (mutation_ == Mutation::kRepeatPiece && piece.first_position > 0) {
    piece.first_position -= options_.scheduler.piece_tokens;
  }
  if (mutation_ == Mutation::kWrongDevicePage && pages_.free_pages() > 0) {
    wrong_pages_.assign(piece.pages.begin(), piece.pages.end());
    wrong_pages_[0] = pages_.Take(1)->pages()[0];
    piece.pages = wrong_pages_;
  }
  if (mutation_ == Mutation::kKeepDevicePages && piece.ends_prompt && pages_.free_pages() > 0) {
    kept_.push_back(*pages_.Take(1));
  }
}

void SimulatedEngine::RunStep(Step step) {
  StepResult result = runner_->Run(step);
  const absl::Status status = result[0].status;
  Tell("step of ", step.pieces[0].request, " ended: ", Words(status));
  scheduler_->Finish(step, result, timeline_.now());
  model_->Finished(step, result, timeline_.now());
  if (status.code() != absl::StatusCode::kInternal || IsNonFiniteError(status)) return;
  Tell("the backend is lost");
  lost_ = true;
  const absl::Status why =
      MakeError(absl::StatusCode::kUnavailable, ErrorReason::kEngineLost, "the backend is lost");
  model_->GiveCauseToAll(ErrorReason::kEngineLost);
  scheduler_->Close(why);
  scheduler_->EndAll(why);
}

void SimulatedEngine::Expire() {
  if (mutation_ == Mutation::kForgetExpire) return PassAnHour();
  const int64_t ended = scheduler_->load().released;
  absl::Time next = scheduler_->Expire(timeline_.now());
  // What was given back may let a step run: there must be an event after which one is looked for.
  if (scheduler_->load().released != ended) next = timeline_.now();
  if (next == absl::InfiniteFuture()) return;
  if (next >= next_expiry_ && next_expiry_ > timeline_.now()) return;
  next_expiry_ = next;
  timeline_.At(next, [this] { Expire(); });
}

// Once: whatever has an expiry is past it then.
void SimulatedEngine::PassAnHour() {
  if (next_expiry_ < absl::InfiniteFuture()) return;
  next_expiry_ = timeline_.now() + absl::Hours(1);
  timeline_.At(next_expiry_, [] {});
}

// ---- calls

absl::StatusOr<std::unique_ptr<ShipmentReader>> SimulatedEngine::Submit(PrefillRequest request,
                                                                        const std::string& fetch_id,
                                                                        RequestBook* book) {
  const bool detached = request.detached.has_value();
  book->id = request.request_id;
  book->num_tokens = request.num_tokens();
  book->skip_tokens = request.skip_tokens;
  book->expiry = request.deadline;
  book->reserves = detached && request.detached->readers.empty();
  HEADSTART_ASSIGN_OR_RETURN(const Admitted admitted,
                             scheduler_->Add(std::move(request), fetch_id, timeline_.now()));
  book->key = admitted.key;
  book->lease = admitted.lease;
  book->shipment = admitted.shipment;
  if (mutation_ == Mutation::kSecondFirst) {
    model_->AcceptedTooLate(book);
  } else {
    model_->Accepted(book);
  }
  Expire();
  if (detached) return nullptr;
  return book->shipment->Open(WholeKv(options_.scheduler.geometry), 0);
}

void SimulatedEngine::End(RequestBook& request, const absl::Status& why) {
  Tell(request.id, " is ended: ", Words(why));
  request.causes.insert(ReasonOf(why));
  if (mutation_ == Mutation::kCloseBehind) return request.shipment->Close(why);
  if (mutation_ == Mutation::kWrongReason) {
    return scheduler_->End(request.key, absl::DeadlineExceededError("planted bug"));
  }
  scheduler_->End(request.key, why);
}

void SimulatedEngine::Extend(RequestBook& request) {
  if (!request.computed) return;
  request.expiry = std::max(request.expiry, timeline_.now() + request.lease);
}

absl::StatusOr<std::unique_ptr<ShipmentReader>> SimulatedEngine::Fetch(RequestBook& request,
                                                                       const std::string& owner,
                                                                       const KvPart& part,
                                                                       int64_t from_chunk) {
  HEADSTART_ASSIGN_OR_RETURN(const auto shipment, scheduler_->Find(request.id, owner));
  HEADSTART_RETURN_IF_ERROR(Renew(request, owner));
  return shipment->Open(part, from_chunk);
}

absl::Status SimulatedEngine::Renew(RequestBook& request, const std::string& owner) {
  HEADSTART_RETURN_IF_ERROR(scheduler_->Renew(request.id, owner, timeline_.now()).status());
  Extend(request);
  return absl::OkStatus();
}

absl::Status SimulatedEngine::Release(RequestBook& request, const std::string& owner) {
  HEADSTART_RETURN_IF_ERROR(scheduler_->Release(request.id, owner));
  Tell(request.id, " is released");
  request.causes.insert(ErrorReason::kKvReleased);
  return absl::OkStatus();
}

}  // namespace headstart::simulation
