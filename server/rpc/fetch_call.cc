#include "server/rpc/fetch_call.h"

#include <utility>

#include "engine/engine.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/call_metadata.h"
#include "server/rpc/convert.h"

namespace headstart {
namespace {

absl::Status WrongMessage(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, ErrorReason::kInvalidField, message);
}

}  // namespace

FetchCall::FetchCall(ServiceContext* service, grpc::CallbackServerContext* call)
    : KvCall(service, call) {
  record_.peer = call->peer();
  record_.came_at = Instant::Now();
  record_.trace = service->tracer->Begin(TraceParent(*call));
}

absl::Status FetchCall::Begin(const grpc::ByteBuffer& message) {
  v1::FetchKvRequest request;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(context(), service().options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(message, &request));
  if (!request.has_fetch()) return WrongMessage("fetch is missing: it comes first");
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(service()));
  HEADSTART_ASSIGN_OR_RETURN(
      record_.part, ToPart("fetch.part.", request.fetch().part(), model->engine->geometry()));
  record_.from_chunk = request.fetch().from_chunk();
  fetch_id_ = request.fetch().fetch_id();
  service().tracer->Join(fetch_id_, &record_.trace);
  owner_ = PeerName(context(), service().options->tls);
  HEADSTART_ASSIGN_OR_RETURN(
      auto reader, model->engine->Fetch(fetch_id_, owner_, record_.part, record_.from_chunk));
  engine_ = model->engine;
  record_.opened = true;
  record_.opened_at = Instant::Now();
  service().metrics->RecordFetchStart(/*resumes=*/record_.from_chunk > 0);
  sender().Ship(std::move(reader), record_.part);
  ReadNext();
  return absl::OkStatus();
}

absl::Status FetchCall::OnMessage(const grpc::ByteBuffer& message) {
  v1::FetchKvRequest request;
  HEADSTART_RETURN_IF_ERROR(ParseMessage(message, &request));
  if (!request.has_ack()) return WrongMessage("ack is missing: a call fetches once");
  HEADSTART_RETURN_IF_ERROR(sender().Acknowledge(request.ack().num_chunks()));
  // KV that is gone meanwhile has told the sender so.
  engine_->Renew(fetch_id_, owner_).status().IgnoreError();
  return absl::OkStatus();
}

void FetchCall::Settle(const absl::Status& status) {
  record_.sent = sender().record();
  record_.ended_at = Instant::Now();
  service().metrics->RecordFetch(record_, status);
  service().tracer->End(record_, status);
  LogFetch(record_, status);
}

}  // namespace headstart
