// One call with one answer.
#pragma once

#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cancel_token.h"
#include "client/grpc_status.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "headstart/v1/prefill.grpc.pb.h"
#include "kernels/base/instant.h"
#include "proto/grpc_time.h"

namespace headstart {

struct UnaryOptions {
  Instant deadline;
  bool wait_for_ready = false;
  CancelToken* cancel = nullptr;
};

// UnaryCall(channel, &v1::PrefillService::Stub::GetModelInfo, request, options).
template <typename Request, typename Response>
absl::StatusOr<Response> UnaryCall(const std::shared_ptr<grpc::Channel>& channel,
                                   grpc::Status (v1::PrefillService::Stub::*method)(
                                       grpc::ClientContext*, const Request&, Response*),
                                   const Request& request, const UnaryOptions& options) {
  grpc::ClientContext context;
  context.set_deadline(options.deadline);
  context.set_wait_for_ready(options.wait_for_ready);
  std::optional<CancelScope> scope;
  if (options.cancel != nullptr) scope.emplace(*options.cancel, context);
  v1::PrefillService::Stub stub(channel);
  Response response;
  const grpc::Status status = (stub.*method)(&context, request, &response);
  if (!status.ok()) return ToAbslStatus(status);
  return response;
}

}  // namespace headstart
