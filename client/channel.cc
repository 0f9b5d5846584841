#include "client/channel.h"

#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace headstart {
namespace {

// With several addresses calls take turns; an address whose health service says NOT_SERVING
// (loading, draining) gets none. A server without a health service counts as healthy.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "headstart.v1.PrefillService"}
})";

absl::StatusOr<std::string> ReadPem(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.good() && !file.eof())
    return absl::InvalidArgumentError(absl::StrCat("can't read ", path));
  if (text.empty())
    return absl::InvalidArgumentError(absl::StrCat(path, " is empty or can't be read"));
  return text;
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const TlsOptions& tls) {
  if (!tls.enabled) return grpc::InsecureChannelCredentials();
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError(
        "a client certificate needs its key, and a key its certificate");
  }
  grpc::SslCredentialsOptions pem;
  for (auto [path, text] : {std::pair(&tls.ca_file, &pem.pem_root_certs),
                            std::pair(&tls.cert_file, &pem.pem_cert_chain),
                            std::pair(&tls.key_file, &pem.pem_private_key)}) {
    absl::StatusOr<std::string> read = ReadPem(*path);
    if (!read.ok()) return read.status();
    *text = *std::move(read);
  }
  return grpc::SslCredentials(pem);
}

grpc::ChannelArguments MakeArguments(const PrefillClientOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(kServiceConfig);
  arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.keepalive_time)));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.keepalive_timeout)));
  // Retries are PrefillClient's: gRPC's own would hold a copy of the prompt, and know nothing of
  // chunks.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A connection of this client's own; else clients of one process share one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // The server never compresses. A message that says it is compressed stays as it is, can't be
  // decoded and is DATA_LOSS, instead of growing before anybody has looked at its size.
  arguments.SetInt(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  if (!options.tls.server_name.empty()) arguments.SetSslTargetNameOverride(options.tls.server_name);
  return arguments;
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const PrefillClientOptions& options) {
  if (options.target.empty()) return absl::InvalidArgumentError("target is empty");
  auto credentials = MakeCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  return grpc::CreateCustomChannel(options.target, *credentials, MakeArguments(options));
}

}  // namespace headstart
