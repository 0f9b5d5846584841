#include "engine/engine.h"

#include <openssl/rand.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/error.h"
#include "kernels/base/check.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

absl::Status CheckTokens(absl::Span<const int32_t> ids, int32_t vocab_size) {
  if (ids.empty()) return absl::InvalidArgumentError("token_ids is empty");
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "token_ids[", i, "]=", ids[i],
        ids[i] < 0 ? " is negative" : absl::StrCat(" is not below vocab_size ", vocab_size)));
  }
  return absl::OkStatus();
}

// An error after which the backend is of no use, as opposed to one of a request.
bool LosesBackend(const absl::Status& status) {
  return status.code() == absl::StatusCode::kInternal && !IsNonFiniteError(status);
}

std::string NewFetchId() {
  std::string id(16, '\0');
  HEADSTART_CHECK(
      RAND_bytes(reinterpret_cast<unsigned char*>(id.data()), static_cast<int>(id.size())) == 1);
  return id;
}

}  // namespace

// ---- start

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(ResolvedModel model,
                                                       std::unique_ptr<Backend> backend,
                                                       const LoadProgress& progress) {
  std::unique_ptr<Engine> engine(new Engine(std::move(model), std::move(backend)));
  HEADSTART_RETURN_IF_ERROR(engine->Load(progress));
  engine->compute_thread_ = std::thread([e = engine.get()] { e->Compute(); });
  engine->expiry_thread_ = std::thread([e = engine.get()] { e->WatchExpiry(); });
  return engine;
}

absl::Status Engine::Load(const LoadProgress& progress) {
  HEADSTART_RETURN_IF_ERROR(CheckFits(model_.plan, *backend_));
  const EngineOptions& options = model_.options;
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir));
  HEADSTART_ASSIGN_OR_RETURN(
      ModelWeights weights,
      LoadWeights(model_.config, *files, *backend_, options.max_prompt_tokens, progress));
  const SchedulerOptions scheduling = SchedulerOptionsOf(model_);
  LocalRunnerOptions running;
  running.geometry = model_.geometry;
  running.num_pages = options.kv_pool_tokens / kBlockTokens;
  running.num_slots = scheduling.num_slots;
  running.max_rows = model_.max_rows;
  running.max_prompt_tokens = options.max_prompt_tokens;
  HEADSTART_ASSIGN_OR_RETURN(
      runner_, LocalRunner::Create(model_.config, std::move(weights), running, *backend_));
  HEADSTART_ASSIGN_OR_RETURN(HostBuffer memory, backend_->AllocateHost(options.host_kv_bytes));
  const int64_t chunk_bytes = model_.geometry.chunk_bytes();
  pages_ = std::make_unique<PagePool>(running.num_pages);
  host_ = std::make_unique<HostPages>(std::move(memory), chunk_bytes,
                                      options.host_kv_bytes / chunk_bytes);
  host_->NotifyRoom([this] { work_.Notify(); });
  scheduler_ =
      std::make_unique<Scheduler>(scheduling, pages_.get(), host_.get(),
                                  MakeError(absl::StatusCode::kUnavailable, ErrorReason::kLoading,
                                            "the model is being loaded"));
  return absl::OkStatus();
}

Engine::~Engine() {
  if (!compute_thread_.joinable()) return;  // was never whole
  {
    MutexLock lock(&mutex_);
    const absl::Status why = MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                                       "the server stopped before the prompt was computed");
    scheduler_->Close(why);
    scheduler_->EndAll(why);
  }
  stopping_.store(true);
  work_.Notify();
  expiry_.Notify();
  compute_thread_.join();
  expiry_thread_.join();
  host_->WaitUntilAllBack();
}

// ---- requests

absl::Status Engine::Validate(const PrefillRequest& request) const {
  HEADSTART_RETURN_IF_ERROR(CheckTokens(request.token_ids, model_.config.vocab_size));
  const int64_t num_tokens = request.num_tokens();
  if (num_tokens > model_.prompt_limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_ids has ", num_tokens, " ids, limit ", model_.prompt_limit));
  }
  if (num_tokens > model_.options.kv_pool_tokens) {
    return MakeError(absl::StatusCode::kFailedPrecondition, ErrorReason::kPromptExceedsPool,
                     absl::StrCat("token_ids has ", num_tokens, " ids, the KV pool holds ",
                                  model_.options.kv_pool_tokens));
  }
  if (request.skip_tokens < 0 || request.skip_tokens >= num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("skip_tokens=", request.skip_tokens,
                                                   " is not below the ", num_tokens, " token_ids"));
  }
  HEADSTART_RETURN_IF_ERROR(
      ValidateAttentionOptions(request.attention, model_.config.heads, model_.config.num_layers));
  return ValidateSamplingOptions(request.sampling);
}

absl::StatusOr<Submission> Engine::Submit(PrefillRequest request) {
  const bool detached = request.detached.has_value();
  Submission submission;
  if (detached) submission.fetch_id = NewFetchId();
  Admitted admitted;
  {
    MutexLock lock(&mutex_);
    HEADSTART_ASSIGN_OR_RETURN(admitted,
                               scheduler_->Add(std::move(request), submission.fetch_id, Now()));
    submission.key = admitted.key;
    submission.requests_ahead = admitted.requests_ahead;
    submission.tokens_ahead = admitted.tokens_ahead;
    submission.lease = admitted.lease;
    HEADSTART_ASSIGN_OR_RETURN(
        submission.reader,
        admitted.shipment->Open(detached ? std::nullopt : std::optional(WholeKv(model_.geometry)),
                                0));
  }
  work_.Notify();
  expiry_.Notify();
  return submission;
}

