// The gRPC server with every limit that Headstart sets.
#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <memory>

#include "absl/status/statusor.h"
#include "server/options.h"

namespace headstart {

// Accepts nothing by itself: connections come through the acceptors.
struct GrpcServer {
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;

  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Acceptor> acceptor;      // with the given credentials
  std::unique_ptr<Acceptor> own_acceptor;  // plain text, for the server's check of itself
};

// Health reports NOT_SERVING for "" and the service's name until told otherwise. `service` outlives
// the server.
absl::StatusOr<GrpcServer> BuildGrpcServer(const ServerOptions& options, bool reflection,
                                           std::shared_ptr<grpc::ServerCredentials> credentials,
                                           grpc::Service* service);

void SetServing(grpc::Server& server, bool serving);

}  // namespace headstart
