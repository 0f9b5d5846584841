#include "server/rpc/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "headstart/v1/prefill.grpc.pb.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

// The reflection library adds itself to every builder of the process; this takes it out of one.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const std::unique_ptr<grpc::ServerBuilderPlugin>& plugin) {
      return plugin->name() == "proto_server_reflection";
    });
  }
};

void SetConnectionLimits(const ServerOptions& options, grpc::ServerBuilder* builder) {
  const ConnectionOptions& c = options.connections;
  builder->SetMaxReceiveMessageSize(c.max_message_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, c.max_metadata_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, c.max_streams_per_connection);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, ToGrpcMs(c.handshake_timeout));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, ToGrpcMs(c.keepalive_time));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, ToGrpcMs(c.keepalive_timeout));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              ToGrpcMs(c.min_ping_interval));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, ToGrpcMs(c.max_idle));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, ToGrpcMs(c.max_age));
  // A call that began before the connection grew old may finish, however long it takes.
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                              ToGrpcMs(std::max(options.max_deadline, options.max_lease)));
  grpc::ResourceQuota quota("headstart");
  quota.Resize(static_cast<size_t>(c.receive_memory_bytes));
  builder->SetResourceQuota(quota);
  // A small compressed body would be inflated before its size is looked at.
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
}

}  // namespace

absl::StatusOr<GrpcServer> BuildGrpcServer(const ServerOptions& options, bool reflection,
                                           std::shared_ptr<grpc::ServerCredentials> credentials,
                                           grpc::Service* service) {
  using ConnectionType = grpc::ServerBuilder::experimental_type::ExternalConnectionType;
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetConnectionLimits(options, &builder);
  if (!reflection) builder.SetOption(std::make_unique<WithoutReflection>());
  builder.RegisterService(service);
  GrpcServer out;
  out.acceptor = builder.experimental().AddExternalConnectionAcceptor(ConnectionType::FROM_FD,
                                                                      std::move(credentials));
  out.server = builder.BuildAndStart();
  grpc::ServerBuilder own;
  own.SetOption(std::make_unique<WithoutReflection>());
  out.no_service = std::make_unique<grpc::CallbackGenericService>();
  own.RegisterCallbackGenericService(out.no_service.get());
  out.own_acceptor = own.experimental().AddExternalConnectionAcceptor(
      ConnectionType::FROM_FD, grpc::InsecureServerCredentials());
  out.own_server = own.BuildAndStart();
  if (out.server == nullptr || out.own_server == nullptr) {
    return absl::InternalError("gRPC did not start a server");
  }
  SetServing(*out.server, false);
  return out;
}

void Serve(GrpcServer::Acceptor& acceptor, int listener_fd, int fd) {
  GrpcServer::Acceptor::NewConnectionParameters connection;
  connection.listener_fd = listener_fd;
  connection.fd = fd;
  acceptor.HandleNewConnection(&connection);
}

void SetServing(grpc::Server& server, bool serving) {
  grpc::HealthCheckServiceInterface* health = server.GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(v1::PrefillService::service_full_name(), serving);
}

}  // namespace headstart
