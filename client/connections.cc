#include "client/connections.h"

#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "client/fetch_address.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "grpcpp/support/channel_arguments.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

// With several addresses calls take turns; an address whose health service says NOT_SERVING
// (loading, draining) gets none. A server without a health service counts as healthy.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "headstart.v1.PrefillService"}
})";

// How often certificate files are looked at for changes, which new connections get.
constexpr unsigned int kReloadSeconds = 5;

absl::Status CheckPem(const std::string& path) {
  if (path.empty() || std::ifstream(path).peek() != std::ifstream::traits_type::eof()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(path, " is empty or can't be read"));
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const TlsOptions& tls) {
  if (!tls.enabled) return grpc::InsecureChannelCredentials();
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError(
        "a client certificate needs its key, and a key its certificate");
  }
  for (const std::string* path : {&tls.ca_file, &tls.cert_file, &tls.key_file}) {
    HEADSTART_RETURN_IF_ERROR(CheckPem(*path));
  }
  grpc::experimental::TlsChannelCredentialsOptions options;
  if (!tls.ca_file.empty() || !tls.cert_file.empty()) {
    options.set_certificate_provider(
        std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
            tls.key_file, tls.cert_file, tls.ca_file, kReloadSeconds));
  }
  if (!tls.ca_file.empty()) options.watch_root_certs();
  if (!tls.cert_file.empty()) options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

// What all channels have in common.
grpc::ChannelArguments MakeArguments(const PrefillClientOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, ToGrpcMs(options.keepalive_time));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, ToGrpcMs(options.keepalive_timeout));
  // Retries are PrefillClient's: gRPC's own would hold a copy of the prompt, and know nothing of
  // chunks.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A connection of this channel's own; else channels of one process share one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // Probing opens the window until megabytes wait between sender and reader, out of every cache: a
  // quarter more CPU time for the same bytes. Instead the window follows the message that is read,
  // and covers a round trip while none is.
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 20);
  // The server never compresses. A message that says it is compressed stays as it is, can't be
  // decoded and is DATA_LOSS, instead of growing before anybody has looked at its size.
  arguments.SetInt(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  return arguments;
}

std::shared_ptr<grpc::Channel> MakeMainChannel(
    const PrefillClientOptions& options,
    const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  grpc::ChannelArguments arguments = MakeArguments(options);
  arguments.SetServiceConfigJSON(kServiceConfig);
  if (!options.tls.server_name.empty()) arguments.SetSslTargetNameOverride(options.tls.server_name);
  return grpc::CreateCustomChannel(options.target, credentials, arguments);
}

// Health is not asked for: a server that drains still gives away what it has computed.
std::shared_ptr<grpc::Channel> MakeFetchChannel(
    const PrefillClientOptions& options,
    const std::shared_ptr<grpc::ChannelCredentials>& credentials, const std::string& target) {
  grpc::ChannelArguments arguments = MakeArguments(options);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, ToGrpcMs(options.retry.initial_backoff));
  const std::string server_name = FetchServerName(options, target);
  if (options.tls.enabled && !server_name.empty()) arguments.SetSslTargetNameOverride(server_name);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

// Servers come and go; beyond this many the channels to all of them are let go.
constexpr size_t kMaxFetchTargets = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<Connections>> Connections::Create(
    const PrefillClientOptions& options) {
  if (options.target.empty()) return absl::InvalidArgumentError("target is empty");
  HEADSTART_ASSIGN_OR_RETURN(auto credentials, MakeCredentials(options.tls));
  return absl::WrapUnique(new Connections(options, std::move(credentials)));
}

Connections::Connections(const PrefillClientOptions& options,
                         std::shared_ptr<grpc::ChannelCredentials> credentials)
    : options_(options),
      credentials_(std::move(credentials)),
      main_(MakeMainChannel(options_, credentials_)) {}

std::shared_ptr<grpc::Channel> Connections::ForFetch(const std::string& target, int index) {
  absl::MutexLock lock(&mutex_);
  if (fetch_.size() >= kMaxFetchTargets && fetch_.count(target) == 0) fetch_.clear();
  auto& channels = fetch_[target];
  while (static_cast<int>(channels.size()) <= index)
    channels.push_back(MakeFetchChannel(options_, credentials_, target));
  return channels[index];
}

}  // namespace headstart
