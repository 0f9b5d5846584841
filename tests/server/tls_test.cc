// TLS and mTLS with real certificates.
#include "server/net/tls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "kernels/base/instant.h"
#include "server/net/self_check.h"
#include "tests/server/certificates.h"
#include "tests/server/fetching.h"
#include "tests/server/server_fixture.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class TlsTest : public ServerTest {
 protected:
  TlsTest()
      : authority_(MakeAuthority(dir_.path(), "authority")),
        other_authority_(MakeAuthority(dir_.path(), "other_authority")),
        server_identity_(MakeIdentity(dir_.path(), "server", authority_, "IP:127.0.0.1")) {
    options_.tls.cert_file = server_identity_.cert_file;
    options_.tls.key_file = server_identity_.key_file;
    options_.tls.reload_seconds = 1;
  }

  void WantClientCertificates() { options_.tls.client_ca_file = authority_.cert_file; }

  std::shared_ptr<grpc::Channel> Channel(
      const std::shared_ptr<grpc::ChannelCredentials>& credentials) const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel(target(), credentials, arguments);
  }
  std::shared_ptr<grpc::ChannelCredentials> Trusting(const Identity& authority) const {
    return grpc::SslCredentials({ReadFile(authority.cert_file), "", ""});
  }
  std::shared_ptr<grpc::ChannelCredentials> Showing(const Identity& identity) const {
    return grpc::SslCredentials({ReadFile(authority_.cert_file), ReadFile(identity.key_file),
                                 ReadFile(identity.cert_file)});
  }

  CallResult RunOn(const std::shared_ptr<grpc::ChannelCredentials>& credentials) const {
    const auto stub = v1::PrefillService::NewStub(Channel(credentials));
    return OpenCall(stub.get(), Prompt(5)).Finish();
  }

  // The handshake fails, and the next good client is served.
  void ExpectNoHandshake(const std::shared_ptr<grpc::ChannelCredentials>& bad,
                         const std::shared_ptr<grpc::ChannelCredentials>& good) {
    EXPECT_EQ(RunOn(bad).status.error_code(), grpc::StatusCode::UNAVAILABLE);
    const CallResult next = RunOn(good);
    EXPECT_TRUE(next.status.ok()) << next.status.error_message();
  }

  const Identity authority_;
  const Identity other_authority_;
  const Identity server_identity_;
};

TEST_F(TlsTest, ServesWhoTrustsIt) {
  Start();
  ExpectNoHandshake(Trusting(other_authority_), Trusting(authority_));
}

TEST_F(TlsTest, RefusesPlainText) {
  Start();
  ExpectNoHandshake(grpc::InsecureChannelCredentials(), Trusting(authority_));
}

TEST_F(TlsTest, RefusesClientsWithoutACertificateItTrusts) {
  WantClientCertificates();
  Start();
  const Identity client = MakeIdentity(dir_.path(), "client", authority_, "DNS:decode.example");
  const Identity stranger =
      MakeIdentity(dir_.path(), "stranger", other_authority_, "DNS:x.example");
  const Identity expired = MakeIdentity(dir_.path(), "expired", authority_, "DNS:y.example", -1);
  ExpectNoHandshake(Trusting(authority_), Showing(client));
  ExpectNoHandshake(Showing(stranger), Showing(client));
  ExpectNoHandshake(Showing(expired), Showing(client));
  ExpectNoHandshake(grpc::InsecureChannelCredentials(), Showing(client));
}

