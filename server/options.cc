#include "server/options.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/net/socket.h"
#include "server/ops/otlp_sink.h"

namespace headstart {
namespace {

absl::Status UsageError(absl::string_view flag, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat("--", flag, " ", problem));
}

absl::Status ValidateTls(const ServerTlsOptions& tls) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return UsageError("tls-cert", "and --tls-key go together");
  }
  if (!tls.client_ca_file.empty() && !tls.enabled()) {
    return UsageError("tls-client-ca", "needs --tls-cert and --tls-key");
  }
  if (!tls.allowed_sans.empty() && tls.client_ca_file.empty()) {
    return UsageError("tls-allowed-san", "needs --tls-client-ca");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateOptions(const ServerOptions& options) {
  if (options.model_dir.empty()) return UsageError("model", "is required");
  if (options.listen.empty()) return UsageError("listen", "is empty");
  if (options.piece_tokens % kBlockTokens != 0) {
    return UsageError("piece-tokens", absl::StrCat("is ", options.piece_tokens,
                                                   ", not a multiple of ", kBlockTokens));
  }
  if (options.batch_tokens % kBlockTokens != 0 || options.batch_tokens > options.piece_tokens) {
    return UsageError("batch-tokens",
                      absl::StrCat("is ", options.batch_tokens, ", not a multiple of ",
                                   kBlockTokens, " up to --piece-tokens ", options.piece_tokens));
  }
  if (options.default_deadline > options.max_deadline) {
    return UsageError("default-deadline", "is longer than --max-deadline");
  }
  if (options.default_lease > options.max_lease) {
    return UsageError("default-lease", "is longer than --max-lease");
  }
  if (!options.fetch_address.empty() && !ParseHostPort(options.fetch_address).ok()) {
    return UsageError("fetch-address",
                      absl::StrCat("is ", options.fetch_address, ", not host:port"));
  }
  if (!options.otlp_endpoint.empty() && !ParseOtlpEndpoint(options.otlp_endpoint).ok()) {
    return UsageError("otlp-endpoint", absl::StrCat("is ", options.otlp_endpoint,
                                                    ", not host:port or http(s)://host:port"));
  }
  if (!options.admin_socket.empty() && options.admin_listen.empty()) {
    return UsageError("admin-socket", "needs --admin-listen");
  }
  return ValidateTls(options.tls);
}

std::string ServedModelName(const ServerOptions& options) {
  if (!options.model_name.empty()) return options.model_name;
  std::filesystem::path dir = std::filesystem::path(options.model_dir).lexically_normal();
  if (dir.filename().empty()) dir = dir.parent_path();  // "models/x/"
  return dir.filename();
}

}  // namespace headstart
