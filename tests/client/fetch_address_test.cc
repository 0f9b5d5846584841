#include "client/fetch_address.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

std::string Target(const std::string& target, const std::string& address, const std::string& peer,
                   const std::vector<std::string>& allowed = {}) {
  PrefillClientOptions options;
  options.target = target;
  options.allowed_fetch_hosts = allowed;
  const absl::StatusOr<std::string> fetch = FetchTarget(options, address, peer);
  return fetch.ok() ? *fetch : absl::StatusCodeToString(fetch.status().code());
}

TEST(FetchTargetTest, IsThePeerWhenTheServerNamesNone) {
  EXPECT_EQ(Target("dns:///many:8443", "", "ipv4:10.0.0.7:8443"), "ipv4:10.0.0.7:8443");
  EXPECT_EQ(Target("dns:///many:8443", "", ""), "dns:///many:8443");
}

TEST(FetchTargetTest, MayNameTheTargetsOwnHostsAtAnyPort) {
  EXPECT_EQ(Target("one:8443", "one:9000", ""), "dns:///one:9000");
  EXPECT_EQ(Target("dns:///One:8443", "ONE:9000", ""), "dns:///ONE:9000");
  EXPECT_EQ(Target("dns://8.8.8.8/one:8443", "one:1", ""), "dns:///one:1");
  EXPECT_EQ(Target("dns:one", "one:1", ""), "dns:///one:1");
  EXPECT_EQ(Target("ipv4:10.0.0.1:80,10.0.0.2:80", "10.0.0.2:81", ""), "dns:///10.0.0.2:81");
  EXPECT_EQ(Target("ipv6:[::1]:80", "[::1]:81", ""), "dns:///[::1]:81");
  EXPECT_EQ(Target("[::1]:80", "[::1]:81", ""), "dns:///[::1]:81");
}

TEST(FetchTargetTest, MayNameThePeersHost) {
  EXPECT_EQ(Target("dns:///many:8443", "10.0.0.7:1", "ipv4:10.0.0.7:8443"), "dns:///10.0.0.7:1");
  EXPECT_EQ(Target("dns:///many:8443", "[fd00::7]:1", "ipv6:%5Bfd00::7%5D:8443"),
            "dns:///[fd00::7]:1");
}

TEST(FetchTargetTest, MayNameWhatTheCallerAllows) {
  EXPECT_EQ(Target("one:1", "two:1", "", {"three", "two"}), "dns:///two:1");
  EXPECT_EQ(Target("one:1", "anything:1", "", {"*"}), "dns:///anything:1");
}

TEST(FetchTargetTest, NamesAHostThatIsNotAllowed) {
  PrefillClientOptions options;
  options.target = "one:1";
  options.allowed_fetch_hosts = {"two.example"};
  for (const char* address : {"evil.example:1", "two.example.evil:1", "two:1", "10.0.0.8:443"}) {
    EXPECT_THAT(FetchTarget(options, address, "ipv4:10.0.0.7:1"),
                StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr(address)));
  }
}

TEST(FetchTargetTest, TakesOnlyHostAndPort) {
  for (const char* address :
       {"one", "one:", ":1", "one:0", "one:65536", "one:-1", "one:http", "unix:/run/socket",
        "dns:///one:1", "one:1,two:1", "one%2f:1", "[::1]", "::1"}) {
    EXPECT_EQ(Target("one:1", address, "", {"*"}), "DATA_LOSS") << address;
  }
}

TEST(FetchServerNameTest, IsTheNameThatTheTargetWouldHaveHad) {
  PrefillClientOptions options;
  options.target = "dns:///prefill.example:8443";
  EXPECT_EQ(FetchServerName(options, "ipv4:10.0.0.7:8443"), "prefill.example");
  EXPECT_EQ(FetchServerName(options, "dns:///10.0.0.7:8443"), "prefill.example");
  EXPECT_EQ(FetchServerName(options, "dns:///[fd00::7]:8443"), "prefill.example");
  EXPECT_EQ(FetchServerName(options, "dns:///pod-3:8443"), "");
  options.target = "ipv4:10.0.0.7:8443,10.0.0.8:8443";
  EXPECT_EQ(FetchServerName(options, "ipv4:10.0.0.7:8443"), "");
  options.tls.server_name = "other.example";
  EXPECT_EQ(FetchServerName(options, "dns:///pod-3:8443"), "other.example");
}

}  // namespace
}  // namespace headstart
