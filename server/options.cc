#include "server/options.h"

#include <filesystem>

#include "absl/strings/escaping.h"
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

// Well-formed UTF-8, as proto, JSON and Prometheus demand it of names.
bool IsUtf8(absl::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto first = static_cast<unsigned char>(text[at]);
    const int length = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 : 4;
    if (length == 4 && first >> 3 != 30) return false;
    uint32_t code = length == 1 ? first : first & (0x7fu >> length);
    for (int i = 1; i < length; ++i) {
      if (at + i >= text.size() || (text[at + i] & 0xc0) != 0x80) return false;
      code = code << 6 | (text[at + i] & 0x3fu);
    }
    constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < kLeast[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    at += static_cast<size_t>(length);
  }
  return true;
}

absl::Status ValidateNames(const ServerOptions& options) {
  const std::string name = ServedModelName(options);
  if (!IsUtf8(name)) {
    return UsageError(
        "model-name",
        absl::StrCat("is \"", absl::CHexEscape(name), "\", not UTF-8",
                     options.model_name.empty() ? " (the folder's name; give another)" : ""));
  }
  if (name.empty()) return UsageError("model-name", "is empty, and the folder has no name");
  if (IsUtf8(options.fetch_address)) return absl::OkStatus();
  return UsageError("fetch-address", "is not UTF-8");
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
  HEADSTART_RETURN_IF_ERROR(ValidateNames(options));
  return ValidateTls(options.tls);
}

std::string ServedModelName(const ServerOptions& options) {
  if (!options.model_name.empty()) return options.model_name;
  std::filesystem::path dir = std::filesystem::path(options.model_dir).lexically_normal();
  if (dir.filename().empty()) dir = dir.parent_path();  // "models/x/"
  return dir.filename();
}

}  // namespace headstart
