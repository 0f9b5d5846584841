#include "server/net/self_check.h"

#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/generic/generic_stub.h>

#include <future>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"

namespace headstart {

absl::Status CheckThroughListener(Listener& listener, absl::Duration timeout) {
  HEADSTART_ASSIGN_OR_RETURN(const int fd, listener.ConnectToSelf(timeout));
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);  // gRPC's way; it closes it, too
  grpc::GenericStub stub(grpc::CreateInsecureChannelFromFd("self", fd));
  grpc::ClientContext context;
  context.set_deadline(Instant::Now() + timeout);
  const grpc::Slice nothing;  // an empty HealthCheckRequest asks for the whole server
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> answer;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::StubOptions(), &request, &response,
                 [&answer](grpc::Status status) { answer.set_value(std::move(status)); });
  const grpc::Status status = answer.get_future().get();
  if (status.ok()) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("no answer through the own listener: ", status.error_message()));
}

}  // namespace headstart
