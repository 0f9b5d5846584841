#include "server/rpc/prefill_call.h"

#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/call_metadata.h"
#include "server/rpc/convert.h"
#include "server/rpc/describe.h"

namespace headstart {

PrefillCall::PrefillCall(ServiceContext* service, grpc::CallbackServerContext* call)
    : KvCall(service, call) {
  record_.peer = call->peer();
  record_.came_at = Instant::Now();
  record_.trace = service->tracer->Begin(TraceParent(*call));
}

absl::Status PrefillCall::Begin(const grpc::ByteBuffer& message) {
  v1::PrefillRequest parsed;
  HEADSTART_RETURN_IF_ERROR(Parse(message, &parsed));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(service()));
  HEADSTART_RETURN_IF_ERROR(model->engine->CheckOpen());
  HEADSTART_ASSIGN_OR_RETURN(PrefillRequest request, ToRequest(parsed, *model));
  request.request_id = record_.request_id;
  request.deadline = EffectiveDeadline(context(), *service().options);
  if (request.detached) request.detached->owner = PeerName(context(), service().options->tls);
  record_.detached = request.detached.has_value();
  record_.num_tokens = request.num_tokens();
  record_.below_dense_limit = IsBelowDenseLimit(request);
  HEADSTART_ASSIGN_OR_RETURN(Submission submission, model->engine->Submit(std::move(request)));
  engine_ = model->engine;
  key_ = submission.key;
  record_.accepted = true;
  record_.accepted_at = Instant::Now();
  if (record_.detached) service().tracer->NoteFetchId(submission.fetch_id, record_.trace);
  SendAccepted(parsed, submission);
  sender().Ship(std::move(submission.reader), WholeKv(engine_->geometry()));
  ReadNext();  // there is to be none
  return absl::OkStatus();
}

absl::Status PrefillCall::OnMessage(const grpc::ByteBuffer& /*message*/) {
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest,
                   "a second request message: a call runs one prompt");
}

absl::Status PrefillCall::Parse(const grpc::ByteBuffer& message, v1::PrefillRequest* request) {
  HEADSTART_RETURN_IF_ERROR(CheckPeer(context(), service().options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(message, request));
  if (message.Length() == 0) {
    return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kInvalidField,
                     "token_ids is empty, as is the whole message: that is what gRPC makes of one "
                     "whose compressed flag is neither 0 nor 1");
  }
  HEADSTART_ASSIGN_OR_RETURN(record_.request_id, ChooseRequestId(request->request_id(), context()));
  context().AddInitialMetadata("x-request-id", record_.request_id);
  const absl::Status known = CheckModelName(request->model(), service().model_name);
  record_.unknown_model = !known.ok();
  return known;
}

void PrefillCall::SendAccepted(const v1::PrefillRequest& request, const Submission& submission) {
  v1::PrefillResponse response;
  v1::Accepted* accepted = response.mutable_accepted();
  accepted->set_request_id(record_.request_id);
  const Estimate& estimate = submission.estimate;
  accepted->set_queue_requests(static_cast<uint32_t>(estimate.requests_ahead));
  accepted->set_queue_tokens(static_cast<uint64_t>(estimate.tokens_ahead));
  accepted->set_cached_tokens(static_cast<uint32_t>(estimate.cached_tokens));
  if (const std::optional<absl::Duration> ttft = estimate.ttft()) {
    SetDuration(*ttft, accepted->mutable_predicted_ttft());
  }
  accepted->set_transfer_params(request.transfer_params());
  if (record_.detached) {
    accepted->set_fetch_id(submission.fetch_id);
    accepted->set_fetch_address(service().options->fetch_address);
    SetDuration(submission.lease, accepted->mutable_lease());
  }
  sender().Send(response);
}

void PrefillCall::OnComputeStart() {
  record_.queue = Instant::Now() - record_.accepted_at;
  service().metrics->RecordComputeStart(*record_.queue);
}

void PrefillCall::Settle(const absl::Status& status) {
  record_.sent = sender().record();
  record_.ended_at = Instant::Now();
  // Detached KV that was computed stays for those who fetch it.
  const bool keep = record_.detached && record_.sent.result != nullptr;
  if (engine_ != nullptr && !keep) {
    engine_->End(key_, status.ok() ? absl::CancelledError("all of it was sent") : status);
  }
  service().metrics->RecordCall(record_, status);
  service().recent_prompts->Add(record_, status);
  service().tracer->End(record_, status);
  LogCall(record_, status);
}

}  // namespace headstart
