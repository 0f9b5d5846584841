#include "server/rpc/prefill_service.h"

#include "kernels/base/status_macros.h"
#include "server/error.h"
#include "server/rpc/call_metadata.h"
#include "server/rpc/kv_stream.h"
#include "server/rpc/rich_status.h"

namespace headstart {
namespace {

constexpr int kPrefillIndex = 0;  // of the service's methods, in the order of prefill.proto

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* call, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::StatusOr<const ServedModel*> LoadedModel(const ServiceContext& context) {
  const absl::Status open = context.admission->CheckOpen();  // first: open means loaded
  const ServedModel* model = context.model.load();
  if (model == nullptr) return open;
  return model;
}

}  // namespace

PrefillService::PrefillService(ServiceContext* context) : context_(*context) {
  // On the wire a call with one request and a stream of responses is the same as one with streams
  // both ways. Taken as the latter, the call is ours before its request has come, so that we can
  // put a limit to the wait for it.
  MarkMethodStreamed(kPrefillIndex, nullptr);
  MarkMethodRawCallback(kPrefillIndex,
                        new grpc::internal::CallbackBidiHandler<grpc::ByteBuffer, grpc::ByteBuffer>(
                            [this](grpc::CallbackServerContext* call) {
                              return new KvStream(&context_, call);  // goes in its OnDone
                            }));
}

grpc::ServerUnaryReactor* PrefillService::GetModelInfo(grpc::CallbackServerContext* call,
                                                       const grpc::ByteBuffer* request,
                                                       grpc::ByteBuffer* response) {
  return Answer(call, DescribeModel(*call, *request, response));
}

grpc::ServerUnaryReactor* PrefillService::GetServerInfo(grpc::CallbackServerContext* call,
                                                        const grpc::ByteBuffer* request,
                                                        grpc::ByteBuffer* response) {
  return Answer(call, DescribeServer(*call, *request, response));
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
  const bool draining = !context_.admission->CheckOpen().ok();
  *response = SerializeMessage(ToServerInfo(*model, draining));
  return absl::OkStatus();
}

}  // namespace headstart
