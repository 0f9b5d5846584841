#include "server/net/connection_ledger.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>

#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace headstart {
namespace {

constexpr double kSlackBytes = 1 << 20;
// Pings, and calls of services that are not ours: health.
constexpr double kIdleBytesPerSecond = 4 << 10;
// Who takes KV sends window updates: 13 bytes for some thousands.
constexpr double kSentPerReceived = 256;
// Clients that change their mind before they have sent what they want are rare.
constexpr double kAbandonedCalls = 200;
constexpr double kAbandonedPerSecond = 20;

// gRPC's name of a peer as ours: without scheme, escapes, and the scope of a link-local address.
std::string NameOf(absl::string_view peer) {
  if (!absl::ConsumePrefix(&peer, "ipv4:")) absl::ConsumePrefix(&peer, "ipv6:");
  std::string name = absl::StrReplaceAll(peer, {{"%5B", "["}, {"%5D", "]"}, {"%25", "%"}});
  const size_t scope = name.find('%'), end = name.find(']');
  if (scope < end && end != std::string::npos) name.erase(scope, end - scope);
  return name;
}

}  // namespace

std::optional<Traffic> TrafficOf(int fd) {
  tcp_info info = {};
  socklen_t length = sizeof(info);
  constexpr size_t kWanted = offsetof(tcp_info, tcpi_bytes_received) + sizeof(uint64_t);
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) != 0 || length < kWanted) {
    return std::nullopt;
  }
  return Traffic{static_cast<int64_t>(info.tcpi_bytes_received),
                 static_cast<int64_t>(info.tcpi_bytes_acked)};
}

void ConnectionLedger::OnCall(absl::string_view peer) {
  MutexLock lock(&mutex_);
  Account* account = Find(peer);
  if (account == nullptr) return;
  ++account->waiting_calls;
  account->accounted += static_cast<double>(budget_.metadata_bytes);
}

void ConnectionLedger::OnFirstMessage(absl::string_view peer, int64_t bytes) {
  MutexLock lock(&mutex_);
  Account* account = Find(peer);
  if (account == nullptr) return;
  --account->waiting_calls;
  account->accounted += static_cast<double>(bytes);
}

void ConnectionLedger::OnMessage(absl::string_view peer, int64_t bytes) {
  MutexLock lock(&mutex_);
  if (Account* account = Find(peer)) account->accounted += static_cast<double>(bytes);
}

void ConnectionLedger::OnCallWithoutMessage(absl::string_view peer) {
  MutexLock lock(&mutex_);
  Account* account = Find(peer);
  if (account == nullptr) return;
  --account->waiting_calls;
  ++account->abandoned;
}

bool ConnectionLedger::Open(const std::string& name) {
  MutexLock lock(&mutex_);
  const auto [account, is_new] = accounts_.try_emplace(name);
  if (is_new) account->second.checked_at = Instant::Now();
  return is_new;
}

void ConnectionLedger::Close(const std::string& name) {
  MutexLock lock(&mutex_);
  accounts_.erase(name);
}

ConnectionLedger::Finding ConnectionLedger::Check(const std::string& name, const Traffic& traffic,
                                                  Instant now) {
  MutexLock lock(&mutex_);
  const auto found = accounts_.find(name);
  if (found == accounts_.end()) return {};
  Account& account = found->second;
  const double seconds = absl::ToDoubleSeconds(now - account.checked_at);
  account.checked_at = now;
  account.accounted += seconds * kIdleBytesPerSecond +
                       static_cast<double>(traffic.sent - account.sent) / kSentPerReceived;
  account.sent = traffic.sent;
  // Nothing is saved up: what calls announced and did not send is no credit for later.
  account.accounted = std::min(account.accounted, static_cast<double>(traffic.received));
  account.abandoned = std::max(0.0, account.abandoned - seconds * kAbandonedPerSecond);
  const double unaccounted = static_cast<double>(traffic.received) - account.accounted;
  const double messages =
      static_cast<double>(budget_.message_bytes) * static_cast<double>(1 + account.waiting_calls);
  Finding finding{std::nullopt, static_cast<int64_t>(unaccounted)};
  if (unaccounted > messages + kSlackBytes) finding.cut = CutReason::kUnaccountedBytes;
  if (account.abandoned > kAbandonedCalls) finding.cut = CutReason::kAbandonedCalls;
  return finding;
}

ConnectionLedger::Account* ConnectionLedger::Find(absl::string_view peer) {
  const auto found = accounts_.find(NameOf(peer));
  return found == accounts_.end() ? nullptr : &found->second;
}

}  // namespace headstart
