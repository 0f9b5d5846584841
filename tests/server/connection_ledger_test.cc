#include "server/net/connection_ledger.h"

#include <gtest/gtest.h>

#include <string>

namespace headstart {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr char kName[] = "127.0.0.1:5000";
constexpr char kPeer[] = "ipv4:127.0.0.1:5000";

class ConnectionLedgerTest : public ::testing::Test {
 protected:
  ConnectionLedgerTest() { ledger_.Open(kName); }

  // After `seconds` more, with so many bytes that came, and were sent, since the start.
  ConnectionLedger::Finding Check(int64_t received, double seconds = 0, int64_t sent = 0) {
    now_ += absl::Seconds(seconds);
    return ledger_.Check(kName, {received, sent}, now_);
  }

  ConnectionLedger ledger_{{.message_bytes = 4 * kMiB, .metadata_bytes = 8192}};
  Instant now_ = Instant::Now();
};

TEST_F(ConnectionLedgerTest, BytesThatNoCallAccountsForAreLimited) {
  EXPECT_EQ(Check(5 * kMiB - 1).cut, std::nullopt);
  EXPECT_EQ(Check(6 * kMiB).cut, CutReason::kUnaccountedBytes);
}

TEST_F(ConnectionLedgerTest, MessagesAreAccountedFor) {
  int64_t received = 0;
  for (int i = 0; i < 100; ++i) {
    ledger_.OnCall(kPeer);
    received += 4 * kMiB + 500;
    EXPECT_EQ(Check(received).cut, std::nullopt);
    ledger_.OnFirstMessage(kPeer, 4 * kMiB);
    EXPECT_EQ(Check(received).cut, std::nullopt);
  }
}

TEST_F(ConnectionLedgerTest, EveryWaitingCallMayHaveAMessageUnderWay) {
  for (int i = 0; i < 8; ++i) ledger_.OnCall(kPeer);
  EXPECT_EQ(Check(8 * 4 * kMiB).cut, std::nullopt);
  for (int i = 0; i < 8; ++i) ledger_.OnCallWithoutMessage(kPeer);
  EXPECT_EQ(Check(8 * 4 * kMiB).cut, CutReason::kUnaccountedBytes);
}

TEST_F(ConnectionLedgerTest, NothingIsSavedUp) {
  for (int i = 0; i < 1000; ++i) {
    ledger_.OnCall(kPeer);
    ledger_.OnFirstMessage(kPeer, kMiB);  // as a compressed header block would
  }
  EXPECT_EQ(Check(100, 3600).cut, std::nullopt);
  EXPECT_EQ(Check(100 + 6 * kMiB).cut, CutReason::kUnaccountedBytes);
}

TEST_F(ConnectionLedgerTest, TimeAndWhatIsSentAllowALittle) {
  EXPECT_EQ(Check(6 * kMiB, /*seconds=*/300).cut, std::nullopt);
  EXPECT_EQ(Check(9 * kMiB, 0, /*sent=*/1024 * kMiB).cut, std::nullopt);
  EXPECT_EQ(Check(14 * kMiB, 0, /*sent=*/1024 * kMiB).cut, CutReason::kUnaccountedBytes);
}

TEST_F(ConnectionLedgerTest, CallsWithoutAMessageAreLimitedByTime) {
  const auto abandon = [this](int count) {
    for (int i = 0; i < count; ++i) {
      ledger_.OnCall(kPeer);
      ledger_.OnCallWithoutMessage(kPeer);
    }
  };
  for (int i = 0; i < 10; ++i) {
    abandon(150);
    EXPECT_EQ(Check(0, 10).cut, std::nullopt);
  }
  abandon(500);
  EXPECT_EQ(Check(0).cut, CutReason::kAbandonedCalls);
}

TEST_F(ConnectionLedgerTest, KnowsPeersByGrpcsNames) {
  for (const auto& [name, peer] : {std::pair{"[::1]:5", "ipv6:%5B::1%5D:5"},
                                   std::pair{"[fe80::1]:5", "ipv6:%5Bfe80::1%25eth0%5D:5"},
                                   std::pair{"10.0.0.1:5", "ipv4:10.0.0.1:5"}}) {
    ledger_.Open(name);
    ledger_.OnCall(peer);
    EXPECT_EQ(ledger_.Check(name, {9 * kMiB, 0}, now_).cut, std::nullopt) << name;
    EXPECT_FALSE(ledger_.Open(name));
    ledger_.Close(name);
    ledger_.OnCall(peer);  // of a connection that is gone
    EXPECT_EQ(ledger_.Check(name, {9 * kMiB, 0}, now_).cut, std::nullopt) << name;
  }
}

}  // namespace
}  // namespace headstart
