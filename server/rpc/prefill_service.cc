#include "server/rpc/prefill_service.h"

#include <string>

#include "kernels/base/status_macros.h"
#include "server/rpc/call_metadata.h"
#include "server/rpc/convert.h"
#include "server/rpc/describe.h"
#include "server/rpc/fetch_call.h"
#include "server/rpc/prefill_call.h"
#include "server/rpc/rich_status.h"

namespace headstart {
namespace {

constexpr int kPrefillIndex = 0;  // of the service's methods, in the order of prefill.proto

}  // namespace

PrefillService::PrefillService(ServiceContext* context) : context_(*context) {
  // On the wire a call with one request and a stream of responses is the same as one with streams
  // both ways. Taken as the latter, the call is ours before its request has come, so that we can
  // put a limit to the wait for it.
  MarkMethodStreamed(kPrefillIndex, nullptr);
  MarkMethodRawCallback(kPrefillIndex,
                        new grpc::internal::CallbackBidiHandler<grpc::ByteBuffer, grpc::ByteBuffer>(
                            [this](grpc::CallbackServerContext* call) {
                              return new PrefillCall(&context_, call);  // goes in its OnDone
                            }));
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* PrefillService::FetchKv(
    grpc::CallbackServerContext* call) {
  return new FetchCall(&context_, call);  // goes in its OnDone
}

grpc::ServerUnaryReactor* PrefillService::Answer(grpc::CallbackServerContext* call,
                                                 const grpc::ByteBuffer& request,
                                                 const absl::Status& status) const {
  const std::string peer = call->peer();
  context_.ledger->OnCall(peer);
  context_.ledger->OnFirstMessage(peer, static_cast<int64_t>(request.Length()));
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

grpc::ServerUnaryReactor* PrefillService::RenewLease(grpc::CallbackServerContext* call,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  return Answer(call, *request, Renew(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::ReleaseKv(grpc::CallbackServerContext* call,
                                                    const grpc::ByteBuffer* request,
                                                    grpc::ByteBuffer* response) {
  return Answer(call, *request, Release(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::GetModelInfo(grpc::CallbackServerContext* call,
                                                       const grpc::ByteBuffer* request,
                                                       grpc::ByteBuffer* response) {
  return Answer(call, *request, DescribeModel(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::GetServerInfo(grpc::CallbackServerContext* call,
                                                        const grpc::ByteBuffer* request,
                                                        grpc::ByteBuffer* response) {
  return Answer(call, *request, DescribeServer(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::Estimate(grpc::CallbackServerContext* call,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return Answer(call, *request, Foresee(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::GetLoads(grpc::CallbackServerContext* call,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return Answer(call, *request, DescribeLoads(*call, *request, response));
}

absl::Status PrefillService::Renew(const grpc::CallbackServerContext& call,
                                   const grpc::ByteBuffer& request,
                                   grpc::ByteBuffer* response) const {
  v1::RenewLeaseRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  HEADSTART_ASSIGN_OR_RETURN(
      const absl::Duration lease,
      model->engine->Renew(parsed.fetch_id(), PeerName(call, context_.options->tls)));
  v1::RenewLeaseResponse renewed;
  SetDuration(lease, renewed.mutable_lease());
  *response = SerializeMessage(renewed);
  return absl::OkStatus();
}

absl::Status PrefillService::Release(const grpc::CallbackServerContext& call,
                                     const grpc::ByteBuffer& request,
                                     grpc::ByteBuffer* response) const {
  v1::ReleaseKvRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  HEADSTART_RETURN_IF_ERROR(
      model->engine->Release(parsed.fetch_id(), PeerName(call, context_.options->tls)));
  *response = SerializeMessage(v1::ReleaseKvResponse());
  return absl::OkStatus();
}

absl::Status PrefillService::DescribeModel(const grpc::CallbackServerContext& call,
                                           const grpc::ByteBuffer& request,
                                           grpc::ByteBuffer* response) const {
  v1::GetModelInfoRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_RETURN_IF_ERROR(CheckModelName(parsed.model(), context_.model_name));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  *response = SerializeMessage(ToModelInfo(*model));
  return absl::OkStatus();
}

absl::Status PrefillService::DescribeServer(const grpc::CallbackServerContext& call,
                                            const grpc::ByteBuffer& request,
                                            grpc::ByteBuffer* response) const {
  v1::GetServerInfoRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  const bool draining = context_.lifecycle->phase() == Lifecycle::Phase::kDraining;
  *response = SerializeMessage(ToServerInfo(*model, draining));
  return absl::OkStatus();
}

absl::Status PrefillService::Foresee(const grpc::CallbackServerContext& call,
                                     const grpc::ByteBuffer& request,
                                     grpc::ByteBuffer* response) const {
  v1::EstimateRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_RETURN_IF_ERROR(CheckModelName(parsed.request().model(), context_.model_name));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  HEADSTART_ASSIGN_OR_RETURN(PrefillRequest prefill, ToRequest(parsed, *model));
  HEADSTART_ASSIGN_OR_RETURN(prefill.deadline, DeadlineOf(parsed, *context_.options));
  *response = SerializeMessage(ToEstimate(model->engine->Estimate(prefill)));
  return absl::OkStatus();
}

absl::Status PrefillService::DescribeLoads(const grpc::CallbackServerContext& call,
                                           const grpc::ByteBuffer& request,
                                           grpc::ByteBuffer* response) const {
  v1::GetLoadsRequest parsed;
  HEADSTART_RETURN_IF_ERROR(CheckPeer(call, context_.options->tls));
  HEADSTART_RETURN_IF_ERROR(ParseMessage(request, &parsed));
  HEADSTART_ASSIGN_OR_RETURN(const ServedModel* model, LoadedModel(context_));
  *response = SerializeMessage(ToLoads(*model));
  return absl::OkStatus();
}

}  // namespace headstart
