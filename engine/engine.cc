#include "engine/engine.h"

#include <openssl/rand.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/check.h"
#include "kernels/base/instant.h"
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

absl::Status CheckPrefix(const PrefillRequest& request) {
  constexpr int32_t kMaxPriority = 100;
  if (request.priority < -kMaxPriority || request.priority > kMaxPriority) {
    return absl::InvalidArgumentError(absl::StrCat("priority=", request.priority, " is not in [",
                                                   -kMaxPriority, ", ", kMaxPriority, "]"));
  }
  const PrefixCaching& prefix = request.prefix;
  if (prefix.held_pages.size() % sizeof(PageHash) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("held_pages has ", prefix.held_pages.size(),
                                                   " bytes, not a multiple of ", sizeof(PageHash)));
  }
  if (!prefix.held_pages.empty() && prefix.any_page && !prefix.keeps_pages) {
    return absl::InvalidArgumentError(
        "held_pages: behind dense pages sparse ones have no names to be held by");
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

// ---- start and end

Engine::Engine(ResolvedModel model, const SchedulerOptions& scheduling, std::string model_hash,
               std::unique_ptr<Backend> backend, std::unique_ptr<PagePool> pages,
               std::unique_ptr<HostPages> host, std::unique_ptr<Runner> runner)
    : model_(std::move(model)),
      piece_tokens_(scheduling.piece_tokens),
      model_hash_(std::move(model_hash)),
      backend_(std::move(backend)),
      pages_(std::move(pages)),
      host_(std::move(host)),
      runner_(std::move(runner)),
      scheduler_(scheduling, pages_.get(), host_.get(),
                 MakeError(absl::StatusCode::kUnavailable, ErrorReason::kLoading,
                           "the model is being loaded")) {
  host_->NotifyRoom([this] { work_.Notify(); });
  compute_thread_ = std::thread([this] { Compute(); });
  expiry_thread_ = std::thread([this] { WatchExpiry(); });
}

Engine::~Engine() {
  {
    MutexLock lock(&mutex_);
    const absl::Status why = MakeError(absl::StatusCode::kUnavailable, ErrorReason::kDraining,
                                       "the server stopped before the prompt was computed");
    scheduler_.Close(why);
    scheduler_.EndAll(why);
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
  HEADSTART_RETURN_IF_ERROR(CheckPrefix(request));
  HEADSTART_RETURN_IF_ERROR(CheckKvDtype(request));
  HEADSTART_RETURN_IF_ERROR(
      ValidateAttentionOptions(request.attention, model_.config.heads, model_.config.num_layers));
  return ValidateSamplingOptions(request.sampling);
}

std::vector<DType> Engine::kv_dtypes() const { return {geometry().dtype, DType::kF8E4M3}; }

absl::Status Engine::CheckKvDtype(const PrefillRequest& request) const {
  if (!request.kv_dtype.has_value()) return absl::OkStatus();
  std::string offered;
  for (const DType dtype : kv_dtypes()) {
    if (*request.kv_dtype == dtype) return absl::OkStatus();
    absl::StrAppend(&offered, offered.empty() ? "" : " and ", DTypeName(dtype));
  }
  return MakeError(absl::StatusCode::kFailedPrecondition, ErrorReason::kKvDtypeUnavailable,
                   absl::StrCat("kv_dtype=", DTypeName(*request.kv_dtype),
                                " is not offered; this server ships ", offered));
}

void Engine::NamePages(PrefillRequest& request) const {
  if (!request.prefix.cache_root.has_value()) return;
  const int64_t named = NamedTokens(request, piece_tokens_);
  request.page_names =
      HashPages(model_hash(), *request.prefix.cache_root, request.token_ids, named / kBlockTokens);
  const int64_t held = CountHeld(request.page_names, request.prefix.held_pages) * kBlockTokens;
  // The last token's page is always shipped.
  const int64_t most = (request.num_tokens() - 1) / kBlockTokens * kBlockTokens;
  request.skip_tokens = std::max(request.skip_tokens, std::min(held, most));
}

headstart::Estimate Engine::Estimate(const PrefillRequest& request) const {
  MutexLock lock(&mutex_);
  return scheduler_.Foresee(request, Now());
}

absl::StatusOr<Submission> Engine::Submit(PrefillRequest request) {
  absl::StatusOr<Submission> submission;
  {
    MutexLock lock(&mutex_);
    submission = Take(std::move(request));
    NoteIdle();
  }
  // Where it was refused, too: an earlier attempt may have given way.
  work_.Notify();
  expiry_.Notify();
  return submission;
}

absl::StatusOr<Submission> Engine::Take(PrefillRequest request) {
  const bool detached = request.detached.has_value();
  Submission submission;
  if (detached) submission.fetch_id = NewFetchId();
  HEADSTART_ASSIGN_OR_RETURN(Admitted admitted,
                             scheduler_.Add(std::move(request), submission.fetch_id, Now()));
  submission.key = admitted.key;
  submission.estimate = std::move(admitted.estimate);
  submission.lease = admitted.lease;
  HEADSTART_ASSIGN_OR_RETURN(
      submission.reader, admitted.shipment->Open(
                             detached ? std::nullopt : std::optional(WholeKv(model_.geometry)), 0));
  return submission;
}

void Engine::End(uint64_t key, const absl::Status& why) {
  {
    MutexLock lock(&mutex_);
    scheduler_.End(key, why);
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
                             scheduler_.Find(fetch_id, owner));
  HEADSTART_RETURN_IF_ERROR(scheduler_.Renew(fetch_id, owner, Now()).status());
  return shipment->Open(part, from_chunk);
}

absl::StatusOr<absl::Duration> Engine::Renew(const std::string& fetch_id,
                                             const std::string& owner) {
  MutexLock lock(&mutex_);
  return scheduler_.Renew(fetch_id, owner, Now());
}

absl::Status Engine::Release(const std::string& fetch_id, const std::string& owner) {
  MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(scheduler_.Release(fetch_id, owner));
  NoteIdle();
  work_.Notify();
  return absl::OkStatus();
}

// ---- life

void Engine::Open() {
  MutexLock lock(&mutex_);
  scheduler_.Open();
}

void Engine::Close(absl::Status why) {
  MutexLock lock(&mutex_);
  scheduler_.Close(std::move(why));
}

absl::Status Engine::CheckOpen() const {
  MutexLock lock(&mutex_);
  return scheduler_.closed();
}

bool Engine::WaitUntilIdle(Instant deadline) const {
  MutexLock lock(&mutex_);
  while (scheduler_.load().inflight_requests > 0 && Now() < deadline) {
    idle_.WaitUntil(&mutex_, deadline);
  }
  return scheduler_.load().inflight_requests == 0;
}

void Engine::NoteIdle() {
  if (scheduler_.load().inflight_requests == 0) idle_.SignalAll();
}

void Engine::OnLost(std::function<void(const absl::Status&)> on_lost) {
  MutexLock lock(&mutex_);
  on_lost_ = std::move(on_lost);
}

SchedulerLoad Engine::load() const {
  MutexLock lock(&mutex_);
  return scheduler_.load();
}

std::optional<absl::Duration> Engine::PredictDrain() const {
  MutexLock lock(&mutex_);
  return scheduler_.PredictDrain(Now());
}

std::optional<double> Engine::TokensPerSecond() const {
  MutexLock lock(&mutex_);
  return scheduler_.costs().TokensPerSecond();
}

std::vector<RequestView> Engine::Requests(size_t limit) const {
  MutexLock lock(&mutex_);
  return scheduler_.Requests(limit);
}

// The engine's one look at a clock.
Instant Engine::Now() { return Instant::Now(); }

// ---- the threads

// What the runner asks between two layers of a step.
class Engine::BetweenLayers : public UrgentWork {
 public:
  BetweenLayers(Engine* engine, const Step* running) : engine_(*engine), running_(*running) {}

  std::optional<Step> Next() override {
    MutexLock lock(&engine_.mutex_);
    return engine_.scheduler_.NextUrgent(running_, Now());
  }
  void Finish(Step step, StepResult result) override {
    engine_.Finish(std::move(step), std::move(result));
  }

 private:
  Engine& engine_;
  const Step& running_;
};

void Engine::Compute() {
  while (std::optional<Step> step = WaitForStep()) {
    computing_.store(true);
    BetweenLayers urgent(this, &*step);
    StepResult result = runner_->Run(*step, &urgent);
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
      if (std::optional<Step> step = scheduler_.Next(Now())) return step;
      waits_for_room = scheduler_.load().waiting_for_room > 0;
    }
    // From now on somebody may be stalled.
    if (waits_for_room && !waited_for_room) expiry_.Notify();
    work_.WaitBeyond(seen, Instant::InfiniteFuture());
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
    scheduler_.Finish(step, std::move(result), Now());
    if (!lost.ok()) {
      const absl::Status why = MakeError(absl::StatusCode::kUnavailable, ErrorReason::kEngineLost,
                                         "the backend was lost before this request");
      scheduler_.Close(why);
      scheduler_.EndAll(why);
      on_lost = on_lost_;
    }
    NoteIdle();
  }
  expiry_.Notify();
  if (on_lost) on_lost(lost);
}

void Engine::WatchExpiry() {
  for (uint64_t seen = expiry_.count(); !stopping_.load(); seen = expiry_.count()) {
    Instant next;
    bool ended = false;
    {
      MutexLock lock(&mutex_);
      const int64_t released = scheduler_.load().released;
      next = scheduler_.Expire(Now());
      ended = scheduler_.load().released > released;
      NoteIdle();
    }
    if (ended) work_.Notify();
    expiry_.WaitBeyond(seen, next);
  }
}

}  // namespace headstart