void Engine::End(uint64_t key, const absl::Status& why) {
  {
    MutexLock lock(&mutex_);
    scheduler_->End(key, why);
    NoteIdle();
  }
  work_.Notify();
}

absl::StatusOr<std::unique_ptr<ShipmentReader>> Engine::Fetch(const std::string& fetch_id,
                                                              const std::string& owner,
                                                              const KvPart& part,
                                                              int64_t from_chunk) {
  MutexLock lock(&mutex_);
  HEADSTART_ASSIGN_OR_RETURN(const std::shared_ptr<Shipment> shipment,
                             scheduler_->Find(fetch_id, owner));
  HEADSTART_RETURN_IF_ERROR(scheduler_->Renew(fetch_id, owner, Now()).status());
  return shipment->Open(part, from_chunk);
}

absl::StatusOr<absl::Duration> Engine::Renew(const std::string& fetch_id,
                                             const std::string& owner) {
  MutexLock lock(&mutex_);
  return scheduler_->Renew(fetch_id, owner, Now());
}

absl::Status Engine::Release(const std::string& fetch_id, const std::string& owner) {
  MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(scheduler_->Release(fetch_id, owner));
  NoteIdle();
  work_.Notify();
  return absl::OkStatus();
}

// ---- life

void Engine::Open() {
  MutexLock lock(&mutex_);
  scheduler_->Open();
}

void Engine::Close(absl::Status why) {
  MutexLock lock(&mutex_);
  scheduler_->Close(std::move(why));
}

absl::Status Engine::CheckOpen() const {
  MutexLock lock(&mutex_);
  return scheduler_->closed();
}

bool Engine::WaitUntilIdle(absl::Time deadline) const {
  MutexLock lock(&mutex_);
  while (scheduler_->load().inflight_requests > 0 && Now() < deadline) {
    idle_.WaitUntil(&mutex_, deadline);
  }
  return scheduler_->load().inflight_requests == 0;
}

void Engine::NoteIdle() {
  if (scheduler_->load().inflight_requests == 0) idle_.SignalAll();
}

void Engine::OnLost(std::function<void(const absl::Status&)> on_lost) {
  MutexLock lock(&mutex_);
  on_lost_ = std::move(on_lost);
}

SchedulerLoad Engine::load() const {
  MutexLock lock(&mutex_);
  return scheduler_->load();
}

// The engine's one look at a clock.
absl::Time Engine::Now() { return absl::Now(); }

// ---- the threads

void Engine::Compute() {
  while (std::optional<Step> step = WaitForStep()) {
    computing_.store(true);
    StepResult result = runner_->Run(*step);
    computing_.store(false);
    Finish(*std::move(step), std::move(result));
  }
}

std::optional<Step> Engine::WaitForStep() {
  bool waits_for_room = false;
  // Counted before anything is looked at, the end included: no word of it is missed.
  for (uint64_t seen = work_.count(); !stopping_.load(); seen = work_.count()) {
    const bool waited_for_room = waits_for_room;
    {
      MutexLock lock(&mutex_);
      if (std::optional<Step> step = scheduler_->Next(Now())) return step;
      waits_for_room = scheduler_->load().waiting_for_room > 0;
    }
    // From now on somebody may be stalled.
    if (waits_for_room && !waited_for_room) expiry_.Notify();
    work_.WaitBeyond(seen, absl::InfiniteFuture());
  }
  return std::nullopt;
}

void Engine::Finish(Step step, StepResult result) {
  // What a piece that ended early did not use goes back before anyone hears of the end.
  for (Piece& piece : step.pieces) piece.host.clear();
  absl::Status lost;
  for (const PieceResult& piece : result) {
    if (LosesBackend(piece.status)) lost = piece.status;
  }
  std::function<void(const absl::Status&)> on_lost;
  {
    MutexLock lock(&mutex_);
    scheduler_->Finish(step, std::move(result), Now());
    if (!lost.ok()) {
      const absl::Status why = MakeError(absl::StatusCode::kUnavailable, ErrorReason::kEngineLost,
                                         "the backend was lost before this request");
      scheduler_->Close(why);
      scheduler_->EndAll(why);
      on_lost = on_lost_;
    }
    NoteIdle();
  }
  expiry_.Notify();
  if (on_lost) on_lost(lost);
}

void Engine::WatchExpiry() {
  for (uint64_t seen = expiry_.count(); !stopping_.load(); seen = expiry_.count()) {
    absl::Time next;
    bool ended = false;
    {
      MutexLock lock(&mutex_);
      const int64_t released = scheduler_->load().released;
      next = scheduler_->Expire(Now());
      ended = scheduler_->load().released > released;
      NoteIdle();
    }
    if (ended) work_.Notify();
    expiry_.WaitBeyond(seen, next);
  }
}

}  // namespace headstart
