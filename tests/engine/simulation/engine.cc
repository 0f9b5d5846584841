#include "tests/engine/simulation/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/schedule/prefix_hits.h"
#include "engine/schedule/rank.h"
#include "kernels/base/instant.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {
namespace {

HostBuffer NewHostBuffer(int64_t bytes) {
  return HostBuffer(new std::byte[bytes],
                    {[](void* data) { delete[] static_cast<std::byte*>(data); }});
}

// What a token is taken to cost before anything is known.
constexpr absl::Duration kGuessedTokenCost = absl::Microseconds(100);

SchedulerOptions WithMutation(SchedulerOptions options, Mutation mutation) {
  if (mutation == Mutation::kNeverStall) options.stall_timeout = absl::Hours(1);
  if (mutation == Mutation::kNoAgeing) options.ageing = absl::Hours(1);
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
      model_(std::make_unique<Model>(options.scheduler, options.calm, &pages_, &host_,
                                     scheduler_.get())),
      device_(std::make_unique<Device>(options.num_pages, options.scheduler.num_slots,
                                       options.scheduler.geometry.num_layers, model_.get())),
      runner_(std::make_unique<PretendRunner>(options.runner, mutation, &random_, &timeline_,
                                              model_.get(), &host_, device_.get())) {
  scheduler_->Open();
}

void SimulatedEngine::WriteTrace(const std::string& line) {
  lines_.push_back(absl::StrCat(absl::FormatDuration(timeline_.now() - Instant()), "  ", line));
}

void SimulatedEngine::AfterEvent() {
  model_->Check(timeline_.now());
  if (model_->violation().has_value()) timeline_.Stop();
}

void SimulatedEngine::Run() {
  do {
    while (std::optional<Step> step = Next(nullptr)) {
      RunStep(*std::move(step));
      if (model_->violation().has_value()) return;
    }
    if (!model_->violation().has_value()) model_->CheckIdle(timeline_.now());
    Expire();  // somebody may have begun to wait for room
  } while (!model_->violation().has_value() && timeline_.RunNext());
  model_->CheckGivenBack();
}

std::optional<Step> SimulatedEngine::Next(const Step* running) {
  if (model_->violation().has_value()) return std::nullopt;
  const Instant now = timeline_.now();
  std::optional<Step> step =
      running == nullptr ? scheduler_->Next(now) : scheduler_->NextUrgent(*running, now);
  if (mutation_ == Mutation::kLoseStep && running == nullptr && random_.Percent(10)) step.reset();
  if (step.has_value()) Mutate(*step, running);
  model_->Asked(step.has_value() ? &*step : nullptr, running, now);
  if (model_->violation().has_value() || !step.has_value()) return std::nullopt;
  if (mutation_ == Mutation::kKeepDevicePages && pages_.free_pages() > 0) {
    kept_.push_back(*pages_.Take(1));
  }
  for (const Piece& piece : step->pieces) {
    Tell(step->urgent ? "urgent: " : "", "step of ", piece.request, ": ", piece.num_tokens(),
         " tokens at ", piece.first_position, ", ", piece.host.size(), " chunks, ",
         host_.free_chunks(), " free");
  }
  return step;
}

void SimulatedEngine::Mutate(Step& step, const Step* running) {
  Piece& piece = step.pieces[0];
  if (mutation_ == Mutation::kRepeatPiece && piece.first_position > 0) {
    piece.first_position -= options_.scheduler.piece_tokens;
  }
  const int64_t rest = piece.prompt_tokens - piece.first_position;
  if (mutation_ == Mutation::kLongPiece && rest > options_.scheduler.piece_tokens) {
    piece.token_ids = absl::MakeConstSpan(piece.token_ids.data(), rest);
  }
  if (mutation_ == Mutation::kWrongDevicePage && pages_.free_pages() > 0) {
    wrong_pages_.assign(piece.pages.begin(), piece.pages.end());
    wrong_pages_[0] = pages_.Take(1)->pages()[0];
    piece.pages = wrong_pages_;
  }
  if (mutation_ == Mutation::kTwiceAtOnce && running != nullptr) {
    piece.request = running->pieces[0].request;
  }
}

// What the runner asks between two layers of a step.
class SimulatedEngine::BetweenLayers : public UrgentWork {
 public:
  BetweenLayers(SimulatedEngine* engine, const Step* running)
      : engine_(*engine), running_(*running) {}

  std::optional<Step> Next() override { return engine_.Next(&running_); }
  void Finish(Step step, StepResult result) override {
    engine_.Finish(std::move(step), std::move(result));
  }

 private:
  SimulatedEngine& engine_;
  const Step& running_;
};

void SimulatedEngine::RunStep(Step step) {
  BetweenLayers urgent(this, &step);
  StepResult result = runner_->Run(step, &urgent);
  if (!model_->violation().has_value()) Finish(std::move(step), std::move(result));
}

void SimulatedEngine::Finish(Step step, StepResult result) {
  bool lost = false;
  for (size_t i = 0; i < result.size(); ++i) {
    const absl::Status& status = result[i].status;
    Tell("step of ", step.pieces[i].request, " ended: ", Words(status));
    lost |= status.code() == absl::StatusCode::kInternal && !IsNonFiniteError(status);
  }
  scheduler_->Finish(step, result, timeline_.now());
  model_->Finished(step, result, timeline_.now());
  if (lost) LoseBackend();
  Expire();  // a lease may have begun
  AfterEvent();
}

void SimulatedEngine::LoseBackend() {
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
  Instant next = scheduler_->Expire(timeline_.now());
  // What was given back may let a step run: there must be an event after which one is looked for.
  if (scheduler_->load().released != ended) next = timeline_.now();
  if (next == Instant::InfiniteFuture()) return;
  if (next >= next_expiry_ && next_expiry_ > timeline_.now()) return;
  next_expiry_ = next;
  timeline_.At(next, [this] { Expire(); });
}

// Once: whatever has an expiry is past it then.
void SimulatedEngine::PassAnHour() {
  if (next_expiry_ < Instant::InfiniteFuture()) return;
  next_expiry_ = timeline_.now() + absl::Hours(1);
  timeline_.At(next_expiry_, [] {});
}

// ---- calls

void SimulatedEngine::NamePages(PrefillRequest& request) const {
  const int64_t pages = NamedTokens(request, options_.scheduler.piece_tokens) / kBlockTokens;
  const std::string root = request.prefix.cache_root.value_or("");
  const bool forgets_salt = mutation_ == Mutation::kShareAcrossRoots && !root.empty();
  request.page_names =
      HashPages("model", forgets_salt ? root.substr(1) : root, request.token_ids, pages);
  const int64_t held = CountHeld(request.page_names, request.prefix.held_pages) * kBlockTokens;
  const int64_t most = (request.num_tokens() - 1) / kBlockTokens * kBlockTokens;
  request.skip_tokens = std::max(request.skip_tokens, std::min(held, most));
}

void SimulatedEngine::FillBook(const PrefillRequest& request, RequestBook& book) const {
  book.id = request.request_id;
  book.token_ids = request.token_ids;
  book.names = request.page_names;
  book.prefix = request.prefix;
  book.is_sparse = request.attention.enabled;
  book.priority = request.priority;
  book.accepted = book.waits_since = timeline_.now();
  book.skip_tokens = request.skip_tokens;
  book.expiry = request.deadline;
  book.reserves = request.detached.has_value() && request.detached->readers.empty();
}

absl::StatusOr<std::unique_ptr<ShipmentReader>> SimulatedEngine::Submit(PrefillRequest request,
                                                                        const std::string& fetch_id,
                                                                        RequestBook* book) {
  const bool detached = request.detached.has_value();
  const Instant now = timeline_.now();
  NamePages(request);
  FillBook(request, *book);
  if (mutation_ == Mutation::kWrongPriority) request.priority = -request.priority;
  const Estimate foreseen = scheduler_->Foresee(request, now);
  HEADSTART_ASSIGN_OR_RETURN(const Admitted admitted,
                             scheduler_->Add(std::move(request), fetch_id, now));
  const Estimate& estimate = admitted.estimate;
  if (!foreseen.refusal.ok() || foreseen.ttft() != estimate.ttft()) {
    model_->Violate(Invariant::kAnswers, absl::StrCat(book->id, " was foreseen otherwise"));
  }
  book->key = admitted.key;
  book->lease = admitted.lease;
  book->shipment = admitted.shipment;
  book->predicted_ttft = estimate.ttft();
  const absl::Duration guess = kGuessedTokenCost * (book->num_tokens() - estimate.cached_tokens);
  book->latest_start = LatestStart(now, estimate.compute.value_or(guess), book->expiry);
  model_->CheckEstimate(*book, estimate, now);
  model_->Accepted(book);
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
