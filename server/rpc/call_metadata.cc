#include "server/rpc/call_metadata.h"

#include <grpc/grpc_security_constants.h>

#include <algorithm>
#include <vector>

#include "absl/random/random.h"
#include "absl/strings/str_format.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"
#include "server/rpc/convert.h"

namespace headstart {
namespace {

std::string Metadata(const grpc::ServerContextBase& call, const char* key) {
  const auto found = call.client_metadata().find(key);
  if (found == call.client_metadata().end()) return "";
  return std::string(found->second.data(), found->second.size());
}

bool IsAllowed(const std::string& name, const ServerTlsOptions& tls) {
  return tls.allowed_sans.empty() || std::find(tls.allowed_sans.begin(), tls.allowed_sans.end(),
                                               name) != tls.allowed_sans.end();
}

std::vector<std::string> CertificateNames(const grpc::ServerContextBase& call, const char* kind) {
  std::vector<std::string> names;
  for (const grpc::string_ref& name : call.auth_context()->FindPropertyValues(kind)) {
    names.emplace_back(name.data(), name.size());
  }
  return names;
}

// The first allowed one of the client's certificate, or empty.
std::string AllowedName(const grpc::ServerContextBase& call, const ServerTlsOptions& tls) {
  const std::vector<std::string> names = CertificateNames(call, GRPC_X509_SAN_PROPERTY_NAME);
  const auto found = std::find_if(names.begin(), names.end(),
                                  [&](const std::string& name) { return IsAllowed(name, tls); });
  return found == names.end() ? "" : *found;
}

}  // namespace

absl::Status CheckPeer(const grpc::ServerContextBase& call, const ServerTlsOptions& tls) {
  if (tls.allowed_sans.empty() || !AllowedName(call, tls).empty()) return absl::OkStatus();
  return MakeError(absl::StatusCode::kPermissionDenied, ErrorReason::kPeerNotAllowed,
                   "the client's certificate carries no allowed subject alternative name");
}

std::string PeerName(const grpc::ServerContextBase& call, const ServerTlsOptions& tls) {
  if (tls.client_ca_file.empty()) return "";
  if (std::string name = AllowedName(call, tls); !name.empty()) return name;
  const std::vector<std::string> names = CertificateNames(call, GRPC_X509_CN_PROPERTY_NAME);
  return names.empty() ? "" : names.front();
}

absl::StatusOr<std::string> ChooseRequestId(const std::string& from_message,
                                            const grpc::ServerContextBase& call) {
  std::string id = from_message.empty() ? Metadata(call, "x-request-id") : from_message;
  if (id.empty()) {
    absl::InsecureBitGen random;
    return absl::StrFormat("%016x", absl::Uniform<uint64_t>(random));
  }
  HEADSTART_RETURN_IF_ERROR(CheckRequestId(id));
  return id;
}

std::optional<TraceContext> TraceParent(const grpc::ServerContextBase& call) {
  return ParseTraceParent(Metadata(call, "traceparent"));
}

Instant EffectiveDeadline(const grpc::ServerContextBase& call, const ServerOptions& options) {
  const Instant now = Instant::Now();
  const Instant client = FromGrpcTime(call.raw_deadline());
  if (client == Instant::InfiniteFuture()) return now + options.default_deadline;
  return std::min(client, now + options.max_deadline);
}

}  // namespace headstart