TEST_F(TlsTest, OnlyAllowedNamesMayCall) {
  WantClientCertificates();
  options_.tls.allowed_sans = {"decode.example", "spiffe://cluster/decode"};
  Start();
  const Identity allowed =
      MakeIdentity(dir_.path(), "allowed", authority_, "DNS:other.example,DNS:decode.example");
  const Identity by_uri =
      MakeIdentity(dir_.path(), "by_uri", authority_, "URI:spiffe://cluster/decode");
  const Identity denied =
      MakeIdentity(dir_.path(), "denied", authority_, "DNS:decode.example.evil");
  EXPECT_TRUE(RunOn(Showing(allowed)).status.ok());
  EXPECT_TRUE(RunOn(Showing(by_uri)).status.ok());
  const CallResult result = RunOn(Showing(denied));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(result.reason(), "PEER_NOT_ALLOWED");
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  EXPECT_EQ(v1::PrefillService::NewStub(Channel(Showing(denied)))
                ->GetModelInfo(&context, {}, &info)
                .error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  const auto estimate = [&](const Identity& identity) {
    grpc::ClientContext call;
    v1::EstimateRequest request;
    request.set_num_tokens(10);
    v1::EstimateResponse response;
    const grpc::Status status = v1::PrefillService::NewStub(Channel(Showing(identity)))
                                    ->Estimate(&call, request, &response);
    return status.error_code();
  };
  const auto loads = [&](const Identity& identity) {
    grpc::ClientContext call;
    v1::GetLoadsResponse response;
    return v1::PrefillService::NewStub(Channel(Showing(identity)))
        ->GetLoads(&call, {}, &response)
        .error_code();
  };
  EXPECT_EQ(estimate(allowed), grpc::StatusCode::OK);
  EXPECT_EQ(loads(allowed), grpc::StatusCode::OK);
  EXPECT_EQ(estimate(denied), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(loads(denied), grpc::StatusCode::PERMISSION_DENIED);
}

TEST_F(TlsTest, DetachedKvIsForTheCertificateThatAskedForIt) {
  WantClientCertificates();
  Start();
  const Identity owner = MakeIdentity(dir_.path(), "owner", authority_, "DNS:a.example");
  const Identity same_name = MakeIdentity(dir_.path(), "renewed", authority_, "DNS:a.example");
  const Identity other = MakeIdentity(dir_.path(), "other", authority_, "DNS:b.example");
  const auto stub_of = [this](const Identity& identity) {
    return v1::PrefillService::NewStub(Channel(Showing(identity)));
  };
  const auto stub = stub_of(owner), strangers = stub_of(other);
  const CallResult computed = OpenCall(stub.get(), DetachedPrompt(10)).Finish();
  ASSERT_TRUE(computed.status.ok()) << computed.status.error_message();
  const std::string fetch_id = computed.responses.front().accepted().fetch_id();

  const CallResult refused = OpenFetch(strangers.get(), fetch_id, {}).Finish();
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(refused.reason(), "PEER_NOT_ALLOWED");
  const auto renew = [&](v1::PrefillService::Stub* of) {
    grpc::ClientContext context;
    v1::RenewLeaseRequest request;
    request.set_fetch_id(fetch_id);
    v1::RenewLeaseResponse response;
    return of->RenewLease(&context, request, &response).error_code();
  };
  const auto release = [&](v1::PrefillService::Stub* of) {
    grpc::ClientContext context;
    v1::ReleaseKvRequest request;
    request.set_fetch_id(fetch_id);
    v1::ReleaseKvResponse response;
    return of->ReleaseKv(&context, request, &response).error_code();
  };
  EXPECT_EQ(renew(strangers.get()), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(release(strangers.get()), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(renew(stub.get()), grpc::StatusCode::OK);
  const auto renewed = stub_of(same_name);
  EXPECT_TRUE(OpenFetch(renewed.get(), fetch_id, {}).Finish().status.ok());
  EXPECT_EQ(release(renewed.get()), grpc::StatusCode::OK);
}

TEST_F(TlsTest, HealthCheckOfItselfNeedsNoCertificate) {
  WantClientCertificates();
  Start();
  EXPECT_EQ(Get("/healthz").status, 200) << Get("/healthz").body;
}

TEST_F(TlsTest, TakesANewCertificateWhileOldStreamsLive) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = v1::PrefillService::NewStub(Channel(Trusting(authority_)));
  OpenCall old_stream(stub.get(), Prompt(5));
  barrier.WaitUntilReached();
  EXPECT_EQ(RunOn(Trusting(other_authority_)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  Replace(server_identity_, MakeIdentity(dir_.path(), "next", other_authority_, "IP:127.0.0.1"));
  barrier.Open();
  const Instant limit = Instant::Now() + absl::Seconds(20);
  CallResult result = RunOn(Trusting(other_authority_));
  while (!result.status.ok() && Instant::Now() < limit) result = RunOn(Trusting(other_authority_));
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(RunOn(Trusting(authority_)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(old_stream.Finish().status.ok());
  EXPECT_TRUE(OpenCall(stub.get(), Prompt(5)).Finish().status.ok());  // on the old connection
}

// ---- files

TEST_F(TlsTest, NamesTheFileThatIsWrong) {
  const auto expect_refused = [this](auto change, const std::string& file) {
    ServerTlsOptions tls = options_.tls;
    change(tls);
    EXPECT_THAT(TlsIdentity::Load(tls),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(file)));
  };
  EXPECT_OK(TlsIdentity::Load(options_.tls));
  const std::string garbage = dir_ / "garbage.pem";
  ASSERT_OK(WriteFile(garbage, "no PEM"));
  expect_refused([](auto& tls) { tls.cert_file = "/none.crt"; }, "/none.crt");
  expect_refused([](auto& tls) { tls.key_file = "/none.key"; }, "/none.key");
  expect_refused([](auto& tls) { tls.client_ca_file = "/none.ca"; }, "/none.ca");
  expect_refused([&](auto& tls) { tls.cert_file = garbage; }, "garbage.pem");
  expect_refused([&](auto& tls) { tls.key_file = garbage; }, "garbage.pem");
  expect_refused([&](auto& tls) { tls.key_file = authority_.key_file; }, "authority.key");
  const Identity expired = MakeIdentity(dir_.path(), "past", authority_, "IP:127.0.0.1", -1);
  expect_refused(
      [&](auto& tls) {
        tls.cert_file = expired.cert_file;
        tls.key_file = expired.key_file;
      },
      "past.crt");
  expect_refused([&](auto& tls) { tls.client_ca_file = expired.cert_file; }, "past.crt");
  const std::string damaged = dir_ / "damaged.pem";
  ASSERT_OK(WriteFile(damaged,
                      ReadFile(authority_.cert_file) + "-----BEGIN CERTIFICATE-----\nno base64\n"));
  expect_refused([&](auto& tls) { tls.client_ca_file = damaged; }, "damaged.pem");
}

TEST_F(TlsTest, BundleMayHoldAnOldAuthority) {
  const Identity expired = MakeIdentity(dir_.path(), "past", authority_, "IP:127.0.0.1", -1);
  options_.tls.client_ca_file = dir_ / "bundle.pem";
  ASSERT_OK(WriteFile(options_.tls.client_ca_file,
                      ReadFile(expired.cert_file) + ReadFile(authority_.cert_file)));
  auto identity = TlsIdentity::Load(options_.tls);
  ASSERT_OK(identity);
  EXPECT_GT(*(*identity)->stats().client_ca_not_after, absl::Now());
}

// ---- a rotation that is not whole

// What a rotation may leave for a while, or for ever.
class HalfRotationTest : public TlsTest {
 protected:
  HalfRotationTest() : next_(MakeIdentity(dir_.path(), "next", authority_, "IP:127.0.0.1")) {
    WantClientCertificates();
    const std::string ca = dir_ / "ca.crt";
    std::filesystem::copy(authority_.cert_file, ca);
    options_.tls.client_ca_file = ca;
  }

  void ExpectRefusedAndServing(const std::string& file) {
    EXPECT_THAT(identity_->Reload(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(file)));
    EXPECT_EQ(identity_->TakeChanged(), std::nullopt);
  }

  const Identity next_;
  std::unique_ptr<TlsIdentity> identity_;
};

TEST_F(HalfRotationTest, LastGoodSetStaysUntilANewOneIsWhole) {
  identity_ = *TlsIdentity::Load(options_.tls);
  EXPECT_TRUE(identity_->TakeChanged().has_value());
  EXPECT_FALSE(identity_->Reload().value());
  EXPECT_EQ(identity_->TakeChanged(), std::nullopt);
  const std::string good_cert = ReadFile(server_identity_.cert_file);
  const std::string good_key = ReadFile(server_identity_.key_file);

  ASSERT_OK(WriteFile(server_identity_.key_file, ReadFile(next_.key_file)));
  ExpectRefusedAndServing("server.key");  // the certificate is still the old one
  ASSERT_OK(WriteFile(server_identity_.key_file, good_key));
  for (const char* bad : {"", "garbage", "-----BEGIN CERTIFICATE-----\nhalf"}) {
    ASSERT_OK(WriteFile(server_identity_.cert_file, bad));
    ExpectRefusedAndServing("server.crt");
    ASSERT_OK(WriteFile(server_identity_.cert_file, good_cert));
    ASSERT_OK(WriteFile(options_.tls.client_ca_file, bad));
    ExpectRefusedAndServing("ca.crt");
    ASSERT_OK(WriteFile(options_.tls.client_ca_file, ReadFile(authority_.cert_file)));
  }
  std::filesystem::remove(server_identity_.cert_file);
  ExpectRefusedAndServing("server.crt");
  EXPECT_EQ(identity_->stats().rejected, 8);
  EXPECT_EQ(identity_->stats().loaded, 0);

  Replace(server_identity_, next_);
  EXPECT_TRUE(identity_->Reload().value());
  EXPECT_TRUE(identity_->TakeChanged().has_value());
  EXPECT_EQ(identity_->stats().loaded, 1);
}

TEST_F(HalfRotationTest, ServesOnAndSaysSo) {
  Start();
  const Identity client = MakeIdentity(dir_.path(), "client", authority_, "DNS:decode.example");
  EXPECT_GT(Metric("headstart_tls_certificate_not_after_seconds{certificate=\"server\"}"),
            static_cast<double>(absl::ToUnixSeconds(absl::Now())));
  EXPECT_GT(Metric("headstart_tls_certificate_not_after_seconds{certificate=\"client_ca\"}"), 0);
  ASSERT_OK(WriteFile(server_identity_.key_file, ReadFile(next_.key_file)));
  EXPECT_TRUE(
      ComesTrue([this] { return Metric("headstart_tls_reloads_total{result=\"rejected\"}") > 0; }));
  EXPECT_TRUE(RunOn(Showing(client)).status.ok());
  EXPECT_EQ(Get("/readyz").status, 200) << Get("/readyz").body;
  Replace(server_identity_, next_);
  EXPECT_TRUE(
      ComesTrue([this] { return Metric("headstart_tls_reloads_total{result=\"loaded\"}") == 1; }));
  EXPECT_TRUE(RunOn(Showing(client)).status.ok());
  EXPECT_EQ(Get("/readyz").status, 200) << Get("/readyz").body;
}

// ---- readiness

TEST_F(TlsTest, ReadinessGoesThroughTheHandshake) {
  auto listener = Listener::Create({"127.0.0.1", 0}, {});
  ASSERT_OK(listener);
  (*listener)->Start([](int) {});
  const auto check = [&](const Listener::Handler& serve) {
    return CheckTlsHandshake(**listener, serve, absl::Milliseconds(500));
  };
  EXPECT_THAT(check([](int fd) { close(fd); }), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(check([](int fd) {
                EXPECT_EQ(write(fd, "HTTP/1.1 200 OK\r\n\r\n", 19), 19);
                close(fd);
              }),
              StatusIs(absl::StatusCode::kUnavailable));
  Descriptor silent;
  EXPECT_THAT(check([&silent](int fd) { silent = Descriptor(fd); }),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("in time")));
}

}  // namespace
}  // namespace headstart::testing
