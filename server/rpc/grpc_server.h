// The gRPC server with every limit that Headstart sets.
#pragma once

#include <grpcpp/generic/async_generic_service.h>
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
  std::unique_ptr<Acceptor> acceptor;  // with the given credentials
  // For the server's check of itself: plain text, and nothing but health (gRPC starts no server
  // without a service).
  std::unique_ptr<grpc::CallbackGenericService> no_service;
  std::unique_ptr<grpc::Server> own_server;
  std::unique_ptr<Acceptor> own_acceptor;
};

// Health reports NOT_SERVING for "" and the service's name until told otherwise. `service` outlives
// the server.
absl::StatusOr<GrpcServer> BuildGrpcServer(const ServerOptions& options, bool reflection,
                                           std::shared_ptr<grpc::ServerCredentials> credentials,
                                           grpc::Service* service);

// Hands a connected, non-blocking socket over.
void Serve(GrpcServer::Acceptor& acceptor, int listener_fd, int fd);

void SetServing(grpc::Server& server, bool serving);

}  // namespace headstart
