#include "client/fetch_address.h"

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace headstart {
namespace {

bool IsAddress(absl::string_view target) {
  return absl::StartsWith(target, "ipv4:") || absl::StartsWith(target, "ipv6:") ||
         absl::StartsWith(target, "unix");
}

struct HostPort {
  absl::string_view host;
  absl::string_view port;  // empty: none
};

// "host:port", "[v6]:port", or one without a port.
HostPort SplitHostPort(absl::string_view address) {
  const size_t bracket = address.rfind(']');
  const size_t colon = address.rfind(':');
  if (absl::StartsWith(address, "[") && bracket != address.npos) {
    const bool has_port = colon == bracket + 1;
    return {address.substr(1, bracket - 1), has_port ? address.substr(colon + 1) : ""};
  }
  if (colon == address.npos || address.find(':') != colon) return {address, ""};
  return {address.substr(0, colon), address.substr(colon + 1)};
}

// The hosts that a gRPC target or peer names, in lower case; of a socket file the whole name.
std::vector<std::string> HostsOf(const std::string& target) {
  if (absl::StartsWith(target, "unix")) return {target};
  const std::string readable = absl::StrReplaceAll(target, {{"%5B", "["}, {"%5D", "]"}});
  absl::string_view addresses = readable;
  if (IsAddress(addresses)) {
    addresses.remove_prefix(5);
  } else if (const size_t slash = addresses.rfind('/'); slash != addresses.npos) {
    addresses.remove_prefix(slash + 1);
  } else {
    absl::ConsumePrefix(&addresses, "dns:");
  }
  std::vector<std::string> hosts;
  for (const absl::string_view address : absl::StrSplit(addresses, ','))
    hosts.push_back(absl::AsciiStrToLower(SplitHostPort(address).host));
  return hosts;
}

// Not an IP address or a socket file.
bool IsName(absl::string_view host) {
  return !absl::StrContains(host, ':') && host.find_first_not_of("0123456789.") != host.npos;
}

bool Contains(const std::vector<std::string>& hosts, const std::string& host) {
  return std::find(hosts.begin(), hosts.end(), host) != hosts.end();
}

}  // namespace

absl::StatusOr<std::string> FetchTarget(const PrefillClientOptions& options,
                                        const std::string& fetch_address, const std::string& peer) {
  if (fetch_address.empty()) return peer.empty() ? options.target : peer;
  const HostPort address = SplitHostPort(fetch_address);
  uint32_t port = 0;
  if (address.host.empty() || address.host.find_first_of("/,%") != absl::string_view::npos ||
      !absl::SimpleAtoi(address.port, &port) || port == 0 || port > 65535) {
    return absl::DataLossError(
        absl::StrCat("accepted: fetch_address=", fetch_address, " is no host:port"));
  }
  const std::string host = absl::AsciiStrToLower(address.host);
  const std::vector<std::string>& allowed = options.allowed_fetch_hosts;
  if (Contains(HostsOf(options.target), host) || Contains(HostsOf(peer), host) ||
      Contains(allowed, host) || Contains(allowed, "*")) {
    return absl::StrCat("dns:///", fetch_address);
  }
  return absl::PermissionDeniedError(
      absl::StrCat("the server names ", fetch_address, " to fetch its KV from; ", host,
                   " is neither the target's host nor among allowed_fetch_hosts"));
}

std::string FetchServerName(const PrefillClientOptions& options, absl::string_view fetch_target) {
  if (!options.tls.server_name.empty()) return options.tls.server_name;
  const std::string own = HostsOf(options.target).front();
  return IsName(own) && !IsName(HostsOf(std::string(fetch_target)).front()) ? own : "";
}

}  // namespace headstart
